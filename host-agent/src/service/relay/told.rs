//! What an agent's status means to the caller. The agent is in the guest, so its
//! words are untrusted: bounded, printable, and with a reason of ours.

use std::collections::BTreeMap;

use http::StatusCode;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::super::sandboxes::invalid;
use crate::sandbox::CreateError;
use crate::status::{Explain, FieldViolation, status};
use crate::text::printable;

/// Statuses travel in headers, of which clients take 8 KiB in all. A byte of the
/// message may take three there, and violations are told in it too.
const MAX_MESSAGE_CHARS: usize = 500;
const MAX_MESSAGE_BYTES: usize = 1000;
const MAX_FIELD_CHARS: usize = 64;
const MAX_DESCRIPTION_CHARS: usize = 200;
const MAX_VIOLATIONS_BYTES: usize = 1000;
const MAX_VIOLATIONS: usize = 16;

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// Those of guest.v1; the .proto files say what they mean.
const REASONS: [&str; 32] = [
    // ProcessService
    "COMMAND_NOT_FOUND",
    "COMMAND_NOT_EXECUTABLE",
    "CWD_NOT_FOUND",
    "USER_NOT_FOUND",
    "ARGUMENTS_TOO_LONG",
    "OUT_OF_RESOURCES",
    "LIMITS_UNAVAILABLE",
    "PROCESS_NOT_STARTED",
    "PROCESS_NOT_FOUND",
    "STOPPING",
    // FilesystemService
    "FILE_NOT_FOUND",
    "FILE_EXISTS",
    "NOT_A_DIRECTORY",
    "IS_A_DIRECTORY",
    "DIRECTORY_NOT_EMPTY",
    "NOT_A_REGULAR_FILE",
    "PERMISSION_DENIED",
    "READ_ONLY",
    "DISK_FULL",
    "FILE_TOO_LARGE",
    "NAME_TOO_LONG",
    "TOO_MANY_LINKS",
    "PATH_ESCAPES",
    "CROSSES_FILESYSTEMS",
    "FILE_BUSY",
    "FILE_CHANGED",
    "NOT_SUPPORTED",
    "FILE_FAILED",
    // CodeService
    "CONTEXT_NOT_FOUND",
    "TOO_MANY_CONTEXTS",
    "INTERPRETER_NOT_FOUND",
    "INTERPRETER_FAILED",
];

#[derive(Debug, thiserror::Error)]
#[error("{message}")]
struct AgentError {
    code: Code,
    reason: &'static str,
    message: String,
    exit_code: Option<u8>,
}

/// An error when the head of an answer is not that of a gRPC message to come. A
/// status that is in it already is such an error, even when it says OK.
pub(super) fn check<T>(answer: &http::Response<T>) -> Result<(), Status> {
    let headers = answer.headers();
    if headers.contains_key(&GRPC_STATUS) {
        return Err(told(headers));
    }
    let kind = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    let is_grpc = kind.is_some_and(|kind| kind.starts_with(b"application/grpc"));
    if answer.status() == StatusCode::OK && is_grpc {
        Ok(())
    } else {
        let message = "the guest's agent did not answer as gRPC does; build the template again";
        Err(failed(message.to_owned()))
    }
}

/// The status in `trailers` as the caller sees it. [`Reply`](crate::guest::Reply) lets
/// through only details that can be decoded.
pub(super) fn told(trailers: &HeaderMap) -> Status {
    match Status::from_header_map(trailers) {
        Some(said) if said.code() == Code::Ok => Status::ok(""),
        Some(said) => retold(&said),
        None => failed("the guest's agent ended the call without a status".to_owned()),
    }
}

/// What an agent can only cause by breaking its protocol.
pub(super) fn failed(message: String) -> Status {
    status(&AgentError {
        code: Code::Internal,
        reason: "AGENT_FAILED",
        message,
        exit_code: None,
    })
}

