//! Errors as callers see them: gRPC statuses with `google.rpc` details. Every
//! status that this daemon makes is made here.

mod edge;
mod reasons;

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use soulbox_proto::ERROR_DOMAIN;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

pub use reasons::failure_code;

/// What an operation's error means to its caller.
pub trait Explain: std::error::Error {
    fn code(&self) -> Code;
    /// Stable, in capitals: what programs compare.
    fn reason(&self) -> &str;
    /// After how long a retry can help.
    fn retry_after(&self) -> Option<Duration> {
        None
    }
    fn metadata(&self) -> BTreeMap<String, String> {
        BTreeMap::new()
    }
    fn violations(&self) -> Vec<FieldViolation> {
        Vec::new()
    }
}

/// A field of a request and what to change about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FieldViolation {
    pub field: String,
    pub description: String,
}

/// An error in the form in which it is answered, and stored for a repeated
/// request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// A `google.rpc.Code`.
    code: i32,
    pub reason: String,
    pub message: String,
    #[serde(default)]
    pub metadata: BTreeMap<String, String>,
    #[serde(default)]
    violations: Vec<FieldViolation>,
    #[serde(default)]
    retry_after_ms: Option<u64>,
}

// === impl Refusal ===

impl<E: Explain> From<&E> for Refusal {
    fn from(error: &E) -> Self {
        Self {
            code: error.code().into(),
            reason: error.reason().to_owned(),
            message: error.to_string(),
            metadata: error.metadata(),
            violations: error.violations(),
            retry_after_ms: error
                .retry_after()
                .and_then(|delay| u64::try_from(delay.as_millis()).ok()),
        }
    }
}

impl Refusal {
    /// Whether the same request may fare better another time.
    pub fn is_retryable(&self) -> bool {
        self.retry_after_ms.is_some() || self.code == i32::from(Code::Unavailable)
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let mut details = ErrorDetails::new();
        let metadata: HashMap<String, String> = refusal.metadata.into_iter().collect();
        details.set_error_info(refusal.reason, ERROR_DOMAIN, metadata);
        for violation in refusal.violations {
            details.add_bad_request_violation(violation.field, violation.description);
        }
        if let Some(delay) = refusal.retry_after_ms {
            details.set_retry_info(Some(Duration::from_millis(delay)));
        }
        Status::with_error_details(Code::from_i32(refusal.code), refusal.message, details)
    }
}

/// What no request and no host should be able to cause.
#[derive(Debug, thiserror::Error)]
#[error("{0}; this is a bug in soulboxd, please report it with its log")]
pub struct Bug(pub String);

impl Explain for Bug {
    fn code(&self) -> Code {
        Code::Internal
    }

    fn reason(&self) -> &str {
        "INTERNAL"
    }
}

/// The status that tells `error`.
pub fn status<E: Explain>(error: &E) -> Status {
    Refusal::from(error).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::Exhausted;

    #[test]
    fn details_arrive_and_survive_storage() {
        let error = Exhausted {
            short: vec!["vcpus (2 wanted, 1 left)".to_owned()],
        };
        let stored = serde_json::to_string(&Refusal::from(&error)).unwrap();
        let loaded: Refusal = serde_json::from_str(&stored).unwrap();
        let status = Status::from(loaded);
        assert!(Refusal::from(&error).is_retryable());
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(status.message(), error.to_string());
        let details = status.get_error_details();
        let info = details.error_info().unwrap();
        assert_eq!(
            (info.reason.as_str(), info.domain.as_str()),
            ("RESOURCES_EXHAUSTED", "soulbox")
        );
        assert!(details.retry_info().unwrap().retry_delay.is_some());
    }
}
