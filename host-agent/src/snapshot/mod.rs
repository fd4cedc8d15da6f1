//! Snapshots: folders whose files sandboxes and other snapshots build on.
//!
//! Who builds on what is computed from the records, whenever it is asked for.

mod cold;
mod files;
mod manifest;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tokio::sync::Notify;

pub use files::{Draft, LayerError, SnapshotFiles};
pub use manifest::Manifest;

use crate::id::{SandboxId, SnapshotId};
use crate::record::{Chains, Resources, SnapshotKind, SnapshotRecord, SnapshotState};
use crate::sync::lock;

/// Layers of a chain: with more, a restore maps and opens ever more of them.
const MAX_CHAIN: usize = 8;

/// The snapshots of this host.
#[derive(Debug)]
pub struct Snapshots {
    folder: PathBuf,
    inner: Mutex<Inner>,
    /// A hold has ended: something may be unused.
    released: Notify,
    /// Held while a cold snapshot is made a hot one.
    thawing: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Inner {
    records: BTreeMap<SnapshotId, SnapshotRecord>,
    holds: HashMap<SnapshotId, usize>,
    /// The template's own that sandboxes start from.
    offered: Option<SnapshotId>,
}

/// Keeps snapshots that no record names yet.
#[derive(Debug)]
pub struct Hold {
    snapshots: Arc<Snapshots>,
    ids: Vec<SnapshotId>,
}

/// What nothing needs any more.
#[derive(Debug, Clone, PartialEq)]
pub enum Unused {
    All(SnapshotRecord),
    /// All but its disk layer; the record as it is to be.
    Memory(SnapshotRecord),
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the name {name:?} is another snapshot's; choose another, or delete that with `soulbox snapshot rm {owner}`"
)]
pub struct NameTaken {
    pub name: String,
    pub owner: SnapshotId,
}

/// What a new snapshot builds on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layering {
    /// Of the layers that the machine's memory lies on.
    pub keep_memory: u32,
    /// The disk's layers are written into one new one.
    pub merge_disk: bool,
    /// The snapshot's own chains.
    pub chains: Chains,
}

// === impl Layering ===

impl Layering {
    /// For a snapshot `id` of a machine whose layers are `below`: a chain that
    /// would be too long begins anew, memory on its root and the disk on nothing.
    pub fn above(below: &Chains, id: &SnapshotId) -> Self {
        let with_own = |kept: &[SnapshotId]| [kept, std::slice::from_ref(id)].concat();
        let keep_memory = match below.memory.len() {
            count if count < MAX_CHAIN => count,
            _ => 1,
        };
        let merge_disk = below.disk.len() >= MAX_CHAIN;
        let keep_disk = if merge_disk { 0 } else { below.disk.len() };
        Self {
            keep_memory: u32::try_from(keep_memory).unwrap_or(0),
            merge_disk,
            chains: Chains {
                memory: with_own(&below.memory[..keep_memory]),
                disk: with_own(&below.disk[..keep_disk]),
            },
        }
    }
}

// === impl Snapshots ===