fn retold(said: &Status) -> Status {
    let details = said.get_error_details();
    let mut room = MAX_VIOLATIONS_BYTES;
    let violations: Vec<_> = details
        .bad_request()
        .iter()
        .flat_map(|bad| &bad.field_violations)
        .take(MAX_VIOLATIONS)
        .map(|violation| FieldViolation {
            field: printable(&violation.field, MAX_FIELD_CHARS),
            description: printable(&violation.description, MAX_DESCRIPTION_CHARS),
        })
        .take_while(|violation| {
            let bytes = violation.field.len() + violation.description.len();
            let fits = bytes <= room;
            room = room.saturating_sub(bytes);
            fits
        })
        .collect();
    if !violations.is_empty() {
        return status(&CreateError::Invalid(violations));
    }
    let info = details.error_info();
    let reason = info.and_then(|info| REASONS.into_iter().find(|known| *known == info.reason));
    let (code, reason) = match (reason, said.code()) {
        (Some(reason), code) => (code, reason),
        // So says its gRPC library, whose limit is the service's.
        (None, Code::OutOfRange) if info.is_none() => {
            let mend = "is larger than this call takes; send data in smaller messages";
            return invalid("request", mend.to_owned());
        }
        (None, Code::Unimplemented) => (Code::Unimplemented, "CALL_NOT_FOUND"),
        (None, _) => (Code::Internal, "AGENT_FAILED"),
    };
    let message = match reason {
        "CALL_NOT_FOUND" => {
            "the agent of this sandbox has no such call; build its template again with this version's agent"
                .to_owned()
        }
        _ => bounded(&printable(said.message(), MAX_MESSAGE_CHARS)),
    };
    status(&AgentError {
        code,
        reason,
        message,
        exit_code: info.and_then(|info| info.metadata.get("exit_code")?.parse().ok()),
    })
}

