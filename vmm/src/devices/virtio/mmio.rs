//! The virtio-mmio transport, version 2 (virtio 1.2, section 4.2).

use std::os::fd::BorrowedFd;

use acpi_tables::aml::{Device as AmlDevice, Interrupt as AmlInterrupt, Memory32Fixed, Name};
use acpi_tables::aml::{Path, ResourceTemplate};
use acpi_tables::{Aml, AmlSink};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueState, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::{Activation, ChipState, Interrupt, VirtioDevice};
use crate::devices::{Chip, Counters, Device, DeviceState, Place, StateError};
use crate::machine::{Wire, layout};
use crate::memory::GuestMemory;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// Not registered with anyone; drivers ignore it.
const VENDOR: u32 = 0x4c55_4f53;

/// A chip, seen through virtio-mmio's registers.
pub struct VirtioMmio {
    chip: Box<dyn VirtioDevice>,
    memory: GuestMemory,
    interrupt: Interrupt,
    /// The queues while the driver sets them up; empty once the chip has them.
    queues: Vec<Queue>,
    doorbells: Vec<EventFd>,
    status: u32,
    features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    activated: bool,
}

/// What is saved of a transport and its chip.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    pub status: u32,
    pub features_select: u32,
    pub driver_features_select: u32,
    pub driver_features: u64,
    pub queue_select: u32,
    pub activated: bool,
    pub interrupt_status: u32,
    pub queues: Vec<SavedQueue>,
    pub chip: ChipState,
}

/// A virtqueue, but what the chip decides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedQueue {
    pub size: u16,
    pub ready: bool,
    pub next_avail: u16,
    pub next_used: u16,
    pub event_idx: bool,
    pub desc_table: u64,
    pub avail_ring: u64,
    pub used_ring: u64,
}

// === impl VirtioMmio ===

impl VirtioMmio {
    /// `wire` has a doorbell for each of the chip's queues.
    pub fn new(chip: Box<dyn VirtioDevice>, memory: GuestMemory, wire: Wire) -> Self {
        let mut transport = Self {
            chip,
            memory,
            interrupt: Interrupt::new(wire.interrupt),
            queues: Vec::new(),
            doorbells: wire.doorbells,
            status: 0,
            features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            activated: false,
        };
        transport.queues = transport.fresh_queues();
        transport
    }

    fn fresh_queues(&self) -> Vec<Queue> {
        self.chip
            .queue_sizes()
            .iter()
            // A chip's sizes are constants; a test of each chip activates it.
            .filter_map(|size| Queue::new(*size).ok())
            .collect()
    }

    /// The queues of a saved transport, checked as the driver's own words are.
    fn saved_queues(&self, state: &TransportState) -> Result<Vec<Queue>, StateError> {
        let sizes = self.chip.queue_sizes();
        if state.queues.len() != sizes.len() {
            let problem = "not one of this device's";
            return Err(StateError::Queue {
                queue: state.queues.len(),
                problem,
            });
        }
        let in_use = self.chip.queues_in_use(state.driver_features);
        let mut queues = Vec::with_capacity(sizes.len());
        for (index, (saved, max_size)) in state.queues.iter().zip(sizes).enumerate() {
            let bad = |problem| StateError::Queue {
                queue: index,
                problem,
            };
            let queue = Queue::try_from(QueueState {
                max_size: *max_size,
                size: saved.size,
                ready: saved.ready,
                next_avail: saved.next_avail,
                next_used: saved.next_used,
                event_idx_enabled: saved.event_idx,
                desc_table: saved.desc_table,
                avail_ring: saved.avail_ring,
                used_ring: saved.used_ring,
            })
            .map_err(|_| bad("of a size or at an address that no queue has"))?;
            if state.activated && index < in_use && !queue.is_valid(&self.memory) {
                return Err(bad("in use but not ready, or not in guest memory"));
            }
            queues.push(queue);
        }
        Ok(queues)
    }

    fn device_features(&self) -> u64 {
        self.chip.features() | (1 << VIRTIO_F_VERSION_1)
    }

    fn has_status(&self, bits: u32) -> bool {
        self.status & bits == bits
    }

    fn selected_queue(&mut self) -> Option<&mut Queue> {
        self.queues.get_mut(self.queue_select as usize)
    }

