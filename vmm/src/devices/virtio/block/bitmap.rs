//! Which blocks a layer holds.
//!
//! The map of a layer that is written lives in private memory and not in a shared
//! mapping of the layer file: a mapping would let the kernel write a bit to disk
//! before the data it stands for, and after a crash of the host the block would
//! be neither old nor new. What a page costs is paid when its first bit is set,
//! because a large zeroed allocation is untouched memory: at most 256 KiB for a
//! disk of 8 GiB and 32 MiB for one of 1 TiB, and 4 KiB for each 128 MiB written
//! to.
//!
//! The map of a frozen layer is just such a mapping, for reading. All who read
//! the layer share its pages, and to open it costs the same whatever is in it.
//! Bits that changed under us would show other blocks, and do no harm.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

/// The unit in which the map goes to the file, in bytes.
pub(super) const PAGE_BYTES: usize = 4096;
const PAGE_WORDS: usize = PAGE_BYTES / size_of::<u64>();
const WORD_BITS: u64 = u64::BITS as u64;

#[derive(Debug)]
pub(super) struct Bitmap {
    words: Vec<u64>,
    /// Pages that differ from the file, a bit each.
    dirty: Vec<u64>,
    present: u64,
}

/// The map of a layer that is never written, in the layer's file.
#[derive(Debug)]
pub(super) struct FrozenBitmap {
    region: MmapRegion,
}

// === impl Bitmap ===

impl Bitmap {
    /// A map in which nothing is present.
    pub(super) fn new(blocks: u64) -> Self {
        let pages = region_bytes(blocks) as usize / PAGE_BYTES;
        Self {
            words: vec![0; pages * PAGE_WORDS],
            dirty: vec![0; pages.div_ceil(WORD_BITS as usize)],
            present: 0,
        }
    }

    /// How many blocks are present.
    pub(super) fn present(&self) -> u64 {
        self.present
    }

    /// The run of blocks from `start` on, up to `end`, that are all present or
    /// all absent: which of both, and where it ends.
    pub(super) fn run(&self, start: u64, end: u64) -> (bool, u64) {
        run(|index| self.words[index], start, end)
    }

    /// Marks blocks as present.
    pub(super) fn set(&mut self, blocks: Range<u64>) {
        let mut block = blocks.start;
        while block < blocks.end {
            let index = (block / WORD_BITS) as usize;
            let word_end = (block / WORD_BITS + 1) * WORD_BITS;
            let count = word_end.min(blocks.end) - block;
            let mask = u64::MAX >> (WORD_BITS - count) << (block % WORD_BITS);
            let added = mask & !self.words[index];
            if added != 0 {
                self.words[index] |= added;
                self.present += u64::from(added.count_ones());
                self.mark_dirty(index / PAGE_WORDS);
            }
            block = word_end;
        }
    }

    pub(super) fn mark_dirty(&mut self, page: usize) {
        self.dirty[page / WORD_BITS as usize] |= 1 << (page % WORD_BITS as usize);
    }

    /// The pages that differ from the file; none do afterwards.
    pub(super) fn take_dirty(&mut self) -> Vec<usize> {
        let mut pages = Vec::new();
        for (index, word) in self.dirty.iter_mut().enumerate() {
            let mut bits = std::mem::take(word);
            while bits != 0 {
                pages.push(index * WORD_BITS as usize + bits.trailing_zeros() as usize);
                bits &= bits - 1;
            }
        }
        pages
    }

    /// A page as the file has it.
    pub(super) fn page(&self, page: usize) -> impl Iterator<Item = u8> {
        self.words[page * PAGE_WORDS..][..PAGE_WORDS]
            .iter()
            .flat_map(|word| word.to_le_bytes())
    }

    /// Takes a page from the file.
    pub(super) fn load(&mut self, page: usize, bytes: &[u8; PAGE_BYTES]) {
        let (words, _) = bytes.as_chunks();
        for (word, bytes) in self.words[page * PAGE_WORDS..].iter_mut().zip(words) {
            let loaded = u64::from_le_bytes(*bytes);
            self.present += u64::from(loaded.count_ones());
            *word = loaded;
        }
    }

    /// Whether a block past the first `blocks` is marked, which only a damaged
    /// file can cause.
    pub(super) fn marks_past(&self, blocks: u64) -> bool {
        let words = self.words.len() as u64;
        marks_past(|index| self.words[index], blocks, words)
    }
}

// === impl FrozenBitmap ===

impl FrozenBitmap {
    /// The map of so many blocks that begins at `offset` of a file. The file
    /// reaches beyond it, and must not be cut while this lives.
    pub(super) fn map(file: &Arc<File>, offset: u64, blocks: u64) -> io::Result<Self> {
        let region = MmapRegionBuilder::new(region_bytes(blocks) as usize)
            .with_mmap_prot(libc::PROT_READ)
            .with_mmap_flags(libc::MAP_SHARED)
            .with_file_offset(FileOffset::from_arc(Arc::clone(file), offset))
            .build()
            .map_err(|error| match error {
                MmapRegionError::Mmap(error) => error,
                other => io::Error::other(other),
            })?;
        // Around the map are holes, which would be read into the page cache.
        crate::sys::map_page_by_page(&region)?;
        Ok(Self { region })
    }

