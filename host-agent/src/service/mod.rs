//! gRPC: what travels in and out, and nothing that decides.

mod connect;
pub(crate) mod convert;
mod network;
mod node;
mod relay;
mod sandboxes;
mod snapshots;
mod watch;

pub use network::NetworkApi;
pub use node::NodeApi;
pub use relay::{Relay, Relayed};
pub use sandboxes::SandboxApi;
