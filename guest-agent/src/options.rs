//! The command line. By hand: it has two options, and a parser's library would
//! be larger than the agent's own code.

use std::ffi::OsString;
use std::path::PathBuf;

pub const USAGE: &str = "\
PID 1 of a SoulBox guest: runs programs and serves the guest over vsock.

Usage: soulbox-guest [--serve-unix PATH [--cgroup FOLDER]]

As PID 1 it needs no options, and ignores those it does not know: the kernel
passes on what it does not understand of its own command line.

Options:
  --serve-unix PATH  Serve on a new Unix socket rather than on vsock; the only way
                     to run as another process than PID 1. Such an agent refuses
                     to name the machine or to turn it off.
  --cgroup FOLDER    Make each program a cgroup in this new folder of a cgroup2
                     filesystem. Without, a kill reaches process groups only.
  -h, --help         Print this.
  -V, --version      Print the version.
";

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Wanted {
    Run(Options),
    Help,
    Version,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Options {
    /// Set up the guest first, and turn it off at the end.
    pub is_init: bool,
    /// None: vsock.
    pub serve_unix: Option<PathBuf>,
    pub cgroup: Option<PathBuf>,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    #[error("{0} needs a value")]
    NoValue(&'static str),
    #[error("there is no option {0:?}")]
    Unknown(OsString),
    #[error("this is no guest's PID 1: give --serve-unix PATH to try the agent as a process")]
    NotInit,
}

// === impl Options ===

impl Options {
    /// Parses what follows the program's name.
    pub fn parse(
        args: impl IntoIterator<Item = OsString>,
        pid: u32,
    ) -> Result<Wanted, OptionsError> {
        let is_init = pid == 1;
        let mut options = Self {
            is_init,
            serve_unix: None,
            cgroup: None,
        };
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let mut value = |name| {
                args.next()
                    .map(PathBuf::from)
                    .ok_or(OptionsError::NoValue(name))
            };
            match arg.to_str() {
                Some("--serve-unix") => options.serve_unix = Some(value("--serve-unix")?),
                Some("--cgroup") => options.cgroup = Some(value("--cgroup")?),
                Some("-h" | "--help") => return Ok(Wanted::Help),
                Some("-V" | "--version") => return Ok(Wanted::Version),
                _ if is_init => {}
                _ => return Err(OptionsError::Unknown(arg)),
            }
        }
        if !is_init && options.serve_unix.is_none() {
            return Err(OptionsError::NotInit);
        }
        Ok(Wanted::Run(options))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str], pid: u32) -> Result<Wanted, OptionsError> {
        Options::parse(args.iter().map(OsString::from), pid)
    }

    #[test]
    fn pid_1_ignores_what_the_kernel_passes_on() {
        let options = Options {
            is_init: true,
            serve_unix: None,
            cgroup: None,
        };
        assert_eq!(parse(&["quiet", "--what"], 1), Ok(Wanted::Run(options)));
    }

    #[test]
    fn another_process_says_what_is_wrong() {
        assert_eq!(
            parse(&["--what"], 2),
            Err(OptionsError::Unknown("--what".into()))
        );
        assert_eq!(
            parse(&["--serve-unix"], 2),
            Err(OptionsError::NoValue("--serve-unix"))
        );
        assert_eq!(parse(&[], 2), Err(OptionsError::NotInit));
        assert_eq!(parse(&["-V"], 2), Ok(Wanted::Version));
    }

    #[test]
    fn serves_where_it_is_told() {
        let options = Options {
            is_init: false,
            serve_unix: Some("/a".into()),
            cgroup: Some("/b".into()),
        };
        assert_eq!(
            parse(&["--serve-unix", "/a", "--cgroup", "/b"], 2),
            Ok(Wanted::Run(options))
        );
    }
}
