//! Ways from the host into a sandbox's ports.
//!
//! `forward` gives a guest's port a port of the host, `proxy` a host name. Both
//! reach the guest through [`Dial`], which knows whether a sandbox has a network;
//! where it has none, `guest_stream` goes through the guest's agent.

pub mod config;
mod forward;
mod guest_stream;
mod proxy;

use std::io;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};

pub use forward::{Forward, ForwardError, Forwards};
pub use guest_stream::{GuestStream, OpenError};
pub use proxy::{HostError, Proxy, Target};

use crate::id::SandboxId;

/// What flows between a guest's port and whoever asked for it.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

pub type Stream = Box<dyn Io>;

/// Reaches the ports of this host's sandboxes.
#[tonic::async_trait]
pub trait Dial: Send + Sync + 'static {
    /// Connects to `port` inside `sandbox`. Callers bound its time; dropping the
    /// future gives the attempt up.
    async fn dial(&self, sandbox: &SandboxId, port: u16) -> Result<Stream, DialError>;
}

#[derive(Debug, thiserror::Error)]
pub enum DialError {
    #[error("there is no sandbox {0} on this host: see `soulbox ls`")]
    NotFound(SandboxId),
    #[error("sandbox {sandbox} is {state}: only a running one has ports")]
    NotRunning { sandbox: SandboxId, state: String },
    #[error(
        "nothing in sandbox {sandbox} listens on port {port}: start the server first, and have it listen on 0.0.0.0"
    )]
    PortClosed { sandbox: SandboxId, port: u16 },
    #[error(
        "port {port} of sandbox {sandbox} took no connection within {waited_ms} ms: the guest may be overloaded; try again"
    )]
    TimedOut {
        sandbox: SandboxId,
        port: u16,
        waited_ms: u64,
    },
    #[error("port {port} of sandbox {sandbox} cannot be reached: look at the daemon's log")]
    Unreachable {
        sandbox: SandboxId,
        port: u16,
        source: io::Error,
    },
}

/// Dials within `limit`.
async fn dial_within(
    dial: &dyn Dial,
    sandbox: &SandboxId,
    port: u16,
    limit: Duration,
) -> Result<Stream, DialError> {
    match tokio::time::timeout(limit, dial.dial(sandbox, port)).await {
        Ok(dialled) => dialled,
        Err(_) => Err(DialError::TimedOut {
            sandbox: sandbox.clone(),
            port,
            waited_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
        }),
    }
}
