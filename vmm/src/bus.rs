//! The machine's two address spaces and which device answers where.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::devices::Device;

/// A device on the bus. vCPU threads and the event loop share it.
pub type SharedDevice = Arc<Mutex<dyn Device>>;

/// One of x86's address spaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// I/O ports.
    Port,
    /// Physical memory.
    Memory,
}

/// A range of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub space: Space,
    pub start: u64,
    pub bytes: u64,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("two devices want the same addresses: {0:x?} and {1:x?}")]
pub struct Overlap(pub Range, pub Range);

/// Finds the device for an address. Immutable once the machine is built, so
/// that vCPUs look things up without a lock.
#[derive(Default)]
pub struct Bus {
    entries: Vec<(Range, SharedDevice)>,
}

// === impl Bus ===

impl Bus {
    pub fn insert(&mut self, range: Range, device: SharedDevice) -> Result<(), Overlap> {
        if let Some((taken, _)) = self.entries.iter().find(|(r, _)| r.overlaps(&range)) {
            return Err(Overlap(*taken, range));
        }
        self.entries.push((range, device));
        Ok(())
    }

    /// Reads from the device at `address`; where there is none, all ones, as on
    /// a bus that nothing drives. Returns whether a device answered.
    pub fn read(&self, space: Space, address: u64, data: &mut [u8]) -> bool {
        match self.find(space, address, data.len()) {
            Some((offset, device)) => {
                lock(device).read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes to the device at `address`; where there is none, the write is
    /// lost. Returns whether a device answered.
    pub fn write(&self, space: Space, address: u64, data: &[u8]) -> bool {
        self.find(space, address, data.len())
            .map(|(offset, device)| lock(device).write(offset, data))
            .is_some()
    }

    fn find(&self, space: Space, address: u64, bytes: usize) -> Option<(u64, &SharedDevice)> {
        self.entries.iter().find_map(|(range, device)| {
            let offset = address.checked_sub(range.start)?;
            let end = offset.checked_add(bytes as u64)?;
            (range.space == space && end <= range.bytes).then_some((offset, device))
        })
    }
}

// === impl Range ===

impl Range {
    fn overlaps(&self, other: &Self) -> bool {
        self.space == other.space
            && self.start < other.start + other.bytes
            && other.start < self.start + self.bytes
    }
}

/// Locks a device. A panic in a device aborts the process, so a poisoned lock
/// is only ever seen by tests.
pub fn lock(device: &SharedDevice) -> MutexGuard<'_, dyn Device + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::Counters;

    struct Echo(Vec<u8>);

    impl Device for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.0.push(offset as u8);
            self.0.extend_from_slice(data);
        }
        fn counters(&self) -> Counters {
            Counters::new()
        }
    }

    fn range(space: Space, start: u64, bytes: u64) -> Range {
        Range {
            space,
            start,
            bytes,
        }
    }

    #[test]
    fn finds_the_device_and_keeps_spaces_apart() {
        let device = Arc::new(Mutex::new(Echo(Vec::new())));
        let mut bus = Bus::default();
        bus.insert(range(Space::Port, 0x10, 4), device.clone())
            .unwrap();
        let mut data = [0u8; 1];
        assert!(bus.read(Space::Port, 0x12, &mut data));
        assert_eq!(data, [2]);
        assert!(!bus.read(Space::Memory, 0x12, &mut data));
        assert_eq!(data, [0xff]);
        assert!(bus.write(Space::Port, 0x13, &[9]));
        assert_eq!(device.lock().unwrap().0, [3, 9]);
    }

    #[test]
    fn an_access_across_the_end_reaches_nothing() {
        let mut bus = Bus::default();
        bus.insert(
            range(Space::Memory, 0x1000, 4),
            Arc::new(Mutex::new(Echo(Vec::new()))),
        )
        .unwrap();
        let mut data = [0u8; 4];
        assert!(!bus.read(Space::Memory, 0x1001, &mut data));
        assert!(!bus.read(Space::Memory, u64::MAX, &mut data));
        assert!(!bus.write(Space::Memory, 0xfff, &data));
    }

    #[test]
    fn ranges_do_not_overlap() {
        let mut bus = Bus::default();
        let device = || Arc::new(Mutex::new(Echo(Vec::new())));
        bus.insert(range(Space::Port, 0x10, 4), device()).unwrap();
        assert!(bus.insert(range(Space::Port, 0x13, 1), device()).is_err());
        assert!(bus.insert(range(Space::Port, 0x14, 1), device()).is_ok());
        assert!(bus.insert(range(Space::Memory, 0x10, 4), device()).is_ok());
    }
}
