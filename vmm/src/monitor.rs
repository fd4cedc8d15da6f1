//! The monitor's main thread: it takes one Boot or Restore from its client, then
//! serves devices, events and further requests from one epoll loop until the
//! machine is over.

use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use soulbox_proto::vmm::v1::{
    self, error::Code, event::Event, exited::Reason, reply::Result as ReplyResult, request::Op,
};

use crate::bus::lock;
use crate::config::{snapshot_files, working_set_file};
use crate::console::Console;
use crate::control::{ControlSocket, Incoming, ReceiveError, Received, Wait};
use crate::devices::Chip;
use crate::devices::virtio::net::{NetChange, NetError};
use crate::error_chain;
use crate::events::{self, EventReceiver, Exit, MachineEvent};
use crate::machine::{Frame, Machine, Stopwatch};

mod start;

use start::{Refusal, Start, build_booted, build_restored, refusal, wait_for_start};

/// Events taken from the kernel at once.
const EVENT_BATCH: usize = 32;

/// How the process should end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The machine came to an end that its guest or its client asked for.
    Ended,
    /// The machine could not be built, or broke down.
    Failed,
}

#[derive(Debug, thiserror::Error)]
pub enum MonitorError {
    #[error("the control socket failed")]
    Control(#[from] ReceiveError),
    #[error("the event loop failed")]
    EventLoop(#[from] Errno),
    #[error("the kick signal's handler could not be installed")]
    KickHandler(#[source] std::io::Error),
}

/// What an epoll event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    Control,
    ControlListener,
    MachineEvents,
    Device { slot: usize, source: usize },
}

/// A machine that is being served, or, once [`run`] has returned it, over: its
/// vCPUs have stopped, its memory and devices are still there.
pub struct Monitor {
    machine: Machine,
    console: Console,
    events: EventReceiver,
    control: Option<ControlSocket>,
    control_listener: Option<OwnedFd>,
    epoll: OwnedFd,
}

/// Serves the client at the other end of `control` until the machine is over.
///
/// The machine comes back with the outcome, for the process to exit without
/// dropping it: the kernel takes a dead process apart in less than a millisecond,
/// where a VM whose descriptors are closed one by one waits for RCU again and
/// again (14 ms measured).
pub fn run(control: OwnedFd) -> Result<(Outcome, Option<Monitor>), MonitorError> {
    crate::vcpu::install_kick_handler().map_err(MonitorError::KickHandler)?;
    let control = ControlSocket::new(control);
    let mut shell = None;
    let Some((id, start)) = wait_for_start(&control, &mut shell)? else {
        return Ok((Outcome::Ended, None));
    };
    let mut stages = Stopwatch::start();
    match Monitor::start(start, shell, &mut stages) {
        Ok((mut monitor, started_at_ns, restored)) => {
            let stages = stages.into_stages();
            let sent = if restored {
                let spares = monitor.machine.take_spares();
                let restored = v1::Restored {
                    stages,
                    started_at_ns,
                    spare_ports: spares.iter().map(|spare| spare.guest_port).collect(),
                };
                let fds: Vec<_> = spares.iter().map(|spare| spare.stream.as_fd()).collect();
                control.reply_with_fds(id, ReplyResult::Restored(restored), &fds)
            } else {
                let booted = v1::Booted {
                    stages,
                    started_at_ns,
                };
                control.reply(id, ReplyResult::Booted(booted))
            };
            if sent.is_ok() {
                monitor.control = Some(control);
            } else if monitor.client_gone().is_some() {
                return Ok((Outcome::Ended, Some(monitor)));
            }
            let outcome = monitor.serve()?;
            Ok((outcome, Some(monitor)))
        }
        Err(Refusal { code, message }) => {
            eprintln!("soulbox-vmm: {message}");
            // The client reads why; if it is gone there is nobody to tell.
            let _ = control.refuse(id, code, message);
            Ok((Outcome::Failed, None))
        }
    }
}

// === impl Monitor ===

impl Monitor {
    /// Builds the machine and starts it; with it comes when that was, and whether
    /// it was restored.
    fn start(
        start: Start,
        shell: Option<Frame>,
        stages: &mut Stopwatch,
    ) -> Result<(Self, u64, bool), Refusal> {
        let (sender, events) = events::channel().map_err(|error| refusal(Code::Host, &error))?;
        let restored = matches!(start, Start::Restore(_));
        let (mut machine, console, control_listener) = match start {
            Start::Boot(boot) => build_booted(boot, shell, sender, stages),
            Start::Restore(restore) => build_restored(restore, shell, sender, stages),
        }?;
        let host = |errno: Errno| refusal(Code::Host, &errno);
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(host)?;
        let started_at_ns = machine.start()?;
        stages.mark("start");
        let monitor = Self {
            machine,
            console,
            events,
            control: None,
            control_listener,
            epoll,
        };
        Ok((monitor, started_at_ns, restored))
    }

    fn serve(&mut self) -> Result<Outcome, MonitorError> {
        self.watch_all()?;
        let exit = self.serve_until_exit()?;
        let console_tail = self.console.tail();
        let control = self.control.take();
        // Once the client reads Exited, no guest code runs.
        self.machine.stop();
        let ended = matches!(
            exit.reason,
            Reason::PoweredOff | Reason::Reset | Reason::Forced
        );
        if let Some(control) = control {
            let exited = v1::Exited {
                reason: exit.reason.into(),
                message: exit.message,
                console_tail,
            };
            let _ = control.event(Event::Exited(exited));
        }
        Ok(if ended {
            Outcome::Ended
        } else {
            Outcome::Failed
        })
    }

    fn watch_all(&self) -> Result<(), Errno> {
        if let Some(control) = &self.control {
            self.watch(control.as_fd(), Token::Control)?;
        }
        if let Some(listener) = &self.control_listener {
            self.watch(listener.as_fd(), Token::ControlListener)?;
        }
        self.watch(self.events.as_fd(), Token::MachineEvents)?;
        for (slot, device) in self.machine.devices().iter().enumerate() {
            for (source, fd) in lock(&device.device).sources().into_iter().enumerate() {
                self.watch(fd, Token::Device { slot, source })?;
            }
        }
        Ok(())
    }

    fn watch(&self, fd: BorrowedFd<'_>, token: Token) -> Result<(), Errno> {
        let data = epoll::EventData::new_u64(token.encode());
        epoll::add(&self.epoll, fd, data, epoll::EventFlags::IN)
    }

    fn serve_until_exit(&mut self) -> Result<Exit, MonitorError> {
        let mut ready = Vec::with_capacity(EVENT_BATCH);
        loop {
            ready.clear();
            match epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut ready),
                None,
            ) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            for event in &ready {
                let exit = match Token::decode(event.data.u64()) {
                    Token::Control => self.serve_request()?,
                    Token::ControlListener => self.accept_client()?,
                    Token::MachineEvents => self.serve_machine_events(),
                    Token::Device { slot, source } => {
                        if let Some(slot) = self.machine.devices().get(slot) {
                            lock(&slot.device).source_ready(source);
                        }
                        None
                    }
                };
                if let Some(exit) = exit {
                    return Ok(exit);
                }
            }
        }
    }

