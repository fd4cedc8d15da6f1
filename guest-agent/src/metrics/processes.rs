//! All processes, and those that took most CPU time.

use std::cmp::Reverse;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::param::page_size;
use soulbox_proto::guest::v1::GuestProcess;

use super::Ticks;
use crate::users::Users;

/// How much of a command line is told: a thousand of the longest would be gigabytes.
const COMMAND_LINE_BYTES: u64 = 1024;

#[derive(Debug, Default)]
pub(super) struct Processes {
    pub(super) total: u32,
    pub(super) busiest: Vec<GuestProcess>,
}

/// A line of /proc/[pid]/stat, as far as it is told.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    pid: u32,
    name: String,
    state: char,
    parent: u32,
    cpu_ticks: u64,
    threads: u32,
    start_ticks: u64,
    resident_pages: u64,
}

// === impl Processes ===

impl Processes {
    /// Without `most`, processes are only counted. One that ends meanwhile is left out.
    pub(super) fn look(most: u32, ticks: Ticks, booted: SystemTime) -> Self {
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        let pids: Vec<u32> = pids.collect();
        let total = u32::try_from(pids.len()).unwrap_or(u32::MAX);
        if most == 0 {
            return Self {
                total,
                busiest: Vec::new(),
            };
        }

        let stats = pids.iter().filter_map(|pid| {
            let text = fs::read(format!("/proc/{pid}/stat")).ok()?;
            Stat::parse(&String::from_utf8_lossy(&text))
        });
        let mut stats: Vec<Stat> = stats.collect();
        stats.sort_unstable_by_key(|stat| (Reverse(stat.cpu_ticks), stat.pid));
        stats.truncate(usize::try_from(most).unwrap_or(usize::MAX));
        let users = Users::read(Path::new("/etc"));
        let busiest = stats.into_iter();
        let busiest = busiest.map(|stat| stat.into_process(&users, ticks, booted));
        Self {
            total,
            busiest: busiest.collect(),
        }
    }
}

// === impl Stat ===

impl Stat {
    /// "123 (name) S 1 …": the name is the program's to choose, also ") R 1".
    fn parse(text: &str) -> Option<Self> {
        let (before, after) = text.rsplit_once(')')?;
        let (pid, name) = before.split_once('(')?;
        let mut fields = after.split_ascii_whitespace();
        // Each counts from behind the one before; state is the third in proc(5).
        let state = fields.next()?.chars().next()?;
        let parent = fields.next()?.parse().ok()?;
        let user: u64 = fields.nth(9)?.parse().ok()?;
        let system: u64 = fields.next()?.parse().ok()?;
        let threads = fields.nth(4)?.parse().ok()?;
        let start_ticks = fields.nth(1)?.parse().ok()?;
        let resident_pages = fields.nth(1)?.parse().ok()?;
        Some(Self {
            pid: pid.trim().parse().ok()?,
            name: name.to_owned(),
            state,
            parent,
            cpu_ticks: user.saturating_add(system),
            threads,
            start_ticks,
            resident_pages,
        })
    }

    fn into_process(self, users: &Users, ticks: Ticks, booted: SystemTime) -> GuestProcess {
        let folder = format!("/proc/{}", self.pid);
        let owner = fs::metadata(&folder).map(|folder| folder.uid());
        let started = booted.checked_add(Duration::from_micros(ticks.to_us(self.start_ticks)));
        GuestProcess {
            pid: self.pid,
            parent_pid: self.parent,
            name: self.name,
            command_line: command_line(&folder).into(),
            user: owner.map(|uid| users.name_of(uid)).unwrap_or_default(),
            state: self.state.to_string(),
            cpu_us: ticks.to_us(self.cpu_ticks),
            resident_bytes: self.resident_pages.saturating_mul(page_size() as u64),
            threads: self.threads,
            start_time: started.map(Into::into),
        }
    }
}

/// Its arguments, with a NUL between them.
fn command_line(folder: &str) -> Vec<u8> {
    let mut line = Vec::new();
    if let Ok(file) = File::open(Path::new(folder).join("cmdline")) {
        let _ = file.take(COMMAND_LINE_BYTES).read_to_end(&mut line);
    }
    while line.last() == Some(&0) {
        line.pop();
    }
    line
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LINE: &str = "77 (a) R) S 3 77 77 0 -1 4194560 100 0 0 0 7 5 0 0 20 0 9 0 4242 \
                        1000000 321 18446744073709551615 1 1 0 0 0 0 0 0 0 0 0 0 17 0 0 0";

    #[test]
    fn reads_what_the_kernel_writes() {
        let expected = Stat {
            pid: 77,
            name: "a) R".to_owned(),
            state: 'S',
            parent: 3,
            cpu_ticks: 12,
            threads: 9,
            start_ticks: 4242,
            resident_pages: 321,
        };
        assert_eq!(Stat::parse(LINE), Some(expected));
        assert_eq!(Stat::parse(&LINE[..60]), None);
        assert_eq!(Stat::parse(""), None);
    }

    proptest! {
        #[test]
        fn any_name_is_read(name in "[^\0]{0,16}") {
            let line = LINE.replace("a) R", &name);
            let stat = Stat::parse(&line).unwrap();
            prop_assert_eq!((stat.pid, stat.name, stat.state), (77, name, 'S'));
        }

        #[test]
        fn any_text_is_a_process_or_none(text in "[0-9() RS-]{0,90}", start in any::<u64>()) {
            if let Some(mut stat) = Stat::parse(&text) {
                stat.start_ticks = start;
                stat.into_process(
                    &Users::read(Path::new("/nonexistent")),
                    Ticks { per_second: 100 },
                    SystemTime::now(),
                );
            }
        }
    }
}
