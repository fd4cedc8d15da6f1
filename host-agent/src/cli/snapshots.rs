//! Commands that save sandboxes and bring them back.

use serde_json::json;
use soulbox_proto::host::v1::{
    DeleteSnapshotRequest, ForkSandboxRequest, ListSnapshotsRequest, PauseSandboxRequest,
    ResumeSandboxRequest, RollbackSandboxRequest, SnapshotSandboxRequest,
};

use super::args::{ForkArgs, Output, SnapshotArgs};
use super::commands::tell;
use super::connect::Host;
use super::deletions::Deletions;
use super::error::CliError;
use super::output;

pub(super) async fn pause(
    host: &Host,
    format: Output,
    id: String,
    cold: bool,
    timings: bool,
) -> Result<u8, CliError> {
    let request = PauseSandboxRequest { id, cold };
    let reply = host.sandboxes().await?.pause_sandbox(request).await?;
    let reply = reply.into_inner();
    tell(format, reply.sandbox, timings, &reply.stages)
}

pub(super) async fn resume(
    host: &Host,
    format: Output,
    id: String,
    timings: bool,
) -> Result<u8, CliError> {
    let request = ResumeSandboxRequest { id };
    let reply = host.sandboxes().await?.resume_sandbox(request).await?;
    let reply = reply.into_inner();
    tell(format, reply.sandbox, timings, &reply.stages)
}

pub(super) async fn roll_back(
    host: &Host,
    format: Output,
    id: String,
    snapshot_id: String,
    timings: bool,
) -> Result<u8, CliError> {
    let request = RollbackSandboxRequest { id, snapshot_id };
    let reply = host.sandboxes().await?.rollback_sandbox(request).await?;
    let reply = reply.into_inner();
    tell(format, reply.sandbox, timings, &reply.stages)
}

pub(super) async fn make(host: &Host, format: Output, args: SnapshotArgs) -> Result<u8, CliError> {
    let request = SnapshotSandboxRequest {
        id: args.id,
        name: args.name,
        labels: args.labels.into_iter().collect(),
        cold: args.cold,
    };
    let reply = host.sandboxes().await?.snapshot_sandbox(request).await?;
    let reply = reply.into_inner();
    let snapshot = reply.snapshot.unwrap_or_default();
    match format {
        Output::Table => output::line(&snapshot.id)?,
        Output::Json => {
            let mut json = output::snapshot(&snapshot);
            json["paused_us"] = json!(reply.paused_us);
            output::json(&json)?;
        }
    }
    if args.timings {
        output::stages(format, &reply.stages);
    }
    Ok(0)
}

pub(super) async fn fork(host: &Host, format: Output, args: ForkArgs) -> Result<u8, CliError> {
    let request = ForkSandboxRequest {
        id: args.id,
        count: args.count,
        labels: args.labels.into_iter().collect(),
        ttl: args.ttl.and_then(|ttl| ttl.try_into().ok()),
        delete_parent: args.delete_parent,
    };
    let reply = host.sandboxes().await?.fork_sandbox(request).await?;
    let reply = reply.into_inner();
    match format {
        Output::Table => {
            for child in &reply.children {
                let id = child.sandbox.as_ref().map_or("", |sandbox| &sandbox.id);
                output::line(id)?;
            }
        }
        Output::Json => {
            let children: Vec<_> = reply
                .children
                .iter()
                .map(|child| {
                    let sandbox = child.sandbox.clone().unwrap_or_default();
                    let mut json = output::sandbox(&sandbox);
                    json["stages"] = output::stages_json(&child.stages);
                    json
                })
                .collect();
            output::json(&json!({
                "children": children,
                "parent_paused_us": reply.parent_paused_us,
            }))?;
        }
    }
    if args.timings {
        output::stages(format, &reply.stages);
    }
    Ok(0)
}

pub(super) async fn ls(
    host: &Host,
    format: Output,
    sandbox_id: String,
    labels: Vec<(String, String)>,
) -> Result<u8, CliError> {
    let mut client = host.sandboxes().await?;
    let mut request = ListSnapshotsRequest {
        sandbox_id,
        labels: labels.into_iter().collect(),
        ..ListSnapshotsRequest::default()
    };
    let mut snapshots = Vec::new();
    loop {
        let page = client.list_snapshots(request.clone()).await?.into_inner();
        snapshots.extend(page.snapshots);
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    match format {
        Output::Table => output::snapshot_table(&snapshots)?,
        Output::Json => output::json(&snapshots.iter().map(output::snapshot).collect())?,
    }
    Ok(0)
}

/// One after the other, for later ones may build on earlier ones.
pub(super) async fn rm(host: &Host, ids: Vec<String>) -> Result<u8, CliError> {
    let mut client = host.sandboxes().await?;
    let mut deletions = Deletions::of("snapshots");
    for id in ids {
        let request = DeleteSnapshotRequest { id: id.clone() };
        deletions.tell(&id, client.delete_snapshot(request).await)?;
    }
    deletions.end()
}
