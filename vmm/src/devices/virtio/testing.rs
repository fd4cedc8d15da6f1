//! The driver's side of a virtqueue, for tests of chips.
//!
//! virtio-queue's `MockSplitQueue` lays its used ring over the upper half of its
//! available ring and never wraps an index, so only its types for descriptors
//! serve here.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::{Descriptor, VirtqUsedElem};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{Activation, Interrupt, VirtioDevice};
use crate::memory::GuestMemory;

/// How long a device may take before a test gives up on it.
const PATIENCE: Duration = Duration::from_secs(20);

/// Guest memory in one region from address 0.
pub(crate) fn memory(bytes: usize) -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(0), bytes)]).expect("test memory maps")
}

/// An interrupt line that leads nowhere.
pub(crate) fn interrupt() -> Interrupt {
    Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).expect("an eventfd opens"))
}

/// A buffer the device reads.
pub(crate) fn readable(address: u64, len: u32) -> Descriptor {
    Descriptor::new(address, len, 0, 0)
}

/// A buffer the device writes.
pub(crate) fn writable(address: u64, len: u32) -> Descriptor {
    Descriptor::new(address, len, VRING_DESC_F_WRITE as u16, 0)
}

/// A driver with one queue, whose rings lie from `start` on.
pub(crate) struct Driver {
    memory: GuestMemory,
    interrupt: Interrupt,
    start: u64,
    size: u16,
    avail_index: u16,
    used_index: u16,
    free: Vec<u16>,
    /// The descriptors of each chain that is with the device, by their head.
    busy: HashMap<u16, Vec<u16>>,
}

// === impl Driver ===

impl Driver {
    pub(crate) fn new(memory: &GuestMemory, start: u64, size: u16) -> Self {
        let driver = Self {
            memory: memory.clone(),
            interrupt: interrupt(),
            start,
            size,
            avail_index: 0,
            used_index: 0,
            free: (0..size).rev().collect(),
            busy: HashMap::new(),
        };
        let rings = vec![0; usize::try_from(driver.end() - start).expect("rings fit")];
        driver
            .memory
            .write_slice(&rings, GuestAddress(start))
            .expect("rings fit");
        driver
    }

    fn avail_ring(&self) -> u64 {
        self.start + 16 * u64::from(self.size)
    }

    fn used_ring(&self) -> u64 {
        (self.avail_ring() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }

    /// The first address past the rings.
    pub(crate) fn end(&self) -> u64 {
        self.used_ring() + 6 + 8 * u64::from(self.size)
    }

    /// The queue as the transport hands it to the device.
    pub(crate) fn queue(&self) -> Queue {
        let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
        let mut queue = Queue::new(self.size).expect("the size is a power of two");
        let (low, high) = halves(self.start);
        queue.set_desc_table_address(low, high);
        let (low, high) = halves(self.avail_ring());
        queue.set_avail_ring_address(low, high);
        let (low, high) = halves(self.used_ring());
        queue.set_used_ring_address(low, high);
        queue.set_ready(true);
        queue
    }

    pub(crate) fn activation(&self, features: u64) -> Activation {
        Activation {
            memory: self.memory.clone(),
            queues: vec![self.queue()],
            interrupt: self.interrupt.clone(),
            features,
        }
    }

    /// Interrupts raised since the last call.
    pub(crate) fn interrupts(&self) -> u64 {
        self.interrupt.irqfd().read().unwrap_or(0)
    }

    /// Puts one descriptor into the table, just as it is.
    pub(crate) fn set_descriptor(&self, index: u16, descriptor: Descriptor) {
        let address = GuestAddress(self.start + 16 * u64::from(index));
        self.memory
            .write_obj(RawDescriptor::from(descriptor), address)
            .expect("the table is in memory");
    }

    /// Makes a chain available by its head, whatever that is.
    pub(crate) fn offer(&mut self, head: u16) {
        let slot = self.avail_ring() + 4 + 2 * u64::from(self.avail_index % self.size);
        self.memory
            .write_obj(head, GuestAddress(slot))
            .expect("the ring is in memory");
        self.avail_index = self.avail_index.wrapping_add(1);
        self.set_avail_index(self.avail_index);
    }

    pub(crate) fn set_avail_index(&self, index: u16) {
        let address = GuestAddress(self.avail_ring() + 2);
        self.memory
            .write_obj(index, address)
            .expect("the ring is in memory");
    }

    /// Chains the buffers and makes them available; returns the chain's head.
    pub(crate) fn add(&mut self, buffers: &[Descriptor]) -> u16 {
        let indexes = self.free.split_off(self.free.len() - buffers.len());
        for (place, (&index, buffer)) in indexes.iter().zip(buffers).enumerate() {
            let mut descriptor = *buffer;
            if let Some(&next) = indexes.get(place + 1) {
                descriptor.set_flags(buffer.flags() | VRING_DESC_F_NEXT as u16);
                descriptor.set_next(next);
            }
            self.set_descriptor(index, descriptor);
        }
        let head = indexes[0];
        self.busy.insert(head, indexes);
        self.offer(head);
        head
    }

    /// The chains the device has used since the last call: head, bytes written.
    pub(crate) fn take_used(&mut self) -> Vec<(u16, u32)> {
        let index: u16 = self
            .memory
            .read_obj(GuestAddress(self.used_ring() + 2))
            .expect("the ring is in memory");
        let mut used = Vec::new();
        while self.used_index != index {
            let slot = self.used_ring() + 4 + 8 * u64::from(self.used_index % self.size);
            let element: VirtqUsedElem = self
                .memory
                .read_obj(GuestAddress(slot))
                .expect("the ring is in memory");
            let head = u16::try_from(element.id()).expect("a head is 16 bits");
            self.free
                .extend(self.busy.remove(&head).unwrap_or_default());
            used.push((head, element.len()));
            self.used_index = self.used_index.wrapping_add(1);
        }
        used
    }

    /// Serves the device's sources, as the event loop does, until it has used
    /// `count` chains.
    pub(crate) fn wait_used(
        &mut self,
        device: &mut dyn VirtioDevice,
        count: usize,
    ) -> Vec<(u16, u32)> {
        let deadline = Instant::now() + PATIENCE;
        let mut used = self.take_used();
        while used.len() < count {
            assert!(
                Instant::now() < deadline,
                "{} of {count} chains used",
                used.len()
            );
            serve(device, Duration::from_millis(100));
            used.extend(self.take_used());
        }
        used
    }
}

/// One turn of the event loop: waits for the device's sources and tells it of
/// those that are readable. Returns whether any was.
pub(crate) fn serve(device: &mut dyn VirtioDevice, timeout: Duration) -> bool {
    let timeout = Timespec::try_from(timeout).expect("a short time");
    let ready: Vec<usize> = {
        let sources = device.sources();
        let mut fds: Vec<_> = sources
            .iter()
            .map(|fd| PollFd::new(fd, PollFlags::IN))
            .collect();
        poll(&mut fds, Some(&timeout)).expect("poll works");
        let ready = fds
            .iter()
            .enumerate()
            .filter(|(_, fd)| !fd.revents().is_empty());
        ready.map(|(place, _)| place).collect()
    };
    for &place in &ready {
        device.source_ready(place);
    }
    !ready.is_empty()
}
