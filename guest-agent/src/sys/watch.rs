//! Descriptors that the runtime watches.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Has the runtime watch `fd`, which must be in non-blocking mode. tokio's own pipes
/// are not for terminals: they take a short read for the last one.
pub(crate) fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open, and the same, until it is dropped, which is what
    // AsyncFd has to be promised.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}
