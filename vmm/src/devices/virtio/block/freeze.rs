//! Freezing the top layer for a snapshot, in two steps: what can fail, and what
//! cannot. The disk is quiesced, so that all data is in the files and no piece
//! is with the engine.

use super::disk::{Disk, Mounted};
use super::engine::Engine;
use super::layer::Layer;
use super::merge::merge;
use super::{FROZEN_LAYERS_MAX, Freeze, FreezeError};

/// A change of layers that needs no more than to be made.
#[derive(Debug)]
pub(super) struct Prepared {
    next: Mounted,
    merged: Option<Merged>,
}

#[derive(Debug)]
struct Merged {
    into: Mounted,
    /// Frozen layers that are not in it.
    keep: usize,
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
    let mut merged = merging
        .map(|merging| Layer::open_new(merging.file, size_bytes))
        .transpose()?;
    top.layer.write_bitmap().map_err(FreezeError::Io)?;
    if let Some(into) = &mut merged {
        let newest_first = std::iter::once(&*top).chain(merged_frozen.iter().rev());
        merge(newest_first, size_bytes, into)?;
    }

    // Without a next layer, the merged one is for the snapshot alone.
    let Some(next) = next else {
        return Ok(None);
    };
    let next = mount(next, engine)?;
    let merged = match merged.map(|layer| mount(layer, engine)).transpose() {
        Ok(merged) => merged.map(|into| Merged { into, keep }),
        Err(error) => {
            engine.remove_file(next.target);
            return Err(error);
        }
    };
    Ok(Some(Prepared { next, merged }))
}

fn mount<T: Copy>(layer: Layer, engine: &mut Engine<T>) -> Result<Mounted, FreezeError> {
    let target = engine.add_file(layer.file()).map_err(FreezeError::Io)?;
    Ok(Mounted { target, layer })
}

// === impl Prepared ===

impl Prepared {
    /// The old top layer, or what it was merged into, is frozen.
    ///
    /// It keeps the lock of a top layer for as long as this process has it open,
    /// which bars others from writing to it and nobody from reading it.
    pub(super) fn commit<T: Copy>(self, disk: &mut Disk, engine: &mut Engine<T>) {
        let old_top = disk.top.replace(self.next);
        let Some(Merged { into, keep }) = self.merged else {
            disk.frozen.extend(old_top);
            return;
        };
        for mounted in disk.frozen.drain(keep..).chain(old_top) {
            engine.remove_file(mounted.target);
        }
        disk.frozen.push(into);
    }

    /// Nothing changes. What the top layer's file now records of what is present
    /// is true, so it may stay.
    pub(super) fn abandon<T: Copy>(self, engine: &mut Engine<T>) {
        engine.remove_file(self.next.target);
        if let Some(Merged { into, .. }) = self.merged {
            engine.remove_file(into.target);
        }
    }
}
