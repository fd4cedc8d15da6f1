//! The agent inside a guest, as this daemon reaches it: gRPC over the
//! monitor's vsock socket.

mod connect;
mod hello;
mod wire;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use soulbox_proto::guest::v1::process_service_client::ProcessServiceClient;
use soulbox_proto::guest::v1::system_service_client::SystemServiceClient;
use soulbox_proto::guest::v1::{
    ConfigureRequest, ExecRequest, HealthRequest, HealthResponse, Network, ProcessSpec,
    ShutdownRequest, SuspendRequest, exec_request, exec_response, exited,
};
use tonic::body::Body;
use tonic::{Code, Status};

use crate::ingress::{GuestStream, OpenError};
use connect::Dialler;
pub use hello::{HelloError, read_hello};
#[cfg(test)]
pub(crate) use wire::drop_undecodable;
use wire::{Caller, Wire};
pub use wire::{Reply, Way, WireError};

/// A key of the kernel's generator has half of it.
const ENTROPY_BYTES: usize = 64;
/// What is kept of what a program says that the daemon runs for itself.
const MAX_OUTPUT_BYTES: usize = 64 * 1024;

/// A way to one guest's agent. Clones share its connections.
#[derive(Debug, Clone)]
pub struct Guest {
    wire: Arc<Wire>,
}

/// Who a guest is from now on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity<'a> {
    /// A new one, of this name.
    New(&'a str),
    /// The one that it had.
    Same,
    /// The one that it had, on another machine.
    Resumed,
}

// === impl Guest ===

impl Guest {
    /// A client that dials through `vsock_socket` when it is first used.
    pub fn new(vsock_socket: &Path) -> Self {
        Self::restored(vsock_socket, Vec::new())
    }

    /// As [`Self::new`], with connections that the guest has accepted already.
    pub fn restored(vsock_socket: &Path, spares: Vec<OwnedFd>) -> Self {
        Self {
            wire: Wire::new(Dialler::new(vsock_socket, spares)),
        }
    }

    /// Tells the guest who it is, what time it is and what network it has, and gives
    /// it randomness that no copy of it has. Its programs run from then on.
    pub async fn configure(
        &self,
        identity: Identity<'_>,
        network: Option<Network>,
    ) -> Result<(), Status> {
        let mut entropy = vec![0; ENTROPY_BYTES];
        let filled = rustix::rand::getrandom(
            entropy.as_mut_slice(),
            rustix::rand::GetRandomFlags::empty(),
        );
        filled.map_err(|error| Status::internal(format!("the host has no randomness: {error}")))?;
        let (hostname, new_identity) = match identity {
            Identity::New(name) => (name.to_owned(), true),
            Identity::Same | Identity::Resumed => (String::new(), false),
        };
        let request = ConfigureRequest {
            hostname,
            wall_clock: Some(SystemTime::now().into()),
            entropy: entropy.into(),
            new_identity,
            network,
            reset_connections: identity != Identity::Same,
        };
        self.system().configure(request).await?;
        Ok(())
    }

    /// Stops the guest's programs where they are, until it is configured again.
    pub async fn suspend(&self) -> Result<(), Status> {
        self.system().suspend(SuspendRequest {}).await?;
        Ok(())
    }

    pub async fn health(&self) -> Result<HealthResponse, Status> {
        Ok(self.system().health(HealthRequest {}).await?.into_inner())
    }

    /// Asks the guest to power itself off.
    pub async fn shutdown(&self) -> Result<(), Status> {
        self.system().shutdown(ShutdownRequest {}).await?;
        Ok(())
    }

    /// Passes a call on as it is: of `request` the path, the headers and the body. The
    /// answer is the agent's own, which is not to be trusted.
    pub async fn call(
        &self,
        way: Way,
        request: http::Request<Body>,
    ) -> Result<http::Response<Reply>, WireError> {
        self.wire.call(way, request).await
    }

    /// Connects to a port inside the guest, which needs no network for that.
    pub async fn connect(&self, port: u16) -> Result<GuestStream, OpenError> {
        GuestStream::open(self.wire.caller(Way::Own), port).await
    }

    /// Runs `/bin/true`: the proof that programs run. It reads and says nothing,
    /// so it needs no connection of its own.
    pub async fn prove_exec(&self) -> Result<(), Status> {
        self.run(&["/bin/true".to_owned()]).await.map(drop)
    }

    /// Runs a program as root, and returns the beginning of what it says.
    pub async fn run(&self, argv: &[String]) -> Result<Vec<u8>, Status> {
        let start = ProcessSpec {
            argv: argv.iter().map(|arg| arg.clone().into()).collect(),
            cwd: "/".into(),
            user: "0:0".to_owned(),
            timeout: Duration::from_secs(60).try_into().ok(),
            kill_on_disconnect: true,
            ..ProcessSpec::default()
        };
        let request = ExecRequest {
            message: Some(exec_request::Message::Start(start)),
        };
        let mut client = ProcessServiceClient::new(self.wire.caller(Way::Shared));
        let events = client.exec(tokio_stream::once(request)).await?;
        let mut events = events.into_inner();
        let mut said = Vec::new();
        while let Some(response) = events.message().await? {
            match response.event {
                Some(exec_response::Event::Stdout(bytes)) => {
                    let room = MAX_OUTPUT_BYTES.saturating_sub(said.len());
                    said.extend_from_slice(&bytes[..bytes.len().min(room)]);
                }
                Some(exec_response::Event::Exited(exited)) => {
                    return match exited.status {
                        Some(exited::Status::Code(0)) => Ok(said),
                        other => Err(Status::internal(format!(
                            "{} ended with {other:?}",
                            argv.first().map_or("", String::as_str)
                        ))),
                    };
                }
                _ => {}
            }
        }
        Err(Status::new(Code::Internal, "the agent told no exit status"))
    }

    fn system(&self) -> SystemServiceClient<Caller> {
        SystemServiceClient::new(self.wire.caller(Way::Shared))
    }
}
