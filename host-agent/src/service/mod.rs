//! gRPC: what travels in and out, and nothing that decides.

mod agent;
mod connect;
pub(crate) mod convert;
mod exec;
mod network;
mod node;
mod sandboxes;
mod snapshots;
mod watch;

pub use network::NetworkApi;
pub use node::NodeApi;
pub use sandboxes::SandboxApi;
