//! A driver's side of the device, and real TAPs: each in a network namespace
//! that the test makes.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_queue::Queue;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::virtio::testing::{self, Driver, readable, writable};
use crate::devices::virtio::{Activation, VirtioDevice};
use crate::memory::GuestMemory;
use crate::testing::GUEST_MAC;
use crate::testing::tap::TapPeer;

mod allocations;
mod hostile;
mod lifecycle;
mod limits;
mod offloads;
mod traffic;

const MEMORY_BYTES: usize = 4 << 20;
const RX_RINGS: u64 = 0x1000;
const TX_RINGS: u64 = 0x4000;
const RX_BUFFERS: u64 = 0x10_0000;
const TX_BUFFERS: u64 = 0x20_0000;

const RX: usize = 0;
const TX: usize = 1;

/// Version 1 and merged buffers.
const MERGED: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// Of the kind that is for experiments (IEEE 802): no stack has an answer.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// What is written over buffers before the device has them.
const BLANK: u8 = 0xaa;

struct Guest {
    memory: GuestMemory,
    rx: Driver,
    tx: Driver,
    features: u64,
    net: Net,
    peer: TapPeer,
    /// Where the next buffers lie.
    rx_next: u64,
    tx_next: u64,
}

fn config(tap: Option<Tap>) -> NetConfig {
    NetConfig {
        mac: GUEST_MAC,
        tap,
        mtu: DEFAULT_MTU,
        rx: RateLimit::default(),
        tx: RateLimit::default(),
    }
}

/// A frame of so many bytes whose contents tell it from others.
fn frame(bytes: usize, seed: u8) -> Vec<u8> {
    let mut frame = [&GUEST_MAC[..], &[0x02, 0, 0, 0, 0, 0x02], &ETHERTYPE].concat();
    frame.extend((frame.len()..bytes).map(|at| (at % 251) as u8 ^ seed));
    frame
}

// === impl Guest ===

impl Guest {
    fn new(features: u64) -> Self {
        Self::with(features, |_| ())
    }

    /// The driver is ready, and has offered nothing.
    fn with(features: u64, change: impl FnOnce(&mut NetConfig)) -> Self {
        let (peer, tap) = TapPeer::new().unwrap();
        let mut config = config(Some(Tap::new(tap).unwrap()));
        change(&mut config);
        let memory = testing::memory(MEMORY_BYTES);
        let mut guest = Self {
            rx: Driver::new(&memory, RX_RINGS, QUEUE_SIZE),
            tx: Driver::new(&memory, TX_RINGS, QUEUE_SIZE),
            memory,
            features,
            net: Net::new(config).unwrap(),
            peer,
            rx_next: RX_BUFFERS,
            tx_next: TX_BUFFERS,
        };
        guest.activate(vec![guest.rx.queue(), guest.tx.queue()]);
        guest
    }

    /// Becomes a clone of itself: another device, with a TAP of its own if there
    /// is one.
    fn restore(&mut self, tap: Option<OwnedFd>) {
        let queues = self.net.quiesce();
        let state = self.net.save();
        let tap = tap.map(|tap| Tap::new(tap).unwrap());
        let mut net = Net::new(config(tap)).unwrap();
        net.restore(state).unwrap();
        self.net = net;
        self.activate(queues);
        // As the transport does.
        self.net.queue_notified(RX);
        self.net.queue_notified(TX);
        self.settle();
    }

    fn activate(&mut self, queues: Vec<Queue>) {
        let activation = Activation {
            queues,
            ..self.rx.activation(self.features)
        };
        self.net.activate(activation).unwrap();
    }

    /// Serves the device until nothing happens any more. Fails if that never is.
    fn settle(&mut self) {
        let rests = (0..10_000).any(|_| !testing::serve(&mut self.net, Duration::ZERO));
        assert!(rests, "the device keeps the event loop busy");
    }

    /// Serves the device until `done` says so.
    fn serve_until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !done(self) {
            assert!(Instant::now() < deadline, "nothing happens any more");
            testing::serve(&mut self.net, Duration::from_millis(100));
        }
    }

    /// Offers buffers of these lengths, a chain each; where each lies.
    fn offer_buffers(&mut self, lengths: &[u32]) -> Vec<(u16, u64)> {
        let mut places = Vec::new();
        for &len in lengths {
            let at = self.rx_next;
            self.rx_next += u64::from(len).next_multiple_of(16);
            let blank = vec![BLANK; len as usize];
            self.memory.write_slice(&blank, GuestAddress(at)).unwrap();
            places.push((self.rx.add(&[writable(at, len)]), at));
        }
        self.net.queue_notified(RX);
        places
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        bytes
    }

    /// Puts bytes where the device reads them.
    fn put(&mut self, bytes: &[u8]) -> Descriptor {
        let at = self.tx_next;
        self.tx_next += (bytes.len() as u64).next_multiple_of(16);
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        readable(at, bytes.len() as u32)
    }

    /// Offers a packet in one buffer without telling the device.
    fn offer_packet(&mut self, header: &[u8; HEADER_BYTES], frame: &[u8]) -> u16 {
        let buffer = self.put(&[&header[..], frame].concat());
        self.tx.add(&[buffer])
    }

    fn transmit(&mut self, header: &[u8; HEADER_BYTES], frame: &[u8]) {
        self.offer_packet(header, frame);
        self.net.queue_notified(TX);
        self.settle();
        assert_eq!(self.tx.take_used().len(), 1);
    }

    /// The packet in merged buffers, with its header.
    fn packet(&self, used: &[(u16, u32)], places: &[(u16, u64)]) -> Vec<u8> {
        let place = |head| places.iter().find(|place| place.0 == head).unwrap().1;
        used.iter()
            .flat_map(|&(head, len)| self.bytes(place(head), len as usize))
            .collect()
    }

    /// Runs a command in the namespace.
    fn shell(&self, script: &str) {
        let run = || {
            std::process::Command::new("sh")
                .args(["-c", script])
                .status()
        };
        let status = self.peer.within(run).unwrap().unwrap();
        assert!(status.success(), "{script}");
    }

    fn counter(&self, name: &str) -> u64 {
        self.net.counters()[name]
    }

    /// All frames that have come out.
    fn received(&self) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| self.peer.try_receive().unwrap())
            .map(|(_, frame)| frame)
            .collect()
    }
}

/// `num_buffers` of a packet.
fn num_buffers(packet: &[u8]) -> u16 {
    u16::from_le_bytes([packet[10], packet[11]])
}
