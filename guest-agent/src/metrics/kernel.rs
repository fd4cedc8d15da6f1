//! What the kernel counts for the machine as a whole; proc(5).

use soulbox_proto::guest::v1::{CpuTimes, GuestMemory, Pressure};

use super::Ticks;

#[derive(Debug, Default, PartialEq)]
pub(super) struct Stat {
    pub(super) all: CpuTimes,
    pub(super) per_cpu: Vec<CpuTimes>,
    pub(super) running: u32,
}

/// "cpu  10 20 …", "cpu0 …", "procs_running 2": /proc/stat.
pub(super) fn stat(text: &str, ticks: Ticks) -> Stat {
    let mut stat = Stat::default();
    for line in text.lines() {
        let (name, rest) = line.split_once(' ').unwrap_or((line, ""));
        match name {
            "cpu" => stat.all = cpu_times(rest, ticks),
            "procs_running" => stat.running = rest.trim().parse().unwrap_or(0),
            _ if name.starts_with("cpu") => stat.per_cpu.push(cpu_times(rest, ticks)),
            _ => {}
        }
    }
    stat
}

/// user nice system idle iowait irq softirq steal guest guest_nice; the last two are
/// in the first two.
fn cpu_times(text: &str, ticks: Ticks) -> CpuTimes {
    let mut fields = [0_u64; 8];
    for (field, word) in fields.iter_mut().zip(text.split_ascii_whitespace()) {
        *field = word.parse().unwrap_or(0);
    }
    let [user, nice, system, idle, io_wait, irq, soft_irq, steal] = fields;
    CpuTimes {
        user_us: ticks.to_us(user.saturating_add(nice)),
        system_us: ticks.to_us(system.saturating_add(irq).saturating_add(soft_irq)),
        idle_us: ticks.to_us(idle),
        io_wait_us: ticks.to_us(io_wait),
        steal_us: ticks.to_us(steal),
    }
}

/// "0.10 0.20 0.30 1/100 1234": the first three of /proc/loadavg.
pub(super) fn load(text: &str) -> Vec<f64> {
    let numbers = text.split_ascii_whitespace().take(3).map_while(finite);
    numbers.collect()
}

/// "MemTotal:   12345 kB": /proc/meminfo. Cached is what free(1) calls so: page
/// cache, buffers, and what the kernel's own caches can give back.
pub(super) fn memory(text: &str) -> GuestMemory {
    let mut memory = GuestMemory::default();
    for line in text.lines() {
        let Some((name, rest)) = line.split_once(':') else {
            continue;
        };
        let number = rest.split_ascii_whitespace().next();
        let kib: u64 = number.and_then(|number| number.parse().ok()).unwrap_or(0);
        let bytes = kib.saturating_mul(1024);
        match name {
            "MemTotal" => memory.total_bytes = bytes,
            "MemAvailable" => memory.available_bytes = bytes,
            "MemFree" => memory.free_bytes = bytes,
            "Cached" | "Buffers" | "SReclaimable" => {
                memory.cached_bytes = memory.cached_bytes.saturating_add(bytes);
            }
            "SwapTotal" => memory.swap_total_bytes = bytes,
            "SwapFree" => memory.swap_free_bytes = bytes,
            _ => {}
        }
    }
    memory
}

/// "some avg10=0.00 avg60=0.00 avg300=0.00 total=0", and "full …", which not every
/// kernel has for the CPU. None where there is neither.
pub(super) fn pressure(text: &str) -> Option<Pressure> {
    let mut pressure = Pressure::default();
    let mut found = false;
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let (ten, sixty, three_hundred, total) = match words.next() {
            Some("some") => (
                &mut pressure.some_10s,
                &mut pressure.some_60s,
                &mut pressure.some_300s,
                &mut pressure.some_total_us,
            ),
            Some("full") => (
                &mut pressure.full_10s,
                &mut pressure.full_60s,
                &mut pressure.full_300s,
                &mut pressure.full_total_us,
            ),
            _ => continue,
        };
        found = true;
        for (name, value) in words.filter_map(|word| word.split_once('=')) {
            match name {
                "avg10" => *ten = finite(value).unwrap_or(0.0),
                "avg60" => *sixty = finite(value).unwrap_or(0.0),
                "avg300" => *three_hundred = finite(value).unwrap_or(0.0),
                "total" => *total = value.parse().unwrap_or(0),
                _ => {}
            }
        }
    }
    found.then_some(pressure)
}

fn finite(text: &str) -> Option<f64> {
    let number: f64 = text.parse().ok()?;
    number.is_finite().then_some(number)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TICKS: Ticks = Ticks { per_second: 100 };

    #[test]
    fn reads_cpu_times() {
        let text = "cpu  10 2 30 400 5 1 1 7 0 0\ncpu0 1 0 0 0\ncpu1 2\nintr 9 9\n\
                    procs_running 3\n";
        let stat = stat(text, TICKS);
        let all = CpuTimes {
            user_us: 120_000,
            system_us: 320_000,
            idle_us: 4_000_000,
            io_wait_us: 50_000,
            steal_us: 70_000,
        };
        assert_eq!((stat.all, stat.running), (all, 3));
        assert_eq!(stat.per_cpu.len(), 2);
        assert_eq!(stat.per_cpu[1].user_us, 20_000);
    }

    #[test]
    fn reads_load_memory_and_pressure() {
        assert_eq!(load("0.10 2.00 30.05 1/100 1234\n"), [0.1, 2.0, 30.05]);
        let text = "MemTotal: 100 kB\nMemFree:  7 kB\nBuffers: 1 kB\nCached: 2 kB\n\
                    SwapCached: 9 kB\nSReclaimable: 3 kB\nMemAvailable: 50 kB\nSwapTotal: 4 kB\n";
        let memory = memory(text);
        assert_eq!(memory.total_bytes, 102_400);
        assert_eq!(memory.available_bytes, 51_200);
        assert_eq!(memory.cached_bytes, 6 * 1024);
        assert_eq!(memory.swap_total_bytes, 4096);

        let text = "some avg10=1.50 avg60=0.20 avg300=0.03 total=12345\n\
                    full avg10=0.00 avg60=0.10 avg300=0.00 total=7\n";
        let both = pressure(text).unwrap();
        assert_eq!((both.some_10s, both.some_total_us), (1.5, 12_345));
        assert_eq!((both.full_60s, both.full_total_us), (0.1, 7));
        assert_eq!(pressure(""), None);
    }

    proptest! {
        // What a kernel of another age writes, and what it never would.
        #[test]
        fn nothing_that_is_written_there_is_fatal(
            text in "((cpu[0-9]?|some|full|MemTotal:|Cached:|procs_running) ?([0-9]{0,21}|nan|inf|-1|avg10=[0-9e.-]{0,9}|total=[0-9]{0,21})[ \n]){0,12}",
        ) {
            stat(&text, TICKS);
            memory(&text);
            let load = load(&text);
            prop_assert!(load.len() <= 3 && load.iter().all(|number| number.is_finite()));
            if let Some(pressure) = pressure(&text) {
                prop_assert!(pressure.some_10s.is_finite() && pressure.full_10s.is_finite());
            }
        }

        #[test]
        fn nor_is_any_text(text in any::<String>()) {
            stat(&text, TICKS);
            memory(&text);
            load(&text);
            pressure(&text);
        }
    }
}
