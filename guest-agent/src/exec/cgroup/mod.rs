//! A cgroup for each program: the only way to kill what it started however often
//! that forked and changed its session. Those of programs that have limits are in a
//! folder of their own, the only one with controllers; see [`limits`].
//!
//! What a program leaves running when it exits by itself is left running, and
//! keeps its cgroup; folders are removed once they are empty, or used again: making
//! one takes longer than starting a program in it.
//!
//! The folder above them stops and goes on with all of them at once: the cgroup v2
//! freezer, under "cgroup.freeze" in the kernel's admin-guide/cgroup-v2.rst. What
//! it stops hears no signal but SIGKILL. What root in the guest moves out of the
//! folder is neither killed nor stopped.

mod limits;

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::fstat;
use rustix::io::Errno;
use tokio::task::yield_now;
use tokio::time::timeout;

pub(crate) use self::limits::{Limits, LimitsError};

/// How long programs have to stop. One that runs takes microseconds; one that
/// waits for a disk, as long as the disk.
const FREEZE_PATIENCE: Duration = Duration::from_secs(5);
/// The kernel tells of a change at once, but of the next not before 10 ms.
const FREEZE_POLL: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 1_000_000,
};

/// How many folders are tried whenever a program ends. More than one, so that what a
/// crowd leaves is cleared away.
const TRIES: usize = 2;

const PLAIN: &str = "plain";
const LIMITED: &str = "limited";
const EVENTS: &str = "cgroup.events";

/// Makes cgroups below one folder of a cgroup2 filesystem.
pub(crate) struct Cgroups {
    parent: PathBuf,
    next: AtomicU64,
    left: Mutex<Left>,
}

/// What programs have left.
#[derive(Default)]
struct Left {
    /// For the next program.
    spare: Option<Folder>,
    /// With processes in them when they were last tried.
    busy: VecDeque<PathBuf>,
}

/// One program's cgroup. Dropping it does not kill; it leaves the folder to the next
/// program, or to be removed when no process is in it.
pub(crate) struct Cgroup {
    folder: Option<Folder>,
    is_used: bool,
    /// Another program may use it afterwards.
    is_fit: AtomicBool,
    cgroups: Arc<Cgroups>,
}

struct Folder {
    path: PathBuf,
    file: File,
    /// Its cgroup.events.
    events: File,
}

