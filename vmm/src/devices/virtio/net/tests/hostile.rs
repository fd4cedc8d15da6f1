//! Drivers that break every rule.

use proptest::prelude::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::QueueT;
use virtio_queue::desc::RawDescriptor;

use super::*;

const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;
const END: u64 = MEMORY_BYTES as u64;

/// Sends a chain that is to be dropped; the counter that counts it.
fn drops(guest: &mut Guest, chain: &[Descriptor]) -> &'static str {
    let names = ["tx_malformed", "tx_dropped_too_large"];
    let before = names.map(|name| guest.counter(name));
    let head = guest.tx.add(chain);
    guest.net.queue_notified(TX);
    guest.settle();
    assert_eq!(guest.tx.take_used(), [(head, 0)], "{chain:?}");
    assert_eq!(guest.received(), Vec::<Vec<u8>>::new(), "{chain:?}");
    let after = names.map(|name| guest.counter(name));
    match [after[0] - before[0], after[1] - before[1]] {
        [1, 0] => "malformed",
        [0, 1] => "too large",
        other => panic!("{other:?} for {chain:?}"),
    }
}

#[test]
fn what_is_no_packet_is_dropped_and_counted() {
    let mut guest = Guest::new(MERGED);
    let at = TX_BUFFERS;
    guest.put(&[[0; 12].as_slice(), &frame(2000, 0)].concat());
    for chain in [
        // Too short for a header, for anything after it, for Ethernet.
        vec![readable(at, 0)],
        vec![readable(at, 11)],
        vec![readable(at, 12)],
        vec![readable(at, 12), readable(at + 12, 13)],
        // The wrong direction, in all or in part.
        vec![writable(at, 100)],
        vec![readable(at, 12), writable(at + 12, 100)],
        vec![writable(at, 12), readable(at + 12, 100)],
        // Outside memory: past its end, over its end, over the end of addresses.
        vec![readable(END, 100)],
        vec![readable(at, 12), readable(END - 50, 100)],
        vec![readable(at, 12), readable(u64::MAX - 50, 100)],
        vec![readable(at, 12), readable(1 << 40, 100)],
        vec![readable(at, 100), readable(at, u32::MAX)],
        vec![readable(at, u32::MAX), readable(at, u32::MAX)],
    ] {
        assert_eq!(drops(&mut guest, &chain), "malformed");
    }
    for chain in [
        vec![readable(at, PACKET_MAX_BYTES as u32 + 1)],
        vec![readable(at, 65_000), readable(at, 600)],
        vec![readable(at, 1 << 20); 200],
    ] {
        assert_eq!(drops(&mut guest, &chain), "too large");
    }
    guest.transmit(&[0; 12], &frame(60, 1));
    assert_eq!(guest.received(), [frame(60, 1)]);
}

#[test]
fn a_header_that_lies_is_dropped_by_the_host() {
    let mut guest = Guest::new(MERGED);
    for header in [
        // A kind of segments that does not exist.
        [0, 0x55, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0],
        // TCP segments of no bytes.
        [1, 1, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0],
        // A checksum that starts past the packet, and one that is past it.
        [1, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 14, 0, 0xff, 0xff, 0, 0],
        // More headers than there is packet.
        [0, 1, 0xff, 0xff, 8, 0, 0, 0, 0, 0, 0, 0],
    ] {
        let packet = guest.put(&[&header[..], &frame(60, 0)].concat());
        assert_eq!(drops(&mut guest, &[packet]), "malformed", "{header:?}");
    }
    guest.transmit(&[0; 12], &frame(60, 1));
    assert_eq!(guest.received(), [frame(60, 1)]);
}

#[test]
fn loops_and_broken_links_end() {
    let mut guest = Guest::new(MERGED);
    let at = TX_BUFFERS;
    // A loop of one, a loop of two, a link off the table.
    for (index, descriptor) in [
        (0, Descriptor::new(at, 64, NEXT, 0)),
        (1, Descriptor::new(at, 64, NEXT, 2)),
        (2, Descriptor::new(at, 64, NEXT, 1)),
        (3, Descriptor::new(at, 64, NEXT, QUEUE_SIZE)),
        // Tables: in a table, of a length that is none, outside memory, empty.
        (4, Descriptor::new(at, 16, INDIRECT, 0)),
        (5, Descriptor::new(at, 17, INDIRECT, 0)),
        (6, Descriptor::new(END, 32, INDIRECT, 0)),
        (7, Descriptor::new(at, 0, INDIRECT, 0)),
        // A sound beginning, then such a table.
        (8, Descriptor::new(at + 64, 64, NEXT, 4)),
    ] {
        guest.tx.set_descriptor(index, descriptor);
    }
    let inner = RawDescriptor::from(Descriptor::new(at, 16, INDIRECT, 0));
    guest.memory.write_obj(inner, GuestAddress(at)).unwrap();
    let heads = [0, 1, 3, 4, 5, 6, 7, 8];
    for head in heads {
        guest.tx.offer(head);
    }
    guest.net.queue_notified(TX);
    guest.settle();
    let used = guest.tx.take_used();
    assert_eq!(used, heads.map(|head| (head, 0)));
    assert_eq!(guest.counter("tx_malformed"), heads.len() as u64);
    assert_eq!(guest.received(), Vec::<Vec<u8>>::new());
}

