//! Drivers that break every rule.

use super::*;
use proptest::prelude::*;
use std::time::Duration;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;

const BLOCK: u32 = BLOCK_BYTES as u32;
const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

fn guest() -> (Files, Guest) {
    let files = Files::new(16 * BLOCK_BYTES, 16 * BLOCK_BYTES);
    let guest = Guest::new(files.config());
    (files, guest)
}

/// Writes a header at `HEADERS` and an unanswered status at `STATUSES`.
fn prepare(guest: &Guest, kind: u32) {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    guest
        .memory
        .write_slice(&header, GuestAddress(HEADERS))
        .unwrap();
    guest
        .memory
        .write_obj(UNANSWERED, GuestAddress(STATUSES))
        .unwrap();
}

/// Sends one chain; what the device wrote to the status, and the used length.
fn send(guest: &mut Guest, kind: u32, chain: &[Descriptor]) -> (u8, u32) {
    prepare(guest, kind);
    guest.driver.add(chain);
    guest.block.queue_notified(0);
    let used = guest.driver.wait_used(&mut guest.block, 1);
    (guest.status(STATUSES), used[0].1)
}

#[test]
fn malformed_chains_are_refused_or_given_back() {
    let (_files, mut guest) = guest();
    let header = readable(HEADERS, 16);
    let status = writable(STATUSES, 1);
    let data = writable(DATA, BLOCK);
    let (read, write) = (VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT);
    // No place for a status.
    assert_eq!(send(&mut guest, read, &[header]), (UNANSWERED, 0));
    assert_eq!(
        send(&mut guest, read, &[header, readable(STATUSES, 1)]),
        (UNANSWERED, 0)
    );
    assert_eq!(
        send(&mut guest, read, &[header, writable(STATUSES, 0)]),
        (UNANSWERED, 0)
    );
    assert_eq!(
        send(&mut guest, read, &[header, writable(u64::MAX, 2)]),
        (UNANSWERED, 0)
    );
    assert_eq!(
        send(&mut guest, read, &[header, data, writable(1 << 40, 1)]),
        (UNANSWERED, 0)
    );
    // A chain of more than 2^32 bytes, which ends where it overflows.
    let long = writable(DATA, u32::MAX);
    assert_eq!(
        send(&mut guest, read, &[header, long, status]),
        (UNANSWERED, 0)
    );
    // Everything else wrong.
    for (kind, chain) in [
        (read, vec![status]),
        (read, vec![readable(HEADERS, 15), data, status]),
        (read, vec![writable(HEADERS + 64, 16), data, status]),
        (read, vec![header, status]),
        (read, vec![header, readable(DATA, BLOCK), status]),
        (read, vec![header, data, readable(DATA, 512), status]),
        (read, vec![header, writable(DATA, 511), status]),
        (read, vec![header, writable(DATA, u32::MAX - 64), status]),
        (
            read,
            vec![header, writable(MEMORY_BYTES as u64 - 512, 1024), status],
        ),
        (read, vec![header, writable(u64::MAX - 511, 1024), status]),
        (write, vec![header, data, status]),
        (
            write,
            vec![header, readable(DATA, BLOCK), writable(DATA, BLOCK), status],
        ),
        (
            write,
            vec![header, readable(u64::MAX - BLOCK_BYTES, BLOCK), status],
        ),
        (
            VIRTIO_BLK_T_DISCARD,
            vec![header, readable(DATA, 15), status],
        ),
        (
            VIRTIO_BLK_T_DISCARD,
            vec![header, readable(DATA, 32), status],
        ),
        (
            VIRTIO_BLK_T_GET_ID,
            vec![header, readable(DATA, 20), status],
        ),
    ] {
        assert_eq!(
            send(&mut guest, kind, &chain),
            (IOERR, 1),
            "{kind} {chain:?}"
        );
    }
    assert_eq!(guest.counter("layer_blocks"), 0);
    assert_eq!(guest.counter("failures"), 22);
    // And the device still works.
    assert_eq!(
        send(&mut guest, read, &[header, data, status]),
        (OK, BLOCK + 1)
    );
}

