//! Sandboxes: from a request to a running guest, and to nothing left of it.
//!
//! [`Pool`] is the way in. Each sandbox has one task, its actor, which alone
//! changes its record and owns its monitor; everybody else reads a [`View`].

mod actor;
mod create;
mod error;
mod files;
mod machine;
mod pool;
mod reconcile;
mod registry;
mod requests;
mod spec;
mod start;
mod stop;

pub use create::Created;
pub use error::{CreateError, DeleteError, StartError, UseError};
pub use pool::{OpenPoolError, Pool};
pub use reconcile::Summary;
pub use registry::{Change, ChangeKind, Live, Subscription, View};
pub use spec::CreateSpec;

/// The monitor's limit.
pub const MAX_VCPUS: u32 = 32;
/// The monitor's limit.
pub const MIN_MEMORY_MIB: u32 = 128;