impl Snapshots {
    pub fn new(state_dir: &Path, records: Vec<SnapshotRecord>) -> Arc<Self> {
        Arc::new(Self {
            folder: state_dir.join("snapshots"),
            inner: Mutex::new(Inner {
                records: records
                    .into_iter()
                    .map(|record| (record.id.clone(), record))
                    .collect(),
                holds: HashMap::new(),
                offered: None,
            }),
            released: Notify::new(),
            thawing: tokio::sync::Mutex::new(()),
        })
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn files(&self, id: &SnapshotId) -> SnapshotFiles {
        SnapshotFiles::new(&self.folder, id)
    }

    pub fn get(&self, id: &SnapshotId) -> Option<SnapshotRecord> {
        lock(&self.inner).records.get(id).cloned()
    }

    /// Notes one whose record is being stored; its name is taken from now on.
    pub fn begin(self: &Arc<Self>, record: SnapshotRecord) -> Result<Hold, NameTaken> {
        let mut inner = lock(&self.inner);
        if let Some(name) = &record.name
            && let Some(owner) = inner.named(name)
        {
            return Err(NameTaken {
                name: name.clone(),
                owner: owner.id.clone(),
            });
        }
        let hold = self.hold(&mut inner, &record);
        inner.records.insert(record.id.clone(), record);
        Ok(hold)
    }

    /// Shows a record as it has been stored.
    pub fn put(&self, record: SnapshotRecord) {
        lock(&self.inner).records.insert(record.id.clone(), record);
    }

    pub fn remove(&self, id: &SnapshotId) {
        lock(&self.inner).records.remove(id);
    }

    /// One that is ready, by its id.
    pub fn take(self: &Arc<Self>, id: &SnapshotId) -> Option<(SnapshotRecord, Hold)> {
        self.find(|record| record.id == *id && record.kind != SnapshotKind::Layer)
    }

    /// One that is ready, by the name that somebody gave it.
    pub fn take_named(self: &Arc<Self>, name: &str) -> Option<(SnapshotRecord, Hold)> {
        self.find(|record| record.name.as_deref() == Some(name))
    }

    /// The one that sandboxes of this template and these sizes start from.
    pub fn take_template(
        self: &Arc<Self>,
        template: &str,
        resources: Resources,
    ) -> Option<(SnapshotRecord, Hold)> {
        let offered = lock(&self.inner).offered.clone()?;
        self.find(|record| {
            record.id == offered
                && !record.stale
                && record.template == template
                && record.resources == resources
        })
    }

    /// Has [`Self::take_template`] find this one, and no other.
    pub fn offer(&self, id: &SnapshotId) {
        lock(&self.inner).offered = Some(id.clone());
    }

    /// What [`Self::offer`] named, as long as sandboxes start from it.
    pub fn offered(&self) -> Option<SnapshotRecord> {
        let inner = lock(&self.inner);
        let record = inner.records.get(inner.offered.as_ref()?)?;
        (record.is_ready() && !record.stale).then(|| record.clone())
    }

    fn find(
        self: &Arc<Self>,
        wanted: impl Fn(&SnapshotRecord) -> bool,
    ) -> Option<(SnapshotRecord, Hold)> {
        let mut inner = lock(&self.inner);
        let found = inner
            .records
            .values()
            .find(|record| record.is_ready() && wanted(record))?
            .clone();
        let hold = self.hold(&mut inner, &found);
        Some((found, hold))
    }

    fn hold(self: &Arc<Self>, inner: &mut Inner, record: &SnapshotRecord) -> Hold {
        let mut ids: Vec<SnapshotId> = record.needs().cloned().collect();
        ids.push(record.id.clone());
        for id in &ids {
            *inner.holds.entry(id.clone()).or_default() += 1;
        }
        Hold {
            snapshots: Arc::clone(self),
            ids,
        }
    }

    /// Every record that passes `filter`, in the order of their making.
    pub fn list(&self, filter: impl Fn(&SnapshotRecord) -> bool) -> Vec<SnapshotRecord> {
        let inner = lock(&self.inner);
        let mut records: Vec<SnapshotRecord> = inner
            .records
            .values()
            .filter(|record| filter(record))
            .cloned()
            .collect();
        records.sort_by_key(|record| record.sequence);
        records
    }

    /// The snapshots that people know of and that build on `id`.
    pub fn built_on(&self, id: &SnapshotId) -> Vec<SnapshotId> {
        lock(&self.inner).built_on(id)
    }

    /// Takes one out that is to be deleted, unless something uses it: then names
    /// that. `sandboxes` tells which sandboxes need a snapshot.
    pub fn take_out(
        &self,
        id: &SnapshotId,
        sandboxes: impl FnOnce() -> Vec<SandboxId>,
    ) -> Result<Option<SnapshotRecord>, Vec<String>> {
        let mut inner = lock(&self.inner);
        // The sandboxes are looked at under the lock: one that is being made from
        // it either has a hold or is among them.
        let mut users: Vec<String> = sandboxes().iter().map(ToString::to_string).collect();
        users.extend(inner.built_on(id).iter().map(ToString::to_string));
        if users.is_empty() && inner.holds.contains_key(id) {
            users.push("a sandbox that is starting".to_owned());
        }
        if users.is_empty() {
            Ok(inner.records.remove(id))
        } else {
            Err(users)
        }
    }

    /// Takes out what neither `needed` by sandboxes (for memory, for anything) nor
    /// anything else uses. What is returned is to be stored, then removed.
    pub fn take_unused(
        &self,
        needed: impl FnOnce() -> (HashSet<SnapshotId>, HashSet<SnapshotId>),
    ) -> Vec<Unused> {
        let mut inner = lock(&self.inner);
        let (mut memory, mut any) = needed();
        for (id, record) in &inner.records {
            if record.stays_unused() || !record.is_ready() {
                any.insert(id.clone());
                memory.insert(id.clone());
                memory.extend(record.chains.memory.iter().cloned());
                any.extend(record.needs().cloned());
            }
        }
        memory.extend(inner.holds.keys().cloned());
        any.extend(inner.holds.keys().cloned());
        let mut unused = Vec::new();
        inner.records.retain(|id, record| {
            if !any.contains(id) {
                unused.push(Unused::All(record.clone()));
                return false;
            }
            if !memory.contains(id) && record.kind != SnapshotKind::Layer {
                *record = record.clone().into_layer();
                unused.push(Unused::Memory(record.clone()));
            }
            true
        });
        unused
    }

    /// Waits until something may have become unused.
    pub async fn released(&self) {
        self.released.notified().await;
    }

    /// Opens the memory layer of `id`; a compressed one is unpacked first. The
    /// record is returned when that has changed it.
    pub async fn open_memory(
        &self,
        id: &SnapshotId,
    ) -> Result<(std::fs::File, Option<SnapshotRecord>), LayerError> {
        let files = self.files(id);
        match files.open_memory() {
            Err(LayerError::Cold) => {}
            opened => return opened.map(|file| (file, None)),
        }
        let _turn = self.thawing.lock().await;
        let thawed = tokio::task::spawn_blocking(move || files.thaw()).await;
        let (memory, memory_bytes) = thawed.unwrap_or_else(|_| Err(LayerError::Cold))?;
        let mut inner = lock(&self.inner);
        let changed = inner.records.get_mut(id).map(|record| {
            record.cold = false;
            record.memory_bytes = memory_bytes;
            record.clone()
        });
        Ok((memory, changed))
    }
}

// === impl Inner ===

impl Inner {
    fn named(&self, name: &str) -> Option<&SnapshotRecord> {
        self.records
            .values()
            .find(|record| record.name.as_deref() == Some(name))
    }

