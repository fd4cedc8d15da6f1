//! The system calls that change what guest memory is mapped from.
#![allow(unsafe_code)]

use std::fs::File;

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous};

use super::Stretch;

const READ_WRITE: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

/// Replaces the stretch by zeros.
pub(super) fn anonymous(stretch: &Stretch) -> Result<(), Errno> {
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    let address = stretch.host_address as *mut _;
    // SAFETY: a stretch lies in a mapping that a `GuestMemory` owns and unmaps as
    // one range when it goes; nothing else of this process is there. Guest memory
    // is only ever used through volatile accesses, which bear that it changes.
    unsafe { mmap_anonymous(address, stretch.bytes as usize, READ_WRITE, flags) }?;
    Ok(())
}

/// Replaces the stretch by a private mapping of `file` at the stretch's offset.
pub(super) fn file(stretch: &Stretch, file: &File) -> Result<(), Errno> {
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    let (address, bytes) = (stretch.host_address as *mut _, stretch.bytes as usize);
    // SAFETY: as above. A file that is cut afterwards makes accesses fault, which
    // ends this process and no other; the daemon never cuts one.
    unsafe { mmap(address, bytes, READ_WRITE, flags, file, stretch.offset) }?;
    Ok(())
}

/// Drops the stretch's private pages.
pub(super) fn discard(stretch: &Stretch) -> Result<(), Errno> {
    let address = stretch.host_address as *mut _;
    // SAFETY: as above; the pages read as what is mapped below them.
    unsafe { madvise(address, stretch.bytes as usize, Advice::LinuxDontNeed) }
}

/// Gives the stretch private pages, as if each had been written.
pub(super) fn populate(stretch: &Stretch) -> Result<(), Errno> {
    let address = stretch.host_address as *mut _;
    // SAFETY: as above; what the pages hold does not change.
    unsafe { madvise(address, stretch.bytes as usize, Advice::LinuxPopulateWrite) }
}
