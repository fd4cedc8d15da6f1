//! A connection and its host stream together: what happens at one end, carried
//! to the other.

use std::os::fd::OwnedFd;
use std::time::Instant;

use vm_memory::VolatileSlice;

use super::connection::{Connection, Incoming, Phase};
use super::packet::{Header, Key, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::reactor::Ready;
use super::socket;
use super::stream::{Received, Stream};
use super::{CLOSE_TIMEOUT, CONNECT_TIMEOUT, LINGER_TIMEOUT};

/// RX buffers that one read may fill, at most: a connection's turn.
const MAX_READ_CHAINS: usize = 64;

#[derive(Debug)]
pub(super) struct Link {
    pub(super) connection: Connection,
    /// Gone as soon as neither side can use it.
    pub(super) stream: Option<Stream>,
    /// When the connection is given up, if the present state may not last.
    deadline: Option<Instant>,
    /// It is in the muxer's queue of those with something for the guest.
    pub(super) queued: bool,
    /// RX buffers to take for the next read. It follows what the host sends, so
    /// that a short message costs one buffer's parsing and a bulk transfer one
    /// call for many.
    read_chains: usize,
    /// It ends out of order.
    pub(super) aborted: bool,
    /// The host's end of a spare connection, which nobody has yet.
    far_end: Option<OwnedFd>,
}

// === impl Link ===

impl Link {
    pub(super) fn from_host(connection: Connection, stream: Stream, now: Instant) -> Self {
        Self {
            deadline: Some(now + CONNECT_TIMEOUT),
            ..Self::from_guest(connection, stream)
        }
    }

    pub(super) fn from_guest(connection: Connection, stream: Stream) -> Self {
        Self {
            connection,
            stream: Some(stream),
            deadline: None,
            queued: false,
            read_chains: 1,
            aborted: false,
            far_end: None,
        }
    }

    /// A connection that the device asks for and keeps both host ends of.
    pub(super) fn spare(
        connection: Connection,
        stream: Stream,
        far_end: OwnedFd,
        now: Instant,
    ) -> Self {
        Self {
            far_end: Some(far_end),
            ..Self::from_host(connection, stream, now)
        }
    }

    /// A spare connection of a snapshot, whose host's end is given away.
    pub(super) fn restored(connection: Connection, stream: Stream) -> Self {
        Self::from_guest(connection, stream)
    }

    pub(super) fn is_spare(&self) -> bool {
        self.far_end.is_some()
    }

    /// What a snapshot keeps: all that the guest has sent, if the connection is
    /// a spare one, in use by neither side and with no more than `max_bytes`.
    pub(super) fn unread(&self, max_bytes: usize) -> Option<Vec<u8>> {
        let (far_end, stream) = (self.far_end.as_ref()?, self.stream.as_ref()?);
        if !self.connection.is_plainly_open() {
            return None;
        }
        let mut unread = socket::peek(far_end, max_bytes)?;
        if unread.len() + stream.buffered_bytes() > max_bytes {
            return None;
        }
        unread.extend(stream.buffered());
        Some(unread)
    }

    /// Gives what waits for the guest until `deadline`, at least.
    pub(super) fn extend(&mut self, deadline: Instant) {
        if let Some(own) = &mut self.deadline {
            *own = deadline.max(*own);
        }
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Takes a packet from the guest. Gives the bytes of payload taken.
    pub(super) fn receive_packet(
        &mut self,
        key: Key,
        op: Op,
        header: &Header,
        data: &[VolatileSlice<'_>],
        now: Instant,
    ) -> u32 {
        let mut taken = 0;
        match self.connection.receive(op, header) {
            Ok(Incoming::Noted) => {}
            Ok(Incoming::Data) => {
                taken = header.len;
                self.write(taken, data);
            }
            Ok(Incoming::Accepted) => self.accept(key),
            // Half a spare connection is of no use.
            Ok(Incoming::Shutdown) if self.is_spare() => self.connection.kill(),
            Ok(Incoming::Shutdown) => {}
            Ok(Incoming::Reset) => self.receive_reset(),
            Err(_) => self.abort(),
        }
        self.settle(now);
        taken
    }

    fn write(&mut self, len: u32, data: &[VolatileSlice<'_>]) {
        let Some(stream) = &mut self.stream else {
            // The host has closed its end and the guest does not know yet.
            self.connection.credit.note_forwarded(len);
            return;
        };
        match stream.write(data) {
            Ok(written) => self.note_forwarded(written),
            Err(_) => self.stop_writing(),
        }
    }

    /// The guest has accepted: the client learns it before any of its bytes. A
    /// spare connection has no client to tell.
    fn accept(&mut self, key: Key) {
        self.deadline = None;
        if self.is_spare() {
            return;
        }
        let line = format!("OK {}\n", key.host_port);
        if let Some(stream) = &mut self.stream
            && stream.greet(line.as_bytes()).is_err()
        {
            self.abort();
        }
    }

    fn receive_reset(&mut self) {
        self.connection.lose_guest();
        let in_order =
            self.connection.guest_shut(SHUTDOWN_BOTH) || self.connection.host_shut(SHUTDOWN_BOTH);
        if in_order {
            // A guest that closed in order and tired of waiting for the host's
            // slow reader: that reader still gets all that was sent.
            return;
        }
        self.abort();
    }

    /// The stream is ready for what it was watched for.
    pub(super) fn host_ready(&mut self, ready: Ready, now: Instant) {
        let Some(stream) = &mut self.stream else {
            return;
        };
        stream.note(ready);
        if self.connection.phase() == Phase::Requested && stream.is_hung_up() {
            self.abort();
        } else if ready.writable && !stream.is_flushed() {
            match stream.flush() {
                Ok(0) => {}
                Ok(written) => {
                    self.note_forwarded(written);
                    if self.deadline.is_some() {
                        self.deadline = Some(now + LINGER_TIMEOUT);
                    }
                }
                Err(_) => self.stop_writing(),
            }
        }
        // The end of a stream of which everything was read, or of which the
        // guest wants nothing.
        if let Some(stream) = &self.stream
            && stream.is_hung_up()
            && (self.connection.host_shut(SHUTDOWN_SEND)
                || self.connection.guest_shut(SHUTDOWN_RECEIVE))
        {
            self.connection.shut_host(SHUTDOWN_BOTH);
        }
        self.settle(now);
    }

    /// Ends the connection at once: it took too long, or the guest broke it.
    pub(super) fn give_up(&mut self, now: Instant) {
        self.abort();
        self.settle(now);
    }

    fn abort(&mut self) {
        self.aborted = true;
        self.connection.kill();
    }

    /// The host takes no more: what waits for it is dropped, and so is what the
    /// guest still sends before it knows.
    fn stop_writing(&mut self) {
        self.connection.shut_host(SHUTDOWN_RECEIVE);
        let held = self.connection.credit.held_bytes();
        self.connection.credit.note_forwarded(held);
        if let Some(stream) = &mut self.stream {
            stream.discard();
        }
    }

    fn note_forwarded(&mut self, written: usize) {
        // `written` was received within credit, so it is below 2³².
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        self.connection.credit.note_forwarded(written);
    }

    /// Carries to each end what has become true at the other.
    fn settle(&mut self, now: Instant) {
        if self.connection.phase() == Phase::Requested {
            return;
        }
        if let Some(stream) = &mut self.stream {
            // All bytes before the end of the stream.
            if self.connection.guest_shut(SHUTDOWN_SEND) && stream.is_flushed() {
                stream.shut_write();
            }
            if self.connection.guest_shut(SHUTDOWN_RECEIVE) {
                stream.shut_read();
                if stream.is_hung_up() && stream.is_flushed() {
                    self.connection.shut_host(SHUTDOWN_BOTH);
                }
            }
        }
        if self.connection.host_shut(SHUTDOWN_BOTH) && self.stream.is_some() {
            self.stop_writing();
            self.stream = None;
        }
        let flushed = self.stream.as_ref().is_none_or(Stream::is_flushed);
        if self.connection.guest_shut(SHUTDOWN_BOTH) || self.connection.guest_gone() {
            if flushed {
                // The RST tells the guest that its port is free again.
                self.connection.kill();
            } else {
                self.deadline.get_or_insert(now + LINGER_TIMEOUT);
            }
        } else if self.connection.host_shut(SHUTDOWN_BOTH) {
            self.deadline.get_or_insert(now + CLOSE_TIMEOUT);
        }
        if self.connection.phase() == Phase::Dead {
            self.stream = None;
            self.deadline = None;
        }
    }

    /// Whether there is something for the guest's RX queue.
    pub(super) fn has_output(&mut self) -> bool {
        if self.stream.as_ref().is_some_and(Stream::is_readable) {
            if self.connection.sendable_bytes() > 0 {
                return true;
            }
            self.connection.want_credit();
        }
        self.connection.has_control()
    }

    /// Bytes of the stream that may go to the guest now.
    pub(super) fn readable_bytes(&self) -> usize {
        match &self.stream {
            Some(stream) if stream.is_readable() => self.connection.sendable_bytes() as usize,
            _ => 0,
        }
    }

    pub(super) fn read_chains(&self) -> usize {
        self.read_chains
    }

    /// Reads from the stream into `into`, a batch of RX buffers with room.
    pub(super) fn read(&mut self, into: &[VolatileSlice<'_>], now: Instant) -> usize {
        let Some(stream) = &mut self.stream else {
            return 0;
        };
        let room: usize = into.iter().map(VolatileSlice::len).sum();
        let read = match stream.receive(into) {
            Received::Bytes(read) => read,
            Received::Nothing => 0,
            Received::End => {
                let flags = if stream.is_hung_up() {
                    SHUTDOWN_BOTH
                } else {
                    SHUTDOWN_SEND
                };
                self.connection.shut_host(flags);
                self.settle(now);
                0
            }
        };
        self.read_chains = if read == room {
            (self.read_chains * 4).min(MAX_READ_CHAINS)
        } else {
            (self.read_chains / 2).max(1)
        };
        read
    }
}
