//! The copy-on-write layer: a sparse file that holds the blocks the guest has
//! written.
//!
//! ```text
//! 0            header: one block
//! 4096         bitmap: one bit for each block of the disk, in whole blocks
//! data_start   the disk's blocks, each at its own place
//! ```
//!
//! A block's place is fixed, so that nothing needs to be allocated or looked up,
//! and holes cost nothing. Everything is little-endian.
//!
//! A set bit says that the block's data is durable. So a sync (a guest's flush)
//! first makes the data durable, then writes the bits, then makes them durable.
//! A crash at any moment leaves each block either as it was after the last sync
//! or as it has been written since. A block whose bit was lost is, again, that of
//! the layer below: what its place in the file holds is never read.
//!
//! A freeze writes the bits but makes nothing durable, since a guest stands still
//! meanwhile; the client does that before it names the snapshot. Between the two,
//! a crash of the host may leave zeros in a block that the guest has never
//! flushed. What it has flushed is safe.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{FlockOperation, OFlags, SeekFrom, fcntl_getfl, fcntl_lock, seek};
use rustix::io::Errno;

use super::BLOCK_BYTES;
use super::bitmap::{self, Bitmap, PAGE_BYTES};
use super::frozen::FrozenLayer;

const MAGIC: [u8; 8] = *b"SBXLAYER";
const FORMAT_VERSION: u32 = 1;
const HEADER_BYTES: usize = 32;
pub(super) const BITMAP_START: u64 = BLOCK_BYTES;

/// A layer to be written, checked and locked.
#[derive(Debug)]
pub(super) struct Layer {
    file: Arc<File>,
    layout: Layout,
    bitmap: Bitmap,
    /// Data was written since the last sync began.
    unsynced: bool,
    /// Pages of the bitmap that the sync under way is to write.
    syncing: Vec<usize>,
    /// A sync has failed. The kernel then calls the pages clean that it could
    /// not write, so a later success would mean nothing.
    failed: bool,
}

/// Where things are, which the disk's size alone decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    size_bytes: u64,
    data_start: u64,
}

/// What a sync has to write between its two barriers.
#[derive(Debug)]
pub(super) struct BitmapWrite {
    pub(super) offset: u64,
    pub(super) bytes: Vec<u8>,
}

/// Why a file cannot serve as the layer of a disk.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    #[error("the layer is not a regular file open for reading and writing; open it so")]
    Access,
    #[error("the frozen layer is not a regular file open for reading only; open it so")]
    FrozenAccess,
    #[error("another monitor uses the layer; give each disk a layer of its own")]
    InUse,
    #[error("the file for a new layer has {0} bytes; pass an empty one")]
    NotEmpty(u64),
    #[error("the file is not a layer: its magic is {0:02x?}; pass an empty file or a layer")]
    Magic([u8; 8]),
    #[error(
        "the layer has format version {0}, but this monitor knows only {FORMAT_VERSION}; upgrade the monitor"
    )]
    Version(u32),
    #[error(
        "the layer has blocks of {0} bytes, but this monitor only of {BLOCK_BYTES}; make it anew"
    )]
    BlockSize(u32),
    #[error("the layer's header is damaged; restore the layer or start from an empty one")]
    Header,
    #[error(
        "the layer is for a disk of {layer_bytes} bytes, but the disk has {disk_bytes}; use the layer's size"
    )]
    Size { layer_bytes: u64, disk_bytes: u64 },
    #[error(
        "the layer has {actual} bytes where its header calls for {expected}; restore it or start from an empty one"
    )]
    Length { actual: u64, expected: u64 },
    #[error("the layer marks blocks past the disk's end; restore it or start from an empty one")]
    Bitmap,
    #[error("the layer could not be read or written; check the host's disk")]
    Io(#[source] io::Error),
}

// === impl Layer ===

impl Layer {
    /// Takes an empty file, and makes a layer of it, or an existing layer of a
    /// disk of `size_bytes`, which has been validated by the caller.
    pub(super) fn open(file: File, size_bytes: u64) -> Result<Self, LayerError> {
        match lock(&file)? {
            0 => Self::create(file, size_bytes),
            file_bytes => Self::load(file, size_bytes, file_bytes),
        }
    }

    /// Makes a layer of an empty file.
    pub(super) fn open_new(file: File, size_bytes: u64) -> Result<Self, LayerError> {
        match lock(&file)? {
            0 => Self::create(file, size_bytes),
            file_bytes => Err(LayerError::NotEmpty(file_bytes)),
        }
    }

    /// Lays out an empty file. Nothing is synced: the first sync of data takes
    /// the header along, and before that a lost layer loses nothing.
    fn create(file: File, size_bytes: u64) -> Result<Self, LayerError> {
        let layout = Layout::of(size_bytes);
        file.set_len(layout.file_bytes()).map_err(LayerError::Io)?;
        file.write_all_at(&layout.header(), 0)
            .map_err(LayerError::Io)?;
        Ok(Self::new(file, layout, Bitmap::new(layout.blocks())))
    }