/// What cgroup.events says.
struct Events {
    is_populated: bool,
    is_frozen: bool,
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
            left: Mutex::default(),
        })
    }

    pub(crate) fn make(self: &Arc<Self>) -> io::Result<Cgroup> {
        let spare = self.left().spare.take();
        let is_used = spare.is_some();
        let folder = spare.map_or_else(|| self.make_folder(PLAIN), Ok)?;
        Ok(self.cgroup(folder, is_used, true))
    }

    pub(crate) fn make_limited(self: &Arc<Self>, limits: &Limits) -> Result<Cgroup, LimitsError> {
        let set = |what| move |source| LimitsError::Set { what, source };
        let parent = self.parent.join(LIMITED);
        fs::create_dir_all(&parent).map_err(set("a cgroup"))?;
        limits.enable(&parent)?;
        let folder = self.make_folder(LIMITED).map_err(set("a cgroup"))?;
        // Its limits are nobody else's.
        let cgroup = self.cgroup(folder, false, false);
        limits.set(cgroup.path())?;
        Ok(cgroup)
    }

    fn make_folder(&self, kind: &str) -> io::Result<Folder> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let path = self.parent.join(kind).join(number.to_string());
        // With its parents, which root in the guest may have removed.
        fs::create_dir_all(&path)?;
        let file = File::open(&path)?;
        let events = File::open(path.join(EVENTS))?;
        Ok(Folder { path, file, events })
    }

    fn cgroup(self: &Arc<Self>, folder: Folder, is_used: bool, is_fit: bool) -> Cgroup {
        Cgroup {
            folder: Some(folder),
            is_used,
            is_fit: is_fit.into(),
            cgroups: Arc::clone(self),
        }
    }

    /// Stops every process in all of them, those that are being forked, and those
    /// that are born into one later; all of it stays until [`Self::thaw`], also when
    /// it fails. Returns when all have stopped, or have not in their time (TimedOut).
    pub(crate) async fn freeze(&self) -> io::Result<()> {
        // As for `make`: root in the guest may have removed it.
        fs::create_dir_all(&self.parent)?;
        // First, for it proves that this is still a cgroup.
        let events = File::open(self.parent.join(EVENTS))?;
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

    fn leave(&self, folder: Folder, is_fit: bool) {
        let mut left = self.left();
        if is_fit && left.spare.is_none() && folder.is_as_new() {
            left.spare = Some(folder);
        } else {
            left.busy.push_front(folder.path);
        }
        for _ in 0..TRIES.min(left.busy.len()) {
            let Some(path) = left.busy.pop_front() else {
                return;
            };
            if let Err(error) = fs::remove_dir(&path)
                && error.kind() == io::ErrorKind::ResourceBusy
            {
                left.busy.push_back(path);
            }
        }
    }

    fn left(&self) -> MutexGuard<'_, Left> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Cgroup ===

impl Cgroup {
    /// For CLONE_INTO_CGROUP.
    pub(crate) fn folder(&self) -> BorrowedFd<'_> {
        match &self.folder {
            Some(folder) => folder.file.as_fd(),
            // Only between `drop` and the end.
            None => rustix::fs::CWD,
        }
    }

    /// Whether a program was in it before this one.
    pub(crate) fn is_used(&self) -> bool {
        self.is_used
    }

    /// Leaves it to no other program. Once a cgroup has been killed, Linux 6.18
    /// kills what is born into it later, too: it compares the number of kills with that
    /// of the cgroup of whoever clones.
    pub(crate) fn spoil(&self) {
        self.is_fit.store(false, Ordering::Relaxed);
    }

    /// Without a process that lives.
    pub(crate) fn is_empty(&self) -> bool {
        let events = self.folder.as_ref().and_then(Folder::events);
        // Only what is empty can be removed.
        events.is_none_or(|events| !events.is_populated)
    }

    /// SIGKILLs every process in it, and those that are being forked.
    pub(crate) fn kill(&self) -> io::Result<()> {
        self.spoil();
        fs::write(self.path().join("cgroup.kill"), "1")
    }

    /// The processes in it and in those below it, which only root makes.
    pub(crate) fn processes(&self) -> Vec<i32> {
        let mut found = Vec::new();
        let mut folders = vec![self.path().to_owned()];
        while let Some(folder) = folders.pop() {
            let text = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
            found.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
            let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
            let below = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            folders.extend(below.map(|entry| entry.path()));
        }
        // 0 is a process of another PID namespace.
        found.retain(|pid| *pid > 1);
        found
    }

    fn path(&self) -> &Path {
        self.folder
            .as_ref()
            .map_or(Path::new(""), |folder| &folder.path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        if let Some(folder) = self.folder.take() {
            self.cgroups.leave(folder, *self.is_fit.get_mut());
        }
    }
}

// === impl Folder ===

impl Folder {
    /// Without processes, and without folders below it, which root may have made.
    fn is_as_new(&self) -> bool {
        let events = self.events();
        // A process that is born into what is frozen does not start.
        events.is_some_and(|events| !events.is_populated && !events.is_frozen)
            && fstat(&self.file).is_ok_and(|stat| stat.st_nlink == 2)
    }

    /// None where it has been removed.
    fn events(&self) -> Option<Events> {
        Events::read(&self.events).ok()
    }
}

// === impl Events ===

impl Events {
    fn read(file: &File) -> io::Result<Self> {
        let mut text = [0; 128];
        let length = file.read_at(&mut text, 0)?;
        Ok(Self::parse(text.get(..length).unwrap_or_default()))
    }

    // "populated 1\nfrozen 0\n", in any order and with others.
    fn parse(text: &[u8]) -> Self {
        let has = |wanted: &[u8]| text.split(|byte| *byte == b'\n').any(|line| line == wanted);
        Self {
            is_populated: !has(b"populated 0"),
            is_frozen: has(b"frozen 1"),
        }
    }
}

/// Blocks, but for no longer than a poll at a time: what else the agent does goes
/// on between, and a wait of its runtime takes a millisecond at least.
async fn wait_until_frozen(events: &File) -> io::Result<()> {
    loop {
        if Events::read(events)?.is_frozen {
            return Ok(());
        }
        let mut changed = [PollFd::new(events, PollFlags::PRI)];
        match poll(&mut changed, Some(&FREEZE_POLL)) {
            Ok(_) | Err(Errno::INTR) => yield_now().await,
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_writes() {
        let is_frozen = |events| Events::parse(events).is_frozen;
        assert!(is_frozen(b"populated 1\nfrozen 1\n"));
        assert!(is_frozen(b"frozen 1\npopulated 0\nmore 1\n"));
        assert!(!is_frozen(b"populated 1\nfrozen 0\n"));
        assert!(!is_frozen(b"populated 1\n") && !is_frozen(b""));
        let is_populated = |events| Events::parse(events).is_populated;
        assert!(is_populated(b"populated 1\nfrozen 0\n") && is_populated(b""));
        assert!(!is_populated(b"frozen 0\npopulated 0\n"));
    }
}
