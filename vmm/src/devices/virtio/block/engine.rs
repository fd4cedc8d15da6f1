//! Runs pieces of I/O on an io_uring of the disk's own. All of the device's
//! `unsafe` is in this file: a ring gives the kernel raw addresses to read and
//! write after the call that passed them has returned, which no safe interface
//! of the io-uring crate can express.
//!
//! What makes it sound: a piece's buffers live in its slot until its completion
//! has been taken off the ring, and the ring is drained before the slots go.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use io_uring::register::Restriction;
use io_uring::squeue::Flags;
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, opcode, squeue};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use vm_memory::{GuestMemoryBackend, GuestMemoryError};

use super::FROZEN_LAYERS_MAX;
use super::request::Segment;
use crate::memory::GuestMemory;

/// Pieces that can be under way at a time. The submission queue has as many
/// entries and the completion queue twice as many, so neither overflows.
const RING_ENTRIES: u32 = 128;

/// Kernel threads that may work for the ring: I/O that would block runs on
/// them, and the kernel's default is four for each CPU.
const WORKERS_MAX: u32 = 4;

/// Files that a ring has room for: the base, the frozen layers and the top; and
/// the two that a freeze adds before it takes others away.
const FILES_MAX: usize = 1 + FROZEN_LAYERS_MAX + 1 + 2;

/// `IORING_REGISTER_FILES_UPDATE` of linux/io_uring.h, with which a file of the
/// ring's table is replaced. Nothing else may be registered with a ring at work.
pub(crate) const REGISTER_FILES_UPDATE: u8 = 6;

/// How often a piece is tried again when the kernel asks for it.
const ATTEMPTS_MAX: u8 = 16;

/// A file of a ring, by its place in the ring's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Target(u32);

/// What the kernel is to do.
#[derive(Debug)]
pub(super) enum Piece {
    Read {
        target: Target,
        offset: u64,
        buffers: Buffers,
    },
    Write {
        target: Target,
        offset: u64,
        buffers: Buffers,
    },
    /// fdatasync(2).
    Sync { target: Target },
    /// Makes the range read as zeros and frees its space.
    PunchHole {
        target: Target,
        offset: u64,
        bytes: u64,
    },
}

/// Memory that the kernel reads or writes, and what keeps it alive.
pub(super) struct Buffers {
    iovecs: Vec<libc::iovec>,
    /// The first of the vectors that is not done.
    next: usize,
    bytes: u64,
    _memory: Memory,
}

#[expect(dead_code, reason = "held for its lifetime only")]
enum Memory {
    Guest(Arc<GuestMemory>),
    Host(Vec<u8>),
}

/// An io_uring on the files of one disk. `T` says whose a piece is.
pub(super) struct Engine<T> {
    ring: IoUring,
    /// Readable when pieces have completed, or [`Engine::wake`] was called.
    event: OwnedFd,
    slots: Vec<Option<Slot<T>>>,
    free: Vec<u32>,
    /// Which places of the ring's table of files are taken, a bit each.
    files: u32,
}

struct Slot<T> {
    owner: T,
    piece: Piece,
    attempts: u8,
}

#[derive(Debug)]
pub(super) enum SetupError {
    /// The kernel has no io_uring or does not let this process use it.
    Unavailable(io::Error),
    Failed(io::Error),
}

// === impl Engine ===

