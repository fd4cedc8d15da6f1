//! What the daemon remembers of a snapshot.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Resources;
use crate::id::{SandboxId, SnapshotId};
use crate::time::UnixMillis;

/// Snapshots whose layers something builds on, root first.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Chains {
    /// Those whose `memory` is a layer of the guest's memory.
    pub memory: Vec<SnapshotId>,
    /// Those whose `disk.0` is a layer of the root disk.
    pub disk: Vec<SnapshotId>,
}

/// The files of a template that a sandbox was booted with, as its manifest names
/// them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Base {
    pub kernel_sha256: String,
    /// Of the image that disk layers lie on.
    pub rootfs_sha256: String,
}

/// Why a snapshot is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotKind {
    /// The daemon made it from a booted template, for others to start from.
    Template,
    /// Somebody asked for it.
    User,
    /// A paused sandbox goes on from it.
    Pause,
    /// The children of a fork began with it.
    Fork,
    /// No snapshot, or one no more: only its disk layer is there, because
    /// something builds on that.
    Layer,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotState {
    /// Its folder may have a temporary name, or none.
    Making,
    Ready,
}

/// One snapshot. Stored as JSON under the rules of a sandbox's record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    pub id: SnapshotId,
    /// Rises with each record, also of a sandbox, that this state folder has seen.
    pub sequence: u64,
    pub kind: SnapshotKind,
    pub state: SnapshotState,
    #[serde(default)]
    pub name: Option<String>,
    /// What the first of its line was booted from.
    pub template: String,
    #[serde(default)]
    pub base: Base,
    /// What it is of; none for a template's own.
    #[serde(default)]
    pub sandbox: Option<SandboxId>,
    pub chains: Chains,
    pub resources: Resources,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    pub created_at: UnixMillis,
    /// Its memory is compressed.
    #[serde(default)]
    pub cold: bool,
    /// What its own files take on disk.
    #[serde(default)]
    pub memory_bytes: u64,
    #[serde(default)]
    pub disk_bytes: u64,
    /// Of a template's own: a digest of all that it was made with.
    #[serde(default)]
    pub key: Option<String>,
    /// Of a template's own: nothing is to be made from it any more.
    #[serde(default)]
    pub stale: bool,
}

// === impl SnapshotRecord ===

impl SnapshotRecord {
    pub fn is_ready(&self) -> bool {
        self.state == SnapshotState::Ready
    }

    /// Whether it stays though nothing builds on it.
    pub fn stays_unused(&self) -> bool {
        match self.kind {
            SnapshotKind::User => true,
            SnapshotKind::Template => !self.stale,
            SnapshotKind::Pause | SnapshotKind::Fork | SnapshotKind::Layer => false,
        }
    }

    /// Whether people are shown it.
    pub fn is_listed(&self) -> bool {
        self.is_ready() && matches!(self.kind, SnapshotKind::User | SnapshotKind::Template)
    }

    /// The snapshot it builds on.
    pub fn parent(&self) -> Option<&SnapshotId> {
        self.chains
            .memory
            .iter()
            .rev()
            .find(|layer| **layer != self.id)
    }

    pub fn needs(&self) -> impl Iterator<Item = &SnapshotId> {
        self.chains.memory.iter().chain(&self.chains.disk)
    }

    /// What is left of it when only its disk layer is wanted.
    pub fn into_layer(self) -> Self {
        Self {
            kind: SnapshotKind::Layer,
            state: SnapshotState::Ready,
            name: None,
            chains: Chains {
                memory: Vec::new(),
                disk: vec![self.id.clone()],
            },
            cold: false,
            memory_bytes: 0,
            ..self
        }
    }
}
