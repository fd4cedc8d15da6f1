//! Guest memory: a reservation where the guest's RAM lies, over which memory is
//! mapped when it is known what the machine starts from.
//!
//! All of it is private to this process. A booted machine's is anonymous. A
//! restored machine's is mapped from memory layers: the first a sparse file as
//! long as RAM, in which a page is at its offset in RAM; the others dense, with
//! runs that the state places. What the guest writes becomes anonymous, so what a snapshot has to save is exactly the anonymous pages
//! ([`pagemap`]), and all machines of a template share its page cache.

use std::fs::File;
use std::io;

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
        "memory layer {layer} has {actual} bytes, not {expected}; it is not of this snapshot or was cut"
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
/// until [`map_anonymous`] or [`map_first_layer`].
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

/// Maps the first layer over all of RAM, whatever is mapped there. It is as long as
/// RAM, or refused: a page behind a file's end would end this process when it is
/// touched.
pub fn map_first_layer(memory: &GuestMemory, layer: &File) -> Result<(), MapError> {
    let (actual, expected) = (length(layer)?, size_bytes(memory));
    if actual != expected {
        return Err(MapError::Size {
            layer: 0,
            actual,
            expected,
        });
    }
    for stretch in stretches(memory) {
        map::file(&stretch, layer, stretch.offset).map_err(MapError::Map)?;
    }
    Ok(())
}

/// Maps the runs of the layers above the first, which `layers` begins with the
/// second of. The runs have been checked to be in RAM and of layers that there are;
/// the layers are at least as long as they say, or refused.
pub fn map_upper_layers(
    memory: &GuestMemory,
    layers: &[File],
    runs: &[Run],
) -> Result<(), MapError> {
    for (layer, file) in (1..).zip(layers) {
        let of_it = runs.iter().filter(|run| run.layer as usize == layer);
        let expected = of_it.map(Run::layer_end_bytes).max().unwrap_or(0);
        let actual = length(file)?;
        if actual < expected {
            return Err(MapError::Size {
                layer,
                actual,
                expected,
            });
        }
    }
    for run in runs {
        if let Some(layer) = layers.get((run.layer as usize).wrapping_sub(1)) {
            for stretch in part(memory, run.start_bytes(), run.bytes()) {
                let into = stretch.offset - run.start_bytes();
                map::file(&stretch, layer, run.layer_bytes() + into).map_err(MapError::Map)?;
            }
        }
    }
    Ok(())
}

fn length(layer: &File) -> Result<u64, MapError> {
    let stat = rustix::fs::fstat(layer).map_err(MapError::Stat)?;
    Ok(stat.st_size as u64)
}

/// Writes pages to a new root layer, at their offsets in RAM. Returns how many
/// bytes.
pub fn write_root(memory: &GuestMemory, pages: &[Pages], layer: &File) -> io::Result<u64> {
    layer.set_len(size_bytes(memory))?;
    let mut written = 0;
    for stretch in parts(memory, pages) {
        map::write(&[stretch], layer, stretch.offset)?;
        written += stretch.bytes;
    }
    Ok(written)
}

