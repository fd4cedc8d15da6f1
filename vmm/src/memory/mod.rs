//! Guest memory: a reservation where the guest's RAM lies, over which memory is
//! mapped when it is known what the machine starts from.
//!
//! All of it is private to this process. A booted machine's is anonymous. A
//! restored machine's is mapped from memory layers: sparse files as long as RAM,
//! in which a page is at its offset in RAM. What the guest writes becomes
//! anonymous, so what a snapshot has to save is exactly the anonymous pages
//! ([`pagemap`]), and all machines of a template share its page cache.

use std::fs::File;

use vm_memory::mmap::{GuestRegionMmap, MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionCollectionError,
    MemoryRegionAddress,
};

use crate::machine::layout;

mod map;
pub mod pagemap;
pub mod runs;
pub mod working_set;

use runs::{Pages, Run};

/// All of the guest's memory. A handle: clones share the mappings.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// Bytes of a page, of which all mappings are made.
pub const PAGE_BYTES: u64 = 4096;

#[derive(Debug, thiserror::Error)]
pub enum MapError {
    #[error("guest memory could not be reserved; check the host's memory limits")]
    Reserve(#[source] MmapRegionError),
    #[error("guest memory has no valid regions")]
    Regions(#[source] GuestRegionCollectionError),
    #[error("guest memory could not be mapped; check the host's memory limits")]
    Map(#[source] rustix::io::Errno),
    #[error("the size of a memory layer could not be read")]
    Stat(#[source] rustix::io::Errno),
    #[error(
        "memory layer {layer} has {actual} bytes but RAM {expected}; it is not of this snapshot"
    )]
    Size {
        layer: usize,
        actual: u64,
        expected: u64,
    },
}

/// A stretch of RAM that is contiguous in this process: a RAM region or a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stretch {
    /// From the start of RAM, in bytes.
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    /// Where it is in this process.
    pub(crate) host_address: usize,
    pub(crate) guest_address: GuestAddress,
}

/// Reserves the addresses of RAM. They are in no file and may not be touched
/// until [`map_anonymous`] or [`map_layers`].
pub fn reserve(memory_bytes: u64) -> Result<GuestMemory, MapError> {
    let mut regions = Vec::new();
    for (start, bytes) in layout::ram_ranges(memory_bytes) {
        let mapping = MmapRegionBuilder::new(bytes as usize)
            .with_mmap_prot(libc::PROT_NONE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()
            .map_err(MapError::Reserve)?;
        // None means that start + bytes overflows, which ram_ranges rules out
        // for every size that MachineConfig admits.
        let region = GuestRegionMmap::new(mapping, start).ok_or(MapError::Regions(
            GuestRegionCollectionError::NoMemoryRegion,
        ))?;
        regions.push(region);
    }
    GuestMemory::from_regions(regions).map_err(MapError::Regions)
}

/// Maps RAM that nobody has written: zeros.
pub fn map_anonymous(memory: &GuestMemory) -> Result<(), MapError> {
    for stretch in stretches(memory) {
        map::anonymous(&stretch).map_err(MapError::Map)?;
    }
    Ok(())
}

/// Maps the first layer over all of RAM, and over it the runs of the others.
/// The runs have been checked to be in RAM and of layers that there are.
pub fn map_layers(memory: &GuestMemory, layers: &[File], runs: &[Run]) -> Result<(), MapError> {
    let expected = size_bytes(memory);
    for (layer, file) in layers.iter().enumerate() {
        let actual = rustix::fs::fstat(file).map_err(MapError::Stat)?.st_size as u64;
        if actual != expected {
            return Err(MapError::Size {
                layer,
                actual,
                expected,
            });
        }
    }
    if let Some(root) = layers.first() {
        for stretch in stretches(memory) {
            map::file(&stretch, root).map_err(MapError::Map)?;
        }
    }
    for run in runs {
        if let Some(layer) = layers.get(run.layer as usize) {
            for stretch in part(memory, run.start_bytes(), run.bytes()) {
                map::file(&stretch, layer).map_err(MapError::Map)?;
            }
        }
    }
    Ok(())
}

/// Gives pages that the guest has no use for back to the host. It reads them as
/// what its layers hold, or as zeros. Does nothing for what is not whole pages
/// of RAM.
pub fn discard(memory: &GuestMemory, start: GuestAddress, bytes: u64) -> rustix::io::Result<()> {
    let whole = start.0.is_multiple_of(PAGE_BYTES) && bytes.is_multiple_of(PAGE_BYTES);
    let Some(region) = memory.find_region(start).filter(|_| whole) else {
        return Err(rustix::io::Errno::INVAL);
    };
    let into = start.0 - region.start_addr().0;
    if bytes > region.len() - into {
        return Err(rustix::io::Errno::INVAL);
    }
    let host_address = host_address(region).ok_or(rustix::io::Errno::FAULT)?;
    map::discard(&Stretch {
        offset: 0,
        bytes,
        host_address: host_address + into as usize,
        guest_address: start,
    })
}

/// Makes pages private before the guest writes to them; gives where they are. A
/// page that cannot be is made so by that write.
pub(crate) fn populate(memory: &GuestMemory, pages: &[Pages]) -> Vec<Stretch> {
    let populated = pages.iter().flat_map(|pages| {
        let bytes = (pages.end - pages.start) * PAGE_BYTES;
        part(memory, pages.start * PAGE_BYTES, bytes)
    });
    populated
        .inspect(|stretch| {
            // EINVAL before Linux 5.14, which does not know how.
            let _ = map::populate(stretch);
        })
        .collect()
}

/// All of RAM, in bytes.
pub fn size_bytes(memory: &GuestMemory) -> u64 {
    memory.iter().map(GuestMemoryRegion::len).sum()
}

/// The end of the lowest region, in bytes: where a kernel must fit.
pub fn low_ram_end(memory: &GuestMemory) -> u64 {
    memory.iter().next().map_or(0, GuestMemoryRegion::len)
}

/// RAM's regions, in the order of their offsets.
pub(crate) fn stretches(memory: &GuestMemory) -> Vec<Stretch> {
    let mut offset = 0;
    memory
        .iter()
        .filter_map(|region| {
            let stretch = Stretch {
                offset,
                bytes: region.len(),
                host_address: host_address(region)?,
                guest_address: region.start_addr(),
            };
            offset += stretch.bytes;
            Some(stretch)
        })
        .collect()
}

/// Where `bytes` from `offset` of RAM on lie, as far as they are RAM.
pub(crate) fn part(memory: &GuestMemory, offset: u64, bytes: u64) -> Vec<Stretch> {
    let end = offset.saturating_add(bytes);
    stretches(memory)
        .into_iter()
        .filter_map(|region| {
            let from = offset.max(region.offset);
            let to = end.min(region.offset + region.bytes);
            let into = from.checked_sub(region.offset)?;
            (from < to).then(|| Stretch {
                offset: from,
                bytes: to - from,
                host_address: region.host_address + into as usize,
                guest_address: region.guest_address.unchecked_add(into),
            })
        })
        .collect()
}

fn host_address(region: &GuestRegionMmap<()>) -> Option<usize> {
    let start = region.get_host_address(MemoryRegionAddress(0)).ok()?;
    Some(start as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use vm_memory::Bytes;

    fn layer(bytes: u64, pages: &[(u64, u8)]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        for &(page, byte) in pages {
            let page_start = page * PAGE_BYTES;
            file.write_all_at(&[byte; PAGE_BYTES as usize], page_start)
                .unwrap();
        }
        file
    }

    fn byte(memory: &GuestMemory, page: u64) -> u8 {
        memory.read_obj(GuestAddress(page * PAGE_BYTES)).unwrap()
    }

    #[test]
    fn layers_lie_over_each_other_and_writes_stay_here() {
        let memory = reserve(1 << 20).unwrap();
        let root = layer(1 << 20, &[(0, 1), (1, 1), (2, 1)]);
        let diff = layer(1 << 20, &[(1, 2), (9, 2)]);
        let run = |start_page, pages| Run {
            start_page,
            pages,
            layer: 1,
        };
        let layers = [root, diff];
        map_layers(&memory, &layers, &[run(1, 1), run(9, 1)]).unwrap();
        assert_eq!(
            [0, 1, 2, 3, 9].map(|page| byte(&memory, page)),
            [1, 2, 1, 0, 2]
        );
        memory.write_obj(7u8, GuestAddress(0)).unwrap();
        let mut first = [0];
        layers[0].read_exact_at(&mut first, 0).unwrap();
        assert_eq!(first, [1]);
        discard(&memory, GuestAddress(0), PAGE_BYTES).unwrap();
        assert_eq!(byte(&memory, 0), 1);
    }

    #[test]
    fn a_layer_of_another_size_is_refused() {
        let memory = reserve(1 << 20).unwrap();
        let short = layer(4096, &[]);
        assert!(matches!(
            map_layers(&memory, &[short], &[]),
            Err(MapError::Size {
                layer: 0,
                actual: 4096,
                ..
            })
        ));
    }

    #[test]
    fn only_whole_pages_of_ram_are_discarded() {
        let memory = reserve(1 << 20).unwrap();
        map_anonymous(&memory).unwrap();
        for (start, bytes) in [
            (1, 4096),
            (0, 1),
            (1 << 20, 4096),
            (0, 2 << 20),
            (u64::MAX - 4095, 4096),
        ] {
            assert!(
                discard(&memory, GuestAddress(start), bytes).is_err(),
                "{start} {bytes}"
            );
        }
    }

    #[test]
    fn offsets_of_ram_skip_the_gap() {
        let memory = reserve(4 << 30).unwrap();
        let parts = part(&memory, (3 << 30) - 4096, 8192);
        assert_eq!(parts.len(), 2);
        assert_eq!(parts[0].guest_address, GuestAddress((3 << 30) - 4096));
        assert_eq!(parts[1].guest_address, GuestAddress(4 << 30));
        assert!(part(&memory, 4 << 30, 4096).is_empty());
    }
}
