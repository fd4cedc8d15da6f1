//! What a guest touches between its restore and its first answers. It is much the
//! same for every clone of a snapshot, so it is recorded once and filled in ahead
//! in later clones: a page of a list costs less than a page fault through KVM,
//! which leaves the guest for it.
//!
//! What it wrote is what has become private. What it only read is what has come
//! into the page cache meanwhile, if faults read no page ahead; the accessed bits
//! that would tell it as well are KVM's own.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

use super::runs::Pages;
use crate::snapshot::checksum;

/// The most that is filled in to be written or to be read: more is no start, but
/// work.
const MAX_PAGES: u64 = 16 << 10;
/// The longest file: a page in each run.
const MAX_BYTES: u64 = 512 << 10;

/// Pages of a RAM of so many, in order and apart.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingSet {
    pub ram_pages: u64,
    pub written: Vec<Pages>,
    /// And not written.
    pub read: Vec<Pages>,
}

/// What a restore does about the working set.
#[derive(Debug)]
pub enum Ahead {
    Nothing,
    /// Fills in the one of this file.
    FillIn(File),
    /// Sees to it that it can be recorded.
    Record,
}

// === impl WorkingSet ===

impl WorkingSet {
    /// The first pages of each kind, if there are too many.
    pub fn new(ram_pages: u64, written: Vec<Pages>, read: Vec<Pages>) -> Self {
        Self {
            ram_pages,
            written: first_pages(written),
            read: first_pages(read),
        }
    }

    /// Writes it to an empty file: its checksum, then itself. Returns its length.
    pub fn write(&self, file: &File) -> io::Result<u64> {
        let body = postcard::to_stdvec(self).map_err(io::Error::other)?;
        let mut bytes = checksum(&body).to_le_bytes().to_vec();
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
        let (expected, body) = bytes.split_first_chunk::<8>()?;
        if checksum(body) != u64::from_le_bytes(*expected) {
            return None;
        }
        let set: Self = postcard::from_bytes(body).ok()?;
        let fits = set.ram_pages == ram_pages
            && is_in_ram(&set.written, ram_pages)
            && is_in_ram(&set.read, ram_pages);
        fits.then_some(set)
    }
}

fn first_pages(mut runs: Vec<Pages>) -> Vec<Pages> {
    let mut left = MAX_PAGES;
    runs.retain_mut(|run| {
        run.end = run.end.min(run.start + left);
        left -= run.end - run.start;
        run.end > run.start
    });
    runs
}

fn is_in_ram(runs: &[Pages], ram_pages: u64) -> bool {
    let (mut free, mut pages) = (0, 0);
    for run in runs {
        if run.start < free || run.end <= run.start || run.end > ram_pages {
            return false;
        }
        pages += run.end - run.start;
        free = run.end;
    }
    pages <= MAX_PAGES
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
        let too_many = [
            pages(1, 2),
            pages(10, 10 + MAX_PAGES),
            pages(90_000, 90_001),
        ];
        let set = WorkingSet::new(100_000, too_many.to_vec(), vec![pages(3, 5)]);
        assert_eq!(set.written, [pages(1, 2), pages(10, 9 + MAX_PAGES)]);
        assert_eq!(set.read, [pages(3, 5)]);
        set.write(&file).unwrap();
        assert_eq!(WorkingSet::read(&file, 100_000), Some(set));
        assert_eq!(WorkingSet::read(&file, 50_000), None, "of another RAM");
        file.write_all_at(&[0xff], 9).unwrap();
        assert_eq!(WorkingSet::read(&file, 100_000), None, "damaged");
    }

    fn runs() -> impl Strategy<Value = Vec<Pages>> {
        let page = || prop_oneof![any::<u64>(), 0..1000u64];
        let run = (page(), page()).prop_map(|(start, end)| Pages { start, end });
        prop::collection::vec(run, 0..4)
    }

    proptest! {
        /// Runs that a file may claim, its checksum right, are in RAM or refused.
        #[test]
        fn hostile_ones_are_refused(written in runs(), read in runs()) {
            let file = tempfile::tempfile().unwrap();
            WorkingSet { ram_pages: 1000, written, read }.write(&file).unwrap();
            if let Some(set) = WorkingSet::read(&file, 1000) {
                let mut all = set.written.iter().chain(&set.read);
                prop_assert!(all.all(|run| run.start < run.end && run.end <= 1000));
            }
        }
    }
}
