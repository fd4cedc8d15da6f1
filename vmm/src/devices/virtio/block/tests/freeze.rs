//! Quiescing, freezing, saving and restoring.

use super::*;
use crate::config::Bucket;
use crate::devices::StateError;
use crate::devices::virtio::ChipState;
use std::time::Duration;

const BLOCK: usize = BLOCK_BYTES as usize;
/// Header and bitmap of a small disk.
const DATA_START: u64 = 2 * BLOCK_BYTES;

fn files() -> Files {
    Files::new(16 * BLOCK_BYTES, 32 * BLOCK_BYTES)
}

/// A disk with `count` frozen layers, of which layer `n` has written `n` to block
/// `n` and to block 20.
fn chain(count: u8) -> (Files, Guest) {
    let mut files = files();
    let mut guest = Guest::new(files.config());
    for n in 0..count {
        assert_eq!(guest.write(u64::from(n) * 8, &[n; BLOCK]), OK);
        assert_eq!(guest.write(20 * 8, &[n; BLOCK]), OK);
        files.freeze(&mut guest, true, None).unwrap();
    }
    (files, guest)
}

/// Whether a disk reads as `chain` has made it.
fn reads_as_made(config: BlockConfig, count: u8) -> bool {
    let mut guest = Guest::new(config);
    (0..count).all(|n| guest.read(u64::from(n) * 8, BLOCK) == [n; BLOCK])
        && guest.read(20 * 8, BLOCK) == [count - 1; BLOCK]
}

fn new_layer() -> Option<File> {
    Some(tempfile::tempfile().unwrap())
}

/// The error of a freeze that must fail, after which the disk goes on.
fn refused(guest: &mut Guest, freeze: Freeze) -> FreezeError {
    let queues = guest.block.quiesce();
    let error = guest.block.prepare_freeze(freeze).unwrap_err();
    guest.block.abandon_freeze();
    guest.resume(queues);
    assert_eq!(guest.write(21 * 8, &[0x21; BLOCK]), OK);
    assert_eq!(guest.read(21 * 8, BLOCK), [0x21; BLOCK]);
    error
}

#[test]
fn a_chain_reads_through_all_its_layers() {
    let (files, mut guest) = chain(5);
    assert_eq!(guest.block.frozen_layers(), 5);
    assert_eq!(guest.counter("layers"), 6);
    assert_eq!(guest.counter("layer_blocks"), 0, "the top layer is new");
    let mut expected = files.base_bytes();
    expected.resize(32 * BLOCK, 0);
    for n in 0..5 {
        expected[n * BLOCK..][..BLOCK].fill(n as u8);
    }
    expected[20 * BLOCK..21 * BLOCK].fill(4);
    assert_eq!(guest.read(0, 32 * BLOCK), expected);
    assert_eq!(guest.write(0, &[9; BLOCK]), OK);
    assert_eq!(guest.flush(), OK);
    drop(guest);
    expected[..BLOCK].fill(9);
    let mut guest = Guest::new(files.config());
    assert_eq!(guest.counter("layers"), 6);
    assert_eq!(guest.read(0, 32 * BLOCK), expected);
    // Many may read the frozen layers at a time.
    assert!(reads_as_made(files.config_of(&files.frozen), 5));
}

#[test]
fn a_merge_makes_one_of_many() {
    for keep in 0..=4 {
        for next in [false, true] {
            let (mut files, mut guest) = chain(4);
            let top = files.top.clone();
            assert_eq!(guest.write(4 * 8, &[4; BLOCK]), OK);
            assert_eq!(guest.write(20 * 8, &[4; BLOCK]), OK);
            let snapshot = files.freeze(&mut guest, next, Some(keep)).unwrap();
            assert_eq!(snapshot.len(), keep + 1);
            assert!(reads_as_made(files.config_of(&snapshot), 5));
            let layers = if next { keep + 2 } else { 5 };
            assert_eq!(guest.counter("layers"), layers as u64);
            assert_eq!(files.top == top, !next);
            // What the guest does now is not the snapshot's.
            assert_eq!(guest.write(0, &[0xff; BLOCK]), OK);
            assert_eq!(guest.flush(), OK);
            assert!(reads_as_made(files.config_of(&snapshot), 5));
            drop(guest);
            let mut guest = Guest::new(files.config());
            assert_eq!(guest.read(0, BLOCK), [0xff; BLOCK]);
            assert_eq!(guest.read(20 * 8, BLOCK), [4; BLOCK]);
        }
    }
}

