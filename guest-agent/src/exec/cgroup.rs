//! A cgroup for each program: the only way to kill what it started however often
//! that forked and changed its session. No controller is switched on in them.
//!
//! What a program leaves running when it exits by itself is left running, and
//! keeps its cgroup; folders are removed once they are empty.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

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
