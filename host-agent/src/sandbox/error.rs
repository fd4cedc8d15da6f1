//! What can go wrong with sandboxes: one enum per operation.

use soulbox_proto::vmm::v1::error::Code as MonitorCode;

use crate::admission::Exhausted;
use crate::id::{SandboxId, SnapshotId};
use crate::kvm::KvmError;
use crate::monitor::SpawnError;
use crate::net::{NoSlot, SlotError};
use crate::record::{Failure, IllegalTransition, State};
use crate::snapshot::{LayerError, NameTaken};
use crate::status::FieldViolation;
use crate::store::CommitError;
use crate::template::TemplateError;

/// Why a sandbox was not created.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    #[error(
        "this node takes no new sandboxes because soulboxd is stopping; try again later or on another node"
    )]
    Draining,
    #[error("the request has {} to change: {}", fields(.0), list(.0))]
    Invalid(Vec<FieldViolation>),
    #[error("request_id {0:?} was used with another request; give each request an id of its own")]
    RequestIdReused(String),
    #[error("{0}")]
    Kvm(#[from] KvmError),
    #[error("{0}")]
    Template(#[from] TemplateError),
    #[error("{0}")]
    Exhausted(#[from] Exhausted),
    #[error("the host has no random numbers; see the kernel's log")]
    Random(#[source] std::io::Error),
    #[error("{0}")]
    Start(#[from] StartError),
    #[error("there is no snapshot {0:?}; `soulbox snapshot ls` shows those that are")]
    SnapshotNotFound(String),
    #[error("{0}")]
    Network(#[from] NetworkError),
    #[error(
        "the sandbox's task ended unexpectedly; this is a bug in soulboxd, please report it with its log"
    )]
    ActorLost,
}

/// Why a sandbox has not the network that it should have.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error(
        "this node gives sandboxes no network: turn network.enabled on in its configuration, or ask for none"
    )]
    Off,
    #[error("sandbox {0} has no network; make another with one")]
    None(SandboxId),
    #[error("{0}")]
    NoSlot(#[from] NoSlot),
    #[error("{0}")]
    Slot(#[from] SlotError),
    #[error("the monitor did not take the network's limits: {0}")]
    Monitor(String),
    #[error("{0}")]
    Store(CommitError),
}

/// Why an admitted sandbox did not come to run.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("{0}")]
    Store(#[from] CommitError),
    #[error("{0}")]
    Transition(#[from] IllegalTransition),
    #[error(
        "the sandbox's {what} cannot be made ({source}); see the space and permissions of state_dir and run_dir"
    )]
    Prepare {
        what: &'static str,
        source: std::io::Error,
    },
    #[error("{error}{}", said(.log_line.as_ref()))]
    Spawn {
        error: SpawnError,
        /// The last that the monitor said.
        log_line: Option<String>,
    },
    #[error("{0}")]
    Restore(#[from] RestoreError),
    #[error("{0}")]
    Network(#[from] NetworkError),
    #[error("the monitor refused to boot: {message}")]
    Refused { code: MonitorCode, message: String },
    #[error(
        "the monitor answered with something else; install soulbox-vmm and soulboxd of the same version"
    )]
    Protocol,
    #[error("{}", .0.message)]
    Ended(Failure),
    /// As `Ended`, before anybody has looked why.
    #[error("the monitor ended")]
    Gone,
    #[error(
        "the guest made no ready-call within {timeout_ms} ms; {}", too_slow(*.hardware_virtualization)
    )]
    BootTimeout {
        timeout_ms: u64,
        hardware_virtualization: bool,
        console_tail: String,
    },
    #[error("the guest's agent failed to {step}: {message}")]
    Agent { step: &'static str, message: String },
    #[error("the sandbox was deleted while it started")]
    Deleted,
    #[error(
        "the caller went away while the sandbox started, and no request_id was given to find it by"
    )]
    CallerGone,
    #[error("soulboxd stopped while the sandbox started; try again later or on another node")]
    Stopping,
}

