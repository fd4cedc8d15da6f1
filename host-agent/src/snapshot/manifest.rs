//! `manifest.json` of a snapshot: what its folder is, for people and for whoever
//! moves it. The daemon goes by its own record.

use serde::Serialize;

use crate::id::{SandboxId, SnapshotId};
use crate::record::{Base, Chains, Resources, SnapshotRecord};

/// Raised when a folder is laid out otherwise.
const FORMAT: u32 = 1;

#[derive(Debug, Serialize)]
pub struct Manifest<'a> {
    format: u32,
    id: &'a SnapshotId,
    template: &'a str,
    base: &'a Base,
    /// The CPU that it was made on.
    cpu_model: &'a str,
    sandbox: Option<&'a SandboxId>,
    /// The snapshots whose files it needs, root first.
    chains: &'a Chains,
    resources: Resources,
    created_at_unix_ms: u64,
}

// === impl Manifest ===

impl<'a> Manifest<'a> {
    pub fn of(record: &'a SnapshotRecord, cpu_model: &'a str) -> Self {
        Self {
            format: FORMAT,
            id: &record.id,
            template: &record.template,
            base: &record.base,
            cpu_model,
            sandbox: record.sandbox.as_ref(),
            chains: &record.chains,
            resources: record.resources,
            created_at_unix_ms: record.created_at.0,
        }
    }

    pub fn to_json(&self) -> String {
        // Strings and numbers always encode.
        serde_json::to_string_pretty(self).unwrap_or_default()
    }
}
