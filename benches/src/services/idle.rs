//! What the agent takes when nobody asks it anything, after every service was used.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use super::Guest;
use crate::report::{Promise, Report, Row};

const SECONDS: u32 = 5;
/// Says nothing until the end, so that between its readings nothing wakes the agent on
/// their behalf. Arguments: the agent's process, how long.
const READ_TWICE: &str = r#"
read_all() { cat /proc/"$1"/task/*/status; }
sleep 2
before=$(read_all "$1") && sleep "$2" && after=$(read_all "$1") &&
printf '%s\n--\n%s\n' "$before" "$after"
"#;

/// A process at one time.
#[derive(Debug, PartialEq)]
struct Status {
    resident_kib: f64,
    /// How often each thread has waited for something.
    waits: BTreeMap<u32, u64>,
}

pub(super) async fn measure(guest: &mut Guest, report: &mut Report) -> Result<()> {
    let (pid, seconds) = (guest.pid.to_string(), SECONDS.to_string());
    let argv = ["sh", "-c", READ_TWICE, "sh", &pid, &seconds];
    let read = guest.agent.run(&argv).await?.stdout;
    let read = String::from_utf8(read)?;
    let (before, after) = read.split_once("\n--\n").context("two readings")?;
    let (before, after) = (Status::parse(before)?, Status::parse(after)?);
    let resident_mib = after.resident_kib / 1024.0;
    let waits = after.waits_since(&before) as f64;
    report.rows.extend([
        Row::new("agent: resident when idle", "MiB", vec![resident_mib]),
        Row::new(
            format!("agent: wake-ups in {SECONDS} idle seconds"),
            "times",
            vec![waits],
        ),
    ]);
    report.promises.extend([
        Promise::at_most(
            "agent, resident MiB when idle after all services were used",
            resident_mib,
            10.0,
        ),
        Promise::at_most(
            format!("agent, wake-ups in {SECONDS} idle seconds"),
            waits,
            0.0,
        ),
    ]);
    Ok(())
}

// === impl Status ===

impl Status {
    /// From /proc/PID/task/*/status, one after the other (proc_pid_status(5)).
    fn parse(text: &str) -> Result<Self> {
        let (mut resident_kib, mut waits) = (None, BTreeMap::new());
        let mut thread = None;
        for line in text.lines() {
            let Some((name, value)) = line.split_once(':') else {
                continue;
            };
            let number = || {
                let digits = value.trim().trim_end_matches(" kB");
                digits
                    .parse::<u64>()
                    .with_context(|| format!("parsing {line:?}"))
            };
            match name {
                "Pid" => thread = Some(number()? as u32),
                // Of the whole process.
                "VmRSS" => resident_kib = Some(number()? as f64),
                "voluntary_ctxt_switches" => {
                    let thread = thread.take().context("a status without a Pid")?;
                    waits.insert(thread, number()?);
                }
                _ => {}
            }
        }
        Ok(Self {
            resident_kib: resident_kib.context("a status without VmRSS")?,
            waits,
        })
    }

    /// Of threads that are still there, and of all that have come.
    fn waits_since(&self, before: &Self) -> u64 {
        let since = |(thread, waits): (&u32, &u64)| {
            waits.saturating_sub(before.waits.get(thread).copied().unwrap_or(0))
        };
        self.waits.iter().map(since).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_of_threads_are_read() {
        let text = "Name:\tsoulbox-guest: x\nPid:\t1\nPPid:\t0\nVmRSS:\t    5120 kB\n\
            voluntary_ctxt_switches:\t12\nnonvoluntary_ctxt_switches:\t99\n\
            Name:\ttokio\nPid:\t70\nVmRSS:\t    5120 kB\nvoluntary_ctxt_switches:\t3\n";
        let status = Status::parse(text).unwrap();
        assert_eq!(status, read(5120.0, [(1, 12), (70, 3)]));
        for bad in [
            "",
            "Pid:\t1\n",
            "VmRSS:\t1 kB\nvoluntary_ctxt_switches:\t3\n",
            "Pid:\tone\nVmRSS:\t1 kB\n",
            "Pid:\t1\nVmRSS:\t1 MB\n",
        ] {
            assert!(Status::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn this_process_has_a_status() {
        let text = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let status = Status::parse(&text).unwrap();
        assert!(status.resident_kib > 0.0);
        assert_eq!(status.waits.len(), 1);
    }

    #[test]
    fn waits_are_of_what_is_left_and_what_has_come() {
        let before = read(1.0, [(1, 10), (70, 500)]);
        let after = read(1.0, [(1, 12), (71, 4)]);
        assert_eq!(after.waits_since(&before), 6);
        assert_eq!(before.waits_since(&before), 0);
    }

    fn read<const N: usize>(resident_kib: f64, waits: [(u32, u64); N]) -> Status {
        Status {
            resident_kib,
            waits: waits.into(),
        }
    }
}
