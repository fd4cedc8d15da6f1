//! From the TAP to the driver.

use std::collections::VecDeque;
use std::os::fd::AsFd;

use rustix::io::Errno;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_MRG_RXBUF,
};
use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::device::Backend;
use super::iovecs::{BadChain, Iovecs};
use super::metrics::SideMetrics;
use super::used::Used;
use super::{BYTES_PER_TURN, HEADER_BYTES, PACKET_MAX_BYTES, PACKETS_PER_TURN, QUEUE_SIZE};
use crate::memory::GuestMemory;

/// `num_buffers` in the header.
const NUM_BUFFERS_OFFSET: usize = 10;

/// An Ethernet header with two VLAN tags, in bytes.
const ETHERNET_MAX_BYTES: usize = 22;

/// The receive queue of a driver.
pub(super) struct Rx {
    queue: Queue,
    used: Used,
    /// The buffers of `chains`.
    iovecs: Iovecs,
    /// Taken off the ring ahead of packets, in the ring's order: no length is
    /// known before a packet is read, and each chain is looked at once. None of
    /// them is used until a packet fills it, and a pause puts them all back.
    chains: VecDeque<Chain>,
    /// The bytes that `chains` can take.
    room: usize,
    /// No more chains can be taken ahead.
    full: bool,
    mergeable: bool,
    /// The largest packet that the driver has us expect, with its header.
    expected_bytes: usize,
    /// A packet waits for buffers; the driver will notify.
    starved: bool,
    /// The limiter's timer will tell.
    throttled: bool,
    /// The available ring is absurd; only a reset can mend it.
    broken: bool,
}

#[derive(Debug)]
struct Chain {
    head: u16,
    iovecs: usize,
    /// 0 for a chain that is of no use. It goes back to the driver in its turn.
    bytes: usize,
}

/// A packet that is in no buffer of the driver yet.
pub(super) struct Held {
    bytes: Box<[u8]>,
    /// 0 when there is none.
    len: usize,
}

// === impl Held ===

impl Held {
    pub(super) fn new() -> Self {
        Self {
            bytes: vec![0; PACKET_MAX_BYTES].into_boxed_slice(),
            len: 0,
        }
    }

    /// Drops the packet. True if there was one.
    pub(super) fn drop_packet(&mut self) -> bool {
        std::mem::take(&mut self.len) > 0
    }
}

// === impl Rx ===

impl Rx {
    pub(super) fn new(mut queue: Queue, memory: &GuestMemory, features: u64, mtu: u16) -> Self {
        let segments = 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6;
        let expected_bytes = if features & segments != 0 {
            PACKET_MAX_BYTES
        } else {
            HEADER_BYTES + ETHERNET_MAX_BYTES + usize::from(mtu)
        };
        // Buffers are looked for when there are packets.
        let _ = queue.disable_notification(memory);
        Self {
            queue,
            used: Used::default(),
            iovecs: Iovecs::new(memory.clone()),
            chains: VecDeque::with_capacity(usize::from(QUEUE_SIZE)),
            room: 0,
            full: false,
            mergeable: features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0,
            expected_bytes,
            starved: false,
            throttled: false,
            broken: false,
        }
    }

    /// The queue as the driver has it.
    pub(super) fn into_queue(mut self) -> Queue {
        for _ in &self.chains {
            self.queue.go_to_previous_position();
        }
        self.queue
    }

    /// The driver has notified us of buffers.
    pub(super) fn buffers_added(&mut self, memory: &GuestMemory) {
        if std::mem::take(&mut self.starved) {
            let _ = self.queue.disable_notification(memory);
        }
    }

    /// The limiter may have tokens again.
    pub(super) fn tokens_added(&mut self) {
        self.throttled = false;
    }

    /// Moves packets, as long as there are packets and buffers. True if the
    /// driver is to be interrupted.
    pub(super) fn process(&mut self, memory: &GuestMemory, backend: &mut Backend) -> bool {
        let mut bytes = 0;
        let mut rests = false;
        for _ in 0..PACKETS_PER_TURN {
            match self.receive(memory, backend) {
                Some(received) => bytes += received,
                None => rests = true,
            }
            if rests || bytes >= BYTES_PER_TURN {
                break;
            }
        }
        if !rests {
            backend.watch.wake();
        }
        self.used.wants_interrupt(&self.queue, memory)
    }

    /// Moves one packet and gives its length, 0 where something else was done.
    /// `None` when there is nothing to do until something happens.
    fn receive(&mut self, memory: &GuestMemory, backend: &mut Backend) -> Option<usize> {
        if !backend.has_incoming() {
            return None;
        }
        if !backend.link_up {
            return discard(backend);
        }
        if self.starved || self.throttled {
            return None;
        }
        let Backend {
            tap,
            readable,
            held,
            rx_limiter,
            metrics,
            ..
        } = backend;
        let metrics = &mut metrics.rx;
        self.collect(memory, self.expected_bytes.max(held.len), metrics);
        if self.chains.is_empty() {
            return self.wait_for_buffers(memory);
        }
        let len = if held.len > 0 {
            if held.len > self.room {
                if self.mergeable && !self.full {
                    return self.wait_for_buffers(memory);
                }
                held.len = 0;
                metrics.too_large += 1;
                return Some(0);
            }
            self.iovecs.copy_from(0, &held.bytes[..held.len]);
            std::mem::take(&mut held.len)
        } else {
            // How long the packet is will be known when it has been read, so the
            // last one may leave a debt, which the next has to wait for.
            if let Some(limiter) = rx_limiter
                && !limiter.admits(1, 1)
            {
                self.throttled = true;
                metrics.throttled += 1;
                return None;
            }
            let tap = tap.as_ref()?.as_fd();
            // What there is no room for comes to lie where it would be in the
            // whole packet.
            let rest = &mut held.bytes[self.room.min(PACKET_MAX_BYTES)..];
            let len = match self.iovecs.read_from(tap, rest) {
                Ok(len) => len,
                Err(Errno::INTR) => return Some(0),
                Err(errno) => {
                    *readable = false;
                    metrics.tap_errors += u64::from(errno != Errno::AGAIN);
                    return None;
                }
            };
            if let Some(limiter) = rx_limiter {
                limiter.charge(frame_bytes(len), 1);
            }
            if len > self.room {
                self.iovecs.copy_to(&mut held.bytes[..self.room]);
                held.len = len;
                return Some(len);
            }
            len
        };
        self.finish(memory, len);
        metrics.packets += 1;
        metrics.bytes += frame_bytes(len);
        Some(len)
    }

