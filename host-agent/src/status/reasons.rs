//! Which code and which reason each error has. docs/protocol.md lists them.

use std::collections::BTreeMap;
use std::time::Duration;

use soulbox_proto::vmm::v1::error::Code as MonitorCode;
use tonic::Code;

use super::{Explain, FieldViolation};
use crate::admission::Exhausted;
use crate::id::ParseIdError;
use crate::kvm::KvmError;
use crate::monitor::SpawnError;
use crate::record::{Failure, State};
use crate::sandbox::{
    CreateError, DeleteError, OperateError, RestoreError, SaveError, StartError, UseError,
    WatchError,
};
use crate::snapshot::LayerError;
use crate::template::{KernelError, TemplateError};

/// How long a caller should wait for resources, or for a daemon that restarts.
const RETRY: Duration = Duration::from_secs(1);
/// Details travel as an HTTP/2 header, of which clients take 8 KiB in all.
const MAX_TAIL_BYTES: usize = 2048;
/// The same.
const MAX_USERS_LISTED: usize = 20;

/// The code for a sandbox that ended with this reason while it started.
pub fn failure_code(reason: &str) -> Code {
    match reason {
        "EMULATION_FAILED" => Code::FailedPrecondition,
        "MONITOR_DIED" => Code::Unavailable,
        _ => Code::Internal,
    }
}

impl Explain for CreateError {
    fn code(&self) -> Code {
        match self {
            Self::Draining => Code::Unavailable,
            Self::Invalid(_) => Code::InvalidArgument,
            Self::RequestIdReused(_) => Code::AlreadyExists,
            Self::Kvm(error) => error.code(),
            Self::Template(error) => error.code(),
            Self::Exhausted(error) => error.code(),
            Self::Random(_) | Self::ActorLost => Code::Internal,
            Self::Start(error) => error.code(),
            Self::Network(error) => error.code(),
            Self::SnapshotNotFound(_) => Code::NotFound,
        }
    }

    fn reason(&self) -> &str {
        match self {
            Self::Draining => "DRAINING",
            Self::Invalid(_) => "INVALID_REQUEST",
            Self::SnapshotNotFound(_) => "SNAPSHOT_NOT_FOUND",
            Self::RequestIdReused(_) => "REQUEST_ID_REUSED",
            Self::Kvm(error) => error.reason(),
            Self::Template(error) => error.reason(),
            Self::Exhausted(error) => error.reason(),
            Self::Random(_) => "HOST_FAILED",
            Self::ActorLost => "INTERNAL",
            Self::Start(error) => error.reason(),
            Self::Network(error) => error.reason(),
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Draining => Some(RETRY),
            Self::Exhausted(error) => error.retry_after(),
            Self::Start(error) => error.retry_after(),
            Self::Network(error) => error.retry_after(),
            _ => None,
        }
    }

    fn metadata(&self) -> BTreeMap<String, String> {
        match self {
            Self::Start(error) => error.metadata(),
            _ => BTreeMap::new(),
        }
    }

    fn violations(&self) -> Vec<FieldViolation> {
        match self {
            Self::Invalid(violations) => violations.clone(),
            Self::Template(error) => error.violations(),
            _ => Vec::new(),
        }
    }
}

impl Explain for StartError {
    fn code(&self) -> Code {
        match self {
            Self::Store(_) | Self::Transition(_) | Self::Prepare { .. } | Self::Protocol => {
                Code::Internal
            }
            Self::Spawn {
                error: SpawnError::Missing { .. } | SpawnError::NotExecutable { .. },
                ..
            } => Code::FailedPrecondition,
            Self::Spawn { .. } | Self::Agent { .. } => Code::Internal,
            Self::Refused { code, .. } => match code {
                MonitorCode::Kvm | MonitorCode::Kernel | MonitorCode::Disk => {
                    Code::FailedPrecondition
                }
                _ => Code::Internal,
            },
            Self::Restore(error) => error.code(),
            Self::Network(error) => error.code(),
            Self::Ended(failure) => failure_code(&failure.reason),
            Self::Gone => Code::Unavailable,
            Self::BootTimeout { .. } => Code::DeadlineExceeded,
            Self::Deleted | Self::CallerGone => Code::Aborted,
            Self::Stopping => Code::Unavailable,
        }
    }

