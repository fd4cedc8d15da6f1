//! Every sandbox there is, for reading, and the stream of their changes.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};

use tokio::sync::{broadcast, mpsc, watch};

use super::actor::Command;
use crate::guest::Guest;
use crate::id::SandboxId;
use crate::monitor::{Control, anonymous_bytes};
use crate::net::Denied;
use crate::record::{MonitorIdentity, SandboxRecord};
use crate::sync::lock;

/// How far a watcher may fall behind before it is ended.
const MAX_CHANGES_BEHIND: usize = 1024;

/// A sandbox as others see it.
#[derive(Debug, Clone)]
pub struct View {
    pub record: SandboxRecord,
    /// Set while it runs.
    pub live: Option<Arc<Live>>,
    /// Its record is gone.
    pub deleted: bool,
}

/// Ways into a sandbox that runs.
#[derive(Debug)]
pub struct Live {
    pub guest: Guest,
    pub control: Arc<Control>,
    pub(super) monitor: MonitorIdentity,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChangeKind {
    Changed,
    Deleted,
    /// Its policy denied it something.
    Denied(Denied),
}

#[derive(Debug, Clone)]
pub struct Change {
    pub kind: ChangeKind,
    pub record: SandboxRecord,
}

/// What there is, and every change from then on.
#[derive(Debug)]
pub struct Subscription {
    pub current: Vec<SandboxRecord>,
    pub changes: broadcast::Receiver<Change>,
}

#[derive(Debug)]
pub(super) struct Registry {
    inner: Mutex<Inner>,
    changes: broadcast::Sender<Change>,
}

#[derive(Debug, Default)]
struct Inner {
    entries: HashMap<SandboxId, Entry>,
    /// In the order of creation.
    order: BTreeMap<u64, SandboxId>,
    last_sequence: u64,
}

#[derive(Debug)]
struct Entry {
    view: watch::Sender<View>,
    commands: mpsc::Sender<Command>,
}

// === impl Live ===

impl Live {
    /// The process that runs it: another one once it has been restored.
    pub fn monitor(&self) -> MonitorIdentity {
        self.monitor
    }

    /// The monitor's own memory, when its guest alone holds so much.
    pub fn monitor_private_bytes(&self, guest_private_bytes: u64) -> u64 {
        anonymous_bytes(self.monitor).saturating_sub(guest_private_bytes)
    }
}

// === impl Registry ===

impl Registry {
    /// Goes on counting after `last_sequence`.
    pub(super) fn new(last_sequence: u64) -> Self {
        Self {
            inner: Mutex::new(Inner {
                last_sequence,
                ..Inner::default()
            }),
            changes: broadcast::channel(MAX_CHANGES_BEHIND).0,
        }
    }

    pub(super) fn next_sequence(&self) -> u64 {
        let mut inner = lock(&self.inner);
        inner.last_sequence += 1;
        inner.last_sequence
    }

    pub(super) fn insert(&self, record: SandboxRecord, commands: mpsc::Sender<Command>) {
        let mut inner = lock(&self.inner);
        inner.last_sequence = inner.last_sequence.max(record.sequence);
        inner.order.insert(record.sequence, record.id.clone());
        let id = record.id.clone();
        let view = watch::Sender::new(View {
            record,
            live: None,
            deleted: false,
        });
        inner.entries.insert(id, Entry { view, commands });
    }

    /// Shows a record that has been stored, and tells watchers.
    pub(super) fn publish(&self, record: &SandboxRecord, live: Option<Arc<Live>>) {
        // Under the lock, so that every watcher sees changes in one order.
        let inner = lock(&self.inner);
        let Some(entry) = inner.entries.get(&record.id) else {
            return;
        };
        entry.view.send_modify(|view| {
            view.record = record.clone();
            view.live = live;
        });
        // Nobody may be watching.
        let _ = self.changes.send(Change {
            kind: ChangeKind::Changed,
            record: record.clone(),
        });
    }

