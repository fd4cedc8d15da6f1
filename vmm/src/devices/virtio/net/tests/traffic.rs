//! Packets both ways.

use virtio_bindings::virtio_net::VIRTIO_NET_F_STATUS;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT,
};
use virtio_queue::desc::RawDescriptor;

use super::*;
use crate::devices::Chip;

#[test]
fn a_frame_goes_each_way() {
    let mut guest = Guest::new(MERGED);
    let places = guest.offer_buffers(&[2048]);
    let incoming = frame(60, 1);
    guest.peer.send(&incoming).unwrap();
    guest.settle();
    let used = guest.rx.take_used();
    assert_eq!(used, [(places[0].0, 72)]);
    let packet = guest.packet(&used, &places);
    assert_eq!(packet[12..], incoming);
    assert_eq!((&packet[..10], num_buffers(&packet)), (&[0; 10][..], 1));
    assert_eq!(
        guest.bytes(places[0].1 + 72, 1),
        [BLANK],
        "not past its end"
    );
    assert_eq!(guest.rx.interrupts(), 1);

    let outgoing = frame(1514, 2);
    guest.transmit(&[0; 12], &outgoing);
    assert_eq!(guest.received(), [outgoing]);
    assert_eq!(guest.rx.interrupts(), 1);
    for (name, value) in [
        ("rx_packets", 1),
        ("rx_bytes", 60),
        ("tx_packets", 1),
        ("tx_bytes", 1514),
        ("link_up", 1),
    ] {
        assert_eq!(guest.counter(name), value, "{name}");
    }
}

#[test]
fn a_frame_is_merged_from_small_buffers() {
    let mut guest = Guest::new(MERGED);
    let places = guest.offer_buffers(&[500, 12, 600, 500, 500]);
    let incoming = frame(1514, 3);
    guest.peer.send(&incoming).unwrap();
    guest.settle();
    let used = guest.rx.take_used();
    let lengths: Vec<_> = used.iter().map(|used| used.1).collect();
    assert_eq!(lengths, [500, 12, 600, 414]);
    let packet = guest.packet(&used, &places);
    assert_eq!((&packet[12..], num_buffers(&packet)), (&incoming[..], 4));
    // The next begins where this one ended.
    guest.peer.send(&frame(60, 4)).unwrap();
    guest.settle();
    let used = guest.rx.take_used();
    assert_eq!(guest.packet(&used, &places)[12..], frame(60, 4));
    assert_eq!(used[0].0, places[4].0);
}

#[test]
fn many_frames_come_in_order() {
    let mut guest = Guest::new(MERGED);
    let places = guest.offer_buffers(&[2048; 200]);
    for seed in 0..200 {
        guest.peer.send(&frame(100, seed)).unwrap();
    }
    guest.settle();
    let used = guest.rx.take_used();
    for (seed, used) in used.iter().enumerate() {
        let packet = guest.packet(&[*used], &places);
        assert_eq!(packet[12..], frame(100, seed as u8));
    }
    assert_eq!(used.len(), 200);
    for seed in 0..200 {
        guest.offer_packet(&[0; 12], &frame(100, seed));
    }
    guest.net.queue_notified(TX);
    guest.settle();
    let sent: Vec<_> = (0..200).map(|seed| frame(100, seed)).collect();
    assert_eq!(guest.received(), sent);
}

#[test]
fn a_header_may_be_in_pieces() {
    let mut guest = Guest::new(MERGED);
    let outgoing = frame(1000, 5);
    let packet = [&[0; 12][..], &outgoing].concat();
    let pieces = [
        &packet[..3],
        &[],
        &packet[3..11],
        &packet[11..20],
        &packet[20..],
    ];
    let chain = pieces.map(|piece| guest.put(piece));
    guest.tx.add(&chain);
    guest.net.queue_notified(TX);
    guest.settle();
    assert_eq!(guest.received(), [outgoing]);

    // The same for what is received: a chain of a few bytes each.
    let at = RX_BUFFERS;
    let pieces = [writable(at, 3), writable(at + 3, 8), writable(at + 11, 100)];
    let head = guest.rx.add(&pieces);
    guest.peer.send(&frame(80, 6)).unwrap();
    guest.net.queue_notified(RX);
    guest.settle();
    assert_eq!(guest.rx.take_used(), [(head, 92)]);
    let packet = guest.bytes(at, 92);
    assert_eq!(
        (&packet[12..], num_buffers(&packet)),
        (&frame(80, 6)[..], 1)
    );
}

