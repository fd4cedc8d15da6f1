//! From the driver to the TAP.

use std::os::fd::AsFd;

use rustix::io::Errno;
use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::device::Backend;
use super::iovecs::{BadChain, Iovecs};
use super::rx::frame_bytes;
use super::used::Used;
use super::{BYTES_PER_TURN, PACKET_MAX_BYTES, PACKET_MIN_BYTES, PACKETS_PER_TURN};
use crate::memory::GuestMemory;

/// The transmit queue of a driver.
pub(super) struct Tx {
    queue: Queue,
    used: Used,
    /// The buffers of the packet at hand.
    iovecs: Iovecs,
    /// The packet at the ring's front waits for the limiter or for the TAP.
    waiting: bool,
    /// The available ring is absurd; only a reset can mend it.
    broken: bool,
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sent {
    /// It is gone, or dropped and counted.
    Done,
    /// It has to wait.
    Later,
}

// === impl Tx ===

impl Tx {
    pub(super) fn new(queue: Queue, memory: &GuestMemory) -> Self {
        Self {
            queue,
            used: Used::default(),
            iovecs: Iovecs::new(memory.clone()),
            waiting: false,
            broken: false,
        }
    }

    /// The queue as the driver has it.
    pub(super) fn into_queue(self) -> Queue {
        self.queue
    }

    /// What a packet has waited for may be there.
    pub(super) fn go_on(&mut self) {
        self.waiting = false;
    }

    /// Moves packets, as long as there are any and the host takes them. True if
    /// the driver is to be interrupted.
    pub(super) fn process(&mut self, memory: &GuestMemory, backend: &mut Backend) -> bool {
        if self.waiting {
            return false;
        }
        let _ = self.queue.disable_notification(memory);
        let mut bytes = 0;
        let mut rests = false;
        for _ in 0..PACKETS_PER_TURN {
            match self.transmit(memory, backend) {
                Some(sent) => bytes += sent,
                None => rests = true,
            }
            if rests || bytes >= BYTES_PER_TURN {
                break;
            }
        }
        if !rests {
            // Notifications stay off: this is the reminder.
            backend.watch.wake();
        }
        self.used.wants_interrupt(&self.queue, memory)
    }

    /// Moves one packet and gives its length, 0 where something else was done.
    /// `None` when there is nothing to do until something happens.
    fn transmit(&mut self, memory: &GuestMemory, backend: &mut Backend) -> Option<usize> {
        if self.broken {
            return None;
        }
        let chain = match self.queue.iter(memory) {
            Ok(mut chains) => chains.next(),
            Err(_) => {
                self.broken = true;
                backend.metrics.tx.malformed += 1;
                return None;
            }
        };
        let Some(chain) = chain else {
            if self.queue.enable_notification(memory).unwrap_or(false) {
                let _ = self.queue.disable_notification(memory);
                return Some(0);
            }
            return None;
        };
        let head = chain.head_index();
        self.iovecs.truncate(0);
        let mut len = 0;
        match self.iovecs.push_chain(chain, false) {
            Ok(bytes) if bytes > PACKET_MAX_BYTES => backend.metrics.tx.too_large += 1,
            Ok(bytes) if bytes >= PACKET_MIN_BYTES => {
                if backend.send(&self.iovecs, bytes) == Sent::Later {
                    self.queue.go_to_previous_position();
                    self.waiting = true;
                    return None;
                }
                len = bytes;
            }
            Err(BadChain::TooMany) => backend.metrics.tx.too_large += 1,
            Ok(_) | Err(BadChain::Malformed) => backend.metrics.tx.malformed += 1,
        }
        self.used.add(&self.queue, memory, head, 0);
        self.used.publish(&mut self.queue, memory);
        Some(len)
    }
}

impl Backend {
    /// Sends a packet, header first, of so many bytes.
    fn send(&mut self, packet: &Iovecs, bytes: usize) -> Sent {
        let metrics = &mut self.metrics.tx;
        let Some(tap) = self.tap.as_ref().filter(|_| self.link_up) else {
            metrics.link_down += 1;
            return Sent::Done;
        };
        if let Some(limiter) = &mut self.tx_limiter
            && !limiter.admits(frame_bytes(bytes), 1)
        {
            metrics.throttled += 1;
            return Sent::Later;
        }
        match packet.write_to(tap.as_fd()) {
            Ok(_) => {
                metrics.packets += 1;
                metrics.bytes += frame_bytes(bytes);
            }
            Err(Errno::AGAIN) => {
                self.watch.rewatch_full_tap(tap);
                return Sent::Later;
            }
            // The header is not one: offsets outside the packet, segments of a
            // kind that does not exist.
            Err(Errno::INVAL) => metrics.malformed += 1,
            Err(_) => metrics.tap_errors += 1,
        }
        if let Some(limiter) = &mut self.tx_limiter {
            limiter.charge(frame_bytes(bytes), 1);
        }
        Sent::Done
    }
}
