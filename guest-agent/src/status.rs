//! Errors as gRPC statuses with `google.rpc` details.

use std::collections::HashMap;
use std::path::Path;

use rustix::io::Errno;
use soulbox_proto::ERROR_DOMAIN;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::exec::StartError;
use crate::ports::ConnectError;
use crate::spec::Violations;
use crate::sys::spawn::{SpawnError, Stage};

/// Enough of a name for a message; a status travels in headers, which are small.
const EXCERPT_CHARS: usize = 120;

/// What a shell would exit with.
const NOT_FOUND: &str = "127";
const NOT_EXECUTABLE: &str = "126";

impl From<Violations> for Status {
    fn from(violations: Violations) -> Self {
        // Enough to mend the request by; see EXCERPT_CHARS.
        let violations: Vec<_> = violations.0.into_iter().take(16).collect();
        let described: Vec<_> = violations
            .iter()
            .map(|violation| format!("{} {}", violation.field, violation.description))
            .collect();
        let message = described.join("; ");
        let mut details =
            ErrorDetails::with_error_info("INVALID_REQUEST", ERROR_DOMAIN, HashMap::new());
        details.set_bad_request(violations);
        Self::with_error_details(Code::InvalidArgument, message, details)
    }
}

impl From<StartError> for Status {
    fn from(error: StartError) -> Self {
        let message = error.to_string();
        match error {
            StartError::NoSuchUser(_) => {
                cannot_start(Code::NotFound, "USER_NOT_FOUND", NOT_EXECUTABLE, message)
            }
            StartError::StringTooLong(_) => too_long(message),
            StartError::Limits(_) => cannot_start(
                Code::FailedPrecondition,
                "LIMITS_UNAVAILABLE",
                NOT_EXECUTABLE,
                message,
            ),
            StartError::Pipes(error) | StartError::Terminal(error) | StartError::Cgroup(error) => {
                let message = format!("{message} ({error})");
                cannot_start(
                    Code::ResourceExhausted,
                    "OUT_OF_RESOURCES",
                    NOT_EXECUTABLE,
                    message,
                )
            }
            StartError::Spawn {
                error,
                name,
                cwd,
                user,
            } => spawn_status(error, &name, &cwd, &excerpt(user.as_bytes())),
        }
    }
}

impl From<ConnectError> for Status {
    fn from(error: ConnectError) -> Self {
        let message = error.to_string();
        match error {
            ConnectError::Closed(_) => refused(Code::FailedPrecondition, "PORT_CLOSED", message),
            ConnectError::NoRoom(_) => {
                refused(Code::ResourceExhausted, "OUT_OF_RESOURCES", message)
            }
            ConnectError::Reset => refused(Code::Aborted, "CONNECTION_RESET", message),
            ConnectError::Stopping => refused(Code::Unavailable, "STOPPING", message),
        }
    }
}

