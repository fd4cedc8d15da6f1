//! What goes on in a sandbox, for people and for programs. Names and lines come from
//! the guest: for people they are made printable.

use std::time::Duration;

use serde_json::{Value, json};
use soulbox_proto::guest::v1::watch_event::Kind as Change;
use soulbox_proto::guest::v1::{
    Entry, Exited, FileKind, GetMetricsResponse, Pressure, ProcessEntry, SearchMatch, WatchEvent,
    exited,
};

use super::{MIB, age, line, rfc3339, rough, table, trim};
use crate::cli::args::Output;
use crate::cli::error::CliError;
use crate::text::printable;

/// Of a command or a name, in a table.
const MAX_CHARS: usize = 120;
/// Of a line that was found: the guest sends at most 4,096 bytes of it.
const MAX_LINE_CHARS: usize = 4096;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn shown(bytes: &[u8]) -> String {
    printable(&text(bytes), MAX_CHARS)
}

/// A path as it is, but for what a terminal would take for something else.
fn path(bytes: &[u8]) -> String {
    printable(&text(bytes), MAX_LINE_CHARS)
}

pub(in crate::cli) fn process(process: &ProcessEntry) -> Value {
    json!({
        "id": process.id,
        "pid": process.pid,
        "argv": process.argv.iter().map(|arg| text(arg)).collect::<Vec<_>>(),
        "cwd": text(&process.cwd),
        "user": process.user,
        "tag": process.tag,
        "terminal": process.terminal,
        "start_time": process.start_time.map(rfc3339),
        "exited": process.exited.as_ref().map(exited_json),
        "callers": process.callers,
        "output_bytes": process.output_bytes,
    })
}

fn exited_json(exited: &Exited) -> Value {
    let (code, signal) = match exited.status {
        Some(exited::Status::Code(code)) => (Some(code), None),
        Some(exited::Status::Signal(signal)) => (None, Some(signal)),
        None => (None, None),
    };
    json!({
        "code": code,
        "signal": signal,
        "timed_out": exited.timed_out,
        "wall_us": exited.wall_us,
        "user_cpu_us": exited.user_cpu_us,
        "system_cpu_us": exited.system_cpu_us,
        "max_resident_bytes": exited.max_resident_bytes,
    })
}

pub(in crate::cli) fn process_table(processes: &[ProcessEntry]) -> Result<(), CliError> {
    let mut table = table(&[
        "ID", "PID", "USER", "STATE", "TTY", "CALLERS", "AGE", "TAG", "COMMAND",
    ]);
    for process in processes {
        let argv: Vec<String> = process.argv.iter().map(|arg| text(arg)).collect();
        table.add_row([
            process.id.to_string(),
            process.pid.to_string(),
            shown(process.user.as_bytes()),
            process
                .exited
                .as_ref()
                .map_or_else(|| "running".to_owned(), ended),
            if process.terminal { "yes" } else { "" }.to_owned(),
            process.callers.to_string(),
            process.start_time.map(age).unwrap_or_default(),
            shown(process.tag.as_bytes()),
            printable(&argv.join(" "), MAX_CHARS),
        ]);
    }
    line(&trim(&table))
}

fn ended(exited: &Exited) -> String {
    match exited.status {
        _ if exited.timed_out => "timed out".to_owned(),
        Some(exited::Status::Code(code)) => format!("exited {code}"),
        Some(exited::Status::Signal(signal)) => format!("killed by {signal}"),
        None => "ended".to_owned(),
    }
}

pub(in crate::cli) fn entry(entry: &Entry) -> Value {
    json!({
        "path": text(&entry.path),
        "kind": kind(entry.kind()),
        "size_bytes": entry.size_bytes,
        "mode": format!("{:04o}", entry.mode),
        "uid": entry.uid,
        "gid": entry.gid,
        "modify_time": entry.modify_time.map(rfc3339),
        "access_time": entry.access_time.map(rfc3339),
        "change_time": entry.change_time.map(rfc3339),
        "target": (entry.kind() == FileKind::Symlink).then(|| text(&entry.target)),
        "inode": entry.inode,
        "device": entry.device,
        "links": entry.links,
        "allocated_bytes": entry.allocated_bytes,
    })
}

fn kind(kind: FileKind) -> &'static str {
    match kind {
        FileKind::Regular => "file",
        FileKind::Directory => "directory",
        FileKind::Symlink => "symlink",
        FileKind::Fifo => "fifo",
        FileKind::Socket => "socket",
        FileKind::CharacterDevice => "character device",
        FileKind::BlockDevice => "block device",
        FileKind::Unspecified => "unknown",
    }
}

