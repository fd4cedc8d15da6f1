//! Small bridges: to descriptors of crates that predate `AsFd`, to malloc, to
//! madvise(2) and to close_range(2).
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use rustix::io::Errno;
use rustix::mm::{Advice, madvise};
use vm_memory::MmapRegion;
use vmm_sys_util::eventfd::EventFd;

/// `EventFd` owns its descriptor but does not implement `AsFd`.
pub(crate) fn borrow_fd(eventfd: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open for as long as the EventFd lives, and the
    // result borrows from it.
    unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) }
}

/// Makes malloc keep to one arena. It would otherwise open a file of /sys to
/// learn how many CPUs there are once many threads allocate, which a jailed
/// process must not; and the monitor allocates too little to gain from more.
pub(crate) fn use_one_malloc_arena() {
    // SAFETY: mallopt only changes a parameter of the allocator; it is called
    // before there is a second thread.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Has a fault in a mapped file read the one page, and not megabytes around it.
pub(crate) fn map_page_by_page(region: &MmapRegion) -> Result<(), Errno> {
    // SAFETY: the range is a mapping that lives as long as `region`, and the
    // advice changes nothing of what it holds. vm-memory has no such call.
    unsafe { madvise(region.as_ptr().cast(), region.size(), Advice::Random) }
}

/// Closes every descriptor above standard error but `keep`: what a parent left
/// open by mistake is not the monitor's to have. Called before anything is
/// opened here.
pub(crate) fn close_inherited(keep: RawFd) {
    let keep = keep.unsigned_abs();
    let close = |first: u32, last: u32| {
        if first <= last {
            // SAFETY: no descriptor of this process has an owner yet but the
            // standard streams and `keep`, which are outside the range.
            unsafe { libc::close_range(first, last, 0) };
        }
    };
    close(FIRST_INHERITED, keep.saturating_sub(1));
    close(keep.saturating_add(1).max(FIRST_INHERITED), u32::MAX);
}

/// The first descriptor after standard input, output and error.
const FIRST_INHERITED: u32 = 3;
