//! virtio-net (Virtual I/O Device specification 1.2, section 5.1) on a TAP
//! descriptor that the client gives.
//!
//! ```text
//!  guest ── tx queue ──► tx ── writev(2) ──► TAP ──► host
//!  guest ◄─ rx queue ─── rx ◄── readv(2) ─── TAP ◄── host
//! ```
//!
//! Packets go between guest memory and the TAP in one system call each, with
//! the header as the guest has it: the TAP speaks the same `virtio_net_hdr`, so
//! checksums and segmentation are left to whoever comes last (CSUM, TSO). No
//! packet allocates memory.
//!
//! **Nothing waits here.** A packet that a rate limiter holds back stays where
//! it is: in the driver's ring, or in the TAP, where the kernel drops what comes
//! too much. The one exception is a packet larger than the buffers that the
//! driver had given when it came; it is kept until there are more, as vhost-net
//! does. So a pause has nothing to finish.
//!
//! **One pair of queues.** A sandbox has few vCPUs, and one thread serves all of
//! its devices: more queues would be more of the same. There is no control queue
//! either; the host filters what the guest may send, so the guest need not be
//! asked what it wants to receive.
//!
//! UDP segmentation (VIRTIO_NET_F_HOST_USO and its kin) is not offered: whether
//! a TAP can do it depends on the host's kernel, and a snapshot must run on any.

use std::io;

use serde::{Deserialize, Serialize};

use crate::config::RateLimit;

mod device;
mod iovecs;
mod metrics;
mod rx;
mod tap;
#[cfg(test)]
mod tests;
mod tx;
mod used;
mod watch;

pub use device::Net;
pub(crate) use tap::TAP_IOCTLS;
pub use tap::{Tap, TapError};

/// The length of `struct virtio_net_hdr_v1`, which comes before every packet
/// (section 5.1.6), in bytes.
pub const HEADER_BYTES: usize = 12;

/// The link's MTU where none is given, in bytes.
pub const DEFAULT_MTU: u16 = 1500;

/// The largest packet with its header, in bytes: 64 KiB of IP and an Ethernet
/// header (section 5.1.6.3.1).
const PACKET_MAX_BYTES: usize = HEADER_BYTES + 65_550;

/// The shortest: an Ethernet header and nothing in it, which the TAP takes.
const PACKET_MIN_BYTES: usize = HEADER_BYTES + 14;

/// Receive, transmit.
const QUEUE_SIZE: u16 = 256;

/// Packets and bytes that one queue moves before the event loop has its turn
/// and the driver its interrupt.
const PACKETS_PER_TURN: usize = 64;
const BYTES_PER_TURN: usize = 512 << 10;

/// A network device.
#[derive(Debug)]
pub struct NetConfig {
    /// The guest's Ethernet address; a unicast one.
    pub mac: [u8; 6],
    /// Without it the link is down.
    pub tap: Option<Tap>,
    /// What the guest may send in one IP packet, in bytes; at least 68.
    pub mtu: u16,
    /// What the guest receives. One packet is one operation.
    pub rx: RateLimit,
    /// What it sends.
    pub tx: RateLimit,
}

/// What changes while the machine runs; what is `None` stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetChange {
    pub rx: Option<RateLimit>,
    pub tx: Option<RateLimit>,
    pub link_up: Option<bool>,
}

/// What is saved of a network device. Address, MTU, limits and TAP come anew
/// with a restore. Packets that have come and not been taken stay with the
/// machine that was saved, those in its TAP and the one that waits for buffers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// What the driver has been told.
    pub link_up: bool,
}

/// Why a network device could not be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    #[error("the host refused the epoll instance or a timer of the network device")]
    Host(#[source] io::Error),
    #[error("the machine has no TAP, so its link stays down; restore it with one")]
    NoTap,
}
