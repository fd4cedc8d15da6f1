//! A host of the bench's own, so that this machine's network stays as it is.

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::thread::UnshareFlags;

/// Moves this process into a new network namespace without any link, where
/// namespaces that get a name are named for it alone. Only threads that are started
/// afterwards come along.
#[allow(unsafe_code)]
pub(super) fn enter() -> Result<()> {
    // SAFETY: `unshare` is unsafe for CLONE_FILES, with which two threads could
    // disagree about who owns a descriptor; it is not asked for.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWNS) }
        .context("making a network namespace; run this as root, or with CAP_SYS_ADMIN")?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).context("making mounts private")?;
    rustix::mount::mount("tmpfs", "/run", "tmpfs", MountFlags::empty(), None)
        .context("mounting /run")
}
