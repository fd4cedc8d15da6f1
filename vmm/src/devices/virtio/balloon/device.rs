use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_queue::Queue;

use super::metrics::Metrics;
use super::queue::Active;
use super::{
    BalloonState, PAGES_PER_MIB, QUEUE_SIZE, VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
    VIRTIO_BALLOON_F_REPORTING,
};
use crate::devices::virtio::{
    ActivateError, Activation, ChipState, Counters, VirtioDevice, read_config_space,
};
use crate::devices::{Chip, StateError};

/// Where the driver writes how many pages are in the balloon: the second field
/// of `struct virtio_balloon_config` (section 5.5.4).
const CONFIG_ACTUAL: u64 = 4;

/// The balloon device.
#[derive(Debug, Default)]
pub struct Balloon {
    active: Option<Active>,
    target_pages: u32,
    actual_pages: u32,
    metrics: Metrics,
}

// === impl Balloon ===

impl Balloon {
    /// Inflate, deflate, reporting.
    pub const QUEUES: usize = 3;

    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the guest to give back so much, in MiB, of the memory it has. It is
    /// told at once, or when its driver is ready.
    pub fn set_target_mib(&mut self, target_mib: u32) {
        self.target_pages = target_mib.saturating_mul(PAGES_PER_MIB);
        self.tell_target();
    }

    fn tell_target(&self) {
        if let Some(active) = &self.active
            && self.target_pages != self.actual_pages
        {
            active.interrupt().signal_config_change();
        }
    }
}

impl VirtioDevice for Balloon {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; Self::QUEUES]
    }

    fn queues_in_use(&self, driver_features: u64) -> usize {
        match driver_features & 1 << VIRTIO_BALLOON_F_REPORTING {
            0 => Self::QUEUES - 1,
            _ => Self::QUEUES,
        }
    }

    /// VIRTIO_RING_F_EVENT_IDX is not among them: the driver waits for each
    /// buffer, so it would save no notification.
    fn features(&self) -> u64 {
        1 << VIRTIO_BALLOON_F_DEFLATE_ON_OOM | 1 << VIRTIO_BALLOON_F_REPORTING
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = [0; 8];
        space[..4].copy_from_slice(&self.target_pages.to_le_bytes());
        space[4..].copy_from_slice(&self.actual_pages.to_le_bytes());
        read_config_space(&space, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // A driver writes a field with one access of its width (4.2.2.2), and
        // only this one is its to write.
        if offset == CONFIG_ACTUAL
            && let Ok(actual) = data.try_into()
        {
            self.actual_pages = u32::from_le_bytes(actual);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.active = Some(Active::new(activation)?);
        self.tell_target();
        Ok(())
    }

    fn queue_notified(&mut self, queue: usize) {
        if let Some(active) = &mut self.active {
            active.process(queue, &mut self.metrics);
        }
    }

    fn reset(&mut self) {
        self.active = None;
        // The next driver starts with an empty balloon.
        self.actual_pages = 0;
    }

    fn quiesce(&mut self) -> Vec<Queue> {
        // Buffers are served as they are taken: none is in flight.
        self.active
            .take()
            .map_or_else(Vec::new, Active::into_queues)
    }

    fn save(&self) -> ChipState {
        ChipState::Balloon(BalloonState {
            target_pages: self.target_pages,
            actual_pages: self.actual_pages,
        })
    }

    fn restore(&mut self, state: ChipState) -> Result<(), StateError> {
        let ChipState::Balloon(state) = state else {
            return Err(StateError::Kind);
        };
        self.target_pages = state.target_pages;
        self.actual_pages = state.actual_pages;
        Ok(())
    }

    fn chip(&mut self) -> Chip<'_> {
        Chip::Balloon(self)
    }

    fn counters(&self) -> Counters {
        self.metrics.counters(self.target_pages, self.actual_pages)
    }
}