    /// As [`Bitmap::run`].
    pub(super) fn run(&self, start: u64, end: u64) -> (bool, u64) {
        run(|index| self.word(index), start, end)
    }

    /// As [`Bitmap::marks_past`].
    pub(super) fn marks_past(&self, blocks: u64) -> bool {
        let words = (self.region.size() / size_of::<u64>()) as u64;
        marks_past(|index| self.word(index), blocks, words)
    }

    fn word(&self, index: usize) -> u64 {
        // Only what is past the map's end has no word.
        let word = self.region.get_ref::<u64>(index * size_of::<u64>());
        word.map_or(0, |word| u64::from_le(word.load()))
    }
}

fn run(word: impl Fn(usize) -> u64, start: u64, end: u64) -> (bool, u64) {
    let present = word((start / WORD_BITS) as usize) >> (start % WORD_BITS) & 1 == 1;
    let mut block = start;
    while block < end {
        let word = word((block / WORD_BITS) as usize);
        let differing = if present { !word } else { word } >> (block % WORD_BITS);
        if differing != 0 {
            let run_end = block + u64::from(differing.trailing_zeros());
            // A mapped word may have changed since it told `present`; a run is
            // never empty.
            return (present, run_end.clamp(start + 1, end));
        }
        block = (block / WORD_BITS + 1) * WORD_BITS;
    }
    (present, end)
}

fn marks_past(word: impl Fn(usize) -> u64, blocks: u64, words: u64) -> bool {
    let end = words * WORD_BITS;
    blocks < end && {
        let (present, run_end) = run(word, blocks, end);
        present || run_end < end
    }
}

/// What the map of so many blocks takes in the file: whole pages, in bytes.
pub(super) fn region_bytes(blocks: u64) -> u64 {
    blocks.div_ceil(8).next_multiple_of(PAGE_BYTES as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_page_costs_nothing_until_it_is_written_and_is_dirty_after() {
        let mut map = Bitmap::new(3 * 32768);
        assert!(map.take_dirty().is_empty());
        map.set(32768..32769);
        assert_eq!(map.take_dirty(), [1]);
        map.set(32768..32769);
        assert!(
            map.take_dirty().is_empty(),
            "setting a set bit changes nothing"
        );
        map.set(32767..65537);
        assert_eq!(map.take_dirty(), [0, 1, 2]);
        assert_eq!(map.present(), 32770);
    }

    #[test]
    fn marks_past_the_end_are_seen() {
        let mut map = Bitmap::new(100);
        map.set(0..100);
        assert!(!map.marks_past(100));
        map.set(200..201);
        assert!(map.marks_past(100));
        let mut full = Bitmap::new(32768);
        full.set(0..32768);
        assert!(!full.marks_past(32768));
    }

    proptest! {
        #[test]
        fn a_mapped_map_is_the_one_that_was_written(
            sets in prop::collection::vec((0..33_000u64, 0..9_000u64), 0..4),
            queries in prop::collection::vec((0..42_000u64, 1..9_000u64), 1..16),
        ) {
            let mut map = Bitmap::new(42_000);
            for (start, len) in sets {
                map.set(start..start + len);
            }
            let file = tempfile::tempfile().unwrap();
            let bytes: Vec<u8> = (0..2).flat_map(|page| map.page(page)).collect();
            file.write_all_at(&bytes, 4096).unwrap();
            let mapped = FrozenBitmap::map(&Arc::new(file), 4096, 42_000).unwrap();
            for (start, len) in queries {
                let end = (start + len).min(42_000);
                prop_assert_eq!(mapped.run(start, end), map.run(start, end));
                prop_assert_eq!(mapped.marks_past(start), map.marks_past(start));
            }
        }

        #[test]
        fn equals_a_vector_of_bools(
            sets in prop::collection::vec((0..500u64, 0..200u64), 0..12),
            queries in prop::collection::vec((0..699u64, 1..200u64), 1..32),
        ) {
            let mut map = Bitmap::new(700);
            let mut model = vec![false; 700];
            for (start, len) in sets {
                map.set(start..start + len);
                model[start as usize..][..len as usize].fill(true);
            }
            prop_assert_eq!(map.present(), model.iter().filter(|&&b| b).count() as u64);
            for (start, len) in queries {
                let end = (start + len).min(700);
                let window = &model[start as usize..end as usize];
                let same = window.iter().take_while(|&&b| b == window[0]).count() as u64;
                prop_assert_eq!(map.run(start, end), (window[0], start + same));
            }
            let mut bytes = [0; PAGE_BYTES];
            map.page(0).zip(&mut bytes).for_each(|(byte, slot)| *slot = byte);
            let mut again = Bitmap::new(700);
            again.load(0, &bytes);
            prop_assert_eq!(again.words, map.words);
            prop_assert_eq!(again.present, map.present);
        }
    }
}
