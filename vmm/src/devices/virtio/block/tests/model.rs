//! The disk against a flat vector of bytes.

use super::*;
use proptest::prelude::*;

const BLOCKS: u64 = 40;
const BASE_BLOCKS: u64 = 17;
const BLOCK: usize = BLOCK_BYTES as usize;

#[derive(Clone, Debug)]
enum Step {
    Write {
        block: u64,
        blocks: u64,
        fill: u8,
    },
    Read {
        sector: u64,
        sectors: u64,
    },
    Discard {
        block: u64,
        blocks: u64,
    },
    WriteZeroes {
        block: u64,
        blocks: u64,
        unmap: bool,
    },
    Flush,
    /// The monitor goes away without a word and the layer is opened anew.
    Reopen,
    /// The guest resets the device.
    Reset,
    /// The disk comes to rest with requests in flight, and goes on.
    Quiesce {
        block: u64,
        fill: u8,
    },
    /// A snapshot, merged from some layer on or not, after which the disk has a
    /// new layer or not.
    Freeze {
        next: bool,
        keep: Option<prop::sample::Index>,
    },
    /// A snapshot that fails elsewhere.
    AbandonedFreeze {
        keep: Option<prop::sample::Index>,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let blocks = || (0..BLOCKS).prop_flat_map(|block| (Just(block), 1..=BLOCKS - block));
    let sectors = (0..BLOCKS * 8).prop_flat_map(|start| (Just(start), 1..=BLOCKS * 8 - start));
    prop_oneof![
        6 => (blocks(), any::<u8>()).prop_map(|((block, blocks), fill)| Step::Write { block, blocks, fill }),
        6 => sectors.prop_map(|(sector, sectors)| Step::Read { sector, sectors }),
        2 => blocks().prop_map(|(block, blocks)| Step::Discard { block, blocks }),
        2 => (blocks(), any::<bool>())
            .prop_map(|((block, blocks), unmap)| Step::WriteZeroes { block, blocks, unmap }),
        2 => Just(Step::Flush),
        1 => Just(Step::Reopen),
        1 => Just(Step::Reset),
        2 => (0..BLOCKS, any::<u8>()).prop_map(|(block, fill)| Step::Quiesce { block, fill }),
        3 => (prop::bool::weighted(0.8), prop::option::weighted(0.3, any::<prop::sample::Index>()))
            .prop_map(|(next, keep)| Step::Freeze { next, keep }),
        1 => prop::option::of(any::<prop::sample::Index>())
            .prop_map(|keep| Step::AbandonedFreeze { keep }),
    ]
}

fn bytes(block: u64, blocks: u64) -> std::ops::Range<usize> {
    block as usize * BLOCK..(block + blocks) as usize * BLOCK
}

/// What a disk of these layers reads.
fn contents(files: &Files, frozen: &[String]) -> Vec<u8> {
    let mut guest = Guest::new(files.config_of(frozen));
    guest.read(0, (BLOCKS * BLOCK_BYTES) as usize)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn equals_a_flat_vector(steps in prop::collection::vec(step(), 1..40)) {
        let mut files = Files::new(BASE_BLOCKS * BLOCK_BYTES, BLOCKS * BLOCK_BYTES);
        let base = files.base_bytes();
        let mut model = base.clone();
        model.resize((BLOCKS * BLOCK_BYTES) as usize, 0);
        // What was flushed, and which blocks have changed since. After a crash
        // those may be old or new, so the model takes what the disk says, once
        // it has seen that it is one of both.
        let mut flushed = model.clone();
        let mut guest = Guest::new(files.config());
        // Layers that are never written again, and what the guest had then.
        let mut snapshots: Vec<(Vec<String>, Vec<u8>)> = Vec::new();
        for step in steps {
            match step {
                Step::Write { block, blocks, fill } => {
                    let range = bytes(block, blocks);
                    let data: Vec<u8> = (0..range.len()).map(|at| fill ^ (at / 512) as u8).collect();
                    prop_assert_eq!(guest.write(block * 8, &data), OK);
                    model[range].copy_from_slice(&data);
                }
                Step::Read { sector, sectors } => {
                    let range = sector as usize * 512..(sector + sectors) as usize * 512;
                    prop_assert!(guest.read(sector, range.len()) == model[range]);
                }
                Step::Discard { block, blocks } => {
                    let status = guest.zero(VIRTIO_BLK_T_DISCARD, block * 8, blocks as u32 * 8, 0);
                    prop_assert_eq!(status, OK);
                    model[bytes(block, blocks)].fill(0);
                }
                Step::WriteZeroes { block, blocks, unmap } => {
                    let flags = u32::from(unmap);
                    let status = guest.zero(VIRTIO_BLK_T_WRITE_ZEROES, block * 8, blocks as u32 * 8, flags);
                    prop_assert_eq!(status, OK);
                    model[bytes(block, blocks)].fill(0);
                }
                Step::Flush => {
                    prop_assert_eq!(guest.flush(), OK);
                    flushed.clone_from(&model);
                }
                Step::Reopen => {
                    drop(guest);
                    guest = Guest::new(files.config());
                    let now = guest.read(0, model.len());
                    for block in 0..BLOCKS {
                        let range = bytes(block, 1);
                        let now = &now[range.clone()];
                        prop_assert!(now == &model[range.clone()] || now == &flushed[range]);
                    }
                    model = now;
                    flushed.clone_from(&model);
                }
                Step::Reset => {
                    guest.block.reset();
                    guest.driver = Driver::new(&guest.memory, RINGS, QUEUE_SIZE);
                    guest.block.activate(guest.driver.activation(guest.features)).unwrap();
                }
                Step::Quiesce { block, fill } => {
                    let range = bytes(block, 1);
                    guest.put(&[fill; BLOCK]);
                    let statuses = [
                        guest.offer(VIRTIO_BLK_T_OUT, block * 8, &[readable(DATA, BLOCK as u32)]),
                        guest.offer(VIRTIO_BLK_T_FLUSH, 0, &[]),
                    ];
                    guest.block.queue_notified(0);
                    let queues = guest.block.quiesce();
                    prop_assert_eq!(guest.driver.take_used().len(), 2);
                    prop_assert!(statuses.iter().all(|&at| guest.status(at) == OK));
                    guest.resume(queues);
                    model[range].fill(fill);
                    // The flush may have begun before the write was done.
                }
                Step::Freeze { next, keep } => {
                    let keep = keep.map(|keep| keep.index(files.frozen.len() + 1));
                    let is_full = keep.unwrap_or(files.frozen.len()) == FROZEN_LAYERS_MAX;
                    match files.freeze(&mut guest, next, keep) {
                        Ok(chain) => {
                            prop_assert!(contents(&files, &chain) == model);
                            flushed.clone_from(&model);
                            if next || keep.is_some() {
                                snapshots.push((chain, model.clone()));
                            }
                        }
                        Err(error) => prop_assert!(is_full, "{error}"),
                    }
                    prop_assert_eq!(guest.counter("layers"), files.frozen.len() as u64 + 1);
                }
                Step::AbandonedFreeze { keep } => {
                    let queues = guest.block.quiesce();
                    let (next, merged) = (files.new_name(), files.new_name());
                    let merge = keep.map(|keep| Merge {
                        file: files.writable(&merged),
                        keep: keep.index(files.frozen.len() + 1),
                    });
                    let next = Some(files.writable(&next));
                    if guest.block.prepare_freeze(Freeze { next, merge }).is_ok() {
                        flushed.clone_from(&model);
                    }
                    guest.block.abandon_freeze();
                    guest.resume(queues);
                }
            }
        }
        for (chain, then) in snapshots {
            prop_assert!(contents(&files, &chain) == then);
        }
        prop_assert!(guest.read(0, model.len()) == model);
        prop_assert!(files.base_bytes() == base);
        prop_assert_eq!(guest.counter("failures"), 0);
    }
}