/// Why a machine did not come back from a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error("{0}")]
    Template(#[from] TemplateError),
    #[error(
        "snapshot {snapshot} lies on another root disk than template {template:?} has now; put that one back, or make the snapshot again"
    )]
    OtherDisk {
        snapshot: SnapshotId,
        template: String,
    },
    #[error("what was saved of sandbox {sandbox} is gone; delete the sandbox")]
    Gone { sandbox: SandboxId },
    #[error("snapshot {snapshot} cannot be restored: the file {:?} of {layer}, which it needs, {error}; {}", .error.file(), mend_layer(.error))]
    Layer {
        snapshot: SnapshotId,
        layer: SnapshotId,
        error: LayerError,
    },
    #[error("snapshot {snapshot} cannot be restored: {message}")]
    Refused {
        snapshot: SnapshotId,
        code: MonitorCode,
        message: String,
    },
    #[error(
        "snapshot {snapshot} was not restored within {limit_ms} ms; raise timeouts.boot_ms, or see the load of this host"
    )]
    Slow { snapshot: SnapshotId, limit_ms: u64 },
}

/// Why a sandbox was not saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    #[error("{0}")]
    Store(CommitError),
    #[error("{0}")]
    Transition(#[from] IllegalTransition),
    #[error("{0}")]
    NameTaken(#[from] NameTaken),
    #[error("the host has no random numbers; see the kernel's log")]
    Random(#[source] std::io::Error),
    #[error(
        "the disk of state_dir is full; delete snapshots or sandboxes and try again{}",
        runs_on()
    )]
    DiskFull,
    #[error(
        "the snapshot's files cannot be written ({source}); see the disk of state_dir{}",
        runs_on()
    )]
    Files { source: std::io::Error },
    #[error("the monitor made no snapshot: {message}{}", runs_on())]
    Refused { code: MonitorCode, message: String },
    #[error(
        "the monitor made no snapshot within {limit_ms} ms; the sandbox is given up: raise timeouts.snapshot_ms"
    )]
    Slow { limit_ms: u64 },
    #[error(
        "the monitor answered with something else; install soulbox-vmm and soulboxd of the same version"
    )]
    Protocol,
    #[error("the guest's agent failed to {step}: {message}{}", runs_on())]
    Agent { step: &'static str, message: String },
    #[error("the sandbox ended while it was saved; `soulbox get` says why")]
    Ended,
}

/// Why an operation on a sandbox was not done.
#[derive(Debug, thiserror::Error)]
pub enum OperateError {
    #[error("soulboxd is stopping; try again when it runs")]
    Draining,
    #[error("{0}")]
    Use(#[from] UseError),
    #[error("sandbox {id} is {state}; wait until that is over")]
    Busy { id: SandboxId, state: State },
    #[error("the request has {} to change: {}", fields(.0), list(.0))]
    Invalid(Vec<FieldViolation>),
    #[error("{0}")]
    Save(#[from] SaveError),
    #[error("{0}")]
    Exhausted(#[from] Exhausted),
    #[error("{0}")]
    Start(#[from] StartError),
    #[error("{0}")]
    Network(#[from] NetworkError),
    #[error("there is no snapshot {0:?}; `soulbox snapshot ls` shows those that are")]
    SnapshotNotFound(String),
    #[error(
        "snapshot {snapshot} is not of sandbox {sandbox}; make another sandbox from it with `soulbox create --template {snapshot}`"
    )]
    OtherSandbox {
        snapshot: SnapshotId,
        sandbox: SandboxId,
    },
    #[error("snapshot {id} is in use by {}; delete what uses it first", users_listed(.users))]
    InUse { id: SnapshotId, users: Vec<String> },
    #[error("the snapshot's files cannot be removed ({message}); mend that and restart soulboxd")]
    Cleanup { message: String },
}

/// Why a sandbox is still there.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DeleteError {
    #[error("files of the sandbox cannot be removed ({message}); mend that and delete it again")]
    Cleanup { message: String },
    #[error("the sandbox's end cannot be recorded ({message}); mend that and delete it again")]
    Store { message: String },
    #[error("soulboxd stopped before the sandbox was gone; delete it again when it runs")]
    Stopping,
}

/// Why a sandbox cannot be used now.
#[derive(Debug, Clone, thiserror::Error)]
pub enum UseError {
    #[error("there is no sandbox {0}; `soulbox ls` shows those that are")]
    NotFound(String),
    #[error("sandbox {id} is {state}; {}", not_running(*.state))]
    NotRunning { id: SandboxId, state: State },
    #[error("sandbox {id} has failed: {}", .failure.message)]
    Failed { id: SandboxId, failure: Failure },
    #[error("sandbox {id} ended during the call: {}", .failure.message)]
    Died { id: SandboxId, failure: Failure },
    #[error("sandbox {id} was {} during the call; the program that it ran for the call has ended", interruption(*.state))]
    Interrupted { id: SandboxId, state: State },
    #[error("sandbox {id} was deleted during the call")]
    Deleted { id: SandboxId },
    #[error("the connection to the agent in sandbox {id} broke; try again, or delete the sandbox")]
    Lost { id: SandboxId },
    #[error(
        "that the sandbox is to go with the call cannot be recorded ({message}); mend that and try again"
    )]
    Store { message: String },
    #[error("soulboxd is stopping; try again when it runs")]
    Stopping,
}