pub(in crate::cli) fn entry_table(entries: &[Entry]) -> Result<(), CliError> {
    let mut table = table(&["MODE", "OWNER", "SIZE", "MODIFIED", "NAME"]);
    for entry in entries {
        table.add_row([
            mode(entry),
            format!("{}:{}", entry.uid, entry.gid),
            entry.size_bytes.to_string(),
            entry.modify_time.map(rfc3339).unwrap_or_default(),
            name(entry),
        ]);
    }
    line(&trim(&table))
}

pub(in crate::cli) fn entry_details(entry: &Entry) -> Result<(), CliError> {
    entry_table(std::slice::from_ref(entry))?;
    line(&format!(
        "{}, inode {} on device {:#x}, {} links, {} bytes on disk",
        kind(entry.kind()),
        entry.inode,
        entry.device,
        entry.links,
        entry.allocated_bytes
    ))?;
    let time = |time: Option<prost_types::Timestamp>| time.map(rfc3339).unwrap_or_default();
    line(&format!(
        "read {}, status changed {}",
        time(entry.access_time),
        time(entry.change_time)
    ))
}

fn name(entry: &Entry) -> String {
    let name = path(&entry.path);
    match entry.kind() {
        FileKind::Symlink => format!("{name} -> {}", path(&entry.target)),
        FileKind::Directory => format!("{name}/"),
        _ => name,
    }
}

/// As ls(1) shows it.
fn mode(entry: &Entry) -> String {
    let kind = match entry.kind() {
        FileKind::Directory => 'd',
        FileKind::Symlink => 'l',
        FileKind::Fifo => 'p',
        FileKind::Socket => 's',
        FileKind::CharacterDevice => 'c',
        FileKind::BlockDevice => 'b',
        FileKind::Regular | FileKind::Unspecified => '-',
    };
    let mut shown = String::from(kind);
    for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = entry.mode >> shift;
        let runs = bits & 1 != 0;
        shown.push(if bits & 4 == 0 { '-' } else { 'r' });
        shown.push(if bits & 2 == 0 { '-' } else { 'w' });
        shown.push(match (entry.mode & special != 0, runs) {
            (true, true) => letter,
            (true, false) => letter.to_ascii_uppercase(),
            (false, true) => 'x',
            (false, false) => '-',
        });
    }
    shown
}

pub(in crate::cli) fn found(format: Output, found: &SearchMatch) -> Result<(), CliError> {
    let name = path(&found.path);
    line(&match format {
        Output::Json => json!({
            "path": text(&found.path),
            "kind": kind(found.kind()),
            "line_number": found.line_number,
            "line": text(&found.line),
            "ranges": found.ranges.iter().map(|range| [range.start, range.end]).collect::<Vec<_>>(),
            "context": found.context,
        })
        .to_string(),
        Output::Table if found.line_number == 0 => name,
        Output::Table => {
            let separator = if found.context { '-' } else { ':' };
            let line = path(&found.line);
            format!("{name}{separator}{}{separator}{line}", found.line_number)
        }
    })
}

/// One line, so that programs can read it as it comes.
pub(in crate::cli) fn file_event(format: Output, event: &WatchEvent) -> Result<(), CliError> {
    let kind = match event.kind() {
        Change::Created => "created",
        Change::Written => "written",
        Change::Removed => "removed",
        Change::Renamed => "renamed",
        Change::Attributes => "attributes",
        Change::Unspecified => "unknown",
    };
    let renamed = event.kind() == Change::Renamed;
    line(&match format {
        Output::Json => json!({
            "kind": kind,
            "path": text(&event.path),
            "from": renamed.then(|| text(&event.from)),
            "directory": event.directory,
        })
        .to_string(),
        Output::Table => {
            let slash = if event.directory { "/" } else { "" };
            let from = if renamed {
                format!("{} -> ", path(&event.from))
            } else {
                String::new()
            };
            format!("{kind:10} {from}{}{slash}", path(&event.path))
        }
    })
}

