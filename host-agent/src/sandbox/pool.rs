//! All sandboxes of this host.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::actor::{Command, Delete};
use super::error::{DeleteError, UseError};
use super::files::{sandboxes_dir, shells_dir, sockets_dir};
use super::network::Networks;
use super::reconcile::{self, Summary};
use super::registry::{Registry, Subscription, View};
use super::requests::Requests;
use super::shells::Shells;
use crate::admission::{Admission, Amounts};
use crate::config::Config;
use crate::host::HostFacts;
use crate::id::SandboxId;
use crate::kvm::KvmDevice;
use crate::record::SandboxRecord;
use crate::snapshot::Snapshots;
use crate::store::{OpenError, Store};
use crate::template::{TemplateSummary, Templates};

/// How often replies that are due are forgotten.
const FORGET_EVERY: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
pub enum OpenPoolError {
    #[error("{} cannot be made; see the permissions of the folder it lies in", .path.display())]
    Folder {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(transparent)]
    Store(#[from] OpenError),
    #[error("sandboxes can have no network here; mend that, or set network.enabled = false")]
    Network(#[from] crate::net::StartError),
}

/// Makes, finds and removes sandboxes.
#[derive(Debug)]
pub struct Pool {
    pub(super) config: Config,
    pub(super) facts: HostFacts,
    pub(super) monitor_binary: PathBuf,
    pub(super) store: Store,
    pub(super) admission: Arc<Admission>,
    pub(super) kvm: KvmDevice,
    pub(super) templates: Templates,
    pub(super) registry: Registry,
    pub(super) requests: Requests,
    pub(super) snapshots: Arc<Snapshots>,
    /// Held by whoever removes what nothing needs.
    pub(super) collecting: tokio::sync::Mutex<()>,
    pub(super) shells: Shells,
    /// None where the configuration turns them off.
    pub(super) networks: Option<Networks>,
    /// A template's own snapshot is missing, or of no use.
    pub(super) template_changed: Notify,
    pub(super) actors: TaskTracker,
    /// Sandboxes that are starting are to be taken down.
    pub(super) stopping: CancellationToken,
    /// Actors are to end, and leave their sandboxes as they are.
    pub(super) leaving: CancellationToken,
    draining: AtomicBool,
}

// === impl Pool ===

impl Pool {
    /// Opens the records, and brings what an earlier daemon left into a known
    /// state before anybody can ask for it.
    pub async fn open(
        config: Config,
        facts: HostFacts,
        monitor_binary: PathBuf,
        capacity: Amounts,
    ) -> Result<(Arc<Self>, Summary), OpenPoolError> {
        for path in [
            sandboxes_dir(&config.paths),
            sockets_dir(&config.paths),
            shells_dir(&config.paths),
            config.paths.state_dir.join("snapshots"),
        ] {
            std::fs::create_dir_all(&path)
                .map_err(|source| OpenPoolError::Folder { path, source })?;
        }
        let (store, loaded) = Store::open(&config.paths.state_dir.join("state.redb"))?;
        let networks = Networks::start(&config.network, &loaded.sandboxes).await?;
        let (networks, denied) = networks.unzip();
        let pool = Arc::new(Self {
            networks,
            admission: Admission::new(capacity),
            kvm: KvmDevice::new(&config.paths.kvm),
            templates: Templates::new(&config.paths.template_dir),
            registry: Registry::new(loaded.last_sequence),
            requests: Requests::load(loaded.requests),
            snapshots: Snapshots::new(&config.paths.state_dir, loaded.snapshots),
            collecting: tokio::sync::Mutex::default(),
            shells: Shells::new(&config, &shells_dir(&config.paths)),
            template_changed: Notify::new(),
            actors: TaskTracker::new(),
            stopping: CancellationToken::new(),
            leaving: CancellationToken::new(),
            draining: AtomicBool::new(false),
            config,
            facts,
            monitor_binary,
            store,
        });
        let summary = reconcile::reconcile(&pool, loaded.sandboxes).await;
        pool.actors.spawn(Arc::clone(&pool).forget_requests());
        if let Some(denied) = denied {
            pool.actors.spawn(Arc::clone(&pool).tell_denied(denied));
        }
        pool.actors.spawn(Arc::clone(&pool).collect_released());
        pool.actors.spawn(Shells::keep(Arc::clone(&pool)));
        pool.actors
            .spawn(Arc::clone(&pool).keep_template_snapshots());
        Ok((pool, summary))
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    pub fn facts(&self) -> &HostFacts {
        &self.facts
    }

    pub fn admission(&self) -> &Admission {
        &self.admission
    }

    pub fn kvm(&self) -> &KvmDevice {
        &self.kvm
    }

    pub fn templates(&self) -> Vec<TemplateSummary> {
        self.templates.list()
    }

    pub fn len(&self) -> usize {
        self.registry.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A sandbox and its changes.
    pub fn view(&self, id: &SandboxId) -> Result<watch::Receiver<View>, UseError> {
        self.registry
            .view(id)
            .ok_or_else(|| UseError::NotFound(id.to_string()))
    }

    pub fn list(
        &self,
        after: u64,
        limit: usize,
        filter: impl Fn(&SandboxRecord) -> bool,
    ) -> Vec<SandboxRecord> {
        self.registry.list(after, limit, filter)
    }

    pub fn subscribe(&self) -> Subscription {
        self.registry.subscribe()
    }

    /// Bytes that the layer which the sandbox's disk writes to holds.
    pub fn disk_used_bytes(&self, record: &SandboxRecord) -> u64 {
        let files = super::files::SandboxFiles::new(&self.config.paths, &record.id);
        files.layer_allocated_bytes(record.layer)
    }

    pub fn snapshots(&self) -> &Snapshots {
        &self.snapshots
    }

    /// Returns when nothing of the sandbox is left. That it is gone already is
    /// fine.
    pub async fn delete(&self, id: &SandboxId, force: bool) -> Result<(), DeleteError> {
        let Some(commands) = self.registry.commands(id) else {
            return Ok(());
        };
        let (done, outcome) = oneshot::channel();
        let sent = commands.send(Command::Delete(Delete { force, done })).await;
        drop(commands);
        match (sent, outcome.await) {
            (Ok(()), Ok(outcome)) => outcome,
            // Its actor has ended: because it is gone, or because we are going.
            _ if self.registry.view(id).is_none() => Ok(()),
            _ => Err(DeleteError::Stopping),
        }
    }

    /// Records that the sandbox goes with a call, so that it goes also when this
    /// daemon ends before it. One that is going already is fine.
    pub async fn go_with_exec(&self, id: &SandboxId) -> Result<(), UseError> {
        let Some(commands) = self.registry.commands(id) else {
            return Err(UseError::NotFound(id.to_string()));
        };
        let (done, outcome) = oneshot::channel();
        let sent = commands.send(Command::GoWithExec(done)).await;
        drop(commands);
        match (sent, outcome.await) {
            (Ok(()), Ok(outcome)) => outcome,
            _ if self.leaving.is_cancelled() => Err(UseError::Stopping),
            _ => Ok(()),
        }
    }

    /// From now on creates are refused.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Ends every actor. Sandboxes that run stay for the next daemon, those
    /// that start are taken down.
    pub async fn leave(&self) {
        self.drain();
        self.stopping.cancel();
        self.leaving.cancel();
        self.actors.close();
        self.actors.wait().await;
        if let Some(networks) = &self.networks {
            networks.stop().await;
        }
    }

    /// Deletes every sandbox, then ends as [`Self::leave`] does.
    pub async fn stop_all(self: &Arc<Self>) {
        self.drain();
        self.stopping.cancel();
        let mut deletes = JoinSet::new();
        for id in self.registry.ids() {
            let pool = Arc::clone(self);
            deletes.spawn(async move {
                if let Err(error) = pool.delete(&id, false).await {
                    tracing::error!(sandbox = %id, %error, "not deleted");
                }
            });
        }
        deletes.join_all().await;
        self.leave().await;
    }

    async fn forget_requests(self: Arc<Self>) {
        let leaving = self.leaving.clone();
        let mut ticks = tokio::time::interval(FORGET_EVERY);
        while leaving.run_until_cancelled(ticks.tick()).await.is_some() {
            let due = self.requests.forget_due();
            if due.is_empty() {
                continue;
            }
            if let Err(error) = self.store.commit(due).await {
                tracing::warn!(%error, "old replies stay on disk");
            }
        }
    }
}
