//! Every command but `run` and `exec`: one call, then its reply printed.

use soulbox_proto::host::v1::{
    DeleteSandboxRequest, GetNodeRequest, GetSandboxRequest, ListSandboxesRequest,
    ListTemplatesRequest, Sandbox, StageTime, WatchSandboxesRequest,
};

use super::args::{CreateArgs, Output, RmArgs};
use super::connect::Host;
use super::deletions::Deletions;
use super::error::CliError;
use super::{output, run};

type Labels = Vec<(String, String)>;

pub(super) async fn create(host: &Host, format: Output, args: CreateArgs) -> Result<u8, CliError> {
    let request = run::create_request(args.sandbox, args.request_id)?;
    let created = host.sandboxes().await?.create_sandbox(request).await?;
    let created = created.into_inner();
    tell(format, created.sandbox, args.timings, &created.stages)
}

/// A sandbox after an operation: its id, or all of it.
pub(super) fn tell(
    format: Output,
    sandbox: Option<Sandbox>,
    timings: bool,
    stages: &[StageTime],
) -> Result<u8, CliError> {
    let sandbox = sandbox.unwrap_or_default();
    match format {
        Output::Table => output::line(&sandbox.id)?,
        Output::Json => output::json(&output::sandbox(&sandbox))?,
    }
    if timings {
        output::stages(format, stages);
    }
    Ok(0)
}

pub(super) async fn ls(host: &Host, format: Output, labels: Labels) -> Result<u8, CliError> {
    let sandboxes = list(host, labels).await?;
    match format {
        Output::Table => output::sandbox_table(&sandboxes)?,
        Output::Json => output::json(&sandboxes.iter().map(output::sandbox).collect())?,
    }
    Ok(0)
}

async fn list(host: &Host, labels: Labels) -> Result<Vec<Sandbox>, CliError> {
    let mut client = host.sandboxes().await?;
    let mut request = ListSandboxesRequest {
        labels: labels.into_iter().collect(),
        ..ListSandboxesRequest::default()
    };
    let mut sandboxes = Vec::new();
    loop {
        let page = client.list_sandboxes(request.clone()).await?.into_inner();
        sandboxes.extend(page.sandboxes);
        if page.next_page_token.is_empty() {
            return Ok(sandboxes);
        }
        request.page_token = page.next_page_token;
    }
}

pub(super) async fn get(host: &Host, format: Output, id: String) -> Result<u8, CliError> {
    let reply = host
        .sandboxes()
        .await?
        .get_sandbox(GetSandboxRequest { id })
        .await?;
    let reply = reply.into_inner();
    let sandbox = reply.sandbox.unwrap_or_default();
    match format {
        Output::Table => output::sandbox_details(&sandbox, reply.usage.as_ref())?,
        Output::Json => {
            let mut json = output::sandbox(&sandbox);
            json["usage"] = output::usage(reply.usage.as_ref());
            output::json(&json)?;
        }
    }
    Ok(0)
}

pub(super) async fn rm(host: &Host, args: RmArgs) -> Result<u8, CliError> {
    let ids = if args.all {
        let sandboxes = list(host, Labels::new()).await?;
        sandboxes.into_iter().map(|sandbox| sandbox.id).collect()
    } else {
        args.ids
    };
    let client = host.sandboxes().await?;
    let mut deletes = tokio::task::JoinSet::new();
    for id in ids {
        let mut client = client.clone();
        deletes.spawn(async move {
            let request = DeleteSandboxRequest {
                id: id.clone(),
                force: args.force,
            };
            (id, client.delete_sandbox(request).await)
        });
    }
    let mut deletions = Deletions::of("sandboxes");
    for (id, deleted) in deletes.join_all().await {
        deletions.tell(&id, deleted)?;
    }
    deletions.end()
}

pub(super) async fn watch(host: &Host, format: Output, labels: Labels) -> Result<u8, CliError> {
    let request = WatchSandboxesRequest {
        labels: labels.into_iter().collect(),
    };
    let mut changes = host
        .sandboxes()
        .await?
        .watch_sandboxes(request)
        .await?
        .into_inner();
    while let Some(change) = changes.message().await? {
        output::change(format, &change)?;
    }
    Ok(0)
}

pub(super) async fn node(host: &Host, format: Output) -> Result<u8, CliError> {
    let reply = host.node().await?.get_node(GetNodeRequest {}).await?;
    let node = reply.into_inner().node.unwrap_or_default();
    match format {
        Output::Table => output::node_details(&node)?,
        Output::Json => output::json(&output::node(&node))?,
    }
    Ok(0)
}

pub(super) async fn template_ls(host: &Host, format: Output) -> Result<u8, CliError> {
    let reply = host
        .sandboxes()
        .await?
        .list_templates(ListTemplatesRequest {})
        .await?;
    let templates = reply.into_inner().templates;
    match format {
        Output::Table => output::template_table(&templates)?,
        Output::Json => output::json(&templates.iter().map(output::template).collect())?,
    }
    Ok(0)
}
