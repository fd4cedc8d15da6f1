//! The agent inside a guest, as this daemon reaches it: gRPC over the
//! monitor's vsock socket.

mod connect;
mod hello;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use soulbox_proto::guest::v1::process_service_client::ProcessServiceClient;
use soulbox_proto::guest::v1::system_service_client::SystemServiceClient;
use soulbox_proto::guest::v1::{
    ConfigureRequest, ExecRequest, ExecResponse, HealthRequest, HealthResponse, ProcessSpec,
    ShutdownRequest, exec_request, exec_response, exited,
};
use tokio_stream::Stream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

pub use hello::{HelloError, read_hello};

/// A way to one guest's agent.
///
/// Each Exec has a connection of its own: the Execs of one connection would
/// share its window, and one that nobody reads would hold up all others.
#[derive(Debug, Clone)]
pub struct Guest {
    vsock_socket: PathBuf,
    /// For calls that are short both ways; clones share it.
    control: Channel,
}

// === impl Guest ===

impl Guest {
    /// A client that dials through `vsock_socket` when it is first used.
    pub fn new(vsock_socket: &Path) -> Self {
        Self {
            vsock_socket: vsock_socket.to_owned(),
            control: connect::channel(vsock_socket.to_owned()),
        }
    }

    /// Tells the guest its name and the time.
    pub async fn configure(&self, hostname: &str) -> Result<(), Status> {
        let request = ConfigureRequest {
            hostname: hostname.to_owned(),
            wall_clock: Some(SystemTime::now().into()),
        };
        self.system().configure(request).await?;
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

    pub async fn exec(
        &self,
        input: impl Stream<Item = ExecRequest> + Send + 'static,
    ) -> Result<Streaming<ExecResponse>, Status> {
        let channel = connect::channel(self.vsock_socket.clone());
        let mut client = ProcessServiceClient::new(channel);
        Ok(client.exec(input).await?.into_inner())
    }

    /// Runs `/bin/true`: the proof that programs run. It reads and says nothing,
    /// so it needs no connection of its own.
    pub async fn prove_exec(&self) -> Result<(), Status> {
        let start = ProcessSpec {
            argv: vec!["/bin/true".into()],
            cwd: "/".into(),
            user: "0:0".to_owned(),
            timeout: Duration::from_secs(60).try_into().ok(),
            ..ProcessSpec::default()
        };
        let request = ExecRequest {
            message: Some(exec_request::Message::Start(start)),
        };
        let mut client = ProcessServiceClient::new(self.control.clone());
        let events = client.exec(tokio_stream::once(request)).await?;
        let mut events = events.into_inner();
        while let Some(response) = events.message().await? {
            if let Some(exec_response::Event::Exited(exited)) = response.event {
                return match exited.status {
                    Some(exited::Status::Code(0)) => Ok(()),
                    other => Err(Status::internal(format!("/bin/true ended with {other:?}"))),
                };
            }
        }
        Err(Status::new(Code::Internal, "the agent told no exit status"))
    }

    fn system(&self) -> SystemServiceClient<Channel> {
        SystemServiceClient::new(self.control.clone())
    }
}
