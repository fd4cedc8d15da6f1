use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_queue::Queue;

use super::BalloonState;
use crate::devices::virtio::{
    ActivateError, Activation, ChipState, Counters, VirtioDevice, read_config_space,
};
use crate::devices::{Chip, StateError};

/// The balloon device.
#[derive(Debug, Default)]
pub struct Balloon {
    target_pages: u32,
    actual_pages: u32,
    queues: Vec<Queue>,
}

// === impl Balloon ===

impl Balloon {
    /// Inflate, deflate, reporting.
    pub const QUEUES: usize = 3;

    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the guest to give back so much, in MiB, of the memory it has.
    pub fn set_target_mib(&mut self, target_mib: u32) {
        self.target_pages = target_mib.saturating_mul(256);
    }
}

impl VirtioDevice for Balloon {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn queue_sizes(&self) -> &[u16] {
        &[128; Self::QUEUES]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.target_pages.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.queues = activation.queues;
        Ok(())
    }

    fn queue_notified(&mut self, _queue: usize) {}

    fn reset(&mut self) {
        self.queues = Vec::new();
    }

    fn quiesce(&mut self) -> Vec<Queue> {
        std::mem::take(&mut self.queues)
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
        Counters::from([("actual_mib", u64::from(self.actual_pages / 256))])
    }
}
