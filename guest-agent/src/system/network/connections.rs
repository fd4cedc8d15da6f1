//! The end of connections that cannot go on, because the guest's interface is now
//! connected elsewhere, or the other end has gone on with somebody else.
//!
//! Left alone, a program would wait for an answer until TCP gives up, a quarter of
//! an hour later, or for ever. SOCK_DESTROY of sock_diag(7) makes every call on such
//! a socket end with ECONNABORTED instead, also one that waits now.

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{DecodeError, Emitable, NLM_F_DUMP, Parseable};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use rustix::io::Errno;

use super::netlink::{Change, Netlink};

#[derive(Debug, thiserror::Error)]
pub(crate) enum ResetError {
    #[error(
        "the guest's connections could not be listed, which its kernel does with \
         CONFIG_INET_TCP_DIAG and CONFIG_INET_UDP_DIAG"
    )]
    List(#[source] io::Error),
    #[error(
        "a connection could not be reset, which the guest's kernel does with \
         CONFIG_INET_DIAG_DESTROY"
    )]
    Destroy(#[source] io::Error),
}

/// Sockets of one protocol and family, or one of them (`struct inet_diag_req_v2`).
struct Request {
    family: u8,
    protocol: u8,
    states: u32,
    socket: SocketId,
}

/// `struct inet_diag_sockid`: both ports and both addresses in network order, the
/// interface that the socket is bound to, and a number of its own.
type SocketId = [u8; SOCKET_ID_BYTES];

/// A socket with a peer; the beginning of `struct inet_diag_msg`.
struct Connection {
    family: u8,
    socket: SocketId,
}

// Of linux/sock_diag.h.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;

const INET: u8 = 2;
const INET6: u8 = 10;
const TCP: u8 = 6;
const UDP: u8 = 17;

const SOCKET_ID_BYTES: usize = 48;
const REQUEST_BYTES: usize = 56;

/// The states of include/net/tcp_states.h, as bits: all in which there is a peer,
/// which are neither 7 (closed) nor 10 (listening). A UDP socket that is connected
/// counts as established.
const TCP_STATES: u32 = 0x1ffe & !(1 << 7) & !(1 << 10);
const UDP_STATES: u32 = 1 << 1;

/// Resets what is connected to a peer outside the guest.
pub(crate) fn reset() -> Result<(), ResetError> {
    let mut netlink = Netlink::open(NETLINK_SOCK_DIAG).map_err(ResetError::List)?;
    let resets = resets(&mut netlink).map_err(ResetError::List)?;
    let reset = netlink.carry_out(&resets);
    reset.map_err(|refused| ResetError::Destroy(refused.source))
}

/// The end of each connection to a peer outside the guest.
pub(super) fn resets(netlink: &mut Netlink) -> io::Result<Vec<Change>> {
    let mut resets = Vec::new();
    for (protocol, states) in [(TCP, TCP_STATES), (UDP, UDP_STATES)] {
        for family in [INET, INET6] {
            let mut request = Request {
                family,
                protocol,
                states,
                socket: [0; SOCKET_ID_BYTES],
            };
            let connections = netlink.ask(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, &request)?;
            let leaving = connections.iter().filter(|one| leaves_the_guest(one));
            resets.extend(leaving.map(|connection: &Connection| {
                request.socket = connection.socket;
                let change = Change::new("connections", SOCK_DESTROY, 0, &request);
                // It may have ended by itself.
                change.forgiving(Errno::NOENT)
            }));
        }
    }
    Ok(resets)
}

/// Whether the peer is elsewhere. A connection to the socket's own address goes
/// through the loopback interface, as does one to 127.0.0.1.
fn leaves_the_guest(connection: &Connection) -> bool {
    let (local, peer) = (connection.address(4), connection.address(20));
    !peer.is_loopback() && peer != local
}

// === impl Request ===

impl Emitable for Request {
    fn buffer_len(&self) -> usize {
        REQUEST_BYTES
    }

    fn emit(&self, buffer: &mut [u8]) {
        let (head, socket) = buffer.split_at_mut(REQUEST_BYTES - SOCKET_ID_BYTES);
        // Without extensions, and a byte of padding.
        head[..4].copy_from_slice(&[self.family, self.protocol, 0, 0]);
        head[4..].copy_from_slice(&self.states.to_ne_bytes());
        socket.copy_from_slice(&self.socket);
    }
}

// === impl Connection ===

impl Parseable<[u8]> for Connection {
    fn parse(message: &[u8]) -> Result<Self, DecodeError> {
        let too_short = || DecodeError::buffer_too_small(message.len(), 4 + SOCKET_ID_BYTES);
        // Family, state, timer and retransmits come first.
        let (head, rest) = message.split_first_chunk::<4>().ok_or_else(too_short)?;
        Ok(Self {
            family: head[0],
            socket: *rest.first_chunk().ok_or_else(too_short)?,
        })
    }
}

impl Connection {
    /// The address at this place of the socket's id; an IPv4 address where it stands
    /// for one.
    fn address(&self, start: usize) -> IpAddr {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&self.socket[start..start + 16]);
        let [a, b, c, d, ..] = bytes;
        match self.family {
            INET => IpAddr::from([a, b, c, d]),
            _ => IpAddr::from(bytes).to_canonical(),
        }
    }
}
