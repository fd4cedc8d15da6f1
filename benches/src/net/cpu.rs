//! The CPU time of a sandbox's monitor.

use std::collections::HashSet;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// The name of its processes.
const MONITOR: &str = "soulbox-vmm";
const TUN: &str = "/dev/net/tun";

/// In seconds, since the process began.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct CpuTime {
    /// Of the whole monitor; what its guest runs is in it.
    pub(super) monitor: f64,
    /// Of the thread that serves its devices.
    pub(super) devices: f64,
}

/// The monitors on this host that have a TAP.
pub(super) fn monitors_with_tap() -> Result<HashSet<u32>> {
    let processes = std::fs::read_dir("/proc").context("reading /proc")?;
    let pids = processes.flatten().filter_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        // It may end while it is looked at.
        let name = std::fs::read_to_string(entry.path().join("comm")).ok()?;
        (name.trim_end() == MONITOR && has_tap(&entry.path())).then_some(pid)
    });
    Ok(pids.collect())
}

fn has_tap(process: &Path) -> bool {
    let fds = std::fs::read_dir(process.join("fd"));
    fds.into_iter()
        .flatten()
        .flatten()
        .any(|fd| std::fs::read_link(fd.path()).is_ok_and(|target| target == Path::new(TUN)))
}

/// The one that has come since.
pub(super) fn new_monitor(before: &HashSet<u32>) -> Result<u32> {
    let now = monitors_with_tap()?;
    let new: Vec<u32> = now.difference(before).copied().collect();
    ensure!(
        new.len() == 1,
        "{} monitors with a TAP have come with one sandbox; see that nothing else uses this \
         soulboxd, and that this runs as root",
        new.len()
    );
    Ok(new[0])
}

// === impl CpuTime ===

impl CpuTime {
    pub(super) fn of(pid: u32) -> Result<Self> {
        let ticks = rustix::param::clock_ticks_per_second() as f64;
        let seconds = |path: String| -> Result<f64> {
            let stat = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
            Ok(cpu_ticks(&stat).with_context(|| format!("parsing {path}"))? / ticks)
        };
        Ok(Self {
            monitor: seconds(format!("/proc/{pid}/stat"))?,
            // The main thread has the number of the process.
            devices: seconds(format!("/proc/{pid}/task/{pid}/stat"))?,
        })
    }

    pub(super) fn since(self, before: Self) -> Self {
        Self {
            monitor: self.monitor - before.monitor,
            devices: self.devices - before.devices,
        }
    }
}

/// `utime` and `stime` of proc(5), fields 14 and 15. The name, field 2, may hold
/// anything.
fn cpu_ticks(stat: &str) -> Option<f64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    let mut fields = after_name.split_ascii_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_found_behind_any_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 101 0 2 0 250 33 0 0 20 0 3 0 99 5 6";
        assert_eq!(cpu_ticks(stat), Some(283.0));
        assert_eq!(cpu_ticks("7 (a S 1"), None);
        assert_eq!(cpu_ticks("7 (a) S 1 7 7"), None);
    }

    #[test]
    fn only_what_has_come_since_is_told() {
        let (before, after) = (time(2.0, 1.5), time(2.5, 1.75));
        assert_eq!(after.since(before), time(0.5, 0.25));
        assert!(CpuTime::of(std::process::id()).is_ok());
        assert!(CpuTime::of(u32::MAX).is_err());
    }

    fn time(monitor: f64, devices: f64) -> CpuTime {
        CpuTime { monitor, devices }
    }
}