impl<T: Copy> Engine<T> {
    /// Makes a ring that can do nothing but what [`Piece`] names, and only on
    /// registered files, of which there are none yet. The restriction matters because
    /// io_uring bypasses seccomp. That files may be added later is no way around
    /// it: they are descriptors that the process has anyway, and seccomp lets it
    /// do the same four things with any of them.
    ///
    /// The order is the kernel's: restrictions are accepted only while the ring
    /// is disabled.
    pub(super) fn new() -> Result<Self, SetupError> {
        // All places at once, for a table cannot grow. -1 leaves one empty.
        let table = [-1; FILES_MAX];
        let ring = IoUring::builder()
            .setup_r_disabled()
            .build(RING_ENTRIES)
            .map_err(|error| match error.raw_os_error() {
                // EINVAL: a kernel before 5.10 does not know disabled rings.
                Some(libc::ENOSYS | libc::EPERM | libc::EACCES | libc::EINVAL) => {
                    SetupError::Unavailable(error)
                }
                _ => SetupError::Failed(error),
            })?;
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        let event = eventfd(0, flags).map_err(|errno| SetupError::Failed(errno.into()))?;
        let submitter = ring.submitter();
        submitter
            .register_files(&table)
            .and_then(|()| submitter.register_eventfd(event.as_raw_fd()))
            .and_then(|()| submitter.register_iowq_max_workers(&mut [WORKERS_MAX, WORKERS_MAX]))
            .and_then(|()| {
                submitter.register_restrictions(&mut [
                    Restriction::sqe_op(opcode::Readv::CODE),
                    Restriction::sqe_op(opcode::Writev::CODE),
                    Restriction::sqe_op(opcode::Fsync::CODE),
                    Restriction::sqe_op(opcode::Fallocate::CODE),
                    Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()),
                    Restriction::register_op(REGISTER_FILES_UPDATE),
                ])
            })
            .and_then(|()| submitter.register_enable_rings())
            .map_err(SetupError::Failed)?;
        Ok(Self {
            ring,
            event,
            slots: (0..RING_ENTRIES).map(|_| None).collect(),
            free: (0..RING_ENTRIES).rev().collect(),
            files: 0,
        })
    }

    /// Adds the first files; their targets are [`Target::nth`] in their order.
    pub(super) fn add_first_files(&mut self, files: &[RawFd]) -> io::Result<()> {
        if files.len() > FILES_MAX {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        self.ring.submitter().register_files_update(0, files)?;
        self.files = (1 << files.len()) - 1;
        Ok(())
    }

    /// Adds a file that stays open until [`Engine::remove_file`].
    pub(super) fn add_file(&mut self, file: &File) -> io::Result<Target> {
        let place = self.files.trailing_ones();
        if place as usize >= FILES_MAX {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        self.ring
            .submitter()
            .register_files_update(place, &[file.as_raw_fd()])?;
        self.files |= 1 << place;
        Ok(Target(place))
    }

    /// Gives up a file, which no piece may name any more.
    pub(super) fn remove_file(&mut self, target: Target) {
        // It fails if the kernel is short of memory. The ring then holds on to
        // the file until another takes its place, and nothing is done with it.
        let _ = self.ring.submitter().register_files_update(target.0, &[-1]);
        self.files &= !(1 << target.0);
    }

    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    pub(super) fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Queues a piece; [`Engine::submit`] starts it. Requires room.
    pub(super) fn push(&mut self, owner: T, piece: Piece) {
        let index = self.free.pop().expect("the caller has checked for room");
        self.slots[index as usize] = Some(Slot {
            owner,
            piece,
            attempts: 0,
        });
        self.queue(index);
    }

    /// Writes the submission entry for a slot.
    fn queue(&mut self, index: u32) {
        let slot = self.slots[index as usize]
            .as_ref()
            .expect("the slot is taken");
        let entry = slot.piece.entry().user_data(u64::from(index));
        // SAFETY: the entry names memory only through the slot's `Buffers`, which
        // own their iovecs and keep what those point to mapped. The slot is
        // emptied in one place, `complete`, after the kernel's completion for
        // this index; and `Drop` waits for all completions before it lets the
        // slots go. Moving a slot moves none of the memory that its entry names.
        // There is no safe way: the crate cannot know how long memory lives.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        // As many entries as slots, and a slot has one entry at most.
        pushed.expect("the submission queue has an entry for each slot");
    }

    /// Hands what was queued to the kernel.
    pub(super) fn submit(&mut self) {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(1..) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // EAGAIN and EBUSY, the kernel is short of memory: what was not
                // taken stays queued for the event loop's next turn.
                Ok(0) | Err(_) => return self.wake(),
            }
        }
    }

    /// Takes finished pieces off the ring. Those that the kernel did in part are
    /// queued again, and need another [`Engine::submit`].
    pub(super) fn reap(&mut self, mut done: impl FnMut(T, Result<(), Errno>)) {
        loop {
            let Some(entry) = self.ring.completion().next() else {
                return;
            };
            // The value is one that `queue` chose, and below 2^32.
            if let Some((owner, result)) = self.complete(entry.user_data() as u32, entry.result()) {
                done(owner, result);
            }
        }
    }

    /// Takes in one completion; None if the piece has to go on.
    fn complete(&mut self, index: u32, result: i32) -> Option<(T, Result<(), Errno>)> {
        let slot = self.slots[index as usize]
            .as_mut()
            .expect("a completion names a taken slot");
        let result = match u64::try_from(result) {
            Ok(bytes) => slot.piece.advance(bytes),
            Err(_) => Err(Errno::from_raw_os_error(-result)),
        };
        let finished = match result {
            Ok(finished) => finished.then_some(Ok(())),
            Err(Errno::INTR | Errno::AGAIN) if slot.attempts < ATTEMPTS_MAX => {
                slot.attempts += 1;
                None
            }
            Err(errno) => Some(Err(errno)),
        };
        let Some(result) = finished else {
            self.queue(index);
            return None;
        };
        let slot = self.slots[index as usize].take()?;
        self.free.push(index);
        Some((slot.owner, result))
    }

    /// Waits until nothing is under way.
    pub(super) fn drain(&mut self, mut done: impl FnMut(T, Result<(), Errno>)) {
        while !self.is_idle() {
            if let Err(error) = self.ring.submit_and_wait(1) {
                match error.raw_os_error() {
                    // EBUSY: completions must be taken off first, as happens next.
                    Some(libc::EINTR | libc::EAGAIN | libc::EBUSY) => {}
                    // The kernel may still write to memory that we can neither
                    // keep nor give back.
                    _ => {
                        eprintln!("soulbox-vmm: waiting for disk I/O failed: {error}");
                        std::process::abort();
                    }
                }
            }
            self.reap(&mut done);
        }
    }

    /// Makes the event readable, so that the event loop comes back.
    pub(super) fn wake(&self) {
        // It fails only when the counter is full, and then it is readable.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// Makes the event unreadable.
    pub(super) fn acknowledge(&self) {
        // EAGAIN: it was unreadable already.
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
    }
}

