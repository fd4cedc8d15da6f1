//! A template's own snapshot: made in the background from a guest that is warm,
//! and made again when anything that went into it has changed.

use std::fmt::Write as _;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use soulbox_proto::vmm::v1::{self as proto, request};
use tokio::time::{Instant, timeout};

use super::actor::Actor;
use super::create::Origin;
use super::error::{CreateError, SaveError, StartError};
use super::pool::Pool;
use super::restore::Plan;
use super::save::SaveSpec;
use super::spec::CreateSpec;
use super::start::KERNEL_CMDLINE;
use crate::guest::Identity;
use crate::id::{SandboxId, SnapshotId};
use crate::monitor::RequestError;
use crate::record::{Resources, SnapshotKind, SnapshotRecord, Transition};
use crate::store::Change;
use crate::template::Manifest;
use crate::time::Stopwatch;

/// After how long a snapshot that was not made is tried again, at first and later.
const TRY_AGAIN: Duration = Duration::from_secs(5);
const TRY_AGAIN_AT_MOST: Duration = Duration::from_secs(300);
/// How long a guest may take to give its free memory back, and to take it again.
const BALLOON: Duration = Duration::from_secs(15);
/// How long the balloon stands still before it counts as full.
const BALLOON_RESTS: Duration = Duration::from_secs(1);
const BALLOON_LOOK: Duration = Duration::from_millis(50);
/// What a guest keeps of its free memory.
const BALLOON_LEAVES_MIB: u64 = 48;
/// How long one program of the warm-up may take.
const WARM_UP: Duration = Duration::from_secs(120);

