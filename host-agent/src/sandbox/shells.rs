//! Shells: monitors that have made everything of a machine that no template has a
//! part in, and wait. One is used once.
//!
//! What most restores of a shape begin with, the memory of the template's own
//! snapshot and what its guests touch first, a shell maps ahead too: that is most of
//! the work of a restore. One that is then wanted for something else maps that over it.
//!
//! A shell has no control listener, so it ends by itself when the daemon does.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use soulbox_proto::vmm::v1::{self as proto, reply, request};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use super::machine::Machine;
use super::pool::Pool;
use crate::config::{Config, ShellShape};
use crate::id::{SandboxId, SnapshotId};
use crate::monitor::{RequestError, SpawnError, monitors_below};
use crate::record::Resources;
use crate::sync::lock;

/// How long a monitor may take to prepare itself.
const PREPARE: Duration = Duration::from_secs(10);
/// How often shells are counted though nothing has happened.
const LOOK: Duration = Duration::from_secs(1);
/// How long making more can wait while there are plenty: whoever has just taken one
/// is about to start a guest, for which the CPUs are better used.
const LATER: Duration = Duration::from_millis(500);
/// How long no shell can be made before the next try.
const TRY_AGAIN: Duration = Duration::from_secs(5);
/// How long nobody takes a shell before fewer are kept.
const CALM: Duration = Duration::from_secs(30);

/// What shells are told apart by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub(super) vcpus: u32,
    pub(super) memory_mib: u32,
}

#[derive(Debug)]
pub(super) struct Shell {
    pub(super) machine: Machine,
    pub(super) pagemap: Option<File>,
    pub(super) log: PathBuf,
    /// Whose memory it has mapped.
    pub(super) first_layer: Option<SnapshotId>,
}

#[derive(Debug)]
pub(super) struct Shells {
    folder: PathBuf,
    minimum: usize,
    maximum: usize,
    shelves: Mutex<HashMap<Shape, Shelf>>,
    changed: Notify,
}

/// What a shell maps ahead.
struct FirstLayer {
    id: SnapshotId,
    layer: File,
    working_set: Option<File>,
}

#[derive(Debug)]
struct Shelf {
    ready: VecDeque<Shell>,
    /// How many are wanted: more after some were missing, fewer in calm times.
    wanted: usize,
    last_taken: Instant,
}