pub(in crate::cli) fn metrics(metrics: &GetMetricsResponse) -> Value {
    let cpu = |cpu: &soulbox_proto::guest::v1::CpuTimes| {
        json!({
            "user_us": cpu.user_us,
            "system_us": cpu.system_us,
            "idle_us": cpu.idle_us,
            "io_wait_us": cpu.io_wait_us,
            "steal_us": cpu.steal_us,
        })
    };
    let memory = metrics.memory.unwrap_or_default();
    let pressure = |pressure: &Pressure| {
        json!({
            "some_10s": pressure.some_10s,
            "some_60s": pressure.some_60s,
            "some_300s": pressure.some_300s,
            "some_total_us": pressure.some_total_us,
            "full_10s": pressure.full_10s,
            "full_60s": pressure.full_60s,
            "full_300s": pressure.full_300s,
            "full_total_us": pressure.full_total_us,
        })
    };
    json!({
        "time": metrics.time.map(rfc3339),
        "uptime_us": metrics.uptime_us,
        "cpus": metrics.cpus,
        "cpu": metrics.cpu.as_ref().map(cpu),
        "per_cpu": metrics.per_cpu.iter().map(cpu).collect::<Vec<_>>(),
        "load": metrics.load,
        "memory": {
            "total_bytes": memory.total_bytes,
            "available_bytes": memory.available_bytes,
            "free_bytes": memory.free_bytes,
            "cached_bytes": memory.cached_bytes,
            "swap_total_bytes": memory.swap_total_bytes,
            "swap_free_bytes": memory.swap_free_bytes,
        },
        "disks": metrics.disks.iter().map(|disk| json!({
            "mount_point": text(&disk.mount_point),
            "total_bytes": disk.total_bytes,
            "used_bytes": disk.used_bytes,
            "available_bytes": disk.available_bytes,
            "inodes": disk.inodes,
            "inodes_free": disk.inodes_free,
        })).collect::<Vec<_>>(),
        "pressure": metrics.pressure.iter()
            .map(|(name, of)| (name.clone(), pressure(of)))
            .collect::<serde_json::Map<_, _>>(),
        "running_processes": metrics.running_processes,
        "total_processes": metrics.total_processes,
        "processes": metrics.processes.iter().map(|process| json!({
            "pid": process.pid,
            "parent_pid": process.parent_pid,
            "name": process.name,
            "command_line": text(&process.command_line),
            "user": process.user,
            "state": process.state,
            "cpu_us": process.cpu_us,
            "resident_bytes": process.resident_bytes,
            "threads": process.threads,
            "start_time": process.start_time.map(rfc3339),
        })).collect::<Vec<_>>(),
    })
}

/// All of it on a page, with the CPU use between the two.
pub(in crate::cli) fn metrics_page(
    before: &GetMetricsResponse,
    now: &GetMetricsResponse,
) -> String {
    let elapsed_us = now.uptime_us.saturating_sub(before.uptime_us).max(1);
    let mut page = vec![head(now), cpu_line(before, now), memory_line(now)];
    for disk in &now.disks {
        page.push(format!(
            "disk {}: {} of {} MiB used",
            path(&disk.mount_point),
            disk.used_bytes / MIB,
            disk.total_bytes / MIB
        ));
    }
    let mut pressure: Vec<_> = now.pressure.iter().collect();
    pressure.sort_unstable_by_key(|(name, _)| name.as_str());
    let pressure = pressure.into_iter().map(|(name, of)| {
        let name = printable(name, MAX_CHARS);
        format!("{name} {:.1}% (all {:.1}%)", of.some_10s, of.full_10s)
    });
    let pressure: Vec<_> = pressure.collect();
    if !pressure.is_empty() {
        page.push(format!("pressure: {}", pressure.join(", ")));
    }
    page.push(String::new());
    page.push(processes(before, now, elapsed_us));
    page.join("\n")
}

fn head(now: &GetMetricsResponse) -> String {
    let load: Vec<_> = now.load.iter().map(|load| format!("{load:.2}")).collect();
    format!(
        "up {}, {} CPUs, load {}, {} of {} processes run",
        rough(Duration::from_micros(now.uptime_us)),
        now.cpus,
        load.join(" "),
        now.running_processes,
        now.total_processes
    )
}

fn cpu_line(before: &GetMetricsResponse, now: &GetMetricsResponse) -> String {
    let (before, now) = (before.cpu.unwrap_or_default(), now.cpu.unwrap_or_default());
    let spent = [
        ("user", now.user_us.saturating_sub(before.user_us)),
        ("system", now.system_us.saturating_sub(before.system_us)),
        ("io wait", now.io_wait_us.saturating_sub(before.io_wait_us)),
        ("steal", now.steal_us.saturating_sub(before.steal_us)),
        ("idle", now.idle_us.saturating_sub(before.idle_us)),
    ];
    let all: u64 = spent.iter().map(|(_, us)| us).sum();
    let shares = spent.map(|(name, us)| format!("{name} {:.1}%", percent(us, all)));
    format!("cpu: {}", shares.join(", "))
}

