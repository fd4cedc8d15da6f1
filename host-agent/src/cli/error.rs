//! What the command line says when something fails, and how it ends then.

use std::io;
use std::path::PathBuf;

use tonic::Status;
use tonic_types::StatusExt as _;

use super::copy::CopyError;
use super::mount::MountError;

#[derive(Debug, thiserror::Error)]
pub(super) enum CliError {
    #[error(
        "{host:?} is no address of a soulboxd; give unix:/PATH or http://ADDRESS:PORT with --host or SOULBOX_HOST"
    )]
    Host { host: String },
    #[error(
        "soulboxd cannot be reached at {host} ({message}); start it with `systemctl start soulboxd`, or give its address with --host or SOULBOX_HOST"
    )]
    Connect { host: String, message: String },
    #[error(
        "you may not use the soulboxd at {host}; join the group that owns its socket, or run this as root"
    )]
    Permission { host: String },
    #[error("{}", sentence(.0.message()))]
    Call(Box<Status>),
    #[error(
        "the call ended without the program's exit status; see whether the sandbox is still there with `soulbox ls`"
    )]
    NoExit,
    #[error("{id:?} is no sandbox's id; `soulbox ls` shows those that are")]
    SandboxId { id: String },
    #[error("standard input is no terminal; run this in one, or leave --tty away")]
    NoTerminal,
    #[error("the terminal's settings cannot be changed ({0})")]
    Terminal(#[source] io::Error),
    #[error("standard input cannot be read ({0})")]
    Input(#[source] io::Error),
    #[error("{} cannot be written ({source}); see its folder and its permissions", .path.display())]
    Save { path: PathBuf, source: io::Error },
    #[error("the code is not UTF-8; give text")]
    CodeNotText,
    #[error("{variable:?} is no variable; give NAME=VALUE to --env")]
    Env { variable: String },
    #[error("{path} cannot be read ({source}); give off, internet, or a file with a policy")]
    PolicyUnreadable { path: PathBuf, source: io::Error },
    #[error("{path} has no valid policy; mend this and try again:\n{message}")]
    PolicyInvalid { path: PathBuf, message: String },
    #[error("there is no policy to add to; give --net off, --net internet or --net FILE too")]
    NothingToAddTo,
    #[error("there is nothing to set; give off, internet, a file, or a flag such as --allow")]
    NothingToSet,
    #[error("sandbox {id} has no network; it can only be given one when it is made")]
    NoNetwork { id: String },
    #[error(
        "the policy of sandbox {id} has {field}, which this soulbox does not know; give a whole policy, or use the soulbox of its soulboxd"
    )]
    PolicyUnknown { id: String, field: String },
    #[error("the sandbox's agent answers nonsense ({message}); its programs may have changed it")]
    Nonsense { message: String },
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error(transparent)]
    Copy(#[from] CopyError),
    #[error("the connection was cut off before the sandbox had said all")]
    NoEnd,
    #[error("the output cannot be written ({0})")]
    Output(#[source] io::Error),
    #[error("the runtime cannot be started ({source}); see the limits on threads and open files")]
    Runtime { source: io::Error },
    #[error("{failed} of {asked} {what} were not deleted; see above")]
    NotDeleted {
        failed: usize,
        asked: usize,
        what: &'static str,
    },
    /// Nothing to say: the one who asked for it knows.
    #[error("interrupted")]
    Interrupted,
}

/// 128 and SIGPIPE, as a shell tells of a program that writes to nobody.
const BROKEN_PIPE: u8 = 128 + 13;
/// 128 and SIGINT.
const INTERRUPTED: u8 = 128 + 2;

// === impl CliError ===

impl CliError {
    /// The code to end with, where the error knows.
    pub(super) fn exit_code(&self) -> Option<u8> {
        match self {
            Self::Call(status) => {
                let details = status.get_error_details();
                details
                    .error_info()?
                    .metadata
                    .get("exit_code")?
                    .parse()
                    .ok()
            }
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => Some(BROKEN_PIPE),
            Self::Interrupted => Some(INTERRUPTED),
            _ => None,
        }
    }

    /// To standard error.
    pub(super) fn print(&self) {
        let quiet = match self {
            Self::Interrupted => true,
            Self::Output(error) => error.kind() == io::ErrorKind::BrokenPipe,
            _ => false,
        };
        if quiet {
            return;
        }
        eprintln!("soulbox: {self}");
        if let Self::Call(status) = self {
            let details = status.get_error_details();
            let tail = details
                .error_info()
                .and_then(|info| info.metadata.get("console_tail"));
            if let Some(tail) = tail {
                eprintln!("soulbox: the console's last lines:");
                for line in tail.lines() {
                    eprintln!("  {line}");
                }
            }
        }
    }
}

impl From<Status> for CliError {
    fn from(status: Status) -> Self {
        Self::Call(Box::new(status))
    }
}

fn sentence(message: &str) -> &str {
    if message.is_empty() {
        "the call failed and soulboxd did not say why; see its log"
    } else {
        message
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic::Code;
    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn an_exit_code_in_the_details_is_taken() {
        let metadata = HashMap::from([("exit_code".to_owned(), "127".to_owned())]);
        let details = ErrorDetails::with_error_info("COMMAND_NOT_FOUND", "soulbox", metadata);
        let status = Status::with_error_details(Code::NotFound, "no such command", details);
        assert_eq!(CliError::from(status).exit_code(), Some(127));
        assert_eq!(CliError::from(Status::unavailable("")).exit_code(), None);
    }
}
