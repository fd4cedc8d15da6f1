//! Which code and which reason the errors of a sandbox's network and ports have.

use std::time::Duration;

use tonic::Code;

use super::{Explain, FieldViolation};
use crate::ingress::{DialError, ForwardError};
use crate::net::NoSlot;
use crate::sandbox::NetworkError;

/// How long a guest that took no connection should be left alone.
const RETRY: Duration = Duration::from_secs(1);

impl Explain for DialError {
    fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::NotFound,
            Self::NotRunning { .. } | Self::PortClosed { .. } => Code::FailedPrecondition,
            Self::TimedOut { .. } => Code::DeadlineExceeded,
            Self::Unreachable { .. } => Code::Unavailable,
        }
    }

    fn reason(&self) -> &str {
        match self {
            Self::NotFound(_) => "SANDBOX_NOT_FOUND",
            Self::NotRunning { .. } => "SANDBOX_NOT_RUNNING",
            Self::PortClosed { .. } => "PORT_CLOSED",
            Self::TimedOut { .. } => "PORT_TIMED_OUT",
            Self::Unreachable { .. } => "PORT_UNREACHABLE",
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::TimedOut { .. } | Self::Unreachable { .. } => Some(RETRY),
            _ => None,
        }
    }
}

impl Explain for ForwardError {
    fn code(&self) -> Code {
        match self {
            Self::NoPort | Self::NoSuchAddress(_) => Code::InvalidArgument,
            Self::InUse(_) => Code::AlreadyExists,
            Self::Forbidden(_) => Code::PermissionDenied,
            Self::Listen { .. } => Code::Unavailable,
            Self::NotFound(_) => Code::NotFound,
        }
    }

    fn reason(&self) -> &str {
        match self {
            Self::NoPort | Self::NoSuchAddress(_) => "INVALID_REQUEST",
            Self::InUse(_) => "PORT_IN_USE",
            Self::Forbidden(_) => "PORT_FORBIDDEN",
            Self::Listen { .. } => "HOST_FAILED",
            Self::NotFound(_) => "FORWARD_NOT_FOUND",
        }
    }

    fn violations(&self) -> Vec<FieldViolation> {
        let violation = |field: &str| {
            vec![FieldViolation {
                field: field.to_owned(),
                description: self.to_string(),
            }]
        };
        match self {
            Self::NoPort => violation("port"),
            Self::NoSuchAddress(_) => violation("bind_address"),
            _ => Vec::new(),
        }
    }
}

impl Explain for NetworkError {
    fn code(&self) -> Code {
        match self {
            Self::Off | Self::None(_) => Code::FailedPrecondition,
            Self::NoSlot(NoSlot::NotReady) => Code::Unavailable,
            Self::NoSlot(NoSlot::Exhausted { .. }) => Code::ResourceExhausted,
            Self::NoSlot(NoSlot::Make(_)) | Self::Slot(_) | Self::Monitor(_) | Self::Store(_) => {
                Code::Internal
            }
        }
    }

    fn reason(&self) -> &str {
        match self {
            Self::Off => "NETWORK_DISABLED",
            Self::None(_) => "SANDBOX_HAS_NO_NETWORK",
            Self::NoSlot(NoSlot::NotReady | NoSlot::Exhausted { .. }) => "NETWORK_SLOTS_EXHAUSTED",
            Self::NoSlot(NoSlot::Make(_)) | Self::Slot(_) | Self::Monitor(_) => "NETWORK_FAILED",
            Self::Store(_) => "STORE_FAILED",
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::NoSlot(NoSlot::NotReady | NoSlot::Exhausted { .. }) => Some(RETRY),
            _ => None,
        }
    }
}
