//! `soulbox run`: a sandbox for one program.

use std::time::{Duration, Instant};

use soulbox_proto::host::v1::sandbox_service_client::SandboxServiceClient;
use soulbox_proto::host::v1::{CreateSandboxRequest, DeleteSandboxRequest, Resources, StageTime};
use tonic::transport::Channel;

use super::args::{Output, RunArgs, SandboxArgs};
use super::connect::Host;
use super::error::CliError;
use super::exec;
use super::output;
use super::signals::Signals;

/// How long a sandbox that is not wanted any more may take to go.
const CLEAN_UP: Duration = Duration::from_secs(10);

pub(super) async fn run(host: &Host, format: Output, args: RunArgs) -> Result<u8, CliError> {
    let process = exec::process(args.process, args.argv)?;
    exec::check_terminal(&process)?;
    let request = create_request(args.sandbox, String::new())?;
    let mut signals = Signals::install()?;
    let mut client = host.sandboxes().await?;
    let created = tokio::select! {
        created = client.create_sandbox(request) => created?.into_inner(),
        // Without a request id, a create whose caller goes is undone.
        _ = signals.next() => return Err(CliError::Interrupted),
    };
    let id = created
        .sandbox
        .map(|sandbox| sandbox.id)
        .unwrap_or_default();
    let began = Instant::now();
    let outcome = async {
        let mut processes = match args.keep {
            true => host.processes(&id).await?,
            false => host.last_process(&id).await?,
        };
        exec::attached(&mut processes, process, &mut signals).await
    };
    let outcome = outcome.await;
    if args.keep {
        eprintln!("soulbox: kept {id}");
    } else if outcome.is_err() {
        clean_up(&mut client, &id).await;
    }
    if args.timings {
        let mut stages = created.stages;
        stages.push(StageTime {
            stage: "program and deletion".to_owned(),
            duration_us: u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX),
        });
        output::stages(format, &stages);
    }
    outcome
}

pub(super) fn create_request(
    args: SandboxArgs,
    request_id: String,
) -> Result<CreateSandboxRequest, CliError> {
    Ok(CreateSandboxRequest {
        request_id,
        template: args.template,
        resources: Some(Resources {
            vcpus: args.vcpus.unwrap_or_default(),
            memory_mib: args.memory_mib.unwrap_or_default(),
            disk_mib: args.disk_mib.unwrap_or_default(),
        }),
        ttl: args.ttl.and_then(|ttl| ttl.try_into().ok()),
        labels: args.labels.into_iter().collect(),
        network: args.net.request()?,
    })
}

/// The daemon deletes it too when it sees the call's end; this waits for that.
async fn clean_up(client: &mut SandboxServiceClient<Channel>, id: &str) {
    let request = DeleteSandboxRequest {
        id: id.to_owned(),
        force: true,
    };
    let deleted = tokio::time::timeout(CLEAN_UP, client.delete_sandbox(request)).await;
    if !matches!(deleted, Ok(Ok(_))) {
        eprintln!("soulbox: {id} may still be there; delete it with `soulbox rm --force {id}`");
    }
}
