//! Limits of a program with all that it starts: the controllers of cgroup v2, as the
//! kernel's admin-guide/cgroup-v2.rst has them.
//!
//! Controllers cost something in every cgroup that has them (memory is charged page
//! by page), so only the folder of limited programs gets them, and when the first
//! such program is started.

use std::fs;
use std::io;
use std::path::Path;

use soulbox_proto::guest::v1::CgroupLimits;

use crate::spec::Violations;

/// What is asked for is sound, and not nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    cpu_millis: Option<u64>,
    memory_bytes: Option<u64>,
    pids: Option<u64>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum LimitsError {
    #[error("limits need cgroups, and there are none here: mount cgroup2 on /sys/fs/cgroup")]
    NoCgroups,
    #[error(
        "the guest's cgroup2 has no controller {0}: start it with a kernel that has it, and \
         without cgroup v1"
    )]
    NoController(String),
    #[error("{what} could not be written ({source}): look at /sys/fs/cgroup")]
    Set {
        what: &'static str,
        source: io::Error,
    },
}

/// A thousand CPUs.
const MAX_CPU_MILLIS: u64 = 1_000_000;
/// Less does not start even a small program, and does not say why.
const MIN_MEMORY_BYTES: u64 = 1 << 20;
/// PID_MAX_LIMIT of linux/threads.h.
const MAX_PIDS: u64 = 4 << 20;

const CONTROLLERS: &str = "cgroup.controllers";
const SUBTREE_CONTROL: &str = "cgroup.subtree_control";

// === impl Limits ===

impl Limits {
    /// None where none is asked for.
    pub(crate) fn check(limits: &CgroupLimits, violations: &mut Violations) -> Option<Self> {
        let mut check = |field: &str, limit: Option<u64>, least: u64, most: u64, unit: &str| {
            if limit.is_some_and(|limit| !(least..=most).contains(&limit)) {
                let problem = format!("must be {least} to {most}{unit}");
                violations.add(format!("start.cgroup.{field}"), problem);
            }
        };
        check("cpu_millis", limits.cpu_millis, 1, MAX_CPU_MILLIS, "");
        let (least, most) = (MIN_MEMORY_BYTES, i64::MAX.cast_unsigned());
        check("memory_bytes", limits.memory_bytes, least, most, " bytes");
        check("pids", limits.pids, 1, MAX_PIDS, "");
        let checked = Self {
            cpu_millis: limits.cpu_millis,
            memory_bytes: limits.memory_bytes,
            pids: limits.pids,
        };
        (!checked.controllers().is_empty()).then_some(checked)
    }

    fn controllers(&self) -> Vec<&'static str> {
        let of = [
            ("cpu", self.cpu_millis),
            ("memory", self.memory_bytes),
            ("pids", self.pids),
        ];
        let wanted = of.into_iter().filter(|(_, limit)| limit.is_some());
        wanted.map(|(name, _)| name).collect()
    }

    /// Lets cgroups below `parent` have what these limits need.
    pub(super) fn enable(&self, parent: &Path) -> Result<(), LimitsError> {
        delegate(parent, &self.controllers())
    }

    /// Sets them for the cgroup, which must be new.
    pub(super) fn set(&self, folder: &Path) -> Result<(), LimitsError> {
        let write = |what, text: String| {
            fs::write(folder.join(what), text).map_err(|source| LimitsError::Set { what, source })
        };
        if let Some(millis) = self.cpu_millis {
            write("cpu.max", cpu_max(millis))?;
        }
        if let Some(bytes) = self.memory_bytes {
            write("memory.max", bytes.to_string())?;
            write("memory.oom.group", "1".to_owned())?;
            match write("memory.swap.max", "0".to_owned()) {
                // A kernel without swap.
                Err(LimitsError::Set { source, .. })
                    if source.kind() == io::ErrorKind::NotFound => {}
                written => written?,
            }
        }
        if let Some(pids) = self.pids {
            write("pids.max", pids.to_string())?;
        }
        Ok(())
    }
}