    /// Answers one request. Gives an exit when the machine is to end.
    fn serve_request(&mut self) -> Result<Option<Exit>, MonitorError> {
        let Some(control) = &self.control else {
            return Ok(None);
        };
        // The event may be of a client before this one: do not wait.
        let Incoming { request, fds } = *match control.receive(Wait::No) {
            Ok(Received::Request(incoming)) => incoming,
            Ok(Received::Nothing) => return Ok(None),
            Ok(Received::End) | Err(ReceiveError::Io(_)) => return Ok(self.client_gone()),
            Err(error) => {
                let refused = control.refuse(0, Code::Invalid, error_chain(&error));
                return Ok(refused.is_err().then(|| self.client_gone()).flatten());
            }
        };
        let id = request.id;
        let machine = &mut self.machine;
        let replied = match request.op {
            Some(Op::GetMetrics(_)) => {
                let metrics = machine.metrics(&self.console);
                control.reply(id, ReplyResult::Metrics(metrics))
            }
            Some(Op::Snapshot(snapshot)) => match snapshot_files(&snapshot, fds) {
                Ok(files) => match machine.snapshot(files) {
                    Ok(snapshotted) => control.reply(id, ReplyResult::Snapshotted(snapshotted)),
                    Err(error) => control.refuse(id, error.code(), error_chain(&error)),
                },
                Err(error) => control.refuse(id, Code::Invalid, error.to_string()),
            },
            Some(Op::Resume(_)) if machine.is_paused() => {
                let started_at_ns = machine.resume();
                control.reply(id, ReplyResult::Resumed(v1::Resumed { started_at_ns }))
            }
            Some(Op::Resume(_)) => {
                control.refuse(id, Code::WrongState, "the machine is not paused")
            }
            Some(Op::RecordWorkingSet(record)) => match working_set_file(&record, fds) {
                Ok(file) => match machine.record_working_set(&file) {
                    Ok(bytes) => {
                        let recorded = v1::WorkingSetRecorded { bytes };
                        control.reply(id, ReplyResult::WorkingSetRecorded(recorded))
                    }
                    Err(error) => control.refuse(id, error.code(), error_chain(&error)),
                },
                Err(error) => control.refuse(id, Code::Invalid, error.to_string()),
            },
            Some(Op::OpenSpares(spares)) => match open_spares(machine, &spares) {
                Ok(()) => control.reply(id, ReplyResult::SparesOpened(v1::SparesOpened {})),
                Err(Refusal { code, message }) => control.refuse(id, code, message),
            },
            Some(Op::SetBalloon(balloon)) => {
                set_balloon(machine, balloon.target_mib);
                control.reply(id, ReplyResult::BalloonSet(v1::BalloonSet {}))
            }
            Some(Op::SetNet(set)) => match NetChange::from_message(set, fds) {
                Ok(change) => match set_net(machine, change) {
                    Ok(()) => control.reply(id, ReplyResult::NetSet(v1::NetSet {})),
                    Err(Refusal { code, message }) => control.refuse(id, code, message),
                },
                Err(error) => control.refuse(id, Code::Invalid, error.to_string()),
            },
            Some(Op::Shutdown(_)) => {
                let _ = control.reply(id, ReplyResult::ShuttingDown(v1::ShuttingDown {}));
                return Ok(Some(forced("the client asked for it")));
            }
            Some(Op::Boot(_) | Op::Prepare(_) | Op::Restore(_)) => control.refuse(
                id,
                Code::WrongState,
                "this monitor has its machine already; start another monitor",
            ),
            None => control.refuse(id, Code::Invalid, "the request names no operation"),
        };
        Ok(replied.is_err().then(|| self.client_gone()).flatten())
    }

