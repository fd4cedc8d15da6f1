//! Who may have how much of this host. A reservation is atomic over vCPUs,
//! memory and disk, and ends when it is dropped.

use std::sync::{Arc, Mutex};

use crate::record::Resources;
use crate::sync::lock;

/// Amounts of a whole host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Amounts {
    pub vcpus: u64,
    pub memory_mib: u64,
    pub disk_mib: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this node has too little left: {}; delete sandboxes, ask for less, or try another node", .short.join(", "))]
pub struct Exhausted {
    /// What is short, as "memory_mib (512 wanted, 100 left)".
    pub short: Vec<String>,
}

#[derive(Debug)]
pub struct Admission {
    capacity: Amounts,
    used: Mutex<Amounts>,
}

/// A part of the host, given back when dropped.
#[derive(Debug)]
pub struct Reservation {
    admission: Arc<Admission>,
    taken: Amounts,
}

// === impl Admission ===

impl Admission {
    pub fn new(capacity: Amounts) -> Arc<Self> {
        Arc::new(Self {
            capacity,
            used: Mutex::default(),
        })
    }

    pub fn capacity(&self) -> Amounts {
        self.capacity
    }

    /// What is left; zero where a smaller configuration has overtaken
    /// sandboxes that exist.
    pub fn allocatable(&self) -> Amounts {
        self.capacity.minus(*lock(&self.used))
    }

    /// Takes all of `wanted`, or nothing.
    pub fn reserve(self: &Arc<Self>, wanted: Resources) -> Result<Reservation, Exhausted> {
        self.take(wanted.into())
    }

    /// Takes `wanted` as many times as asked, or nothing.
    pub fn reserve_many(
        self: &Arc<Self>,
        wanted: Resources,
        count: u32,
    ) -> Result<Vec<Reservation>, Exhausted> {
        let each = Amounts::from(wanted);
        let mut all = self.take(each.times(count.into()))?;
        Ok((0..count).map(|_| all.split(each)).collect())
    }

    fn take(self: &Arc<Self>, taken: Amounts) -> Result<Reservation, Exhausted> {
        let mut used = lock(&self.used);
        let left = self.capacity.minus(*used);
        let short: Vec<String> = [
            ("vcpus", taken.vcpus, left.vcpus),
            ("memory_mib", taken.memory_mib, left.memory_mib),
            ("disk_mib", taken.disk_mib, left.disk_mib),
        ]
        .into_iter()
        .filter(|(_, wanted, left)| wanted > left)
        .map(|(name, wanted, left)| format!("{name} ({wanted} wanted, {left} left)"))
        .collect();
        if !short.is_empty() {
            return Err(Exhausted { short });
        }
        *used = used.plus(taken);
        Ok(self.reservation(taken))
    }

    /// Takes `existing` even beyond the capacity: for a sandbox that runs
    /// already, which counting cannot undo.
    pub fn adopt(self: &Arc<Self>, existing: impl Into<Amounts>) -> Reservation {
        let taken = existing.into();
        let mut used = lock(&self.used);
        *used = used.plus(taken);
        self.reservation(taken)
    }

    fn reservation(self: &Arc<Self>, taken: Amounts) -> Reservation {
        Reservation {
            admission: Arc::clone(self),
            taken,
        }
    }
}

// === impl Reservation ===

impl Reservation {
    /// Gives vCPUs and memory back, and keeps the disk.
    pub fn release_machine(&mut self) {
        let disk = Amounts {
            disk_mib: self.taken.disk_mib,
            ..Amounts::default()
        };
        drop(self.split(self.taken.minus(disk)));
    }

    /// Takes vCPUs and memory again, both or neither.
    pub fn regain_machine(&mut self, resources: Resources) -> Result<(), Exhausted> {
        let machine = Amounts {
            disk_mib: 0,
            ..Amounts::from(resources)
        };
        let mut more = self.admission.take(machine)?;
        self.taken = self.taken.plus(more.taken);
        more.taken = Amounts::default();
        Ok(())
    }

    /// Moves `part`, which it holds, into a reservation of its own.
    fn split(&mut self, part: Amounts) -> Self {
        self.taken = self.taken.minus(part);
        self.admission.reservation(part)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut used = lock(&self.admission.used);
        *used = used.minus(self.taken);
    }
}

// === impl Amounts ===

impl Amounts {
    fn plus(self, other: Self) -> Self {
        Self {
            vcpus: self.vcpus.saturating_add(other.vcpus),
            memory_mib: self.memory_mib.saturating_add(other.memory_mib),
            disk_mib: self.disk_mib.saturating_add(other.disk_mib),
        }
    }

