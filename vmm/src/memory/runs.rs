//! Which pages of RAM come from which memory layer.

use serde::{Deserialize, Serialize};

use super::PAGE_BYTES;

/// Pages that are nobody's and lie between two runs are taken along when they are
/// this few: one mapping, or one call, less is worth more.
const BRIDGE_PAGES: u64 = 8;

/// Consecutive pages in one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// From the start of RAM.
    pub start_page: u64,
    pub pages: u64,
    /// From 0, the root, which all of RAM is in if no run says otherwise.
    pub layer: u32,
    /// From the start of the layer.
    pub layer_page: u64,
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

    /// Where it starts in its layer.
    pub fn layer_bytes(&self) -> u64 {
        self.layer_page * PAGE_BYTES
    }

    /// Where it ends in its layer.
    pub fn layer_end_bytes(&self) -> u64 {
        self.layer_bytes() + self.bytes()
    }

    fn end_page(&self) -> u64 {
        self.start_page + self.pages
    }

    /// The part of the run that these pages of it are.
    fn cut(&self, pages: &Pages) -> Self {
        Self {
            start_page: pages.start,
            pages: pages.end - pages.start,
            layer: self.layer,
            layer_page: self.layer_page + (pages.start - self.start_page),
        }
    }
}

/// Checks runs that come from a file: in order, apart, in RAM and in layers
/// above the root, none of which can be longer than RAM.
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
        let layer_end = run.layer_page.checked_add(run.pages);
        if layer_end.is_none_or(|end| end > ram_pages) {
            return Err(RunsError::Range);
        }
        free = run.end_page();
    }
    Ok(())
}

/// Adds pages behind those that are there.
pub(super) fn push(sorted: &mut Vec<Pages>, start: u64, pages: u64) {
    match sorted.last_mut() {
        Some(last) if last.end == start => last.end += pages,
        _ => sorted.push(Pages {
            start,
            end: start + pages,
        }),
    }
}

/// `pages` without those of `others`; both are in order and apart.
pub fn without(pages: &[Pages], others: &[Pages]) -> Vec<Pages> {
    let mut rest = Vec::new();
    for pages in pages {
        let mut start = pages.start;
        let first = others.partition_point(|other| other.end <= pages.start);
        for other in &others[first..] {
            if other.start >= pages.end {
                break;
            }
            if other.start > start {
                rest.push(Pages {
                    start,
                    end: other.start,
                });
            }
            start = start.max(other.end);
        }
        if start < pages.end {
            rest.push(Pages {
                start,
                end: pages.end,
            });
        }
    }
    rest
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
    let all: Vec<Pages> = dirty.iter().copied().chain(flattened).collect();
    bridged(&all)
}

/// All of these pages, sorted and apart, with small gaps bridged.
pub fn bridged(pages: &[Pages]) -> Vec<Pages> {
    let mut sorted = pages.to_vec();
    sorted.sort_unstable_by_key(|pages| pages.start);
    let mut bridged: Vec<Pages> = Vec::new();
    for pages in sorted {
        match bridged.last_mut() {
            Some(last) if pages.start <= last.end + BRIDGE_PAGES => {
                last.end = last.end.max(pages.end);
            }
            _ => bridged.push(pages),
        }
    }
    bridged
}

/// The runs of a snapshot that keeps the first `keep` layers of `runs` and has
/// `written`, sorted and apart, one behind the other in a layer of its own above
/// them.
pub fn overlay(runs: &[Run], written: &[Pages], keep: u32) -> Vec<Run> {
    let mut layer_page = 0;
    let mut overlaid: Vec<Run> = written
        .iter()
        .map(|pages| {
            let run = Run {
                start_page: pages.start,
                pages: pages.end - pages.start,
                layer: keep,
                layer_page,
            };
            layer_page += run.pages;
            run
        })
        .collect();
    for run in runs.iter().filter(|run| run.layer < keep) {
        let all = Pages {
            start: run.start_page,
            end: run.end_page(),
        };
        let kept = without(&[all], written);
        overlaid.extend(kept.iter().map(|pages| run.cut(pages)));
    }
    overlaid.sort_unstable_by_key(|run| run.start_page);
    overlaid
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RAM: u64 = 256;

    /// For each page, its layer and its place there.
    fn places(runs: &[Run]) -> Vec<(usize, usize)> {
        let mut places: Vec<_> = (0..RAM as usize).map(|page| (0, page)).collect();
        for run in runs {
            for page in 0..run.pages {
                let layer_page = (run.layer_page + page) as usize;
                places[(run.start_page + page) as usize] = (run.layer as usize, layer_page);
            }
        }
        places
    }

    /// Any, and often one that passes.
    fn number() -> impl Strategy<Value = u64> {
        prop_oneof![any::<u64>(), 0..RAM]
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
                let mut layer = Vec::new();
                for pages in &written {
                    layer.extend(&version[pages.start as usize..pages.end as usize]);
                }
                contents.truncate(keep as usize);
                contents.push(layer);
                runs = overlay(&runs, &written, keep);
                layers = keep + 1;
                prop_assert_eq!(check(&runs, RAM, layers), Ok(()));
                for ((layer, place), version) in places(&runs).into_iter().zip(&version) {
                    prop_assert_eq!(contents[layer][place], *version);
                }
            }
        }

        /// No run that a file may hold panics, and what passes is safe to map.
        #[test]
        fn hostile_runs_are_refused(runs in prop::collection::vec((number(), number(), 0..4u32, number()), 0..5)) {
            let run = |(start_page, pages, layer, layer_page)| Run { start_page, pages, layer, layer_page };
            let runs: Vec<Run> = runs.into_iter().map(run).collect();
            if check(&runs, RAM, 3).is_ok() {
                prop_assert!(runs.iter().all(|run| run.end_page() <= RAM && (1..3).contains(&run.layer)));
                prop_assert!(runs.iter().all(|run| run.layer_end_bytes() <= RAM * PAGE_BYTES));
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
