//! The system calls that change what guest memory is mapped from.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous};

use super::{PAGE_BYTES, Stretch};

const READ_WRITE: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

/// Slices that one call takes (UIO_MAXIOV in linux/uio.h).
const MAX_SLICES: usize = 1024;

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

/// Replaces the stretch by a private mapping of `file` from `offset` on.
pub(super) fn file(stretch: &Stretch, file: &File, offset: u64) -> Result<(), Errno> {
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    let (address, bytes) = (stretch.host_address as *mut _, stretch.bytes as usize);
    // SAFETY: as above. A file that is cut afterwards makes accesses fault, which
    // ends this process and no other; the daemon never cuts one.
    unsafe { mmap(address, bytes, READ_WRITE, flags, file, offset) }?;
    Ok(())
}

/// Drops the stretch's private pages.
pub(super) fn discard(stretch: &Stretch) -> Result<(), Errno> {
    let address = stretch.host_address as *mut _;
    // SAFETY: as above; the pages read as what is mapped below them.
    unsafe { madvise(address, stretch.bytes as usize, Advice::LinuxDontNeed) }
}

/// Gives the stretch private pages, as if each had been written.
pub(super) fn populate_to_write(stretch: &Stretch) -> Result<(), Errno> {
    advise(stretch, Advice::LinuxPopulateWrite)
}

/// Maps the stretch's pages, as if each had been read.
pub(super) fn populate_to_read(stretch: &Stretch) -> Result<(), Errno> {
    advise(stretch, Advice::LinuxPopulateRead)
}

/// Has a page fault in the stretch read no page beside its own.
pub(super) fn read_no_further(stretch: &Stretch) -> Result<(), Errno> {
    advise(stretch, Advice::Random)
}

/// For advice that leaves what the pages hold.
fn advise(stretch: &Stretch, advice: Advice) -> Result<(), Errno> {
    let address = stretch.host_address as *mut _;
    // SAFETY: as above; what the pages hold does not change.
    unsafe { madvise(address, stretch.bytes as usize, advice) }
}

/// Says of each page of the stretch whether it is in memory: private, or in the
/// page cache of its file (mincore(2)).
pub(super) fn resident(stretch: &Stretch) -> io::Result<Vec<bool>> {
    let pages = stretch.bytes.div_ceil(PAGE_BYTES) as usize;
    let mut states = vec![0u8; pages];
    // SAFETY: the kernel writes a byte for each page of the range, which `states`
    // has; it reads and changes nothing of the range.
    let done = unsafe {
        libc::mincore(
            stretch.host_address as *mut _,
            stretch.bytes as usize,
            states.as_mut_ptr(),
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(states.into_iter().map(|state| state & 1 == 1).collect())
}

/// Writes stretches one behind the other to `file` from `offset` on, in as few
/// calls as there can be: through `Write` each would be one.
pub(super) fn write(stretches: &[Stretch], file: &File, mut offset: u64) -> io::Result<()> {
    let mut slices: Vec<libc::iovec> = stretches
        .iter()
        .map(|stretch| libc::iovec {
            iov_base: stretch.host_address as *mut _,
            iov_len: stretch.bytes as usize,
        })
        .collect();
    let mut left = slices.as_mut_slice();
    while !left.is_empty() {
        let batch = left.len().min(MAX_SLICES);
        // SAFETY: the kernel only reads what the slices name, which is mapped as
        // above; a guest that wrote meanwhile would spoil its own snapshot alone.
        let written = unsafe {
            libc::pwritev(
                file.as_raw_fd(),
                left.as_ptr(),
                batch as libc::c_int,
                offset as libc::off_t,
            )
        };
        match usize::try_from(written) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                offset += written as u64;
                left = after(left, written);
            }
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

/// What is left to write once `written` bytes are.
fn after(slices: &mut [libc::iovec], mut written: usize) -> &mut [libc::iovec] {
    let mut done = 0;
    for slice in slices.iter_mut() {
        if written < slice.iov_len {
            slice.iov_base = slice.iov_base.wrapping_byte_add(written);
            slice.iov_len -= written;
            break;
        }
        written -= slice.iov_len;
        done += 1;
    }
    &mut slices[done..]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(base: usize, len: usize) -> libc::iovec {
        libc::iovec {
            iov_base: base as *mut _,
            iov_len: len,
        }
    }

    #[test]
    fn a_short_write_goes_on_where_it_ended() {
        let left = |written| {
            let mut slices = [slice(100, 10), slice(200, 20)];
            after(&mut slices, written)
                .iter()
                .map(|slice| (slice.iov_base as usize, slice.iov_len))
                .collect::<Vec<_>>()
        };
        assert_eq!(left(4), [(104, 6), (200, 20)]);
        assert_eq!(left(10), [(200, 20)]);
        assert_eq!(left(29), [(219, 1)]);
        assert_eq!(left(30), []);
    }
}
