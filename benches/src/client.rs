//! Calls to soulboxd, as a bench makes them.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hyper_util::rt::TokioIo;
use soulbox_proto::guest::SANDBOX_METADATA;
use soulbox_proto::guest::v1::process_service_client::ProcessServiceClient;
use soulbox_proto::guest::v1::{
    ExecRequest, ProcessInput, ProcessSpec, StdinEof, exec_request, exec_response::Event, exited,
    process_input,
};
use soulbox_proto::host::v1::sandbox_service_client::SandboxServiceClient;
use soulbox_proto::host::v1::{
    CreateSandboxRequest, CreateSandboxResponse, DeleteSandboxRequest, ForkSandboxRequest,
    ForkSandboxResponse, GetSandboxRequest, PauseSandboxRequest, Resources, ResumeSandboxRequest,
    Sandbox, SnapshotSandboxRequest, SnapshotSandboxResponse, StageTime, Usage,
    create_sandbox_request,
};
use tokio::net::UnixStream;
use tonic::Request;
use tonic::transport::{Channel, Endpoint};

/// How long the daemon may take to have its template's snapshot.
const TEMPLATE: Duration = Duration::from_secs(900);
/// Of one message of a program's input, in bytes.
const INPUT_BYTES: usize = 1 << 20;

pub(crate) struct Client {
    sandboxes: SandboxServiceClient<Channel>,
    processes: ProcessServiceClient<Channel>,
}

// === impl Client ===