    fn reason(&self) -> &str {
        match self {
            Self::Store(_) => "STORE_FAILED",
            Self::Transition(_) => "INTERNAL",
            Self::Prepare { .. } => "HOST_FAILED",
            Self::Spawn { .. } => "MONITOR_NOT_STARTED",
            Self::Refused { code, .. } => match code {
                MonitorCode::Kvm => "KVM_UNAVAILABLE",
                MonitorCode::Kernel => "KERNEL_INVALID",
                MonitorCode::Disk => "DISK_INVALID",
                MonitorCode::Memory => "MEMORY_FAILED",
                _ => "BOOT_REFUSED",
            },
            Self::Protocol => "PROTOCOL_MISMATCH",
            Self::Restore(error) => error.reason(),
            Self::Network(error) => error.reason(),
            Self::Ended(failure) => &failure.reason,
            Self::Gone => "MONITOR_DIED",
            Self::BootTimeout { .. } => "BOOT_TIMEOUT",
            Self::Agent { .. } => "AGENT_FAILED",
            Self::Deleted => "SANDBOX_DELETED",
            Self::CallerGone => "CALLER_GONE",
            Self::Stopping => "DRAINING",
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        matches!(self, Self::Stopping | Self::Store(_)).then_some(RETRY)
    }

    fn metadata(&self) -> BTreeMap<String, String> {
        match self {
            Self::Ended(failure) => tail(&failure.console_tail),
            Self::BootTimeout { console_tail, .. } => tail(console_tail),
            _ => BTreeMap::new(),
        }
    }
}

impl Explain for RestoreError {
    fn code(&self) -> Code {
        match self {
            Self::Template(error) => error.code(),
            Self::Slow { .. } => Code::DeadlineExceeded,
            Self::Layer {
                error: LayerError::Unreadable { .. } | LayerError::Cold | LayerError::Thaw { .. },
                ..
            } => Code::Internal,
            Self::Refused { code, .. } => match code {
                MonitorCode::Snapshot | MonitorCode::Cpu | MonitorCode::Kvm | MonitorCode::Disk => {
                    Code::FailedPrecondition
                }
                _ => Code::Internal,
            },
            Self::OtherDisk { .. } | Self::Gone { .. } | Self::Layer { .. } => {
                Code::FailedPrecondition
            }
        }
    }

    fn reason(&self) -> &str {
        match self {
            Self::Template(error) => error.reason(),
            Self::OtherDisk { .. } => "SNAPSHOT_INCOMPATIBLE",
            Self::Gone { .. } => "SNAPSHOT_NOT_FOUND",
            Self::Layer { error, .. } => match error {
                LayerError::Missing { .. } => "SNAPSHOT_LAYER_MISSING",
                _ => "SNAPSHOT_LAYER_UNREADABLE",
            },
            Self::Refused { code, .. } => match code {
                MonitorCode::Snapshot => "SNAPSHOT_DAMAGED",
                MonitorCode::Cpu => "CPU_FEATURES_MISSING",
                MonitorCode::Kvm => "KVM_UNAVAILABLE",
                MonitorCode::Disk => "DISK_INVALID",
                MonitorCode::Memory => "MEMORY_FAILED",
                _ => "RESTORE_REFUSED",
            },
            Self::Slow { .. } => "RESTORE_TIMEOUT",
        }
    }

    fn metadata(&self) -> BTreeMap<String, String> {
        match self {
            Self::Layer { layer, error, .. } => BTreeMap::from([
                ("layer".to_owned(), layer.to_string()),
                ("file".to_owned(), error.file().to_owned()),
            ]),
            _ => BTreeMap::new(),
        }
    }
}

impl Explain for SaveError {
    fn code(&self) -> Code {
        match self {
            Self::NameTaken(_) => Code::AlreadyExists,
            Self::DiskFull => Code::ResourceExhausted,
            Self::Refused { code, .. } if *code == MonitorCode::WrongState => {
                Code::FailedPrecondition
            }
            Self::Slow { .. } => Code::DeadlineExceeded,
            Self::Ended => Code::Unavailable,
            _ => Code::Internal,
        }
    }

