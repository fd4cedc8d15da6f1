//! Facts about the machine this daemon runs on.

use std::path::Path;

use crate::admission::Amounts;
use crate::config::Capacity;

#[derive(Debug, Clone, Default)]
pub struct HostFacts {
    pub hostname: String,
    pub kernel_release: String,
    pub cpu_model: String,
    pub cpus: u32,
    pub memory_mib: u64,
    /// The CPU offers vmx or svm.
    pub hardware_virtualization: bool,
}

#[derive(Debug, thiserror::Error)]
#[error("{path} cannot be read; mount /proc, or give the capacity in the configuration")]
pub struct FactsError {
    path: &'static str,
    source: std::io::Error,
}

// === impl HostFacts ===

impl HostFacts {
    pub fn read() -> Result<Self, FactsError> {
        let cpuinfo = read("/proc/cpuinfo")?;
        let meminfo = read("/proc/meminfo")?;
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Ok(Self {
            hostname: read("/proc/sys/kernel/hostname")?.trim().to_owned(),
            kernel_release: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            cpu_model: field(&cpuinfo, "model name").unwrap_or_default().to_owned(),
            cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
            memory_mib: memory_mib(&meminfo),
            hardware_virtualization: has_virtualization(&cpuinfo),
        })
    }

    /// What may be handed out: what is configured, else what the host has.
    pub fn capacity(&self, configured: &Capacity, state_dir: &Path) -> std::io::Result<Amounts> {
        let or = |configured: u64, derived: u64| {
            if configured == 0 { derived } else { configured }
        };
        let disk_mib = if configured.disk_mib == 0 {
            free_disk_mib(state_dir)?
        } else {
            configured.disk_mib
        };
        Ok(Amounts {
            vcpus: or(
                configured.vcpus.into(),
                u64::from(self.cpus) * u64::from(configured.vcpu_overcommit),
            ),
            memory_mib: or(configured.memory_mib, self.memory_mib / 10 * 9),
            disk_mib,
        })
    }
}

fn read(path: &'static str) -> Result<String, FactsError> {
    std::fs::read_to_string(path).map_err(|source| FactsError { path, source })
}

/// What can still be written under `folder`, and what layers there already
/// hold: a restart does not shrink the host by its own sandboxes.
fn free_disk_mib(folder: &Path) -> std::io::Result<u64> {
    use std::os::unix::fs::MetadataExt as _;

    let file_system = rustix::fs::statvfs(folder)?;
    let free_bytes = file_system.f_bavail.saturating_mul(file_system.f_frsize);
    let mut held_bytes = 0_u64;
    for kind in ["sandboxes", "snapshots"] {
        for owner in std::fs::read_dir(folder.join(kind))
            .into_iter()
            .flatten()
            .flatten()
        {
            for file in std::fs::read_dir(owner.path())
                .into_iter()
                .flatten()
                .flatten()
            {
                held_bytes += file
                    .metadata()
                    .map_or(0, |metadata| metadata.blocks() * 512);
            }
        }
    }
    Ok((free_bytes + held_bytes) >> 20)
}

fn memory_mib(meminfo: &str) -> u64 {
    field(meminfo, "MemTotal")
        .and_then(|value| value.strip_suffix(" kB"))
        .and_then(|kib| kib.trim().parse::<u64>().ok())
        .map_or(0, |kib| kib / 1024)
}

fn has_virtualization(cpuinfo: &str) -> bool {
    field(cpuinfo, "flags").is_some_and(|flags| {
        flags
            .split_ascii_whitespace()
            .any(|flag| matches!(flag, "vmx" | "svm"))
    })
}

/// The value of the first line "name : value".
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(found, _)| found.trim() == name)
        .map(|(_, value)| value.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_come_out_of_proc() {
        let cpuinfo =
            "processor\t: 0\nmodel name\t: Some CPU @ 2: fast\nflags\t\t: fpu svm_lock avx\n";
        assert_eq!(field(cpuinfo, "model name"), Some("Some CPU @ 2: fast"));
        assert!(!has_virtualization(cpuinfo));
        assert!(has_virtualization("flags : fpu vmx sse\n"));
        assert_eq!(
            memory_mib("MemTotal:       2097152 kB\nMemFree: 1 kB\n"),
            2048
        );
        assert_eq!(memory_mib("nonsense"), 0);
    }

    #[test]
    fn configured_capacity_wins() {
        let facts = HostFacts {
            cpus: 2,
            memory_mib: 1000,
            ..HostFacts::default()
        };
        let folder = tempfile::tempdir().unwrap();
        let derived = facts.capacity(&Capacity::default(), folder.path()).unwrap();
        assert_eq!((derived.vcpus, derived.memory_mib), (8, 900));
        assert!(derived.disk_mib > 0);
        let configured = Capacity {
            vcpus: 3,
            memory_mib: 4096,
            disk_mib: 5,
            ..Capacity::default()
        };
        assert_eq!(
            facts.capacity(&configured, folder.path()).unwrap(),
            Amounts {
                vcpus: 3,
                memory_mib: 4096,
                disk_mib: 5
            }
        );
    }
}