    /// Reads a layer, believing nothing.
    fn load(file: File, size_bytes: u64, file_bytes: u64) -> Result<Self, LayerError> {
        let layout = Layout::read(&file, size_bytes, file_bytes)?;
        let bitmap = read_bitmap(&file, &layout)?;
        if bitmap.marks_past(layout.blocks()) {
            return Err(LayerError::Bitmap);
        }
        Ok(Self::new(file, layout, bitmap))
    }

    fn new(file: File, layout: Layout, bitmap: Bitmap) -> Self {
        Self {
            file: Arc::new(file),
            layout,
            bitmap,
            unsynced: false,
            syncing: Vec::new(),
            failed: false,
        }
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn present_blocks(&self) -> u64 {
        self.bitmap.present()
    }

    /// Where the byte at `disk_offset` has its place in the file.
    pub(super) fn file_offset(&self, disk_offset: u64) -> u64 {
        self.layout.file_offset(disk_offset)
    }

    /// The run from byte `start` of the disk on, up to `end`, that is all in this
    /// layer or not at all: which of both, and where it ends.
    pub(super) fn run(&self, start: u64, end: u64) -> (bool, u64) {
        let last_block = end.div_ceil(BLOCK_BYTES);
        let (present, run_end) = self.bitmap.run(start / BLOCK_BYTES, last_block);
        (present, (run_end * BLOCK_BYTES).min(end))
    }

    /// Whole blocks have been written, or made holes.
    pub(super) fn written(&mut self, bytes: Range<u64>) {
        self.unsynced = true;
        self.bitmap
            .set(bytes.start / BLOCK_BYTES..bytes.end / BLOCK_BYTES);
    }

    /// Begins a sync. None: all is durable already. Otherwise the caller makes
    /// the file durable, does the writes and, if there were any, makes it durable
    /// again; then it calls [`Layer::end_sync`].
    pub(super) fn begin_sync(&mut self) -> Option<Vec<BitmapWrite>> {
        self.syncing.extend(self.bitmap.take_dirty());
        let unsynced = std::mem::take(&mut self.unsynced);
        if !unsynced && self.syncing.is_empty() {
            return None;
        }
        // The bits are copied now, since by the time they are written there may
        // be more of them, whose data the barrier before did not cover.
        Some(self.bitmap_writes(&self.syncing))
    }

    /// What brings these pages of the bitmap to the file, in few pieces.
    fn bitmap_writes(&self, pages: &[usize]) -> Vec<BitmapWrite> {
        let mut writes: Vec<BitmapWrite> = Vec::new();
        for &page in pages {
            let offset = BITMAP_START + page as u64 * PAGE_BYTES as u64;
            match writes.last_mut() {
                Some(write) if write.offset + write.bytes.len() as u64 == offset => {
                    write.bytes.extend(self.bitmap.page(page));
                }
                _ => writes.push(BitmapWrite {
                    offset,
                    bytes: self.bitmap.page(page).collect(),
                }),
            }
        }
        writes
    }

    /// The sync has ended, well or not.
    pub(super) fn end_sync(&mut self, well: bool) {
        self.failed |= !well;
        self.syncing.clear();
    }

    /// The sync was given up half-way; the next one has its work to do.
    pub(super) fn abandon_sync(&mut self) {
        self.unsynced = true;
        for page in std::mem::take(&mut self.syncing) {
            self.bitmap.mark_dirty(page);
        }
    }

    /// Whether a sync has ever failed, after which none can be trusted.
    pub(super) fn has_failed(&self) -> bool {
        self.failed
    }

    /// Writes the bitmap as it is to the file, and makes nothing durable. Only
    /// while no write and no sync is under way. If it fails, the next sync or the
    /// next call has it all to do.
    pub(super) fn write_bitmap(&mut self) -> io::Result<()> {
        let pages = self.bitmap.take_dirty();
        self.unsynced |= !pages.is_empty();
        let mut writes = self.bitmap_writes(&pages).into_iter();
        let written = writes
            .try_for_each(|BitmapWrite { offset, bytes }| self.file.write_all_at(&bytes, offset));
        if written.is_err() {
            for page in pages {
                self.bitmap.mark_dirty(page);
            }
        }
        written
    }

    /// The layer as it is in its file, once [`Layer::write_bitmap`] has run. It
    /// stays true for as long as nothing more is written here. It is locked as
    /// this one is: that bars others from writing to it, and nobody from reading.
    pub(super) fn frozen(&self) -> Result<FrozenLayer, LayerError> {
        FrozenLayer::map(Arc::clone(&self.file), self.layout, self.unsynced)
    }
}

/// The length of a regular file that is open in the given way, or none.
pub(super) fn length(file: &File, access: OFlags) -> Result<Option<u64>, LayerError> {
    let metadata = file.metadata().map_err(LayerError::Io)?;
    let flags = fcntl_getfl(file).map_err(io_error)?;
    let fits = metadata.is_file() && flags & OFlags::ACCMODE == access;
    Ok(fits.then_some(metadata.len()))
}

/// Takes a file to be written, and nobody else's; its length.
fn lock(file: &File) -> Result<u64, LayerError> {
    let file_bytes = length(file, OFlags::RDWR)?.ok_or(LayerError::Access)?;
    // A lock of the process, which ends with it. One of the open file, as
    // flock(2) takes, would outlive a killed monitor for some milliseconds: the
    // kernel tears down an io_uring in its own time, and that holds on to the
    // file.
    match fcntl_lock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file_bytes),
        Err(Errno::AGAIN | Errno::ACCESS) => Err(LayerError::InUse),
        Err(errno) => Err(io_error(errno)),
    }
}

