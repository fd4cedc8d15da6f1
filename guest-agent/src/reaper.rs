//! One place waits for children: those of Exec, whose status somebody awaits,
//! and the orphans that a PID 1 inherits.
//!
//! A child may end before whoever started it knows its pid. So its entry is
//! made first, with an atomic to which the kernel writes the pid before the
//! child's first instruction (CLONE_PARENT_SETTID); the reaper, which finds
//! entries by pid, can never take a child for an orphan.

use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::signal::unix::Signal;
use tokio::sync::oneshot;

use crate::sys::process::kill_group;
use crate::sys::wait::{Exit, reap_one};

/// Hands exit statuses to those who wait for them. Clones share one table.
#[derive(Clone, Default)]
pub(crate) struct Reaper {
    children: Arc<Mutex<Vec<Entry>>>,
}

struct Entry {
    pid: Arc<AtomicI32>,
    exit: oneshot::Sender<Exit>,
}

/// A process that was started and whose end will be told once.
#[derive(Debug)]
pub(crate) struct Child {
    pub(crate) pid: i32,
    pub(crate) exit: oneshot::Receiver<Exit>,
}

// === impl Reaper ===

impl Reaper {
    /// Makes an entry, then has `start` start a process whose pid it stores,
    /// at the latest when the process begins, in the atomic it is given.
    pub(crate) fn start<E>(
        &self,
        start: impl FnOnce(&AtomicI32) -> Result<(), E>,
    ) -> Result<Child, E> {
        let pid = Arc::new(AtomicI32::new(0));
        let (sender, exit) = oneshot::channel();
        self.lock().push(Entry {
            pid: Arc::clone(&pid),
            exit: sender,
        });

        match start(&pid) {
            Ok(()) => Ok(Child {
                pid: pid.load(Ordering::Acquire),
                exit,
            }),
            Err(error) => {
                // What is left of a child that failed is reaped as an orphan.
                self.lock().retain(|entry| !Arc::ptr_eq(&entry.pid, &pid));
                Err(error)
            }
        }
    }

    /// Signals the group that `pid` leads, unless it has been reaped: the number
    /// may then be another's.
    pub(crate) fn signal_group(&self, pid: i32, signal: i32) {
        let children = self.lock();
        if children.iter().any(|entry| entry.is(pid)) {
            kill_group(pid, signal);
        }
    }

    /// Reaps for ever. `sigchld` must be older than the first child.
    pub(crate) async fn run(self, mut sigchld: Signal) {
        loop {
            self.reap();
            sigchld.recv().await;
        }
    }

    /// Waits under the lock, so that [`Self::signal_group`] never meets a number
    /// that was reaped but is still in the table.
    fn reap(&self) {
        let mut children = self.lock();
        while let Some((pid, exit)) = reap_one() {
            if let Some(index) = children.iter().position(|entry| entry.is(pid)) {
                // Nobody may be listening any more.
                let _ = children.swap_remove(index).exit.send(exit);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.children.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Entry ===

impl Entry {
    fn is(&self, pid: i32) -> bool {
        self.pid.load(Ordering::Acquire) == pid
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Duration;

    use tokio::signal::unix::{SignalKind, signal};

    use super::*;
    use crate::sys::wait::ExitStatus;

    // One test, because a reaper takes every child of its process; that is also
    // what waits for those started here.
    #[tokio::test]
    #[allow(clippy::zombie_processes)]
    async fn tells_every_end_once_and_to_the_right_one() {
        let reaper = Reaper::default();
        let sigchld = signal(SignalKind::child()).unwrap();
        tokio::spawn(reaper.clone().run(sigchld));

        // Reaped before `start` returns: the reaper runs while the starter sleeps.
        let starter = reaper.clone();
        let child = tokio::task::spawn_blocking(move || {
            starter.start(|pid| {
                let mut command = Command::new("/bin/sh");
                let child = command.args(["-c", "read _; exit 7"]);
                let mut child = child.stdin(std::process::Stdio::piped()).spawn().unwrap();
                pid.store(child.id().cast_signed(), Ordering::Release);
                drop(child.stdin.take());
                while starter
                    .lock()
                    .iter()
                    .any(|entry| entry.is(child.id().cast_signed()))
                {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Ok::<_, std::convert::Infallible>(())
            })
        });
        let child = child.await.unwrap().unwrap();
        assert_eq!(child.exit.await.unwrap().status, ExitStatus::Code(7));
        // Its number is nobody's: no signal may be sent to it.
        reaper.signal_group(child.pid, libc::SIGKILL);

        // A start that fails leaves no entry, and its remains are reaped.
        let failed = reaper.start(|pid| {
            let child = Command::new("/bin/true").spawn().unwrap();
            pid.store(child.id().cast_signed(), Ordering::Release);
            Err(child.id())
        });
        let remains = format!("/proc/{}", failed.unwrap_err());
        while std::path::Path::new(&remains).exists() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(reaper.lock().is_empty());

        // Many at once, each with its own status.
        let children: Vec<_> = (0..100_u8)
            .map(|code| {
                let start = |pid: &AtomicI32| {
                    let child = Command::new("/bin/sh")
                        .args(["-c", &format!("exit {code}")])
                        .spawn()?;
                    pid.store(child.id().cast_signed(), Ordering::Release);
                    Ok::<_, std::io::Error>(())
                };
                (code, reaper.start(start).unwrap())
            })
            .collect();
        for (code, child) in children {
            let exit = child.exit.await.unwrap();
            assert_eq!(exit.status, ExitStatus::Code(code.into()));
        }
    }
}