/// Switches controllers on for the children of `folder`, and before that for the
/// folder itself, by its parents.
fn delegate(folder: &Path, names: &[&str]) -> Result<(), LimitsError> {
    let read = |what| {
        fs::read_to_string(folder.join(what)).map_err(|source| LimitsError::Set { what, source })
    };
    let missing = without(names, &read(SUBTREE_CONTROL)?);
    if missing.is_empty() {
        return Ok(());
    }
    let lacking = without(&missing, &read(CONTROLLERS)?);
    if !lacking.is_empty() {
        let parent = folder.parent();
        let Some(parent) = parent.filter(|parent| parent.join(CONTROLLERS).exists()) else {
            return Err(LimitsError::NoController(lacking.join(" and ")));
        };
        delegate(parent, &lacking)?;
    }
    let text: Vec<_> = missing.iter().map(|name| format!("+{name}")).collect();
    let text = text.join(" ");
    fs::write(folder.join(SUBTREE_CONTROL), text).map_err(|source| LimitsError::Set {
        what: SUBTREE_CONTROL,
        source,
    })
}

/// Those of `names` that are not among the words of `text`.
fn without<'a>(names: &[&'a str], text: &str) -> Vec<&'a str> {
    let is_there = |name: &&str| text.split_whitespace().any(|word| word == *name);
    let missing = names.iter().copied().filter(|name| !is_there(name));
    missing.collect()
}

/// Quota and period in microseconds: a tenth of a second, or a second where the quota
/// would be less than the kernel takes, a millisecond.
fn cpu_max(millis: u64) -> String {
    let period_us = if millis < 10 { 1_000_000 } else { 100_000 };
    format!("{} {period_us}", millis * period_us / 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(limits: CgroupLimits) -> Result<Option<Limits>, Vec<String>> {
        let mut violations = Violations::default();
        let limits = Limits::check(&limits, &mut violations);
        let fields: Vec<_> = violations.0.into_iter().map(|v| v.field).collect();
        if fields.is_empty() {
            Ok(limits)
        } else {
            Err(fields)
        }
    }

    #[test]
    fn limits_are_checked_and_none_is_none() {
        assert_eq!(check(CgroupLimits::default()), Ok(None));
        let sound = CgroupLimits {
            cpu_millis: Some(1),
            memory_bytes: Some(1 << 20),
            pids: Some(1),
        };
        let limits = check(sound).unwrap().unwrap();
        assert_eq!(limits.controllers(), ["cpu", "memory", "pids"]);
        for number in [0, u64::MAX] {
            let wrong = CgroupLimits {
                cpu_millis: Some(number),
                memory_bytes: Some(number),
                pids: Some(number),
            };
            let fields = ["cpu_millis", "memory_bytes", "pids"];
            let fields = fields.map(|field| format!("start.cgroup.{field}"));
            assert_eq!(check(wrong), Err(fields.to_vec()));
        }
    }

    #[test]
    fn the_kernel_takes_every_share_of_a_cpu() {
        assert_eq!(cpu_max(1), "1000 1000000");
        assert_eq!(cpu_max(9), "9000 1000000");
        assert_eq!(cpu_max(10), "1000 100000");
        assert_eq!(cpu_max(1500), "150000 100000");
        assert_eq!(cpu_max(MAX_CPU_MILLIS), "100000000 100000");
    }

    // A folder that is not cgroup2's, but has its files.
    #[test]
    fn controllers_are_switched_on_from_the_top_down() {
        let root = tempfile::tempdir().unwrap();
        let (middle, below) = (root.path().join("a"), root.path().join("a/b"));
        fs::create_dir_all(&below).unwrap();
        let file = |folder: &Path, name: &str, text: &str| {
            fs::write(folder.join(name), text).unwrap();
        };
        let on = |folder: &Path| fs::read_to_string(folder.join(SUBTREE_CONTROL)).unwrap();
        file(root.path(), CONTROLLERS, "cpuset cpu io memory\n");
        file(root.path(), SUBTREE_CONTROL, "memory\n");
        file(&middle, CONTROLLERS, "memory\n");
        file(&middle, SUBTREE_CONTROL, "");
        file(&below, CONTROLLERS, "");
        file(&below, SUBTREE_CONTROL, "");
        delegate(&below, &["cpu", "memory"]).unwrap();
        assert_eq!(on(root.path()), "+cpu");
        assert_eq!(on(&middle), "+cpu +memory");
        assert_eq!(on(&below), "+cpu +memory");

        let none = delegate(&below, &["pids", "memory"]).unwrap_err();
        assert!(matches!(none, LimitsError::NoController(names) if names == "pids"));
    }
}
