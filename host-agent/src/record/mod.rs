//! What the daemon remembers of a sandbox across its own restarts.

mod snapshot;
mod state;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::id::{SandboxId, SnapshotId};
use crate::net::{Mac, Policy};
use crate::time::{Stage, UnixMillis};

pub use snapshot::{Base, Chains, SnapshotKind, SnapshotRecord, SnapshotState};
pub use state::{IllegalTransition, State, Transition};

/// One sandbox. Stored as JSON: fields may be added with `#[serde(default)]`,
/// and fields that an older daemon does not know are ignored by it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SandboxRecord {
    pub id: SandboxId,
    /// Rises with each sandbox that this state folder has seen.
    pub sequence: u64,
    pub template: String,
    pub state: State,
    pub resources: Resources,
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    pub created_at: UnixMillis,
    /// When it will be deleted; none for never.
    #[serde(default)]
    pub expires_at: Option<UnixMillis>,
    /// The request that made it, when that had an id.
    #[serde(default)]
    pub request_id: Option<String>,
    /// The process that runs it, from its start until it is known to be gone.
    #[serde(default)]
    pub monitor: Option<MonitorIdentity>,
    /// Set in state `Failed`.
    #[serde(default)]
    pub failure: Option<Failure>,
    /// It is to go with an Exec call: a daemon that finds it without one, because
    /// the daemon before ended, deletes it.
    #[serde(default)]
    pub goes_with_exec: bool,
    /// The layers below what it has written itself.
    #[serde(default)]
    pub chains: Chains,
    /// The number of the layer that its root disk writes to.
    #[serde(default)]
    pub layer: u32,
    /// What it goes on from, while it does not run.
    #[serde(default)]
    pub saved: Option<SnapshotId>,
    /// What it was made from or last rolled back to; none when it was booted.
    #[serde(default)]
    pub snapshot: Option<SnapshotId>,
    /// What it was forked from.
    #[serde(default)]
    pub parent: Option<SandboxId>,
    #[serde(default)]
    pub base: Base,
    /// What it may reach; none: it has no network.
    #[serde(default)]
    pub network: Option<Box<Policy>>,
    /// Its network, while it has a monitor.
    #[serde(default)]
    pub slot: Option<Lease>,
}

/// A network slot that a sandbox has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    pub index: u32,
    pub mac: Mac,
    /// Where the host reaches the guest's ports.
    pub ipv4: Ipv4Addr,
    pub ipv6: Ipv6Addr,
}

/// What a sandbox takes of its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resources {
    pub vcpus: u32,
    pub memory_mib: u32,
    pub disk_mib: u32,
}

/// A process, told apart from a later one with the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MonitorIdentity {
    pub pid: i32,
    /// Field 22 of `/proc/<pid>/stat`: clock ticks since the host booted.
    pub start_time_ticks: u64,
    /// The boot that the ticks count from.
    #[serde(default)]
    pub boot_id: Option<BootId>,
}

/// `/proc/sys/kernel/random/boot_id`: a UUID, stored as the kernel writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BootId(pub u128);

/// Why a sandbox ended without being asked to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Stable, as in `ErrorInfo.reason`.
    pub reason: String,
    /// One sentence for a person.
    pub message: String,
    /// The last lines of the guest's console.
    #[serde(default)]
    pub console_tail: String,
}

/// A `CreateSandbox` request that carried an id.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RequestRecord {
    /// What was asked, to tell a repetition from another request.
    pub body: serde_json::Value,
    /// The sandbox that it made; its reply stands until that is gone.
    pub sandbox: SandboxId,
    /// None while the call has not ended.
    #[serde(default)]
    pub reply: Option<Reply>,
    /// When the entry is forgotten; none while its sandbox exists.
    #[serde(default)]
    pub forget_at: Option<UnixMillis>,
}

/// How a `CreateSandbox` call ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    Created {
        record: Box<SandboxRecord>,
        stages: Vec<Stage>,
        /// It was restored, not booted.
        #[serde(default)]
        restored: bool,
    },
    Refused(crate::status::Refusal),
}

// === impl BootId ===

impl TryFrom<String> for BootId {
    type Error = std::num::ParseIntError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        u128::from_str_radix(&text.replace('-', ""), 16).map(Self)
    }
}

