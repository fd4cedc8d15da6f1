//! Pauses, snapshots and resets.

use virtio_bindings::virtio_net::VIRTIO_NET_F_STATUS;
use virtio_queue::QueueT;

use super::*;
use crate::config::Bucket;
use crate::devices::StateError;
use crate::devices::virtio::ChipState;

const HOUR_MS: u64 = 3_600_000;

fn one_in_an_hour() -> RateLimit {
    RateLimit {
        bytes: None,
        operations: Some(Bucket {
            capacity: 1,
            refill_time_ms: HOUR_MS,
        }),
    }
}

#[test]
fn a_pause_puts_back_what_was_taken_ahead() {
    let mut guest = Guest::new(MERGED);
    let places = guest.offer_buffers(&[600; 10]);
    guest.peer.send(&frame(1000, 0)).unwrap();
    guest.settle();
    let queues = guest.net.quiesce();
    let at = |queue: &Queue| (queue.next_avail(), queue.next_used());
    assert_eq!(at(&queues[RX]), (2, 2));
    // Meanwhile packets stay in the TAP.
    guest.peer.send(&frame(1000, 1)).unwrap();
    guest.settle();
    guest.activate(queues);
    guest.settle();
    let used = guest.rx.take_used();
    let heads: Vec<_> = used.iter().map(|used| used.0).collect();
    assert_eq!(heads, [0, 1, 2, 3].map(|place| places[place].0));
    assert_eq!(guest.packet(&used[..2], &places)[12..], frame(1000, 0));
    assert_eq!(guest.packet(&used[2..], &places)[12..], frame(1000, 1));
}

#[test]
fn a_packet_that_waits_for_buffers_outlives_a_pause() {
    let mut guest = Guest::new(MERGED);
    let mut places = guest.offer_buffers(&[600]);
    guest.peer.send(&frame(1000, 0)).unwrap();
    guest.settle();
    let queues = guest.net.quiesce();
    assert_eq!(queues[RX].next_avail(), 0);
    guest.activate(queues);
    places.extend(guest.offer_buffers(&[600]));
    guest.settle();
    let used = guest.rx.take_used();
    assert_eq!(guest.packet(&used, &places)[12..], frame(1000, 0));
}

#[test]
fn a_packet_that_waits_for_tokens_is_sent_once() {
    let mut guest = Guest::with(MERGED, |config| config.tx = one_in_an_hour());
    for seed in 0..3 {
        guest.offer_packet(&[0; 12], &frame(60, seed));
    }
    guest.net.queue_notified(TX);
    guest.settle();
    assert_eq!(guest.received(), [frame(60, 0)]);
    // A pause gives no tokens.
    let queues = guest.net.quiesce();
    assert_eq!(queues[TX].next_avail(), 1);
    guest.activate(queues);
    guest.settle();
    assert_eq!(guest.received(), Vec::<Vec<u8>>::new());
    // The clone has limits of its own: none.
    let (peer, tap) = TapPeer::new().unwrap();
    guest.restore(Some(tap));
    assert_eq!(
        guest.received(),
        Vec::<Vec<u8>>::new(),
        "on the parent's TAP"
    );
    guest.peer = peer;
    assert_eq!(guest.received(), [frame(60, 1), frame(60, 2)]);
    assert_eq!(guest.tx.take_used().len(), 3);
}

#[test]
fn a_paused_driver_is_told_of_its_link_afterwards() {
    let mut guest = Guest::new(MERGED | 1 << VIRTIO_NET_F_STATUS);
    let queues = guest.net.quiesce();
    let down = NetChange {
        link_up: Some(false),
        ..NetChange::default()
    };
    guest.net.change(down).unwrap();
    guest.settle();
    assert_eq!(guest.rx.interrupts(), 0);
    assert_eq!(guest.net.save(), ChipState::Net(NetState { link_up: true }));
    guest.activate(queues);
    assert_eq!(guest.rx.interrupts(), 1);
}

#[test]
fn a_clone_without_a_tap_has_a_link_that_is_down() {
    let mut guest = Guest::new(MERGED | 1 << VIRTIO_NET_F_STATUS);
    guest.offer_packet(&[0; 12], &frame(60, 0));
    guest.restore(None);
    // One interrupt for the change, one for the packet that was dropped.
    assert_eq!(guest.rx.interrupts(), 2);
    assert_eq!(guest.counter("tx_dropped_link_down"), 1);
    let mut status = [0xff; 2];
    guest.net.read_config(6, &mut status);
    assert_eq!(status, [0, 0]);
    assert_eq!(
        guest.net.save(),
        ChipState::Net(NetState { link_up: false })
    );
}

#[test]
fn the_state_of_another_chip_is_refused() {
    let mut net = Net::new(config(None)).unwrap();
    let refused = net.restore(ChipState::Rng);
    assert!(matches!(refused, Err(StateError::Kind)));
}

#[test]
fn a_reset_forgets_the_driver_and_its_packets() {
    let mut guest = Guest::new(MERGED);
    guest.offer_buffers(&[600]);
    guest.peer.send(&frame(1000, 0)).unwrap();
    guest.settle();
    guest.net.reset();
    assert_eq!(guest.counter("rx_dropped_no_buffer"), 1);
    guest.peer.send(&frame(60, 1)).unwrap();
    guest.settle();
    assert_eq!(guest.bytes(RX_BUFFERS + 600, 16), [0; 16]);

    guest.rx = Driver::new(&guest.memory, RX_RINGS, QUEUE_SIZE);
    guest.tx = Driver::new(&guest.memory, TX_RINGS, QUEUE_SIZE);
    guest.activate(vec![guest.rx.queue(), guest.tx.queue()]);
    let places = guest.offer_buffers(&[600]);
    guest.settle();
    let used = guest.rx.take_used();
    assert_eq!(guest.packet(&used, &places)[12..], frame(60, 1));
}