impl<T> AsFd for Engine<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl<T> Drop for Engine<T> {
    fn drop(&mut self) {
        // `drain` for any `T`: the slots hold memory that the kernel may use.
        let mut busy = self.slots.len() - self.free.len();
        while busy > 0 {
            let waited = self.ring.submit_and_wait(1);
            busy -= self.ring.completion().count();
            match waited {
                Ok(_) => {}
                Err(error)
                    if matches!(
                        error.raw_os_error(),
                        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
                    ) => {}
                Err(_) => std::process::abort(),
            }
        }
    }
}

// === impl Piece ===

impl Piece {
    fn entry(&self) -> squeue::Entry {
        match self {
            Self::Read {
                target,
                offset,
                buffers,
            } => {
                let (iovecs, count) = buffers.rest();
                opcode::Readv::new(target.fixed(), iovecs, count)
                    .offset(*offset)
                    .build()
            }
            Self::Write {
                target,
                offset,
                buffers,
            } => {
                let (iovecs, count) = buffers.rest();
                opcode::Writev::new(target.fixed(), iovecs, count)
                    .offset(*offset)
                    .build()
            }
            Self::Sync { target } => opcode::Fsync::new(target.fixed())
                .flags(FsyncFlags::DATASYNC)
                .build(),
            Self::PunchHole {
                target,
                offset,
                bytes,
            } => {
                let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                opcode::Fallocate::new(target.fixed(), *bytes)
                    .offset(*offset)
                    .mode(mode.bits().cast_signed())
                    .build()
            }
        }
    }

    /// The kernel has done so many bytes more. Whether that was all.
    fn advance(&mut self, bytes: u64) -> Result<bool, Errno> {
        match self {
            // The file ends before its data does: someone has cut it.
            Self::Read { .. } | Self::Write { .. } if bytes == 0 => Err(Errno::IO),
            Self::Read {
                offset, buffers, ..
            }
            | Self::Write {
                offset, buffers, ..
            } => {
                *offset += bytes;
                buffers.advance(bytes);
                Ok(buffers.bytes == 0)
            }
            Self::Sync { .. } | Self::PunchHole { .. } => Ok(true),
        }
    }
}

impl Target {
    /// The target of a file by its place in [`Engine::add_first_files`].
    pub(super) fn nth(place: usize) -> Self {
        Self(place as u32)
    }

    fn fixed(self) -> Fixed {
        Fixed(self.0)
    }
}

// === impl Buffers ===

