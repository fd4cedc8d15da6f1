//! The stack of files a disk is read from.
//!
//! A read is resolved from the top down: layer, base, zeros. A stack of frozen
//! layers, which snapshots will need, adds steps to [`Disk::resolve`] and
//! targets for the engine; nothing else asks where a block is.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};

use rustix::fs::{OFlags, fcntl_getfl};

use super::engine::Target;
use super::layer::Layer;
use super::{BLOCK_BYTES, BlockError, DISK_MAX_BYTES};

#[derive(Debug)]
pub(super) struct Disk {
    base: File,
    base_bytes: u64,
    size_bytes: u64,
    layer: Option<Layer>,
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

// === impl Disk ===

impl Disk {
    pub(super) fn new(
        base: File,
        size_bytes: u64,
        layer: Option<File>,
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
        let layer = layer
            .map(|file| Layer::open(file, size_bytes))
            .transpose()?;
        Ok(Self {
            base,
            base_bytes,
            size_bytes,
            layer,
        })
    }

    pub(super) fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    pub(super) fn is_writable(&self) -> bool {
        self.layer.is_some()
    }

    pub(super) fn layer(&self) -> Option<&Layer> {
        self.layer.as_ref()
    }

    pub(super) fn layer_mut(&mut self) -> Option<&mut Layer> {
        self.layer.as_mut()
    }

    /// The files, in the order of [`Target`].
    pub(super) fn files(&self) -> Vec<RawFd> {
        let layer = self.layer.as_ref().map(|layer| layer.file().as_raw_fd());
        std::iter::once(self.base.as_raw_fd())
            .chain(layer)
            .collect()
    }

    /// Where the disk's bytes from `start` on are, as far as they are in one
    /// place and before `end`. Requires `start < end <= size_bytes`.
    pub(super) fn resolve(&self, start: u64, end: u64) -> Extent {
        let mut end = end;
        if let Some(layer) = &self.layer {
            let (present, run_end) = layer.run(start, end);
            if present {
                return Extent {
                    place: Place::File {
                        target: Target::Layer,
                        offset: layer.file_offset(start),
                    },
                    bytes: run_end - start,
                };
            }
            end = run_end;
        }
        if start < self.base_bytes {
            return Extent {
                place: Place::File {
                    target: Target::Base,
                    offset: start,
                },
                bytes: end.min(self.base_bytes) - start,
            };
        }
        Extent {
            place: Place::Zeros,
            bytes: end - start,
        }
    }
}
