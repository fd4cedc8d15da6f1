//! Keeping slots ready.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::pool::Network;
use super::slot::SlotError;
use crate::sync::lock;

/// How often slots are counted though nothing has happened.
const LOOK: Duration = Duration::from_secs(1);
/// How long no slot can be made before the next try.
const TRY_AGAIN: Duration = Duration::from_secs(5);
/// How long making more can wait while there are plenty: whoever has just taken one
/// is about to start a guest, and making slots holds locks that this needs.
const LATER: Duration = Duration::from_millis(500);
/// How many are made at once. The kernel makes links one after another, but nft
/// and the waits for RCU run beside that.
const AT_ONCE: usize = 4;

// === impl Network ===

impl Network {
    /// Until the network is left.
    pub(super) async fn keep(self: Arc<Self>) {
        let mut failing = false;
        while !self.leaving.is_cancelled() {
            self.remove_stuck().await;
            match self.refill().await {
                Ok(()) => failing = false,
                Err(error) => {
                    if !failing {
                        tracing::warn!(%error, "no network slot can be made");
                    }
                    failing = true;
                    self.leaving.run_until_cancelled(sleep(TRY_AGAIN)).await;
                }
            }
            // One that has just been notified is looked at once.
            let change = timeout(LOOK, self.changed.notified());
            self.leaving.run_until_cancelled(change).await;
            let until_few = async {
                while self.has_plenty() {
                    self.changed.notified().await;
                }
            };
            let later = timeout(LATER, until_few);
            self.leaving.run_until_cancelled(later).await;
        }
    }

    /// Whether more wait than half of those that should.
    fn has_plenty(&self) -> bool {
        lock(&self.pool).ready.len() > self.ready_wanted / 2
    }

    async fn refill(self: &Arc<Self>) -> Result<(), SlotError> {
        let mut making = JoinSet::new();
        let mut result = Ok(());
        loop {
            while making.len() < AT_ONCE && result.is_ok() && !self.leaving.is_cancelled() {
                let Some(index) = self.lacking(making.len()) else {
                    break;
                };
                let network = Arc::clone(self);
                making.spawn(async move { network.add(index).await });
            }
            match making.join_next().await {
                None => return result,
                Some(Ok(Ok(())) | Err(_)) => {}
                Some(Ok(Err(error))) => result = Err(error),
            }
        }
    }

    /// The number of a slot that is to be made, while `making` are.
    fn lacking(&self, making: usize) -> Option<u32> {
        let mut pool = lock(&self.pool);
        let is_lacking = pool.ready.len() + making < self.ready_wanted;
        is_lacking.then(|| pool.free.pop_front()).flatten()
    }

    /// Makes a slot, to wait with the others; its number is free again when that fails.
    pub(super) async fn add(&self, index: u32) -> Result<(), SlotError> {
        let made = self.maker.make(index).await;
        let mut pool = lock(&self.pool);
        let added = match made {
            Ok(made) => {
                pool.ready.push_back(made);
                Ok(())
            }
            Err(error) => {
                pool.free.push_back(index);
                Err(error)
            }
        };
        self.arrived.notify_waiters();
        added
    }

    /// Removes a slot that is in no list, and frees its number.
    pub(super) async fn unmake(&self, index: u32) -> Result<(), SlotError> {
        let unmade = self.maker.unmake(index).await;
        let mut pool = lock(&self.pool);
        match unmade {
            Ok(()) => pool.free.push_back(index),
            Err(_) => pool.stuck.push(index),
        }
        self.changed.notify_one();
        self.arrived.notify_waiters();
        unmade
    }

    async fn remove_stuck(&self) {
        let stuck = std::mem::take(&mut lock(&self.pool).stuck);
        for index in stuck {
            if let Err(error) = self.unmake(index).await {
                tracing::warn!(index, %error, "a network slot cannot be removed; trying again");
            }
        }
    }
}
