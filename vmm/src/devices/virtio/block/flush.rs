//! The order of a flush: what was written is made durable, then the bits that
//! say so are written, then they are made durable.
//!
//! One flush runs at a time. Those that arrive meanwhile share the next one,
//! because the running one may have begun before writes that they cover.

use rustix::io::Errno;

use super::disk::{Disk, Sync};
use super::engine::{Buffers, Piece, Target};
use super::layer::BitmapWrite;

/// `W` is who waits for a flush.
#[derive(Debug)]
pub(super) struct Flush<W> {
    stage: Stage,
    /// Who waits for the flush that runs.
    running: Vec<W>,
    /// Who waits for the next one.
    waiting: Vec<W>,
    /// Files to be made durable in this stage, as far as that is not started.
    syncs: Vec<Target>,
    /// Writes of the bitmap that are not started.
    writes: Vec<BitmapWrite>,
    /// Where they go.
    top: Option<Target>,
    /// Pieces with the engine.
    under_way: usize,
    well: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Idle,
    Data,
    Bitmap,
    Barrier,
}

/// Those whose flush is over, and whether all is durable.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Flushed<W> {
    pub(super) who: Vec<W>,
    pub(super) well: bool,
}

// === impl Flush ===

impl<W> Flush<W> {
    pub(super) fn new() -> Self {
        Self {
            stage: Stage::Idle,
            running: Vec::new(),
            waiting: Vec::new(),
            syncs: Vec::new(),
            writes: Vec::new(),
            top: None,
            under_way: 0,
            well: true,
        }
    }

    pub(super) fn request(&mut self, who: W) {
        self.waiting.push(who);
    }

    /// Begins the next flush if one is wanted and none runs. Returns those whose
    /// flush is over at once, because there is nothing to do or no hope.
    pub(super) fn begin(&mut self, disk: &mut Disk) -> Option<Flushed<W>> {
        if self.stage != Stage::Idle || self.waiting.is_empty() {
            return None;
        }
        let who = std::mem::take(&mut self.waiting);
        if disk.has_failed() {
            return Some(Flushed { who, well: false });
        }
        let Some(Sync { files, writes, top }) = disk.begin_sync() else {
            return Some(Flushed { who, well: true });
        };
        self.running = who;
        self.syncs = files;
        self.writes = writes;
        self.top = Some(top);
        self.well = true;
        self.stage = Stage::Data;
        None
    }

    /// The next piece for the engine, if there is one now.
    pub(super) fn next_piece(&mut self) -> Option<Piece> {
        let piece = match self.stage {
            Stage::Idle => return None,
            Stage::Data | Stage::Barrier => Piece::Sync {
                target: self.syncs.pop()?,
            },
            Stage::Bitmap => {
                let target = self.top?;
                let BitmapWrite { offset, bytes } = self.writes.pop()?;
                Piece::Write {
                    target,
                    offset,
                    buffers: Buffers::host(bytes),
                }
            }
        };
        self.under_way += 1;
        Some(piece)
    }

    /// A piece has ended. Returns those whose flush that was.
    pub(super) fn piece_done(
        &mut self,
        result: Result<(), Errno>,
        disk: &mut Disk,
    ) -> Option<Flushed<W>> {
        self.under_way -= 1;
        self.well &= result.is_ok();
        if !self.well {
            self.syncs.clear();
            self.writes.clear();
        }
        let in_bitmap = self.stage == Stage::Bitmap;
        if self.under_way > 0 || !self.syncs.is_empty() || in_bitmap && !self.writes.is_empty() {
            return None;
        }
        self.stage = match self.stage {
            Stage::Data if self.well && !self.writes.is_empty() => Stage::Bitmap,
            Stage::Bitmap if self.well => {
                self.syncs.extend(self.top);
                Stage::Barrier
            }
            _ => Stage::Idle,
        };
        if self.stage != Stage::Idle {
            return None;
        }
        if in_bitmap {
            // A write has failed, of which the file system keeps nothing back:
            // it may be full, and work when it is not. Only what comes of a sync
            // is for good.
            disk.abandon_sync();
        } else {
            disk.end_sync(self.well);
        }
        Some(Flushed {
            who: std::mem::take(&mut self.running),
            well: self.well,
        })
    }

    /// Forgets everyone who waits, and the flush that runs. The engine must be
    /// idle.
    pub(super) fn abandon(&mut self, disk: &mut Disk) {
        if self.stage != Stage::Idle {
            disk.abandon_sync();
        }
        *self = Self::new();
    }
}

#[cfg(test)]
mod tests {
    use super::super::BLOCK_BYTES;
    use super::super::disk::Mounted;
    use super::super::layer::Layer;
    use super::*;
    use std::fs::File;

    fn disk() -> Disk {
        let base = File::open(tempfile::NamedTempFile::new().unwrap().path()).unwrap();
        let top = Some(tempfile::tempfile().unwrap());
        Disk::new(base, 64 * BLOCK_BYTES, Vec::new(), top).unwrap()
    }

    fn is_sync(piece: Option<Piece>) -> bool {
        matches!(piece, Some(Piece::Sync { .. }))
    }

    fn is_write(piece: Option<Piece>) -> bool {
        matches!(piece, Some(Piece::Write { .. }))
    }

    fn over(who: &[u8], well: bool) -> Option<Flushed<u8>> {
        let who = who.to_vec();
        Some(Flushed { who, well })
    }

