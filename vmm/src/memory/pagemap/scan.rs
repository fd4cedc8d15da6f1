//! The PAGEMAP_SCAN ioctl (Linux 6.7).
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;

use rustix::io::Errno;

use super::push;
use crate::memory::runs::Pages;
use crate::memory::{PAGE_BYTES, Stretch};

/// `_IOWR('f', 16, struct pm_scan_arg)` (linux/fs.h).
pub(crate) const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;

const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

/// Regions taken at once.
const REGIONS: usize = 512;

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
struct Arguments {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const _: () = assert!(size_of::<Arguments>() == 96 && size_of::<Region>() == 24);

/// Appends the private pages of the stretch.
pub(super) fn private(
    pagemap: &File,
    stretch: &Stretch,
    private: &mut Vec<Pages>,
) -> Result<(), Errno> {
    let base = stretch.host_address as u64;
    let mut regions = [Region::default(); REGIONS];
    let mut arguments = Arguments {
        size: size_of::<Arguments>() as u64,
        flags: 0,
        start: base,
        end: base + stretch.bytes,
        walk_end: 0,
        vec: regions.as_mut_ptr() as u64,
        vec_len: REGIONS as u64,
        max_pages: 0,
        // In memory or swapped out, of no file, and not the page of zeros.
        category_inverted: PAGE_IS_FILE | PAGE_IS_PFNZERO,
        category_mask: PAGE_IS_FILE | PAGE_IS_PFNZERO,
        category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        // Regions need not be told apart further.
        return_mask: PAGE_IS_FILE,
    };
    while arguments.start < arguments.end {
        // SAFETY: the kernel reads and writes `arguments`, whose size it is told,
        // and writes at most REGIONS regions to `regions`; both are ours and
        // live until it returns.
        let found = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arguments) };
        if found < 0 {
            return Err(
                Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL)
            );
        }
        for region in regions.iter().take(found.unsigned_abs() as usize) {
            let start = (stretch.offset + (region.start - base)) / PAGE_BYTES;
            push(private, start, (region.end - region.start) / PAGE_BYTES);
        }
        if arguments.walk_end <= arguments.start {
            break;
        }
        arguments.start = arguments.walk_end;
    }
    Ok(())
}
