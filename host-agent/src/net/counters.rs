//! What went through a slot, and what did not.

use std::collections::BTreeMap;
use std::io;

use serde::Deserialize;

use super::rules::{AT_TAP, REASONS, SILENT};

/// Since the slot was taken.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SlotCounters {
    /// From the guest to where it may reach or not, without what it asks the
    /// slot's resolver.
    pub sent: Traffic,
    /// What the guest was let have.
    pub received: Traffic,
    /// How many connections the guest has opened.
    pub connections: u64,
    /// How many are tracked now.
    pub connections_open: u64,
    /// By reason, which docs/networking.md explains: `sandbox`, `listed`,
    /// `private`, `internet`, `protocol`, `crowd`, `invalid`, `inbound`, `gateway`,
    /// `spoofed`, `forged`, `flood`.
    pub dropped: BTreeMap<&'static str, Traffic>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
pub struct Traffic {
    pub packets: u64,
    pub bytes: u64,
}

#[derive(Deserialize)]
struct Listing {
    nftables: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    counter: Option<Counter>,
}

#[derive(Deserialize)]
struct Counter {
    name: String,
    #[serde(flatten)]
    traffic: Traffic,
}

// === impl SlotCounters ===

impl SlotCounters {
    /// From what `nft --json list counters` and `nf_conntrack_count` say.
    pub(super) fn parse(listing: &str, open: &str) -> io::Result<Self> {
        let listing: Listing = serde_json::from_str(listing)?;
        let found: BTreeMap<String, Traffic> = listing
            .nftables
            .into_iter()
            .filter_map(|entry| entry.counter)
            .map(|counter| (counter.name, counter.traffic))
            .collect();
        let counter = |name: &str| found.get(name).copied().unwrap_or_default();
        let dropped = REASONS.iter().chain(&SILENT).chain(&AT_TAP);
        Ok(Self {
            sent: counter("sent"),
            received: counter("received"),
            connections: counter("connections").packets,
            connections_open: open.trim().parse().map_err(io::Error::other)?,
            dropped: dropped.map(|name| (*name, counter(name))).collect(),
        })
    }
}
