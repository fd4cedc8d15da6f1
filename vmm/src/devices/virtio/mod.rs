//! Virtio devices (Virtual I/O Device specification 1.2): what every chip
//! implements, and the virtio-mmio transport that puts a chip on the bus.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING, VIRTIO_MMIO_INTERRUPT_ACK,
    VIRTIO_MMIO_INTERRUPT_STATUS,
};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

pub use crate::devices::Counters;
use crate::devices::{Chip, StateError};
use crate::memory::GuestMemory;

pub mod balloon;
pub mod block;
pub mod mmio;
pub mod net;
pub mod rng;
#[cfg(test)]
pub(crate) mod testing;
pub mod vsock;

/// One virtio chip. It knows its queues and its backend, never the bus it sits
/// on, so that it can be tested with nothing but guest memory.
///
/// The transport calls every method under the device's lock: `activate` and
/// `reset` from the vCPU thread whose driver asked for it, `queue_notified` and
/// `source_ready` from the event loop. None of them may block for long.
pub trait VirtioDevice: Send {
    /// Virtio device id (section 5).
    fn device_id(&self) -> u32;

    /// The largest size of each virtqueue; its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Feature bits the device offers. The transport adds VIRTIO_F_VERSION_1.
    fn features(&self) -> u64;

    /// How many of the queues, the first ones, a driver sets up that accepted
    /// these features. Of the others the device takes nothing.
    fn queues_in_use(&self, _driver_features: u64) -> usize {
        self.queue_sizes().len()
    }

    /// Reads the device's configuration space. What lies past its end reads as
    /// zeros.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the device's configuration space, where it has something for the
    /// driver to write. May be called while inactive.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Descriptors the event loop watches for readability, level-triggered,
    /// from before the guest runs until the machine is gone. A device whose
    /// descriptors come and go puts them in an epoll instance of its own and
    /// names that here.
    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    /// The driver is ready (DRIVER_OK): the queues are checked, enabled and from
    /// now on the device's own.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// The driver notified a queue. Only called while active.
    fn queue_notified(&mut self, queue: usize);

    /// A source is readable, by its place in [`VirtioDevice::sources`]. May be
    /// called while inactive; the device must then still make it unreadable.
    fn source_ready(&mut self, _source: usize) {}

    /// The driver reset the device: it forgets its queues and waits for, or
    /// drops, all it has in flight. It touches no guest memory after this.
    fn reset(&mut self);

    /// Only called while active: finishes what is in flight, answers it, and
    /// gives the queues back in the driver's order. All else stays as it is, and
    /// the next `activate`, with these queues, goes on from here.
    fn quiesce(&mut self) -> Vec<Queue>;

    /// What the chip knows besides its queues. Only while not active.
    fn save(&self) -> ChipState;

    /// Makes a new chip be the saved one, whose state is untrusted. It is
    /// activated next if the saved one was active.
    fn restore(&mut self, state: ChipState) -> Result<(), StateError>;

    /// The chip, where the machine has business with it beyond this trait.
    fn chip(&mut self) -> Chip<'_> {
        Chip::Other
    }

    /// What the device has done since it was made.
    fn counters(&self) -> Counters;
}

/// What is saved of a chip. New variants go last, and a changed one is a new one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChipState {
    Block(block::BlockState),
    Vsock(vsock::VsockState),
    Rng,
    Balloon(balloon::BalloonState),
    Net(net::NetState),
}

/// What a device gets when its driver is ready.
#[derive(Debug)]
pub struct Activation {
    pub memory: GuestMemory,
    /// One for each of [`VirtioDevice::queue_sizes`]; those in use are valid and
    /// ready.
    pub queues: Vec<Queue>,
    pub interrupt: Interrupt,
    /// The feature bits that the driver accepted.
    pub features: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    #[error("the driver left a queue of the device unset")]
    MissingQueue,
    #[error("the device's backend failed to start")]
    Backend(#[source] std::io::Error),
}

/// A device's interrupt line: the status register the driver reads, and the
/// irqfd that raises it.
#[derive(Clone, Debug)]
pub struct Interrupt {
    status: Arc<AtomicU32>,
    irqfd: Arc<EventFd>,
}

// === impl Interrupt ===

impl Interrupt {
    pub fn new(irqfd: EventFd) -> Self {
        Self {
            status: Arc::new(AtomicU32::new(0)),
            irqfd: Arc::new(irqfd),
        }
    }

    /// Tells the driver that a queue has used buffers (VIRTIO_MMIO_INT_VRING).
    pub fn signal_used_queue(&self) {
        self.signal(VIRTIO_MMIO_INT_VRING);
    }

    /// Tells the driver that the configuration or the status has changed.
    pub fn signal_config_change(&self) {
        self.signal(VIRTIO_MMIO_INT_CONFIG);
    }

    fn signal(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        // An eventfd write fails only when the counter is full, and then the
        // interrupt is pending already.
        let _ = self.irqfd.write(1);
    }

    /// InterruptStatus, as the driver reads it.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// What raises it.
    #[cfg(test)]
    pub(crate) fn irqfd(&self) -> &EventFd {
        &self.irqfd
    }

    /// Reads at `offset` into virtio-mmio's registers, if that is InterruptStatus.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> bool {
        let word = <&mut [u8; 4]>::try_from(data);
        let is_status = offset == u64::from(VIRTIO_MMIO_INTERRUPT_STATUS);
        let Some(word) = word.ok().filter(|_| is_status) else {
            return false;
        };
        *word = self.status().to_le_bytes();
        true
    }

    /// Writes at `offset` into virtio-mmio's registers, if that is InterruptACK.
    pub fn write(&self, offset: u64, data: &[u8]) -> bool {
        let word = <[u8; 4]>::try_from(data);
        let is_ack = offset == u64::from(VIRTIO_MMIO_INTERRUPT_ACK);
        let Some(word) = word.ok().filter(|_| is_ack) else {
            return false;
        };
        self.acknowledge(u32::from_le_bytes(word));
        true
    }

    /// Sets InterruptStatus as it was saved.
    pub fn set_status(&self, status: u32) {
        self.status.store(status, Ordering::SeqCst);
    }

    /// InterruptACK: clears the bits that the driver has handled.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }
}

/// Copies the part of a configuration space that a read covers, zeros past it.
pub fn read_config_space(space: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Ok(start) = usize::try_from(offset) else {
        return;
    };
    if let Some(rest) = space.get(start..) {
        let n = rest.len().min(data.len());
        data[..n].copy_from_slice(&rest[..n]);
    }
}
