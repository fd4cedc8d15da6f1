use super::*;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

const BLOCK: usize = BLOCK_BYTES as usize;
/// Header and bitmap of a small disk.
const DATA_START: u64 = 2 * BLOCK_BYTES;

fn files() -> Files {
    Files::new(16 * BLOCK_BYTES, 32 * BLOCK_BYTES)
}

/// A layer that holds one block, closed.
fn written() -> Files {
    let files = files();
    let mut guest = Guest::new(files.config());
    assert_eq!(guest.write(8, &[0x77; BLOCK]), OK);
    assert_eq!(guest.flush(), OK);
    files
}

#[test]
fn a_layer_keeps_what_was_flushed() {
    let files = written();
    let mut guest = Guest::new(files.config());
    assert_eq!(guest.counter("layer_blocks"), 1);
    let mut expected = files.base_bytes()[..3 * BLOCK].to_vec();
    expected[BLOCK..2 * BLOCK].fill(0x77);
    assert_eq!(guest.read(0, 3 * BLOCK), expected);
}

#[test]
fn a_discard_survives_too() {
    let files = written();
    let mut guest = Guest::new(files.config());
    assert_eq!(guest.zero(VIRTIO_BLK_T_DISCARD, 8, 16, 0), OK);
    assert_eq!(guest.flush(), OK);
    drop(guest);
    let mut guest = Guest::new(files.config());
    assert_eq!(guest.read(8, 2 * BLOCK), [0; 2 * BLOCK]);
}

#[test]
fn bits_reach_the_file_only_with_a_flush() {
    let files = files();
    let bitmap = || {
        let mut bytes = [0; BLOCK];
        files
            .layer()
            .read_exact_at(&mut bytes, BLOCK_BYTES)
            .unwrap();
        bytes
    };
    let mut guest = Guest::new(files.config());
    assert_eq!(guest.write(8, &[1; 2 * BLOCK]), OK);
    assert_eq!(bitmap()[0], 0, "a bit before its data is durable");
    assert_eq!(guest.flush(), OK);
    assert_eq!(bitmap()[0], 0b110);
}

/// Whatever is lost between two flushes, the block is the base's again and not
/// what its place in the layer holds.
#[test]
fn a_lost_bit_shows_the_base() {
    let files = files();
    let mut guest = Guest::new(files.config());
    assert_eq!(guest.write(8, &[1; BLOCK]), OK);
    drop(guest);
    let mut guest = Guest::new(files.config());
    assert_eq!(guest.read(8, BLOCK), files.base_bytes()[BLOCK..2 * BLOCK]);
    // And a hole made there is a hole, not the lost block.
    assert_eq!(guest.zero(VIRTIO_BLK_T_WRITE_ZEROES, 8, 8, 0), OK);
    assert_eq!(guest.read(8, BLOCK), [0; BLOCK]);
}

#[test]
fn without_the_flush_feature_every_write_is_durable() {
    let files = files();
    let mut guest = Guest::with_features(files.config(), !(1 << VIRTIO_BLK_F_FLUSH));
    assert_eq!(guest.write(8, &[1; BLOCK]), OK);
    assert_eq!(guest.zero(VIRTIO_BLK_T_DISCARD, 24, 8, 0), OK);
    drop(guest);
    let mut guest = Guest::new(files.config());
    assert_eq!(guest.read(8, BLOCK), [1; BLOCK]);
    assert_eq!(guest.read(24, BLOCK), [0; BLOCK]);
}

#[test]
fn flushes_that_come_together_all_complete() {
    let files = files();
    let mut guest = Guest::new(files.config());
    let mut statuses = Vec::new();
    for n in 0..20 {
        statuses.push(guest.offer(VIRTIO_BLK_T_OUT, n % 4 * 8, &[readable(DATA, BLOCK as u32)]));
        statuses.push(guest.offer(VIRTIO_BLK_T_FLUSH, 0, &[]));
        guest.block.queue_notified(0);
    }
    guest.driver.wait_used(&mut guest.block, 40);
    assert!(statuses.iter().all(|&at| guest.status(at) == OK));
    assert_eq!(guest.counter("flushes"), 20);
}

#[test]
fn a_large_disk_costs_next_to_nothing() {
    let files = Files::new(BLOCK_BYTES, 1 << 40);
    let mut guest = Guest::new(files.config());
    let last = (1 << 40) / SECTOR_BYTES - 8;
    assert_eq!(guest.write(last, &[5; BLOCK]), OK);
    assert_eq!(guest.flush(), OK);
    drop(guest);
    assert!(files.layer().metadata().unwrap().blocks() * 512 < 64 * 1024);
    let mut guest = Guest::new(files.config());
    assert_eq!(guest.read(last, BLOCK), [5; BLOCK]);
    assert_eq!(guest.counter("layer_blocks"), 1);
}

