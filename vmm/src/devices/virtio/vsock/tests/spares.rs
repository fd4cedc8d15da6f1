//! Spare connections, as the machine that opened them has them.

use std::io::ErrorKind;

use super::super::packet::{Header, Key, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::super::{MAX_CONNECTIONS, MAX_SPARES};
use super::guest::{Guest, QUEUE_SIZE};
use crate::devices::virtio::VirtioDevice as _;

const PORT: u32 = 1024;

fn refusal(guest: &mut Guest, guest_port: u32, count: u32) -> ErrorKind {
    let error = guest.device.open_spares(guest_port, count).unwrap_err();
    error.kind()
}

#[test]
fn device_opens_spares_and_keeps_them() {
    let mut guest = Guest::new();
    let keys = guest.open_spares(PORT, 3);
    assert_eq!(guest.counter("spares_open"), 3);
    assert_eq!(guest.counter("connections_open"), 3);
    assert_eq!(guest.counter("connections_opened"), 3);
    for key in &keys {
        guest.send_data(*key, b"SETTINGS");
    }
    guest.assert_quiet();
    assert_eq!(guest.counter("tx_bytes"), 24);
    assert!(
        guest.device.take_spares().is_empty(),
        "only clones have them"
    );
    assert_eq!(guest.counter("spares_open"), 3);
}

#[test]
fn too_many_spares_are_refused() {
    let mut guest = Guest::new();
    assert_eq!(refusal(&mut guest, u32::MAX, 1), ErrorKind::InvalidInput);
    assert_eq!(refusal(&mut guest, PORT, 17), ErrorKind::InvalidInput);
    assert_eq!(refusal(&mut guest, PORT, u32::MAX), ErrorKind::InvalidInput);
    guest.open_spares(PORT, 10);
    let other = PORT + 1;
    assert_eq!(refusal(&mut guest, other, 7), ErrorKind::ResourceBusy);
    guest.open_spares(other, 6);
    assert_eq!(refusal(&mut guest, PORT + 2, 1), ErrorKind::ResourceBusy);
    // Those that there are need not be asked for again.
    guest.device.open_spares(PORT, 10).unwrap();
    guest.device.open_spares(other, 2).unwrap();
    guest.assert_quiet();
    assert_eq!(guest.counter("connections_open"), MAX_SPARES as u64);
}

#[test]
fn spares_count_among_all_connections() {
    let mut guest = Guest::new();
    let streams: Vec<_> = (0..u32::try_from(MAX_CONNECTIONS - 1).unwrap())
        .map(|guest_port| {
            guest.open_from_guest(Key {
                host_port: 1,
                guest_port,
            })
        })
        .collect();
    assert_eq!(refusal(&mut guest, PORT, 2), ErrorKind::ResourceBusy);
    guest.open_spares(PORT, 1);
    guest.send(
        guest.packet(
            Key {
                host_port: 1,
                guest_port: 5000,
            },
            Op::Request,
        ),
        &[],
    );
    guest.expect_op(Op::Reset);
    drop(streams);
}

#[test]
fn spares_need_a_driver() {
    let mut guest = Guest::inactive();
    assert_eq!(refusal(&mut guest, PORT, 1), ErrorKind::NotConnected);
    guest.activate();
    // They wait for RX buffers, as all else does.
    guest.device.open_spares(PORT, 2).unwrap();
    guest.fill_rx(QUEUE_SIZE);
    guest.expect_op(Op::Request);
    guest.expect_op(Op::Request);
    guest.device.reset();
    assert_eq!(guest.counter("connections_open"), 0);
    assert_eq!(refusal(&mut guest, PORT, 1), ErrorKind::NotConnected);
    guest.activate();
    guest.fill_rx(QUEUE_SIZE);
    guest.open_spares(PORT, 16);
}

#[test]
fn spare_that_the_guest_ends_just_goes() {
    let mut guest = Guest::new();
    // Refused.
    guest.device.open_spares(PORT, 1).unwrap();
    let request = guest.expect_op(Op::Request);
    let refused = Key {
        host_port: request.src_port,
        guest_port: PORT,
    };
    guest.send(guest.packet(refused, Op::Reset), &[]);
    // Reset, and shut down: one half is enough, and what it has sent is moot.
    let keys = guest.open_spares(PORT, 4);
    guest.send(guest.packet(keys[0], Op::Reset), &[]);
    guest.assert_quiet();
    for (key, flags) in keys[1..]
        .iter()
        .zip([SHUTDOWN_SEND, SHUTDOWN_RECEIVE, SHUTDOWN_BOTH])
    {
        guest.send_data(*key, b"SETTINGS");
        let shutdown = Header {
            flags,
            ..guest.packet(*key, Op::Shutdown)
        };
        guest.send(shutdown, &[]);
        assert_eq!(guest.expect_op(Op::Reset).src_port, key.host_port);
    }
    guest.assert_quiet();
    assert_eq!(guest.counter("connections_open"), 0);
    assert_eq!(guest.counter("spares_open"), 0);
    guest.open_spares(PORT, 16);
}

#[test]
fn spare_that_the_guest_does_not_accept_times_out() {
    let mut guest = Guest::new();
    guest.device.open_spares(PORT, 1).unwrap();
    guest.expect_op(Op::Request);
    assert_eq!(guest.counter("spares_open"), 0);
    guest.expect_op(Op::Reset);
    assert_eq!(guest.counter("connections_open"), 0);
}

#[test]
fn flood_on_a_spare_is_bounded_by_its_credit() {
    let mut guest = Guest::new();
    let key = guest.open_spares(PORT, 1)[0];
    let mut sent = 0;
    while guest.counter("connections_open") == 1 {
        guest.send_data(key, &[1; 60_000]);
        guest.settle();
        sent += 60_000;
        assert!(sent < 2 << 20);
    }
    assert_eq!(guest.counter("buffered_bytes"), 0);
    assert_eq!(guest.counter("connections_reset"), 1);
}
