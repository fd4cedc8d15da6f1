//! What sandboxes tried in vain. The rules hand a few packets a second of each
//! reason to an NFLOG group, which is heard here: nothing is polled, and a flood
//! costs no more than those few.

use std::io;
use std::net::IpAddr;

use etherparse::{LaxNetSlice, LaxSlicedPacket, TransportSlice};
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_netfilter::nflog::{
    ConfigCmd, ConfigMode, PacketNla, ULogMessage, config_request,
};
use netlink_packet_netfilter::{NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily};
use netlink_sys::constants::NETLINK_NETFILTER;
use netlink_sys::{AsyncSocket as _, AsyncSocketExt as _, SocketAddr, TokioSocket};
use tokio::sync::mpsc;

use super::rules::{AT_TAP, LOG_GROUP, REASONS};

/// Of a packet, as much as all headers together may have.
const HEADERS_BYTES: u32 = 128;

/// An attempt that the firewall denied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denied {
    /// The sandbox's slot.
    pub slot: u32,
    /// The name of the counter that it is one of, such as `private`.
    pub reason: &'static str,
    /// Empty where the packet had no address.
    pub destination: Option<IpAddr>,
    /// IANA's number: 6 for TCP, 17 for UDP.
    pub protocol: Option<u8>,
    pub port: Option<u16>,
}

/// A netlink socket that hears a slot's denied packets.
pub(super) struct Listener {
    socket: TokioSocket,
}

// === impl Listener ===

impl Listener {
    /// In the calling thread's namespace.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
        socket.socket_mut().bind_auto()?;
        let mut request = config_request(
            NetfilterProtoFamily::Unspec,
            LOG_GROUP,
            vec![
                ConfigCmd::Bind.into(),
                ConfigMode::new_packet(HEADERS_BYTES).into(),
            ],
        );
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        // The kernel answers before this returns.
        let socket_ref = socket.socket_ref();
        socket_ref.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
        let (answer, _) = socket_ref.recv_from_full()?;
        match parse(&answer) {
            Some(NetlinkPayload::Error(error)) if error.code.is_some() => Err(error.to_io()),
            _ => Ok(Self { socket }),
        }
    }

    /// Tells `events` until the socket fails. One that nobody takes in time is
    /// lost: the counters have it all the same.
    pub(super) async fn listen(self, slot: u32, events: mpsc::Sender<Denied>) {
        loop {
            match self.socket.recv_from_full().await {
                Ok((bytes, _)) => {
                    if let Some(denied) = attempt(slot, &bytes) {
                        let _ = events.try_send(denied);
                    }
                }
                // More came than the socket holds; it goes on with what comes now.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) => {
                    tracing::warn!(slot, %error, "denied attempts are no longer told");
                    return;
                }
            }
        }
    }
}

fn parse(bytes: &[u8]) -> Option<NetlinkPayload<NetfilterMessage>> {
    let message = NetlinkMessage::<NetfilterMessage>::deserialize(bytes).ok()?;
    Some(message.payload)
}

fn attempt(slot: u32, bytes: &[u8]) -> Option<Denied> {
    let NetlinkPayload::InnerMessage(message) = parse(bytes)? else {
        return None;
    };
    let NetfilterMessageInner::ULog(ULogMessage::Packet(attributes)) = message.inner else {
        return None;
    };
    let mut reason = None;
    let mut packet = Vec::new();
    for attribute in attributes {
        match attribute {
            PacketNla::Prefix(prefix) => {
                let named = |name: &&&str| prefix.as_bytes() == name.as_bytes();
                reason = REASONS.iter().chain(&AT_TAP).find(named).copied();
            }
            PacketNla::Payload(payload) => packet = payload,
            _ => {}
        }
    }
    Some(Denied::of(slot, reason?, &packet))
}

// === impl Denied ===

impl Denied {
    /// The guest made `packet`: it may be anything, and is cut short.
    fn of(slot: u32, reason: &'static str, packet: &[u8]) -> Self {
        let mut denied = Self {
            slot,
            reason,
            destination: None,
            protocol: None,
            port: None,
        };
        let Ok(headers) = LaxSlicedPacket::from_ip(packet) else {
            return denied;
        };
        denied.destination = match &headers.net {
            Some(LaxNetSlice::Ipv4(ip)) => Some(ip.header().destination_addr().into()),
            Some(LaxNetSlice::Ipv6(ip)) => Some(ip.header().destination_addr().into()),
            _ => None,
        };
        denied.protocol = headers.ip_payload().map(|payload| payload.ip_number.0);
        denied.port = match &headers.transport {
            Some(TransportSlice::Tcp(tcp)) => Some(tcp.destination_port()),
            Some(TransportSlice::Udp(udp)) => Some(udp.destination_port()),
            _ => None,
        };
        denied
    }
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;
    use proptest::prelude::*;

    use super::*;

    fn packet() -> Vec<u8> {
        let builder = PacketBuilder::ipv4([172, 30, 0, 2], [169, 254, 169, 254], 64).udp(5, 80);
        let mut bytes = Vec::new();
        builder.write(&mut bytes, b"payload").unwrap();
        bytes
    }

    #[test]
    fn a_packet_says_where_it_went() {
        let denied = Denied::of(7, "private", &packet());
        assert_eq!(denied.destination, Some("169.254.169.254".parse().unwrap()));
        assert_eq!((denied.protocol, denied.port), (Some(17), Some(80)));
    }

    proptest! {
        #[test]
        fn any_packet_is_read_without_harm(
            bytes in proptest::collection::vec(any::<u8>(), 0..160),
            cut in 0_usize..40,
            at in 0_usize..30,
            with in any::<u8>(),
        ) {
            Denied::of(0, "private", &bytes);
            attempt(0, &bytes);
            let mut packet = packet();
            packet.truncate(cut);
            if let Some(byte) = packet.get_mut(at) {
                *byte = with;
            }
            let denied = Denied::of(0, "private", &packet);
            prop_assert!(denied.port.is_none() || denied.destination.is_some());
        }
    }
}
