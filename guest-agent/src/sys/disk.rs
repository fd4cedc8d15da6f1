//! Online growth of ext4.

use std::fs::File;
use std::io;

use rustix::ioctl::{Opcode, Setter, ioctl, opcode};

// Of fs/ext4/ext4.h; takes the new size in filesystem blocks.
const EXT4_IOC_RESIZE_FS: Opcode = opcode::write::<u64>(b'f', 16);

/// Grows the mounted ext4 filesystem that `mount_point` is on.
pub(crate) fn ext4_resize(mount_point: &File, blocks: u64) -> io::Result<()> {
    // SAFETY: the ioctl reads one u64, which is what `Setter` points it to.
    unsafe { ioctl(mount_point, Setter::<EXT4_IOC_RESIZE_FS, u64>::new(blocks)) }?;
    Ok(())
}