/// Takes a lock of the open file, which conflicts with the process's own.
fn lock(file: &File) -> bool {
    let lock = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open and the structure is whole. rustix has no
    // such lock.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) == 0 }
}

#[test]
fn a_layer_serves_one_monitor_at_a_time() {
    let files = files();
    let other = files.layer();
    assert!(lock(&other));
    assert!(matches!(
        files.error(|_| ()),
        BlockError::Layer(LayerError::InUse)
    ));
    drop(other);
    let block = made(files.config()).unwrap();
    let other = files.layer();
    assert!(!lock(&other), "the layer is not locked");
    drop(block);
    assert!(lock(&other), "the lock outlives the disk");
}

#[test]
fn refuses_bad_configurations() {
    let files = files();
    for id in ["", "a/b", "naïve", "123456789012345678901"] {
        let error = files.error(|config| config.id = id.into());
        assert!(matches!(error, BlockError::Id(_)), "{id}");
    }
    for size_bytes in [0, 4095, 4097, u64::MAX, !4095] {
        let error = files.error(|config| config.size_bytes = size_bytes);
        assert!(matches!(error, BlockError::Size(_)), "{size_bytes}");
    }
    let error = files.error(|config| config.size_bytes = 8 * BLOCK_BYTES);
    assert!(matches!(error, BlockError::BaseTooLarge { .. }));
    let error = files.error(|config| config.base = File::open("/dev/null").unwrap());
    assert!(matches!(error, BlockError::BaseKind));
    let error = files.error(|config| config.base = tempfile::tempfile().unwrap());
    assert!(matches!(error, BlockError::BaseWritable));
    let odd = files.folder.path().join("odd");
    std::fs::write(&odd, [0; 100]).unwrap();
    let error = files.error(|config| config.base = File::open(&odd).unwrap());
    assert!(matches!(error, BlockError::BaseUnaligned(100)));
    let error = files.error(|config| config.layer = Some(files.base()));
    assert!(matches!(error, BlockError::Layer(LayerError::Access)));
}

#[test]
fn refuses_damaged_layers() {
    let refused = |damage: &dyn Fn(&File)| {
        let files = written();
        damage(&files.layer());
        match files.error(|_| ()) {
            BlockError::Layer(error) => error,
            error => panic!("{error}"),
        }
    };
    let put = |bytes: &'static [u8], at| move |file: &File| file.write_all_at(bytes, at).unwrap();
    let cut = |bytes| move |file: &File| file.set_len(bytes).unwrap();
    assert!(matches!(refused(&put(b"Q", 0)), LayerError::Magic(_)));
    assert!(matches!(refused(&put(&[2], 8)), LayerError::Version(2)));
    assert!(matches!(refused(&put(&[1], 12)), LayerError::Header));
    assert!(matches!(refused(&put(&[1], 16)), LayerError::Header));
    assert!(matches!(refused(&put(&[1], 31)), LayerError::Header));
    assert!(matches!(refused(&cut(10)), LayerError::Header));
    assert!(matches!(
        refused(&cut(DATA_START)),
        LayerError::Length { .. }
    ));
    assert!(matches!(refused(&cut(1 << 30)), LayerError::Length { .. }));
    // A torn creation: the length is there, the header is not.
    assert!(matches!(refused(&put(&[0; 32], 0)), LayerError::Magic(_)));
    // A bit for block 32 of 32.
    assert!(matches!(
        refused(&put(&[1], BLOCK_BYTES + 4)),
        LayerError::Bitmap
    ));
    assert!(matches!(
        refused(&put(&[0x80], DATA_START - 1)),
        LayerError::Bitmap
    ));

    let files = written();
    let error = files.error(|config| config.size_bytes = 64 * BLOCK_BYTES);
    assert!(matches!(error, BlockError::Layer(LayerError::Size { .. })));
}

proptest::proptest! {
    /// Bytes changed anywhere in the header or the bitmap make a layer that is
    /// refused or reads without harm.
    #[test]
    fn any_layer_is_refused_or_read(
        changes in proptest::collection::vec((0..DATA_START, proptest::prelude::any::<u8>()), 1..8),
        len in proptest::option::of(0..300_000u64),
    ) {
        let files = written();
        for (at, byte) in changes {
            files.layer().write_all_at(&[byte], at).unwrap();
        }
        if let Some(len) = len {
            files.layer().set_len(len).unwrap();
        }
        if let Ok(block) = made(files.config()) {
            drop(block);
            Guest::new(files.config()).read(0, 32 * BLOCK);
        }
    }
}
