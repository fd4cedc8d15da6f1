//! The machine's two address spaces and which device answers where.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::devices::Device;
use crate::devices::virtio::Interrupt;

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
    entries: Vec<Entry>,
}

struct Entry {
    range: Range,
    device: SharedDevice,
    interrupt: Option<Interrupt>,
}

// === impl Bus ===

impl Bus {
    pub fn insert(&mut self, range: Range, device: SharedDevice) -> Result<(), Overlap> {
        if let Some(taken) = self.entries.iter().find(|e| e.range.overlaps(&range)) {
            return Err(Overlap(taken.range, range));
        }
        let interrupt = lock(&device).interrupt();
        self.entries.push(Entry {
            range,
            device,
            interrupt,
        });
        Ok(())
    }

    /// Reads from the device at `address`; where there is none, all ones, as on
    /// a bus that nothing drives. Returns whether a device answered.
    pub fn read(&self, space: Space, address: u64, data: &mut [u8]) -> bool {
        match self.find(space, address, data.len()) {
            Some((offset, entry)) => {
                let interrupt = entry.interrupt.as_ref();
                if !interrupt.is_some_and(|interrupt| interrupt.read(offset, data)) {
                    lock(&entry.device).read(offset, data);
                }
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
        let Some((offset, entry)) = self.find(space, address, data.len()) else {
            return false;
        };
        let interrupt = entry.interrupt.as_ref();
        if !interrupt.is_some_and(|interrupt| interrupt.write(offset, data)) {
            lock(&entry.device).write(offset, data);
        }
        true
    }

    fn find(&self, space: Space, address: u64, bytes: usize) -> Option<(u64, &Entry)> {
        self.entries.iter().find_map(|entry| {
            let range = &entry.range;
            let offset = address.checked_sub(range.start)?;
            let end = offset.checked_add(bytes as u64)?;
            (range.space == space && end <= range.bytes).then_some((offset, entry))
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
    use virtio_bindings::virtio_mmio::{
        VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS,
    };
    use vmm_sys_util::eventfd::EventFd;

    use super::*;
    use crate::devices::Counters;

    struct Echo(Vec<u8>);

    struct Interrupting(Interrupt);

    impl Device for Interrupting {
        fn interrupt(&self) -> Option<Interrupt> {
            Some(self.0.clone())
        }
        fn counters(&self) -> Counters {
            Counters::new()
        }
    }

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
    fn an_interrupt_is_handled_while_its_device_is_busy() {
        let interrupt = Interrupt::new(EventFd::new(0).unwrap());
        let device = Arc::new(Mutex::new(Interrupting(interrupt.clone())));
        let mut bus = Bus::default();
        bus.insert(range(Space::Memory, 0x1000, 0x200), device.clone())
            .unwrap();
        let busy = device.lock().unwrap();
        interrupt.signal_config_change();
        let mut status = [0; 4];
        let (status_at, ack_at) = (
            0x1000 + u64::from(VIRTIO_MMIO_INTERRUPT_STATUS),
            0x1000 + u64::from(VIRTIO_MMIO_INTERRUPT_ACK),
        );
        assert!(bus.read(Space::Memory, status_at, &mut status));
        assert_eq!(u32::from_le_bytes(status), VIRTIO_MMIO_INT_CONFIG);
        assert!(bus.write(Space::Memory, ack_at, &status));
        assert_eq!(interrupt.status(), 0);
        drop(busy);
        // Not of their width: the device's own affair.
        assert!(bus.read(Space::Memory, status_at, &mut [0; 2]));
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
