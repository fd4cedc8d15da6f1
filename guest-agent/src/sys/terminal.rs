//! What terminals take that rustix has no call for.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::ioctl::{NoArg, Opcode, ioctl};

// Of asm-generic/ioctls.h, in the old numbering.
const TIOCVHANGUP: Opcode = 0x5437;

/// Hangs up the terminal that `slave` is, as vhangup(2) does with one's own. The
/// descriptor itself is dead afterwards, too.
pub(crate) fn hang_up(slave: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the ioctl has no argument.
    unsafe { ioctl(slave, NoArg::<TIOCVHANGUP>::new()) }?;
    Ok(())
}
