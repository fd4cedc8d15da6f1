//! A cgroup for each program: the only way to kill what it started however often
//! that forked and changed its session. No controller is switched on in them.
//!
//! What a program leaves running when it exits by itself is left running, and
//! keeps its cgroup; folders are removed once they are empty.
//!
//! The folder above them stops and goes on with all of them at once: the cgroup v2
//! freezer, under "cgroup.freeze" in the kernel's admin-guide/cgroup-v2.rst. What
//! it stops hears no signal but SIGKILL. What root in the guest moves out of the
//! folder is neither killed nor stopped.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use tokio::task::yield_now;
use tokio::time::timeout;

/// How long programs have to stop. One that runs takes microseconds; one that
/// waits for a disk, as long as the disk.
const FREEZE_PATIENCE: Duration = Duration::from_secs(5);
/// The kernel tells of a change at once, but of the next not before 10 ms.
const FREEZE_POLL: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 1_000_000,
};

/// Makes cgroups below one folder of a cgroup2 filesystem.
pub(crate) struct Cgroups {
    parent: PathBuf,
    next: AtomicU64,
    /// Folders that still held a process when they were last looked at.
    leftovers: Mutex<Vec<PathBuf>>,
}

/// One program's cgroup. Dropping it does not kill; it removes the folder, or
/// leaves it for later where processes are still in it.
pub(crate) struct Cgroup {
    path: PathBuf,
    folder: File,
    cgroups: Arc<Cgroups>,
}

// === impl Cgroups ===

impl Cgroups {
    /// Makes the folder `parent`, in which there must be nothing yet.
    pub(crate) fn below(parent: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&parent)?;
        // Also proves that this is cgroup2, of a kernel with cgroup.kill (5.14).
        fs::metadata(parent.join("cgroup.kill"))?;
        Ok(Self {
            parent,
            next: AtomicU64::new(1),
            leftovers: Mutex::default(),
        })
    }

    pub(crate) fn make(self: &Arc<Self>) -> io::Result<Cgroup> {
        self.sweep(None);
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let path = self.parent.join(number.to_string());
        // With its parent, which root in the guest may have removed.
        fs::create_dir_all(&path)?;
        let folder = File::open(&path)?;
        Ok(Cgroup {
            path,
            folder,
            cgroups: Arc::clone(self),
        })
    }

    /// Stops every process in all of them, those that are being forked, and those
    /// that are born into one later; all of it stays until [`Self::thaw`], also when
    /// it fails. Returns when all have stopped, or have not in their time (TimedOut).
    pub(crate) async fn freeze(&self) -> io::Result<()> {
        // As for `make`: root in the guest may have removed it.
        fs::create_dir_all(&self.parent)?;
        // First, for it proves that this is still a cgroup.
        let events = File::open(self.parent.join("cgroup.events"))?;
        fs::write(self.parent.join("cgroup.freeze"), "1")?;
        timeout(FREEZE_PATIENCE, wait_until_frozen(&events))
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    /// Lets every process go on. Nothing is to be done where none was stopped.
    pub(crate) fn thaw(&self) -> io::Result<()> {
        match fs::write(self.parent.join("cgroup.freeze"), "0") {
            // Only an empty folder can be removed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            thawed => thawed,
        }
    }

    /// Removes what has become empty.
    fn sweep(&self, more: Option<PathBuf>) {
        let mut leftovers = self
            .leftovers
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        leftovers.extend(more);
        leftovers.retain(|path| match fs::remove_dir(path) {
            Ok(()) => false,
            Err(error) => error.kind() == io::ErrorKind::ResourceBusy,
        });
    }
}

// === impl Cgroup ===

impl Cgroup {
    /// For CLONE_INTO_CGROUP.
    pub(crate) fn folder(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }

    /// SIGKILLs every process in it, and those that are being forked.
    pub(crate) fn kill(&self) -> io::Result<()> {
        fs::write(self.path.join("cgroup.kill"), "1")
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        self.cgroups.sweep(Some(std::mem::take(&mut self.path)));
    }
}

/// Blocks, but for no longer than a poll at a time: what else the agent does goes
/// on between, and a wait of its runtime takes a millisecond at least.
async fn wait_until_frozen(events: &File) -> io::Result<()> {
    let mut text = [0; 128];
    loop {
        let length = events.read_at(&mut text, 0)?;
        if is_frozen(text.get(..length).unwrap_or_default()) {
            return Ok(());
        }
        let mut changed = [PollFd::new(events, PollFlags::PRI)];
        match poll(&mut changed, Some(&FREEZE_POLL)) {
            Ok(_) | Err(Errno::INTR) => yield_now().await,
            Err(error) => return Err(error.into()),
        }
    }
}

// cgroup.events: "populated 1\nfrozen 0\n", in any order and with others.
fn is_frozen(events: &[u8]) -> bool {
    events
        .split(|byte| *byte == b'\n')
        .any(|line| line == b"frozen 1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_writes() {
        assert!(is_frozen(b"populated 1\nfrozen 1\n"));
        assert!(is_frozen(b"frozen 1\npopulated 0\nmore 1\n"));
        assert!(!is_frozen(b"populated 1\nfrozen 0\n"));
        assert!(!is_frozen(b"populated 1\n") && !is_frozen(b""));
    }
}