    /// Tells watchers what a sandbox was denied.
    pub(super) fn tell_denied(&self, id: &SandboxId, denied: Denied) {
        let inner = lock(&self.inner);
        if let Some(entry) = inner.entries.get(id) {
            let _ = self.changes.send(Change {
                kind: ChangeKind::Denied(denied),
                record: entry.view.borrow().record.clone(),
            });
        }
    }

    pub(super) fn remove(&self, id: &SandboxId) {
        let mut inner = lock(&self.inner);
        let Some(entry) = inner.entries.remove(id) else {
            return;
        };
        let record = entry.view.borrow().record.clone();
        inner.order.remove(&record.sequence);
        entry.view.send_modify(|view| {
            view.live = None;
            view.deleted = true;
        });
        let _ = self.changes.send(Change {
            kind: ChangeKind::Deleted,
            record,
        });
    }

    pub(super) fn view(&self, id: &SandboxId) -> Option<watch::Receiver<View>> {
        let inner = lock(&self.inner);
        Some(inner.entries.get(id)?.view.subscribe())
    }

    pub(super) fn commands(&self, id: &SandboxId) -> Option<mpsc::Sender<Command>> {
        Some(lock(&self.inner).entries.get(id)?.commands.clone())
    }

    pub(super) fn ids(&self) -> Vec<SandboxId> {
        lock(&self.inner).order.values().cloned().collect()
    }

    pub(super) fn len(&self) -> usize {
        lock(&self.inner).entries.len()
    }

    /// Up to `limit` records made after `after` that pass `filter`, in the
    /// order of creation.
    pub(super) fn list(
        &self,
        after: u64,
        limit: usize,
        filter: impl Fn(&SandboxRecord) -> bool,
    ) -> Vec<SandboxRecord> {
        let inner = lock(&self.inner);
        inner.records(after).filter(filter).take(limit).collect()
    }

    /// Looks at every record there is.
    pub(super) fn for_each(&self, mut look: impl FnMut(&SandboxRecord)) {
        for entry in lock(&self.inner).entries.values() {
            look(&entry.view.borrow().record);
        }
    }

    pub(super) fn subscribe(&self) -> Subscription {
        let inner = lock(&self.inner);
        Subscription {
            current: inner.records(0).collect(),
            changes: self.changes.subscribe(),
        }
    }
}

// === impl Inner ===

impl Inner {
    fn records(&self, after: u64) -> impl Iterator<Item = SandboxRecord> {
        self.order
            .range(after.saturating_add(1)..)
            .filter_map(|(_, id)| self.entries.get(id))
            .map(|entry| entry.view.borrow().record.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::State;
    use crate::record::tests::sample;

    fn insert(registry: &Registry) -> SandboxRecord {
        let mut record = sample(State::Pending);
        record.sequence = registry.next_sequence();
        registry.insert(record.clone(), mpsc::channel(1).0);
        record
    }

    #[test]
    fn pages_are_in_the_order_of_creation() {
        let registry = Registry::new(0);
        let records: Vec<SandboxRecord> = (0..5).map(|_| insert(&registry)).collect();
        registry.remove(&records[1].id);
        let all = |_: &SandboxRecord| true;
        let first = registry.list(0, 2, all);
        assert_eq!(first, [records[0].clone(), records[2].clone()]);
        let rest = registry.list(first[1].sequence, 10, all);
        assert_eq!(rest, records[3..]);
    }

    #[test]
    fn a_watcher_sees_what_is_and_then_each_change() {
        let registry = Registry::new(0);
        let mut record = insert(&registry);
        let mut subscription = registry.subscribe();
        assert_eq!(subscription.current, [record.clone()]);
        record.state = State::Running;
        registry.publish(&record, None);
        registry.remove(&record.id);
        let change = subscription.changes.try_recv().unwrap();
        assert_eq!(
            (change.kind, change.record.state),
            (ChangeKind::Changed, State::Running)
        );
        let change = subscription.changes.try_recv().unwrap();
        assert_eq!((change.kind, change.record), (ChangeKind::Deleted, record));
    }
}