/// Why a watch ended.
#[derive(Debug, Clone, thiserror::Error)]
pub enum WatchError {
    #[error("this watcher fell behind and missed {missed} changes; watch again")]
    FellBehind { missed: u64 },
    #[error("soulboxd is stopping; watch again when it runs")]
    Stopping,
}

// === impl SaveError ===

impl From<CommitError> for SaveError {
    fn from(error: CommitError) -> Self {
        match error {
            CommitError::Full => Self::DiskFull,
            other => Self::Store(other),
        }
    }
}

// === impl StartError ===

impl StartError {
    /// Whether the sandbox may come to run when it is booted rather than restored.
    pub(super) fn may_boot_instead(&self) -> bool {
        match self {
            Self::Restore(_) | Self::Protocol | Self::Ended(_) | Self::Gone => true,
            Self::Refused { code, .. } => *code != MonitorCode::Kvm,
            Self::Agent { .. } => true,
            _ => false,
        }
    }
}

fn interruption(state: State) -> &'static str {
    match state {
        State::Pausing | State::Paused => "paused",
        _ => "taken to an earlier state",
    }
}

fn users_listed(users: &[String]) -> String {
    const LISTED: usize = 20;
    let listed = users.iter().take(LISTED).map(String::as_str);
    let listed = listed.collect::<Vec<_>>().join(", ");
    match users.len().saturating_sub(LISTED) {
        0 => listed,
        more => format!("{listed} and {more} more"),
    }
}

fn runs_on() -> &'static str {
    "; the sandbox runs on"
}

fn mend_layer(error: &LayerError) -> &'static str {
    match error {
        LayerError::Missing { .. } => "put it back, or delete what was made of it",
        LayerError::Unreadable { .. } => "see its permissions",
        LayerError::Cold | LayerError::Thaw { .. } => "see the space of state_dir",
    }
}

fn said(log_line: Option<&String>) -> String {
    log_line.map_or_else(String::new, |line| format!("; its log ends with: {line}"))
}

fn not_running(state: State) -> &'static str {
    match state {
        State::Pending | State::Starting | State::Running => "wait until it is running",
        State::Pausing | State::Resuming => "try again in a moment",
        State::Paused => "resume it with `soulbox resume`",
        State::Stopping | State::Stopped | State::Failed => "make another one",
    }
}

/// What to do about a guest that does not come up. A KVM without hardware under
/// it may run a guest kernel, but far too slowly.
fn too_slow(hardware_virtualization: bool) -> &'static str {
    if hardware_virtualization {
        "see the console's last lines, or raise timeouts.boot_ms"
    } else {
        "this host's CPU shows neither vmx nor svm, so its KVM can hardly run guest kernels: use one that does, or start soulboxd through the launcher images/bench/run, which nests it"
    }
}

fn fields(violations: &[FieldViolation]) -> String {
    match violations.len() {
        1 => "one field".to_owned(),
        count => format!("{count} fields"),
    }
}

fn list(violations: &[FieldViolation]) -> String {
    violations
        .iter()
        .map(|violation| format!("{} {}", violation.field, violation.description))
        .collect::<Vec<_>>()
        .join("; ")
}
