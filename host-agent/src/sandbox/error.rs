//! What can go wrong with sandboxes: one enum per operation.

use soulbox_proto::vmm::v1::error::Code as MonitorCode;

use crate::admission::Exhausted;
use crate::id::SandboxId;
use crate::kvm::KvmError;
use crate::monitor::SpawnError;
use crate::record::{Failure, IllegalTransition, State};
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
    #[error(
        "the sandbox's task ended unexpectedly; this is a bug in soulboxd, please report it with its log"
    )]
    ActorLost,
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
    #[error("the monitor refused to boot: {message}")]
    Refused { code: MonitorCode, message: String },
    #[error(
        "the monitor answered Boot with something else; install soulbox-vmm and soulboxd of the same version"
    )]
    Protocol,
    #[error("{}", .0.message)]
    Ended(Failure),
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

fn said(log_line: Option<&String>) -> String {
    log_line.map_or_else(String::new, |line| format!("; its log ends with: {line}"))
}

fn not_running(state: State) -> &'static str {
    match state {
        State::Pending | State::Starting | State::Running => "wait until it is running",
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
