//! Connections to what sandboxes listen on.

use std::io;
use std::sync::Arc;

use tokio::net::TcpStream;

use super::pool::Pool;
use crate::id::SandboxId;
use crate::ingress::{Dial, DialError, OpenError, Stream};
use crate::record::State;

/// The ports of all sandboxes of a pool.
#[derive(Debug, Clone)]
pub struct Ports(Arc<Pool>);

// === impl Ports ===

impl Ports {
    pub fn new(pool: Arc<Pool>) -> Self {
        Self(pool)
    }
}

#[tonic::async_trait]
impl Dial for Ports {
    /// Over the sandbox's network; where it has none, or its server listens on
    /// loopback alone, through the guest's agent.
    async fn dial(&self, sandbox: &SandboxId, port: u16) -> Result<Stream, DialError> {
        let view = self.0.view(sandbox);
        let view = view.map_err(|_| DialError::NotFound(sandbox.clone()))?;
        let (state, slot, live) = {
            let view = view.borrow();
            (view.record.state, view.record.slot, view.live.clone())
        };
        let Some(live) = live.filter(|_| state == State::Running) else {
            return Err(DialError::NotRunning {
                sandbox: sandbox.clone(),
                state: state.to_string(),
            });
        };
        let unreachable = |source| DialError::Unreachable {
            sandbox: sandbox.clone(),
            port,
            source,
        };
        if let Some(slot) = slot {
            match TcpStream::connect((slot.ipv4, port)).await {
                Ok(stream) => return Ok(Box::new(stream)),
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(error) => return Err(unreachable(error)),
            }
        }
        match live.guest.connect(port).await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(OpenError::PortClosed(_)) => Err(DialError::PortClosed {
                sandbox: sandbox.clone(),
                port,
            }),
            Err(error) => Err(unreachable(io::Error::other(error))),
        }
    }
}