#[test]
fn an_indirect_table_is_a_chain() {
    let mut guest = Guest::new(MERGED);
    let outgoing = frame(300, 7);
    let (header, data) = (guest.put(&[0; 12]), guest.put(&outgoing));
    let table = TX_BUFFERS + 0x1_0000;
    let next = VRING_DESC_F_NEXT as u16;
    let entries = [
        Descriptor::new(header.addr().0, 12, next, 1),
        Descriptor::new(data.addr().0, 300, 0, 0),
    ];
    for (place, entry) in (0..).zip(entries) {
        let at = GuestAddress(table + 16 * place);
        guest
            .memory
            .write_obj(RawDescriptor::from(entry), at)
            .unwrap();
    }
    let indirect = VRING_DESC_F_INDIRECT as u16;
    guest
        .tx
        .set_descriptor(9, Descriptor::new(table, 32, indirect, 0));
    guest.tx.offer(9);
    guest.net.queue_notified(TX);
    guest.settle();
    assert_eq!(guest.received(), [outgoing]);
    assert_eq!(guest.tx.take_used(), [(9, 0)]);
}

#[test]
fn without_buffers_packets_wait_and_nothing_spins() {
    let mut guest = Guest::new(MERGED);
    for seed in 0..3 {
        guest.peer.send(&frame(60, seed)).unwrap();
    }
    guest.settle();
    assert_eq!(guest.counter("rx_packets"), 0);
    // One more while it waits makes no difference.
    guest.peer.send(&frame(60, 3)).unwrap();
    guest.settle();
    let places = guest.offer_buffers(&[256; 8]);
    guest.settle();
    let used = guest.rx.take_used();
    assert_eq!(used.len(), 4);
    for (seed, used) in used.iter().enumerate() {
        let packet = guest.packet(&[*used], &places);
        assert_eq!(packet[12..], frame(60, seed as u8));
    }
}

#[test]
fn a_packet_that_does_not_fit_waits_for_more_buffers() {
    let mut guest = Guest::new(MERGED);
    let mut places = guest.offer_buffers(&[512]);
    guest.peer.send(&frame(1514, 8)).unwrap();
    guest.peer.send(&frame(60, 9)).unwrap();
    guest.settle();
    assert_eq!(guest.rx.take_used(), []);
    places.extend(guest.offer_buffers(&[512]));
    guest.settle();
    assert_eq!(guest.rx.take_used(), []);
    places.extend(guest.offer_buffers(&[512, 512]));
    guest.settle();
    let used = guest.rx.take_used();
    let packet = guest.packet(&used[..3], &places);
    assert_eq!(
        (&packet[12..], num_buffers(&packet)),
        (&frame(1514, 8)[..], 3)
    );
    let packet = guest.packet(&used[3..], &places);
    assert_eq!(packet[12..], frame(60, 9));
    assert_eq!(guest.counter("rx_bytes"), 1574);
}

#[test]
fn without_merging_a_packet_has_one_chain_or_none() {
    let mut guest = Guest::new(MERGED & !(1 << VIRTIO_NET_F_MRG_RXBUF));
    let places = guest.offer_buffers(&[1000, 2000]);
    guest.peer.send(&frame(1514, 10)).unwrap();
    guest.settle();
    assert_eq!(guest.rx.take_used(), []);
    assert_eq!(guest.counter("rx_dropped_too_large"), 1);
    guest.peer.send(&frame(900, 11)).unwrap();
    guest.peer.send(&frame(1514, 12)).unwrap();
    guest.settle();
    let used = guest.rx.take_used();
    assert_eq!(used, [(places[0].0, 912), (places[1].0, 1526)]);
    let packet = guest.packet(&used[1..], &places);
    assert_eq!(
        (&packet[12..], num_buffers(&packet)),
        (&frame(1514, 12)[..], 1)
    );
}

/// Where the driver says with which used element it wants an interrupt.
fn set_used_event(guest: &Guest, rings: u64, event: u16) {
    let size = u64::from(QUEUE_SIZE);
    let address = GuestAddress(rings + 16 * size + 4 + 2 * size);
    guest.memory.write_obj(event, address).unwrap();
}

#[test]
fn the_driver_is_interrupted_when_it_says() {
    let mut guest = Guest::new(MERGED | 1 << VIRTIO_RING_F_EVENT_IDX);
    guest.activate_with_event_idx();
    set_used_event(&guest, TX_RINGS, 2);
    for (sent, interrupts) in [(1, 0), (1, 0), (1, 1), (5, 0)] {
        for seed in 0..sent {
            guest.offer_packet(&[0; 12], &frame(60, seed));
        }
        guest.net.queue_notified(TX);
        guest.settle();
        assert_eq!(guest.rx.interrupts(), interrupts);
    }
    set_used_event(&guest, RX_RINGS, u16::MAX);
    guest.offer_buffers(&[256; 4]);
    guest.peer.send(&frame(60, 0)).unwrap();
    guest.settle();
    assert_eq!((guest.rx.take_used().len(), guest.rx.interrupts()), (1, 0));
    // The device, for its part, wants to hear only of what it waits for.
    let avail_event = |rings: u64| {
        let size = u64::from(QUEUE_SIZE);
        let used_ring = (rings + 16 * size + 6 + 2 * size).next_multiple_of(4);
        let address = GuestAddress(used_ring + 4 + 8 * size);
        guest.memory.read_obj::<u16>(address).unwrap()
    };
    assert_eq!(avail_event(TX_RINGS), 8);
    assert_eq!(avail_event(RX_RINGS), 0, "there are buffers");
}

