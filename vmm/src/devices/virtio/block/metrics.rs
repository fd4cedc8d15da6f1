use crate::devices::virtio::Counters;

/// What a disk has done for its guest. Requests count when they have succeeded,
/// or once under `failures`.
#[derive(Debug, Default)]
pub(super) struct Metrics {
    pub(super) reads: u64,
    pub(super) read_bytes: u64,
    pub(super) writes: u64,
    pub(super) write_bytes: u64,
    pub(super) flushes: u64,
    pub(super) discards: u64,
    pub(super) write_zeroes: u64,
    /// Requests refused or failed, and chains that could not be answered.
    pub(super) failures: u64,
    /// Requests that had to wait for the rate limiter.
    pub(super) throttled: u64,
}

// === impl Metrics ===

impl Metrics {
    /// `layers` are the layer files in use, frozen and top; `layer_blocks` what
    /// the top one holds.
    pub(super) fn counters(&self, layers: usize, layer_blocks: u64) -> Counters {
        Counters::from([
            ("reads", self.reads),
            ("read_bytes", self.read_bytes),
            ("writes", self.writes),
            ("write_bytes", self.write_bytes),
            ("flushes", self.flushes),
            ("discards", self.discards),
            ("write_zeroes", self.write_zeroes),
            ("failures", self.failures),
            ("throttled", self.throttled),
            ("layers", layers as u64),
            ("layer_blocks", layer_blocks),
        ])
    }
}
