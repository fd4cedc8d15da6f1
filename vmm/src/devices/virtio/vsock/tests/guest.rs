//! A guest's driver, and the host around the device.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::AsFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tempfile::TempDir;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::super::packet::{HEADER_LEN, Header, Key, Op, TYPE_STREAM};
use super::super::{Admission, GuestConnection, HOST_CID, Vsock, VsockConfig};
use crate::devices::virtio::{Activation, Interrupt, VirtioDevice};
use crate::memory::GuestMemory;

mod saved;

pub(super) const GUEST_CID: u64 = 42;
pub(super) const QUEUE_SIZE: u16 = 256;

/// The buffers of Linux: a page and a header each.
const RX_BUFFER_LEN: u32 = 4096 + HEADER_LEN as u32;
const TX_BUFFER_LEN: u32 = 65536 + HEADER_LEN as u32;

const QUEUE_SPACING: u64 = 0x1_0000;
const RX_BUFFERS: u64 = 0x10_0000;
const TX_BUFFERS: u64 = 0x40_0000;
const MEMORY_LEN: usize = 0x20_0000 * 16;

/// How many TX buffers the driver cycles through.
const TX_SLOTS: u16 = 128;

/// One queue as the driver sees it: descriptor `i` belongs to buffer `i`, unless
/// a test makes chains of its own.
#[derive(Clone, Copy)]
struct DriverQueue {
    base: u64,
    next_avail: u16,
    next_used: u16,
    event_idx: bool,
}

pub(super) struct Guest {
    pub(super) device: Vsock,
    pub(super) memory: GuestMemory,
    pub(super) interrupt: Interrupt,
    pub(super) connections: Arc<Mutex<VecDeque<GuestConnection>>>,
    queues: [DriverQueue; 3],
    features: u64,
    directory: TempDir,
    /// The driver gives back RX buffers when it has read them.
    pub(super) refill: bool,
    /// Those that it has not given back.
    held_rx: Vec<u16>,
    /// Every buffer of payload received, in order.
    pub(super) received: VecDeque<(Header, Vec<u8>)>,
}

// === impl DriverQueue ===

impl DriverQueue {
    fn avail(&self) -> u64 {
        self.base + 0x4000
    }

    fn used(&self) -> u64 {
        self.base + 0x8000
    }

    fn describe(
        &self,
        memory: &GuestMemory,
        at: u16,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let at = GuestAddress(self.base + u64::from(at) * 16);
        memory.write_obj(address, at).unwrap();
        memory.write_obj(len, GuestAddress(at.0 + 8)).unwrap();
        memory.write_obj(flags, GuestAddress(at.0 + 12)).unwrap();
        memory.write_obj(next, GuestAddress(at.0 + 14)).unwrap();
    }

    /// Gives a chain to the device; says whether the device wants to be told.
    fn offer(&mut self, memory: &GuestMemory, head: u16) -> bool {
        let slot = u64::from(self.next_avail % QUEUE_SIZE);
        memory
            .write_obj(head, GuestAddress(self.avail() + 4 + slot * 2))
            .unwrap();
        let old = self.next_avail;
        self.next_avail = old.wrapping_add(1);
        memory
            .write_obj(self.next_avail, GuestAddress(self.avail() + 2))
            .unwrap();
        if self.event_idx {
            let event: u16 = memory
                .read_obj(GuestAddress(self.used() + 4 + u64::from(QUEUE_SIZE) * 8))
                .unwrap();
            event == old
        } else {
            let flags: u16 = memory.read_obj(GuestAddress(self.used())).unwrap();
            flags & 1 == 0
        }
    }

    /// Takes a used chain: its head and length.
    fn take_used(&mut self, memory: &GuestMemory) -> Option<(u16, u32)> {
        let used: u16 = memory.read_obj(GuestAddress(self.used() + 2)).unwrap();
        if used == self.next_used {
            return None;
        }
        let slot = u64::from(self.next_used % QUEUE_SIZE);
        let at = self.used() + 4 + slot * 8;
        let head: u32 = memory.read_obj(GuestAddress(at)).unwrap();
        let len: u32 = memory.read_obj(GuestAddress(at + 4)).unwrap();
        self.next_used = self.next_used.wrapping_add(1);
        // used_event: an interrupt for the next one.
        memory
            .write_obj(
                self.next_used,
                GuestAddress(self.avail() + 4 + u64::from(QUEUE_SIZE) * 2),
            )
            .unwrap();
        Some((u16::try_from(head).unwrap(), len))
    }