#[derive(Debug, thiserror::Error)]
enum WarmError {
    #[error("{0}")]
    Create(#[from] CreateError),
    #[error("{0}")]
    Start(#[from] StartError),
    #[error("{0}")]
    Save(#[from] SaveError),
    #[error("{} cannot be read ({source})", .path.display())]
    Monitor {
        path: std::path::PathBuf,
        source: std::io::Error,
    },
    #[error("{0}")]
    Request(#[from] RequestError),
    #[error("its file cannot be written, or memory not be read ({0})")]
    WorkingSet(std::io::Error),
    #[error("soulboxd is stopping")]
    Stopping,
}

// === impl Pool ===

impl Pool {
    /// Sees to it that there is one of the default template and sizes, until the
    /// pool is left.
    pub(super) async fn keep_template_snapshots(self: Arc<Self>) {
        if !self.config.templates.snapshot {
            self.discard_stale(None).await;
            return;
        }
        let mut pause = TRY_AGAIN;
        while !self.leaving.is_cancelled() {
            let wait = match self.make_template_snapshot().await {
                Ok(()) => {
                    pause = TRY_AGAIN;
                    None
                }
                Err(WarmError::Stopping) => return,
                Err(error) => {
                    let template = &self.config.defaults.template;
                    tracing::warn!(template, %error, "no snapshot of the template; its sandboxes are booted");
                    let wait = pause;
                    pause = (pause * 2).min(TRY_AGAIN_AT_MOST);
                    Some(wait)
                }
            };
            let next = async {
                match wait {
                    Some(wait) => tokio::time::sleep(wait).await,
                    None => self.template_changed.notified().await,
                }
            };
            self.leaving.run_until_cancelled(next).await;
        }
    }

    async fn make_template_snapshot(self: &Arc<Self>) -> Result<(), WarmError> {
        let name = &self.config.defaults.template;
        let template = self.templates.open(name).map_err(CreateError::from)?;
        let kvm = self.kvm.get().map_err(CreateError::from)?;
        let resources = CreateSpec::default().resolve(
            &self.config.defaults,
            &template.manifest,
            self.admission.capacity(),
            kvm.max_vcpus,
        )?;
        let key = self.template_key(&template.manifest, resources).await?;
        self.discard_stale(Some(&key)).await;
        let found = self.snapshots.list(|record| {
            record.kind == SnapshotKind::Template
                && !record.stale
                && record.is_ready()
                && record.template == *name
                && record.resources == resources
                && record.key.as_deref() == Some(key.as_str())
        });
        if let Some(found) = found.first() {
            return self.offer_template_snapshot(found).await;
        }
        let reservation = self
            .admission
            .reserve(resources)
            .map_err(CreateError::from)?;
        let id = SandboxId::random().map_err(CreateError::Random)?;
        let base = (name.clone(), template.manifest.base());
        let origin = Origin::Boot(template);
        let record = self.new_record(id, resources, base, &origin);
        let mut actor = Actor::new(self, record);
        actor.is_listed = false;
        actor.reservation = Some(reservation);
        let Origin::Boot(template) = origin else {
            return Ok(());
        };
        tracing::info!(template = name, "making its snapshot");
        let made = actor.warm_up_and_save(&template, key);
        let made = self.leaving.run_until_cancelled(made).await;
        actor.remove_unlisted().await;
        let snapshot = made.unwrap_or(Err(WarmError::Stopping))?;
        self.offer_template_snapshot(&snapshot).await?;
        self.collect().await;
        Ok(())
    }

    /// Has sandboxes start from a template's own snapshot; before that they are
    /// booted, because a restore without the working set is slow too.
    async fn offer_template_snapshot(
        self: &Arc<Self>,
        snapshot: &SnapshotRecord,
    ) -> Result<(), WarmError> {
        let template = &snapshot.template;
        if self
            .snapshots
            .files(&snapshot.id)
            .open_working_set()
            .is_none()
        {
            match self.record_working_set(snapshot).await {
                Err(WarmError::Stopping) => return Err(WarmError::Stopping),
                Err(error) => {
                    tracing::warn!(template, %error, "what its sandboxes touch first is not known; they start slower");
                }
                Ok(()) => {}
            }
        }
        self.snapshots.offer(&snapshot.id);
        tracing::info!(template, snapshot = %snapshot.id, "its sandboxes start from a snapshot now");
        Ok(())
    }

    /// Restores a machine that nobody sees, and notes what it has touched when it
    /// has run its first programs.
    async fn record_working_set(
        self: &Arc<Self>,
        snapshot: &SnapshotRecord,
    ) -> Result<(), WarmError> {
        let (snapshot, hold) = self
            .snapshots
            .take(&snapshot.id)
            .ok_or(WarmError::Stopping)?;
        let mut plan = self.plan(&snapshot, hold).map_err(StartError::from)?;
        plan.records = true;
        let reservation = self
            .admission
            .reserve(snapshot.resources)
            .map_err(CreateError::from)?;
        let id = SandboxId::random().map_err(CreateError::Random)?;
        let base = (snapshot.template.clone(), snapshot.base.clone());
        let origin = Origin::Restore(Box::new(plan.clone()));
        let record = self.new_record(id.clone(), snapshot.resources, base, &origin);
        let mut actor = Actor::new(self, record);
        actor.is_listed = false;
        actor.reservation = Some(reservation);
        let files = self.snapshots.files(&snapshot.id);
        let evicted = files.clone();
        // What is read is what has come into the page cache.
        on_disk(move || evicted.evict_memory()).await?;
        let recorded = actor.restore_and_record(&plan, &id);
        let recorded = self.leaving.run_until_cancelled(recorded).await;
        actor.remove_unlisted().await;
        if let Err(error) = on_disk(move || files.cache_memory()).await {
            tracing::debug!(snapshot = %snapshot.id, %error, "its memory is not read ahead");
        }
        recorded.unwrap_or(Err(WarmError::Stopping))
    }

    /// A digest of all that goes into a template's own snapshot.
    async fn template_key(
        &self,
        manifest: &Manifest,
        resources: Resources,
    ) -> Result<String, WarmError> {
        let path = self.monitor_binary.clone();
        let monitor = tokio::task::spawn_blocking(move || {
            let mut hash = Sha256::new();
            let mut binary = std::fs::File::open(&path)?;
            std::io::copy(&mut binary, &mut HashWriter(&mut hash))?;
            Ok(hex(&hash.finalize()))
        });
        let monitor = monitor
            .await
            .unwrap_or_else(|error| Err(std::io::Error::other(error)));
        let monitor = monitor.map_err(|source| WarmError::Monitor {
            path: self.monitor_binary.clone(),
            source,
        })?;
        let parts = serde_json::json!([
            monitor,
            manifest.name,
            manifest.kernel.sha256,
            manifest.rootfs.sha256,
            manifest.agent_version,
            KERNEL_CMDLINE,
            resources,
            self.config.templates.warm_up,
        ]);
        Ok(hex(&Sha256::digest(parts.to_string().as_bytes())))
    }

    /// Whether the template is still the one that the snapshot was made of.
    pub(super) fn is_current(&self, snapshot: &SnapshotRecord, manifest: &Manifest) -> bool {
        snapshot.base == manifest.base()
    }

    /// Nothing is made from a template's own snapshot any more that another key
    /// would have.
    async fn discard_stale(&self, key: Option<&str>) {
        let stale = self.snapshots.list(|record| {
            record.kind == SnapshotKind::Template
                && !record.stale
                && record.is_ready()
                && (key.is_none() || record.key.as_deref() != key)
        });
        for record in stale {
            tracing::info!(template = record.template, snapshot = %record.id, "its snapshot is not of what there is now");
            self.discard(record).await;
        }
    }

    /// Has another one made of a template whose own snapshot is of no use.
    pub(super) async fn discard_template_snapshot(&self, id: &SnapshotId) {
        if let Some(record) = self.snapshots.get(id) {
            self.discard(record).await;
        }
        self.template_changed.notify_one();
    }

    async fn discard(&self, record: SnapshotRecord) {
        let record = SnapshotRecord {
            stale: true,
            ..record
        };
        self.snapshots.put(record.clone());
        let stored = self.store.commit(vec![Change::PutSnapshot(record)]).await;
        if let Err(error) = stored {
            tracing::warn!(%error, "that a snapshot is of no use is not on disk");
        }
        self.collect().await;
    }
}

// === impl Actor ===

impl Actor {
    async fn warm_up_and_save(
        &mut self,
        template: &crate::template::OpenTemplate,
        key: String,
    ) -> Result<SnapshotRecord, WarmError> {
        let mut watch = Stopwatch::start();
        self.record = self
            .record
            .apply(Transition::Start)
            .map_err(StartError::from)?;
        if let Err(error) = self.boot(template, &mut watch).await {
            return Err(self.explain(error).await.into());
        }
        self.record = self
            .record
            .apply(Transition::Run)
            .map_err(StartError::from)?;
        for argv in self.pool.config.templates.warm_up.clone() {
            self.warm_up_with(&argv).await;
        }
        // So that no clone has to write what the warm-up has left.
        self.warm_up_with(&["/bin/sync".to_owned()]).await;
        self.give_back_free_memory().await;
        let spec = SaveSpec {
            key: Some(key),
            ..SaveSpec::new(SnapshotKind::Template)
        };
        Ok(self.save(spec, Stopwatch::start()).await?.snapshot)
    }

    async fn restore_and_record(&mut self, plan: &Plan, id: &SandboxId) -> Result<(), WarmError> {
        let mut watch = Stopwatch::start();
        self.record = self
            .record
            .apply(Transition::Start)
            .map_err(StartError::from)?;
        let identity = Identity::New(id.as_str());
        if let Err(error) = self.restore(plan, identity, &mut watch).await {
            return Err(self.explain(error).await.into());
        }
        // Most of what people run is run by a shell.
        self.warm_up_with(&["/bin/sh", "-c", "/bin/echo"].map(str::to_owned))
            .await;
        let Some(machine) = &self.machine else {
            return Err(WarmError::Stopping);
        };
        let files = self.pool.snapshots.files(&plan.snapshot);
        let file = files.new_working_set().map_err(WarmError::WorkingSet)?;
        let record = request::Op::RecordWorkingSet(proto::RecordWorkingSet { file_fd: 0 });
        machine.control.request(record, &[file.as_fd()]).await?;
        files.keep_working_set().map_err(WarmError::WorkingSet)
    }

    /// A template need not have every program.
    async fn warm_up_with(&self, argv: &[String]) {
        let Some(guest) = &self.guest else { return };
        let program = argv.first().map_or("", String::as_str);
        match timeout(WARM_UP, guest.run(argv)).await {
            Ok(Ok(_)) => {}
            Ok(Err(status)) => {
                tracing::debug!(program, status = status.message(), "not warmed up with");
            }
            Err(_) => tracing::warn!(program, "did not end; not warmed up with"),
        }
    }

    /// What the guest does not use need not be in its snapshot.
    async fn give_back_free_memory(&self) {
        let Some(guest) = &self.guest else { return };
        // Not what is available: that is also what the warm-up has read.
        let meminfo = ["/bin/cat", "/proc/meminfo"].map(str::to_owned);
        let Ok(Ok(meminfo)) = timeout(WARM_UP, guest.run(&meminfo)).await else {
            return;
        };
        let Some(free_mib) = free_mib(&meminfo) else {
            return;
        };
        let target_mib = free_mib
            .saturating_sub(BALLOON_LEAVES_MIB)
            .min(self.record.resources.memory_mib.into());
        for target_mib in [target_mib, 0] {
            if let Err(error) = self.balloon_to(target_mib).await {
                tracing::debug!(%error, "the template's guest has no balloon");
            }
        }
    }

    /// Returns when the balloon has this size, or grows and shrinks no more.
    async fn balloon_to(&self, target_mib: u64) -> Result<(), crate::monitor::RequestError> {
        let Some(machine) = &self.machine else {
            return Ok(());
        };
        let set = request::Op::SetBalloon(proto::SetBalloon {
            target_mib: u32::try_from(target_mib).unwrap_or(0),
        });
        machine.control.request(set, &[]).await?;
        let deadline = Instant::now() + BALLOON;
        let (mut last_mib, mut since) = (None, Instant::now());
        while Instant::now() < deadline {
            let metrics = machine.control.metrics().await?;
            let balloon = metrics.devices.get("balloon");
            let actual_mib =
                balloon.and_then(|counters| counters.values.get("actual_mib").copied());
            if actual_mib.is_none() || actual_mib == Some(target_mib) {
                break;
            }
            if actual_mib != last_mib {
                (last_mib, since) = (actual_mib, Instant::now());
            } else if since.elapsed() > BALLOON_RESTS {
                break;
            }
            tokio::time::sleep(BALLOON_LOOK).await;
        }
        Ok(())
    }

    /// Leaves nothing of a sandbox that nobody has seen.
    async fn remove_unlisted(mut self) {
        if let Some(mut machine) = self.machine.take() {
            machine.process.end().await;
        }
        if let Some(making) = self.making.take() {
            let changes = self.forget_making(making);
            if let Err(error) = self.pool.store.commit(changes).await {
                tracing::warn!(%error, "a snapshot that was not made is still on record");
            }
        }
        if let Err(error) = self.files.remove() {
            tracing::error!(%error, "files are left over until the next start");
        }
    }
}

/// Does what may wait for a disk.
async fn on_disk(
    work: impl FnOnce() -> std::io::Result<()> + Send + 'static,
) -> Result<(), WarmError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(std::io::Error::other(error)))
        .map_err(WarmError::WorkingSet)
}

/// What nobody uses, by /proc/meminfo.
fn free_mib(meminfo: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(meminfo).ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemFree:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib >> 10)
}

struct HashWriter<'a>(&'a mut Sha256);

impl std::io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn hex(digest: &[u8]) -> String {
    let mut text = String::with_capacity(digest.len() * 2);
    for byte in digest {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_memory_is_read_from_what_the_kernel_says() {
        let meminfo = b"MemTotal:  507392 kB\nMemFree:  307200 kB\nMemAvailable: 400000 kB\n";
        assert_eq!(free_mib(meminfo), Some(300));
        for other in [b"".as_slice(), b"MemFree: many kB\n", &[0xff; 9]] {
            assert_eq!(free_mib(other), None);
        }
    }

    #[test]
    fn a_digest_is_written_in_hexadecimal() {
        assert_eq!(hex(&[0, 0x7f, 0xff]), "007fff");
    }
}
