//! Which pages of RAM come from which memory layer.

use serde::{Deserialize, Serialize};

use super::PAGE_BYTES;

/// Pages that are nobody's and lie between two runs are written along when they
/// are this few: one mapping less is worth more.
const BRIDGE_PAGES: u64 = 8;

/// Consecutive pages in one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// From the start of RAM.
    pub start_page: u64,
    pub pages: u64,
    /// From 0, the root, which all of RAM is in if no run says otherwise.
    pub layer: u32,
}

/// Consecutive pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    pub start: u64,
    pub end: u64,
}

/// Why a saved map of memory is not one.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RunsError {
    #[error("a run of memory is empty, out of order or outside RAM")]
    Range,
    #[error("a run of memory is in layer {0}, which the snapshot does not have")]
    Layer(u32),
}

// === impl Run ===

impl Run {
    pub fn start_bytes(&self) -> u64 {
        self.start_page * PAGE_BYTES
    }

    pub fn bytes(&self) -> u64 {
        self.pages * PAGE_BYTES
    }

    fn end_page(&self) -> u64 {
        self.start_page + self.pages
    }
}

/// Checks runs that come from a file: in order, apart, in RAM and in layers
/// above the root.
pub fn check(runs: &[Run], ram_pages: u64, layers: u32) -> Result<(), RunsError> {
    let mut free = 0;
    for run in runs {
        let end = run.start_page.checked_add(run.pages);
        if run.pages == 0 || run.start_page < free || end.is_none_or(|end| end > ram_pages) {
            return Err(RunsError::Range);
        }
        if run.layer == 0 || run.layer >= layers {
            return Err(RunsError::Layer(run.layer));
        }
        free = run.end_page();
    }
    Ok(())
}

/// What a new layer must hold: the dirty pages and those of the layers from
/// `keep` on, sorted, with small gaps bridged.
pub fn to_write(runs: &[Run], dirty: &[Pages], keep: u32) -> Vec<Pages> {
    let flattened = runs
        .iter()
        .filter(|run| run.layer >= keep)
        .map(|run| Pages {
            start: run.start_page,
            end: run.end_page(),
        });
    let mut all: Vec<Pages> = dirty.iter().copied().chain(flattened).collect();
    all.sort_unstable_by_key(|pages| pages.start);
    let mut merged: Vec<Pages> = Vec::new();
    for pages in all {
        match merged.last_mut() {
            Some(last) if pages.start <= last.end + BRIDGE_PAGES => {
                last.end = last.end.max(pages.end);
            }
            _ => merged.push(pages),
        }
    }
    merged
}

/// The runs of a snapshot that keeps the first `keep` layers of `runs` and has
/// `written`, sorted and apart, in a layer of its own above them.
pub fn overlay(runs: &[Run], written: &[Pages], keep: u32) -> Vec<Run> {
    let mut overlaid: Vec<Run> = written
        .iter()
        .map(|pages| Run {
            start_page: pages.start,
            pages: pages.end - pages.start,
            layer: keep,
        })
        .collect();
    for run in runs.iter().filter(|run| run.layer < keep) {
        // What of the run is not written anew.
        let mut start = run.start_page;
        let first = written.partition_point(|pages| pages.end <= run.start_page);
        for pages in &written[first..] {
            if pages.start >= run.end_page() {
                break;
            }
            if pages.start > start {
                overlaid.push(Run {
                    start_page: start,
                    pages: pages.start - start,
                    layer: run.layer,
                });
            }
            start = start.max(pages.end);
        }
        if start < run.end_page() {
            overlaid.push(Run {
                start_page: start,
                pages: run.end_page() - start,
                layer: run.layer,
            });
        }
    }
    overlaid.sort_unstable_by_key(|run| run.start_page);
    overlaid
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RAM: u64 = 256;

    fn owners(runs: &[Run]) -> Vec<u32> {
        let mut owners = vec![0; RAM as usize];
        for run in runs {
            owners[run.start_page as usize..run.end_page() as usize].fill(run.layer);
        }
        owners
    }

    fn pages() -> impl Strategy<Value = Vec<Pages>> {
        prop::collection::vec((0..RAM - 1, 1..20u64), 0..12).prop_map(|ranges| {
            let dirty: Vec<Pages> = ranges
                .into_iter()
                .map(|(start, len)| Pages {
                    start,
                    end: (start + len).min(RAM),
                })
                .collect();
            to_write(&[], &dirty, 1)
        })
    }

    proptest! {
        /// However snapshots follow each other, each page comes from where it
        /// was last written, and the map is one that a restore accepts.
        #[test]
        fn each_page_is_where_it_was_last_written(snapshots in prop::collection::vec((pages(), any::<bool>()), 1..6)) {
            let mut runs: Vec<Run> = Vec::new();
            let mut layers = 1;
            // For each page the number of the snapshot that last wrote it.
            let mut version = vec![0; RAM as usize];
            // What each layer holds.
            let mut contents: Vec<Vec<usize>> = vec![version.clone()];
            for (number, (dirty, flatten)) in snapshots.into_iter().enumerate() {
                for pages in &dirty {
                    version[pages.start as usize..pages.end as usize].fill(number + 1);
                }
                let keep = if flatten { 1 } else { layers };
                let written = to_write(&runs, &dirty, keep);
                let mut layer = vec![usize::MAX; RAM as usize];
                for pages in &written {
                    for page in pages.start..pages.end {
                        layer[page as usize] = version[page as usize];
                    }
                }
                contents.truncate(keep as usize);
                contents.push(layer);
                runs = overlay(&runs, &written, keep);
                layers = keep + 1;
                prop_assert_eq!(check(&runs, RAM, layers), Ok(()));
                for (page, owner) in owners(&runs).into_iter().enumerate() {
                    prop_assert_eq!(contents[owner as usize][page], version[page]);
                }
            }
        }

        /// No run that a file may hold panics, and what passes is safe to map.
        #[test]
        fn hostile_runs_are_refused(runs in prop::collection::vec((any::<u64>(), any::<u64>(), 0..4u32), 0..5)) {
            let runs: Vec<Run> = runs.into_iter().map(|(start_page, pages, layer)| Run { start_page, pages, layer }).collect();
            if check(&runs, RAM, 3).is_ok() {
                prop_assert!(runs.iter().all(|run| run.end_page() <= RAM && (1..3).contains(&run.layer)));
            }
        }
    }

    #[test]
    fn small_gaps_are_bridged() {
        let pages = |start, end| Pages { start, end };
        let dirty = [pages(0, 1), pages(9, 10), pages(19, 20)];
        assert_eq!(to_write(&[], &dirty, 1), [pages(0, 10), pages(19, 20)]);
    }
}