impl Guest {
    /// The transport sets it in the queues, which the harness makes without.
    fn activate_with_event_idx(&mut self) {
        let queues = self.net.quiesce();
        self.activate(queues);
    }
}

#[test]
fn without_a_tap_the_link_is_down() {
    let mut guest = Guest::with(MERGED | 1 << VIRTIO_NET_F_STATUS, |config| {
        config.tap = None;
        config.mtu = 9000;
    });
    let mut space = [0xff; 16];
    guest.net.read_config(0, &mut space);
    assert_eq!(space[..6], GUEST_MAC);
    assert_eq!(space[6..], [0, 0, 1, 0, 0x28, 0x23, 0, 0, 0, 0]);
    guest.transmit(&[0; 12], &frame(60, 0));
    assert_eq!(guest.counter("tx_dropped_link_down"), 1);
    let up = NetChange {
        link_up: Some(true),
        ..NetChange::default()
    };
    assert!(matches!(guest.net.change(up), Err(NetError::NoTap)));
    assert_eq!(guest.counter("link_up"), 0);
}

#[test]
fn the_link_goes_down_and_up() {
    let mut guest = Guest::new(MERGED | 1 << VIRTIO_NET_F_STATUS);
    guest.offer_buffers(&[2048; 8]);
    guest.settle();
    let status = |guest: &Guest| {
        let mut status = [0; 2];
        guest.net.read_config(6, &mut status);
        u16::from_le_bytes(status)
    };
    assert_eq!((status(&guest), guest.rx.interrupts()), (1, 0));
    let set = |guest: &mut Guest, up| {
        let Chip::Net(net) = guest.net.chip() else {
            panic!("another chip");
        };
        let change = NetChange {
            link_up: Some(up),
            ..NetChange::default()
        };
        net.change(change).unwrap();
        guest.settle();
    };
    set(&mut guest, false);
    assert_eq!((status(&guest), guest.rx.interrupts()), (0, 1));
    guest.peer.send(&frame(60, 1)).unwrap();
    guest.settle();
    guest.transmit(&[0; 12], &frame(60, 2));
    assert_eq!(guest.counter("rx_dropped_link_down"), 1);
    assert_eq!(guest.counter("tx_dropped_link_down"), 1);
    // That frames were sent tells the driver; that the link is down no more.
    guest.rx.interrupts();
    set(&mut guest, false);
    assert_eq!(guest.rx.interrupts(), 0, "it was down already");
    set(&mut guest, true);
    assert_eq!((status(&guest), guest.rx.interrupts()), (1, 1));
    guest.peer.send(&frame(60, 3)).unwrap();
    guest.transmit(&[0; 12], &frame(60, 4));
    assert_eq!(guest.received(), [frame(60, 4)]);
    assert_eq!(guest.rx.take_used().len(), 1, "what came meanwhile is gone");
    assert_eq!(guest.counter("rx_packets"), 1);
}

#[test]
fn what_waits_for_buffers_goes_with_the_link() {
    let mut guest = Guest::new(MERGED);
    guest.offer_buffers(&[600]);
    for seed in 0..3 {
        guest.peer.send(&frame(1000, seed)).unwrap();
    }
    guest.settle();
    let down = NetChange {
        link_up: Some(false),
        ..NetChange::default()
    };
    guest.net.change(down).unwrap();
    guest.settle();
    assert_eq!(guest.counter("rx_dropped_link_down"), 3);
}

#[test]
fn a_tap_whose_interface_is_gone_is_an_error_and_nothing_spins() {
    let mut guest = Guest::new(MERGED);
    guest.offer_buffers(&[2048; 8]);
    guest.shell("ip link delete tap0");
    guest.settle();
    guest.transmit(&[0; 12], &frame(60, 0));
    assert_eq!(guest.counter("tx_tap_errors"), 1);
    assert!(guest.counter("rx_tap_errors") > 0);
    guest.settle();
}

#[test]
fn what_is_no_such_tap_is_refused() {
    let null = std::fs::File::open("/dev/null").unwrap();
    let refused = |fd: std::os::fd::OwnedFd| Tap::new(fd).unwrap_err().to_string();
    assert!(refused(null.into()).contains("not a TAP"));
    let unattached = std::fs::File::open("/dev/net/tun").unwrap();
    assert!(refused(unattached.into()).contains("not a TAP"));
    for flags in [
        libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR,
        libc::IFF_TAP | libc::IFF_NO_PI,
    ] {
        let (_peer, tap) = TapPeer::with_flags(flags).unwrap();
        let said = refused(tap);
        assert!(said.contains("open it as IFF_TAP | IFF_NO_PI"), "{said}");
    }
}