impl Client {
    pub(crate) async fn connect(socket: &Path) -> Result<Self> {
        let path = socket.to_owned();
        let channel = Endpoint::from_static("http://soulboxd")
            .connect_with_connector(tower::service_fn(move |_| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            }))
            .await
            .with_context(|| format!("connecting to soulboxd at {}", socket.display()))?;
        Ok(Self {
            sandboxes: SandboxServiceClient::new(channel.clone()),
            processes: ProcessServiceClient::new(channel),
        })
    }

    /// From the default template, of its default size or with other memory.
    pub(crate) async fn create(&mut self, memory_mib: u32) -> Result<CreateSandboxResponse> {
        let request = CreateSandboxRequest {
            resources: Some(Resources {
                memory_mib,
                ..Default::default()
            }),
            ..Default::default()
        };
        self.create_as(request).await
    }

    /// The same of its default size, and without a network.
    pub(crate) async fn create_without_network(&mut self) -> Result<CreateSandboxResponse> {
        let request = CreateSandboxRequest {
            network: Some(create_sandbox_request::Network::NoNetwork(true)),
            ..Default::default()
        };
        self.create_as(request).await
    }

    async fn create_as(&mut self, request: CreateSandboxRequest) -> Result<CreateSandboxResponse> {
        let created = self.sandboxes.create_sandbox(request).await;
        Ok(created.context("CreateSandbox")?.into_inner())
    }

    /// Waits until creates are restored. Returns their memory, in MiB.
    pub(crate) async fn await_template(&mut self) -> Result<u32> {
        let give_up = Instant::now() + TEMPLATE;
        loop {
            let created = self.create(0).await?;
            let sandbox = created.sandbox.context("a reply without its sandbox")?;
            self.delete(&sandbox.id).await?;
            if created.restored {
                let resources = sandbox.resources.unwrap_or_default();
                return Ok(resources.memory_mib);
            }
            ensure!(
                Instant::now() < give_up,
                "creates are still booted after {TEMPLATE:?}; does soulboxd make template snapshots?"
            );
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
    }

    pub(crate) async fn delete(&mut self, id: &str) -> Result<()> {
        let request = DeleteSandboxRequest {
            id: id.to_owned(),
            force: true,
        };
        self.sandboxes
            .delete_sandbox(request)
            .await
            .context("DeleteSandbox")?;
        Ok(())
    }

    pub(crate) async fn usage(&mut self, id: &str) -> Result<Usage> {
        let request = GetSandboxRequest { id: id.to_owned() };
        let got = self
            .sandboxes
            .get_sandbox(request)
            .await
            .context("GetSandbox")?;
        got.into_inner()
            .usage
            .with_context(|| format!("{id} is not running"))
    }

    pub(crate) async fn pause(&mut self, id: &str) -> Result<Vec<StageTime>> {
        let request = PauseSandboxRequest {
            id: id.to_owned(),
            cold: false,
        };
        let paused = self.sandboxes.pause_sandbox(request).await;
        Ok(paused.context("PauseSandbox")?.into_inner().stages)
    }

    pub(crate) async fn resume(&mut self, id: &str) -> Result<Vec<StageTime>> {
        let request = ResumeSandboxRequest { id: id.to_owned() };
        let resumed = self.sandboxes.resume_sandbox(request).await;
        Ok(resumed.context("ResumeSandbox")?.into_inner().stages)
    }

    pub(crate) async fn snapshot(&mut self, id: &str) -> Result<SnapshotSandboxResponse> {
        let request = SnapshotSandboxRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let snapshot = self.sandboxes.snapshot_sandbox(request).await;
        Ok(snapshot.context("SnapshotSandbox")?.into_inner())
    }

    pub(crate) async fn fork(&mut self, id: &str, count: u32) -> Result<ForkSandboxResponse> {
        let request = ForkSandboxRequest {
            id: id.to_owned(),
            count,
            ..Default::default()
        };
        let forked = self
            .sandboxes
            .fork_sandbox(request)
            .await
            .context("ForkSandbox")?;
        Ok(forked.into_inner())
    }

    /// Runs a program until what it prints has been read. One that fails is an
    /// error with what it said.
    pub(crate) async fn run(&mut self, id: &str, argv: &[&str]) -> Result<()> {
        self.exec(id, argv, None).await
    }

    /// Writes a file in the sandbox, as the user that programs there run as.
    pub(crate) async fn upload(&mut self, id: &str, path: &str, bytes: &[u8]) -> Result<()> {
        let argv = ["sh", "-c", "cat >\"$1\"", "sh", path];
        self.exec(id, &argv, Some(bytes)).await
    }

    async fn exec(&mut self, id: &str, argv: &[&str], input: Option<&[u8]>) -> Result<()> {
        let process = ProcessSpec {
            argv: argv
                .iter()
                .map(|arg| arg.as_bytes().to_vec().into())
                .collect(),
            stdin: input.is_some(),
            ..Default::default()
        };
        let mut messages = vec![exec_request::Message::Start(process)];
        if let Some(input) = input {
            let chunks = input.chunks(INPUT_BYTES);
            messages.extend(
                chunks.map(|chunk| stdin(process_input::Input::Stdin(chunk.to_vec().into()))),
            );
            messages.push(stdin(process_input::Input::StdinEof(StdinEof {})));
        }
        let requests = tokio_stream::iter(messages.into_iter().map(|message| ExecRequest {
            message: Some(message),
        }));
        let mut request = Request::new(requests);
        let sandbox = id.parse().context("a sandbox id that is none")?;
        request.metadata_mut().insert(SANDBOX_METADATA, sandbox);
        let responses = self.processes.exec(request).await.context("Exec")?;
        let mut responses = responses.into_inner();
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
                Some(Event::Started(_) | Event::Dropped(_)) | None => {}
            }
        }
        bail!("the exec of {argv:?} ended without an exit")
    }
}

/// The sandbox of a reply, which always has one.
pub(crate) fn id_of(sandbox: Option<&Sandbox>) -> Result<String> {
    let sandbox = sandbox.context("a reply without its sandbox")?;
    Ok(sandbox.id.clone())
}

fn stdin(input: process_input::Input) -> exec_request::Message {
    exec_request::Message::Input(ProcessInput { input: Some(input) })
}

/// What a reply says of its stages, in milliseconds.
pub(crate) fn times(stages: &[StageTime]) -> impl Iterator<Item = (&str, f64)> {
    stages
        .iter()
        .map(|stage| (stage.stage.as_str(), stage.duration_us as f64 / 1e3))
}

/// An error unless the sandbox came to be as it was to.
pub(crate) fn check_origin(created: &CreateSandboxResponse, restored: bool) -> Result<()> {
    let words = |restored| if restored { "restored" } else { "booted" };
    ensure!(
        created.restored == restored,
        "a sandbox that was to be {} was {}; look at soulboxd's log",
        words(restored),
        words(created.restored)
    );
    Ok(())
}
