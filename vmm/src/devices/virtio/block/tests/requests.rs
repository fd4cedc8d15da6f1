use super::*;
use crate::config::Bucket;
use std::time::Duration;

const BLOCK: usize = BLOCK_BYTES as usize;
const BLOCK_SECTORS: u64 = BLOCK_BYTES / SECTOR_BYTES;

#[test]
fn writes_read_back_and_the_base_never_changes() {
    let files = Files::new(64 * BLOCK_BYTES, 128 * BLOCK_BYTES);
    let base = files.base_bytes();
    let mut guest = Guest::new(files.config());
    assert_eq!(guest.read(0, 64 * BLOCK), base);
    let new = vec![0x5a; 3 * BLOCK];
    assert_eq!(guest.write(10 * BLOCK_SECTORS, &new), OK);
    let mut expected = base.clone();
    expected[10 * BLOCK..13 * BLOCK].copy_from_slice(&new);
    assert_eq!(guest.read(0, 64 * BLOCK), expected);
    assert_eq!(guest.flush(), OK);
    assert_eq!(files.base_bytes(), base);
    assert_eq!(guest.counter("layer_blocks"), 3);
    assert_eq!(guest.counter("write_bytes"), 3 * BLOCK_BYTES);
    assert_eq!(guest.counter("failures"), 0);
}

#[test]
fn what_lies_past_the_base_reads_as_zeros() {
    let files = Files::new(BLOCK_BYTES, 64 * BLOCK_BYTES);
    let mut guest = Guest::new(files.config());
    let read = guest.read(0, 64 * BLOCK);
    assert_eq!(read[..BLOCK], files.base_bytes());
    assert!(read[BLOCK..].iter().all(|&byte| byte == 0));
}

#[test]
fn a_request_is_split_where_layer_and_base_alternate() {
    let files = Files::new(200 * BLOCK_BYTES, 300 * BLOCK_BYTES);
    let mut expected = files.base_bytes();
    expected.resize(300 * BLOCK, 0);
    let mut guest = Guest::new(files.config());
    // More runs than the ring has entries.
    for block in (0..300).step_by(2) {
        let bytes = [block as u8 ^ 0x33; BLOCK];
        assert_eq!(guest.write(block * BLOCK_SECTORS, &bytes), OK);
        expected[block as usize * BLOCK..][..BLOCK].copy_from_slice(&bytes);
    }
    assert_eq!(guest.read(0, 300 * BLOCK), expected);
}

#[test]
fn many_segments_of_odd_lengths_make_one_request() {
    let files = Files::new(16 * BLOCK_BYTES, 16 * BLOCK_BYTES);
    let mut guest = Guest::new(files.config());
    assert_eq!(guest.write(2 * BLOCK_SECTORS, &[1; BLOCK]), OK);
    let mut expected = files.base_bytes()[..4 * BLOCK].to_vec();
    expected[2 * BLOCK..3 * BLOCK].fill(1);
    let lengths = [1, 4095, 511, 1, 8000, 4 * 4096 - 1 - 4095 - 511 - 1 - 8000];
    let mut at = DATA;
    let segments = lengths.map(|len| {
        at += 0x1_0000;
        writable(at, len)
    });
    assert_eq!(guest.request(VIRTIO_BLK_T_IN, 0, &segments).0, OK);
    let mut read = Vec::new();
    for segment in segments {
        let mut bytes = vec![0; segment.len() as usize];
        guest.memory.read_slice(&mut bytes, segment.addr()).unwrap();
        read.extend(bytes);
    }
    assert_eq!(read, expected);
}

#[test]
fn reads_may_be_of_sectors_but_writes_only_of_blocks() {
    let files = Files::new(4 * BLOCK_BYTES, 4 * BLOCK_BYTES);
    let mut guest = Guest::new(files.config());
    assert_eq!(guest.read(3, 1024), files.base_bytes()[3 * 512..5 * 512]);
    assert_eq!(guest.write(0, &[1; 512]), IOERR);
    assert_eq!(guest.write(1, &[1; BLOCK]), IOERR);
    assert_eq!(guest.counter("layer_blocks"), 0);
    assert_eq!(guest.counter("failures"), 2);
}

#[test]
fn ranges_off_the_disk_are_refused() {
    let files = Files::new(4 * BLOCK_BYTES, 4 * BLOCK_BYTES);
    let mut guest = Guest::new(files.config());
    let end = 4 * BLOCK_SECTORS;
    for sector in [end, end - 1, u64::MAX, u64::MAX / 512, 1 << 55] {
        let data = [writable(DATA, BLOCK as u32)];
        assert_eq!(guest.request(VIRTIO_BLK_T_IN, sector, &data).0, IOERR);
        assert_eq!(guest.write(sector / 8 * 8, &[0; 2 * BLOCK]), IOERR);
        assert_eq!(
            guest.zero(VIRTIO_BLK_T_DISCARD, sector / 8 * 8, 16, 0),
            IOERR
        );
    }
    assert_eq!(guest.zero(VIRTIO_BLK_T_DISCARD, 0, 0, 0), IOERR);
    assert_eq!(guest.zero(VIRTIO_BLK_T_DISCARD, 0, 1 << 31, 0), IOERR);
}

