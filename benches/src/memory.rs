//! What memory a process and a host take.

use anyhow::{Context, Result};

/// A process's resident memory, in KiB.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Footprint {
    /// Pages that no other process has mapped.
    pub(crate) private_kib: f64,
    /// Pages that others have mapped too.
    pub(crate) shared_kib: f64,
}

// === impl Footprint ===

impl Footprint {
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/smaps_rollup");
        let rollup = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        Self::parse(&rollup)
    }

    fn parse(rollup: &str) -> Result<Self> {
        let private_kib = kib(rollup, "Private_Clean")? + kib(rollup, "Private_Dirty")?;
        let shared_kib = kib(rollup, "Shared_Clean")? + kib(rollup, "Shared_Dirty")?;
        Ok(Self {
            private_kib,
            shared_kib,
        })
    }
}

/// What the host could still hand out, in KiB: all that its processes and its
/// kernel take is missing from it.
pub(crate) fn available_kib() -> Result<f64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
    kib(&meminfo, "MemAvailable")
}

fn kib(lines: &str, key: &str) -> Result<f64> {
    let value = lines
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
        .with_context(|| format!("the kernel does not tell {key}"))?;
    let number = value.trim().trim_end_matches(" kB");
    number.parse().with_context(|| format!("{key}: {value}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rollup_is_summed_up() {
        let rollup = "56000-7ffd000 ---p 00000000 00:00 0    [rollup]\n\
                      Rss:                1920 kB\n\
                      Shared_Clean:       1024 kB\n\
                      Shared_Dirty:          8 kB\n\
                      Private_Clean:       200 kB\n\
                      Private_Dirty:       688 kB\n";
        let expected = Footprint {
            private_kib: 888.0,
            shared_kib: 1032.0,
        };
        assert_eq!(Footprint::parse(rollup).unwrap(), expected);
        assert!(Footprint::parse("Rss: 12 kB\n").is_err());
    }
}
