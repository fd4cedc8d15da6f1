//! virtio-vsock (Virtual I/O Device specification 1.2, section 5.10), wholly in
//! userspace: what a guest sees as vsock streams are Unix streams on the host.
//!
//! - A host client connects to the listener, writes `CONNECT <port>\n` and, when
//!   the guest has accepted, reads `OK <host port>\n`; then the stream begins.
//! - A guest that connects to port P of CID 2 gets one end of a socket pair; the
//!   other end goes to the monitor's callback. No path is opened and nothing is
//!   dialled, so the jail needs neither right.
//!
//! ```text
//!  guest ── tx queue ──► device ──► muxer ──► connection ──► stream ──► host
//!  guest ◄─ rx queue ─── device ◄── muxer ◄── connection ◄── stream ◄── host
//! ```
//!
//! Spare connections, which the device opens itself, go on in the clones of a
//! machine. The clone's guest gets RST for all others that it had.
//!
//! Bytes move once in each direction: `sendmsg` from the guest's TX buffers,
//! `recvmsg` into its RX buffers. Only what a slow host reader cannot take is
//! copied, into a buffer bounded by the credit that the guest was given.
//!
//! All host descriptors are in one epoll instance, the device's only source.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use serde::{Deserialize, Serialize};

mod buffer;
mod chain;
mod connection;
mod credit;
mod device;
mod handshake;
mod link;
mod metrics;
mod muxer;
mod packet;
mod reactor;
mod socket;
mod stream;
#[cfg(test)]
mod tests;

pub use device::{NewVsockError, Vsock};

/// The host's context id (section 5.10.4).
pub const HOST_CID: u64 = 2;

/// Connections of a guest, those being closed included. One more gets RST.
pub const MAX_CONNECTIONS: usize = 1023;

/// Spare connections at a time.
pub const MAX_SPARES: usize = 16;

/// What a snapshot keeps of the bytes that a guest has sent on a spare
/// connection. One with more is lost to clones.
const MAX_UNREAD_BYTES: usize = 64 * 1024;

/// Clients that have not finished writing their CONNECT line. More wait in the
/// listener's backlog.
const MAX_HANDSHAKES: usize = 64;

/// How long a client may take over its CONNECT line.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a guest may take over its answer to a connection request.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a guest may take to confirm that a connection is over.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the host may read nothing of what a guest wrote before it closed.
const LINGER_TIMEOUT: Duration = Duration::from_secs(30);

/// How long the listener rests when the process is out of descriptors.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Bytes that a guest may send ahead of the host's reader, for each connection.
const BUF_ALLOC_BYTES: u32 = 256 * 1024;

/// The same, once [`LARGE_BUFFERS`] connections exist: a guest whose readers
/// all stall cannot make the monitor hold more than 88 MiB.
const SMALL_BUF_ALLOC_BYTES: u32 = 64 * 1024;
const LARGE_BUFFERS: usize = 128;

/// What a vsock device is made from.
pub struct VsockConfig {
    /// Context id of the guest, 3 or above.
    pub guest_cid: u64,
    /// Where clients of the host connect. Listening, `SOCK_STREAM`.
    pub listener: UnixListener,
    /// Called for every connection that the guest opens, under the device's
    /// lock: it must not block.
    pub on_guest_connection: OnGuestConnection,
}

/// What is saved of the vsock device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    pub guest_cid: u64,
    /// Where the search for a free port of the host goes on.
    pub next_host_port: u32,
    /// Connections that a restored guest keeps.
    pub spares: Vec<SpareState>,
    /// Connections that a restored guest is told are reset.
    pub lost: Vec<Ports>,
}

/// The two ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ports {
    pub host_port: u32,
    pub guest_port: u32,
}

/// An open connection whose host's end nobody has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpareState {
    pub ports: Ports,
    pub credit: CreditState,
    /// What the guest has sent, and the host has yet to read: first what
    /// `credit` counts as forwarded, then all that it does not.
    pub unread: Vec<u8>,
}

/// The counters of a connection's flow control (section 5.10.6.3), modulo 2³².
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreditState {
    pub buf_alloc_bytes: u32,
    pub received: u32,
    pub forwarded: u32,
    pub announced: u32,
    pub peer_buf_alloc_bytes: u32,
    pub sent: u32,
    pub peer_forwarded: u32,
}

/// The host's end of a spare connection: a blocking `SOCK_STREAM` Unix socket.
#[derive(Debug)]
pub struct Spare {
    pub guest_port: u32,
    pub stream: OwnedFd,
}

pub type OnGuestConnection = Box<dyn FnMut(GuestConnection) -> Admission + Send>;

/// A connection that the guest opened.
#[derive(Debug)]
pub struct GuestConnection {
    /// The port of CID 2 that the guest connected to.
    pub host_port: u32,
    pub guest_port: u32,
    /// The host's end: a blocking `SOCK_STREAM` Unix socket, close-on-exec.
    pub stream: OwnedFd,
}

/// Whether a guest's connection was taken. A refused guest sees ECONNRESET.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    Accepted,
    Refused,
}
