//! All of a guest's connections: who owns a packet, who may send next, and the
//! host descriptors behind them.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::time::Instant;

use rustix::net::SocketFlags;
use vm_memory::VolatileSlice;

use super::super::Counters;
use super::connection::{Connection, Phase};
use super::handshake::{Handshake, Progress};
use super::link::Link;
use super::metrics::Metrics;
use super::packet::{Header, Key, Op, TYPE_STREAM};
use super::reactor::{NO_PORT, Reactor, Ready, Token};
use super::stream::Stream;
use super::{
    ACCEPT_RETRY, Admission, BUF_ALLOC_BYTES, CONNECT_TIMEOUT, GuestConnection, HANDSHAKE_TIMEOUT,
    HOST_CID, LARGE_BUFFERS, MAX_CONNECTIONS, MAX_HANDSHAKES, SMALL_BUF_ALLOC_BYTES, Spare,
    VsockConfig, socket,
};

mod spares;
mod state;

/// RSTs that wait for an RX buffer and belong to no connection. A guest that
/// causes more without reading any loses some. A restored guest is told of all
/// lost connections at once.
const MAX_RESETS: usize = 1024;

/// Ports of the host's ends of connections that the host opened: above those
/// that services use, and the range that Firecracker takes them from.
const FIRST_HOST_PORT: u32 = 1 << 30;
const LAST_HOST_PORT: u32 = (1 << 31) - 1;

/// Clients accepted before the event loop gets its turn.
const ACCEPTS_PER_TURN: usize = 64;

pub(super) struct Muxer {
    config: VsockConfig,
    reactor: Reactor,
    /// The driver is ready. Until then clients wait in the backlog.
    active: bool,
    /// The guest stands still, and no deadline counts against it.
    paused: bool,
    listening: bool,
    /// The process was out of descriptors: accept no more until then.
    accept_after: Option<Instant>,
    handshakes: Vec<Option<Handshake>>,
    connections: BTreeMap<Key, Link>,
    /// Connections with something for the guest, each once, next turn first.
    ready: VecDeque<Key>,
    resets: VecDeque<Header>,
    next_host_port: u32,
    /// The host's ends of restored spare connections, until they are taken.
    restored: Vec<Spare>,
    pub(super) metrics: Metrics,
}

/// The next thing for an RX buffer.
#[derive(Debug)]
pub(super) enum Output {
    /// A packet without payload.
    Control(Header),
    /// Up to `max_bytes` of a connection's stream, in up to `chains` buffers.
    Data {
        key: Key,
        max_bytes: usize,
        chains: usize,
    },
}

// === impl Muxer ===

