//! Buffers in guest memory, as readv(2) and writev(2) take them.
//!
//! `unsafe` is in this file: raw addresses go to the kernel. vm-memory reads and
//! writes one slice at a time, which would be a system call for each buffer.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;
use virtio_queue::DescriptorChain;
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileSlice};

use crate::memory::GuestMemory;

/// The most buffers in one system call (UIO_MAXIOV), less the one that
/// [`Iovecs::read_from`] adds.
pub(super) const IOVECS_MAX: usize = 1023;

/// A list of buffers, used from the front and filled at the back. It never
/// grows: used ones make room when the end is reached.
pub(super) struct Iovecs {
    /// Keeps what `list` points to mapped.
    memory: GuestMemory,
    list: Vec<libc::iovec>,
    /// Those before it are used.
    start: usize,
}

/// Why a chain's buffers were not appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BadChain {
    /// A buffer is outside memory or of the wrong direction, or the chain has no
    /// end.
    Malformed,
    /// There are more buffers than there is room for.
    TooMany,
}

// === impl Iovecs ===

impl Iovecs {
    pub(super) fn new(memory: GuestMemory) -> Self {
        Self {
            memory,
            // Twice the most, so that making room is rare, and one to spare.
            list: Vec::with_capacity(2 * IOVECS_MAX + 1),
            start: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.list.len() - self.start
    }

    /// Gives up all but the first `count` buffers.
    pub(super) fn truncate(&mut self, count: usize) {
        self.list.truncate(self.start + count);
    }

    /// Gives up the first `count` buffers.
    pub(super) fn drop_front(&mut self, count: usize) {
        self.start = (self.start + count).min(self.list.len());
    }

    /// Appends the buffers of a chain, all of which must be for the device to
    /// write, or none. Returns their bytes. On an error nothing is appended.
    pub(super) fn push_chain(
        &mut self,
        chain: DescriptorChain<&GuestMemory>,
        writable: bool,
    ) -> Result<usize, BadChain> {
        let before = self.len();
        let pushed = self.push_buffers(chain, writable);
        if pushed.is_err() {
            self.truncate(before);
        }
        pushed
    }

    fn push_buffers(
        &mut self,
        chain: DescriptorChain<&GuestMemory>,
        writable: bool,
    ) -> Result<usize, BadChain> {
        let mut bytes = 0;
        let mut complete = false;
        for (count, descriptor) in chain.enumerate() {
            // An indirect table may have 65,535 empty buffers.
            if count == IOVECS_MAX {
                return Err(BadChain::TooMany);
            }
            complete = !descriptor.has_next();
            if descriptor.is_write_only() != writable {
                return Err(BadChain::Malformed);
            }
            // At most 2^32 in a chain, which DescriptorChain sees to.
            let len = descriptor.len() as usize;
            bytes += len;
            if len > 0 {
                self.push(descriptor.addr(), len)?;
            }
        }
        // A chain that ends at a descriptor with a successor loops, or leads out
        // of its table.
        if complete {
            Ok(bytes)
        } else {
            Err(BadChain::Malformed)
        }
    }

    fn push(&mut self, address: GuestAddress, len: usize) -> Result<(), BadChain> {
        // More than one slice when the buffer crosses regions of memory.
        for slice in self.memory.get_slices(address, len) {
            let slice = slice.map_err(|_| BadChain::Malformed)?;
            if self.len() == IOVECS_MAX {
                return Err(BadChain::TooMany);
            }
            if self.list.len() + 1 == self.list.capacity() {
                self.list.drain(..self.start);
                self.start = 0;
            }
            self.list.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
        }
        Ok(())
    }

    /// One readv(2) into the buffers, in order, then into `rest`. Returns the
    /// bytes read.
    pub(super) fn read_from(
        &mut self,
        fd: BorrowedFd<'_>,
        rest: &mut [u8],
    ) -> Result<usize, Errno> {
        self.list.push(libc::iovec {
            iov_base: rest.as_mut_ptr().cast(),
            iov_len: rest.len(),
        });
        let iovecs = &self.list[self.start..];
        // SAFETY: the kernel writes into `rest`, which is borrowed for as long,
        // and into guest memory, which `memory` keeps mapped and which nobody
        // has a reference into: the guest changes it at any time anyway. The
        // list is as long as is said.
        let read =
            unsafe { libc::readv(fd.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int) };
        self.list.pop();
        usize::try_from(read).map_err(|_| last_errno())
    }

    /// One writev(2) of the buffers. Returns the bytes written.
    pub(super) fn write_to(&self, fd: BorrowedFd<'_>) -> Result<usize, Errno> {
        let iovecs = &self.list[self.start..];
        // SAFETY: the kernel reads guest memory, which `memory` keeps mapped.
        // The list is as long as is said.
        let written =
            unsafe { libc::writev(fd.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int) };
        usize::try_from(written).map_err(|_| last_errno())
    }

    /// Copies the first bytes of the buffers, at most as many as they have.
    pub(super) fn copy_to(&self, bytes: &mut [u8]) {
        let mut at = 0;
        for slice in self.slices() {
            at += slice.copy_to(&mut bytes[at..]);
        }
    }

    /// Writes bytes `offset` bytes into the buffers, as far as they reach.
    pub(super) fn copy_from(&self, offset: usize, bytes: &[u8]) {
        let (mut skip, mut rest) = (offset, bytes);
        for slice in self.slices() {
            let skipped = skip.min(slice.len());
            skip -= skipped;
            let Ok(slice) = slice.offset(skipped) else {
                return;
            };
            let (now, later) = rest.split_at(rest.len().min(slice.len()));
            slice.copy_from(now);
            rest = later;
            if rest.is_empty() {
                return;
            }
        }
    }

    fn slices(&self) -> impl Iterator<Item = VolatileSlice<'_>> {
        self.list[self.start..].iter().map(|iovec| {
            // SAFETY: every vector was made from a slice of guest memory of this
            // address and length, and `memory` keeps it mapped for as long as
            // the result borrows from it.
            unsafe { VolatileSlice::new(iovec.iov_base.cast(), iovec.iov_len) }
        })
    }
}

// SAFETY: the pointers in `list` are to guest memory that `memory` owns a share
// of, which any thread may use. A `Vec` of raw pointers is not `Send` by itself,
// and the device moves between threads.
unsafe impl Send for Iovecs {}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}