#[test]
fn what_was_discarded_stays_so_in_a_merge() {
    let (mut files, mut guest) = chain(1);
    assert_eq!(guest.zero(VIRTIO_BLK_T_DISCARD, 0, 16, 0), OK);
    let snapshot = files.freeze(&mut guest, true, Some(0)).unwrap();
    let mut guest = Guest::new(files.config_of(&snapshot));
    assert_eq!(guest.read(0, 2 * BLOCK), [0; 2 * BLOCK]);
    assert_eq!(guest.read(20 * 8, BLOCK), [0; BLOCK]);
    assert_eq!(
        guest.read(2 * 8, BLOCK),
        files.base_bytes()[2 * BLOCK..3 * BLOCK]
    );
}

#[test]
fn without_a_next_layer_the_top_stays() {
    let (mut files, mut guest) = chain(2);
    assert_eq!(guest.write(2 * 8, &[2; BLOCK]), OK);
    assert_eq!(guest.write(20 * 8, &[2; BLOCK]), OK);
    let snapshot = files.freeze(&mut guest, false, None).unwrap();
    assert!(reads_as_made(files.config_of(&snapshot), 3));
    assert_eq!(guest.block.frozen_layers(), 2);
    assert_eq!(guest.write(3 * 8, &[3; BLOCK]), OK);
    assert_eq!(guest.flush(), OK);
    drop(guest);
    let mut guest = Guest::new(files.config());
    assert_eq!(guest.read(2 * 8, BLOCK), [2; BLOCK]);
    assert_eq!(guest.read(3 * 8, BLOCK), [3; BLOCK]);
}

#[test]
fn a_chain_is_bounded() {
    let most = FROZEN_LAYERS_MAX;
    let (mut files, mut guest) = chain(most as u8);
    assert!(matches!(
        refused(
            &mut guest,
            Freeze {
                next: new_layer(),
                merge: None
            }
        ),
        FreezeError::Request(_)
    ));
    // A snapshot of it would have a layer too many, whatever goes on here.
    let error = refused(
        &mut guest,
        Freeze {
            next: None,
            merge: None,
        },
    );
    assert!(matches!(error, FreezeError::Request(_)));
    for keep in [most, most + 1, usize::MAX] {
        let merge = new_layer().map(|file| Merge { file, keep });
        let next = new_layer();
        let error = refused(&mut guest, Freeze { next, merge });
        assert!(matches!(error, FreezeError::Request(_)));
    }
    drop(guest);
    let error = files.error(|config| config.frozen.push(files.base()));
    assert!(matches!(error, BlockError::TooManyLayers(17)));
    // The longest chain that there can be is merged, from its end and whole.
    let mut guest = Guest::new(files.config());
    for keep in [most - 1, 0] {
        let snapshot = files.freeze(&mut guest, true, Some(keep)).unwrap();
        assert!(reads_as_made(files.config_of(&snapshot), most as u8));
        assert_eq!(guest.block.frozen_layers(), keep + 1);
    }
}

#[test]
fn a_read_only_disk_has_nothing_to_freeze() {
    let (files, guest) = chain(2);
    drop(guest);
    let mut guest = Guest::new(files.config_of(&files.frozen));
    assert_eq!(guest.counter("layers"), 2);
    let queues = guest.block.quiesce();
    let nothing = Freeze {
        next: None,
        merge: None,
    };
    guest.block.prepare_freeze(nothing).unwrap();
    guest.block.commit_freeze();
    let merge = || new_layer().map(|file| Merge { file, keep: 0 });
    for (next, merge) in [(new_layer(), None), (None, merge()), (new_layer(), merge())] {
        let error = guest.block.prepare_freeze(Freeze { next, merge });
        assert!(matches!(error, Err(FreezeError::Request(_))));
    }
    guest.resume(queues);
    assert_eq!(guest.read(0, BLOCK), [0; BLOCK]);
}

#[test]
fn a_freeze_has_its_time_and_its_files() {
    let (files, mut guest) = chain(1);
    let freeze = |next| Freeze { next, merge: None };
    let error = guest.block.prepare_freeze(freeze(new_layer()));
    assert!(matches!(error, Err(FreezeError::Request(_))), "not at rest");

    let queues = guest.block.quiesce();
    guest.block.prepare_freeze(freeze(new_layer())).unwrap();
    let error = guest.block.prepare_freeze(freeze(new_layer()));
    assert!(matches!(error, Err(FreezeError::Request(_))), "twice");
    guest.block.abandon_freeze();
    guest.block.abandon_freeze();
    guest.resume(queues);

    let used = files.writable("used");
    used.set_len(1).unwrap();
    for (next, expected) in [
        (files.base(), "Layer(Access)"),
        (File::open("/dev/null").unwrap(), "Layer(Access)"),
        (used, "Layer(NotEmpty(1))"),
    ] {
        let error = refused(&mut guest, freeze(Some(next)));
        assert_eq!(format!("{error:?}"), expected);
    }
    // One file for both.
    let file = files.writable("both");
    let merge = Some(Merge {
        file: file.try_clone().unwrap(),
        keep: 0,
    });
    let error = refused(
        &mut guest,
        Freeze {
            next: Some(file),
            merge,
        },
    );
    assert!(matches!(error, FreezeError::Layer(LayerError::NotEmpty(_))));
    assert_eq!(guest.counter("layers"), 2);
}

