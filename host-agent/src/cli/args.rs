//! The arguments. What reaches a guest is bytes from end to end.

use std::ffi::OsString;
use std::time::Duration;

use clap::builder::{PathBufValueParser, TypedValueParser as _};
use clap::{Parser, Subcommand, ValueEnum, ValueHint};

use super::code::CodeCommand;
use super::copy::CopyArgs;
use super::files::FsCommand;
use super::mount::MountArgs;
use super::policy::{Additions, Base, NetArgs};
use super::ports::Mapping;
use super::processes::{AttachArgs, KillArgs};
use super::top::TopArgs;

const DEFAULT_HOST: &str = "unix:/run/soulbox/soulboxd.sock";

/// Runs programs in microVMs that a soulboxd keeps.
#[derive(Debug, Parser)]
#[command(name = "soulbox", version)]
pub(super) struct Args {
    /// The daemon: unix:/PATH or http://ADDRESS:PORT.
    #[arg(long, global = true, env = "SOULBOX_HOST", default_value = DEFAULT_HOST)]
    pub(super) host: String,

    #[arg(long, global = true, value_enum, default_value_t)]
    pub(super) output: Output,

    /// The same as --output json.
    #[arg(long, global = true)]
    pub(super) json: bool,

    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum Output {
    #[default]
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run a program in a new sandbox, and delete that when it ends.
    ///
    /// Ends with the program's exit code, 128 and its number when a signal
    /// ended it, 124 after --timeout, 127 or 126 when it cannot be started, and
    /// 125 when SoulBox itself failed.
    Run(RunArgs),
    /// Run a program in a sandbox that exists; exit codes are those of `run`.
    Exec(ExecArgs),
    /// List the programs of a sandbox: those that run, and those that ended of late.
    Ps {
        /// The sandbox.
        id: String,
    },
    /// Show what a program says, from what is kept of its output on; exit codes are
    /// those of `run`.
    ///
    /// Ctrl-C leaves it running, unless it has a terminal and takes keys.
    Attach(AttachArgs),
    /// Send a program a signal.
    Kill(KillArgs),
    /// Run code in interpreters that keep their state between runs.
    Code {
        #[command(subcommand)]
        command: CodeCommand,
    },
    /// Files of a sandbox.
    Fs {
        #[command(subcommand)]
        command: FsCommand,
    },
    /// Show what goes on in a sandbox: CPU, memory, disks, pressure, processes.
    Top(TopArgs),
    /// Make a sandbox and print its id.
    Create(CreateArgs),
    /// List sandboxes in the order of their creation.
    Ls {
        /// Only those with this label; may be repeated.
        #[arg(long = "label", value_name = "KEY=VALUE", value_parser = pair)]
        labels: Vec<(String, String)>,
    },
    /// Show one sandbox and what it uses.
    Get { id: String },
    /// Delete sandboxes.
    Rm(RmArgs),
    /// Save a sandbox and give its CPU and memory back.
    Pause {
        id: String,
        /// Compress the saved memory: smaller on disk, slower to resume.
        #[arg(long)]
        cold: bool,
        /// Print to standard error where the time went.
        #[arg(long)]
        timings: bool,
    },
    /// Go on with a sandbox where it was paused.
    Resume {
        id: String,
        /// Print to standard error where the time went.
        #[arg(long)]
        timings: bool,
    },
    /// Snapshots of sandboxes: what others are made from, or they are taken back to.
    Snapshot {
        #[command(subcommand)]
        command: SnapshotCommand,
    },
    /// Take a sandbox back to a snapshot of it; what it did since is lost.
    Rollback {
        id: String,
        /// The snapshot's id.
        snapshot: String,
        /// Print to standard error where the time went.
        #[arg(long)]
        timings: bool,
    },
    /// Make copies of a running sandbox and print their ids.
    Fork(ForkArgs),
    /// What a sandbox may reach.
    Net {
        #[command(subcommand)]
        command: NetCommand,
    },
    /// Lead a port of the host to one of a sandbox, for as long as that runs.
    ///
    /// With a port it prints the address on the host. Without, it lists what there is.
    Port(PortArgs),
    /// Connect standard input and output to a TCP port of a sandbox.
    ///
    /// Works without a network in the sandbox, and as a ProxyCommand of ssh.
    Connect {
        /// The sandbox.
        id: String,
        /// Of a server in it.
        #[arg(value_parser = clap::value_parser!(u16).range(1..))]
        port: u16,
    },
    /// Copy a file or a directory into a sandbox, or out of one.
    ///
    /// One of SRC and DST is SANDBOX:PATH; a path that does not begin with / is below the
    /// user's home. A path here with a colon is written ./A:B.
    ///
    /// A file becomes DST, or a file in it where DST is a directory. A directory becomes
    /// DST where that is not there, else a directory in it; "DIR/." copies what is in it.
    /// What is there is replaced, other files in a directory stay. SRC is followed where it
    /// is a symbolic link; links below it stay links. Modes and times of change are kept,
    /// owners are not, nor set-user-ID bits. Devices, pipes and sockets are left out.
    ///
    /// A file is there whole or not at all. What is broken off of a large one stays beside
    /// it as .NAME.….soulbox-part, and the same copy goes on with it later, unless the
    /// source has changed. Ends with 0, and with 1 when something failed or a file changed
    /// while it was read.
    #[command(verbatim_doc_comment)]
    Cp(CopyArgs),
    /// Show a directory of a sandbox here, until interrupted or the sandbox's end.
    ///
    /// Stays in the foreground and says "ready" when it is there. Ctrl-C, SIGTERM and
    /// `umount DIR` end it with 0; when the sandbox goes it is unmounted and ends with 1.
    /// What the sandbox changes is seen at once. Symbolic links are shown as they are: an
    /// absolute target leads to a path of this host. There are no hard links, and locks hold
    /// on this host only.
    Mount(MountArgs),
    /// Print sandboxes, then each change and what their networks deny, until
    /// interrupted.
    Watch {
        /// Only those with this label; may be repeated.
        #[arg(long = "label", value_name = "KEY=VALUE", value_parser = pair)]
        labels: Vec<(String, String)>,
    },
    /// Show the host: what it has, what is left, and whether KVM works.
    Node,
    /// What sandboxes are made from.
    Template {
        #[command(subcommand)]
        command: TemplateCommand,
    },
    /// Print completions for a shell.
    Completions { shell: clap_complete::Shell },
}

#[derive(Debug, Subcommand)]
pub(super) enum TemplateCommand {
    /// List templates.
    Ls,
}

#[derive(Debug, Subcommand)]
pub(super) enum SnapshotCommand {
    /// Save a sandbox, which goes on, and print the snapshot's id.
    Create(SnapshotArgs),
    /// List snapshots in the order of their making.
    Ls {
        /// Only those of this sandbox.
        #[arg(long, default_value = "", hide_default_value = true)]
        sandbox: String,
        /// Only those with this label; may be repeated.
        #[arg(long = "label", value_name = "KEY=VALUE", value_parser = pair)]
        labels: Vec<(String, String)>,
    },
    /// Delete snapshots that nothing builds on.
    Rm {
        #[arg(required = true)]
        ids: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum NetCommand {
    /// Show its policy, its addresses and what went through.
    Show { id: String },
    /// Change what it may reach, at once. Without a POLICY the flags add to what it has.
    Set(NetSetArgs),
}

#[derive(Debug, clap::Args)]
pub(super) struct NetSetArgs {
    /// The sandbox.
    pub(super) id: String,
    /// off, internet, or a FILE, as for `create --net`. Replaces all it has.
    #[arg(value_name = "POLICY", value_hint = ValueHint::FilePath,
        value_parser = PathBufValueParser::new().map(Base::from))]
    pub(super) policy: Option<Base>,
    #[command(flatten)]
    pub(super) additions: Additions,
}

#[derive(Debug, clap::Args)]
pub(super) struct PortArgs {
    /// The sandbox [default: list those of all].
    pub(super) id: Option<String>,
    /// Its port, and where the host is to listen [default: any free port of the node's
    /// default address].
    #[arg(value_name = "[HOST_IP:][HOST_PORT:]PORT")]
    pub(super) mapping: Option<Mapping>,
    /// Remove what leads from this address of the host; may be repeated.
    #[arg(long = "rm", value_name = "HOST_IP:HOST_PORT", conflicts_with = "id")]
    pub(super) remove: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub(super) struct SnapshotArgs {
    /// The sandbox.
    pub(super) id: String,
    /// Make it a template of this name.
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(super) name: String,
    /// A label; may be repeated.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = pair)]
    pub(super) labels: Vec<(String, String)>,
    /// Compress the memory: smaller on disk, the first restore slower.
    #[arg(long)]
    pub(super) cold: bool,
    /// Print to standard error where the time went.
    #[arg(long)]
    pub(super) timings: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct ForkArgs {
    /// The sandbox to copy.
    pub(super) id: String,
    /// How many copies, 1 to 1000.
    #[arg(long, short = 'n', default_value_t = 1)]
    pub(super) count: u32,
    /// Delete each copy after this long, such as 90s, 10m or 2h [default: the node's].
    #[arg(long, value_parser = duration)]
    pub(super) ttl: Option<Duration>,
    /// A label of the copies; may be repeated.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = pair)]
    pub(super) labels: Vec<(String, String)>,
    /// Delete the sandbox itself once its copies run.
    #[arg(long)]
    pub(super) delete_parent: bool,
    /// Print to standard error where the time went.
    #[arg(long)]
    pub(super) timings: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct RunArgs {
    #[command(flatten)]
    pub(super) sandbox: SandboxArgs,
    #[command(flatten)]
    pub(super) process: ProcessArgs,
    /// Keep the sandbox when the program ends, and print its id to standard error.
    #[arg(long)]
    pub(super) keep: bool,
    /// Print to standard error where the time went.
    #[arg(long)]
    pub(super) timings: bool,
    /// The program and its arguments.
    #[arg(
        required_unless_present = "shell",
        conflicts_with = "shell",
        trailing_var_arg = true,
        value_name = "COMMAND"
    )]
    pub(super) argv: Vec<OsString>,
}

#[derive(Debug, clap::Args)]
pub(super) struct ExecArgs {
    /// The sandbox.
    pub(super) id: String,
    /// Print the program's id and leave it running.
    #[arg(short, long)]
    pub(super) detach: bool,
    #[command(flatten)]
    pub(super) process: ProcessArgs,
    /// The program and its arguments.
    #[arg(
        required_unless_present = "shell",
        conflicts_with = "shell",
        trailing_var_arg = true,
        value_name = "COMMAND"
    )]
    pub(super) argv: Vec<OsString>,
}

