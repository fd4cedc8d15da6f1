//! What the agent says about itself and the guest.

use std::fs;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use soulbox_proto::guest::v1::HealthResponse;

const PAGE_BYTES: u64 = 4096;

pub(super) fn measure(running_processes: u32) -> HealthResponse {
    let read = |path| fs::read_to_string(path).unwrap_or_default();
    HealthResponse {
        agent_version: crate::VERSION.to_owned(),
        uptime_us: boot_time_us(),
        running_processes,
        agent_resident_bytes: resident_pages(&read("/proc/self/statm")) * PAGE_BYTES,
        memory_available_bytes: available_kib(&read("/proc/meminfo")) * 1024,
    }
}

/// Since the kernel was entered.
pub(crate) fn boot_time_us() -> u64 {
    let since_boot = Duration::try_from(clock_gettime(ClockId::Boottime)).unwrap_or_default();
    u64::try_from(since_boot.as_micros()).unwrap_or(u64::MAX)
}

// "size resident shared …", in pages; proc_pid_statm(5)
fn resident_pages(statm: &str) -> u64 {
    statm
        .split(' ')
        .nth(1)
        .and_then(|pages| pages.parse().ok())
        .unwrap_or(0)
}

// "MemAvailable:   12345 kB"; proc_meminfo(5)
fn available_kib(meminfo: &str) -> u64 {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"));
    let number = line.and_then(|line| line.trim().strip_suffix(" kB"));
    number.and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_kernel_writes() {
        assert_eq!(resident_pages("1200 345 200 100 0 50 0\n"), 345);
        let meminfo = "MemTotal:  24684 kB\nMemAvailable:   12345 kB\nBuffers: 1 kB\n";
        assert_eq!(available_kib(meminfo), 12345);
    }

    #[test]
    fn measures_this_process() {
        let health = measure(3);
        assert_eq!(health.running_processes, 3);
        assert!(health.uptime_us > 0);
        assert!(health.agent_resident_bytes > 0 && health.memory_available_bytes > 0);
    }
}