    /// Without a way to be found again, a machine ends with its client.
    fn client_gone(&mut self) -> Option<Exit> {
        // Closing the socket takes it out of the epoll set.
        self.control = None;
        self.control_listener
            .is_none()
            .then(|| forced("the client went away and left no control listener"))
    }

    /// A new client takes over from the one before, which has restarted.
    fn accept_client(&mut self) -> Result<Option<Exit>, MonitorError> {
        if let Some(listener) = &self.control_listener
            && let Ok(socket) = accept_with(listener, SocketFlags::CLOEXEC)
        {
            let control = ControlSocket::new(socket);
            self.watch(control.as_fd(), Token::Control)?;
            self.control = Some(control);
        }
        Ok(None)
    }

    fn serve_machine_events(&mut self) -> Option<Exit> {
        while let Some(event) = self.events.next() {
            let sent = match event {
                MachineEvent::Exit(exit) => return Some(exit),
                MachineEvent::GuestPanic => {
                    let console_tail = self.console.tail();
                    let panic = v1::GuestPanic { console_tail };
                    self.control
                        .as_ref()
                        .map(|control| control.event(Event::GuestPanic(panic)))
                }
                MachineEvent::VsockConnection {
                    host_port,
                    guest_port,
                    stream,
                } => {
                    let connection = v1::VsockConnection {
                        host_port,
                        guest_port,
                    };
                    // Not sent, the stream is closed, and so the guest learns it.
                    self.control.as_ref().map(|control| {
                        control.event_with_fd(Event::VsockConnection(connection), stream.as_fd())
                    })
                }
            };
            if let Some(Err(error)) = sent {
                eprintln!("soulbox-vmm: an event was lost: {}", error_chain(&error));
            }
        }
        None
    }
}

fn open_spares(machine: &Machine, spares: &v1::OpenSpares) -> Result<(), Refusal> {
    let opened = machine.with_chip(|chip| match chip {
        Chip::Vsock(vsock) => Some(vsock.open_spares(spares.guest_port, spares.count)),
        _ => None,
    });
    match opened {
        Some(Ok(())) => Ok(()),
        Some(Err(error)) => Err(refusal(
            match error.kind() {
                ErrorKind::InvalidInput => Code::Invalid,
                ErrorKind::NotConnected | ErrorKind::ResourceBusy => Code::WrongState,
                _ => Code::Host,
            },
            &error,
        )),
        None => Err(Refusal {
            code: Code::WrongState,
            message: "the machine has no vsock".into(),
        }),
    }
}

fn set_balloon(machine: &Machine, target_mib: u32) {
    machine.with_chip(|chip| match chip {
        Chip::Balloon(balloon) => {
            balloon.set_target_mib(target_mib);
            Some(())
        }
        _ => None,
    });
}

fn set_net(machine: &Machine, change: NetChange) -> Result<(), Refusal> {
    let changed = machine.with_chip(|chip| match chip {
        Chip::Net(net) => Some(net.change(change)),
        _ => None,
    });
    match changed {
        Some(Ok(())) => Ok(()),
        Some(Err(error @ NetError::NoTap)) => Err(refusal(Code::WrongState, &error)),
        Some(Err(error @ NetError::Host(_))) => Err(refusal(Code::Host, &error)),
        None => Err(Refusal {
            code: Code::WrongState,
            message: "the machine has no network device".into(),
        }),
    }
}

fn forced(message: &str) -> Exit {
    Exit {
        reason: Reason::Forced,
        message: message.to_owned(),
    }
}

// === impl Token ===

impl Token {
    fn encode(self) -> u64 {
        match self {
            Self::Control => 0,
            Self::ControlListener => 1,
            Self::MachineEvents => 2,
            Self::Device { slot, source } => 1 << 63 | (slot as u64) << 32 | source as u64,
        }
    }

    fn decode(data: u64) -> Self {
        match data {
            0 => Self::Control,
            1 => Self::ControlListener,
            2 => Self::MachineEvents,
            _ => Self::Device {
                slot: ((data >> 32) & 0x7fff_ffff) as usize,
                source: (data & 0xffff_ffff) as usize,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_the_kernel() {
        let device = |slot, source| Token::Device { slot, source };
        for token in [
            Token::Control,
            Token::ControlListener,
            Token::MachineEvents,
            device(0, 0),
            device(21, 3),
        ] {
            assert_eq!(Token::decode(token.encode()), token);
        }
    }
}