    fn reason(&self) -> &str {
        match self {
            Self::Store(_) => "STORE_FAILED",
            Self::Transition(_) => "INTERNAL",
            Self::NameTaken(_) => "SNAPSHOT_NAME_TAKEN",
            Self::Random(_) | Self::Files { .. } => "HOST_FAILED",
            Self::DiskFull => "DISK_FULL",
            Self::Refused { .. } => "SNAPSHOT_REFUSED",
            Self::Slow { .. } => "SNAPSHOT_TIMEOUT",
            Self::Protocol => "PROTOCOL_MISMATCH",
            Self::Agent { .. } => "AGENT_FAILED",
            Self::Ended => "SANDBOX_DIED",
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        matches!(self, Self::Store(_)).then_some(RETRY)
    }
}

impl Explain for OperateError {
    fn code(&self) -> Code {
        match self {
            Self::Draining => Code::Unavailable,
            Self::Use(error) => error.code(),
            Self::Busy { .. } | Self::OtherSandbox { .. } | Self::InUse { .. } => {
                Code::FailedPrecondition
            }
            Self::Invalid(_) => Code::InvalidArgument,
            Self::Save(error) => error.code(),
            Self::Exhausted(error) => error.code(),
            Self::Start(error) => error.code(),
            Self::Network(error) => error.code(),
            Self::SnapshotNotFound(_) => Code::NotFound,
            Self::Cleanup { .. } => Code::Internal,
        }
    }

    fn reason(&self) -> &str {
        match self {
            Self::Draining => "DRAINING",
            Self::Use(error) => error.reason(),
            Self::Busy { .. } => "SANDBOX_BUSY",
            Self::Invalid(_) => "INVALID_REQUEST",
            Self::Save(error) => error.reason(),
            Self::Exhausted(error) => error.reason(),
            Self::Start(error) => error.reason(),
            Self::Network(error) => error.reason(),
            Self::SnapshotNotFound(_) => "SNAPSHOT_NOT_FOUND",
            Self::OtherSandbox { .. } => "SNAPSHOT_OF_ANOTHER",
            Self::InUse { .. } => "SNAPSHOT_IN_USE",
            Self::Cleanup { .. } => "CLEANUP_FAILED",
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Draining | Self::Busy { .. } => Some(RETRY),
            Self::Use(error) => error.retry_after(),
            Self::Save(error) => error.retry_after(),
            Self::Exhausted(error) => error.retry_after(),
            Self::Start(error) => error.retry_after(),
            Self::Network(error) => error.retry_after(),
            _ => None,
        }
    }

    fn metadata(&self) -> BTreeMap<String, String> {
        match self {
            Self::Use(error) => error.metadata(),
            Self::Start(error) => error.metadata(),
            Self::InUse { users, .. } => {
                let listed = users.iter().take(MAX_USERS_LISTED);
                let listed: Vec<&str> = listed.map(String::as_str).collect();
                BTreeMap::from([("users".to_owned(), listed.join(","))])
            }
            _ => BTreeMap::new(),
        }
    }

    fn violations(&self) -> Vec<FieldViolation> {
        match self {
            Self::Invalid(violations) => violations.clone(),
            _ => Vec::new(),
        }
    }
}

impl Explain for Exhausted {
    fn code(&self) -> Code {
        Code::ResourceExhausted
    }

    fn reason(&self) -> &str {
        "RESOURCES_EXHAUSTED"
    }

    fn retry_after(&self) -> Option<Duration> {
        Some(RETRY)
    }
}

impl Explain for KvmError {
    fn code(&self) -> Code {
        Code::FailedPrecondition
    }

    fn reason(&self) -> &str {
        "KVM_UNAVAILABLE"
    }
}

impl Explain for TemplateError {
    fn code(&self) -> Code {
        match self {
            Self::Unknown { .. } => Code::NotFound,
            Self::Kernel {
                error: KernelError::TooLarge { .. },
                ..
            } => Code::InvalidArgument,
            _ => Code::FailedPrecondition,
        }
    }

    fn reason(&self) -> &str {
        match self {
            Self::Unknown { .. } => "TEMPLATE_NOT_FOUND",
            Self::ManifestUnreadable { .. } | Self::ManifestInvalid { .. } => {
                "TEMPLATE_MANIFEST_INVALID"
            }
            Self::FileMissing { .. } => "TEMPLATE_FILE_MISSING",
            Self::FileUnreadable { .. } => "TEMPLATE_FILE_UNREADABLE",
            Self::FileTruncated { .. } => "TEMPLATE_FILE_TRUNCATED",
            Self::FileChanged { .. } => "TEMPLATE_FILE_CHANGED",
            Self::Kernel { error, .. } => match error {
                KernelError::Architecture { .. } => "KERNEL_WRONG_ARCHITECTURE",
                KernelError::TooLarge { .. } => "KERNEL_TOO_LARGE",
                _ => "KERNEL_INVALID",
            },
        }
    }

    fn violations(&self) -> Vec<FieldViolation> {
        match self {
            Self::Kernel {
                error: KernelError::TooLarge { needed_mib, .. },
                ..
            } => vec![FieldViolation {
                field: "resources.memory_mib".to_owned(),
                description: format!("must be at least {needed_mib} for this template's kernel"),
            }],
            _ => Vec::new(),
        }
    }
}

impl Explain for DeleteError {
    fn code(&self) -> Code {
        match self {
            Self::Cleanup { .. } | Self::Store { .. } => Code::Internal,
            Self::Stopping => Code::Unavailable,
        }
    }