    /// Takes chains off the ring until they have room for so many bytes, or the
    /// ring is empty. Those at the front that are of no use go back.
    fn collect(&mut self, memory: &GuestMemory, wanted: usize, metrics: &mut SideMetrics) {
        self.full = false;
        // What an honest driver can have offered at most.
        for _ in 0..QUEUE_SIZE {
            self.give_back_useless(memory);
            let enough = self.room >= wanted || !self.mergeable && !self.chains.is_empty();
            self.full = self.chains.len() == usize::from(QUEUE_SIZE);
            if enough || self.full || self.broken {
                return;
            }
            let chain = match self.queue.iter(memory) {
                Ok(mut chains) => chains.next(),
                Err(_) => {
                    self.broken = true;
                    metrics.malformed += 1;
                    None
                }
            };
            let Some(chain) = chain else {
                return;
            };
            let head = chain.head_index();
            let before = self.iovecs.len();
            let bytes = match self.iovecs.push_chain(chain, true) {
                Ok(bytes) if bytes >= HEADER_BYTES => bytes,
                Err(BadChain::TooMany) if !self.chains.is_empty() => {
                    self.queue.go_to_previous_position();
                    self.full = true;
                    return;
                }
                Ok(_) | Err(_) => {
                    self.iovecs.truncate(before);
                    metrics.malformed += 1;
                    0
                }
            };
            self.room += bytes;
            self.chains.push_back(Chain {
                head,
                iovecs: self.iovecs.len() - before,
                bytes,
            });
        }
    }

    fn give_back_useless(&mut self, memory: &GuestMemory) {
        let mut any = false;
        while let Some(chain) = self.chains.pop_front_if(|chain| chain.bytes == 0) {
            self.used.add(&self.queue, memory, chain.head, 0);
            any = true;
        }
        if any {
            self.used.publish(&mut self.queue, memory);
        }
    }

    /// Has the driver notify us of its next buffers. `Some` if it has added some
    /// meanwhile.
    fn wait_for_buffers(&mut self, memory: &GuestMemory) -> Option<usize> {
        if !self.broken && self.queue.enable_notification(memory).unwrap_or(false) {
            let _ = self.queue.disable_notification(memory);
            return Some(0);
        }
        self.starved = true;
        None
    }

    /// Gives the driver a packet of so many bytes, which is in the buffers.
    fn finish(&mut self, memory: &GuestMemory, len: usize) {
        let mut count = 0;
        let mut buffers: u16 = 0;
        let mut left = len;
        for chain in &self.chains {
            count += 1;
            buffers += u16::from(chain.bytes > 0);
            left = left.saturating_sub(chain.bytes);
            if left == 0 {
                break;
            }
        }
        // Also where buffers are not merged (section 5.1.6.4.1).
        let num_buffers = buffers.to_le_bytes();
        self.iovecs.copy_from(NUM_BUFFERS_OFFSET, &num_buffers);
        // The buffers of a packet follow each other: what is of no use goes
        // before them.
        for chain in self.chains.iter().take(count) {
            if chain.bytes == 0 {
                self.used.add(&self.queue, memory, chain.head, 0);
            }
        }
        let mut left = len;
        for chain in self.chains.drain(..count) {
            if chain.bytes > 0 {
                let filled = left.min(chain.bytes);
                left -= filled;
                // At most PACKET_MAX_BYTES, or what one chain has.
                self.used
                    .add(&self.queue, memory, chain.head, filled as u32);
                self.iovecs.drop_front(chain.iovecs);
                self.room -= chain.bytes;
            }
        }
        self.used.publish(&mut self.queue, memory);
    }
}

/// Drops a packet that has come for a link that is down.
fn discard(backend: &mut Backend) -> Option<usize> {
    let Backend {
        tap,
        readable,
        held,
        metrics,
        ..
    } = backend;
    if held.drop_packet() {
        metrics.rx.link_down += 1;
        return Some(0);
    }
    let tap = tap.as_ref()?;
    match rustix::io::read(tap, &mut *held.bytes) {
        Ok(len) => {
            metrics.rx.link_down += 1;
            Some(len)
        }
        Err(Errno::INTR) => Some(0),
        Err(errno) => {
            *readable = false;
            metrics.rx.tap_errors += u64::from(errno != Errno::AGAIN);
            None
        }
    }
}

/// Of a packet with its header.
pub(super) fn frame_bytes(packet_bytes: usize) -> u64 {
    packet_bytes.saturating_sub(HEADER_BYTES) as u64
}

impl Backend {
    /// Whether there is a packet, or may be.
    fn has_incoming(&self) -> bool {
        self.readable || self.held.len > 0
    }
}
