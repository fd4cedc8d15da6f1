//! Checksums and segments that are left to whoever comes last.

use std::net::UdpSocket;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_TCPV4,
};

use super::*;
use crate::testing::tap::{HOST_ADDRESS, VNET_HEADER_BYTES};

const GUEST_ADDRESS: [u8; 4] = [10, 0, 0, 2];
const ETHERNET_BYTES: usize = 14;
const IPV4_BYTES: usize = 20;
const TCP_BYTES: usize = 20;
const TCP: u8 = 6;
const UDP: u8 = 17;

const OFFLOADS: u64 = MERGED | 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;

fn sum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|word| {
        let low = word.get(1).copied().unwrap_or(0);
        u32::from(u16::from_be_bytes([word[0], low]))
    });
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    (sum + (sum >> 16)) as u16
}

/// An Ethernet frame of IPv4. The transport's checksum is that of the pseudo
/// header alone, as whoever leaves the rest to others has to have it.
fn ipv4(from: [u8; 4], to: [u8; 4], to_mac: [u8; 6], protocol: u8, segment: &[u8]) -> Vec<u8> {
    let mut ip = vec![0x45, 0];
    ip.extend(((IPV4_BYTES + segment.len()) as u16).to_be_bytes());
    ip.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
    ip.extend(from);
    ip.extend(to);
    let checksum = !sum(&ip);
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    let mut segment = segment.to_vec();
    let length = (segment.len() as u16).to_be_bytes();
    let pseudo = [&from[..], &to, &[0, protocol], &length].concat();
    let at = checksum_offset(protocol);
    segment[at..at + 2].copy_from_slice(&sum(&pseudo).to_be_bytes());
    [&to_mac[..], &GUEST_MAC, &[0x08, 0], &ip, &segment].concat()
}

fn checksum_offset(protocol: u8) -> usize {
    if protocol == UDP { 6 } else { 16 }
}

/// `struct virtio_net_hdr` of a frame whose checksum is missing.
fn header(protocol: u8, gso_type: u32, gso_size: u16) -> [u8; VNET_HEADER_BYTES] {
    let mut header = [0; VNET_HEADER_BYTES];
    header[0] = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
    header[1] = gso_type as u8;
    if gso_size > 0 {
        let headers = ETHERNET_BYTES + IPV4_BYTES + TCP_BYTES;
        header[2..4].copy_from_slice(&(headers as u16).to_le_bytes());
        header[4..6].copy_from_slice(&gso_size.to_le_bytes());
    }
    let start = (ETHERNET_BYTES + IPV4_BYTES) as u16;
    header[6..8].copy_from_slice(&start.to_le_bytes());
    header[8..10].copy_from_slice(&(checksum_offset(protocol) as u16).to_le_bytes());
    header
}

fn widened(header: [u8; VNET_HEADER_BYTES]) -> [u8; HEADER_BYTES] {
    let mut wide = [0; HEADER_BYTES];
    wide[..VNET_HEADER_BYTES].copy_from_slice(&header);
    wide
}

/// Data of one TCP segment, larger than any link takes.
fn tcp_frame(payload_bytes: usize) -> Vec<u8> {
    let mut tcp = vec![0; TCP_BYTES];
    tcp[..4].copy_from_slice(&[0x10, 0, 0x20, 0]);
    tcp[4..8].copy_from_slice(&1000u32.to_be_bytes());
    tcp[12] = (TCP_BYTES as u8 / 4) << 4;
    tcp[13] = 0x10; // ACK
    tcp[14..16].copy_from_slice(&0x7fffu16.to_be_bytes());
    tcp.extend((0..payload_bytes).map(|at| (at % 253) as u8));
    ipv4(HOST_ADDRESS.octets(), GUEST_ADDRESS, GUEST_MAC, TCP, &tcp)
}

#[test]
fn a_segment_of_60_kb_goes_out_in_one() {
    let mut guest = Guest::new(OFFLOADS);
    let frame = tcp_frame(60_000);
    let header = header(TCP, VIRTIO_NET_HDR_GSO_TCPV4, 1448);
    guest.transmit(&widened(header), &frame);
    let (told, received) = guest.peer.try_receive().unwrap().unwrap();
    assert!(received == frame, "{} bytes", received.len());
    assert_eq!(told, header);
    assert_eq!(guest.counter("tx_bytes"), frame.len() as u64);
}