#[derive(Debug, clap::Args)]
pub(super) struct CreateArgs {
    #[command(flatten)]
    pub(super) sandbox: SandboxArgs,
    /// Make the call idempotent: with the same id and the same options, the
    /// same sandbox.
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(super) request_id: String,
    /// Print to standard error where the time went.
    #[arg(long)]
    pub(super) timings: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct RmArgs {
    #[arg(required_unless_present = "all")]
    pub(super) ids: Vec<String>,
    /// Skip the guest's clean stop.
    #[arg(long)]
    pub(super) force: bool,
    /// Delete every sandbox of the host.
    #[arg(long, conflicts_with = "ids")]
    pub(super) all: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct SandboxArgs {
    /// What to make it from: a template, or a snapshot's name or id [default: the node's].
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(super) template: String,
    /// Virtual CPUs, 1 to 32 [default: the node's].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) vcpus: Option<u32>,
    /// Memory, at least 128 [default: the node's].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) memory_mib: Option<u32>,
    /// Size of the root disk [default: the template's].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) disk_mib: Option<u32>,
    /// Delete it after this long, such as 90s, 10m or 2h [default: the node's].
    #[arg(long, value_parser = duration)]
    pub(super) ttl: Option<Duration>,
    /// A label; may be repeated.
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = pair)]
    pub(super) labels: Vec<(String, String)>,
    #[command(flatten)]
    pub(super) net: NetArgs,
}