/// Reads the parts of the bitmap that are not holes.
fn read_bitmap(file: &File, layout: &Layout) -> Result<Bitmap, LayerError> {
    let mut bitmap = Bitmap::new(layout.blocks());
    let mut bytes = [0; PAGE_BYTES];
    let mut offset = BITMAP_START;
    while offset < layout.data_start {
        match seek(file, SeekFrom::Data(offset)) {
            // Data begins anywhere: within a page that has been passed, or past
            // the bitmap.
            Ok(data) => offset = offset.max(data / PAGE_BYTES as u64 * PAGE_BYTES as u64),
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(io_error(errno)),
        }
        if offset >= layout.data_start {
            break;
        }
        file.read_exact_at(&mut bytes, offset)
            .map_err(LayerError::Io)?;
        bitmap.load((offset - BITMAP_START) as usize / PAGE_BYTES, &bytes);
        offset += PAGE_BYTES as u64;
    }
    Ok(bitmap)
}

fn io_error(errno: Errno) -> LayerError {
    LayerError::Io(errno.into())
}

// === impl Layout ===

impl Layout {
    fn of(size_bytes: u64) -> Self {
        Self {
            size_bytes,
            data_start: BITMAP_START + bitmap::region_bytes(size_bytes / BLOCK_BYTES),
        }
    }

    /// That of a file of so many bytes, which must be a layer of a disk of
    /// `size_bytes`.
    pub(super) fn read(file: &File, size_bytes: u64, file_bytes: u64) -> Result<Self, LayerError> {
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => LayerError::Header,
                _ => LayerError::Io(error),
            })?;
        let layout = Self::from_header(&header)?;
        if layout.size_bytes != size_bytes {
            return Err(LayerError::Size {
                layer_bytes: layout.size_bytes,
                disk_bytes: size_bytes,
            });
        }
        layout.check_length(file_bytes)?;
        Ok(layout)
    }

    /// How many blocks the disk has.
    pub(super) fn blocks(&self) -> u64 {
        self.size_bytes / BLOCK_BYTES
    }

    /// Where the byte at `disk_offset` has its place in the file.
    pub(super) fn file_offset(&self, disk_offset: u64) -> u64 {
        self.data_start + disk_offset
    }

    fn file_bytes(&self) -> u64 {
        self.data_start + self.size_bytes
    }

    /// Whether a file is as long as this calls for.
    pub(super) fn check_length(&self, actual: u64) -> Result<(), LayerError> {
        let expected = self.file_bytes();
        if actual == expected {
            Ok(())
        } else {
            Err(LayerError::Length { actual, expected })
        }
    }

    fn header(&self) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(&MAGIC);
        header[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        header[12..16].copy_from_slice(&(BLOCK_BYTES as u32).to_le_bytes());
        header[16..24].copy_from_slice(&self.size_bytes.to_le_bytes());
        let checksum = fnv1a(&header[..24]);
        header[24..].copy_from_slice(&checksum.to_le_bytes());
        header
    }

    fn from_header(header: &[u8; HEADER_BYTES]) -> Result<Self, LayerError> {
        let [a, b, c, d, e, f, g, h, rest @ ..] = header;
        let magic = [*a, *b, *c, *d, *e, *f, *g, *h];
        if magic != MAGIC {
            return Err(LayerError::Magic(magic));
        }
        let u32_at =
            |at: usize| u32::from_le_bytes([rest[at], rest[at + 1], rest[at + 2], rest[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        // The version decides how the rest is to be read, the checksum included.
        if u32_at(0) != FORMAT_VERSION {
            return Err(LayerError::Version(u32_at(0)));
        }
        if u64_at(16) != fnv1a(&header[..24]) {
            return Err(LayerError::Header);
        }
        if u64::from(u32_at(4)) != BLOCK_BYTES {
            return Err(LayerError::BlockSize(u32_at(4)));
        }
        // Any size is safe to compute with once it equals the disk's.
        let size_bytes = u64_at(8);
        if size_bytes > super::DISK_MAX_BYTES {
            return Err(LayerError::Header);
        }
        Ok(Self::of(size_bytes))
    }
}

/// 64-bit FNV-1a. It finds torn and foreign headers; it is no defence against
/// who can write the file, and the other checks do not rely on it.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
