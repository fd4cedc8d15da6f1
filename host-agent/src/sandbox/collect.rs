//! Removing snapshots that nothing needs, and those that somebody wants gone.

use std::collections::HashSet;
use std::sync::Arc;

use super::error::OperateError;
use super::pool::Pool;
use crate::id::{SandboxId, SnapshotId};
use crate::snapshot::Unused;
use crate::store::Change;

impl Pool {
    /// Removes what nothing needs any more: first its record, then its files.
    pub(super) async fn collect(&self) {
        let _turn = self.collecting.lock().await;
        loop {
            let unused = self.snapshots.take_unused(|| self.needed());
            if unused.is_empty() {
                return;
            }
            let changes = unused.iter().map(|unused| match unused {
                Unused::All(record) => Change::RemoveSnapshot(record.id.clone()),
                Unused::Memory(record) => Change::PutSnapshot(record.clone()),
            });
            if let Err(error) = self.store.commit(changes.collect()).await {
                // The next start finds them unused again.
                tracing::warn!(%error, "snapshots that nothing needs stay on disk");
                return;
            }
            for unused in unused {
                let (Unused::All(record) | Unused::Memory(record)) = &unused;
                let id = record.id.clone();
                let files = self.snapshots.files(&id);
                let removed = tokio::task::spawn_blocking(move || match unused {
                    Unused::All(_) => files.remove(),
                    Unused::Memory(_) => files.keep_layer().map(|_| ()),
                });
                match removed.await {
                    Ok(Ok(())) => tracing::debug!(snapshot = %id, "removed what nothing needs"),
                    Ok(Err(error)) => {
                        tracing::error!(snapshot = %id, %error, "files are left over until the next start");
                    }
                    Err(error) => tracing::error!(snapshot = %id, %error, "not removed"),
                }
            }
        }
    }

    /// What sandboxes need: for memory, and at all.
    fn needed(&self) -> (HashSet<SnapshotId>, HashSet<SnapshotId>) {
        let (mut memory, mut any) = (HashSet::new(), HashSet::new());
        self.registry.for_each(|record| {
            memory.extend(record.chains.memory.iter().cloned());
            memory.extend(record.saved.iter().cloned());
            any.extend(record.needs().cloned());
        });
        (memory, any)
    }

    /// The sandboxes and snapshots that build on a snapshot.
    pub fn snapshot_users(&self, id: &SnapshotId) -> Vec<String> {
        let sandboxes = self.sandboxes_on(id).into_iter();
        let mut users: Vec<String> = sandboxes.map(String::from).collect();
        users.extend(self.snapshots.built_on(id).into_iter().map(String::from));
        users
    }

    fn sandboxes_on(&self, id: &SnapshotId) -> Vec<SandboxId> {
        let mut sandboxes = Vec::new();
        self.registry.for_each(|record| {
            if record.needs().any(|needed| needed == id) {
                sandboxes.push(record.id.clone());
            }
        });
        sandboxes.sort();
        sandboxes
    }

    /// That it is gone already is fine.
    pub async fn delete_snapshot(&self, id: &SnapshotId) -> Result<(), OperateError> {
        if self
            .snapshots
            .get(id)
            .is_some_and(|found| !found.is_ready())
        {
            return Ok(());
        }
        let taken = self.snapshots.take_out(id, || self.sandboxes_on(id));
        let Some(record) = taken.map_err(|users| OperateError::InUse {
            id: id.clone(),
            users,
        })?
        else {
            return Ok(());
        };
        let removed = self
            .store
            .commit(vec![Change::RemoveSnapshot(id.clone())])
            .await;
        if let Err(error) = removed {
            self.snapshots.put(record);
            return Err(super::error::SaveError::from(error).into());
        }
        let files = self.snapshots.files(id);
        let removed = tokio::task::spawn_blocking(move || files.remove()).await;
        let removed = removed.unwrap_or_else(|error| Err(std::io::Error::other(error)));
        removed.map_err(|error| OperateError::Cleanup {
            message: error.to_string(),
        })?;
        self.collect().await;
        Ok(())
    }

    /// Collects whenever something has been let go of, until the pool is left.
    pub(super) async fn collect_released(self: Arc<Self>) {
        let leaving = self.leaving.clone();
        while leaving
            .run_until_cancelled(self.snapshots.released())
            .await
            .is_some()
        {
            self.collect().await;
        }
    }
}
