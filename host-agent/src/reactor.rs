//! Descriptors that tokio waits for.
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
