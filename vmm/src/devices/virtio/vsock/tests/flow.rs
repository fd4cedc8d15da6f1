//! Credit, buffers and turns: who may send how much, and when.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::thread;

use super::super::packet::{Header, Key, Op, SHUTDOWN_BOTH, SHUTDOWN_SEND};
use super::super::{BUF_ALLOC_BYTES, MAX_CONNECTIONS, SMALL_BUF_ALLOC_BYTES};
use super::guest::{Guest, QUEUE_SIZE, noise, read_now};
use crate::devices::virtio::VirtioDevice as _;

const TRANSFER_LEN: usize = 8 << 20;
const PACKET_LEN: usize = 64 << 10;

/// The guest's end of one stream, as its kernel keeps it.
#[derive(Clone)]
pub(super) struct Socket {
    key: Key,
    /// Ours, as told to the device.
    buf_alloc: u32,
    fwd_cnt: u32,
    /// The device's, as told to us.
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    sent: u32,
    pub(super) received: Vec<u8>,
    ended: bool,
}

// === impl Socket ===

impl Socket {
    pub(super) fn new(key: Key, buf_alloc: u32) -> Self {
        Self {
            key,
            buf_alloc,
            fwd_cnt: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            sent: 0,
            received: Vec::new(),
            ended: false,
        }
    }

    fn packet(&self, guest: &Guest, op: Op) -> Header {
        Header {
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
            ..guest.packet(self.key, op)
        }
    }

    /// Takes all packets that came; tells the device of the room they left.
    pub(super) fn take(&mut self, guest: &mut Guest) {
        let before = self.fwd_cnt;
        let mut asked = false;
        while let Some((header, payload)) = guest.received.pop_front() {
            self.peer_buf_alloc = header.buf_alloc;
            self.peer_fwd_cnt = header.fwd_cnt;
            match Op::from_wire(header.op).unwrap() {
                Op::Data => {
                    self.received.extend(&payload);
                    self.fwd_cnt = self.fwd_cnt.wrapping_add(header.len);
                    let unread = self.fwd_cnt.wrapping_sub(before);
                    assert!(unread <= self.buf_alloc, "more than the guest's credit");
                }
                Op::CreditRequest => asked = true,
                Op::Shutdown => self.ended = header.flags & SHUTDOWN_SEND != 0,
                Op::CreditUpdate => {}
                other => panic!("{other:?}"),
            }
        }
        if self.fwd_cnt != before || asked {
            guest.send(self.packet(guest, Op::CreditUpdate), &[]);
        }
    }

    fn credit(&self) -> usize {
        let in_flight = self.sent.wrapping_sub(self.peer_fwd_cnt);
        self.peer_buf_alloc.saturating_sub(in_flight) as usize
    }

    /// Sends what credit allows of `data`; gives the length sent.
    pub(super) fn send(&mut self, guest: &mut Guest, data: &[u8]) -> usize {
        let len = self.queue(guest, data);
        if len > 0 {
            guest.device.queue_notified(1);
        }
        len
    }

    /// The same, without telling the device.
    pub(super) fn queue(&mut self, guest: &mut Guest, data: &[u8]) -> usize {
        let len = data.len().min(PACKET_LEN).min(self.credit());
        if len > 0 {
            let mut header = self.packet(guest, Op::Data);
            header.len = u32::try_from(len).unwrap();
            guest.queue_packet(header, &data[..len]);
            self.sent = self.sent.wrapping_add(header.len);
        }
        len
    }

    /// Asks for the device's credit and waits for it.
    pub(super) fn learn_credit(&mut self, guest: &mut Guest) {
        guest.send(self.packet(guest, Op::CreditRequest), &[]);
        guest.wait_for(|guest| {
            self.take(guest);
            (self.peer_buf_alloc > 0).then_some(())
        });
    }
}

#[test]
fn megabytes_go_both_ways_at_once() {
    let mut guest = Guest::new();
    let (key, client) = guest.open_from_host(1000);
    let (down, up) = (noise(TRANSFER_LEN), noise(TRANSFER_LEN + 1));

    let mut writer = client.try_clone().unwrap();
    let to_guest = down.clone();
    let writing = thread::spawn(move || {
        writer.write_all(&to_guest).unwrap();
        writer.shutdown(std::net::Shutdown::Write).unwrap();
    });
    let mut reader = client;
    let up_len = up.len();
    let reading = thread::spawn(move || {
        let mut bytes = vec![0; up_len];
        reader.read_exact(&mut bytes).unwrap();
        bytes
    });

    let mut socket = Socket::new(key, 100_000);
    socket.learn_credit(&mut guest);
    let mut sent = 0;
    guest.wait_for(|guest| {
        socket.take(guest);
        sent += socket.send(guest, &up[sent..]);
        (sent == up.len() && socket.ended && socket.received.len() == down.len()).then_some(())
    });
    // No assert_eq: it would print megabytes.
    assert!(socket.received == down);
    guest.wait_for(|_| reading.is_finished().then_some(()));
    assert!(reading.join().unwrap() == up);
    writing.join().unwrap();
    assert_eq!(guest.counter("rx_bytes"), down.len() as u64);
    assert_eq!(guest.counter("tx_bytes"), up.len() as u64);
    assert_eq!(guest.counter("buffered_bytes"), 0);
}