#[test]
fn a_long_table_is_not_walked() {
    let mut guest = Guest::new(MERGED);
    let table = RX_BUFFERS;
    for place in 0..60_000u16 {
        let entry = Descriptor::new(TX_BUFFERS, 0, NEXT, place + 1);
        let at = GuestAddress(table + 16 * u64::from(place));
        guest
            .memory
            .write_obj(RawDescriptor::from(entry), at)
            .unwrap();
    }
    let long = Descriptor::new(table, 16 * 60_000, INDIRECT, 0);
    guest.tx.set_descriptor(0, long);
    guest.rx.set_descriptor(0, long);
    guest.tx.offer(0);
    guest.rx.offer(0);
    guest.peer.send(&frame(60, 0)).unwrap();
    guest.net.queue_notified(TX);
    guest.net.queue_notified(RX);
    guest.settle();
    assert_eq!(guest.tx.take_used(), [(0, 0)]);
    assert_eq!(guest.rx.take_used(), [(0, 0)]);
    assert_eq!(guest.counter("tx_dropped_too_large"), 1);
    assert_eq!(guest.counter("rx_malformed"), 1);
}

#[test]
fn buffers_that_cannot_be_filled_go_back_empty() {
    let mut guest = Guest::new(MERGED);
    let at = RX_BUFFERS;
    let bad = [
        vec![readable(at, 2048)],
        vec![writable(at, 11)],
        vec![writable(at, 0)],
        vec![writable(at, 100), readable(at + 100, 1000)],
        vec![writable(END - 100, 200)],
        vec![writable(u64::MAX - 100, 200)],
    ];
    let bad_heads: Vec<_> = bad.iter().map(|chain| guest.rx.add(chain)).collect();
    let places = guest.offer_buffers(&[2048]);
    guest.peer.send(&frame(60, 0)).unwrap();
    guest.settle();
    let mut expected: Vec<_> = bad_heads.iter().map(|&head| (head, 0)).collect();
    expected.push((places[0].0, 72));
    assert_eq!(guest.rx.take_used(), expected);
    assert_eq!(guest.counter("rx_malformed"), bad.len() as u64);
    assert_eq!(guest.bytes(END - 100, 100), [0; 100]);
}

#[test]
fn bad_buffers_do_not_come_between_those_of_a_packet() {
    let mut guest = Guest::new(MERGED);
    let at = RX_BUFFERS;
    let first = guest.rx.add(&[writable(at, 600)]);
    let bad = guest.rx.add(&[readable(at, 600)]);
    let second = guest.rx.add(&[writable(at + 600, 600)]);
    guest.net.queue_notified(RX);
    guest.peer.send(&frame(1000, 0)).unwrap();
    guest.settle();
    assert_eq!(
        guest.rx.take_used(),
        [(bad, 0), (first, 600), (second, 412)]
    );
    let packet = guest.bytes(at, 1012);
    assert_eq!(
        (&packet[12..], num_buffers(&packet)),
        (&frame(1000, 0)[..], 2)
    );
}

/// A full ring of the smallest buffers never has room for a jumbo frame.
#[test]
fn a_packet_that_can_never_fit_is_dropped() {
    let mut guest = Guest::new(MERGED);
    guest.shell("ip link set tap0 mtu 9000");
    let smallest = Descriptor::new(RX_BUFFERS, HEADER_BYTES as u32, WRITE, 0);
    guest.rx.set_descriptor(0, smallest);
    for _ in 0..QUEUE_SIZE {
        guest.rx.offer(0);
    }
    guest.net.queue_notified(RX);
    guest.peer.send(&frame(8000, 0)).unwrap();
    guest.peer.send(&frame(1514, 0)).unwrap();
    guest.settle();
    assert_eq!(guest.counter("rx_dropped_too_large"), 1);
    let used = guest.rx.take_used().len();
    assert_eq!(used, 1526usize.div_ceil(HEADER_BYTES));
}