    fn reason(&self) -> &str {
        match self {
            Self::Cleanup { .. } => "CLEANUP_FAILED",
            Self::Store { .. } => "STORE_FAILED",
            Self::Stopping => "DRAINING",
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        Some(RETRY)
    }
}

impl Explain for UseError {
    fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::NotFound,
            Self::NotRunning { .. } | Self::Failed { .. } => Code::FailedPrecondition,
            Self::Died { .. }
            | Self::Interrupted { .. }
            | Self::Deleted { .. }
            | Self::Lost { .. }
            | Self::Stopping => Code::Unavailable,
            Self::Store { .. } => Code::Internal,
        }
    }

    fn reason(&self) -> &str {
        match self {
            Self::NotFound(_) => "SANDBOX_NOT_FOUND",
            Self::NotRunning { state, .. } => match state {
                State::Paused => "SANDBOX_PAUSED",
                _ => "SANDBOX_NOT_RUNNING",
            },
            Self::Interrupted { state, .. } => match state {
                State::Pausing | State::Paused => "SANDBOX_PAUSED",
                _ => "SANDBOX_ROLLED_BACK",
            },
            Self::Failed { .. } => "SANDBOX_FAILED",
            Self::Died { .. } => "SANDBOX_DIED",
            Self::Deleted { .. } => "SANDBOX_DELETED",
            Self::Lost { .. } => "GUEST_UNREACHABLE",
            Self::Store { .. } => "STORE_FAILED",
            Self::Stopping => "DRAINING",
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Lost { .. } | Self::Store { .. } | Self::Stopping => Some(RETRY),
            _ => None,
        }
    }

    fn metadata(&self) -> BTreeMap<String, String> {
        match self {
            Self::Failed { failure, .. } | Self::Died { failure, .. } => {
                let mut metadata = tail(&failure.console_tail);
                metadata.insert("failure_reason".to_owned(), failure.reason.clone());
                metadata
            }
            _ => BTreeMap::new(),
        }
    }
}

impl Explain for WatchError {
    fn code(&self) -> Code {
        match self {
            Self::FellBehind { .. } => Code::DataLoss,
            Self::Stopping => Code::Unavailable,
        }
    }

    fn reason(&self) -> &str {
        match self {
            Self::FellBehind { .. } => "WATCHER_FELL_BEHIND",
            Self::Stopping => "DRAINING",
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        matches!(self, Self::Stopping).then_some(RETRY)
    }
}

impl Explain for ParseIdError {
    fn code(&self) -> Code {
        Code::InvalidArgument
    }

    fn reason(&self) -> &str {
        "INVALID_REQUEST"
    }

    fn violations(&self) -> Vec<FieldViolation> {
        vec![FieldViolation {
            field: "id".to_owned(),
            description: format!("is not a {} id", self.what),
        }]
    }
}

impl Failure {
    pub fn new(reason: &str, message: impl Into<String>) -> Self {
        Self {
            reason: reason.to_owned(),
            message: message.into(),
            console_tail: String::new(),
        }
    }
}

/// The console's end as metadata, cut to what a header may carry.
fn tail(console: &str) -> BTreeMap<String, String> {
    if console.is_empty() {
        return BTreeMap::new();
    }
    let from = console.len().saturating_sub(MAX_TAIL_BYTES);
    let from = (from..=console.len())
        .find(|&index| console.is_char_boundary(index))
        .unwrap_or(console.len());
    BTreeMap::from([("console_tail".to_owned(), console[from..].to_owned())])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_console_is_cut_at_a_character() {
        let console = "ä".repeat(3000) + "end";
        let cut = &tail(&console)["console_tail"];
        assert!(cut.len() <= MAX_TAIL_BYTES && cut.ends_with("end"));
        assert!(tail("").is_empty());
    }

    #[test]
    fn a_death_names_its_own_reason_beside_the_calls() {
        let error = UseError::Died {
            id: crate::id::SandboxId::random().unwrap(),
            failure: Failure::new("GUEST_PANIC", "The guest's kernel panicked."),
        };
        assert_eq!(error.reason(), "SANDBOX_DIED");
        assert_eq!(error.code(), Code::Unavailable);
        assert_eq!(error.metadata()["failure_reason"], "GUEST_PANIC");
    }
}