#[derive(Debug, clap::Args)]
pub(super) struct ProcessArgs {
    /// Pass standard input to the program.
    #[arg(short, long)]
    pub(super) interactive: bool,
    /// Give the program a terminal; with -i, this one's keys and size.
    #[arg(short, long)]
    pub(super) tty: bool,
    /// Run a line of the user's shell in the place of COMMAND.
    #[arg(long, value_name = "LINE")]
    pub(super) shell: Option<OsString>,
    /// Add a variable to the program's environment; may be repeated.
    #[arg(long = "env", short = 'e', value_name = "NAME=VALUE")]
    pub(super) env: Vec<OsString>,
    /// Where to run [default: the user's home].
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(super) cwd: OsString,
    /// A user's name or UID[:GID] [default: the template's].
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(super) user: String,
    /// Kill the program after this long, such as 500ms, 30s or 5m.
    #[arg(long, value_parser = duration)]
    pub(super) timeout: Option<Duration>,
    #[command(flatten)]
    pub(super) limits: LimitArgs,
    /// What `soulbox ps` shows beside it.
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(super) tag: String,
}

/// Of a program with all that it starts.
#[derive(Debug, clap::Args)]
pub(super) struct LimitArgs {
    /// How it yields to others: -20 (least) to 19.
    #[arg(long, default_value_t = 0, hide_default_value = true, allow_negative_numbers = true,
        value_parser = clap::value_parser!(i32).range(-20..=19))]
    pub(super) nice: i32,
    /// CPUs that it may use, such as 0.5.
    #[arg(long, value_name = "NUMBER", value_parser = millis_of_cpu)]
    pub(super) cpus: Option<u64>,
    /// Memory beyond which it is killed, such as 512M or 2G.
    #[arg(long = "memory-limit", value_name = "SIZE", value_parser = size)]
    pub(super) memory: Option<u64>,
    /// Processes that it may have at once.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u64).range(1..))]
    pub(super) pids: Option<u64>,
}

