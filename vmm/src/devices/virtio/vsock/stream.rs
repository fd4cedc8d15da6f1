//! The host's end of a connection: a Unix stream and what it cannot take yet.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{SendAncillaryBuffer, SendFlags, Shutdown};
use vm_memory::VolatileSlice;

use super::buffer::Buffer;
use super::reactor::Ready;
use super::socket;

#[derive(Debug)]
pub(super) struct Stream {
    socket: OwnedFd,
    buffer: Buffer,
    /// There may be something to read: bytes, the end, or an error. The epoll
    /// watch is edge-triggered, so this stays set until a read comes up short.
    readable: bool,
    /// The host shut or closed its end, so that reads will come to an end.
    ending: bool,
    /// The host closed its end altogether.
    hung_up: bool,
    /// The epoll watch includes writability.
    pub(super) watches_writes: bool,
    read_shut: bool,
    write_shut: bool,
}

/// What a read gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Received {
    Bytes(usize),
    Nothing,
    /// The host will send no more.
    End,
}

/// The host takes no more: it closed its end, or that for reading.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct HostGone;

// === impl Stream ===

impl Stream {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            buffer: Buffer::default(),
            readable: false,
            ending: false,
            hung_up: false,
            watches_writes: false,
            read_shut: false,
            write_shut: false,
        }
    }

    pub(super) fn note(&mut self, ready: Ready) {
        self.readable |= ready.readable;
        self.ending |= ready.ending;
        self.hung_up |= ready.hung_up;
    }

    pub(super) fn is_readable(&self) -> bool {
        self.readable
    }

    pub(super) fn is_hung_up(&self) -> bool {
        self.hung_up
    }

    pub(super) fn is_flushed(&self) -> bool {
        self.buffer.is_empty()
    }

    /// Bytes that wait for the host's reader.
    pub(super) fn buffered_bytes(&self) -> usize {
        self.buffer.len()
    }

    /// What waits for the host's reader, oldest first.
    pub(super) fn buffered(&self) -> impl Iterator<Item = u8> {
        self.buffer.iter()
    }

    /// Writes `data`, after what waits. Gives the bytes that left; the rest is
    /// kept.
    pub(super) fn write(&mut self, data: &[VolatileSlice<'_>]) -> Result<usize, HostGone> {
        let len: usize = data.iter().map(VolatileSlice::len).sum();
        let written = if self.buffer.is_empty() && len > 0 {
            would_block_is_none(socket::send(self.as_fd(), data))?
        } else {
            0
        };
        if written < len {
            self.buffer.push(data, written);
        }
        Ok(written)
    }

    /// Writes what waits; gives the bytes that left.
    pub(super) fn flush(&mut self) -> Result<usize, HostGone> {
        let mut flushed = 0;
        while !self.buffer.is_empty() {
            let written = would_block_is_none(
                rustix::net::sendmsg(
                    &self.socket,
                    &self.buffer.as_io_slices(),
                    &mut SendAncillaryBuffer::default(),
                    SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
                )
                .map_err(io::Error::from),
            )?;
            if written == 0 {
                break;
            }
            self.buffer.consume(written);
            flushed += written;
        }
        Ok(flushed)
    }

    /// Drops what waits.
    pub(super) fn discard(&mut self) {
        self.buffer = Buffer::default();
    }

    /// Sends a few bytes at the very start of the stream, all or nothing.
    pub(super) fn greet(&mut self, line: &[u8]) -> Result<(), HostGone> {
        match rustix::net::send(
            &self.socket,
            line,
            SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
        ) {
            Ok(sent) if sent == line.len() => Ok(()),
            _ => Err(HostGone),
        }
    }

    /// Reads up to all of `into`, which has room.
    pub(super) fn receive(&mut self, into: &[VolatileSlice<'_>]) -> Received {
        let room: usize = into.iter().map(VolatileSlice::len).sum();
        match socket::receive(self.as_fd(), into) {
            Ok(0) => {
                self.readable = false;
                Received::End
            }
            Ok(len) => {
                // A short read emptied the socket, and what comes later makes an
                // edge. The end of the stream makes one edge only, perhaps past.
                if len < room && !self.ending {
                    self.readable = false;
                }
                Received::Bytes(len)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Received::Nothing
            }
            // ECONNRESET: the host closed its end with bytes of the guest's unread.
            Err(_) => {
                self.readable = false;
                self.hung_up = true;
                Received::End
            }
        }
    }

    /// The guest sends no more: the host reads an end of stream.
    pub(super) fn shut_write(&mut self) {
        if !self.write_shut {
            self.write_shut = true;
            // Fails only when the host has closed its end.
            let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
        }
    }

    /// The guest reads no more: the host's writes fail.
    pub(super) fn shut_read(&mut self) {
        if !self.read_shut {
            self.read_shut = true;
            let _ = rustix::net::shutdown(&self.socket, Shutdown::Read);
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn would_block_is_none(result: io::Result<usize>) -> Result<usize, HostGone> {
    match result {
        Ok(len) => Ok(len),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            ) =>
        {
            Ok(0)
        }
        // EPIPE and ECONNRESET; nothing else can be told to the guest either.
        Err(_) => Err(HostGone),
    }
}
