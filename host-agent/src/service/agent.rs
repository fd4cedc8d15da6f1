//! What an agent's refusal means to the caller of Exec. The agent is in the guest,
//! so its words are untrusted: bounded, printable, and with a reason of ours.

use std::collections::BTreeMap;

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::sandbox::CreateError;
use crate::status::{Explain, FieldViolation, status};
use crate::text::printable;

const MAX_MESSAGE_CHARS: usize = 500;
const MAX_FIELD_CHARS: usize = 64;
const MAX_VIOLATIONS: usize = 16;

/// Those of guest.v1.ProcessService/Exec.
const REASONS: [&str; 7] = [
    "COMMAND_NOT_FOUND",
    "COMMAND_NOT_EXECUTABLE",
    "CWD_NOT_FOUND",
    "USER_NOT_FOUND",
    "ARGUMENTS_TOO_LONG",
    "OUT_OF_RESOURCES",
    "PROCESS_NOT_STARTED",
];

#[derive(Debug, thiserror::Error)]
#[error("{message}")]
struct AgentError {
    code: Code,
    reason: &'static str,
    message: String,
    exit_code: Option<u8>,
}

/// `said` as the caller sees it.
pub(super) fn told(said: &Status) -> Status {
    let details = said.get_error_details();
    let violations: Vec<_> = details
        .bad_request()
        .iter()
        .flat_map(|bad| &bad.field_violations)
        .take(MAX_VIOLATIONS)
        .map(|violation| FieldViolation {
            field: callers_field(&printable(&violation.field, MAX_FIELD_CHARS)),
            description: printable(&violation.description, MAX_MESSAGE_CHARS),
        })
        .collect();
    if !violations.is_empty() {
        return status(&CreateError::Invalid(violations));
    }
    let info = details.error_info();
    let reason = info.and_then(|info| REASONS.into_iter().find(|known| *known == info.reason));
    status(&AgentError {
        code: match (reason, said.code()) {
            (None, _) | (_, Code::Ok) => Code::Internal,
            (Some(_), code) => code,
        },
        reason: reason.unwrap_or("AGENT_FAILED"),
        message: printable(said.message(), MAX_MESSAGE_CHARS),
        exit_code: info.and_then(|info| info.metadata.get("exit_code")?.parse().ok()),
    })
}

/// The agent is sent the caller's `start.process` as its `start`.
fn callers_field(field: &str) -> String {
    match field.strip_prefix("start.") {
        Some(rest) => format!("start.process.{rest}"),
        None => field.to_owned(),
    }
}

impl Explain for AgentError {
    fn code(&self) -> Code {
        self.code
    }

    fn reason(&self) -> &str {
        self.reason
    }

    fn metadata(&self) -> BTreeMap<String, String> {
        let exit_code = self.exit_code.map(|code| code.to_string());
        exit_code
            .map(|code| ("exit_code".to_owned(), code))
            .into_iter()
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic_types::ErrorDetails;

    use super::*;

    fn with_reason(reason: &str, message: &str) -> Status {
        let metadata = HashMap::from([
            ("exit_code".to_owned(), "127".to_owned()),
            ("console_tail".to_owned(), "x".repeat(4000)),
        ]);
        let details = ErrorDetails::with_error_info(reason, "elsewhere", metadata);
        Status::with_error_details(Code::NotFound, message, details)
    }

    #[test]
    fn a_program_that_cannot_start_keeps_its_reason_and_exit_code() {
        let status = told(&with_reason("COMMAND_NOT_FOUND", "no \x1b[2J program"));
        assert_eq!(
            (status.code(), status.message()),
            (Code::NotFound, "no  [2J program")
        );
        let details = status.get_error_details();
        let info = details.error_info().unwrap();
        assert_eq!(
            (info.reason.as_str(), info.domain.as_str()),
            ("COMMAND_NOT_FOUND", "soulbox")
        );
        assert_eq!(
            info.metadata,
            HashMap::from([("exit_code".to_owned(), "127".to_owned())])
        );
    }

    #[test]
    fn an_agent_cannot_speak_for_the_host() {
        for said in [
            with_reason("SANDBOX_DIED", &"x".repeat(100_000)),
            Status::internal("out of order"),
        ] {
            let status = told(&said);
            assert_eq!(status.code(), Code::Internal);
            assert!(status.message().len() < 600 && status.details().len() < 2048);
            let details = status.get_error_details();
            assert_eq!(details.error_info().unwrap().reason, "AGENT_FAILED");
        }
    }

    #[test]
    fn fields_are_those_of_the_callers_request() {
        let violations = ["start.argv", "input.signal", "start"]
            .map(|field| tonic_types::FieldViolation::new(field, "is wrong"));
        let details = ErrorDetails::with_bad_request(violations);
        let status = told(&Status::with_error_details(
            Code::InvalidArgument,
            "start.argv is wrong",
            details,
        ));
        assert!(
            status
                .message()
                .contains("start.process.argv is wrong; input.signal is wrong"),
            "{status:?}"
        );
        let details = status.get_error_details();
        assert_eq!(details.error_info().unwrap().reason, "INVALID_REQUEST");
        let fields: Vec<_> = details
            .bad_request()
            .unwrap()
            .field_violations
            .iter()
            .map(|violation| violation.field.clone())
            .collect();
        assert_eq!(fields, ["start.process.argv", "input.signal", "start"]);
    }
}