impl Buffers {
    /// Buffers in guest memory. Fails if they are not all in it.
    pub(super) fn guest(
        memory: &Arc<GuestMemory>,
        segments: &[Segment],
    ) -> Result<Self, GuestMemoryError> {
        let mut iovecs = Vec::with_capacity(segments.len());
        for segment in segments {
            for slice in memory.get_slices(segment.address, segment.len) {
                let slice = slice?;
                iovecs.push(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
        }
        Ok(Self::new(iovecs, Memory::Guest(Arc::clone(memory))))
    }

    /// Bytes of our own, to be written to a file.
    pub(super) fn host(mut bytes: Vec<u8>) -> Self {
        let iovec = libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        };
        Self::new(vec![iovec], Memory::Host(bytes))
    }

    fn new(iovecs: Vec<libc::iovec>, memory: Memory) -> Self {
        Self {
            bytes: iovecs.iter().map(|iovec| iovec.iov_len as u64).sum(),
            iovecs,
            next: 0,
            _memory: memory,
        }
    }

    /// The vectors that are not done: their address and their number.
    fn rest(&self) -> (*const libc::iovec, u32) {
        let rest = &self.iovecs[self.next..];
        (rest.as_ptr(), rest.len() as u32)
    }

    fn advance(&mut self, bytes: u64) {
        let mut left = usize::try_from(bytes.min(self.bytes)).unwrap_or(usize::MAX);
        self.bytes -= left as u64;
        while left > 0 {
            let iovec = &mut self.iovecs[self.next];
            let step = left.min(iovec.iov_len);
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(step);
            iovec.iov_len -= step;
            left -= step;
            if iovec.iov_len == 0 {
                self.next += 1;
            }
        }
    }
}

impl std::fmt::Debug for Buffers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.bytes)
    }
}