#[test]
fn stream_passes_where_counters_wrap() {
    let mut guest = Guest::new();
    let (key, mut client) = guest.open_from_host(1000);
    // Only differences count, so a wrapped fwd_cnt looks like a small one.
    let mut update = guest.packet(key, Op::CreditUpdate);
    update.fwd_cnt = u32::MAX - 9;
    update.buf_alloc = 30;
    guest.send(update, &[]);
    client.write_all(&[7; 100]).unwrap();
    assert_eq!(guest.expect().1, [7; 20]);
}

#[test]
fn device_stops_at_the_guests_credit() {
    let mut guest = Guest::new();
    let (key, mut client) = guest.open_from_host(1000);
    let mut update = guest.packet(key, Op::CreditUpdate);
    update.buf_alloc = 5000;
    guest.send(update, &[]);
    let data = noise(12_000);
    client.write_all(&data).unwrap();

    let (first, second) = (guest.expect().1, guest.expect().1);
    assert_eq!([first, second].concat(), data[..5000]);
    guest.expect_op(Op::CreditRequest);
    guest.assert_quiet();
    assert!(!guest.source_is_ready(), "a stream without credit spins");

    update.fwd_cnt = 5000;
    guest.send(update, &[]);
    let (first, second) = (guest.expect().1, guest.expect().1);
    assert_eq!([first, second].concat(), data[5000..10_000]);
    guest.expect_op(Op::CreditRequest);
    update.fwd_cnt = 10_000;
    guest.send(update, &[]);
    assert_eq!(guest.expect().1, data[10_000..]);
    guest.assert_quiet();
}

#[test]
fn host_waits_for_rx_buffers_without_spinning() {
    for features in [1 << 29, 0] {
        let mut guest = Guest::inactive();
        guest.negotiate(features);
        guest.activate();
        guest.refill = false;
        guest.fill_rx(1);
        let mut client = guest.dial("CONNECT 4\n");
        let request = guest.expect_op(Op::Request);
        let key = Key {
            host_port: request.src_port,
            guest_port: 4,
        };
        guest.send(guest.packet(key, Op::Response), &[]);
        client.write_all(&[1; 10_000]).unwrap();
        drop(client);
        guest.settle();
        assert_eq!(guest.received.len(), 0);
        assert!(!guest.source_is_ready(), "no RX buffer, and yet it spins");

        guest.fill_rx(QUEUE_SIZE - 1);
        let lengths: Vec<_> = (0..3).map(|_| guest.expect().0.len).collect();
        assert_eq!(lengths, [4096, 4096, 1808]);
        guest.expect_op(Op::Shutdown);
    }
}

#[test]
fn one_interrupt_tells_of_many_packets() {
    let mut guest = Guest::new();
    let (_, mut client) = guest.open_from_host(1000);
    client.write_all(&[1; 65_536]).unwrap();
    let _ = guest.interrupt.irqfd().read();
    while guest.source_is_ready() {
        guest.device.source_ready(0);
    }
    assert_eq!(guest.interrupt.irqfd().read().unwrap(), 1);
    guest.drain_rx();
    assert_eq!(guest.received.len(), 16);
}

/// A guest that has filled the host's socket and the device's buffer.
fn stall(guest: &mut Guest) -> (Socket, UnixStream, Vec<u8>) {
    let (key, client) = guest.open_from_host(1000);
    let mut socket = Socket::new(key, 4096);
    socket.learn_credit(guest);
    let data = noise(4 << 20);
    let mut sent = 0;
    loop {
        guest.settle();
        socket.take(guest);
        match socket.send(guest, &data[sent..]) {
            0 => break,
            len => sent += len,
        }
    }
    // Up to a quarter of the credit may be the host's and not announced yet.
    let buffered = guest.counter("buffered_bytes");
    let full = u64::from(BUF_ALLOC_BYTES);
    assert!((full * 3 / 4..=full).contains(&buffered), "{buffered}");
    assert!(!guest.source_is_ready());
    (socket, client, data[..sent].to_vec())
}

fn drain(guest: &mut Guest, client: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    guest.wait_for(|_| {
        if let Some(more) = read_now(client) {
            bytes.extend(more);
        }
        (bytes.len() >= len).then_some(())
    });
    bytes
}

