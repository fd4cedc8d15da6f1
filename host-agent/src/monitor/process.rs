//! Processes named by descriptor: a number may be used again by another
//! process, a pidfd may not.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::OnceLock;
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::id::SandboxId;
use crate::record::{BootId, MonitorIdentity};

/// How long a process that was killed may take to end.
const KILLED: Duration = Duration::from_secs(5);

/// What the kernel calls the monitor's process, and its binary is called.
const MONITOR_NAME: &str = "soulbox-vmm";

#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error("process {pid} is gone")]
    Gone { pid: i32 },
    #[error("process {pid} cannot be watched; see the limit on open files")]
    Watch { pid: i32, source: io::Error },
}

/// A monitor's process, started by this daemon or by the one before.
#[derive(Debug)]
pub struct MonitorProcess {
    identity: MonitorIdentity,
    pidfd: AsyncFd<OwnedFd>,
    /// None when another daemon started it: then it is not ours to reap.
    child: Option<Child>,
}

// === impl MonitorProcess ===

impl MonitorProcess {
    /// Watches a child. It is not reaped yet, so its number is still its own.
    pub(super) fn of_child(mut child: Child) -> Result<Self, ProcessError> {
        let pid = i32::try_from(child.id()).unwrap_or_default();
        let opened = start_time_ticks(pid)
            .ok_or(ProcessError::Gone { pid })
            .and_then(|start_time_ticks| Ok((start_time_ticks, open(pid)?)));
        match opened {
            Ok((start_time_ticks, pidfd)) => Ok(Self {
                identity: MonitorIdentity {
                    pid,
                    start_time_ticks,
                    boot_id: boot_id(),
                },
                pidfd,
                child: Some(child),
            }),
            Err(error) => {
                // Nobody could stop it later.
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// Finds a process again, if it is still the same one.
    pub fn find(identity: MonitorIdentity) -> Result<Self, ProcessError> {
        let pid = identity.pid;
        // A record of an older daemon names no boot.
        if identity.boot_id.is_some() && identity.boot_id != boot_id() {
            return Err(ProcessError::Gone { pid });
        }
        // First the descriptor, then the start time: if that still matches, the
        // descriptor names the process that was recorded.
        let pidfd = open(pid)?;
        if start_time_ticks(pid) != Some(identity.start_time_ticks) {
            return Err(ProcessError::Gone { pid });
        }
        Ok(Self {
            identity,
            pidfd,
            child: None,
        })
    }

    /// What the monitor needs to find the memory that its guest has written. It
    /// opens no path itself.
    pub fn pagemap(&self) -> io::Result<File> {
        File::open(format!("/proc/{}/pagemap", self.identity.pid))
    }

    pub fn identity(&self) -> MonitorIdentity {
        self.identity
    }

    /// SIGKILL. One that has ended already is fine.
    pub fn kill(&self) {
        if let Err(error) = pidfd_send_signal(self.pidfd.get_ref(), Signal::KILL)
            && error != rustix::io::Errno::SRCH
        {
            tracing::warn!(pid = self.identity.pid, %error, "a monitor cannot be killed");
        }
    }

    /// SIGKILL, and its end. One that the kernel does not let go is left, with a
    /// line in the log.
    pub async fn end(&mut self) {
        self.kill();
        if tokio::time::timeout(KILLED, self.ended()).await.is_err() {
            tracing::error!(
                pid = self.identity.pid,
                "a killed monitor does not end; see the kernel's log"
            );
        }
    }

    /// Waits for its end, and reaps it.
    pub async fn ended(&mut self) {
        // A pidfd is readable from the process's end on (pidfd_open(2)).
        if let Err(error) = self.pidfd.readable().await {
            tracing::warn!(pid = self.identity.pid, %error, "a monitor cannot be waited for");
        }
        if let Some(mut child) = self.child.take() {
            let pid = self.identity.pid;
            match child.wait() {
                Ok(status) => tracing::debug!(pid, %status, "monitor ended"),
                Err(error) => tracing::warn!(pid, %error, "a monitor cannot be reaped"),
            }
        }
    }
}

fn open(pid: i32) -> Result<AsyncFd<OwnedFd>, ProcessError> {
    let gone = || ProcessError::Gone { pid };
    let watch = |source| ProcessError::Watch { pid, source };
    let number = Pid::from_raw(pid).filter(|_| pid > 0).ok_or_else(gone)?;
    match pidfd_open(number, PidfdFlags::NONBLOCK) {
        Ok(pidfd) => crate::descriptors::register(pidfd, Interest::READABLE).map_err(watch),
        Err(rustix::io::Errno::SRCH) => Err(gone()),
        Err(error) => Err(watch(error.into())),
    }
}

/// Anonymous memory that the process holds: its own, and what its guest has
/// written. Zero when the process is gone.
pub fn anonymous_bytes(identity: MonitorIdentity) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", identity.pid));
    let kib = status.ok().and_then(|status| {
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"))?;
        line.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    });
    kib.unwrap_or(0) * 1024
}

/// Of this boot of the host; none where /proc does not tell.
fn boot_id() -> Option<BootId> {
    static BOOT_ID: OnceLock<Option<BootId>> = OnceLock::new();
    *BOOT_ID.get_or_init(|| {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        text.trim().to_owned().try_into().ok()
    })
}

/// Field 22 of `/proc/<pid>/stat`; none when there is no such process.
fn start_time_ticks(pid: i32) -> Option<u64> {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    parse_start_time(&String::from_utf8_lossy(&stat))
}

/// The command's name may hold blanks and parentheses, so fields are counted
/// from the last parenthesis, which ends field 2.
fn parse_start_time(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(22 - 3)?.parse().ok()
}

/// Monitors whose log lies under `folder`, with the log's path below that.
///
/// This finds a monitor whose record was never written. It looks at standard
/// output, which soulboxd points at the sandbox's log and a monitor keeps.
pub fn monitors_below(folder: &Path) -> Vec<(PathBuf, MonitorProcess)> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter_map(|pid| {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
            (name.trim_end() == MONITOR_NAME).then_some(())?;
            let start_time_ticks = start_time_ticks(pid)?;
            let log = std::fs::read_link(format!("/proc/{pid}/fd/1")).ok()?;
            let log = log.strip_prefix(folder).ok()?.to_owned();
            let process = MonitorProcess::find(MonitorIdentity {
                pid,
                start_time_ticks,
                boot_id: boot_id(),
            });
            Some((log, process.ok()?))
        })
        .collect()
}

/// Monitors whose log lies under `sandboxes`, with the sandbox that the log's
/// folder names.
pub fn stray_monitors(sandboxes: &Path) -> Vec<(SandboxId, MonitorProcess)> {
    monitors_below(sandboxes)
        .into_iter()
        .filter_map(|(log, process)| Some((sandbox_of_log(&log)?, process)))
        .collect()
}

fn sandbox_of_log(log: &Path) -> Option<SandboxId> {
    log.components().next()?.as_os_str().to_str()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn sleeper() -> Child {
        Command::new("sleep").arg("1000").spawn().unwrap()
    }

    #[tokio::test]
    async fn a_child_is_killed_and_reaped() {
        let mut process = MonitorProcess::of_child(sleeper()).unwrap();
        let identity = process.identity();
        assert!(MonitorProcess::find(identity).is_ok());
        process.end().await;
        process.kill();
        assert!(matches!(
            MonitorProcess::find(identity),
            Err(ProcessError::Gone { .. })
        ));
    }

    #[tokio::test]
    async fn another_process_with_the_number_is_not_taken_for_it() {
        let mut process = MonitorProcess::of_child(sleeper()).unwrap();
        let mut other = process.identity();
        other.start_time_ticks += 1;
        assert!(matches!(
            MonitorProcess::find(other),
            Err(ProcessError::Gone { .. })
        ));
        let mut before_a_reboot = process.identity();
        before_a_reboot.boot_id = Some(BootId(1));
        assert!(matches!(
            MonitorProcess::find(before_a_reboot),
            Err(ProcessError::Gone { .. })
        ));
        let mut of_an_older_daemon = process.identity();
        of_an_older_daemon.boot_id = None;
        assert!(MonitorProcess::find(of_an_older_daemon).is_ok());
        process.end().await;
    }

    #[test]
    fn odd_command_names_do_not_shift_the_fields() {
        let fields: Vec<String> = (3..=52).map(|field| field.to_string()).collect();
        let stat = format!("7 (a) S ) (b) {}", fields.join(" "));
        assert_eq!(parse_start_time(&stat), Some(22));
        assert_eq!(parse_start_time("7 (cut"), None);
        assert_eq!(parse_start_time("7 (cut) S 1"), None);
    }

    #[test]
    fn a_log_names_its_sandbox() {
        let id = SandboxId::random().unwrap();
        let log = Path::new(id.as_str()).join("vmm.log (deleted)");
        assert_eq!(sandbox_of_log(&log), Some(id));
        assert_eq!(sandbox_of_log(Path::new("")), None);
        assert_eq!(sandbox_of_log(Path::new("other/vmm.log")), None);
    }
}
