//! Which pages of guest memory this process alone holds: those that the guest,
//! or a device, has written since they were mapped. A private mapping makes such
//! a page anonymous, and the kernel says which are
//! (Documentation/admin-guide/mm/pagemap.rst).

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::runs::{Pages, push};
use super::{GuestMemory, PAGE_BYTES, Stretch, stretches};

mod scan;

pub(crate) use scan::PAGEMAP_SCAN;

/// Bits of an entry of /proc/pid/pagemap.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const FILE_OR_SHARED: u64 = 1 << 61;

/// Entries read at once.
const BATCH: u64 = 8192;

/// `/proc/<pid>/pagemap` of this process.
#[derive(Debug)]
pub struct Pagemap(File);

#[derive(Debug, thiserror::Error)]
pub enum PagemapError {
    #[error(
        "the pages that the guest has written could not be found; send /proc/<pid>/pagemap of this process"
    )]
    Read(#[source] std::io::Error),
}

// === impl Pagemap ===

impl Pagemap {
    pub fn new(file: File) -> Self {
        Self(file)
    }

    /// The pages of RAM that are private, in order.
    pub fn private(&self, memory: &GuestMemory) -> Result<Vec<Pages>, PagemapError> {
        let mut private = Vec::new();
        for stretch in stretches(memory) {
            match scan::private(&self.0, &stretch, &mut private) {
                Ok(()) => {}
                // Linux before 6.7, which has no PAGEMAP_SCAN.
                Err(rustix::io::Errno::NOTTY) => self.read(&stretch, &mut private)?,
                Err(errno) => return Err(PagemapError::Read(errno.into())),
            }
        }
        Ok(private)
    }

    /// The long way: eight bytes for each page.
    fn read(&self, stretch: &Stretch, private: &mut Vec<Pages>) -> Result<(), PagemapError> {
        let first = stretch.host_address as u64 / PAGE_BYTES;
        let pages = stretch.bytes / PAGE_BYTES;
        let mut bytes = vec![0u8; (BATCH * 8) as usize];
        let mut done = 0;
        while done < pages {
            let batch = BATCH.min(pages - done);
            let bytes = &mut bytes[..(batch * 8) as usize];
            self.0
                .read_exact_at(bytes, (first + done) * 8)
                .map_err(PagemapError::Read)?;
            for (page, entry) in (done..).zip(bytes.chunks_exact(8)) {
                let entry = entry.try_into().map_or(0, u64::from_ne_bytes);
                if entry & (PRESENT | SWAPPED) != 0 && entry & FILE_OR_SHARED == 0 {
                    push(private, stretch.offset / PAGE_BYTES + page, 1);
                }
            }
            done += batch;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{discard, map_anonymous, map_first_layer, reserve};
    use vm_memory::{Bytes, GuestAddress};

    fn pagemap() -> Pagemap {
        Pagemap::new(File::open("/proc/self/pagemap").unwrap())
    }

    fn both_ways(memory: &GuestMemory) -> Vec<(u64, u64)> {
        let pagemap = pagemap();
        let scanned = pagemap.private(memory).unwrap();
        let mut read = Vec::new();
        for stretch in stretches(memory) {
            pagemap.read(&stretch, &mut read).unwrap();
        }
        assert_eq!(scanned, read);
        read.iter().map(|pages| (pages.start, pages.end)).collect()
    }

    #[test]
    fn what_is_written_is_private_and_what_is_read_is_not() {
        let memory = reserve(4 << 20).unwrap();
        let layer = tempfile::tempfile().unwrap();
        layer.set_len(4 << 20).unwrap();
        map_first_layer(&memory, &layer).unwrap();
        assert_eq!(both_ways(&memory), []);
        let page = |number: u64| GuestAddress(number * PAGE_BYTES);
        let _: u8 = memory.read_obj(page(3)).unwrap();
        for number in [5, 6, 9, 1023] {
            memory.write_obj(1u8, page(number)).unwrap();
        }
        assert_eq!(both_ways(&memory), [(5, 7), (9, 10), (1023, 1024)]);
        discard(&memory, page(5), 2 * PAGE_BYTES).unwrap();
        assert_eq!(both_ways(&memory), [(9, 10), (1023, 1024)]);
    }

    #[test]
    fn anonymous_memory_is_private_where_written() {
        let memory = reserve(1 << 20).unwrap();
        map_anonymous(&memory).unwrap();
        memory.write_obj(1u8, GuestAddress(0x8000)).unwrap();
        let private = pagemap().private(&memory).unwrap();
        assert_eq!(private, [Pages { start: 8, end: 9 }]);
    }
}