fn bounded(message: &str) -> String {
    message[..message.floor_char_boundary(MAX_MESSAGE_BYTES)].to_owned()
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

    use proptest::prelude::*;
    use tonic_types::{ErrorDetails, FieldViolation};

    use super::*;

    fn trailers(status: &Status) -> HeaderMap {
        let mut trailers = HeaderMap::new();
        status.add_header(&mut trailers).unwrap();
        trailers
    }

    fn reason(status: &Status) -> String {
        status
            .get_error_details()
            .error_info()
            .unwrap()
            .reason
            .clone()
    }

    fn with_reason(reason: &str, message: &str) -> HeaderMap {
        let metadata = HashMap::from([
            ("exit_code".to_owned(), "127".to_owned()),
            ("console_tail".to_owned(), "x".repeat(4000)),
        ]);
        let details = ErrorDetails::with_error_info(reason, "elsewhere", metadata);
        trailers(&Status::with_error_details(
            Code::NotFound,
            message,
            details,
        ))
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
            trailers(&Status::internal("out of order")),
            trailers(&Status::unavailable("soulboxd is gone")),
            HeaderMap::new(),
        ] {
            let status = told(&said);
            assert_eq!(status.code(), Code::Internal);
            assert!(status.message().len() < 600 && status.details().len() < 2048);
            assert_eq!(reason(&status), "AGENT_FAILED");
        }
    }

    #[test]
    fn fields_are_the_agents_own() {
        let violations =
            ["start.argv", "input.signal"].map(|field| FieldViolation::new(field, "is wrong"));
        let details = ErrorDetails::with_bad_request(violations);
        let status = told(&trailers(&Status::with_error_details(
            Code::InvalidArgument,
            "start.argv is wrong",
            details,
        )));
        assert!(
            status
                .message()
                .contains("start.argv is wrong; input.signal is wrong"),
            "{status:?}"
        );
        assert_eq!(reason(&status), "INVALID_REQUEST");
        let details = status.get_error_details();
        let violations = &details.bad_request().unwrap().field_violations;
        let fields: Vec<_> = violations
            .iter()
            .map(|violation| &violation.field)
            .collect();
        assert_eq!(fields, ["start.argv", "input.signal"]);
    }

    #[test]
    fn what_the_agents_library_says_is_told_apart() {
        let larger = told(&trailers(&Status::out_of_range("too large")));
        assert_eq!(reason(&larger), "INVALID_REQUEST");
        let unknown = told(&trailers(&Status::unimplemented("")));
        assert_eq!(
            (unknown.code(), reason(&unknown).as_str()),
            (Code::Unimplemented, "CALL_NOT_FOUND")
        );
    }

    #[test]
    fn only_the_head_of_a_grpc_answer_passes() {
        let answer = |status: u16, headers: &[(&'static str, &'static str)]| {
            let mut answer = http::Response::builder().status(status);
            for (name, value) in headers {
                answer = answer.header(*name, *value);
            }
            check(&answer.body(()).unwrap())
        };
        let grpc = ("content-type", "application/grpc+proto");
        answer(200, &[grpc]).unwrap();
        let html = ("content-type", "text/html");
        for refused in [answer(200, &[html]), answer(200, &[]), answer(503, &[grpc])] {
            assert_eq!(reason(&refused.unwrap_err()), "AGENT_FAILED");
        }
        assert_eq!(
            answer(200, &[("grpc-status", "0")]).unwrap_err().code(),
            Code::Ok
        );
    }

    #[test]
    fn the_reasons_are_those_of_the_protocol() {
        const FILES: [&str; 3] = [
            include_str!("../../../../proto/soulbox/guest/v1/guest.proto"),
            include_str!("../../../../proto/soulbox/guest/v1/filesystem.proto"),
            include_str!("../../../../proto/soulbox/guest/v1/code.proto"),
        ];
        // Of the services that callers do not reach, and what is no reason.
        const OTHERS: [&str; 8] = [
            "INVALID_REQUEST",
            "PORT_CLOSED",
            "CONNECTION_RESET",
            "RESOLVE_IN_ROOT",
            "RENAME_EXCHANGE",
            "IN_PLACE",
            "INTERPRETER_ENDED",
            "CLOCK_BOOTTIME",
        ];
        let comments = FILES
            .iter()
            .flat_map(|file| file.lines())
            .filter_map(|line| line.split_once("//"));
        let words: Vec<&str> = comments
            .flat_map(|(_, text)| {
                text.split(|letter: char| !letter.is_ascii_uppercase() && letter != '_')
            })
            .collect();
        for reason in REASONS {
            assert!(words.contains(&reason), "{reason}");
        }
        for word in words {
            let is_reason = word.contains('_') && word.len() > 6 && !word.starts_with('_');
            assert!(
                !is_reason || OTHERS.contains(&word) || REASONS.contains(&word),
                "{word}"
            );
        }
    }

    fn detailed() -> impl Strategy<Value = Status> {
        let reason = prop_oneof![
            ".{0,40}",
            proptest::sample::select(&REASONS[..]).prop_map(str::to_owned)
        ];
        let violation = (".{0,300}", ".{0,2000}");
        (
            any::<i32>(),
            ".{0,3000}",
            reason,
            proptest::collection::hash_map(".{0,20}", ".{0,200}", 0..4),
            proptest::collection::vec(violation, 0..40),
        )
            .prop_map(|(code, message, reason, metadata, violations)| {
                let mut details = ErrorDetails::with_error_info(reason, "anything", metadata);
                for (field, description) in violations {
                    details.add_bad_request_violation(field, description);
                }
                Status::with_error_details(Code::from_i32(code % 20), message, details)
            })
    }

    fn is_harmless(status: &Status) {
        let headers = trailers(status);
        let bytes: usize = headers
            .iter()
            .map(|(name, value)| name.as_str().len() + value.len() + 32)
            .sum();
        assert!(bytes < 8192, "{bytes} bytes of trailers");
        assert!(
            !status.message().chars().any(char::is_control),
            "{status:?}"
        );
        if status.code() == Code::Ok {
            return assert_eq!(bytes, "grpc-status".len() + 1 + 32);
        }
        let details = status.get_error_details();
        let info = details.error_info().expect("no ErrorInfo");
        assert_eq!(info.domain, "soulbox");
        let ours = ["AGENT_FAILED", "CALL_NOT_FOUND", "INVALID_REQUEST"];
        let is_known = |known: &str| known == info.reason;
        assert!(REASONS.into_iter().any(is_known) || ours.into_iter().any(is_known));
        for (key, value) in &info.metadata {
            assert_eq!(key, "exit_code");
            value.parse::<u8>().unwrap();
        }
    }

    proptest! {
        #[test]
        fn whatever_an_agent_says_is_harmless(said in detailed()) {
            is_harmless(&told(&trailers(&said)));
        }

        #[test]
        fn so_are_trailers_that_are_none(
            status in proptest::collection::vec(any::<u8>(), 0..8),
            message in proptest::collection::vec(any::<u8>(), 0..2000),
            details in "[A-Za-z0-9+/=]{0,2000}",
        ) {
            let mut headers = HeaderMap::new();
            for (name, value) in [
                ("grpc-status", &status[..]),
                ("grpc-message", &message),
                ("grpc-status-details-bin", details.as_bytes()),
            ] {
                if let Ok(value) = HeaderValue::from_bytes(value) {
                    headers.append(name, value);
                }
            }
            crate::guest::drop_undecodable(&mut headers);
            is_harmless(&told(&headers));
        }
    }
}
