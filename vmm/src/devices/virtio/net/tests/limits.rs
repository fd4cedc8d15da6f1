//! Rate limits.

use super::*;
use crate::config::Bucket;

fn operations(capacity: u64, refill_time_ms: u64) -> RateLimit {
    RateLimit {
        bytes: None,
        operations: Some(Bucket {
            capacity,
            refill_time_ms,
        }),
    }
}

fn bytes(capacity: u64, refill_time_ms: u64) -> RateLimit {
    RateLimit {
        bytes: Some(Bucket {
            capacity,
            refill_time_ms,
        }),
        operations: None,
    }
}

const HOUR_MS: u64 = 3_600_000;

#[test]
fn what_is_sent_too_fast_waits_and_goes() {
    let mut guest = Guest::with(MERGED, |config| config.tx = operations(1, 20));
    for seed in 0..4 {
        guest.offer_packet(&[0; 12], &frame(60, seed));
    }
    guest.net.queue_notified(TX);
    // More notifications make it no faster, and are no more waiting.
    guest.net.queue_notified(TX);
    let mut received = Vec::new();
    guest.serve_until(|guest| {
        received.extend(guest.received());
        received.len() == 4
    });
    assert_eq!(received, [0, 1, 2, 3].map(|seed| frame(60, seed)));
    assert_eq!(guest.tx.take_used().len(), 4);
    assert!(guest.counter("tx_throttled") > 0);
}

#[test]
fn what_comes_too_fast_waits_and_comes() {
    let mut guest = Guest::with(MERGED, |config| config.rx = bytes(100, 20));
    let places = guest.offer_buffers(&[256; 8]);
    for seed in 0..4 {
        guest.peer.send(&frame(100, seed)).unwrap();
    }
    let mut used = Vec::new();
    guest.serve_until(|guest| {
        used.extend(guest.rx.take_used());
        used.len() == 4
    });
    for (seed, used) in used.iter().enumerate() {
        let packet = guest.packet(&[*used], &places);
        assert_eq!(packet[12..], frame(100, seed as u8));
    }
    assert!(guest.counter("rx_throttled") > 0);
}

#[test]
fn a_limit_holds_until_it_is_lifted() {
    let mut guest = Guest::with(MERGED, |config| {
        config.tx = bytes(100, HOUR_MS);
        config.rx = operations(2, HOUR_MS);
    });
    guest.offer_buffers(&[2048; 8]);
    for seed in 0..4 {
        guest.offer_packet(&[0; 12], &frame(90, seed));
        guest.peer.send(&frame(90, seed)).unwrap();
    }
    guest.net.queue_notified(TX);
    guest.settle();
    assert_eq!(guest.received(), [frame(90, 0)]);
    assert_eq!(guest.tx.take_used().len(), 1);
    assert_eq!(guest.rx.take_used().len(), 2);
    assert_eq!(guest.counter("tx_throttled"), 1);
    assert_eq!(guest.counter("rx_throttled"), 1);

    // A new limit begins with a full bucket; the other one stays.
    let change = NetChange {
        tx: Some(bytes(180, HOUR_MS)),
        ..NetChange::default()
    };
    guest.net.change(change).unwrap();
    guest.settle();
    assert_eq!(guest.received(), [frame(90, 1), frame(90, 2)]);
    assert_eq!(guest.rx.take_used().len(), 0);

    let change = NetChange {
        rx: Some(RateLimit::default()),
        tx: Some(RateLimit::default()),
        link_up: None,
    };
    guest.net.change(change).unwrap();
    guest.settle();
    assert_eq!(guest.received(), [frame(90, 3)]);
    assert_eq!(guest.rx.take_used().len(), 2);
}

/// Behind the TAP are a bridge and a slow link, whose queue is charged to the TAP.
#[test]
fn a_full_tap_is_waited_for() {
    const SEND_BUFFER_BYTES: libc::c_int = 8_000;
    const FRAMES: u8 = 60;
    let mut guest = Guest::new(MERGED);
    let script = "ip link add br0 type bridge forward_delay 0 \
        && ip link add v0 type veth peer name v1 && ip link set tap0 master br0 \
        && ip link set v0 master br0 && ip link set br0 up && ip link set v1 up \
        && ip link set v0 up && tc qdisc add dev v0 root tbf rate 8mbit burst 2k limit 1m";
    guest.shell(script);
    guest.peer.set_send_buffer(SEND_BUFFER_BYTES).unwrap();
    // Whatever the bridge has said when it came up.
    guest.received();
    for seed in 0..FRAMES {
        guest.offer_packet(&[0; 12], &frame(1000, seed));
    }
    guest.net.queue_notified(TX);
    let mut used = guest.tx.take_used().len();
    assert!(used < usize::from(FRAMES), "it is never full");
    guest.serve_until(|guest| {
        used += guest.tx.take_used().len();
        used == usize::from(FRAMES)
    });
    let sent: Vec<_> = (0..FRAMES).map(|seed| frame(1000, seed)).collect();
    assert_eq!(guest.received(), sent);
    assert_eq!(guest.counter("tx_packets"), u64::from(FRAMES));
}

#[test]
fn a_packet_larger_than_the_bucket_leaves_a_debt() {
    let mut guest = Guest::with(MERGED, |config| config.rx = bytes(100, HOUR_MS));
    guest.offer_buffers(&[2048; 8]);
    guest.peer.send(&frame(1514, 0)).unwrap();
    guest.peer.send(&frame(60, 1)).unwrap();
    guest.settle();
    assert_eq!(guest.rx.take_used().len(), 1);
    assert_eq!(guest.counter("rx_throttled"), 1);
}
