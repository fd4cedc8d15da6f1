use crate::devices::virtio::Counters;

/// What the device has done for its guest. Bytes are those of Ethernet frames.
#[derive(Debug, Default)]
pub(super) struct Metrics {
    pub(super) rx: SideMetrics,
    pub(super) tx: SideMetrics,
}

/// One direction. A dropped packet counts under its reason alone.
#[derive(Debug, Default)]
pub(super) struct SideMetrics {
    pub(super) packets: u64,
    pub(super) bytes: u64,
    /// Received for a driver that then went away.
    pub(super) no_buffer: u64,
    /// Chains that hold no packet or no room for one.
    pub(super) malformed: u64,
    /// Longer than a packet can be, or than all buffers of the driver.
    pub(super) too_large: u64,
    pub(super) link_down: u64,
    /// Reads or writes that the TAP refused.
    pub(super) tap_errors: u64,
    /// How often packets had to wait for the rate limiter.
    pub(super) throttled: u64,
}

// === impl Metrics ===

impl Metrics {
    pub(super) fn counters(&self, link_up: bool) -> Counters {
        let Self { rx, tx } = self;
        Counters::from([
            ("link_up", u64::from(link_up)),
            ("rx_packets", rx.packets),
            ("rx_bytes", rx.bytes),
            ("rx_dropped_no_buffer", rx.no_buffer),
            ("rx_malformed", rx.malformed),
            ("rx_dropped_too_large", rx.too_large),
            ("rx_dropped_link_down", rx.link_down),
            ("rx_tap_errors", rx.tap_errors),
            ("rx_throttled", rx.throttled),
            ("tx_packets", tx.packets),
            ("tx_bytes", tx.bytes),
            ("tx_malformed", tx.malformed),
            ("tx_dropped_too_large", tx.too_large),
            ("tx_dropped_link_down", tx.link_down),
            ("tx_tap_errors", tx.tap_errors),
            ("tx_throttled", tx.throttled),
        ])
    }
}
