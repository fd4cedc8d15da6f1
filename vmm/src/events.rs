//! What vCPU threads and devices tell the monitor's main thread.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use soulbox_proto::vmm::v1::exited::Reason;

/// Something the main thread has to act on or tell its client.
#[derive(Debug)]
pub enum MachineEvent {
    /// The machine has come to its end.
    Exit(Exit),
    /// The guest kernel reported a panic.
    GuestPanic,
    /// A program in the guest connected to a port of the host.
    VsockConnection {
        host_port: u32,
        guest_port: u32,
        stream: OwnedFd,
    },
}

/// Why the machine ended.
#[derive(Clone, Debug)]
pub struct Exit {
    pub reason: Reason,
    /// One sentence for a person.
    pub message: String,
}

/// Sends events from any thread and wakes the event loop.
#[derive(Debug)]
pub struct EventSender {
    sender: mpsc::Sender<MachineEvent>,
    wake: EventFd,
}

/// The main thread's end.
#[derive(Debug)]
pub struct EventReceiver {
    receiver: mpsc::Receiver<MachineEvent>,
    wake: EventFd,
}

/// Makes the two ends of an event channel.
pub fn channel() -> std::io::Result<(EventSender, EventReceiver)> {
    let (sender, receiver) = mpsc::channel();
    let wake = EventFd::new(EFD_NONBLOCK)?;
    let sender = EventSender {
        sender,
        wake: wake.try_clone()?,
    };
    Ok((sender, EventReceiver { receiver, wake }))
}

// === impl EventSender ===

impl EventSender {
    /// Sends an event. Without a receiver the machine is being torn down, and
    /// nobody needs it any more.
    pub fn send(&self, event: MachineEvent) {
        if self.sender.send(event).is_ok() {
            // Fails only when the counter is full: then the loop wakes anyway.
            let _ = self.wake.write(1);
        }
    }

    pub fn exit(&self, reason: Reason, message: impl Into<String>) {
        self.send(MachineEvent::Exit(Exit {
            reason,
            message: message.into(),
        }));
    }

    pub fn try_clone(&self) -> std::io::Result<Self> {
        Ok(Self {
            sender: self.sender.clone(),
            wake: self.wake.try_clone()?,
        })
    }
}

// === impl EventReceiver ===

impl EventReceiver {
    /// The next event, if there is one. Clears the wake-up first, so that an
    /// event sent after the last `None` always wakes the loop again.
    pub fn next(&self) -> Option<MachineEvent> {
        let _ = self.wake.read();
        self.receiver.try_recv().ok()
    }
}

impl AsFd for EventReceiver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        crate::sys::borrow_fd(&self.wake)
    }
}