    fn queue(&self) -> Queue {
        let mut queue = Queue::new(QUEUE_SIZE).unwrap();
        queue.set_size(QUEUE_SIZE);
        let address = |address: u64| Some(u32::try_from(address).unwrap());
        queue.set_desc_table_address(address(self.base), Some(0));
        queue.set_avail_ring_address(address(self.avail()), Some(0));
        queue.set_used_ring_address(address(self.used()), Some(0));
        queue.set_ready(true);
        queue
    }
}

// === impl Guest ===

impl Guest {
    /// A guest whose driver is ready, with all RX buffers given.
    pub(super) fn new() -> Self {
        let mut guest = Self::inactive();
        guest.activate();
        guest.fill_rx(QUEUE_SIZE);
        guest
    }

    pub(super) fn inactive() -> Self {
        Self::with_admission(|_| Admission::Accepted)
    }

    pub(super) fn with_admission(
        admit: impl Fn(&GuestConnection) -> Admission + Send + 'static,
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("vsock")).unwrap();
        // The standard library's backlog is 128 or more; tests connect more.
        rustix::net::listen(&listener, 4096).unwrap();
        let connections = Arc::new(Mutex::new(VecDeque::new()));
        let sink = Arc::clone(&connections);
        let device = Vsock::new(VsockConfig {
            guest_cid: GUEST_CID,
            listener,
            on_guest_connection: Box::new(move |connection| {
                let admission = admit(&connection);
                if admission == Admission::Accepted {
                    sink.lock().unwrap().push_back(connection);
                }
                admission
            }),
        })
        .unwrap();
        let features = device.features();
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY_LEN)]).unwrap();
        Self {
            device,
            memory,
            interrupt: Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()),
            connections,
            queues: Self::driver_queues(features),
            features,
            directory,
            refill: true,
            held_rx: Vec::new(),
            received: VecDeque::new(),
        }
    }

    fn driver_queues(features: u64) -> [DriverQueue; 3] {
        [1, 2, 3].map(|i| DriverQueue {
            base: i * QUEUE_SPACING,
            next_avail: 0,
            next_used: 0,
            event_idx: features & (1 << 29) != 0,
        })
    }

    /// Has the driver accept only these features.
    pub(super) fn negotiate(&mut self, features: u64) {
        self.features = features;
        self.queues = Self::driver_queues(features);
    }

    pub(super) fn activate(&mut self) {
        // Fresh rings: a driver zeroes them.
        self.memory
            .write_slice(&[0; 0x4_0000], GuestAddress(0))
            .unwrap();
        self.queues = Self::driver_queues(self.features);
        self.held_rx.clear();
        self.device
            .activate(Activation {
                memory: self.memory.clone(),
                queues: self.queues.iter().map(DriverQueue::queue).collect(),
                interrupt: self.interrupt.clone(),
                features: self.features,
            })
            .unwrap();
    }

    /// Spare connections that the guest has accepted.
    pub(super) fn open_spares(&mut self, guest_port: u32, count: u32) -> Vec<Key> {
        self.device.open_spares(guest_port, count).unwrap();
        let answer = |_| {
            let request = self.expect_op(Op::Request);
            assert_eq!(request.dst_port, guest_port);
            let key = Key {
                host_port: request.src_port,
                guest_port,
            };
            self.send(self.packet(key, Op::Response), &[]);
            key
        };
        (0..count).map(answer).collect()
    }

    /// Sends a packet of data.
    pub(super) fn send_data(&mut self, key: Key, payload: &[u8]) {
        let mut header = self.packet(key, Op::Data);
        header.len = u32::try_from(payload.len()).unwrap();
        self.send(header, payload);
    }

    /// Gives the device its first `count` RX buffers.
    pub(super) fn fill_rx(&mut self, count: u16) {
        let notify = (0..count).map(|i| self.offer_rx(i)).max() == Some(true);
        if notify {
            self.device.queue_notified(0);
        }
    }

    /// Gives the device all RX buffers that it has not got back, and from now on
    /// each.
    pub(super) fn offer_all_rx(&mut self) {
        self.refill = true;
        self.drain_rx();
        let heads = std::mem::take(&mut self.held_rx);
        let notify = heads.into_iter().map(|head| self.offer_rx(head)).max();
        if notify == Some(true) {
            self.device.queue_notified(0);
        }
    }

    fn offer_rx(&mut self, i: u16) -> bool {
        let address = RX_BUFFERS + u64::from(i) * 8192;
        self.queues[0].describe(&self.memory, i, address, RX_BUFFER_LEN, 2, 0);
        self.queues[0].offer(&self.memory, i)
    }

    /// Gives the device one RX chain of the test's making: `(address, len, flags)`.
    pub(super) fn offer_rx_chain(&mut self, chain: &[(u64, u32, u16)]) {
        if self.offer_chain(0, 0, chain) {
            self.device.queue_notified(0);
        }
    }

    fn offer_chain(&mut self, queue: usize, first: u16, chain: &[(u64, u32, u16)]) -> bool {
        for (i, (address, len, flags)) in chain.iter().enumerate() {
            let at = first + u16::try_from(i).unwrap();
            let more = u16::from(i + 1 < chain.len());
            self.queues[queue].describe(&self.memory, at, *address, *len, flags | more, at + 1);
        }
        self.queues[queue].offer(&self.memory, first)
    }

    /// Sends a chain of the test's making through the TX queue.
    pub(super) fn send_chain(&mut self, chain: &[(u64, u32, u16)]) {
        self.offer_chain(1, 0, chain);
        self.device.queue_notified(1);
        while self.queues[1].take_used(&self.memory).is_some() {}
    }

    /// Sends a packet as Linux does: header and payload in a descriptor each.
    pub(super) fn send(&mut self, header: Header, payload: &[u8]) {
        if self.queue_packet(header, payload) {
            self.device.queue_notified(1);
        }
    }

    /// Puts a packet in the TX queue without telling the device.
    pub(super) fn queue_packet(&mut self, header: Header, payload: &[u8]) -> bool {
        while self.queues[1].take_used(&self.memory).is_some() {}
        let queue = &self.queues[1];
        let slot = queue.next_avail % TX_SLOTS;
        let in_use = queue.next_avail.wrapping_sub(queue.next_used);
        assert!(in_use < TX_SLOTS, "the device leaves TX packets");
        let address = TX_BUFFERS + u64::from(slot) * 0x1_8000;
        assert!(payload.len() + HEADER_LEN <= TX_BUFFER_LEN as usize);
        self.memory
            .write_slice(&header.to_bytes(), GuestAddress(address))
            .unwrap();
        let at = address + HEADER_LEN as u64;
        self.memory.write_slice(payload, GuestAddress(at)).unwrap();
        let len = u32::try_from(payload.len()).unwrap();
        let queue = &mut self.queues[1];
        let chained = u16::from(len > 0);
        queue.describe(
            &self.memory,
            slot * 2,
            address,
            HEADER_LEN as u32,
            chained,
            slot * 2 + 1,
        );
        queue.describe(&self.memory, slot * 2 + 1, at, len, 0, 0);
        queue.offer(&self.memory, slot * 2)
    }

    /// TX packets that the device has taken and not given back.
    pub(super) fn tx_in_flight(&mut self) -> u16 {
        while self.queues[1].take_used(&self.memory).is_some() {}
        self.queues[1]
            .next_avail
            .wrapping_sub(self.queues[1].next_used)
    }

    pub(super) fn packet(&self, key: Key, op: Op) -> Header {
        Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: key.guest_port,
            dst_port: key.host_port,
            kind: TYPE_STREAM,
            op: op as u16,
            buf_alloc: 256 * 1024,
            ..Header::default()
        }
    }

    /// Runs the event loop once, and the driver's interrupt handler. Gives
    /// whether anything happened.
    pub(super) fn turn(&mut self) -> bool {
        let ready = self.source_is_ready();
        if ready {
            self.device.source_ready(0);
        }
        self.drain_rx() || ready
    }

    pub(super) fn source_is_ready(&self) -> bool {
        let sources = self.device.sources();
        let [source] = &sources[..] else {
            panic!("one source");
        };
        let mut fds = [PollFd::new(source, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut fds, Some(&now)).unwrap() == 1
    }

    /// Takes what the device put in the RX queue.
    pub(super) fn drain_rx(&mut self) -> bool {
        let mut any = false;
        let mut notify = false;
        while let Some((head, len)) = self.queues[0].take_used(&self.memory) {
            any = true;
            if len > 0 {
                let address = RX_BUFFERS + u64::from(head) * 8192;
                let mut header = [0; HEADER_LEN];
                self.memory
                    .read_slice(&mut header, GuestAddress(address))
                    .unwrap();
                let header = Header::from_bytes(&header);
                assert_eq!(len, HEADER_LEN as u32 + header.len);
                let mut payload = vec![0; header.len as usize];
                self.memory
                    .read_slice(&mut payload, GuestAddress(address + HEADER_LEN as u64))
                    .unwrap();
                assert_eq!(header.dst_cid, GUEST_CID);
                self.received.push_back((header, payload));
            }
            if self.refill {
                notify |= self.offer_rx(head);
            } else {
                self.held_rx.push(head);
            }
        }
        if notify {
            self.device.queue_notified(0);
        }
        any
    }

    /// Runs until nothing happens any more.
    pub(super) fn settle(&mut self) {
        while self.turn() {}
    }

    /// Runs until the device has sent a packet, and takes it.
    pub(super) fn expect(&mut self) -> (Header, Vec<u8>) {
        self.wait_for(|guest| guest.received.pop_front())
    }

    pub(super) fn expect_op(&mut self, op: Op) -> Header {
        let (header, _) = self.expect();
        assert_eq!(Op::from_wire(header.op), Some(op), "{header:?}");
        header
    }

    /// Runs until `done` gives something; panics after a generous time.
    pub(super) fn wait_for<T>(&mut self, mut done: impl FnMut(&mut Self) -> Option<T>) -> T {
        let give_up = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(done) = done(self) {
                return done;
            }
            if !self.turn() {
                assert!(Instant::now() < give_up, "nothing happens");
                std::thread::sleep(Duration::from_micros(50));
            }
        }
    }

    pub(super) fn assert_quiet(&mut self) {
        self.settle();
        assert_eq!(self.received, []);
    }

    pub(super) fn counter(&self, name: &str) -> u64 {
        self.device.counters()[name]
    }

    // --- The host's side ---

    /// Connects a client to the listener, and writes `line`.
    pub(super) fn dial(&self, line: &str) -> UnixStream {
        let mut client = UnixStream::connect(self.directory.path().join("vsock")).unwrap();
        client.write_all(line.as_bytes()).unwrap();
        client
    }

    /// A connection that the host opened and the guest accepted.
    pub(super) fn open_from_host(&mut self, guest_port: u32) -> (Key, UnixStream) {
        let mut client = self.dial(&format!("CONNECT {guest_port}\n"));
        let request = self.expect_op(Op::Request);
        let key = Key {
            host_port: request.src_port,
            guest_port: request.dst_port,
        };
        assert_eq!(key.guest_port, guest_port);
        self.send(self.packet(key, Op::Response), &[]);
        let line = read_line(&mut client).unwrap();
        assert_eq!(line, format!("OK {}\n", key.host_port));
        (key, client)
    }

    /// A connection that the guest opened and the host accepted.
    pub(super) fn open_from_guest(&mut self, key: Key) -> UnixStream {
        self.send(self.packet(key, Op::Request), &[]);
        self.expect_op(Op::Response);
        let connection = self.connections.lock().unwrap().pop_back().unwrap();
        assert_eq!(connection.host_port, key.host_port);
        assert_eq!(connection.guest_port, key.guest_port);
        connection.stream.into()
    }
}

/// The connection that a packet from the device belongs to.
pub(super) fn key_of(header: &Header) -> Key {
    Key {
        host_port: header.src_port,
        guest_port: header.dst_port,
    }
}

/// Reads up to a newline, and no further.
pub(super) fn read_line(stream: &mut UnixStream) -> io::Result<String> {
    let mut line = String::new();
    while !line.ends_with('\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        line.push(byte[0].into());
    }
    Ok(line)
}

/// What a non-blocking read gives: `None` if it would wait.
pub(super) fn read_now(stream: &UnixStream) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 1 << 20];
    match rustix::net::recv(stream.as_fd(), &mut bytes, rustix::net::RecvFlags::DONTWAIT) {
        Ok((len, _)) => {
            bytes.truncate(len);
            Some(bytes)
        }
        Err(rustix::io::Errno::AGAIN) => None,
        Err(error) => panic!("{error}"),
    }
}

/// Bytes that do not repeat at any likely period.
pub(super) fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .flatten()
    .take(len)
    .collect()
}