impl Muxer {
    pub(super) fn new(config: VsockConfig) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&config.listener)?;
        rustix::fs::fcntl_setfl(&config.listener, flags | rustix::fs::OFlags::NONBLOCK)?;
        Ok(Self {
            config,
            reactor: Reactor::new()?,
            active: false,
            paused: false,
            listening: false,
            accept_after: None,
            handshakes: Vec::new(),
            connections: BTreeMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            next_host_port: FIRST_HOST_PORT,
            restored: Vec::new(),
            metrics: Metrics::default(),
        })
    }

    /// The epoll instance with all of the host's descriptors.
    pub(super) fn as_source(&self) -> BorrowedFd<'_> {
        self.reactor.as_fd()
    }

    pub(super) fn guest_cid(&self) -> u64 {
        self.config.guest_cid
    }

    pub(super) fn counters(&self) -> Counters {
        let streams = self
            .connections
            .values()
            .filter_map(|link| link.stream.as_ref());
        let buffered_bytes = streams.map(Stream::buffered_bytes).sum();
        self.metrics.counters(
            self.connections.len(),
            self.open_spare_count(),
            buffered_bytes,
        )
    }

    /// The driver is ready: clients are let in. After a pause, nobody is late who
    /// could not have been in time.
    pub(super) fn start(&mut self) {
        let now = Instant::now();
        self.active = true;
        if self.paused {
            self.paused = false;
            let handshakes = self.handshakes.iter_mut().flatten();
            handshakes.for_each(|slot| slot.deadline = slot.deadline.max(now + HANDSHAKE_TIMEOUT));
            let links = self.connections.values_mut();
            links.for_each(|link| link.extend(now + CONNECT_TIMEOUT));
            self.expire(now);
        }
        self.update_listening(now);
    }

    /// The guest stands still until the next [`Self::start`]. The host's side
    /// goes on, as far as it can without guest memory.
    pub(super) fn pause(&mut self) {
        self.paused = true;
    }

    /// The driver is gone: closes everything but the listener.
    pub(super) fn stop(&mut self) {
        self.active = false;
        self.paused = false;
        self.accept_after = None;
        self.handshakes = Vec::new();
        self.connections = BTreeMap::new();
        self.ready = VecDeque::new();
        self.resets = VecDeque::new();
        self.restored = Vec::new();
        self.reactor.disarm();
        self.update_listening(Instant::now());
    }

    /// Has the event loop come back to the device.
    pub(super) fn wake(&self) {
        self.reactor.wake();
    }

    // --- The host's side ---

    /// Takes note of what is ready on the host's side. Gives whether it woke
    /// itself.
    pub(super) fn poll_host(&mut self) -> bool {
        let mut woken = false;
        let now = Instant::now();
        for (token, ready) in self.reactor.poll() {
            match token {
                Token::Wake => woken = true,
                Token::Timer => self.expire(now),
                Token::Listener => self.accept_clients(now),
                Token::Handshake(slot) => self.advance_handshake(slot as usize, now),
                Token::Connection(key) => self.host_ready(key, ready, now),
            }
        }
        woken
    }

    fn host_ready(&mut self, key: Key, ready: Ready, now: Instant) {
        if let Some(link) = self.connections.get_mut(&key) {
            link.host_ready(ready, now);
            self.refresh(key, now);
        }
    }

    /// Watches the listener exactly when a client could be served.
    fn update_listening(&mut self, now: Instant) {
        let room =
            self.handshakes.len() < MAX_HANDSHAKES || self.handshakes.iter().any(Option::is_none);
        let wanted = self.active && room && self.accept_after.is_none();
        if wanted && !self.listening {
            match self.reactor.watch_listener(&self.config.listener) {
                Ok(()) => self.listening = true,
                Err(_) => self.rest_listener(now),
            }
        } else if !wanted && self.listening {
            self.reactor.unwatch(&self.config.listener);
            self.listening = false;
        }
    }

    /// Out of descriptors or memory: without a rest, a client in the backlog
    /// would keep the event loop spinning.
    fn rest_listener(&mut self, now: Instant) {
        let until = now + ACCEPT_RETRY;
        self.accept_after = Some(until);
        self.reactor.arm(until, now);
    }

    fn accept_clients(&mut self, now: Instant) {
        for _ in 0..ACCEPTS_PER_TURN {
            if !self.listening {
                return;
            }
            match accept(&self.config.listener) {
                Ok(socket) => {
                    self.begin_handshake(Handshake::new(socket, now + HANDSHAKE_TIMEOUT), now);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.rest_listener(now),
            }
            self.update_listening(now);
        }
    }

    fn begin_handshake(&mut self, mut handshake: Handshake, now: Instant) {
        // Most clients have written their line by now.
        match handshake.advance() {
            Progress::Port(port) => self.request(handshake.into_socket(), port, None, now),
            Progress::Failed => self.metrics.handshakes_refused += 1,
            Progress::Waiting => {
                let slot = self
                    .handshakes
                    .iter()
                    .position(Option::is_none)
                    .unwrap_or(self.handshakes.len());
                let token = Token::Handshake(u32::try_from(slot).unwrap_or(u32::MAX));
                if self.reactor.watch_stream(&handshake, token).is_err() {
                    self.metrics.handshakes_refused += 1;
                    return;
                }
                self.reactor.arm(handshake.deadline, now);
                match self.handshakes.get_mut(slot) {
                    Some(empty) => *empty = Some(handshake),
                    None => self.handshakes.push(Some(handshake)),
                }
            }
        }
    }

    fn advance_handshake(&mut self, slot: usize, now: Instant) {
        let Some(handshake) = self.handshakes.get_mut(slot) else {
            return;
        };
        match handshake.as_mut().map(Handshake::advance) {
            None | Some(Progress::Waiting) => return,
            Some(Progress::Failed) => {
                *handshake = None;
                self.metrics.handshakes_refused += 1;
            }
            Some(Progress::Port(port)) => {
                if let Some(handshake) = handshake.take() {
                    self.request(handshake.into_socket(), port, Some(slot), now);
                }
            }
        }
        self.update_listening(now);
    }

    /// Asks the guest for a connection. A socket that came from a handshake's
    /// slot is watched already.
    fn request(&mut self, socket: OwnedFd, guest_port: u32, slot: Option<usize>, now: Instant) {
        if self.connections.len() >= MAX_CONNECTIONS {
            self.metrics.handshakes_refused += 1;
            return;
        }
        let key = self.free_key(guest_port);
        let token = Token::Connection(key);
        let watched = match slot {
            Some(_) => self.reactor.rewatch_stream(&socket, token, false),
            None => self.reactor.watch_stream(&socket, token),
        };
        if watched.is_err() {
            self.metrics.handshakes_refused += 1;
            return;
        }
        let connection = Connection::from_host(key, self.config.guest_cid, self.buf_alloc_bytes());
        self.connections
            .insert(key, Link::from_host(connection, Stream::new(socket), now));
        self.refresh(key, now);
    }

    fn free_key(&mut self, guest_port: u32) -> Key {
        loop {
            let key = Key {
                host_port: self.next_host_port,
                guest_port,
            };
            self.next_host_port = match self.next_host_port {
                LAST_HOST_PORT => FIRST_HOST_PORT,
                port => port + 1,
            };
            // Ends: there are many more ports than connections.
            if !self.connections.contains_key(&key) {
                return key;
            }
        }
    }

    fn buf_alloc_bytes(&self) -> u32 {
        if self.connections.len() < LARGE_BUFFERS {
            BUF_ALLOC_BYTES
        } else {
            SMALL_BUF_ALLOC_BYTES
        }
    }

    /// Gives up what has taken too long and sets the timer for the rest.
    fn expire(&mut self, now: Instant) {
        if self.accept_after.is_some_and(|after| after <= now) {
            self.accept_after = None;
        }
        for slot in &mut self.handshakes {
            if slot.as_ref().is_some_and(|slot| slot.deadline <= now) {
                *slot = None;
                self.metrics.handshakes_refused += 1;
            }
        }
        let deadlines = self
            .connections
            .iter()
            .filter(|_| !self.paused)
            .filter_map(|(key, link)| Some((*key, link.deadline()?)));
        let expired: Vec<Key> = deadlines
            .filter(|(_, deadline)| *deadline <= now)
            .map(|(key, _)| key)
            .collect();
        for key in expired {
            if let Some(link) = self.connections.get_mut(&key) {
                link.give_up(now);
                self.refresh(key, now);
            }
        }
        let handshakes = self.handshakes.iter().flatten().map(|slot| slot.deadline);
        let links = self
            .connections
            .values()
            .filter(|_| !self.paused)
            .filter_map(Link::deadline);
        let next = handshakes.chain(links).chain(self.accept_after).min();
        if let Some(next) = next {
            self.reactor.arm(next, now);
        }
        self.update_listening(now);
    }

    // --- The guest's side ---

    /// Takes a packet from the guest; `data` has exactly `header.len` bytes.
    pub(super) fn receive_packet(&mut self, header: &Header, data: &[VolatileSlice<'_>]) {
        self.metrics.tx_packets += 1;
        // Nobody listens at a forged address, so there is none to answer.
        if header.src_cid != self.config.guest_cid {
            self.metrics.invalid_packets += 1;
            return;
        }
        let op = Op::from_wire(header.op);
        let known = header.dst_cid == HOST_CID && header.kind == TYPE_STREAM;
        let Some(op) = op.filter(|_| known) else {
            return self.answer_reset(header);
        };
        let now = Instant::now();
        let key = header.key();
        match self.connections.get_mut(&key) {
            // The guest took its port back while the host still reads what came
            // before; it must take another.
            Some(link) if link.connection.guest_gone() && op == Op::Request => {
                self.answer_reset(header);
            }
            Some(link) => {
                let opening = link.connection.phase() == Phase::Requested;
                let taken = link.receive_packet(key, op, header, data, now);
                self.metrics.tx_bytes += u64::from(taken);
                if opening && link.connection.phase() == Phase::Open {
                    self.metrics.connections_opened += 1;
                }
                self.refresh(key, now);
            }
            None if op == Op::Request => self.admit(header, now),
            None => self.answer_reset(header),
        }
    }

    /// A packet whose payload does not match its header ends its connection.
    pub(super) fn receive_malformed(&mut self, header: &Header) {
        self.metrics.invalid_packets += 1;
        if header.src_cid != self.config.guest_cid {
            return;
        }
        let now = Instant::now();
        match self.connections.get_mut(&header.key()) {
            Some(link) => {
                link.give_up(now);
                self.refresh(header.key(), now);
            }
            None => self.answer_reset(header),
        }
    }

    /// The guest asks for a connection.
    fn admit(&mut self, request: &Header, now: Instant) {
        let key = request.key();
        let admitted = key.host_port != NO_PORT
            && key.guest_port != NO_PORT
            && self.connections.len() < MAX_CONNECTIONS
            && self.open_for_guest(request).is_ok();
        if admitted {
            self.metrics.connections_opened += 1;
            self.refresh(key, now);
        } else {
            self.answer_reset(request);
        }
    }

    fn open_for_guest(&mut self, request: &Header) -> io::Result<()> {
        let key = request.key();
        let (ours, theirs) = socket::pair()?;
        self.reactor.watch_stream(&ours, Token::Connection(key))?;
        let admission = (self.config.on_guest_connection)(GuestConnection {
            host_port: key.host_port,
            guest_port: key.guest_port,
            stream: theirs,
        });
        if admission == Admission::Refused {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let connection =
            Connection::from_guest(request, self.config.guest_cid, self.buf_alloc_bytes());
        self.connections
            .insert(key, Link::from_guest(connection, Stream::new(ours)));
        Ok(())
    }

    /// Answers a packet that belongs to no connection; never an RST (section
    /// 5.10.6.5).
    fn answer_reset(&mut self, header: &Header) {
        if header.op == Op::Reset as u16 {
            return;
        }
        self.push_reset(header.reset_reply());
    }

    fn push_reset(&mut self, reset: Header) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(reset);
        } else {
            self.metrics.dropped_resets += 1;
        }
    }

    // --- The order in which connections send ---

    pub(super) fn has_output(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// The next thing for the guest. A control packet counts as sent; data is
    /// sent by [`Self::read`].
    pub(super) fn next_output(&mut self) -> Option<Output> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(Output::Control(reset));
        }
        while let Some(&key) = self.ready.front() {
            if let Some(link) = self.connections.get_mut(&key) {
                // What it sent last may have used up its credit: that decides
                // anew what it needs.
                let has_output = link.has_output();
                if let Some(header) = link.connection.next_control() {
                    if link.connection.is_finished() {
                        self.remove(key);
                    }
                    return Some(Output::Control(header));
                }
                if has_output {
                    return Some(Output::Data {
                        key,
                        max_bytes: link.readable_bytes(),
                        chains: link.read_chains(),
                    });
                }
                link.queued = false;
            }
            self.ready.pop_front();
        }
        None
    }

    /// Reads a connection's stream into RX buffers and ends its turn.
    pub(super) fn read(&mut self, key: Key, into: &[VolatileSlice<'_>]) -> usize {
        let Some(link) = self.connections.get_mut(&key) else {
            return 0;
        };
        let now = Instant::now();
        let read = link.read(into, now);
        self.metrics.rx_bytes += read as u64;
        link.queued = false;
        self.ready.pop_front();
        self.refresh(key, now);
        read
    }

    /// The header of the next `len` bytes that [`Self::read`] gave.
    pub(super) fn data_header(&mut self, key: Key, len: u32) -> Option<Header> {
        let link = self.connections.get_mut(&key)?;
        Some(link.connection.data_header(len))
    }

    /// Brings the queue, the epoll watch and the timer in line with a connection
    /// that may have changed.
    fn refresh(&mut self, key: Key, now: Instant) {
        let Some(link) = self.connections.get_mut(&key) else {
            return;
        };
        if link.connection.is_finished() {
            self.remove(key);
            return;
        }
        if let Some(stream) = &mut link.stream
            && stream.watches_writes == stream.is_flushed()
        {
            let writes = !stream.is_flushed();
            let token = Token::Connection(key);
            if self.reactor.rewatch_stream(&*stream, token, writes).is_ok() {
                stream.watches_writes = writes;
            }
        }
        if let Some(deadline) = link.deadline() {
            self.reactor.arm(deadline, now);
        }
        if !link.queued && link.has_output() {
            link.queued = true;
            self.ready.push_back(key);
        }
    }

    /// Forgets a connection. The queue must forget it too, or a guest that opens
    /// and resets one without reading would make it grow.
    fn remove(&mut self, key: Key) {
        if let Some(link) = self.connections.remove(&key) {
            if link.queued {
                self.ready.retain(|&queued| queued != key);
            }
            if link.aborted {
                self.metrics.connections_reset += 1;
            }
        }
    }

    /// What waits for the guest: connections with something to send, and RSTs.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.ready.len() + self.resets.len()
    }
}

fn accept(listener: &UnixListener) -> io::Result<OwnedFd> {
    Ok(rustix::net::accept_with(
        listener.as_fd(),
        SocketFlags::CLOEXEC,
    )?)
}