/// Writes pages one behind the other to a new layer. Returns how many bytes.
pub fn write_layer(memory: &GuestMemory, pages: &[Pages], layer: &File) -> io::Result<u64> {
    let stretches: Vec<Stretch> = parts(memory, pages).collect();
    map::write(&stretches, layer, 0)?;
    Ok(stretches.iter().map(|stretch| stretch.bytes).sum())
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

/// Makes pages private before the guest writes to them. One that cannot be is made
/// so by that write.
pub(crate) fn populate_to_write(memory: &GuestMemory, pages: &[Pages]) {
    for stretch in parts(memory, pages) {
        // EINVAL before Linux 5.14, which does not know how.
        let _ = map::populate_to_write(&stretch);
    }
}

/// Maps pages before the guest reads them.
pub(crate) fn populate_to_read(memory: &GuestMemory, pages: &[Pages]) {
    for stretch in parts(memory, pages) {
        let _ = map::populate_to_read(&stretch);
    }
}

/// Has the guest's page faults read nothing from the layers but the page that is
/// touched, so that [`resident`] tells which those are.
pub(crate) fn read_no_further(memory: &GuestMemory) -> Result<(), MapError> {
    stretches(memory)
        .iter()
        .try_for_each(map::read_no_further)
        .map_err(MapError::Map)
}

/// The pages that need not be read from a layer: private ones, and those in the
/// page cache.
pub(crate) fn resident(memory: &GuestMemory) -> io::Result<Vec<Pages>> {
    let mut resident = Vec::new();
    for stretch in stretches(memory) {
        let first = stretch.offset / PAGE_BYTES;
        for (page, is_resident) in (first..).zip(map::resident(&stretch)?) {
            if is_resident {
                runs::push(&mut resident, page, 1);
            }
        }
    }
    Ok(resident)
}

/// Where pages lie.
pub(crate) fn parts(memory: &GuestMemory, pages: &[Pages]) -> impl Iterator<Item = Stretch> {
    pages.iter().flat_map(|pages| {
        let bytes = (pages.end - pages.start) * PAGE_BYTES;
        part(memory, pages.start * PAGE_BYTES, bytes)
    })
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

    /// A page of layer 1.
    fn run(start_page: u64, layer_page: u64) -> Run {
        Run {
            start_page,
            pages: 1,
            layer: 1,
            layer_page,
        }
    }

    fn byte(memory: &GuestMemory, page: u64) -> u8 {
        memory.read_obj(GuestAddress(page * PAGE_BYTES)).unwrap()
    }

    #[test]
    fn layers_lie_over_each_other_and_writes_stay_here() {
        let memory = reserve(1 << 20).unwrap();
        let root = layer(1 << 20, &[(0, 1), (1, 1), (2, 1)]);
        let diff = layer(2 * PAGE_BYTES, &[(0, 2), (1, 3)]);
        map_first_layer(&memory, &root).unwrap();
        map_upper_layers(&memory, &[diff], &[run(1, 0), run(9, 1)]).unwrap();
        assert_eq!(
            [0, 1, 2, 3, 9].map(|page| byte(&memory, page)),
            [1, 2, 1, 0, 3]
        );
        memory.write_obj(7u8, GuestAddress(0)).unwrap();
        let mut first = [0];
        root.read_exact_at(&mut first, 0).unwrap();
        assert_eq!(first, [1]);
        discard(&memory, GuestAddress(0), PAGE_BYTES).unwrap();
        assert_eq!(byte(&memory, 0), 1);
        // Another first layer replaces all, what was written too.
        memory.write_obj(7u8, GuestAddress(0)).unwrap();
        map_first_layer(&memory, &layer(1 << 20, &[(2, 8)])).unwrap();
        assert_eq!([0, 1, 2, 9].map(|page| byte(&memory, page)), [0, 0, 8, 0]);
    }

    #[test]
    fn a_layer_of_another_size_is_refused() {
        let memory = reserve(1 << 20).unwrap();
        let refused = |bytes: [u64; 2]| {
            let [first, upper] = bytes.map(|bytes| layer(bytes, &[]));
            let mapped = map_first_layer(&memory, &first)
                .and_then(|()| map_upper_layers(&memory, &[upper], &[run(7, 1)]));
            match mapped {
                Err(MapError::Size { layer, .. }) => Some(layer),
                other => {
                    other.unwrap();
                    None
                }
            }
        };
        assert_eq!(refused([4096, 8192]), Some(0));
        assert_eq!(refused([2 << 20, 8192]), Some(0));
        assert_eq!(refused([1 << 20, 8191]), Some(1));
        assert_eq!(refused([1 << 20, 8192]), None);
    }

    /// What is written to layers is what is mapped from them, on both sides of
    /// the gap in RAM.
    #[test]
    fn a_layer_holds_what_was_written_to_it() {
        const RAM: u64 = 4 << 30;
        let gap_page = (3 << 30) / PAGE_BYTES;
        let pages = |start, end| Pages { start, end };
        let (low, high) = (pages(5, 7), pages(gap_page - 1, gap_page + 2));
        let memory = reserve(RAM).unwrap();
        map_anonymous(&memory).unwrap();
        let fill = |memory: &GuestMemory, byte: u8| {
            for stretch in parts(memory, &[low, high]) {
                let bytes = vec![byte; stretch.bytes as usize];
                memory.write_slice(&bytes, stretch.guest_address).unwrap();
            }
        };
        fill(&memory, 1);
        let (root, diff) = (layer(0, &[]), layer(0, &[]));
        assert_eq!(
            write_root(&memory, &[low, high], &root).unwrap(),
            5 * PAGE_BYTES
        );
        assert_eq!(root.metadata().unwrap().len(), RAM);
        fill(&memory, 2);
        assert_eq!(
            write_layer(&memory, &[high], &diff).unwrap(),
            3 * PAGE_BYTES
        );
        assert_eq!(diff.metadata().unwrap().len(), 3 * PAGE_BYTES);

        let restored = reserve(RAM).unwrap();
        let runs = runs::overlay(&[], &[high], 1);
        map_first_layer(&restored, &root).unwrap();
        map_upper_layers(&restored, &[diff], &runs).unwrap();
        for (pages, expected) in [(low, 1u8), (high, 2)] {
            for stretch in parts(&restored, &[pages]) {
                let mut bytes = vec![0; stretch.bytes as usize];
                restored
                    .read_slice(&mut bytes, stretch.guest_address)
                    .unwrap();
                assert!(bytes.iter().all(|byte| *byte == expected));
            }
        }
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
