//! Sandboxes: from a request to a running guest, and to nothing left of it.
//!
//! [`Pool`] is the way in. Each sandbox has one task, its actor, which alone
//! changes its record and owns its monitor; everybody else reads a [`View`].

mod actor;
mod collect;
mod create;
mod error;
mod files;
mod fork;
mod launch;
mod machine;
mod network;
mod operate;
mod pool;
mod ports;
mod reconcile;
mod registry;
mod requests;
mod restore;
mod save;
mod shells;
mod spec;
mod start;
mod stop;
mod warm;

pub use create::Created;
pub use error::{
    CreateError, DeleteError, NetworkError, OperateError, RestoreError, SaveError, StartError,
    UseError, WatchError,
};
pub use fork::Forked;
pub use operate::Operated;
pub use pool::{OpenPoolError, Pool};
pub use ports::Ports;
pub use reconcile::Summary;
pub use registry::{Change, ChangeKind, Live, Subscription, View};
pub use save::Saved;
pub use spec::{CreateSpec, ForkSpec, NetworkSpec, SnapshotSpec};

/// The monitor's limit.
pub const MAX_VCPUS: u32 = 32;
/// The monitor's limit.
pub const MIN_MEMORY_MIB: u32 = 128;
/// The monitor's limit: 1 TiB.
pub const MAX_MEMORY_MIB: u32 = 1 << 20;
/// 15 TiB. A layer is a sparse file of the disk's size and some more, and ext4 has
/// files of at most 16 TiB.
pub const MAX_DISK_MIB: u32 = 15 << 20;
/// A hundred years: more is surely a mistake of units, and a time that no
/// Timestamp holds is not far.
pub const MAX_TTL_SECONDS: u64 = 100 * 365 * 24 * 60 * 60;
