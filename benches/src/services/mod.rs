//! What the agent of a guest serves, beside what the guest does without it: programs,
//! code, files and trees of them, a mount, and what it all takes when nobody asks.
//!
//! With sandboxes of a soulboxd; or an agent that is a process of this host
//! (`soulbox-guest --serve-unix`), which shows the agent alone and keeps no promises.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use clap::ValueEnum;
use rustix::net::sockopt::socket_peercred;

use self::command_line::CommandLine;
use self::raw::{Raw, Way};
use crate::agent::{self, Agent};
use crate::client::{Client, id_of};
use crate::daemon;
use crate::report::Report;
use crate::scratch::Scratch;

mod calls;
mod command_line;
mod idle;
mod mount;
mod raw;
mod streams;
mod trees;

/// Room for a stream on tmpfs beside two interpreters.
const MEMORY_MIB: u32 = 1024;
/// What calls to an agent without a soulboxd name.
const NO_SANDBOX: &str = "sb-0";

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How many times each call is measured; streams are ten times at most, trees three
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Measure only these
    #[arg(long, value_enum, value_name = "PART,PART…", value_delimiter = ',',
          default_values_t = Part::value_variants().to_vec(), hide_default_value = true)]
    parts: Vec<Part>,
    #[command(flatten)]
    scratch: Scratch,
    #[command(flatten)]
    soulboxd: daemon::Options,
    /// The run_dir of the soulboxd of --host, for floors that are measured past the agent
    #[arg(long, value_name = "DIR", requires = "host")]
    run_dir: Option<PathBuf>,
    /// The command line that mounts and copies [default: soulbox in the folder of --daemon]
    #[arg(long, value_name = "PATH")]
    soulbox: Option<PathBuf>,
    /// Measure the agent that serves this socket as a process of this host, without a guest
    /// and without promises
    #[arg(long, value_name = "SOCKET", conflicts_with_all = ["host", "daemon", "templates"])]
    agent: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Programs and code.
    Calls,
    /// Files of 64 MiB.
    Streams,
    /// 10,000 small files.
    Trees,
    /// Files of the guest on the host.
    Mount,
    /// The agent's memory and wake-ups.
    Idle,
}

/// What is measured.
struct Guest {
    agent: Agent,
    /// None: nothing is known of the way past the agent.
    raw: Option<Arc<Raw>>,
    command_line: Option<CommandLine>,
    /// The agent's, where programs of the guest see it.
    pid: u32,
    /// Folders for files of this bench.
    folders: Folders,
}

struct Folders {
    /// On a tmpfs.
    memory: String,
    /// In the home of the user that programs run as.
    disk: String,
}

pub(crate) fn run(options: &Options) -> Result<Report> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        match &options.agent {
            Some(socket) => on_this_host(options, socket).await,
            None => in_sandbox(options).await,
        }
    })
}

async fn in_sandbox(options: &Options) -> Result<Report> {
    let daemon = options.soulboxd.find(&options.scratch)?;
    let mut report = Report::new("guest")?;
    let mut client = Client::connect(daemon.socket()).await?;
    // It makes its snapshot meanwhile.
    client.await_template().await?;
    let created = client.create(MEMORY_MIB).await?;
    let id = id_of(created.sandbox.as_ref())?;
    let mut agent = client.agent(&id)?;
    let raw = match daemon.run_dir().or(options.run_dir.clone()) {
        Some(run_dir) => {
            let socket = run_dir.join("vm").join(&id).join("vsock.sock");
            Some(Arc::new(Raw::start(&mut agent, Way::Vsock(socket)).await?))
        }
        None => {
            let what = "all floors and the promises beside them: give --run-dir of the soulboxd";
            report.left_out.push(what.to_owned());
            None
        }
    };
    let program = options.soulbox.clone();
    let program = program.or_else(|| options.soulboxd.program("soulbox"));
    let guest = Guest {
        agent,
        raw,
        command_line: CommandLine::find(program, daemon.socket(), &id),
        pid: 1,
        folders: Folders::new(),
    };
    guest.measure(options, &mut report).await?;
    client.delete(&id).await?;
    Ok(report)
}

async fn on_this_host(options: &Options, socket: &Path) -> Result<Report> {
    let mut report = Report::new("guest, an agent without one")?;
    let socket = &std::path::absolute(socket)?;
    let connecting = || format!("connecting to {}", socket.display());
    let peer = std::os::unix::net::UnixStream::connect(socket).with_context(connecting)?;
    let pid = socket_peercred(&peer)?.pid;
    let channel = agent::dial(socket).await.with_context(connecting)?;
    let mut agent = Agent::new(channel, NO_SANDBOX)?;
    let folder = options.scratch.folder()?;
    let way = Way::Unix(folder.path().join("helper.sock"));
    let guest = Guest {
        raw: Some(Arc::new(Raw::start(&mut agent, way).await?)),
        agent,
        command_line: CommandLine::find(options.soulbox.clone(), socket, NO_SANDBOX),
        pid: pid.as_raw_nonzero().get().try_into()?,
        folders: Folders::new(),
    };
    guest.measure(options, &mut report).await?;
    // They are of guests.
    report.promises.clear();
    Ok(report)
}

/// What takes long and waits, on a thread of its own: the connection to soulboxd has to
/// answer its pings meanwhile.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await?
}

// === impl Folders ===

impl Folders {
    /// Where an agent is a process of this host, other things may be there.
    fn new() -> Self {
        let name = format!("soulbox-bench-{}", std::process::id());
        Self {
            memory: format!("/dev/shm/{name}"),
            disk: name,
        }
    }
}

// === impl Guest ===

impl Guest {
    async fn measure(mut self, options: &Options, report: &mut Report) -> Result<()> {
        let Folders { memory, disk } = &self.folders;
        let (memory, disk) = (memory.clone(), disk.clone());
        self.agent.run(&["mkdir", &memory, &disk]).await?;
        let measured = self.parts(options, report).await;
        let removed = self.agent.run(&["rm", "-rf", &memory, &disk]).await;
        measured?;
        removed?;
        Ok(())
    }

    async fn parts(&mut self, options: &Options, report: &mut Report) -> Result<()> {
        let scratch = &options.scratch;
        for part in Part::value_variants() {
            if !options.parts.contains(part) {
                continue;
            }
            match part {
                Part::Calls => calls::measure(self, options.runs, report).await?,
                Part::Streams => streams::measure(self, options.runs, report).await?,
                Part::Trees => trees::measure(self, scratch, options.runs, report).await?,
                Part::Mount => mount::measure(self, scratch, report).await?,
                // The last one: every service has been used.
                Part::Idle => {
                    self.raw = None;
                    idle::measure(self, report).await?;
                }
            }
        }
        Ok(())
    }
}
