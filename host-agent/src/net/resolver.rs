//! The sockets of a slot's resolver.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};

use super::{GATEWAY4, GATEWAY6};

const DNS_PORT: u16 = 53;

/// Bound to the gateway's addresses in a slot, and usable from any thread: a socket
/// stays in the namespace it was made in. None of them blocks.
#[derive(Debug)]
pub struct ResolverSockets {
    pub udp: [UdpSocket; 2],
    pub tcp: [TcpListener; 2],
}

// === impl ResolverSockets ===

impl ResolverSockets {
    /// In the calling thread's namespace.
    pub(super) fn bind() -> io::Result<Self> {
        let [ipv4, ipv6] = [
            SocketAddr::from((GATEWAY4, DNS_PORT)),
            SocketAddr::from((GATEWAY6, DNS_PORT)),
        ];
        let udp = |address: SocketAddr| {
            let socket = UdpSocket::bind(address)?;
            socket.set_nonblocking(true)?;
            Ok::<_, io::Error>(socket)
        };
        let tcp = |address: SocketAddr| {
            let socket = TcpListener::bind(address)?;
            socket.set_nonblocking(true)?;
            Ok::<_, io::Error>(socket)
        };
        Ok(Self {
            udp: [udp(ipv4)?, udp(ipv6)?],
            tcp: [tcp(ipv4)?, tcp(ipv6)?],
        })
    }
}