#[test]
fn an_abandoned_freeze_leaves_no_trace() {
    let (mut files, mut guest) = chain(3);
    // More often than the ring has places for files.
    for n in 0..30u8 {
        assert_eq!(guest.write(22 * 8, &[n; BLOCK]), OK);
        let queues = guest.block.quiesce();
        let merge = new_layer().map(|file| Merge { file, keep: 1 });
        let next = new_layer();
        guest.block.prepare_freeze(Freeze { next, merge }).unwrap();
        guest.block.abandon_freeze();
        guest.block.commit_freeze();
        guest.resume(queues);
        assert_eq!(guest.counter("layers"), 4);
        assert_eq!(guest.read(22 * 8, BLOCK), [n; BLOCK]);
    }
    assert_eq!(guest.flush(), OK);
    files.freeze(&mut guest, true, Some(1)).unwrap();
    assert_eq!(guest.block.frozen_layers(), 2);
    assert_eq!(guest.read(22 * 8, BLOCK), [29; BLOCK]);
    drop(guest);
    let mut guest = Guest::new(files.config());
    assert_eq!(guest.read(22 * 8, BLOCK), [29; BLOCK]);
}

#[test]
fn a_layer_that_was_cut_is_not_merged_as_holes() {
    let (files, mut guest) = chain(3);
    files
        .writable(&files.frozen[1])
        .set_len(DATA_START)
        .unwrap();
    let merge = new_layer().map(|file| Merge { file, keep: 0 });
    let next = None;
    let error = refused(&mut guest, Freeze { next, merge });
    assert!(matches!(
        error,
        FreezeError::Layer(LayerError::Length { .. })
    ));
}

#[test]
fn refuses_damaged_frozen_layers() {
    let refused = |damage: &dyn Fn(&File)| {
        let (files, guest) = chain(3);
        drop(guest);
        damage(&files.writable(&files.frozen[1]));
        match files.error(|_| ()) {
            BlockError::Frozen { index: 1, error } => error,
            error => panic!("{error}"),
        }
    };
    let put = |bytes: &'static [u8], at| move |file: &File| file.write_all_at(bytes, at).unwrap();
    let cut = |bytes| move |file: &File| file.set_len(bytes).unwrap();
    assert!(matches!(refused(&cut(0)), LayerError::Header));
    assert!(matches!(refused(&cut(10)), LayerError::Header));
    assert!(matches!(
        refused(&cut(DATA_START)),
        LayerError::Length { .. }
    ));
    assert!(matches!(refused(&put(b"Q", 0)), LayerError::Magic(_)));
    assert!(matches!(refused(&put(&[2], 8)), LayerError::Version(2)));
    assert!(matches!(refused(&put(&[1], 17)), LayerError::Header));
    assert!(matches!(
        refused(&put(&[1], BLOCK_BYTES + 4)),
        LayerError::Bitmap
    ));

    let (files, guest) = chain(1);
    drop(guest);
    let frozen = |change: &dyn Fn(&mut BlockConfig)| match files.error(change) {
        BlockError::Frozen { index: 0, error } => error,
        error => panic!("{error}"),
    };
    let writable = frozen(&|config| config.frozen = vec![files.writable("layer")]);
    assert!(matches!(writable, LayerError::FrozenAccess));
    let folder = frozen(&|config| config.frozen = vec![File::open(files.path("")).unwrap()]);
    assert!(matches!(folder, LayerError::FrozenAccess));
    let other = frozen(&|config| config.size_bytes = 64 * BLOCK_BYTES);
    assert!(matches!(other, LayerError::Size { .. }));
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]
    /// Whatever a frozen layer holds, it is refused, or read and merged without
    /// harm, and never written.
    #[test]
    fn any_frozen_layer_is_refused_or_read(
        changes in proptest::collection::vec((0..DATA_START, proptest::prelude::any::<u8>()), 1..8),
        len in proptest::option::of(0..300_000u64),
    ) {
        let (mut files, guest) = chain(2);
        drop(guest);
        let name = files.frozen[0].clone();
        for (at, byte) in changes {
            files.writable(&name).write_all_at(&[byte], at).unwrap();
        }
        if let Some(len) = len {
            files.writable(&name).set_len(len).unwrap();
        }
        let before = std::fs::read(files.path(&name)).unwrap();
        if made(files.config()).is_ok() {
            let mut guest = Guest::new(files.config());
            let read = guest.read(0, 32 * BLOCK);
            let snapshot = files.freeze(&mut guest, true, Some(0)).unwrap();
            assert!(Guest::new(files.config_of(&snapshot)).read(0, 32 * BLOCK) == read);
        }
        assert!(std::fs::read(files.path(&name)).unwrap() == before);
    }
}

