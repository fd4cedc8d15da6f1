//! Calls to soulboxd, as a bench makes them.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use soulbox_proto::host::v1::sandbox_service_client::SandboxServiceClient;
use soulbox_proto::host::v1::{
    CreateSandboxRequest, CreateSandboxResponse, DeleteSandboxRequest, ForkSandboxRequest,
    ForkSandboxResponse, GetSandboxRequest, PauseSandboxRequest, Resources, ResumeSandboxRequest,
    Sandbox, SnapshotSandboxRequest, SnapshotSandboxResponse, StageTime, Usage,
    create_sandbox_request,
};
use tonic::transport::Channel;

use crate::agent::{self, Agent};

/// How long the daemon may take to have its template's snapshot.
const TEMPLATE: Duration = Duration::from_secs(900);

pub(crate) struct Client {
    channel: Channel,
    sandboxes: SandboxServiceClient<Channel>,
}

// === impl Client ===

impl Client {
    pub(crate) async fn connect(socket: &Path) -> Result<Self> {
        let channel = agent::dial(socket)
            .await
            .with_context(|| format!("connecting to soulboxd at {}", socket.display()))?;
        Ok(Self {
            sandboxes: SandboxServiceClient::new(channel.clone()),
            channel,
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
        self.agent(id)?.run(argv).await?;
        Ok(())
    }

    /// Writes a file in the sandbox, as the user that programs there run as.
    pub(crate) async fn upload(&mut self, id: &str, path: &str, bytes: &[u8]) -> Result<()> {
        let argv = ["sh", "-c", "cat >\"$1\"", "sh", path];
        self.agent(id)?.feed(&argv, bytes).await
    }

    /// The services of a sandbox.
    pub(crate) fn agent(&self, id: &str) -> Result<Agent> {
        Agent::new(self.channel.clone(), id)
    }
}

/// The sandbox of a reply, which always has one.
pub(crate) fn id_of(sandbox: Option<&Sandbox>) -> Result<String> {
    let sandbox = sandbox.context("a reply without its sandbox")?;
    Ok(sandbox.id.clone())
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
