//! What is given back to the driver.
//!
//! `Queue::add_used` publishes every element by itself. A driver that polls
//! would then see the first buffer of a packet before the others, which
//! section 5.1.6.4.1 forbids: Linux drops such a packet.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::memory::GuestMemory;

/// Lengths of the rings' parts (section 2.7), in bytes.
const RING_HEADER_BYTES: u64 = 4;
const INDEX_OFFSET: u64 = 2;
const USED_ELEMENT_BYTES: u64 = 8;
const AVAIL_ELEMENT_BYTES: u64 = 2;

/// A queue's used elements, from when they are written until the driver has been
/// told of them.
#[derive(Debug, Default)]
pub(super) struct Used {
    /// Written, but not yet to be seen.
    unpublished: u16,
    /// Published since the driver was last told, or was found not to care.
    untold: u16,
}

// === impl Used ===

impl Used {
    /// Writes an element. The driver sees it after [`Used::publish`]. Does
    /// nothing for a head that the driver has made up, as no buffer is there.
    pub(super) fn add(&mut self, queue: &Queue, memory: &GuestMemory, head: u16, bytes: u32) {
        if head >= queue.size() {
            return;
        }
        let index = queue.next_used().wrapping_add(self.unpublished);
        let place = u64::from(index % queue.size()) * USED_ELEMENT_BYTES;
        // `struct virtq_used_elem`: the head, then the bytes, both 32 bits wide.
        let element = u64::from(head) | u64::from(bytes) << 32;
        // The rings were found in memory when the device was activated.
        let address = GuestAddress(queue.used_ring() + RING_HEADER_BYTES + place);
        if memory.write_obj(element.to_le(), address).is_ok() {
            self.unpublished = self.unpublished.wrapping_add(1);
        }
    }

    /// Shows the driver all elements at once.
    pub(super) fn publish(&mut self, queue: &mut Queue, memory: &GuestMemory) {
        let added = std::mem::take(&mut self.unpublished);
        let next = queue.next_used().wrapping_add(added);
        queue.set_next_used(next);
        self.untold = self.untold.wrapping_add(added);
        let index = GuestAddress(queue.used_ring() + INDEX_OFFSET);
        // Release: after the elements and the packets.
        let _ = memory.store(next.to_le(), index, Ordering::Release);
    }

    /// Whether the driver wants an interrupt for what was published since the
    /// last call (section 2.7.7.2).
    pub(super) fn wants_interrupt(&mut self, queue: &Queue, memory: &GuestMemory) -> bool {
        let untold = std::mem::take(&mut self.untold);
        if untold == 0 {
            return false;
        }
        // The index must be seen before we look whether the driver sleeps: it
        // goes to sleep, then looks at the index.
        fence(Ordering::SeqCst);
        let read = |offset| {
            let address = GuestAddress(queue.avail_ring() + offset);
            memory
                .load(address, Ordering::Relaxed)
                .map_or(0, u16::from_le)
        };
        if !queue.event_idx_enabled() {
            return u32::from(read(0)) & VRING_AVAIL_F_NO_INTERRUPT == 0;
        }
        let event = read(RING_HEADER_BYTES + u64::from(queue.size()) * AVAIL_ELEMENT_BYTES);
        let passed = queue.next_used().wrapping_sub(event).wrapping_sub(1);
        passed < untold
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::testing::{self, Driver};

    #[test]
    fn a_packets_buffers_are_seen_together() {
        let memory = testing::memory(1 << 20);
        let mut driver = Driver::new(&memory, 0x1000, 8);
        let mut queue = driver.queue();
        queue.set_next_used(0);
        let mut used = Used::default();
        for round in 0..5 {
            for head in 0..3 {
                used.add(&queue, &memory, head, u32::from(head) + round);
                assert_eq!(driver.take_used(), [], "not yet");
            }
            used.add(&queue, &memory, 8, 1);
            used.publish(&mut queue, &memory);
            let seen = [(0, round), (1, 1 + round), (2, 2 + round)];
            assert_eq!(driver.take_used(), seen);
        }
        assert_eq!(queue.next_used(), 15);
    }

    /// The rule of section 2.7.7.2, over the whole circle of indexes.
    #[test]
    fn an_interrupt_is_for_the_element_that_the_driver_waits_for() {
        let memory = testing::memory(1 << 20);
        let driver = Driver::new(&memory, 0x1000, 8);
        let mut queue = driver.queue();
        queue.set_event_idx(true);
        for (next, event) in [(0, 0), (7, 9), (u16::MAX - 1, 0), (u16::MAX, u16::MAX)] {
            let address = GuestAddress(queue.avail_ring() + 4 + 2 * 8);
            memory.write_obj(event, address).unwrap();
            queue.set_next_used(next);
            let mut used = Used::default();
            for index in (0..6).map(|step| next.wrapping_add(step)) {
                used.add(&queue, &memory, 0, 0);
                used.publish(&mut queue, &memory);
                let wanted = used.wants_interrupt(&queue, &memory);
                assert_eq!(wanted, index == event, "{index} after {event}");
            }
        }
        queue.set_event_idx(false);
        let mut used = Used::default();
        assert!(!used.wants_interrupt(&queue, &memory), "nothing was used");
        for flags in [0u16, VRING_AVAIL_F_NO_INTERRUPT as u16] {
            let address = GuestAddress(queue.avail_ring());
            memory.write_obj(flags, address).unwrap();
            used.add(&queue, &memory, 0, 0);
            used.publish(&mut queue, &memory);
            assert_eq!(used.wants_interrupt(&queue, &memory), flags == 0);
        }
    }
}
