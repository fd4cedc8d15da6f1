//! From any state to nothing left.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::actor::{Actor, Delete, Inbox};
use super::error::DeleteError;
use crate::record::{State, Transition};
use crate::store::Change;

/// After how long a removal that failed is tried again unasked.
const TRY_AGAIN: Duration = Duration::from_secs(30);

impl Actor {
    /// Takes the sandbox down and answers `deletes`, and every delete that
    /// comes meanwhile. Returns when its record is gone, or when the daemon
    /// leaves.
    pub(super) async fn stop(mut self, mut deletes: Vec<Delete>, mut inbox: Inbox) {
        if self.record.state != State::Stopping
            && let Err(error) = self.transition(Transition::Stop).await
        {
            // What follows can be done again from any state, so a full disk
            // need not keep a guest alive.
            tracing::warn!(sandbox = %self.record.id, %error, "the stop is not on disk");
        }
        let force = |deletes: &[Delete]| deletes.iter().any(|delete| delete.force);
        if self.guest.is_some() && !force(&deletes) {
            self.stop_cleanly(&mut deletes, &mut inbox).await;
        }
        if let Some(mut machine) = self.machine.take() {
            machine.stop().await;
        }
        // Not to be cut off half-way by what comes next.
        let mut detached = Some(tokio::spawn(self.detach()));
        let leave = self.pool.leaving.clone();
        loop {
            let removed = self.remove().await;
            if let Err(error) = &removed {
                tracing::error!(sandbox = %self.record.id, %error, "not removed");
            }
            if let Some(detached) = detached.take() {
                let _ = detached.await;
            }
            answer(&mut deletes, &removed);
            // Also when something is left: that can take for ever.
            self.refuse();
            if removed.is_ok() {
                break;
            }
            tokio::select! {
                Some(delete) = inbox.next_delete() => deletes.push(delete),
                () = tokio::time::sleep(TRY_AGAIN) => {}
                () = leave.cancelled() => return,
            }
        }
        tracing::info!(sandbox = %self.record.id, "deleted");
        // Nobody finds the sandbox any more, but some may have found it before.
        inbox.close();
        while let Some(delete) = inbox.next_delete().await {
            deletes.push(delete);
        }
        answer(&mut deletes, &Ok(()));
    }

    /// Lets the guest stop its programs and unmount, until it has, its time is
    /// over, or somebody has no patience.
    async fn stop_cleanly(&mut self, deletes: &mut Vec<Delete>, inbox: &mut Inbox) {
        let (Some(guest), Some(machine)) = (self.guest.take(), self.machine.as_mut()) else {
            return;
        };
        let deadline = Instant::now() + self.pool.config.timeouts.clean_stop();
        let clean = async {
            match timeout_at(deadline, guest.shutdown()).await {
                // The power may go before the reply has come through.
                Ok(_) => timeout_at(deadline, machine.ended()).await.is_ok(),
                Err(_) => false,
            }
        };
        tokio::pin!(clean);
        let stopped = loop {
            tokio::select! {
                stopped = &mut clean => break stopped,
                Some(delete) = inbox.next_delete() => {
                    let force = delete.force;
                    deletes.push(delete);
                    if force {
                        break false;
                    }
                }
            }
        };
        if !stopped {
            tracing::debug!(sandbox = %self.record.id, "not stopped cleanly; stopping it by force");
        }
    }

    /// Files first, the record last: whatever is interrupted can be found again.
    async fn remove(&mut self) -> Result<(), DeleteError> {
        self.files.remove().map_err(|error| DeleteError::Cleanup {
            message: error.to_string(),
        })?;
        self.reservation = None;
        let mut changes = Vec::new();
        if let Some(making) = self.making.take() {
            changes = self.forget_making(making);
        }
        let id = self.record.id.clone();
        if let Ok(stopped) = self.record.apply(Transition::Stopped) {
            // Stored only as the record's removal: one commit serves both.
            self.record = stopped;
            self.publish();
        }
        changes.push(Change::RemoveSandbox(id.clone()));
        if let Some(request_id) = &self.record.request_id {
            changes.extend(self.pool.requests.sandbox_gone(request_id, &id));
        }
        self.pool
            .store
            .commit(changes)
            .await
            .map_err(|error| DeleteError::Store {
                message: error.to_string(),
            })?;
        self.pool.registry.remove(&id);
        self.pool.collect().await;
        Ok(())
    }
}

fn answer(deletes: &mut Vec<Delete>, outcome: &Result<(), DeleteError>) {
    for Delete { done, .. } in deletes.drain(..) {
        // A caller that has gone away wanted it gone all the same.
        let _ = done.send(outcome.clone());
    }
}