#[test]
fn discards_and_zeroes_hide_the_base() {
    let files = Files::new(16 * BLOCK_BYTES, 16 * BLOCK_BYTES);
    let mut expected = files.base_bytes();
    let mut guest = Guest::new(files.config());
    assert_eq!(guest.write(0, &[7; 4 * BLOCK]), OK);
    expected[..4 * BLOCK].fill(7);
    assert_eq!(
        guest.zero(VIRTIO_BLK_T_DISCARD, 2 * BLOCK_SECTORS, 4 * 8, 0),
        OK
    );
    expected[2 * BLOCK..6 * BLOCK].fill(0);
    assert_eq!(
        guest.zero(VIRTIO_BLK_T_WRITE_ZEROES, 8 * BLOCK_SECTORS, 8, 0),
        OK
    );
    assert_eq!(
        guest.zero(VIRTIO_BLK_T_WRITE_ZEROES, 9 * BLOCK_SECTORS, 8, 1),
        OK
    );
    expected[8 * BLOCK..10 * BLOCK].fill(0);
    assert_eq!(guest.read(0, 16 * BLOCK), expected);
    assert_eq!(
        (guest.counter("discards"), guest.counter("write_zeroes")),
        (1, 2)
    );
    // Flags that the specification does not allow.
    assert_eq!(guest.zero(VIRTIO_BLK_T_DISCARD, 0, 8, 1), UNSUPP);
    assert_eq!(guest.zero(VIRTIO_BLK_T_WRITE_ZEROES, 0, 8, 2), UNSUPP);
    // Less than a block.
    assert_eq!(guest.zero(VIRTIO_BLK_T_WRITE_ZEROES, 1, 8, 0), IOERR);
    assert_eq!(guest.zero(VIRTIO_BLK_T_WRITE_ZEROES, 0, 4, 0), IOERR);
}

#[test]
fn a_disk_without_a_layer_is_read_only() {
    let files = Files::new(4 * BLOCK_BYTES, 8 * BLOCK_BYTES);
    let mut config = files.config();
    config.layer = None;
    let mut guest = Guest::new(config);
    assert_ne!(guest.features & 1 << VIRTIO_BLK_F_RO, 0);
    let writes =
        1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
    assert_eq!(guest.features & writes, 0);
    assert_eq!(guest.write(0, &[1; BLOCK]), IOERR);
    assert_eq!(guest.zero(VIRTIO_BLK_T_DISCARD, 0, 8, 0), UNSUPP);
    assert_eq!(guest.flush(), OK);
    assert_eq!(guest.read(0, 4 * BLOCK), files.base_bytes());
}

#[test]
fn tells_its_serial_and_refuses_what_it_does_not_know() {
    let files = Files::new(4 * BLOCK_BYTES, 4 * BLOCK_BYTES);
    let mut guest = Guest::new(files.config());
    guest.put(&[0xff; 32]);
    let (status, used) = guest.request(VIRTIO_BLK_T_GET_ID, 0, &[writable(DATA, 20)]);
    assert_eq!((status, used), (OK, 21));
    assert_eq!(guest.got(21), b"root\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\xff");
    assert_eq!(
        guest
            .request(VIRTIO_BLK_T_GET_ID, 0, &[writable(DATA, 19)])
            .0,
        IOERR
    );
    assert_eq!(guest.request(0x7777, 0, &[]).0, UNSUPP);
}

#[test]
fn announces_blocks_and_limits() {
    let files = Files::new(4 * BLOCK_BYTES, 8 * BLOCK_BYTES);
    let block = made(files.config()).unwrap();
    let field = |offset, len: usize| {
        let mut bytes = [0; 8];
        block.read_config(offset, &mut bytes[..len]);
        u64::from_le_bytes(bytes)
    };
    assert_eq!(field(0, 8), 64, "capacity in sectors");
    assert_eq!(field(12, 4), 126, "seg_max");
    assert_eq!(field(20, 4), 4096, "blk_size");
    assert_eq!(field(26, 2), 1, "min_io_size in logical blocks");
    assert_eq!(field(36, 4), 1 << 21, "max_discard_sectors");
    assert_eq!(field(44, 4), 8, "discard_sector_alignment");
    assert_eq!(field(60, 8), 0);
    assert_eq!(field(u64::MAX, 8), 0);
}

#[test]
fn a_full_queue_of_requests_completes() {
    let files = Files::new(256 * BLOCK_BYTES, 256 * BLOCK_BYTES);
    let mut guest = Guest::new(files.config());
    // Three descriptors each, and a second round that wraps the rings.
    for round in 0..10u8 {
        guest.put(&vec![round; 42 * BLOCK]);
        let statuses: Vec<u64> = (0..42)
            .map(|n| {
                guest.offer(
                    VIRTIO_BLK_T_OUT,
                    n * BLOCK_SECTORS,
                    &[readable(DATA + n * BLOCK_BYTES, BLOCK as u32)],
                )
            })
            .collect();
        guest.block.queue_notified(0);
        guest.driver.wait_used(&mut guest.block, 42);
        assert!(statuses.iter().all(|&at| guest.status(at) == OK));
        assert_eq!(guest.read(0, 42 * BLOCK), vec![round; 42 * BLOCK]);
    }
    assert_eq!(guest.counter("writes"), 420);
}

