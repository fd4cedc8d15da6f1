use super::PAGES_PER_MIB;
use crate::devices::virtio::Counters;

/// What the balloon has done since it was made.
#[derive(Debug, Default)]
pub(super) struct Metrics {
    /// Pages given back because the guest was asked to.
    pub(super) inflated_pages: u64,
    /// Bytes given back because the guest had no use for them.
    pub(super) reported_bytes: u64,
    /// Buffers and pages that could not be taken.
    pub(super) failures: u64,
}

// === impl Metrics ===

impl Metrics {
    pub(super) fn counters(&self, target_pages: u32, actual_pages: u32) -> Counters {
        Counters::from([
            ("target_mib", u64::from(target_pages / PAGES_PER_MIB)),
            ("actual_mib", u64::from(actual_pages / PAGES_PER_MIB)),
            ("inflated_pages", self.inflated_pages),
            ("reported_bytes", self.reported_bytes),
            ("failures", self.failures),
        ])
    }
}
