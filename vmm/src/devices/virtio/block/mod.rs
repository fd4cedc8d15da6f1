//! virtio-block (section 5.2): a disk made of a shared base image and, above
//! it, copy-on-write layers: frozen ones, which snapshots share, and a top one,
//! which takes the writes.
//!
//! A request goes through these files: `request` takes it off the ring as the
//! hostile input it is; `queue` splits it into pieces of one file each, with
//! `disk` saying which file; `engine` runs the pieces on an io_uring; `flush`
//! orders data before the record of what is present, which `layer` and `bitmap`
//! keep. A snapshot goes through `freeze`, and through `merge` where several
//! layers become one.
//!
//! The disk announces a logical block of 4,096 bytes, which Linux always obeys.
//! The protocol counts sectors of 512 bytes and lets a driver ask for any of
//! them: reads may, but writes that are not whole blocks are refused with
//! VIRTIO_BLK_S_IOERR, because the layer knows blocks as present or absent, and
//! a read-modify-write for drivers that do not exist would be code that never
//! runs.

use std::fs::File;
use std::io;

use serde::{Deserialize, Serialize};

use crate::config::RateLimit;

mod bitmap;
mod device;
mod disk;
mod engine;
mod flush;
mod freeze;
mod frozen;
mod layer;
mod merge;
mod metrics;
mod queue;
mod request;
#[cfg(test)]
mod tests;

pub use device::{Block, Ring};
pub(crate) use engine::REGISTER_FILES_UPDATE;
pub use layer::LayerError;

/// The disk's logical block, and the unit of copy on write, in bytes.
pub const BLOCK_BYTES: u64 = 4096;

/// The largest disk: what ext4 takes as a file, less room for the layer's own.
pub const DISK_MAX_BYTES: u64 = 15 << 40;

/// The most frozen layers of a disk. A read looks through all of them.
pub const FROZEN_LAYERS_MAX: usize = 16;

/// The longest [`BlockConfig::id`], in bytes.
pub const ID_MAX_BYTES: usize = 20;

const SECTOR_BYTES: u64 = 512;
const QUEUE_SIZE: u16 = 128;

/// A disk.
#[derive(Debug)]
pub struct BlockConfig {
    /// What the guest sees as the serial: 1–20 bytes of [A-Za-z0-9_-].
    pub id: String,
    /// What the guest sees, in bytes; a multiple of 4,096.
    pub size_bytes: u64,
    /// The shared image, open for reading only. Where it is shorter than the
    /// disk, the rest reads as zeros.
    pub base: File,
    /// Layers that were frozen by snapshots, root first; open for reading only.
    /// At most [`FROZEN_LAYERS_MAX`]. A block is in the last layer that has it,
    /// else in the base.
    pub frozen: Vec<File>,
    /// An empty file, or a layer of a disk of the same size; open for reading
    /// and writing. Without it the disk is read-only.
    pub layer: Option<File>,
    pub rate_limit: RateLimit,
}

/// What is saved of a disk; its blocks are in its files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    pub id: String,
    pub size_bytes: u64,
    pub writable: bool,
}

/// What a snapshot does with a disk's files; see SnapshotDisk of the control
/// protocol.
#[derive(Debug)]
pub struct Freeze {
    /// An empty file, which takes the writes from now on. Without it the top
    /// layer stays the top: the machine is to end, or to go on as if there had
    /// been no snapshot.
    pub next: Option<File>,
    pub merge: Option<Merge>,
}

/// Frozen layers from `keep` on, and the top one, become one.
#[derive(Debug)]
pub struct Merge {
    /// An empty file, open for reading and writing.
    pub file: File,
    pub keep: usize,
}

/// Why a disk could not be frozen. It goes on as it was.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    #[error("the disk could not be written; see the free space of its file system")]
    Io(#[source] io::Error),
    #[error(transparent)]
    Layer(#[from] LayerError),
    #[error(
        "the disk has failed to flush and may have lost what was written; end the machine and go \
         back to its last snapshot"
    )]
    Failed,
    #[error("{0}")]
    Request(&'static str),
}

/// Why a disk could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    #[error("the disk's id {0:?} is not 1 to 20 bytes of letters, digits, '-' and '_'; rename it")]
    Id(String),
    #[error(
        "a disk of {0} bytes cannot be made; choose a multiple of 4096 from 4096 bytes to 15 TiB"
    )]
    Size(u64),
    #[error("the base image is not a regular file; pass an image file")]
    BaseKind,
    #[error("the base image is open for writing, though disks share it; open it read-only")]
    BaseWritable,
    #[error("the base image has {0} bytes; pad it to a multiple of 4096")]
    BaseUnaligned(u64),
    #[error(
        "the base image has {base_bytes} bytes but the disk only {size_bytes}; enlarge the disk"
    )]
    BaseTooLarge { base_bytes: u64, size_bytes: u64 },
    #[error("the base image could not be examined")]
    Base(#[source] io::Error),
    #[error("the disk has {0} frozen layers, more than {FROZEN_LAYERS_MAX}; merge some")]
    TooManyLayers(usize),
    #[error("frozen layer {index} cannot be used")]
    Frozen {
        /// Counted from the root, which is 0.
        index: usize,
        #[source]
        error: LayerError,
    },
    #[error(transparent)]
    Layer(#[from] LayerError),
    #[error(
        "io_uring is not available; use Linux 5.15 or later, set the sysctl kernel.io_uring_disabled \
         to 0, and allow io_uring_setup in the seccomp filter of whoever starts the monitor"
    )]
    IoUringUnavailable(#[source] io::Error),
    #[error("the disk's io_uring could not be set up")]
    IoUring(#[source] io::Error),
    #[error("the rate limiter's timer could not be made")]
    Timer(#[source] io::Error),
}
