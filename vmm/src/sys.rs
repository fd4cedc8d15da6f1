//! Small bridges: to descriptors of crates that predate `AsFd`, to malloc, to
//! madvise(2), to the program's own segments and to close_range(2).
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr;

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

/// Maps all of the program's code and constants, which are in the page cache: what
/// a shell has to do later, it does without page faults.
pub(crate) fn map_own_code() {
    // SAFETY: `map_segments` is what the call asks for, and takes no data.
    unsafe { libc::dl_iterate_phdr(Some(map_segments), ptr::null_mut()) };
}

/// For dl_iterate_phdr(3): maps the segments of an object that are not written to.
extern "C" fn map_segments(info: *mut libc::dl_phdr_info, _: usize, _: *mut c_void) -> c_int {
    // SAFETY: the C library passes a whole `dl_phdr_info` that lives for this call,
    // with the program headers of an object that is loaded, of which a monitor has
    // one, itself: it is static.
    let (base, headers) = unsafe {
        let info = &*info;
        let headers = ptr::slice_from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into());
        (info.dlpi_addr, &*headers)
    };
    let page_bytes = rustix::param::page_size() as u64;
    for header in headers {
        if header.p_type != libc::PT_LOAD || header.p_flags & libc::PF_W != 0 {
            continue;
        }
        let start = (base + header.p_vaddr) & !(page_bytes - 1);
        let end = base + header.p_vaddr + header.p_memsz;
        // SAFETY: the range is a mapping of this program that stays as long as it
        // runs; that its pages are mapped ahead changes nothing of what they hold.
        // Before Linux 5.14 it fails, and they are mapped when they are touched.
        let _ = unsafe {
            let bytes = (end - start) as usize;
            madvise(start as *mut c_void, bytes, Advice::LinuxPopulateRead)
        };
    }
    0
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
