//! Freezing the top layer for a snapshot, in two steps: what can fail, and what
//! cannot. The disk is quiesced, so that all data is in the files and no piece
//! is with the engine.

use super::disk::{Disk, Mounted};
use super::engine::Engine;
use super::frozen::FrozenLayer;
use super::layer::Layer;
use super::merge::merge;
use super::{FROZEN_LAYERS_MAX, Freeze, FreezeError};

/// A change of layers that needs no more than to be made.
#[derive(Debug)]
pub(super) struct Prepared {
    /// The next top layer.
    next: Mounted<Layer>,
    /// What becomes of the old one: itself, or what it was merged into.
    frozen: Mounted<FrozenLayer>,
    /// What is in `frozen` besides itself: the top layer, and the frozen ones from
    /// here on.
    merged_from: Option<usize>,
}

/// Does all that can fail. None: the disk is not to change its layers.
pub(super) fn prepare<T: Copy>(
    freeze: Freeze,
    disk: &mut Disk,
    engine: &mut Engine<T>,
) -> Result<Option<Prepared>, FreezeError> {
    let Freeze {
        next,
        merge: merging,
    } = freeze;
    let size_bytes = disk.size_bytes();
    let Some(top) = &mut disk.top else {
        return if next.is_none() && merging.is_none() {
            Ok(None)
        } else {
            Err(FreezeError::Request(
                "a read-only disk has nothing to freeze; send no layers for it",
            ))
        };
    };
    if top.layer.has_failed() {
        return Err(FreezeError::Failed);
    }
    let keep = merging.as_ref().map_or(disk.frozen.len(), |m| m.keep);
    let Some(merged_frozen) = disk.frozen.get(keep..) else {
        return Err(FreezeError::Request(
            "keep is more than the disk has frozen layers; send at most their number",
        ));
    };
    if keep >= FROZEN_LAYERS_MAX {
        return Err(FreezeError::Request(
            "the disk has as many frozen layers as a disk can have; merge some",
        ));
    }

    let next = next
        .map(|file| Layer::open_new(file, size_bytes))
        .transpose()?;
    let merged = merging
        .map(|merging| Layer::open_new(merging.file, size_bytes))
        .transpose()?;
    top.layer.write_bitmap().map_err(FreezeError::Io)?;
    let mut frozen = top.layer.frozen()?;
    let is_merged = merged.is_some();
    if let Some(mut into) = merged {
        let older = merged_frozen.iter().rev().map(|mounted| &mounted.layer);
        merge(std::iter::once(&frozen).chain(older), size_bytes, &mut into)?;
        frozen = into.frozen()?;
    }

    // Without a next layer, a merged one is for the snapshot alone.
    let Some(next) = next else {
        return Ok(None);
    };
    let top_target = top.target;
    let next = Mounted {
        target: engine.add_file(next.file()).map_err(FreezeError::Io)?,
        layer: next,
    };
    let target = if is_merged {
        engine.add_file(frozen.file())
    } else {
        Ok(top_target)
    };
    match target {
        Ok(target) => Ok(Some(Prepared {
            next,
            frozen: Mounted {
                target,
                layer: frozen,
            },
            merged_from: is_merged.then_some(keep),
        })),
        Err(error) => {
            engine.remove_file(next.target);
            Err(FreezeError::Io(error))
        }
    }
}

// === impl Prepared ===

impl Prepared {
    /// The old top layer, or what it was merged into, is frozen.
    pub(super) fn commit<T: Copy>(self, disk: &mut Disk, engine: &mut Engine<T>) {
        let old_top = disk.top.replace(self.next);
        if let Some(keep) = self.merged_from {
            let gone = disk.frozen.drain(keep..).map(|frozen| frozen.target);
            for target in gone.chain(old_top.map(|top| top.target)) {
                engine.remove_file(target);
            }
        }
        disk.frozen.push(self.frozen);
    }

    /// Nothing changes. What the top layer's file now records of what is present
    /// is true, so it may stay.
    pub(super) fn abandon<T: Copy>(self, engine: &mut Engine<T>) {
        engine.remove_file(self.next.target);
        if self.merged_from.is_some() {
            engine.remove_file(self.frozen.target);
        }
    }
}
