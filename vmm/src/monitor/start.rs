//! From a client's requests to a machine that has not run.

use std::os::fd::OwnedFd;

use soulbox_proto::vmm::v1::{self, error::Code, reply::Result as ReplyResult, request::Op};

use super::MonitorError;
use crate::config::{BootRequest, PrepareRequest, RestoreRequest};
use crate::console::Console;
use crate::control::{ControlSocket, Incoming, ReceiveError, Received, Wait};
use crate::error_chain;
use crate::events::EventSender;
use crate::jail;
use crate::machine::{BuildError, Frame, Machine, Origin, Parts, Shape, Stopwatch};
use crate::snapshot;

/// What a machine is to be made from.
pub(super) enum Start {
    Boot(BootRequest),
    Restore(RestoreRequest),
}

/// Why there is no machine, as the client is told.
pub(super) struct Refusal {
    pub(super) code: Code,
    pub(super) message: String,
}

/// Answers requests until there is a machine to build, and makes the shell for
/// it when asked. `None` when the client goes before that.
pub(super) fn wait_for_start(
    control: &ControlSocket,
    shell: &mut Option<Frame>,
) -> Result<Option<(u64, Start)>, MonitorError> {
    loop {
        let Incoming { request, fds } = *match control.receive(Wait::Yes) {
            Ok(Received::Request(incoming)) => incoming,
            Ok(Received::Nothing) => continue,
            Ok(Received::End) => return Ok(None),
            Err(error @ ReceiveError::Io(_)) => return Err(error.into()),
            Err(error) => {
                if control
                    .refuse(0, Code::Invalid, error_chain(&error))
                    .is_err()
                {
                    return Ok(None);
                }
                continue;
            }
        };
        let id = request.id;
        let refused = match request.op {
            Some(Op::Boot(boot)) => match BootRequest::from_message(boot, fds) {
                Ok(boot) => match shell.as_ref().map(Frame::shape) {
                    Some(shape) if shape != boot.shape => {
                        let message = "the shell is of another shape; boot in a new monitor";
                        control.refuse(id, Code::Invalid, message)
                    }
                    _ => return Ok(Some((id, Start::Boot(boot)))),
                },
                Err(error) => control.refuse(id, Code::Invalid, error.to_string()),
            },
            Some(Op::Restore(restore)) => match RestoreRequest::from_message(restore, fds) {
                Ok(restore) if restore.kvm.is_none() && shell.is_none() => {
                    let message = "there is no shell: send kvm_fd, or Prepare first";
                    control.refuse(id, Code::Invalid, message)
                }
                Ok(restore)
                    if restore.first_layer_prepared
                        && !shell.as_ref().is_some_and(Frame::has_first_layer) =>
                {
                    let message = "no memory layer is prepared: send all in memory_fds";
                    control.refuse(id, Code::Invalid, message)
                }
                Ok(restore) => return Ok(Some((id, Start::Restore(restore)))),
                Err(error) => control.refuse(id, Code::Invalid, error.to_string()),
            },
            Some(Op::Prepare(_)) if shell.is_some() => {
                control.refuse(id, Code::WrongState, "there is a shell already; use it")
            }
            Some(Op::Prepare(prepare)) => match PrepareRequest::from_message(prepare, fds) {
                Ok(prepare) => {
                    let mut stages = Stopwatch::start();
                    match new_shell(prepare, &mut stages) {
                        Ok(frame) => {
                            *shell = Some(frame);
                            crate::sys::map_own_code();
                            snapshot::warm_up();
                            let stages = stages.into_stages();
                            control.reply(id, ReplyResult::Prepared(v1::Prepared { stages }))
                        }
                        Err(Refusal { code, message }) => {
                            let _ = control.refuse(id, code, message);
                            return Ok(None);
                        }
                    }
                }
                Err(error) => control.refuse(id, Code::Invalid, error.to_string()),
            },
            Some(Op::Shutdown(_)) => {
                let _ = control.reply(id, ReplyResult::ShuttingDown(v1::ShuttingDown {}));
                return Ok(None);
            }
            Some(
                Op::GetMetrics(_)
                | Op::Snapshot(_)
                | Op::Resume(_)
                | Op::RecordWorkingSet(_)
                | Op::OpenSpares(_)
                | Op::SetBalloon(_)
                | Op::SetNet(_),
            ) => control.refuse(
                id,
                Code::WrongState,
                "there is no machine yet; send Boot or Restore first",
            ),
            None => control.refuse(id, Code::Invalid, "the request names no operation"),
        };
        if refused.is_err() {
            return Ok(None);
        }
    }
}