#[test]
fn slow_reader_costs_no_more_than_its_buffer() {
    let mut guest = Guest::new();
    let (mut socket, mut client, data) = stall(&mut guest);
    assert!(drain(&mut guest, &mut client, data.len()) == data);
    assert_eq!(guest.counter("buffered_bytes"), 0);
    guest.settle();
    socket.take(&mut guest);
    assert!(socket.credit() >= BUF_ALLOC_BYTES as usize / 2);
    assert_eq!(guest.counter("connections_reset"), 0);
}

#[test]
fn slow_reader_gets_all_that_was_sent_before_the_close() {
    // A Linux guest that closes sends SHUTDOWN; it tires after 8 s and sends RST.
    for tires in [false, true] {
        let mut guest = Guest::new();
        let (socket, mut client, data) = stall(&mut guest);
        let mut shutdown = socket.packet(&guest, Op::Shutdown);
        shutdown.flags = SHUTDOWN_BOTH;
        guest.send(shutdown, &[]);
        if tires {
            guest.send(socket.packet(&guest, Op::Reset), &[]);
        }
        guest.assert_quiet();
        assert!(drain(&mut guest, &mut client, data.len()) == data);
        if tires {
            guest.assert_quiet();
        } else {
            guest.expect_op(Op::Reset);
        }
        assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
        assert_eq!(guest.counter("connections_open"), 0);
        assert_eq!(guest.counter("connections_reset"), 0);
    }
}

#[test]
fn reader_that_leaves_frees_the_buffer() {
    let mut guest = Guest::new();
    let (_, client, _) = stall(&mut guest);
    drop(client);
    guest.wait_for(|guest| {
        guest
            .received
            .pop_front()
            .filter(|(header, _)| header.op == Op::Shutdown as u16)
    });
    assert_eq!(guest.counter("buffered_bytes"), 0);
}

#[test]
fn thousand_connections_each_get_their_own_bytes() {
    let mut guest = Guest::new();
    let mut clients: Vec<(Key, UnixStream)> =
        (0..1000).map(|port| guest.open_from_host(port)).collect();
    assert_eq!(guest.counter("connections_open"), 1000);
    for (key, client) in &mut clients {
        client.write_all(&key.guest_port.to_le_bytes()).unwrap();
    }
    let mut last_buf_alloc = 0;
    for _ in 0..1000 {
        let (header, payload) = guest.expect();
        assert_eq!(payload, header.dst_port.to_le_bytes());
        last_buf_alloc = header.buf_alloc;
        let key = Key {
            host_port: header.src_port,
            guest_port: header.dst_port,
        };
        let mut echo = guest.packet(key, Op::Data);
        echo.len = 4;
        guest.send(echo, &payload);
    }
    assert_eq!(last_buf_alloc, SMALL_BUF_ALLOC_BYTES);
    for (key, client) in &mut clients {
        let mut echo = [0; 4];
        client.read_exact(&mut echo).unwrap();
        assert_eq!(echo, key.guest_port.to_le_bytes());
    }
    drop(clients);
    for _ in 0..1000 {
        let header = guest.expect_op(Op::Shutdown);
        let key = Key {
            host_port: header.src_port,
            guest_port: header.dst_port,
        };
        guest.send(guest.packet(key, Op::Reset), &[]);
    }
    assert_eq!(guest.counter("connections_open"), 0);
    assert_eq!(guest.counter("connections_reset"), 0);
}

#[test]
fn connections_beyond_the_limit_are_refused() {
    let mut guest = Guest::new();
    let key = |guest_port| Key {
        host_port: 1,
        guest_port,
    };
    let streams: Vec<_> = (0..u32::try_from(MAX_CONNECTIONS).unwrap())
        .map(|port| guest.open_from_guest(key(port)))
        .collect();
    guest.send(guest.packet(key(5000), Op::Request), &[]);
    guest.expect_op(Op::Reset);
    let mut client = guest.dial("CONNECT 1\n");
    guest.settle();
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    assert_eq!(guest.counter("handshakes_refused"), 1);
    drop(streams);
}

#[test]
fn busy_connection_leaves_turns_to_others() {
    let mut guest = Guest::new();
    guest.refill = false;
    let (_, mut busy) = guest.open_from_host(1);
    let (_, mut other) = guest.open_from_host(2);
    busy.set_nonblocking(true).unwrap();
    while busy.write(&[1; 4096]).is_ok() {}
    other.write_all(b"me too").unwrap();
    let before_other = guest.wait_for(|guest| {
        guest
            .received
            .iter()
            .position(|(header, _)| header.dst_port == 2)
    });
    // A connection's first turn is one buffer, of the fifty that wait.
    assert_eq!(before_other, 1);
    guest.settle();
    assert!(guest.received.len() > 10);
}