impl From<BootId> for String {
    fn from(id: BootId) -> Self {
        let digits = format!("{:032x}", id.0);
        let (a, rest) = digits.split_at(8);
        let (b, rest) = rest.split_at(4);
        let (c, rest) = rest.split_at(4);
        let (d, e) = rest.split_at(4);
        format!("{a}-{b}-{c}-{d}-{e}")
    }
}

// === impl SandboxRecord ===

impl SandboxRecord {
    /// The record as `transition` leaves it.
    pub fn apply(&self, transition: Transition) -> Result<Self, IllegalTransition> {
        let state = self.state.after(&transition)?;
        let mut next = Self {
            state,
            ..self.clone()
        };
        match transition {
            Transition::Spawned(monitor) => next.monitor = Some(monitor),
            Transition::Run => next.saved = None,
            Transition::Saved { disk_chain } => {
                next.chains.disk = disk_chain;
                next.layer += 1;
            }
            Transition::Paused { saved, chains } => {
                next.monitor = None;
                next.slot = None;
                next.saved = Some(saved);
                next.chains = chains;
                next.layer += 1;
            }
            Transition::RollBack { to, chains } => {
                next.saved = Some(to.clone());
                next.snapshot = Some(to);
                next.chains = chains;
                next.layer += 1;
            }
            Transition::Settle | Transition::Stopped => {
                next.monitor = None;
                next.slot = None;
            }
            Transition::Fail(failure) => {
                next.monitor = None;
                next.slot = None;
                next.failure = Some(failure);
                next.chains = Chains::default();
            }
            Transition::Start
            | Transition::Pause
            | Transition::Continue
            | Transition::Resume
            | Transition::Stop => {}
        }
        Ok(next)
    }

    /// Every snapshot that must stay as long as this record is as it is.
    pub fn needs(&self) -> impl Iterator<Item = &SnapshotId> {
        let chains = self.chains.memory.iter().chain(&self.chains.disk);
        chains.chain(&self.saved)
    }

    /// Whether it carries all of `wanted`.
    pub fn matches<'a>(&self, wanted: impl IntoIterator<Item = (&'a String, &'a String)>) -> bool {
        wanted
            .into_iter()
            .all(|(key, value)| self.labels.get(key) == Some(value))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample(state: State) -> SandboxRecord {
        SandboxRecord {
            id: SandboxId::random().unwrap(),
            sequence: 7,
            template: "base".to_owned(),
            state,
            resources: Resources {
                vcpus: 1,
                memory_mib: 128,
                disk_mib: 64,
            },
            labels: BTreeMap::from([("team".to_owned(), "a".to_owned())]),
            created_at: UnixMillis(1),
            expires_at: None,
            request_id: None,
            monitor: None,
            failure: None,
            goes_with_exec: false,
            chains: Chains::default(),
            layer: 0,
            saved: None,
            snapshot: None,
            parent: None,
            base: Base::default(),
            network: None,
            slot: None,
        }
    }

    #[test]
    fn a_record_of_another_version_still_loads() {
        let mut json = serde_json::to_value(sample(State::Running)).unwrap();
        let fields = json.as_object_mut().unwrap();
        for optional in [
            "labels",
            "expires_at",
            "request_id",
            "monitor",
            "failure",
            "goes_with_exec",
            "chains",
            "layer",
            "saved",
            "snapshot",
            "parent",
            "base",
            "network",
            "slot",
        ] {
            fields.remove(optional);
        }
        fields.insert("of_the_future".to_owned(), serde_json::json!([1]));
        let loaded: SandboxRecord = serde_json::from_value(json).unwrap();
        assert_eq!(loaded.state, State::Running);
    }

    #[test]
    fn a_boot_id_is_stored_as_the_kernel_writes_it() {
        let text = "\"0f6d8a44-0b3c-4c55-9a6e-0123456789ab\"";
        let id: BootId = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&id).unwrap(), text);
    }

    #[test]
    fn labels_match_only_when_all_are_there() {
        let record = sample(State::Running);
        let wanted = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect()
        };
        assert!(record.matches(&wanted(&[])));
        assert!(record.matches(&wanted(&[("team", "a")])));
        assert!(!record.matches(&wanted(&[("team", "b")])));
        assert!(!record.matches(&wanted(&[("team", "a"), ("x", "y")])));
    }
}
