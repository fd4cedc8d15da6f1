//! The stack of files a disk is read from.
//!
//! A read is resolved from the top down: top layer, frozen layers, base, zeros.
//! [`Disk::resolve`] alone knows where a block is.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};

use rustix::fs::{OFlags, fcntl_getfl};

use super::engine::Target;
use super::frozen::{FrozenLayer, newest};
use super::layer::{BitmapWrite, Layer};
use super::{BLOCK_BYTES, BlockError, DISK_MAX_BYTES, FROZEN_LAYERS_MAX};

/// How far [`Disk::resolve`] looks. Where one layer is in many pieces, each of them
/// would otherwise have the others searched to the end. It is what a page of the
/// bitmap stands for, and as much as one request hardly ever asks for.
pub(super) const WINDOW_BYTES: u64 = 128 << 20;

#[derive(Debug)]
pub(super) struct Disk {
    base: File,
    base_bytes: u64,
    size_bytes: u64,
    /// Root first.
    pub(super) frozen: Vec<Mounted<FrozenLayer>>,
    /// What takes the writes; none on a read-only disk.
    pub(super) top: Option<Mounted<Layer>>,
}

/// A layer, and where the engine has it.
#[derive(Debug)]
pub(super) struct Mounted<L> {
    pub(super) target: Target,
    pub(super) layer: L,
}

/// A stretch of the disk that is in one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) place: Place,
    pub(super) bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    File { target: Target, offset: u64 },
    Zeros,
}

/// What makes a disk durable, in three steps: the files, then the writes to the
/// top layer, then, if there were any, the top layer again.
#[derive(Debug)]
pub(super) struct Sync {
    pub(super) files: Vec<Target>,
    pub(super) writes: Vec<BitmapWrite>,
    pub(super) top: Target,
}

// === impl Disk ===

impl Disk {
    /// `frozen` is root first.
    pub(super) fn new(
        base: File,
        size_bytes: u64,
        frozen: Vec<File>,
        top: Option<File>,
    ) -> Result<Self, BlockError> {
        if size_bytes == 0 || size_bytes > DISK_MAX_BYTES || !size_bytes.is_multiple_of(BLOCK_BYTES)
        {
            return Err(BlockError::Size(size_bytes));
        }
        let metadata = base.metadata().map_err(BlockError::Base)?;
        if !metadata.is_file() {
            return Err(BlockError::BaseKind);
        }
        let flags = fcntl_getfl(&base).map_err(|errno| BlockError::Base(errno.into()))?;
        if flags & OFlags::ACCMODE != OFlags::RDONLY {
            return Err(BlockError::BaseWritable);
        }
        let base_bytes = metadata.len();
        if !base_bytes.is_multiple_of(BLOCK_BYTES) {
            return Err(BlockError::BaseUnaligned(base_bytes));
        }
        if base_bytes > size_bytes {
            return Err(BlockError::BaseTooLarge {
                base_bytes,
                size_bytes,
            });
        }
        if frozen.len() > FROZEN_LAYERS_MAX {
            return Err(BlockError::TooManyLayers(frozen.len()));
        }
        // The targets are those of `files`.
        let mut mounted = Vec::with_capacity(frozen.len());
        for (index, file) in frozen.into_iter().enumerate() {
            let layer = FrozenLayer::open(file, size_bytes)
                .map_err(|error| BlockError::Frozen { index, error })?;
            let target = Target::nth(1 + index);
            mounted.push(Mounted { target, layer });
        }
        let top = match top {
            Some(file) => Some(Mounted {
                target: Target::nth(1 + mounted.len()),
                layer: Layer::open(file, size_bytes)?,
            }),
            None => None,
        };
        Ok(Self {
            base,
            base_bytes,
            size_bytes,
            frozen: mounted,
            top,
        })
    }

    pub(super) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    pub(super) fn is_writable(&self) -> bool {
        self.top.is_some()
    }

    /// How many layer files the disk is read from.
    pub(super) fn layers(&self) -> usize {
        self.frozen.len() + usize::from(self.top.is_some())
    }

    /// The files of a new disk, for the engine.
    pub(super) fn files(&self) -> Vec<RawFd> {
        let frozen = self.frozen.iter().map(|frozen| frozen.layer.file());
        let top = self.top.iter().map(|top| top.layer.file());
        std::iter::once(&self.base)
            .chain(frozen)
            .chain(top)
            .map(AsRawFd::as_raw_fd)
            .collect()
    }

    /// Where the disk's bytes from `start` on are, as far as they are in one
    /// place and before `end`. Requires `start < end <= size_bytes`.
    pub(super) fn resolve(&self, start: u64, end: u64) -> Extent {
        let mut end = end.min(start + WINDOW_BYTES);
        let file = |target, offset, end| Extent {
            place: Place::File { target, offset },
            bytes: end - start,
        };
        if let Some(Mounted { target, layer }) = &self.top {
            let (present, run_end) = layer.run(start, end);
            if present {
                return file(*target, layer.file_offset(start), run_end);
            }
            end = run_end;
        }
        match newest(self.frozen.iter().rev(), start, end) {
            (Some(Mounted { target, layer }), end) => file(*target, layer.file_offset(start), end),
            (None, end) if start < self.base_bytes => {
                file(Target::nth(0), start, end.min(self.base_bytes))
            }
            (None, end) => Extent {
                place: Place::Zeros,
                bytes: end - start,
            },
        }
    }

    /// Whole blocks have been written to the top layer, or made holes.
    pub(super) fn written(&mut self, bytes: std::ops::Range<u64>) {
        if let Some(top) = &mut self.top {
            top.layer.written(bytes);
        }
    }

    /// Begins a sync, which [`Disk::end_sync`] ends. None: all is durable.
    ///
    /// Layers that were frozen since the last sync are in it: they hold what the
    /// guest has written before, and nobody has told us that they are durable.
    pub(super) fn begin_sync(&mut self) -> Option<Sync> {
        let top = self.top.as_mut()?;
        let frozen = self
            .frozen
            .iter()
            .filter(|frozen| frozen.layer.is_unsynced());
        let mut files: Vec<Target> = frozen.map(|frozen| frozen.target).collect();
        let writes = top.layer.begin_sync();
        if writes.is_some() {
            files.push(top.target);
        }
        (!files.is_empty()).then(|| Sync {
            files,
            writes: writes.unwrap_or_default(),
            top: top.target,
        })
    }

    /// The sync has ended, well or not.
    pub(super) fn end_sync(&mut self, well: bool) {
        if let Some(top) = &mut self.top {
            top.layer.end_sync(well);
        }
        if well {
            for frozen in &mut self.frozen {
                frozen.layer.set_synced();
            }
        }
    }

    /// The sync was given up half-way; the next one has its work to do.
    pub(super) fn abandon_sync(&mut self) {
        if let Some(top) = &mut self.top {
            top.layer.abandon_sync();
        }
    }

    /// Whether a sync has ever failed, after which none can be trusted.
    pub(super) fn has_failed(&self) -> bool {
        self.top.as_ref().is_some_and(|top| top.layer.has_failed())
    }
}

// === impl Mounted ===

impl AsRef<FrozenLayer> for Mounted<FrozenLayer> {
    fn as_ref(&self) -> &FrozenLayer {
        &self.layer
    }
}