fn memory_line(now: &GetMetricsResponse) -> String {
    let memory = now.memory.unwrap_or_default();
    let used = memory.total_bytes.saturating_sub(memory.available_bytes);
    let mut line = format!(
        "memory: {} of {} MiB used, {} MiB cached",
        used / MIB,
        memory.total_bytes / MIB,
        memory.cached_bytes / MIB
    );
    if memory.swap_total_bytes > 0 {
        let used = memory
            .swap_total_bytes
            .saturating_sub(memory.swap_free_bytes);
        let total = memory.swap_total_bytes / MIB;
        line.push_str(&format!(", {} of {total} MiB swapped", used / MIB));
    }
    line
}

fn processes(before: &GetMetricsResponse, now: &GetMetricsResponse, elapsed_us: u64) -> String {
    let mut table = table(&[
        "PID", "USER", "STATE", "CPU", "MEMORY", "THREADS", "TIME", "COMMAND",
    ]);
    let mut processes: Vec<_> = now
        .processes
        .iter()
        .map(|process| {
            // The same only when it started then: numbers are used again.
            let was = before
                .processes
                .iter()
                .find(|was| (was.pid, was.start_time) == (process.pid, process.start_time));
            let used_us = process
                .cpu_us
                .saturating_sub(was.map_or(0, |was| was.cpu_us));
            (process, used_us)
        })
        .collect();
    processes.sort_by_key(|(process, used_us)| (std::cmp::Reverse(*used_us), process.pid));
    for (process, used_us) in processes {
        let command = match process.command_line.is_empty() {
            // A thread of the kernel.
            true => format!("[{}]", process.name),
            false => text(&process.command_line).replace('\0', " "),
        };
        table.add_row([
            process.pid.to_string(),
            shown(process.user.as_bytes()),
            shown(process.state.as_bytes()),
            format!("{:.1}%", percent(used_us, elapsed_us)),
            format!("{:.1} MiB", process.resident_bytes as f64 / MIB as f64),
            process.threads.to_string(),
            format!(
                "{:.2}s",
                Duration::from_micros(process.cpu_us).as_secs_f64()
            ),
            printable(command.trim_end(), MAX_CHARS),
        ]);
    }
    trim(&table)
}

fn percent(part: u64, all: u64) -> f64 {
    if all == 0 {
        return 0.0;
    }
    part as f64 / all as f64 * 100.0
}

#[cfg(test)]
mod tests {
    use soulbox_proto::guest::v1::{CpuTimes, GuestProcess};

    use super::*;

    #[test]
    fn modes_are_as_ls_shows_them() {
        let shown = |kind: FileKind, bits| {
            mode(&Entry {
                kind: kind.into(),
                mode: bits,
                ..Entry::default()
            })
        };
        assert_eq!(shown(FileKind::Regular, 0o644), "-rw-r--r--");
        assert_eq!(shown(FileKind::Directory, 0o1777), "drwxrwxrwt");
        assert_eq!(shown(FileKind::Regular, 0o6750), "-rwsr-s---");
        assert_eq!(shown(FileKind::Regular, 0o4644), "-rwSr--r--");
    }

    #[test]
    fn names_cannot_write_to_the_terminal() {
        let entry = Entry {
            path: b"a\x1b[2J\nb".to_vec().into(),
            kind: FileKind::Symlink.into(),
            target: b"\x07".to_vec().into(),
            ..Entry::default()
        };
        assert_eq!(name(&entry), "a [2J b ->  ");
    }

    #[test]
    fn cpu_use_is_that_between_two_samples() {
        let sample = |uptime_us, user_us, idle_us, cpu_us| GetMetricsResponse {
            uptime_us,
            cpu: Some(CpuTimes {
                user_us,
                idle_us,
                ..CpuTimes::default()
            }),
            processes: vec![GuestProcess {
                pid: 7,
                name: "kworker\x1b".to_owned(),
                cpu_us,
                ..GuestProcess::default()
            }],
            ..GetMetricsResponse::default()
        };
        let (before, now) = (
            sample(1_000_000, 100, 900, 500_000),
            sample(2_000_000, 400, 1600, 750_000),
        );
        let page = metrics_page(&before, &now);
        assert!(
            page.contains("user 30.0%") && page.contains("idle 70.0%"),
            "{page}"
        );
        assert!(
            page.contains("25.0%") && page.contains("[kworker ]"),
            "{page}"
        );
        // A clone's counters may be behind.
        assert!(metrics_page(&now, &before).contains("user 0.0%"));
    }
}