// === impl Command ===

impl Command {
    /// Whether its exit code is a program's.
    pub(super) fn runs_a_program(&self) -> bool {
        matches!(
            self,
            Self::Run(_)
                | Self::Exec(_)
                | Self::Attach(_)
                | Self::Code {
                    command: CodeCommand::Run(_)
                }
        )
    }
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("give KEY=VALUE".to_owned()),
    }
}

/// Thousandths of "0.5" or "2".
fn millis_of_cpu(text: &str) -> Result<u64, String> {
    let mend = || format!("{text:?} is no number of CPUs; give one such as 0.5 or 2");
    let (whole, part) = text.split_once('.').unwrap_or((text, ""));
    let is_number = |digits: &str| digits.bytes().all(|byte| byte.is_ascii_digit());
    if !is_number(whole) || !is_number(part) || part.len() > 3 {
        return Err(mend());
    }
    // "5" is 500 thousandths.
    let millis: Option<u64> = format!("{whole}{part:0<3}").parse().ok();
    millis.filter(|&millis| millis > 0).ok_or_else(mend)
}

/// "4096", "64k", "512M" or "2G": bytes, in powers of 1,024.
pub(super) fn size(text: &str) -> Result<u64, String> {
    let mend = || format!("{text:?} is no size; give one such as 64k, 512M or 2G");
    let number = text.strip_suffix("iB").unwrap_or(text);
    let units = [("k", 10), ("K", 10), ("M", 20), ("G", 30), ("T", 40)];
    let (number, shift) = units
        .into_iter()
        .find_map(|(unit, shift)| Some((number.strip_suffix(unit)?, shift)))
        .unwrap_or((number, 0));
    // Parsing would take a sign.
    let digits = number.bytes().all(|byte| byte.is_ascii_digit());
    let number: Option<u64> = number.parse().ok().filter(|_| digits);
    let bytes = number.and_then(|number| number.checked_mul(1 << shift));
    bytes.filter(|&bytes| bytes > 0).ok_or_else(mend)
}