    #[test]
    fn data_then_bits_then_a_barrier() {
        let mut disk = disk();
        let mut flush = Flush::new();
        disk.written(0..BLOCK_BYTES);
        flush.request(1);
        assert_eq!(flush.begin(&mut disk), None);
        assert!(is_sync(flush.next_piece()));
        assert!(
            flush.next_piece().is_none(),
            "no bit before the data is durable"
        );
        assert_eq!(flush.piece_done(Ok(()), &mut disk), None);
        assert!(is_write(flush.next_piece()));
        assert!(
            flush.next_piece().is_none(),
            "no barrier before the bits are written"
        );
        assert_eq!(flush.piece_done(Ok(()), &mut disk), None);
        assert!(is_sync(flush.next_piece()));
        assert_eq!(flush.piece_done(Ok(()), &mut disk), over(&[1], true));
    }

    #[test]
    fn one_barrier_is_enough_where_no_bit_is_new() {
        let mut disk = disk();
        let mut flush = Flush::new();
        disk.written(0..BLOCK_BYTES);
        disk.begin_sync().unwrap();
        disk.end_sync(true);
        disk.written(0..BLOCK_BYTES);
        flush.request(1);
        assert_eq!(flush.begin(&mut disk), None);
        assert!(is_sync(flush.next_piece()));
        assert_eq!(flush.piece_done(Ok(()), &mut disk), over(&[1], true));
        // And none where nothing was written.
        flush.request(2);
        assert_eq!(flush.begin(&mut disk), over(&[2], true));
    }

    #[test]
    fn who_comes_during_a_flush_waits_for_the_next() {
        let mut disk = disk();
        let mut flush = Flush::new();
        disk.written(0..BLOCK_BYTES);
        flush.request(1);
        assert_eq!(flush.begin(&mut disk), None);
        assert!(is_sync(flush.next_piece()));
        disk.written(BLOCK_BYTES..2 * BLOCK_BYTES);
        flush.request(2);
        flush.request(3);
        assert_eq!(flush.begin(&mut disk), None);
        for _ in 0..2 {
            assert_eq!(flush.piece_done(Ok(()), &mut disk), None);
            assert!(flush.next_piece().is_some());
        }
        assert_eq!(flush.piece_done(Ok(()), &mut disk), over(&[1], true));
        assert_eq!(flush.begin(&mut disk), None);
        assert!(is_sync(flush.next_piece()));
    }

    #[test]
    fn after_a_failure_no_flush_succeeds() {
        let mut disk = disk();
        let mut flush = Flush::new();
        disk.written(0..BLOCK_BYTES);
        flush.request(1);
        assert_eq!(flush.begin(&mut disk), None);
        assert!(is_sync(flush.next_piece()));
        let ended = flush.piece_done(Err(Errno::IO), &mut disk);
        assert_eq!(ended, over(&[1], false));
        flush.request(2);
        assert_eq!(flush.begin(&mut disk), over(&[2], false));
    }

    #[test]
    fn a_full_file_system_fails_a_flush_but_not_the_next() {
        let mut disk = disk();
        let mut flush = Flush::new();
        disk.written(0..BLOCK_BYTES);
        flush.request(1);
        assert_eq!(flush.begin(&mut disk), None);
        assert!(is_sync(flush.next_piece()));
        assert_eq!(flush.piece_done(Ok(()), &mut disk), None);
        assert!(is_write(flush.next_piece()));
        let ended = flush.piece_done(Err(Errno::NOSPC), &mut disk);
        assert_eq!(ended, over(&[1], false));
        flush.request(2);
        assert_eq!(flush.begin(&mut disk), None);
        assert!(is_sync(flush.next_piece()));
        assert_eq!(flush.piece_done(Ok(()), &mut disk), None);
        assert!(is_write(flush.next_piece()), "the bit is not in the file");
    }

    #[test]
    fn a_layer_frozen_before_it_was_durable_is_part_of_the_next_flush() {
        let mut disk = disk();
        let mut flush = Flush::new();
        disk.written(0..BLOCK_BYTES);
        let next = Mounted {
            target: Target::nth(2),
            layer: Layer::open_new(tempfile::tempfile().unwrap(), disk.size_bytes()).unwrap(),
        };
        let old = disk.top.replace(next).unwrap();
        disk.frozen.push(Mounted {
            target: old.target,
            layer: old.layer.frozen().unwrap(),
        });
        disk.written(0..BLOCK_BYTES);
        for first in [true, false] {
            flush.request(1);
            assert_eq!(flush.begin(&mut disk), None);
            for target in [2, 1].map(Target::nth) {
                let piece = flush.next_piece();
                assert!(matches!(piece, Some(Piece::Sync { target: t }) if t == target));
            }
            assert!(flush.next_piece().is_none());
            assert_eq!(flush.piece_done(Ok(()), &mut disk), None);
            if first {
                // Given up, it is all to be done again.
                flush.abandon(&mut disk);
            }
        }
        assert_eq!(flush.piece_done(Ok(()), &mut disk), None);
        assert!(is_write(flush.next_piece()));
        assert_eq!(flush.piece_done(Ok(()), &mut disk), None);
        assert!(is_sync(flush.next_piece()));
        assert_eq!(flush.piece_done(Ok(()), &mut disk), over(&[1], true));
        flush.request(2);
        assert_eq!(flush.begin(&mut disk), over(&[2], true), "all is durable");
    }

    #[test]
    fn an_abandoned_flush_leaves_its_work_to_the_next() {
        let mut disk = disk();
        let mut flush = Flush::new();
        disk.written(0..BLOCK_BYTES);
        flush.request(1);
        assert_eq!(flush.begin(&mut disk), None);
        flush.abandon(&mut disk);
        let Sync { writes, .. } = disk.begin_sync().expect("there is work left");
        assert_eq!(writes.len(), 1);
        assert_eq!(writes[0].bytes[0], 1);
    }
}
