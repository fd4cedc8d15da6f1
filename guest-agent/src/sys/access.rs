//! Whether a file may be written, without opening it: who watches it would be told that
//! a writer has closed it.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

/// Asks with the rights that this thread has on files. rustix has the call only with
/// the real user's.
pub(crate) fn may_write(file: BorrowedFd<'_>) -> io::Result<()> {
    let flags = libc::AT_EACCESS | libc::AT_EMPTY_PATH;
    // SAFETY: the path is a string that ends with NUL; the call only reads it.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_faccessat2,
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::W_OK,
            flags,
        )
    };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
