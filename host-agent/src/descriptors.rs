//! Descriptors: those that tokio waits for, and those that a child must not have.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers `fd` with the runtime that this is called in.
///
/// tokio has no safe way to do this for any kind of descriptor: a type's
/// `AsRawFd` may change what it returns, or close it. Its own socket types
/// would do for a control socket, but nothing would for a pidfd.
pub(crate) fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` returns one and the same descriptor for as long as it
    // lives, and keeps it open; `AsyncFd` owns it and deregisters it before it
    // is closed.
    let registered = unsafe { AsyncFd::register_with_interest(fd, interest) };
    Ok(registered?)
}

/// Marks every descriptor above standard error to close when a program is
/// started. What the daemon opens itself is so already; what it inherited, from
/// a service manager or a shell, is for it alone.
pub(crate) fn keep_descriptors_from_children() -> io::Result<()> {
    // SAFETY: with CLOSE_RANGE_CLOEXEC the call closes nothing, so no owner
    // loses its descriptor.
    let marked = unsafe { libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC.cast_signed()) };
    match marked {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