// SAFETY: the pointers in `iovecs` are to memory that `_memory` owns a share of:
// guest memory, which any thread may use and which the guest changes at any time
// anyway, or bytes that nothing else points to. We only ever compute with the
// pointers and pass them to the kernel; they are dereferenced there. A `Vec` of
// raw pointers is not `Send` by itself, and the device moves between threads.
unsafe impl Send for Buffers {}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::{Bytes, GuestAddress};

    const BASE: Target = Target(0);

    /// A read-only file of `bytes` and a writable empty one.
    fn files(bytes: usize) -> (File, File) {
        let mut base = tempfile::NamedTempFile::new().unwrap();
        base.write_all(&vec![0x42; bytes]).unwrap();
        (
            File::open(base.path()).unwrap(),
            tempfile::tempfile().unwrap(),
        )
    }

    fn engine(bytes: usize) -> Engine<u32> {
        let (base, layer) = files(bytes);
        // The ring holds on to the files by itself.
        let mut engine = Engine::new().unwrap();
        let files = [base.as_raw_fd(), layer.as_raw_fd()];
        engine.add_first_files(&files).unwrap();
        engine
    }

    fn memory() -> Arc<GuestMemory> {
        Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap())
    }

    fn read(memory: &Arc<GuestMemory>, offset: u64, len: usize) -> Piece {
        let segment = Segment {
            address: GuestAddress(0x1000),
            len,
        };
        Piece::Read {
            target: BASE,
            offset,
            buffers: Buffers::guest(memory, &[segment]).unwrap(),
        }
    }

    fn results(engine: &mut Engine<u32>) -> Vec<(u32, Result<(), Errno>)> {
        let mut results = Vec::new();
        engine.drain(|owner, result| results.push((owner, result)));
        results
    }

    #[test]
    fn the_ring_does_nothing_but_disk_io_on_its_files() {
        let mut engine = engine(4096);
        let entries = [
            opcode::Nop::new().build(),
            opcode::OpenAt::new(io_uring::types::Fd(0), c"/".as_ptr()).build(),
            opcode::Close::new(Fixed(0)).build(),
            opcode::Readv::new(io_uring::types::Fd(0), std::ptr::null(), 0).build(),
            opcode::Fsync::new(Fixed(1))
                .build()
                .flags(Flags::ASYNC | Flags::FIXED_FILE),
        ];
        for entry in entries {
            // SAFETY: the entry names no memory that the kernel would write, and
            // what it reads is static. The device's own path never builds such
            // an entry, so there is no safe way to.
            unsafe { engine.ring.submission().push(&entry) }.unwrap();
            engine.ring.submit_and_wait(1).unwrap();
            let completion = engine.ring.completion().next().unwrap();
            assert_eq!(completion.result(), -libc::EACCES, "{entry:?}");
        }
        let submitter = engine.ring.submitter();
        assert!(submitter.register_eventfd_async(0).is_err());
        assert!(submitter.unregister_files().is_err());
        assert!(submitter.unregister_eventfd().is_err());
    }

    #[test]
    fn files_come_and_go_while_the_ring_works() {
        let mut engine = engine(4096);
        let memory = memory();
        let written = tempfile::tempfile().unwrap();
        written.set_len(4096).unwrap();
        let read_of = |target| {
            let Piece::Read {
                offset, buffers, ..
            } = read(&memory, 0, 4096)
            else {
                unreachable!("the piece is a read");
            };
            Piece::Read {
                target,
                offset,
                buffers,
            }
        };
        let mut added = Vec::new();
        while let Ok(target) = engine.add_file(&written) {
            engine.push(target.0, read_of(target));
            added.push(target);
        }
        assert_eq!(added.len(), FILES_MAX - 2);
        assert!(
            results(&mut engine)
                .iter()
                .all(|(_, result)| result.is_ok())
        );
        engine.remove_file(added[3]);
        engine.push(0, read_of(added[3]));
        assert_eq!(results(&mut engine), [(0, Err(Errno::BADF))]);
        assert_eq!(engine.add_file(&written).unwrap(), added[3]);
        engine.push(0, read_of(added[3]));
        assert_eq!(results(&mut engine), [(0, Ok(()))]);
        let mut empty = Engine::<()>::new().unwrap();
        assert!(empty.add_first_files(&[0; FILES_MAX + 1]).is_err());
    }

    #[test]
    fn the_base_cannot_be_written() {
        let mut engine = engine(4096);
        engine.push(
            1,
            Piece::Write {
                target: BASE,
                offset: 0,
                buffers: Buffers::host(vec![1; 512]),
            },
        );
        assert_eq!(results(&mut engine), [(1, Err(Errno::BADF))]);
    }

    #[test]
    fn a_read_past_the_end_is_an_error_and_one_in_parts_goes_on() {
        let mut engine = engine(8192);
        let memory = memory();
        engine.push(1, read(&memory, 4096, 8192));
        assert_eq!(results(&mut engine), [(1, Err(Errno::IO))]);
        engine.push(2, read(&memory, 0, 8192));
        assert_eq!(results(&mut engine), [(2, Ok(()))]);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x2fff)).unwrap(), 0x42);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x3000)).unwrap(), 0);
    }

    #[test]
    fn a_partial_transfer_advances_across_vectors() {
        let memory = memory();
        let segments = [(0x1000, 10), (0x3000, 20)].map(|(address, len)| Segment {
            address: GuestAddress(address),
            len,
        });
        let mut piece = Piece::Read {
            target: BASE,
            offset: 100,
            buffers: Buffers::guest(&memory, &segments).unwrap(),
        };
        assert_eq!(piece.advance(15), Ok(false));
        let Piece::Read {
            offset, buffers, ..
        } = &piece
        else {
            unreachable!("the piece is a read");
        };
        assert_eq!(*offset, 115);
        let rest = &buffers.iovecs[buffers.next..];
        let expected = memory.get_slice(GuestAddress(0x3005), 15).unwrap();
        assert_eq!(
            rest[0].iov_base.cast_const().cast(),
            expected.ptr_guard().as_ptr()
        );
        assert_eq!((rest.len(), rest[0].iov_len), (1, 15));
        assert_eq!(piece.advance(15), Ok(true));
    }

    #[test]
    fn buffers_outside_guest_memory_are_refused() {
        for (address, len) in [(1 << 20, 1), ((1 << 20) - 1, 2), (u64::MAX, 2)] {
            let segment = Segment {
                address: GuestAddress(address),
                len,
            };
            assert!(Buffers::guest(&memory(), &[segment]).is_err());
        }
    }

    /// Dropped with pieces queued and under way, the engine waits for them.
    #[test]
    fn dropping_the_engine_waits() {
        let memory = memory();
        let mut engine = engine(1 << 20);
        while engine.has_room() {
            engine.push(0, read(&memory, 0, 1 << 19));
            if engine.free.len() == 64 {
                engine.submit();
            }
        }
        drop(engine);
        assert_eq!(Arc::strong_count(&memory), 1);
    }
}