    fn minus(self, other: Self) -> Self {
        Self {
            vcpus: self.vcpus.saturating_sub(other.vcpus),
            memory_mib: self.memory_mib.saturating_sub(other.memory_mib),
            disk_mib: self.disk_mib.saturating_sub(other.disk_mib),
        }
    }
}

impl Amounts {
    fn times(self, count: u64) -> Self {
        Self {
            vcpus: self.vcpus.saturating_mul(count),
            memory_mib: self.memory_mib.saturating_mul(count),
            disk_mib: self.disk_mib.saturating_mul(count),
        }
    }

    /// What a sandbox takes that does not run.
    pub fn disk_of(resources: Resources) -> Self {
        Self {
            disk_mib: resources.disk_mib.into(),
            ..Self::default()
        }
    }
}

impl From<Resources> for Amounts {
    fn from(resources: Resources) -> Self {
        Self {
            vcpus: resources.vcpus.into(),
            memory_mib: resources.memory_mib.into(),
            disk_mib: resources.disk_mib.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CAPACITY: Amounts = Amounts {
        vcpus: 8,
        memory_mib: 1024,
        disk_mib: 4096,
    };

    fn resources(vcpus: u32, memory_mib: u32, disk_mib: u32) -> Resources {
        Resources {
            vcpus,
            memory_mib,
            disk_mib,
        }
    }

    #[test]
    fn a_refusal_takes_nothing_and_names_all_that_is_short() {
        let admission = Admission::new(CAPACITY);
        let _some = admission.reserve(resources(4, 1000, 0)).unwrap();
        let before = admission.allocatable();
        let error = admission.reserve(resources(5, 100, 1)).unwrap_err();
        assert_eq!(
            error.short,
            [
                "vcpus (5 wanted, 4 left)",
                "memory_mib (100 wanted, 24 left)"
            ]
        );
        assert_eq!(admission.allocatable(), before);
    }

    #[test]
    fn what_exists_is_adopted_beyond_the_capacity() {
        let admission = Admission::new(CAPACITY);
        let existing = admission.adopt(resources(32, 128, 0));
        assert_eq!(admission.allocatable().vcpus, 0);
        assert!(admission.reserve(resources(1, 128, 0)).is_err());
        drop(existing);
        assert_eq!(admission.allocatable(), CAPACITY);
    }

    #[test]
    fn many_are_reserved_together_or_not_at_all() {
        let admission = Admission::new(CAPACITY);
        let error = admission
            .reserve_many(resources(3, 100, 10), 3)
            .unwrap_err();
        assert_eq!(error.short, ["vcpus (9 wanted, 8 left)"]);
        let mut all = admission.reserve_many(resources(2, 100, 10), 3).unwrap();
        assert_eq!((all.len(), admission.allocatable().vcpus), (3, 2));
        all.truncate(1);
        assert_eq!(admission.allocatable().memory_mib, 924);
    }

    #[test]
    fn a_pause_keeps_only_the_disk() {
        let admission = Admission::new(CAPACITY);
        let mut paused = admission.reserve(resources(4, 1000, 96)).unwrap();
        paused.release_machine();
        let left = admission.allocatable();
        assert_eq!(
            (left.vcpus, left.memory_mib, left.disk_mib),
            (8, 1024, 4000)
        );
        let other = admission.reserve(resources(5, 24, 0)).unwrap();
        assert!(paused.regain_machine(resources(4, 1000, 96)).is_err());
        drop(other);
        paused.regain_machine(resources(4, 1000, 96)).unwrap();
        assert_eq!(admission.allocatable().memory_mib, 24);
        drop(paused);
        assert_eq!(admission.allocatable(), CAPACITY);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        /// Four threads that reserve and release at random never hold more
        /// than there is, and give all of it back.
        #[test]
        fn never_oversold(wanted in prop::collection::vec((1..6_u32, 1..600_u32, 0..3000_u32), 8..64)) {
            let admission = Admission::new(CAPACITY);
            let held = Mutex::new(Amounts::default());
            std::thread::scope(|scope| {
                for part in wanted.chunks(wanted.len().div_ceil(4)) {
                    let (admission, held) = (&admission, &held);
                    scope.spawn(move || {
                        for &(vcpus, memory_mib, disk_mib) in part {
                            let wanted = resources(vcpus, memory_mib, disk_mib);
                            let Ok(reservation) = admission.reserve(wanted) else { continue };
                            let now = { let mut held = lock(held); *held = held.plus(wanted.into()); *held };
                            assert_eq!(CAPACITY.minus(now).plus(now), CAPACITY, "oversold: {now:?}");
                            std::thread::yield_now();
                            { let mut held = lock(held); *held = held.minus(wanted.into()); }
                            drop(reservation);
                        }
                    });
                }
            });
            prop_assert_eq!(admission.allocatable(), CAPACITY);
        }
    }
}