    /// Queues may be changed only between FEATURES_OK and DRIVER_OK.
    fn configurable_queue(&mut self) -> Option<&mut Queue> {
        let may = self.has_status(VIRTIO_CONFIG_S_FEATURES_OK)
            && self.status & (VIRTIO_CONFIG_S_DRIVER_OK | VIRTIO_CONFIG_S_FAILED) == 0;
        if may { self.selected_queue() } else { None }
    }

    fn read_register(&mut self, offset: u32) -> u32 {
        match offset {
            reg::VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            reg::VIRTIO_MMIO_VERSION => VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => self.chip.device_id(),
            reg::VIRTIO_MMIO_VENDOR_ID => VENDOR,
            reg::VIRTIO_MMIO_DEVICE_FEATURES => match self.features_select {
                0 => self.device_features() as u32,
                1 => (self.device_features() >> 32) as u32,
                _ => 0,
            },
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX => {
                let select = self.queue_select as usize;
                self.chip
                    .queue_sizes()
                    .get(select)
                    .copied()
                    .map_or(0, u32::from)
            }
            reg::VIRTIO_MMIO_QUEUE_READY => {
                let activated = self.activated;
                self.selected_queue()
                    .map_or(u32::from(activated), |queue| u32::from(queue.ready()))
            }
            reg::VIRTIO_MMIO_STATUS => self.status,
            // What changes in our chips' configuration while they run is of one
            // access, so no driver can read it half changed.
            reg::VIRTIO_MMIO_CONFIG_GENERATION => 0,
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u32, value: u32) {
        match offset {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.features_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.driver_features_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES => self.accept_features(value),
            reg::VIRTIO_MMIO_QUEUE_SEL => self.queue_select = value,
            reg::VIRTIO_MMIO_QUEUE_NUM => {
                // Queue::set_size refuses what is not a power of two within its
                // maximum and keeps the old size; is_valid() has the last word.
                if let (Some(queue), Ok(size)) = (self.configurable_queue(), u16::try_from(value)) {
                    queue.set_size(size);
                }
            }
            reg::VIRTIO_MMIO_QUEUE_READY => {
                if let Some(queue) = self.configurable_queue() {
                    queue.set_ready(value == 1);
                }
            }
            reg::VIRTIO_MMIO_STATUS => self.write_status(value),
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => {
                self.set_address(Queue::set_desc_table_address, value, false);
            }
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => {
                self.set_address(Queue::set_desc_table_address, value, true);
            }
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => {
                self.set_address(Queue::set_avail_ring_address, value, false);
            }
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => {
                self.set_address(Queue::set_avail_ring_address, value, true);
            }
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => {
                self.set_address(Queue::set_used_ring_address, value, false);
            }
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => {
                self.set_address(Queue::set_used_ring_address, value, true);
            }
            // QueueNotify goes to KVM's ioeventfd; what comes here is a notify
            // of a queue that does not exist, or of a width KVM does not match.
            reg::VIRTIO_MMIO_QUEUE_NOTIFY => self.notify(value as usize),
            _ => {}
        }
    }

    fn set_address(
        &mut self,
        set: fn(&mut Queue, Option<u32>, Option<u32>),
        value: u32,
        high: bool,
    ) {
        if let Some(queue) = self.configurable_queue() {
            if high {
                set(queue, None, Some(value));
            } else {
                set(queue, Some(value), None);
            }
        }
    }

    fn accept_features(&mut self, value: u32) {
        // Only before FEATURES_OK (section 3.1.1).
        if self.has_status(VIRTIO_CONFIG_S_FEATURES_OK) {
            return;
        }
        let (mask, bits) = match self.driver_features_select {
            0 => (0xffff_ffff, u64::from(value)),
            1 => (0xffff_ffff << 32, u64::from(value) << 32),
            _ => return,
        };
        self.driver_features = (self.driver_features & !mask) | bits;
    }

    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        // Bits are only ever added; a driver clears them by a reset.
        let added = value & !self.status;
        if added & VIRTIO_CONFIG_S_ACKNOWLEDGE != 0 {
            self.status |= VIRTIO_CONFIG_S_ACKNOWLEDGE;
        }
        if added & VIRTIO_CONFIG_S_DRIVER != 0 {
            self.status |= VIRTIO_CONFIG_S_DRIVER;
        }
        if added & VIRTIO_CONFIG_S_FAILED != 0 {
            self.status |= VIRTIO_CONFIG_S_FAILED;
        }
        if added & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            // The driver reads back whether the bit stuck: it does not when it
            // asked for what was not offered, or for a legacy device.
            let offered = self.driver_features & !self.device_features() == 0;
            let modern = self.driver_features & (1 << VIRTIO_F_VERSION_1) != 0;
            if offered && modern && self.has_status(VIRTIO_CONFIG_S_DRIVER) {
                self.status |= VIRTIO_CONFIG_S_FEATURES_OK;
            }
        }
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0
            && self.has_status(VIRTIO_CONFIG_S_FEATURES_OK)
            && !self.has_status(VIRTIO_CONFIG_S_FAILED)
        {
            self.status |= VIRTIO_CONFIG_S_DRIVER_OK;
            self.activate();
        }
    }

    fn activate(&mut self) {
        let mut queues = std::mem::take(&mut self.queues);
        let event_idx = self.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        for queue in &mut queues {
            queue.set_event_idx(event_idx);
        }
        let in_use = self.chip.queues_in_use(self.driver_features);
        let mut queues_in_use = queues.iter().take(in_use);
        let valid = queues_in_use.all(|queue| queue.is_valid(&self.memory));
        let activated = valid
            && self
                .chip
                .activate(Activation {
                    memory: self.memory.clone(),
                    queues,
                    interrupt: self.interrupt.clone(),
                    features: self.driver_features,
                })
                .is_ok();
        if activated {
            self.activated = true;
        } else {
            // The driver can change them no more, but a snapshot has them all.
            self.queues = self.fresh_queues();
            self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
            self.interrupt.signal_config_change();
        }
    }

    fn reset(&mut self) {
        if self.activated {
            self.chip.reset();
        }
        self.activated = false;
        self.status = 0;
        self.features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.interrupt.acknowledge(u32::MAX);
        self.queues = self.fresh_queues();
    }

    fn notify(&mut self, queue: usize) {
        if self.activated && queue < self.doorbells.len() {
            self.chip.queue_notified(queue);
        }
    }
}