#[derive(Debug, thiserror::Error)]
enum ShellError {
    #[error("its log cannot be made ({0}); see the space and permissions of state_dir")]
    Log(#[source] std::io::Error),
    #[error(transparent)]
    Kvm(#[from] crate::kvm::KvmError),
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    #[error("it did not prepare itself: {0}")]
    Prepare(#[from] RequestError),
    #[error("it did not prepare itself in time")]
    Slow,
    #[error("it answered Prepare with something else")]
    Protocol,
}

// === impl Shape ===

impl From<Resources> for Shape {
    fn from(resources: Resources) -> Self {
        Self {
            vcpus: resources.vcpus,
            memory_mib: resources.memory_mib,
        }
    }
}

impl From<ShellShape> for Shape {
    fn from(shape: ShellShape) -> Self {
        Self {
            vcpus: shape.vcpus,
            memory_mib: shape.memory_mib,
        }
    }
}

// === impl Shells ===

impl Shells {
    pub(super) fn new(config: &Config, folder: &Path) -> Self {
        let shells = &config.shells;
        let default = ShellShape {
            vcpus: config.defaults.vcpus,
            memory_mib: config.defaults.memory_mib,
        };
        let shapes = match shells.shapes.as_slice() {
            [] => &[default],
            shapes => shapes,
        };
        let size = |count: u32| usize::try_from(count).unwrap_or(usize::MAX);
        let shelf = || Shelf {
            ready: VecDeque::new(),
            wanted: size(shells.minimum),
            last_taken: Instant::now(),
        };
        let none = shells.maximum == 0;
        let shapes = shapes.iter().filter(|_| !none);
        Self {
            folder: folder.to_owned(),
            minimum: size(shells.minimum),
            maximum: size(shells.maximum),
            shelves: Mutex::new(shapes.map(|shape| ((*shape).into(), shelf())).collect()),
            changed: Notify::new(),
        }
    }

    /// One that is ready, never to come back.
    pub(super) fn take(&self, shape: Shape) -> Option<Shell> {
        let mut shelves = lock(&self.shelves);
        let shelf = shelves.get_mut(&shape)?;
        shelf.last_taken = Instant::now();
        // Dead ones are left for the keeper to bury.
        let alive = shelf.ready.iter().position(|shell| !shell.is_over());
        if alive.is_none() {
            shelf.wanted = (shelf.wanted * 2).clamp(1, self.maximum);
        }
        self.changed.notify_one();
        alive.and_then(|index| shelf.ready.remove(index))
    }

    /// Says that so many will be taken soon.
    pub(super) fn expect(&self, shape: Shape, count: usize) {
        if let Some(shelf) = lock(&self.shelves).get_mut(&shape) {
            shelf.last_taken = Instant::now();
            shelf.wanted = shelf.wanted.max(count.min(self.maximum));
            self.changed.notify_one();
        }
    }

    /// Ends what an earlier daemon's shells have become, and removes their logs.
    pub(super) async fn remove_strays(&self) -> usize {
        let mut count = 0;
        for (_, mut process) in monitors_below(&self.folder) {
            process.end().await;
            count += 1;
        }
        for entry in std::fs::read_dir(&self.folder)
            .into_iter()
            .flatten()
            .flatten()
        {
            remove_log(&entry.path());
        }
        count
    }

    /// Keeps as many as are wanted, until the pool is left. What it is doing then it
    /// finishes: a shell that is half made would stay.
    pub(super) async fn keep(pool: Arc<Pool>) {
        let leaving = &pool.leaving;
        let shells = &pool.shells;
        let mut failing = false;
        while !leaving.is_cancelled() {
            shells.bury_the_dead_and_surplus(&pool).await;
            match shells.refill(&pool).await {
                Ok(()) => failing = false,
                Err(error) => {
                    if !failing {
                        tracing::warn!(%error, "no shell can be made; sandboxes start without");
                    }
                    failing = true;
                    leaving.run_until_cancelled(sleep(TRY_AGAIN)).await;
                }
            }
            // One that has just been notified is looked at once.
            let change = timeout(LOOK, shells.changed.notified());
            leaving.run_until_cancelled(change).await;
            leaving.run_until_cancelled(shells.leave_time()).await;
        }
        let left: Vec<Shell> = lock(&shells.shelves)
            .values_mut()
            .flat_map(|shelf| shelf.ready.drain(..))
            .collect();
        for shell in left {
            shell.end().await;
        }
    }

    /// Returns when [`LATER`] is over, or there are too few.
    async fn leave_time(&self) {
        let until_few = async {
            while self.has_plenty() {
                self.changed.notified().await;
            }
        };
        let _ = timeout(LATER, until_few).await;
    }

    /// Whether of each shape half of those wait that should.
    fn has_plenty(&self) -> bool {
        let shelves = lock(&self.shelves);
        shelves
            .values()
            .all(|shelf| shelf.ready.len() * 2 >= shelf.wanted)
    }

    async fn refill(&self, pool: &Arc<Pool>) -> Result<(), ShellError> {
        let pause = Duration::from_secs(1) / pool.config.shells.refill_per_second.max(1);
        let is_over = || pool.is_draining() || pool.leaving.is_cancelled();
        while let Some(shape) = self.lacking().filter(|_| !is_over()) {
            let began = Instant::now();
            let shell = Shell::make(pool, &self.folder, shape).await?;
            // Replaced as soon as it dies.
            let over = shell.machine.over();
            let notified = Arc::clone(pool);
            pool.actors.spawn(async move {
                if notified.leaving.run_until_cancelled(over).await.is_some() {
                    notified.shells.changed.notify_one();
                }
            });
            if let Some(shelf) = lock(&self.shelves).get_mut(&shape) {
                shelf.ready.push_back(shell);
            }
            let rest = sleep(pause.saturating_sub(began.elapsed()));
            pool.leaving.run_until_cancelled(rest).await;
        }
        Ok(())
    }

    /// The shape of which the most are missing.
    fn lacking(&self) -> Option<Shape> {
        let shelves = lock(&self.shelves);
        let missing = |shelf: &Shelf| shelf.wanted.saturating_sub(shelf.ready.len());
        let (shape, shelf) = shelves.iter().max_by_key(|(_, shelf)| missing(shelf))?;
        (missing(shelf) > 0).then_some(*shape)
    }

    async fn bury_the_dead_and_surplus(&self, pool: &Pool) {
        let mut gone = Vec::new();
        for (shape, shelf) in lock(&self.shelves).iter_mut() {
            let first_layer = pool.first_layer(*shape);
            // One after the other, for they are of use until there are better ones.
            let mut may_replace = true;
            if shelf.wanted > self.minimum && shelf.last_taken.elapsed() > CALM {
                shelf.wanted -= 1;
            }
            let mut kept = VecDeque::new();
            for shell in shelf.ready.drain(..) {
                let outdated = first_layer.is_some() && shell.first_layer != first_layer;
                if shell.is_over() || kept.len() >= shelf.wanted {
                    gone.push(shell);
                } else if outdated && std::mem::take(&mut may_replace) {
                    self.changed.notify_one();
                    gone.push(shell);
                } else {
                    kept.push_back(shell);
                }
            }
            shelf.ready = kept;
        }
        for shell in gone {
            if shell.is_over() {
                tracing::warn!(
                    pid = shell.machine.process.identity().pid,
                    "a shell died; making another"
                );
            }
            shell.end().await;
        }
    }
}

// === impl Pool ===

impl Pool {
    /// What shells of a shape are likely to be restored from.
    fn first_layer(&self, shape: Shape) -> Option<SnapshotId> {
        let offered = self.snapshots.offered()?;
        let fits = Shape::from(offered.resources) == shape;
        offered.chains.memory.into_iter().next().filter(|_| fits)
    }

    async fn first_layer_files(&self, shape: Shape) -> Option<FirstLayer> {
        let id = self.first_layer(shape)?;
        match self.snapshots.open_memory(&id).await {
            Ok((layer, _)) => Some(FirstLayer {
                layer,
                working_set: self.snapshots.files(&id).open_working_set(),
                id,
            }),
            Err(error) => {
                tracing::debug!(snapshot = %id, %error, "shells do not map its memory ahead");
                None
            }
        }
    }
}

// === impl Shell ===

impl Shell {
    async fn make(pool: &Pool, folder: &Path, shape: Shape) -> Result<Self, ShellError> {
        let kvm = pool.kvm.get()?;
        // Any name that no other has.
        let name = SandboxId::random().map_err(ShellError::Log)?;
        let path = folder.join(format!("{}.log", &name.as_str()[3..]));
        let log = File::create_new(&path).map_err(ShellError::Log)?;
        let (process, socket) = match crate::monitor::spawn(&pool.monitor_binary, log) {
            Ok(spawned) => spawned,
            Err(error) => {
                remove_log(&path);
                return Err(error.into());
            }
        };
        let pagemap = process.pagemap().ok();
        let mut shell = Self {
            machine: Machine::new(process, socket),
            pagemap,
            log: path,
            first_layer: None,
        };
        let memory = pool.first_layer_files(shape).await;
        let mut fds = vec![kvm.device.as_fd()];
        let mut attach = |file| {
            fds.push(file);
            u32::try_from(fds.len() - 1).unwrap_or(u32::MAX)
        };
        let prepare = request::Op::Prepare(proto::Prepare {
            shape: Some(proto::MachineShape {
                vcpu_count: shape.vcpus,
                memory_mib: shape.memory_mib,
                block_devices: 1,
                vsock: true,
                net: true,
            }),
            kvm_fd: 0,
            memory_fd: memory.as_ref().map(|memory| attach(memory.layer.as_fd())),
            working_set_fd: memory
                .as_ref()
                .and_then(|memory| Some(attach(memory.working_set.as_ref()?.as_fd()))),
        });
        let asked = timeout(PREPARE, shell.machine.control.request(prepare, &fds)).await;
        let failed = match asked {
            Ok(Ok(reply::Result::Prepared(_))) => {
                shell.first_layer = memory.map(|memory| memory.id);
                return Ok(shell);
            }
            Ok(Ok(_)) => ShellError::Protocol,
            Ok(Err(error)) => error.into(),
            Err(_) => ShellError::Slow,
        };
        shell.end().await;
        Err(failed)
    }

    fn is_over(&self) -> bool {
        self.machine.is_over()
    }

    async fn end(mut self) {
        self.machine.process.end().await;
        remove_log(&self.log);
    }
}

fn remove_log(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        tracing::debug!(path = %path.display(), %error, "a shell's log stays");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shells(text: &str) -> Shells {
        let config = Config::parse(Path::new("test.toml"), text).unwrap();
        Shells::new(&config, Path::new("/none"))
    }

    #[test]
    fn one_that_is_missing_makes_more_be_wanted() {
        let shells = shells("[shells]\nminimum = 1\nmaximum = 5\n");
        let default = Shape {
            vcpus: 1,
            memory_mib: 512,
        };
        let wanted = || lock(&shells.shelves)[&default].wanted;
        assert_eq!((wanted(), shells.lacking()), (1, Some(default)));
        for expected in [2, 4, 5, 5] {
            assert!(shells.take(default).is_none());
            assert_eq!(wanted(), expected);
        }
        shells.expect(default, 1000);
        assert_eq!(wanted(), 5);
        let other = Shape {
            vcpus: 2,
            ..default
        };
        assert!(shells.take(other).is_none() && !lock(&shells.shelves).contains_key(&other));
    }

    #[test]
    fn none_are_kept_where_none_are_configured() {
        let shells = shells("[shells]\nmaximum = 0\n");
        assert_eq!(shells.lacking(), None);
    }
}
