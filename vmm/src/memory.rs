//! Guest memory: one file, mapped where the guest's RAM lies.

use std::fs::File;
use std::sync::Arc;

use rustix::fs::fstat;
use vm_memory::mmap::{GuestRegionMmap, MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, GuestMemoryBackend, GuestMemoryRegion, GuestRegionCollectionError};

use crate::machine::layout;

/// All of the guest's memory. A handle: clones share the mappings.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

#[derive(Debug, thiserror::Error)]
pub enum MapError {
    #[error("the size of the memory file could not be read")]
    Stat(#[source] rustix::io::Errno),
    #[error(
        "the memory file has {actual} bytes but the machine {expected}; size it to the machine"
    )]
    Size { actual: u64, expected: u64 },
    #[error("guest memory could not be mapped; check the host's memory limits")]
    Map(#[source] MmapRegionError),
    #[error("guest memory has no valid regions")]
    Regions(#[source] GuestRegionCollectionError),
}

/// Maps `file`, which holds exactly the machine's RAM, shared: what the guest
/// writes is in the file.
pub fn map_shared(file: &Arc<File>, memory_bytes: u64) -> Result<GuestMemory, MapError> {
    let actual = fstat(file).map_err(MapError::Stat)?.st_size as u64;
    if actual != memory_bytes {
        return Err(MapError::Size {
            actual,
            expected: memory_bytes,
        });
    }
    let mut offset = 0;
    let mut regions = Vec::new();
    for (start, bytes) in layout::ram_ranges(memory_bytes) {
        let mapping = MmapRegionBuilder::new(bytes as usize)
            .with_file_offset(FileOffset::from_arc(Arc::clone(file), offset))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()
            .map_err(MapError::Map)?;
        // None means that start + bytes overflows, which ram_ranges rules out
        // for every size that MachineConfig admits.
        let region = GuestRegionMmap::new(mapping, start).ok_or(MapError::Regions(
            GuestRegionCollectionError::NoMemoryRegion,
        ))?;
        regions.push(region);
        offset += bytes;
    }
    GuestMemory::from_regions(regions).map_err(MapError::Regions)
}

/// The end of the lowest region, in bytes: where a kernel must fit.
pub fn low_ram_end(memory: &GuestMemory) -> u64 {
    memory.iter().next().map_or(0, GuestMemoryRegion::len)
}

/// Memory of the file that is in use on the host, in bytes.
pub fn resident_bytes(file: &File) -> u64 {
    fstat(file).map_or(0, |stat| stat.st_blocks as u64 * 512)
}