fn spawn_status(error: SpawnError, name: &[u8], cwd: &[u8], user: &str) -> Status {
    let SpawnError { stage, errno } = error;
    let (program, folder) = (excerpt(name), excerpt(cwd));
    let said = std::io::Error::from(errno);
    match (stage, errno) {
        (Stage::Execute, Errno::NOENT | Errno::NOTDIR) if is_file(name) => cannot_start(
            Code::FailedPrecondition,
            "COMMAND_NOT_EXECUTABLE",
            NOT_EXECUTABLE,
            format!(
                "{program} is there, but the interpreter or loader that it names is not: install it"
            ),
        ),
        (Stage::Execute, Errno::NOENT | Errno::NOTDIR | Errno::NAMETOOLONG) => cannot_start(
            Code::NotFound,
            "COMMAND_NOT_FOUND",
            NOT_FOUND,
            format!("there is no program {program}: give its path, or set PATH in the environment"),
        ),
        (Stage::Execute, Errno::TOOBIG) => too_long(
            "the arguments and the environment are longer than Linux takes (a quarter of the \
             stack limit in all): pass data through stdin or a file"
                .to_owned(),
        ),
        (Stage::Execute | Stage::Clone, Errno::AGAIN | Errno::NOMEM) => cannot_start(
            Code::ResourceExhausted,
            "OUT_OF_RESOURCES",
            NOT_EXECUTABLE,
            format!(
                "there is no room for another process ({said}): stop others, or raise the limits"
            ),
        ),
        (Stage::Execute, Errno::NOEXEC) => cannot_start(
            Code::FailedPrecondition,
            "COMMAND_NOT_EXECUTABLE",
            NOT_EXECUTABLE,
            format!("{program} is no program for this machine: a script needs a #! line"),
        ),
        (Stage::Execute, _) => cannot_start(
            Code::FailedPrecondition,
            "COMMAND_NOT_EXECUTABLE",
            NOT_EXECUTABLE,
            format!(
                "{program} cannot be executed by user {user} ({said}): look at its mode with ls -l"
            ),
        ),
        (Stage::Directory, _) => cannot_start(
            Code::NotFound,
            "CWD_NOT_FOUND",
            NOT_EXECUTABLE,
            format!(
                "user {user} cannot enter {folder} ({said}): make it first, or give another cwd"
            ),
        ),
        (Stage::Limits, _) => Violations::of(
            "start.limits",
            &format!("the kernel refuses one ({said}): ask for less than the guest's own limits"),
        )
        .into(),
        (
            Stage::Clone
            | Stage::Session
            | Stage::Stdio
            | Stage::Terminal
            | Stage::Priority
            | Stage::User,
            _,
        ) => cannot_start(
            Code::Internal,
            "PROCESS_NOT_STARTED",
            NOT_EXECUTABLE,
            format!("{program} was not started as user {user}: {error}"),
        ),
    }
}

fn too_long(message: String) -> Status {
    cannot_start(
        Code::InvalidArgument,
        "ARGUMENTS_TOO_LONG",
        NOT_EXECUTABLE,
        message,
    )
}

fn cannot_start(code: Code, reason: &str, exit_code: &str, message: String) -> Status {
    let metadata = HashMap::from([("exit_code".to_owned(), exit_code.to_owned())]);
    let details = ErrorDetails::with_error_info(reason, ERROR_DOMAIN, metadata);
    Status::with_error_details(code, message, details)
}

/// A refusal that has nothing to do with a program.
pub(crate) fn refused(code: Code, reason: &str, message: impl Into<String>) -> Status {
    let details = ErrorDetails::with_error_info(reason, ERROR_DOMAIN, HashMap::new());
    Status::with_error_details(code, message, details)
}

/// What only a bug, or a guest without resources, can cause. With a reason, so that
/// the host does not take it for a lost connection.
pub(crate) fn internal(message: impl Into<String>) -> Status {
    refused(Code::Internal, "INTERNAL", message)
}

fn is_file(name: &[u8]) -> bool {
    use std::os::unix::ffi::OsStrExt as _;
    let path = Path::new(std::ffi::OsStr::from_bytes(name));
    path.is_absolute() && path.is_file()
}

/// Bytes as text for a message: quoted, escaped and cut.
pub(crate) fn excerpt(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes.get(..4 * EXCERPT_CHARS).unwrap_or(bytes));
    let mut cut: String = text.chars().take(EXCERPT_CHARS).collect();
    if cut.len() < bytes.len() {
        cut.push('…');
    }
    format!("{cut:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_excerpt_is_short_and_printable() {
        assert_eq!(excerpt(b"ls"), "\"ls\"");
        assert_eq!(excerpt(b"a\nb"), "\"a\\nb\"");
        assert!(excerpt(&[b'x'; 100_000]).len() < 200);
        assert!(excerpt(&[0xff; 10]).contains('\u{fffd}'));
    }

    #[test]
    fn a_status_for_many_violations_stays_small() {
        let violations =
            (0..100_000).map(|index| tonic_types::FieldViolation::new(format!("f{index}"), "x"));
        let status = Status::from(Violations(violations.collect()));
        assert!(status.message().len() + status.details().len() < 4096);
        let details = status.get_error_details();
        assert_eq!(details.error_info().unwrap().reason, "INVALID_REQUEST");
        assert_eq!(details.bad_request().unwrap().field_violations.len(), 16);
    }
}