#[test]
fn an_absurd_available_index_stops_the_queue_until_reset() {
    let mut guest = Guest::new(MERGED);
    guest.tx.set_avail_index(QUEUE_SIZE + 1);
    guest.rx.set_avail_index(QUEUE_SIZE + 1);
    for _ in 0..3 {
        guest.peer.send(&frame(60, 0)).unwrap();
        guest.net.queue_notified(TX);
        guest.net.queue_notified(RX);
        guest.settle();
    }
    assert_eq!(
        (guest.tx.take_used(), guest.rx.take_used()),
        (vec![], vec![])
    );
    assert_eq!(guest.counter("tx_malformed"), 1);
    assert_eq!(guest.counter("rx_malformed"), 1);
    guest.net.reset();
    guest.rx = Driver::new(&guest.memory, RX_RINGS, QUEUE_SIZE);
    guest.tx = Driver::new(&guest.memory, TX_RINGS, QUEUE_SIZE);
    guest.activate(vec![guest.rx.queue(), guest.tx.queue()]);
    guest.transmit(&[0; 12], &frame(60, 1));
    assert_eq!(guest.received(), [frame(60, 1)]);
}

#[test]
fn heads_that_do_not_exist_are_passed_over() {
    let mut guest = Guest::new(MERGED);
    guest.tx.offer(QUEUE_SIZE);
    guest.tx.offer(u16::MAX);
    guest.rx.offer(u16::MAX);
    let places = guest.offer_buffers(&[2048]);
    guest.peer.send(&frame(60, 0)).unwrap();
    guest.settle();
    assert_eq!(guest.rx.take_used(), [(places[0].0, 72)]);
    guest.transmit(&[0; 12], &frame(60, 1));
    assert_eq!(guest.counter("tx_malformed"), 2);
}

fn descriptor() -> impl Strategy<Value = Descriptor> {
    // Addresses and lengths that mean something, and some that do not.
    let address = prop_oneof![
        8 => (0..8u64).prop_map(|n| RX_BUFFERS + n * 512),
        4 => (0..8u64).prop_map(|n| TX_BUFFERS + n * 512),
        2 => Just(END - 512),
        1 => END - 4096..,
    ];
    let len = prop_oneof![
        4 => Just(12u32), 2 => 0..32u32, 8 => (0..8u32).prop_map(|n| n * 512),
        2 => Just(60_000u32), 1 => any::<u32>(),
    ];
    // Few go on, so that chains come to an end.
    let flags = prop_oneof![4 => Just(0u16), 4 => Just(WRITE), 1 => 0..8u16];
    (address, len, flags, 0..24u16)
        .prop_map(|(address, len, flags, next)| Descriptor::new(address, len, flags, next))
}

/// Where no descriptor that is in memory leads to.
const UNTOUCHED: u64 = 0x30_0000;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    /// Whatever the rings say, nothing panics, nothing outside guest memory or
    /// outside the buffers is written (guard pages would kill the test), what
    /// can be sent or refused is given back, and the rest is in the rings as the
    /// driver put it there.
    #[test]
    fn any_ring_is_survived(
        rx in prop::collection::vec(descriptor(), 24),
        tx in prop::collection::vec(descriptor(), 24),
        rx_heads in prop::collection::vec(0..24u16, 1..100),
        tx_heads in prop::collection::vec(0..24u16, 1..100),
        frames in prop::collection::vec(14..1514usize, 0..20),
        merged in any::<bool>(),
        garbage in prop::collection::vec(any::<u8>(), 64),
    ) {
        let features = if merged { MERGED } else { 1 << VIRTIO_F_VERSION_1 };
        let mut guest = Guest::new(features);
        for at in [RX_BUFFERS, TX_BUFFERS, TX_BUFFERS + 512] {
            guest.memory.write_slice(&garbage, GuestAddress(at)).unwrap();
        }
        for (index, (rx, tx)) in (0..).zip(rx.iter().zip(&tx)) {
            guest.rx.set_descriptor(index, *rx);
            guest.tx.set_descriptor(index, *tx);
        }
        for &head in &rx_heads {
            guest.rx.offer(head);
        }
        for &head in &tx_heads {
            guest.tx.offer(head);
        }
        for (seed, &bytes) in (0..).zip(&frames) {
            guest.peer.send(&frame(bytes, seed)).unwrap();
        }
        guest.net.queue_notified(RX);
        guest.net.queue_notified(TX);
        guest.settle();
        prop_assert_eq!(guest.tx.take_used().len(), tx_heads.len());
        let rx_used = guest.rx.take_used();
        prop_assert!(rx_used.len() <= rx_heads.len());
        let left = guest.bytes(UNTOUCHED, MEMORY_BYTES - 4096 - UNTOUCHED as usize);
        prop_assert!(left.iter().all(|&byte| byte == 0));
        for queue in guest.net.quiesce() {
            prop_assert_eq!(queue.next_avail(), queue.next_used());
        }
    }
}