#[test]
fn all_that_is_in_flight_is_answered_once() {
    let files = Files::new(256 * BLOCK_BYTES, 256 * BLOCK_BYTES);
    let mut guest = Guest::new(files.config());
    for round in 0..20u8 {
        guest.put(&vec![round; 20 * BLOCK]);
        let mut statuses = Vec::new();
        for n in 0..20 {
            let data = [readable(DATA + n * BLOCK_BYTES, BLOCK as u32)];
            statuses.push(guest.offer(VIRTIO_BLK_T_OUT, n * 8, &data));
            // Some begin while another runs.
            statuses.push(guest.offer(VIRTIO_BLK_T_FLUSH, 0, &[]));
            if n % 5 == 0 {
                guest.block.queue_notified(0);
            }
        }
        let queues = guest.block.quiesce();
        assert_eq!(queues.len(), 1);
        // What was taken is answered, and what was not is still there.
        let answered = guest.driver.take_used().len();
        let known = |at: &&u64| guest.status(**at) == OK;
        assert_eq!(statuses.iter().filter(known).count(), answered);
        assert!(answered >= 32, "{answered}");
        // At rest, the disk does nothing.
        guest.block.queue_notified(0);
        guest.block.source_ready(0);
        guest.block.source_ready(1);
        while testing::serve(&mut guest.block, Duration::ZERO) {}
        assert_eq!(guest.driver.take_used(), []);
        assert!(guest.block.quiesce().is_empty());

        guest.resume(queues);
        guest.driver.wait_used(&mut guest.block, 40 - answered);
        while testing::serve(&mut guest.block, Duration::ZERO) {}
        assert_eq!(guest.driver.take_used(), []);
        assert!(statuses.iter().all(|&at| guest.status(at) == OK));
        assert_eq!(guest.read(0, 20 * BLOCK), vec![round; 20 * BLOCK]);
    }
    assert_eq!(guest.counter("flushes"), 400);
    assert_eq!(guest.counter("writes"), 400);
}

#[test]
fn a_request_that_waits_for_its_turn_goes_back_to_the_ring() {
    let files = files();
    let mut config = files.config();
    config.rate_limit.operations = Some(Bucket {
        capacity: 2,
        refill_time_ms: 200,
    });
    let mut guest = Guest::new(config);
    let statuses: Vec<u64> = (0..5)
        .map(|n| {
            let data = [writable(DATA + n * BLOCK_BYTES, BLOCK as u32)];
            guest.offer(VIRTIO_BLK_T_IN, n * 8, &data)
        })
        .collect();
    guest.block.queue_notified(0);
    assert_eq!(guest.counter("throttled"), 1);
    for _ in 0..3 {
        let queues = guest.block.quiesce();
        let used = guest.driver.take_used().len();
        assert!(used <= 2);
        // Its time comes while the disk rests.
        std::thread::sleep(Duration::from_millis(120));
        while testing::serve(&mut guest.block, Duration::ZERO) {}
        assert_eq!(guest.driver.take_used(), []);
        guest.resume(queues);
        testing::serve(&mut guest.block, Duration::ZERO);
    }
    while guest.counter("reads") < 5 {
        testing::serve(&mut guest.block, Duration::from_millis(100));
    }
    while testing::serve(&mut guest.block, Duration::from_millis(1)) {}
    assert!(statuses.iter().all(|&at| guest.status(at) == OK));
    assert_eq!(guest.got(5 * BLOCK), files.base_bytes()[..5 * BLOCK]);
    assert_eq!(guest.counter("reads"), 5);
}