#[test]
fn a_segment_of_60_kb_is_merged_from_many_buffers() {
    let mut guest = Guest::new(OFFLOADS);
    let frame = tcp_frame(60_000);
    let sent = header(TCP, VIRTIO_NET_HDR_GSO_TCPV4, 1448);
    let mut places = guest.offer_buffers(&[1536; 20]);
    guest.peer.send_with_header(&sent, &frame).unwrap();
    guest.settle();
    // Half of it has no room yet.
    assert_eq!(guest.rx.take_used(), []);
    places.extend(guest.offer_buffers(&[1536; 30]));
    guest.settle();
    let used = guest.rx.take_used();
    let packet = guest.packet(&used, &places);
    assert!(packet[12..] == frame, "{} bytes", packet.len());
    assert_eq!(usize::from(num_buffers(&packet)), used.len());
    assert_eq!(used.len(), (12 + frame.len()).div_ceil(1536));
    assert_eq!(packet[..2], sent[..2], "a TCP segment without its checksum");
    assert_eq!(
        packet[4..10],
        sent[4..],
        "its size, and where the checksum goes"
    );
}

#[test]
fn a_clones_tap_is_told_what_the_driver_takes() {
    let mut guest = Guest::new(OFFLOADS);
    guest.offer_buffers(&[4096; 40]);
    let (peer, tap) = TapPeer::new().unwrap();
    guest.restore(Some(tap));
    guest.peer = peer;
    assert_eq!(guest.rx.interrupts(), 0, "the link is as it was");
    let sent = header(TCP, VIRTIO_NET_HDR_GSO_TCPV4, 1448);
    let frame = tcp_frame(60_000);
    guest.peer.send_with_header(&sent, &frame).unwrap();
    guest.settle();
    let used = guest.rx.take_used();
    let bytes: u32 = used.iter().map(|used| used.1).sum();
    assert_eq!(bytes as usize, HEADER_BYTES + frame.len());
    assert_eq!(
        usize::from(num_buffers(&guest.bytes(RX_BUFFERS, 12))),
        used.len()
    );
}

/// What the driver does not take, the host does before: the TAP is told.
#[test]
fn without_the_features_segments_and_checksums_are_whole() {
    let mut guest = Guest::new(MERGED);
    let places = guest.offer_buffers(&[2048; 64]);
    let sent = header(TCP, VIRTIO_NET_HDR_GSO_TCPV4, 1000);
    guest
        .peer
        .send_with_header(&sent, &tcp_frame(10_000))
        .unwrap();
    guest.settle();
    let used = guest.rx.take_used();
    assert_eq!(used.len(), 10);
    for used in used {
        let packet = guest.packet(&[used], &places);
        assert_eq!(packet[..10], [0; 10]);
        let segment = &packet[12 + ETHERNET_BYTES + IPV4_BYTES..];
        assert_eq!(segment.len(), TCP_BYTES + 1000);
        let length = (segment.len() as u16).to_be_bytes();
        let (from, to) = (HOST_ADDRESS.octets(), GUEST_ADDRESS);
        let whole = [&from[..], &to, &[0, TCP], &length, segment].concat();
        assert_eq!(sum(&whole), 0xffff);
    }
}

#[test]
fn the_host_takes_a_frame_without_its_checksum() {
    let mut guest = Guest::new(MERGED);
    let socket = guest
        .peer
        .within(|| UdpSocket::bind((HOST_ADDRESS, 7)))
        .unwrap()
        .unwrap();
    // Broadcast: who asks for no address needs to know none.
    let frame = |payload: &[u8]| {
        let length = (8 + payload.len()) as u16;
        let udp = [
            &[0x10, 0, 0, 7][..],
            &length.to_be_bytes(),
            &[0, 0],
            payload,
        ]
        .concat();
        ipv4(GUEST_ADDRESS, HOST_ADDRESS.octets(), [0xff; 6], UDP, &udp)
    };
    // Without the flag the checksum is wrong, and the stack drops it.
    guest.transmit(&[0; 12], &frame(b"wrong"));
    guest.transmit(&widened(header(UDP, 0, 0)), &frame(b"partial"));
    socket
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let mut bytes = [0; 16];
    let (len, from) = socket.recv_from(&mut bytes).unwrap();
    assert_eq!(&bytes[..len], b"partial");
    assert_eq!(from.ip(), std::net::IpAddr::from(GUEST_ADDRESS));
    assert_eq!(guest.counter("tx_packets"), 2);
}
