//! Calls to soulboxd, as a bench makes them.

use std::path::Path;

use anyhow::{Context, Result, bail};
use hyper_util::rt::TokioIo;
use soulbox_proto::guest::v1::{ProcessSpec, exec_response::Event, exited};
use soulbox_proto::host::v1::sandbox_service_client::SandboxServiceClient;
use soulbox_proto::host::v1::{
    CreateSandboxRequest, CreateSandboxResponse, DeleteSandboxRequest, ExecRequest, ExecStart,
    ForkSandboxRequest, ForkSandboxResponse, GetSandboxRequest, PauseSandboxRequest, Resources,
    ResumeSandboxRequest, Sandbox, SnapshotSandboxRequest, SnapshotSandboxResponse, StageTime,
    Usage, exec_request,
};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

pub(super) struct Client(SandboxServiceClient<Channel>);

// === impl Client ===

impl Client {
    pub(super) async fn connect(socket: &Path) -> Result<Self> {
        let path = socket.to_owned();
        let channel = Endpoint::from_static("http://soulboxd")
            .connect_with_connector(tower::service_fn(move |_| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            }))
            .await
            .with_context(|| format!("connecting to soulboxd at {}", socket.display()))?;
        Ok(Self(SandboxServiceClient::new(channel)))
    }

    /// From the default template, of its default size or with other memory.
    pub(super) async fn create(&mut self, memory_mib: u32) -> Result<CreateSandboxResponse> {
        let request = CreateSandboxRequest {
            resources: Some(Resources {
                memory_mib,
                ..Default::default()
            }),
            ..Default::default()
        };
        let created = self.0.create_sandbox(request).await;
        Ok(created.context("CreateSandbox")?.into_inner())
    }

    pub(super) async fn delete(&mut self, id: &str) -> Result<()> {
        let request = DeleteSandboxRequest {
            id: id.to_owned(),
            force: true,
        };
        self.0
            .delete_sandbox(request)
            .await
            .context("DeleteSandbox")?;
        Ok(())
    }

    pub(super) async fn usage(&mut self, id: &str) -> Result<Usage> {
        let request = GetSandboxRequest { id: id.to_owned() };
        let got = self.0.get_sandbox(request).await.context("GetSandbox")?;
        got.into_inner()
            .usage
            .with_context(|| format!("{id} is not running"))
    }

    pub(super) async fn pause(&mut self, id: &str) -> Result<Vec<StageTime>> {
        let request = PauseSandboxRequest {
            id: id.to_owned(),
            cold: false,
        };
        let paused = self.0.pause_sandbox(request).await;
        Ok(paused.context("PauseSandbox")?.into_inner().stages)
    }

    pub(super) async fn resume(&mut self, id: &str) -> Result<Vec<StageTime>> {
        let request = ResumeSandboxRequest { id: id.to_owned() };
        let resumed = self.0.resume_sandbox(request).await;
        Ok(resumed.context("ResumeSandbox")?.into_inner().stages)
    }

    pub(super) async fn snapshot(&mut self, id: &str) -> Result<SnapshotSandboxResponse> {
        let request = SnapshotSandboxRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let snapshot = self.0.snapshot_sandbox(request).await;
        Ok(snapshot.context("SnapshotSandbox")?.into_inner())
    }

    pub(super) async fn fork(&mut self, id: &str, count: u32) -> Result<ForkSandboxResponse> {
        let request = ForkSandboxRequest {
            id: id.to_owned(),
            count,
            ..Default::default()
        };
        let forked = self.0.fork_sandbox(request).await.context("ForkSandbox")?;
        Ok(forked.into_inner())
    }

    /// Runs a program that prints something, until it has been read. One that fails
    /// is an error with what it said.
    pub(super) async fn run(&mut self, id: &str, argv: &[&str]) -> Result<()> {
        let process = ProcessSpec {
            argv: argv
                .iter()
                .map(|arg| arg.as_bytes().to_vec().into())
                .collect(),
            ..Default::default()
        };
        let start = ExecRequest {
            message: Some(exec_request::Message::Start(ExecStart {
                sandbox_id: id.to_owned(),
                process: Some(process),
                delete_sandbox_after: false,
            })),
        };
        let requests = tokio_stream::iter([start]);
        let mut responses = self.0.exec(requests).await.context("Exec")?.into_inner();
        let mut said = Vec::new();
        while let Some(response) = responses.message().await.context("Exec")? {
            match response.event {
                Some(Event::Stdout(bytes) | Event::Stderr(bytes)) => said.extend_from_slice(&bytes),
                Some(Event::Exited(exited)) => {
                    return match exited.status {
                        Some(exited::Status::Code(0)) => Ok(()),
                        status => bail!(
                            "{argv:?} ended with {status:?}: {}",
                            String::from_utf8_lossy(&said)
                        ),
                    };
                }
                Some(Event::Started(_)) | None => {}
            }
        }
        bail!("the exec of {argv:?} ended without an exit")
    }
}

/// The sandbox of a reply, which always has one.
pub(super) fn id_of(sandbox: Option<&Sandbox>) -> Result<String> {
    let sandbox = sandbox.context("a reply without its sandbox")?;
    Ok(sandbox.id.clone())
}