#[test]
fn any_layout_of_header_and_status_is_understood() {
    let (files, mut guest) = guest();
    let chain = [
        readable(HEADERS, 3),
        readable(HEADERS + 3, 13),
        writable(DATA, 100),
        writable(DATA + 100, BLOCK - 100 + 1),
    ];
    prepare(&guest, VIRTIO_BLK_T_IN);
    guest.driver.add(&chain);
    guest.block.queue_notified(0);
    guest.driver.wait_used(&mut guest.block, 1);
    assert_eq!(guest.status(DATA + BLOCK_BYTES), OK);
    assert_eq!(
        guest.got(BLOCK as usize),
        files.base_bytes()[..BLOCK as usize]
    );
}

#[test]
fn loops_and_broken_links_end() {
    let (_files, mut guest) = guest();
    prepare(&guest, VIRTIO_BLK_T_IN);
    // A loop that never ends has no last descriptor, so no status.
    guest
        .driver
        .set_descriptor(0, Descriptor::new(HEADERS, 16, NEXT, 1));
    guest
        .driver
        .set_descriptor(1, Descriptor::new(DATA, 512, NEXT | WRITE, 1));
    // A link off the table.
    guest
        .driver
        .set_descriptor(2, Descriptor::new(HEADERS, 16, NEXT, 3));
    guest
        .driver
        .set_descriptor(3, Descriptor::new(STATUSES, 1, NEXT | WRITE, QUEUE_SIZE));
    // An indirect table in an indirect table, and one of a broken length.
    let inner = Descriptor::new(DATA, 16, INDIRECT, 0);
    guest
        .memory
        .write_obj(RawDescriptor::from(inner), GuestAddress(DATA))
        .unwrap();
    guest
        .driver
        .set_descriptor(4, Descriptor::new(DATA, 16, INDIRECT, 0));
    guest
        .driver
        .set_descriptor(5, Descriptor::new(DATA, 17, INDIRECT, 0));
    for head in [0, 2, 4, 5, QUEUE_SIZE - 1] {
        guest.driver.offer(head);
    }
    guest.block.queue_notified(0);
    let used = guest.driver.wait_used(&mut guest.block, 5);
    assert!(used.iter().all(|&(_, written)| written == 0), "{used:?}");
    assert_eq!(guest.status(STATUSES), UNANSWERED);
}

#[test]
fn an_indirect_table_is_a_chain() {
    let (files, mut guest) = guest();
    prepare(&guest, VIRTIO_BLK_T_IN);
    let table = 0x8_0000;
    let chain = [
        Descriptor::new(HEADERS, 16, NEXT, 1),
        Descriptor::new(DATA, BLOCK, NEXT | WRITE, 2),
        Descriptor::new(STATUSES, 1, WRITE, 0),
    ];
    for (place, descriptor) in chain.into_iter().enumerate() {
        let at = GuestAddress(table + 16 * place as u64);
        guest
            .memory
            .write_obj(RawDescriptor::from(descriptor), at)
            .unwrap();
    }
    guest
        .driver
        .set_descriptor(9, Descriptor::new(table, 48, INDIRECT, 0));
    guest.driver.offer(9);
    guest.block.queue_notified(0);
    assert_eq!(
        guest.driver.wait_used(&mut guest.block, 1),
        [(9, BLOCK + 1)]
    );
    assert_eq!(
        guest.got(BLOCK as usize),
        files.base_bytes()[..BLOCK as usize]
    );
}

#[test]
fn an_indirect_chain_with_too_many_segments_is_refused() {
    let (_files, mut guest) = guest();
    prepare(&guest, VIRTIO_BLK_T_IN);
    let table = 0x20_0000;
    let count = 60_000u16;
    for place in 0..count {
        let descriptor = match place {
            0 => Descriptor::new(HEADERS, 16, NEXT, 1),
            _ if place == count - 1 => Descriptor::new(STATUSES, 1, WRITE, 0),
            _ => Descriptor::new(DATA, 512, NEXT | WRITE, place + 1),
        };
        let at = GuestAddress(table + 16 * u64::from(place));
        guest
            .memory
            .write_obj(RawDescriptor::from(descriptor), at)
            .unwrap();
    }
    guest.driver.set_descriptor(
        0,
        Descriptor::new(table, 16 * u32::from(count), INDIRECT, 0),
    );
    guest.driver.offer(0);
    guest.block.queue_notified(0);
    guest.driver.wait_used(&mut guest.block, 1);
    assert_eq!(guest.status(STATUSES), IOERR);
}