    fn built_on(&self, id: &SnapshotId) -> Vec<SnapshotId> {
        self.records
            .values()
            .filter(|record| record.id != *id)
            .filter(|record| record.stays_unused() || record.state == SnapshotState::Making)
            .filter(|record| record.needs().any(|needed| needed == id))
            .map(|record| record.id.clone())
            .collect()
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut inner = lock(&self.snapshots.inner);
        for id in &self.ids {
            if let Some(count) = inner.holds.get_mut(id) {
                *count -= 1;
                if *count == 0 {
                    inner.holds.remove(id);
                }
            }
        }
        drop(inner);
        self.snapshots.released.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Base;
    use crate::time::UnixMillis;

    fn id() -> SnapshotId {
        SnapshotId::random().unwrap()
    }

    fn record(kind: SnapshotKind, below: &Chains) -> SnapshotRecord {
        let id = id();
        SnapshotRecord {
            chains: Layering::above(below, &id).chains,
            id,
            sequence: 1,
            kind,
            state: SnapshotState::Ready,
            name: None,
            template: "base".to_owned(),
            base: Base::default(),
            sandbox: None,
            resources: Resources {
                vcpus: 1,
                memory_mib: 128,
                disk_mib: 1,
            },
            labels: BTreeMap::new(),
            created_at: UnixMillis(1),
            cold: false,
            memory_bytes: 1,
            disk_bytes: 1,
            key: None,
            stale: false,
        }
    }

    fn unused(snapshots: &Snapshots, needed: &Chains) -> Vec<Unused> {
        snapshots.take_unused(|| {
            let memory: HashSet<SnapshotId> = needed.memory.iter().cloned().collect();
            let mut any = memory.clone();
            any.extend(needed.disk.iter().cloned());
            (memory, any)
        })
    }

    #[test]
    fn chains_stay_short_and_memory_keeps_its_root() {
        let mut below = Chains::default();
        let mut root = None;
        for _ in 0..50 {
            let own = id();
            let layering = Layering::above(&below, &own);
            let kept = usize::try_from(layering.keep_memory).unwrap();
            assert_eq!(layering.chains.memory[..kept], below.memory[..kept]);
            assert_eq!(layering.chains.memory.len(), kept + 1);
            assert!(layering.chains.memory.len() <= MAX_CHAIN);
            assert!(layering.chains.disk.len() <= MAX_CHAIN);
            assert_eq!(
                layering.merge_disk,
                layering.chains.disk.len() != below.disk.len() + 1
            );
            assert_eq!(layering.chains.memory.last(), Some(&own));
            assert_eq!(layering.chains.disk.last(), Some(&own));
            below = layering.chains;
            assert_eq!(
                root.get_or_insert_with(|| below.memory[0].clone()),
                &below.memory[0]
            );
        }
    }

    #[test]
    fn what_nothing_needs_goes_and_what_is_needed_stays() {
        let template = record(SnapshotKind::Template, &Chains::default());
        let first = record(SnapshotKind::Pause, &template.chains);
        let second = record(SnapshotKind::Pause, &first.chains);
        let user = record(SnapshotKind::User, &second.chains);
        let fork = record(SnapshotKind::Fork, &template.chains);
        let all = [&template, &first, &second, &user, &fork].map(Clone::clone);
        let snapshots = Snapshots::new(Path::new("/none"), all.to_vec());
        // A hold keeps what no record needs.
        let (_, hold) = snapshots.take(&fork.id).unwrap();
        assert!(unused(&snapshots, &Chains::default()).is_empty());
        drop(hold);
        assert_eq!(
            unused(&snapshots, &Chains::default()),
            [Unused::All(fork.clone())]
        );
        // The user's snapshot goes when it is asked to and nobody needs it.
        let users = snapshots.take_out(&second.id, Vec::new).unwrap_err();
        assert_eq!(users, [user.id.to_string()]);
        assert!(snapshots.take_out(&user.id, Vec::new).unwrap().is_some());
        let needed = Chains {
            memory: Vec::new(),
            disk: first.chains.disk.clone(),
        };
        let gone = unused(&snapshots, &needed);
        let mut expected = vec![
            Unused::Memory(first.clone().into_layer()),
            Unused::All(second.clone()),
        ];
        if first.id > second.id {
            expected.reverse();
        }
        assert_eq!(gone, expected);
        // The template's own stays until it is stale.
        assert_eq!(
            unused(&snapshots, &Chains::default()),
            [Unused::All(first.into_layer())]
        );
        snapshots.put(SnapshotRecord {
            stale: true,
            ..template.clone()
        });
        assert_eq!(unused(&snapshots, &Chains::default()).len(), 1);
        assert!(snapshots.list(|_| true).is_empty());
    }

    #[test]
    fn a_name_is_given_once() {
        let snapshots = Snapshots::new(Path::new("/none"), Vec::new());
        let mut named = record(SnapshotKind::User, &Chains::default());
        named.name = Some("warm".to_owned());
        named.state = SnapshotState::Making;
        let _hold = snapshots.begin(named.clone()).unwrap();
        // Not while it is being made.
        assert!(snapshots.take_named("warm").is_none());
        let mut other = record(SnapshotKind::User, &Chains::default());
        other.name = Some("warm".to_owned());
        assert_eq!(snapshots.begin(other).unwrap_err().owner, named.id);
        named.state = SnapshotState::Ready;
        snapshots.put(named);
        assert!(snapshots.take_named("warm").is_some());
    }
}
