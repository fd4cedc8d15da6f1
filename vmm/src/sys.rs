//! Small bridges: to descriptors of crates that predate `AsFd`, and to malloc.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

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
