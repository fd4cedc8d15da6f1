//! Moves bytes between a socket and guest memory with one system call.
//!
//! vm-memory's `ReadVolatile` and rustix move one slice at a time, or need
//! `&mut [u8]` into memory that the guest writes to; a Linux guest's RX buffers
//! are a page each, so that a call for each would be most of the cost.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};
use vm_memory::VolatileSlice;

/// Slices that one call takes (IOV_MAX).
const MAX_SLICES: usize = 1024;

/// Reads what the socket has, up to all of `into`, without waiting. 0 is the end
/// of the stream, if `into` is not empty.
pub(super) fn receive(socket: BorrowedFd<'_>, into: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let into = &into[..into.len().min(MAX_SLICES)];
    let guards: Vec<_> = into.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let mut slices: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast(),
            iov_len: guard.len(),
        })
        .collect();
    let mut message = message(&mut slices);
    retry_interrupted(|| {
        // SAFETY: every iovec covers guest memory that its guard keeps mapped
        // and writable until this function returns, and `message` points to the
        // iovecs, which live as long. The guest may write there at the same
        // time; no Rust reference to it exists, and the kernel copes.
        unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) }
    })
}

/// Writes what the socket has room for, up to all of `from`, without waiting and
/// without SIGPIPE.
pub(super) fn send(socket: BorrowedFd<'_>, from: &[VolatileSlice<'_>]) -> io::Result<usize> {
    let from = &from[..from.len().min(MAX_SLICES)];
    let guards: Vec<_> = from.iter().map(VolatileSlice::ptr_guard).collect();
    let mut slices: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast_mut().cast(),
            iov_len: guard.len(),
        })
        .collect();
    let message = message(&mut slices);
    retry_interrupted(|| {
        // SAFETY: as in `receive`, and sendmsg only reads from the iovecs.
        unsafe {
            libc::sendmsg(
                socket.as_raw_fd(),
                &raw const message,
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        }
    })
}

/// The device's end of a stream and the host's: blocking, close-on-exec.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

/// All that can be read from the socket, which keeps it. `None`: it is more than
/// `max_bytes`, or ends there.
pub(super) fn peek(socket: &OwnedFd, max_bytes: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; max_bytes + 1];
    let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
    let len = loop {
        match rustix::net::recv(socket, &mut bytes[..], flags) {
            Ok((0, _)) => return None,
            Ok((len, _)) => break len,
            Err(Errno::AGAIN) => break 0,
            Err(Errno::INTR) => {}
            Err(_) => return None,
        }
    };
    bytes.truncate(len);
    (len <= max_bytes).then_some(bytes)
}

fn message(slices: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: msghdr is plain C data, for which all zeros means "none of this".
    // It has private padding on some targets, so it cannot be written out.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = slices.as_mut_ptr();
    message.msg_iovlen = slices.len();
    message
}

fn retry_interrupted(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        let done = call();
        if let Ok(done) = usize::try_from(done) {
            return Ok(done);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
