//! What the device counts. As in the queues' names, rx is host to guest.

use super::super::Counters;

#[derive(Debug, Default)]
pub(super) struct Metrics {
    /// Payload that went to the guest, and came from it.
    pub(super) rx_bytes: u64,
    pub(super) tx_bytes: u64,
    /// Packets of any kind.
    pub(super) rx_packets: u64,
    pub(super) tx_packets: u64,
    pub(super) connections_opened: u64,
    /// Connections that did not end in order: refused, violated or timed out.
    pub(super) connections_reset: u64,
    /// Clients whose CONNECT line was bad, late, or found no room.
    pub(super) handshakes_refused: u64,
    /// Buffers of either queue that no packet could be read from or put in, and
    /// packets that carry another guest's address.
    pub(super) invalid_packets: u64,
    /// Answers dropped because a guest floods the device and reads nothing.
    pub(super) dropped_resets: u64,
}

// === impl Metrics ===

impl Metrics {
    /// With the gauges: connections that exist, those of them that a snapshot
    /// would keep for its clones, and bytes that wait for the host's readers.
    pub(super) fn counters(
        &self,
        connections_open: usize,
        spares_open: usize,
        buffered_bytes: usize,
    ) -> Counters {
        Counters::from([
            ("rx_bytes", self.rx_bytes),
            ("tx_bytes", self.tx_bytes),
            ("rx_packets", self.rx_packets),
            ("tx_packets", self.tx_packets),
            ("connections_opened", self.connections_opened),
            ("connections_open", connections_open as u64),
            ("spares_open", spares_open as u64),
            ("connections_reset", self.connections_reset),
            ("buffered_bytes", buffered_bytes as u64),
            ("handshakes_refused", self.handshakes_refused),
            ("invalid_packets", self.invalid_packets),
            ("dropped_resets", self.dropped_resets),
        ])
    }
}
