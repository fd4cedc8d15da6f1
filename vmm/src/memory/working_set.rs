//! What a guest writes between its restore and its first answers. It is much the
//! same for every clone of a snapshot, so it is recorded once, from the pages that
//! have become private, and filled in ahead in later clones: a page of a list
//! costs less than a page fault through KVM, which leaves the guest for it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use super::runs::Pages;
use crate::snapshot::CRC;

/// The most that is filled in: more is no start, but work.
const MAX_PAGES: u64 = 16 << 10;
/// The longest file: a page in each run.
const MAX_BYTES: u64 = 256 << 10;

/// Runs of pages of a RAM of so many.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingSet {
    pub ram_pages: u64,
    runs: Vec<Pages>,
}

// === impl WorkingSet ===

impl WorkingSet {
    /// Of the pages that are private now, in order; the first of them if there
    /// are too many.
    pub fn new(ram_pages: u64, private: Vec<Pages>) -> Self {
        let mut left = MAX_PAGES;
        let mut runs = private;
        runs.retain_mut(|run| {
            run.end = run.end.min(run.start + left);
            left -= run.end - run.start;
            run.end > run.start
        });
        Self { ram_pages, runs }
    }

    /// Writes it to an empty file: its checksum, then itself. Returns its length.
    pub fn write(&self, file: &File) -> io::Result<u64> {
        let body = postcard::to_stdvec(self).map_err(io::Error::other)?;
        let mut bytes = CRC.checksum(&body).to_le_bytes().to_vec();
        bytes.extend(body);
        file.write_all_at(&bytes, 0)?;
        Ok(bytes.len() as u64)
    }

    /// Reads one that is for such a RAM. Anything else is none: a restore is only
    /// slower without.
    pub fn read(file: &File, ram_pages: u64) -> Option<Self> {
        let length = file.metadata().ok()?.len();
        if length > MAX_BYTES {
            return None;
        }
        let mut bytes = vec![0; length as usize];
        file.read_exact_at(&mut bytes, 0).ok()?;
        let (checksum, body) = bytes.split_first_chunk::<8>()?;
        if CRC.checksum(body) != u64::from_le_bytes(*checksum) {
            return None;
        }
        let set: Self = postcard::from_bytes(body).ok()?;
        let mut free = 0;
        let mut pages = 0;
        for run in &set.runs {
            if run.start < free || run.end <= run.start || run.end > ram_pages {
                return None;
            }
            pages += run.end - run.start;
            free = run.end;
        }
        (set.ram_pages == ram_pages && pages <= MAX_PAGES).then_some(set)
    }

    pub fn runs(&self) -> &[Pages] {
        &self.runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pages(start: u64, end: u64) -> Pages {
        Pages { start, end }
    }

    #[test]
    fn what_is_written_is_read() {
        let file = tempfile::tempfile().unwrap();
        let set = WorkingSet::new(
            100_000,
            vec![
                pages(1, 2),
                pages(10, 10 + MAX_PAGES),
                pages(90_000, 90_001),
            ],
        );
        assert_eq!(set.runs(), [pages(1, 2), pages(10, 9 + MAX_PAGES)]);
        set.write(&file).unwrap();
        assert_eq!(WorkingSet::read(&file, 100_000), Some(set));
        assert_eq!(WorkingSet::read(&file, 50_000), None, "of another RAM");
        file.write_all_at(&[0xff], 9).unwrap();
        assert_eq!(WorkingSet::read(&file, 100_000), None, "damaged");
    }

    proptest! {
        /// Runs that a file may claim, its checksum right, are in RAM or refused.
        #[test]
        fn hostile_ones_are_refused(runs in prop::collection::vec((any::<u64>(), any::<u64>()), 0..6)) {
            let file = tempfile::tempfile().unwrap();
            let runs = runs.into_iter().map(|(start, end)| Pages { start, end }).collect();
            WorkingSet { ram_pages: 1000, runs }.write(&file).unwrap();
            if let Some(set) = WorkingSet::read(&file, 1000) {
                prop_assert!(set.runs().iter().all(|run| run.start < run.end && run.end <= 1000));
            }
        }
    }
}