#[test]
fn a_rate_limit_defers_and_then_completes() {
    let files = Files::new(16 * BLOCK_BYTES, 16 * BLOCK_BYTES);
    let mut config = files.config();
    config.rate_limit.operations = Some(Bucket {
        capacity: 2,
        refill_time_ms: 200,
    });
    let mut guest = Guest::new(config);
    assert_eq!(guest.block.sources().len(), 2);
    for n in 0..3 {
        guest.offer(
            VIRTIO_BLK_T_IN,
            0,
            &[writable(DATA + n * BLOCK_BYTES, BLOCK as u32)],
        );
    }
    guest.block.queue_notified(0);
    assert_eq!(guest.counter("throttled"), 1);
    assert_eq!(guest.driver.wait_used(&mut guest.block, 3).len(), 3);
    assert_eq!(guest.counter("reads"), 3);
}

#[test]
fn a_write_larger_than_the_bucket_is_not_stuck() {
    let files = Files::new(16 * BLOCK_BYTES, 16 * BLOCK_BYTES);
    let mut config = files.config();
    config.rate_limit.bytes = Some(Bucket {
        capacity: 4096,
        refill_time_ms: 1,
    });
    let mut guest = Guest::new(config);
    for _ in 0..3 {
        assert_eq!(guest.write(0, &[3; 16 * BLOCK]), OK);
    }
}

#[test]
fn event_index_suppresses_interrupts() {
    let files = Files::new(16 * BLOCK_BYTES, 16 * BLOCK_BYTES);
    let mut guest = Guest::new(files.config());
    // used_event, behind the available ring, stays 0: the driver wants to hear
    // of the first used buffer only.
    for _ in 0..4 {
        assert_eq!(guest.read(0, BLOCK).len(), BLOCK);
    }
    assert_eq!(guest.driver.interrupts(), 1);
    let mut guest = Guest::with_features(
        {
            let mut config = files.config();
            config.layer = None;
            config
        },
        0,
    );
    for _ in 0..4 {
        assert_eq!(guest.read(0, BLOCK).len(), BLOCK);
    }
    assert_eq!(guest.driver.interrupts(), 4);
}

#[test]
fn a_reset_forgets_the_queue_and_the_disk_goes_on() {
    let files = Files::new(64 * BLOCK_BYTES, 64 * BLOCK_BYTES);
    let mut guest = Guest::new(files.config());
    assert_eq!(guest.write(0, &[9; BLOCK]), OK);
    guest.offer(VIRTIO_BLK_T_OUT, 8, &[readable(DATA, BLOCK as u32)]);
    guest.offer(VIRTIO_BLK_T_FLUSH, 0, &[]);
    guest.block.queue_notified(0);
    guest.block.reset();
    let used = guest.driver.take_used().len();
    guest.block.queue_notified(0);
    while testing::serve(&mut guest.block, Duration::ZERO) {}
    assert_eq!(
        guest.driver.take_used(),
        [],
        "used after a reset, {used} before"
    );

    guest.driver = Driver::new(&guest.memory, RINGS, QUEUE_SIZE);
    guest
        .block
        .activate(guest.driver.activation(guest.features))
        .unwrap();
    assert_eq!(guest.read(0, BLOCK), [9; BLOCK]);
    assert_eq!(guest.flush(), OK);
}

#[test]
fn requests_that_wait_in_the_ring_are_served_on_activation() {
    let files = Files::new(16 * BLOCK_BYTES, 16 * BLOCK_BYTES);
    let mut guest = Guest::new(files.config());
    guest.block.reset();
    guest.driver = Driver::new(&guest.memory, RINGS, QUEUE_SIZE);
    let status = guest.offer(VIRTIO_BLK_T_IN, 0, &[writable(DATA, BLOCK as u32)]);
    guest
        .block
        .activate(guest.driver.activation(guest.features))
        .unwrap();
    guest.driver.wait_used(&mut guest.block, 1);
    assert_eq!(guest.status(status), OK);
}

#[test]
fn a_base_cut_under_the_disk_is_an_error_and_not_zeros() {
    let files = Files::new(16 * BLOCK_BYTES, 16 * BLOCK_BYTES);
    let mut guest = Guest::new(files.config());
    let path = files.folder.path().join("base");
    OpenOptions::new()
        .write(true)
        .open(path)
        .unwrap()
        .set_len(BLOCK_BYTES)
        .unwrap();
    let data = [writable(DATA, 4 * BLOCK as u32)];
    assert_eq!(guest.request(VIRTIO_BLK_T_IN, 0, &data).0, IOERR);
    assert_eq!(guest.read(0, BLOCK).len(), BLOCK);
}