/// A request that one disk had to put back is served by the one restored from it.
#[test]
fn another_disk_goes_on_with_the_queue() {
    let files = files();
    let mut config = files.config();
    config.rate_limit.operations = Some(Bucket {
        capacity: 1,
        refill_time_ms: 1_000_000,
    });
    let mut guest = Guest::new(config);
    for n in 0..4 {
        let data = [writable(DATA + n * BLOCK_BYTES, BLOCK as u32)];
        guest.offer(VIRTIO_BLK_T_IN, n * 8, &data);
    }
    guest.block.queue_notified(0);
    let queues = guest.block.quiesce();
    assert_eq!(guest.driver.take_used().len(), 1);
    let state = guest.block.save();
    let mut restored = made(BlockConfig {
        layer: new_layer(),
        ..files.config()
    })
    .unwrap();
    restored.restore(state).unwrap();
    guest.block = restored;
    guest.resume(queues);
    guest.driver.wait_used(&mut guest.block, 3);
    assert_eq!(guest.got(4 * BLOCK), files.base_bytes()[..4 * BLOCK]);
}

#[test]
fn a_flush_after_a_freeze_covers_what_was_written_before() {
    let (mut files, mut guest) = chain(1);
    assert_eq!(guest.write(0, &[1; BLOCK]), OK);
    files.freeze(&mut guest, true, None).unwrap();
    // Nothing is in the new layer, but the frozen one is not durable.
    assert_eq!(guest.flush(), OK);
    assert_eq!(guest.counter("flushes"), 1);
    assert_eq!(guest.counter("failures"), 0);
}

#[test]
fn a_state_must_be_this_disk_s() {
    let files = files();
    let mut block = made(files.config()).unwrap();
    let state = BlockState {
        id: "root".into(),
        size_bytes: 32 * BLOCK_BYTES,
        writable: true,
    };
    assert_eq!(block.save(), ChipState::Block(state.clone()));
    block.restore(ChipState::Block(state.clone())).unwrap();
    for other in [
        BlockState {
            id: "data".into(),
            ..state.clone()
        },
        BlockState {
            size_bytes: 33 * BLOCK_BYTES,
            ..state.clone()
        },
        BlockState {
            writable: false,
            ..state
        },
    ] {
        let error = block.restore(ChipState::Block(other)).unwrap_err();
        assert!(matches!(&error, StateError::Chip(_)), "{error}");
    }
    let error = block.restore(ChipState::Rng).unwrap_err();
    assert!(matches!(error, StateError::Kind));
}

/// With no room for more than a layer's header: a limit on the length of files,
/// which holds for a whole process, so the test is one of its own.
#[test]
fn a_full_file_system_fails_the_freeze_alone() {
    const CHILD: &str = "SOULBOX_TEST_OF_A_FULL_FILE_SYSTEM";
    if std::env::var_os(CHILD).is_none() {
        let name = std::thread::current().name().unwrap().to_owned();
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &name, "--test-threads=1"])
            .env(CHILD, "")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{said}");
        assert!(said.contains("1 passed"), "{said}");
        return;
    }

    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = |bytes| {
        let maximum = getrlimit(Resource::Fsize).maximum;
        let current = bytes;
        setrlimit(Resource::Fsize, Rlimit { current, maximum }).unwrap();
    };
    // SAFETY: ignoring a signal runs no code of ours; rustix has no signals.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };

    let (mut files, mut guest) = chain(2);
    assert_eq!(guest.write(3 * 8, &[3; BLOCK]), OK);
    limit(Some(BLOCK_BYTES));
    for _ in 0..2 {
        let queues = guest.block.quiesce();
        let nothing = || Freeze {
            next: None,
            merge: None,
        };
        let error = guest.block.prepare_freeze(nothing()).unwrap_err();
        assert!(matches!(error, FreezeError::Io(_)), "{error}");
        let next = files.new_name();
        let next = Some(files.writable(&next));
        let error = guest
            .block
            .prepare_freeze(Freeze { next, ..nothing() })
            .unwrap_err();
        assert!(matches!(error, FreezeError::Layer(LayerError::Io(_))));
        guest.block.abandon_freeze();
        guest.resume(queues);
        assert_eq!(guest.read(3 * 8, BLOCK), [3; BLOCK]);
        assert_eq!(guest.flush(), IOERR, "the bits have no room");
    }
    assert_eq!(guest.counter("layers"), 3);
    limit(None);
    assert_eq!(guest.flush(), OK);
    let snapshot = files.freeze(&mut guest, true, Some(1)).unwrap();
    let mut guest = Guest::new(files.config_of(&snapshot));
    assert_eq!(guest.read(3 * 8, BLOCK), [3; BLOCK]);
    assert_eq!(guest.read(20 * 8, BLOCK), [1; BLOCK]);
}