/// The machine, its console, and where its next client will call.
pub(super) type Built = (Machine, Console, Option<OwnedFd>);

pub(super) fn build_booted(
    boot: BootRequest,
    shell: Option<Frame>,
    events: EventSender,
    stages: &mut Stopwatch,
) -> Result<Built, Refusal> {
    let console = new_console(boot.attached.console)?;
    let frame = match shell {
        Some(frame) => frame,
        None => new_frame(boot.shape, boot.kvm, stages)?,
    };
    let parts = Parts {
        disks: boot.disks,
        vsock: boot.vsock,
        net: boot.net,
        pagemap: boot.attached.pagemap,
    };
    let mut kernel = boot.kernel;
    let origin = Origin::Boot {
        kernel: &mut kernel,
        cmdline: &boot.cmdline,
    };
    let machine = Machine::new(frame, parts, origin, console.clone(), events, stages)?;
    Ok((machine, console, boot.attached.control_listener))
}

pub(super) fn build_restored(
    restore: RestoreRequest,
    shell: Option<Frame>,
    events: EventSender,
    stages: &mut Stopwatch,
) -> Result<Built, Refusal> {
    if let Some(frame) = &shell {
        frame.wake();
    }
    let console = new_console(restore.attached.console)?;
    let state = snapshot::read(&restore.state).map_err(|error| refusal(Code::Snapshot, &error))?;
    stages.mark("read");
    let damaged = |message: String| Refusal {
        code: Code::Snapshot,
        message,
    };
    let frame = match (shell, restore.kvm) {
        (Some(frame), _) => frame,
        (None, Some(kvm)) => {
            let shape = Shape::from_state(&state.shape)
                .map_err(|error| damaged(format!("the snapshot's machine cannot be: {error}")))?;
            new_frame(shape, kvm, stages)?
        }
        (None, None) => return Err(damaged("there is no shell".into())),
    };
    let parts = Parts::of_snapshot(
        &state,
        restore.disks,
        restore.vsock_listener,
        restore.net,
        restore.attached.pagemap,
    )
    .map_err(BuildError::from)?;
    let origin = Origin::Restore {
        state: Box::new(state),
        layers: restore.memory,
        first_layer_prepared: restore.first_layer_prepared,
        ahead: restore.ahead,
    };
    let machine = Machine::new(frame, parts, origin, console.clone(), events, stages)?;
    Ok((machine, console, restore.attached.control_listener))
}

fn new_shell(prepare: PrepareRequest, stages: &mut Stopwatch) -> Result<Frame, Refusal> {
    let mut frame = new_frame(prepare.shape, prepare.kvm, stages)?;
    if let Some(memory) = prepare.memory {
        frame.prepare_memory(memory)?;
        stages.mark("memory");
    }
    Ok(frame)
}

/// Makes a frame, after which nothing more needs what [`jail::seal`] gives up.
fn new_frame(shape: Shape, kvm: OwnedFd, stages: &mut Stopwatch) -> Result<Frame, Refusal> {
    let frame = Frame::new(shape, kvm, stages)?;
    jail::seal().map_err(|error| refusal(Code::Host, &error))?;
    stages.mark("seal");
    Ok(frame)
}

fn new_console(client: Option<OwnedFd>) -> Result<Console, Refusal> {
    Console::new(client).map_err(|error| refusal(Code::Host, &error))
}

pub(super) fn refusal(code: Code, error: &dyn std::error::Error) -> Refusal {
    Refusal {
        code,
        message: error_chain(error),
    }
}

impl From<BuildError> for Refusal {
    fn from(error: BuildError) -> Self {
        refusal(error.code(), &error)
    }
}