/// "500ms", "30s", "5m", "2h" or "1d"; a bare number is seconds.
pub(super) fn duration(text: &str) -> Result<Duration, String> {
    let mend = || format!("{text:?} is no duration; give one such as 500ms, 30s, 5m, 2h or 1d");
    let digits = text
        .find(|character: char| !character.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| mend())?;
    let unit_ms = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60 * 1000,
        "h" => 60 * 60 * 1000,
        "d" => 24 * 60 * 60 * 1000,
        _ => return Err(mend()),
    };
    match number.checked_mul(unit_ms) {
        Some(millis) if millis > 0 => Ok(Duration::from_millis(millis)),
        _ => Err(mend()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt as _;

    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn what_follows_the_command_is_the_programs() {
        let odd = OsString::from_vec(vec![0xff, b'x']);
        let args: Vec<OsString> = [
            "soulbox", "run", "-i", "--env", "A=b=c", "ls", "-l", "--keep", "--",
        ]
        .map(OsString::from)
        .into_iter()
        .chain([odd.clone()])
        .collect();
        let Command::Run(run) = Args::try_parse_from(args).unwrap().command else {
            panic!("not run");
        };
        assert_eq!(run.argv[..3], ["ls", "-l", "--keep"].map(OsString::from));
        assert_eq!(run.argv.last(), Some(&odd));
        assert!(run.process.interactive && !run.keep);
    }

    #[test]
    fn a_program_is_argv_or_a_line() {
        let parse = |args: &[&str]| {
            let args = ["soulbox", "exec"].iter().chain(args);
            match Args::try_parse_from(args)?.command {
                Command::Exec(args) => Ok::<_, clap::Error>(args),
                other => panic!("{other:?}"),
            }
        };
        let exec = parse(&["-it", "sb-1", "vim", "-t", "x"]).unwrap();
        assert!(exec.process.interactive && exec.process.tty && !exec.detach);
        assert_eq!(exec.argv, ["vim", "-t", "x"].map(OsString::from));
        let line = parse(&[
            "-d", "--nice", "-5", "--cpus", "1.5", "--shell", "a | b", "sb-1",
        ]);
        let line = line.unwrap();
        assert!(line.detach && line.argv.is_empty());
        assert_eq!(line.process.shell, Some("a | b".into()));
        assert_eq!(
            (line.process.limits.nice, line.process.limits.cpus),
            (-5, Some(1500))
        );
        for wrong in [
            &["sb-1"][..],
            &["--shell", "a", "sb-1", "b"],
            &["--nice", "20", "sb-1", "a"],
        ] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn amounts_have_units() {
        assert_eq!(millis_of_cpu("2"), Ok(2000));
        assert_eq!(millis_of_cpu("0.25"), Ok(250));
        for bad in ["", "0", "-1", "1.2345", "1e3", ".", "99999999999999999999"] {
            assert!(millis_of_cpu(bad).is_err(), "{bad}");
        }
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("64k"), Ok(64 << 10));
        assert_eq!(size("2GiB"), Ok(2 << 30));
        for bad in ["", "0", "k", "+1", "1.5M", "1m", "17179869184G"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_port_is_added_listed_or_removed() {
        let parse = |args: &[&str]| {
            let args = ["soulbox", "port"].iter().chain(args);
            match Args::try_parse_from(args)?.command {
                Command::Port(args) => Ok::<_, clap::Error>(args),
                other => panic!("{other:?}"),
            }
        };
        let added = parse(&["sb-1", "127.0.0.1:9000:80"]).unwrap();
        assert!(added.id.is_some() && added.mapping.is_some());
        assert!(parse(&[]).unwrap().id.is_none());
        let removed = parse(&["--rm", "127.0.0.1:9000", "--rm", "[::1]:9000"]).unwrap();
        assert_eq!(removed.remove, ["127.0.0.1:9000", "[::1]:9000"]);
        for wrong in [&["sb-1", "0"][..], &["sb-1", "--rm", "127.0.0.1:9000"]] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_network_is_replaced_or_added_to() {
        let parse = |args: &[&str]| {
            let args = ["soulbox", "net", "set", "sb-1"].iter().chain(args);
            match Args::try_parse_from(args).unwrap().command {
                Command::Net {
                    command: NetCommand::Set(args),
                } => args,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(parse(&["off"]).policy, Some(Base::Off));
        assert_eq!(parse(&["./off"]).policy, Some(Base::File("./off".into())));
        let added = parse(&["--allow-domain", "example.com"]);
        assert!(added.policy.is_none() && !added.additions.is_empty());
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("2h"), Ok(Duration::from_secs(7200)));
        for bad in [
            "",
            "s",
            "-1s",
            "1w",
            "0",
            "1.5s",
            "99999999999999999999h",
            "9999999999999999h",
        ] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