#[test]
fn an_absurd_available_index_stops_the_queue_until_reset() {
    let (_files, mut guest) = guest();
    guest.driver.set_avail_index(QUEUE_SIZE + 1);
    guest.block.queue_notified(0);
    guest.block.queue_notified(0);
    let rests = (0..10).any(|_| !testing::serve(&mut guest.block, Duration::ZERO));
    assert!(rests, "the device keeps the event loop busy");
    assert_eq!(guest.driver.take_used(), []);
    guest.block.reset();
    guest.driver = Driver::new(&guest.memory, RINGS, QUEUE_SIZE);
    guest.block.activate(guest.driver.activation(0)).unwrap();
    assert_eq!(guest.flush(), OK);
}

/// Offers the same chain again and again without taking anything back.
#[test]
fn requests_in_flight_are_bounded() {
    let (_files, mut guest) = guest();
    prepare(&guest, VIRTIO_BLK_T_FLUSH);
    guest
        .driver
        .set_descriptor(0, Descriptor::new(HEADERS, 16, NEXT, 1));
    guest
        .driver
        .set_descriptor(1, Descriptor::new(STATUSES, 1, WRITE, 0));
    assert_eq!(guest.write(0, &[1; BLOCK_BYTES as usize]), OK);
    prepare(&guest, VIRTIO_BLK_T_FLUSH);
    guest
        .driver
        .set_descriptor(0, Descriptor::new(HEADERS, 16, NEXT, 1));
    guest
        .driver
        .set_descriptor(1, Descriptor::new(STATUSES, 1, WRITE, 0));
    for _ in 0..20 {
        for _ in 0..QUEUE_SIZE {
            guest.driver.offer(0);
        }
        guest.block.queue_notified(0);
        let used = guest
            .driver
            .wait_used(&mut guest.block, usize::from(QUEUE_SIZE));
        assert_eq!(used.len(), usize::from(QUEUE_SIZE));
    }
}

fn descriptor() -> impl Strategy<Value = Descriptor> {
    // Addresses and lengths that mean something, and some that do not.
    let address = prop_oneof![
        8 => (0..4u64).prop_map(|n| DATA + n * 4096),
        4 => Just(HEADERS),
        2 => Just(MEMORY_BYTES as u64 - 4096),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        4 => Just(16u32), 4 => Just(1u32), 8 => (0..8u32).prop_map(|n| n * 512), 1 => any::<u32>(),
    ];
    (address, len, 0..8u16, 0..QUEUE_SIZE + 2)
        .prop_map(|(address, len, flags, next)| Descriptor::new(address, len, flags, next % 24))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    /// Whatever the descriptors say, each chain is given back, nothing panics,
    /// nothing outside guest memory is touched (guard pages would kill the
    /// test), and the base stays as it is.
    #[test]
    fn any_chain_is_given_back(
        descriptors in prop::collection::vec(descriptor(), 24),
        kinds in prop::collection::vec(0..16u32, 8),
        sectors in prop::collection::vec(prop_oneof![4 => (0..20u64).prop_map(|n| n * 8), 1 => any::<u64>()], 8),
        heads in prop::collection::vec(0..26u16, 1..100),
    ) {
        let (files, mut guest) = guest();
        for (place, (kind, sector)) in kinds.iter().zip(&sectors).enumerate() {
            let mut header = [0; 16];
            header[..4].copy_from_slice(&kind.to_le_bytes());
            header[8..].copy_from_slice(&sector.to_le_bytes());
            for at in [HEADERS + place as u64 * 16, DATA + place as u64 * 4096] {
                guest.memory.write_slice(&header, GuestAddress(at)).unwrap();
            }
        }
        for (index, &descriptor) in descriptors.iter().enumerate() {
            guest.driver.set_descriptor(index as u16, descriptor);
        }
        for &head in &heads {
            guest.driver.offer(head);
        }
        guest.block.queue_notified(0);
        prop_assert_eq!(guest.driver.wait_used(&mut guest.block, heads.len()).len(), heads.len());
        while testing::serve(&mut guest.block, Duration::ZERO) {}
        prop_assert_eq!(guest.driver.take_used(), []);
        prop_assert!(files.base_bytes() == Files::base_contents(16 * BLOCK_BYTES));
    }
}
