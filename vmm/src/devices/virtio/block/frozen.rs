//! A layer that is never written again: one that a snapshot has frozen, here or
//! in another machine.
//!
//! Any number of monitors may read it. They take no lock: the kernel keeps a
//! file's locks in one list that each new one is compared with, which a thousand
//! clones would feel.

use std::fs::File;
use std::sync::Arc;

use rustix::fs::OFlags;

use super::BLOCK_BYTES;
use super::bitmap::FrozenBitmap;
use super::layer::{BITMAP_START, LayerError, Layout, length};

#[derive(Debug)]
pub(super) struct FrozenLayer {
    file: Arc<File>,
    layout: Layout,
    bitmap: FrozenBitmap,
    /// It may hold what has never been made durable.
    unsynced: bool,
}

// === impl FrozenLayer ===

impl FrozenLayer {
    /// Takes a layer of a disk of `size_bytes`, believing nothing.
    pub(super) fn open(file: File, size_bytes: u64) -> Result<Self, LayerError> {
        let file_bytes = length(&file, OFlags::RDONLY)?.ok_or(LayerError::FrozenAccess)?;
        let layout = Layout::read(&file, size_bytes, file_bytes)?;
        Self::map(Arc::new(file), layout, false)
    }

    /// Takes a file that is known to be a layer, and whose bitmap is in it.
    pub(super) fn map(file: Arc<File>, layout: Layout, unsynced: bool) -> Result<Self, LayerError> {
        let bitmap =
            FrozenBitmap::map(&file, BITMAP_START, layout.blocks()).map_err(LayerError::Io)?;
        if bitmap.marks_past(layout.blocks()) {
            return Err(LayerError::Bitmap);
        }
        Ok(Self {
            file,
            layout,
            bitmap,
            unsynced,
        })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Where the byte at `disk_offset` has its place in the file.
    pub(super) fn file_offset(&self, disk_offset: u64) -> u64 {
        self.layout.file_offset(disk_offset)
    }

    /// As [`Layer::run`](super::layer::Layer::run).
    pub(super) fn run(&self, start: u64, end: u64) -> (bool, u64) {
        let last_block = end.div_ceil(BLOCK_BYTES);
        let (present, run_end) = self.bitmap.run(start / BLOCK_BYTES, last_block);
        (present, (run_end * BLOCK_BYTES).min(end))
    }

    /// Whether the file may hold what has never been made durable.
    pub(super) fn is_unsynced(&self) -> bool {
        self.unsynced
    }

    /// The file has been made durable.
    pub(super) fn set_synced(&mut self) {
        self.unsynced = false;
    }

    /// Whether the file is as long as it has to be, or someone has cut it.
    pub(super) fn check_length(&self) -> Result<(), LayerError> {
        let actual = self.file.metadata().map_err(LayerError::Io)?.len();
        self.layout.check_length(actual)
    }
}

impl AsRef<Self> for FrozenLayer {
    fn as_ref(&self) -> &Self {
        self
    }
}

/// The first of the layers that has the byte at `start`, if any has, and how far
/// that is so, `end` at most.
pub(super) fn newest<'a, L: AsRef<FrozenLayer> + 'a>(
    newest_first: impl Iterator<Item = &'a L>,
    start: u64,
    end: u64,
) -> (Option<&'a L>, u64) {
    let mut end = end;
    for layer in newest_first {
        let (present, run_end) = layer.as_ref().run(start, end);
        end = run_end;
        if present {
            return (Some(layer), end);
        }
    }
    (None, end)
}
