//! gRPC: what travels in and out, and nothing that decides.

mod agent;
pub(crate) mod convert;
mod exec;
mod node;
mod sandboxes;
mod snapshots;
mod watch;

pub use node::NodeApi;
pub use sandboxes::SandboxApi;