impl Device for VirtioMmio {
    fn describe(&self, place: &Place, sink: &mut dyn AmlSink) {
        let (Some(range), Some(gsi)) = (place.range, place.gsi) else {
            return;
        };
        // Linux names virtio-mmio devices after their ACPI path's unit.
        let uid = ((range.start - layout::VIRTIO_MMIO_START) / layout::VIRTIO_MMIO_BYTES) as u8;
        AmlDevice::new(
            Path::new(&format!("VR{uid:02}")),
            vec![
                &Name::new("_HID".into(), &"LNRO0005"),
                &Name::new("_UID".into(), &uid),
                &Name::new("_CCA".into(), &1u8),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &Memory32Fixed::new(true, range.start as u32, range.bytes as u32),
                        &AmlInterrupt::new(true, true, false, false, gsi),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let config = u64::from(reg::VIRTIO_MMIO_CONFIG);
        if offset >= config {
            self.chip.read_config(offset - config, data);
        } else if let (Ok(offset), Ok(word)) =
            (u32::try_from(offset), <&mut [u8; 4]>::try_from(&mut *data))
        {
            // Registers are 32 bits wide (section 4.2.2.2).
            *word = self.read_register(offset).to_le_bytes();
        } else {
            data.fill(0);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let config = u64::from(reg::VIRTIO_MMIO_CONFIG);
        if offset >= config {
            self.chip.write_config(offset - config, data);
        } else if let (Ok(offset), Ok(word)) = (u32::try_from(offset), <[u8; 4]>::try_from(data)) {
            self.write_register(offset, u32::from_le_bytes(word));
        }
    }

    fn interrupt(&self) -> Option<Interrupt> {
        Some(self.interrupt.clone())
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        self.doorbells
            .iter()
            .map(crate::sys::borrow_fd)
            .chain(self.chip.sources())
            .collect()
    }

    fn source_ready(&mut self, source: usize) {
        match self.doorbells.get(source) {
            Some(doorbell) => {
                let _ = doorbell.read();
                self.notify(source);
            }
            None => self.chip.source_ready(source - self.doorbells.len()),
        }
    }

    fn pause(&mut self) {
        if self.activated {
            self.queues = self.chip.quiesce();
        }
    }

    fn save(&self) -> DeviceState {
        DeviceState::Virtio(TransportState {
            status: self.status,
            features_select: self.features_select,
            driver_features_select: self.driver_features_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select,
            activated: self.activated,
            interrupt_status: self.interrupt.status(),
            queues: self.queues.iter().map(SavedQueue::of).collect(),
            chip: self.chip.save(),
        })
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        let DeviceState::Virtio(state) = state else {
            return Err(StateError::Kind);
        };
        let offered = self.device_features();
        if state.driver_features & !offered != 0 {
            return Err(StateError::Chip(
                "the driver accepted features that the device lacks".into(),
            ));
        }
        if state.activated && state.status & VIRTIO_CONFIG_S_DRIVER_OK == 0 {
            return Err(StateError::Chip(
                "it is in use, though its driver never said that it is ready".into(),
            ));
        }
        self.queues = self.saved_queues(&state)?;
        self.status = state.status;
        self.features_select = state.features_select;
        self.driver_features_select = state.driver_features_select;
        self.driver_features = state.driver_features;
        self.queue_select = state.queue_select;
        self.activated = state.activated;
        self.interrupt.set_status(state.interrupt_status);
        self.chip.restore(state.chip)
    }

    fn resume(&mut self) {
        if !self.activated {
            return;
        }
        self.activated = false;
        self.activate();
        // Doorbells that rang and interrupts that were raised as the machine
        // stopped are with the eventfds of the machine that was. Drivers bear
        // both without cause.
        for queue in 0..self.doorbells.len() {
            self.notify(queue);
        }
        self.interrupt.signal_used_queue();
    }

    fn chip(&mut self) -> Chip<'_> {
        self.chip.chip()
    }

    fn counters(&self) -> Counters {
        self.chip.counters()
    }
}

// === impl SavedQueue ===

impl SavedQueue {
    fn of(queue: &Queue) -> Self {
        let state = queue.state();
        Self {
            size: state.size,
            ready: state.ready,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx: state.event_idx_enabled,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::{ActivateError, read_config_space};
    use proptest::prelude::*;
    use std::sync::{Arc, Mutex};
    use vm_memory::GuestAddress;

    #[derive(Default)]
    struct Log {
        activations: usize,
        resets: usize,
        notified: Vec<usize>,
    }

    struct Logged(Arc<Mutex<Log>>, Vec<Queue>);

    impl VirtioDevice for Logged {
        fn device_id(&self) -> u32 {
            4
        }
        fn queue_sizes(&self) -> &[u16] {
            &[16, 8]
        }
        fn features(&self) -> u64 {
            1 << VIRTIO_RING_F_EVENT_IDX
        }
        fn read_config(&self, offset: u64, data: &mut [u8]) {
            read_config_space(&[1, 2, 3, 4], offset, data);
        }
        fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
            assert_eq!(activation.queues.len(), 2);
            self.0.lock().unwrap().activations += 1;
            self.1 = activation.queues;
            Ok(())
        }
        fn queue_notified(&mut self, queue: usize) {
            self.0.lock().unwrap().notified.push(queue);
        }
        fn reset(&mut self) {
            self.0.lock().unwrap().resets += 1;
        }
        fn quiesce(&mut self) -> Vec<Queue> {
            self.1.drain(..).collect()
        }
        fn save(&self) -> ChipState {
            ChipState::Rng
        }
        fn restore(&mut self, _: ChipState) -> Result<(), StateError> {
            Ok(())
        }
        fn counters(&self) -> Counters {
            Counters::new()
        }
    }

    fn transport() -> (VirtioMmio, Arc<Mutex<Log>>) {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap();
        let log = Arc::new(Mutex::new(Log::default()));
        let chip = Box::new(Logged(log.clone(), Vec::new()));
        (VirtioMmio::new(chip, memory, Wire::new(2).unwrap()), log)
    }

    fn write(mmio: &mut VirtioMmio, register: u32, value: u32) {
        mmio.write(u64::from(register), &value.to_le_bytes());
    }

    fn read(mmio: &mut VirtioMmio, register: u32) -> u32 {
        let mut data = [0; 4];
        mmio.read(u64::from(register), &mut data);
        u32::from_le_bytes(data)
    }

    fn negotiate(mmio: &mut VirtioMmio, features: u64) -> u32 {
        write(mmio, reg::VIRTIO_MMIO_STATUS, VIRTIO_CONFIG_S_ACKNOWLEDGE);
        write(mmio, reg::VIRTIO_MMIO_STATUS, 3);
        for (select, bits) in [(0, features as u32), (1, (features >> 32) as u32)] {
            write(mmio, reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            write(mmio, reg::VIRTIO_MMIO_DRIVER_FEATURES, bits);
        }
        write(
            mmio,
            reg::VIRTIO_MMIO_STATUS,
            3 | VIRTIO_CONFIG_S_FEATURES_OK,
        );
        read(mmio, reg::VIRTIO_MMIO_STATUS)
    }

    fn set_up_queue(mmio: &mut VirtioMmio, queue: u32, base: u32) {
        write(mmio, reg::VIRTIO_MMIO_QUEUE_SEL, queue);
        write(mmio, reg::VIRTIO_MMIO_QUEUE_NUM, 8);
        write(mmio, reg::VIRTIO_MMIO_QUEUE_DESC_LOW, base);
        write(mmio, reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, base + 0x400);
        write(mmio, reg::VIRTIO_MMIO_QUEUE_USED_LOW, base + 0x800);
        write(mmio, reg::VIRTIO_MMIO_QUEUE_READY, 1);
    }

    #[test]
    fn a_driver_sets_up_and_resets() {
        let (mut mmio, log) = transport();
        assert_eq!(read(&mut mmio, reg::VIRTIO_MMIO_MAGIC_VALUE), MAGIC);
        assert_eq!(read(&mut mmio, reg::VIRTIO_MMIO_QUEUE_NUM_MAX), 16);
        assert_eq!(negotiate(&mut mmio, 1 << VIRTIO_F_VERSION_1), 11);
        set_up_queue(&mut mmio, 0, 0x1000);
        set_up_queue(&mut mmio, 1, 0x2000);
        write(&mut mmio, reg::VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        write(&mut mmio, reg::VIRTIO_MMIO_STATUS, 15);
        assert_eq!(read(&mut mmio, reg::VIRTIO_MMIO_STATUS), 15);
        assert_eq!(read(&mut mmio, reg::VIRTIO_MMIO_QUEUE_READY), 1);
        write(&mut mmio, reg::VIRTIO_MMIO_QUEUE_NOTIFY, 1);
        write(&mut mmio, reg::VIRTIO_MMIO_QUEUE_NOTIFY, 2);
        write(&mut mmio, reg::VIRTIO_MMIO_STATUS, 0);
        let log = log.lock().unwrap();
        assert_eq!((log.activations, log.resets), (1, 1));
        assert_eq!(
            log.notified,
            [1],
            "before DRIVER_OK and past the end: nothing"
        );
        assert_eq!(read(&mut mmio, reg::VIRTIO_MMIO_QUEUE_READY), 0);
    }

    #[test]
    fn features_that_were_not_offered_are_refused() {
        let (mut mmio, _) = transport();
        assert_eq!(negotiate(&mut mmio, (1 << VIRTIO_F_VERSION_1) | 2), 3);
        write(&mut mmio, reg::VIRTIO_MMIO_STATUS, 0);
        assert_eq!(negotiate(&mut mmio, 0), 3, "a legacy driver");
    }

    #[test]
    fn queues_outside_memory_are_refused() {
        let (mut mmio, log) = transport();
        negotiate(&mut mmio, 1 << VIRTIO_F_VERSION_1);
        set_up_queue(&mut mmio, 0, 0x1000);
        set_up_queue(&mut mmio, 1, 0xffff_f000);
        write(&mut mmio, reg::VIRTIO_MMIO_STATUS, 15);
        let status = read(&mut mmio, reg::VIRTIO_MMIO_STATUS);
        assert_eq!(
            status & VIRTIO_CONFIG_S_NEEDS_RESET,
            VIRTIO_CONFIG_S_NEEDS_RESET
        );
        assert_eq!(log.lock().unwrap().activations, 0);
    }

    proptest! {
        /// Whatever a guest reads and writes, the transport stands.
        #[test]
        fn any_access_is_survived(
            accesses in prop::collection::vec((any::<bool>(), 0..0x200u64, 1..9usize, any::<u64>()), 0..200)
        ) {
            let (mut mmio, log) = transport();
            for (is_write, offset, width, value) in accesses {
                let mut data = value.to_le_bytes();
                if is_write {
                    mmio.write(offset, &data[..width]);
                } else {
                    mmio.read(offset, &mut data[..width]);
                }
            }
            let log = log.lock().unwrap();
            prop_assert!(log.resets <= log.activations);
        }
    }
}
