//! `soulbox.host.v1.SandboxService`.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use soulbox_proto::host::v1::sandbox_service_server::SandboxService;
use soulbox_proto::host::v1::{self as proto};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status};

use super::{convert, snapshots, watch};
use crate::id::SandboxId;
use crate::record::SnapshotRecord;
use crate::sandbox::{CreateError, CreateSpec, Pool};
use crate::status::{Bug, FieldViolation, status};

const DEFAULT_PAGE_SIZE: u32 = 100;
const MAX_PAGE_SIZE: u32 = 1000;
/// How long a monitor may take to tell its metrics: without them the sandbox
/// is still shown.
const METRICS: Duration = Duration::from_secs(1);

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[derive(Debug, Clone)]
pub struct SandboxApi {
    pool: Arc<Pool>,
    /// Holds a token for every call that a drain waits for.
    calls: TaskTracker,
    /// Ends the calls that would never end by themselves.
    stopping: CancellationToken,
}

// === impl SandboxApi ===

impl SandboxApi {
    pub fn new(pool: Arc<Pool>, calls: TaskTracker, stopping: CancellationToken) -> Self {
        Self {
            pool,
            calls,
            stopping,
        }
    }
}

#[tonic::async_trait]
impl SandboxService for SandboxApi {
    type WatchSandboxesStream = Responses<proto::WatchSandboxesResponse>;

    async fn create_sandbox(
        &self,
        request: Request<proto::CreateSandboxRequest>,
    ) -> Result<Response<proto::CreateSandboxResponse>, Status> {
        let _call = self.calls.token();
        let spec = CreateSpec::parse(request.into_inner()).map_err(|error| status(&error))?;
        let created = self.pool.create(spec).await?;
        Ok(Response::new(convert::created(created)))
    }

    async fn get_sandbox(
        &self,
        request: Request<proto::GetSandboxRequest>,
    ) -> Result<Response<proto::GetSandboxResponse>, Status> {
        let id = parse_id(&request.get_ref().id)?;
        let view = self.pool.view(&id).map_err(|error| status(&error))?;
        let (record, live) = {
            let view = view.borrow();
            (view.record.clone(), view.live.clone())
        };
        let usage = match live {
            Some(live) => match tokio::time::timeout(METRICS, live.control.metrics()).await {
                Ok(Ok(metrics)) => {
                    let memory = metrics.memory.unwrap_or_default();
                    let guest_private_bytes = memory.guest_private_bytes;
                    Some(proto::Usage {
                        guest_private_bytes,
                        monitor_private_bytes: live.monitor_private_bytes(guest_private_bytes),
                        disk_used_bytes: self.pool.disk_used_bytes(&record),
                    })
                }
                // It is just ending, or hangs: its state will tell.
                Ok(Err(_)) | Err(_) => None,
            },
            None => None,
        };
        Ok(Response::new(proto::GetSandboxResponse {
            sandbox: Some(convert::sandbox(&record)),
            usage,
        }))
    }

    async fn list_sandboxes(
        &self,
        request: Request<proto::ListSandboxesRequest>,
    ) -> Result<Response<proto::ListSandboxesResponse>, Status> {
        let request = request.into_inner();
        let (after, limit) = page(request.page_size, &request.page_token)?;
        let mut records = self
            .pool
            .list(after, limit + 1, |record| record.matches(&request.labels));
        let more = records.len() > limit;
        records.truncate(limit);
        let next = records.last().filter(|_| more);
        Ok(Response::new(proto::ListSandboxesResponse {
            next_page_token: next.map_or_else(String::new, |record| record.sequence.to_string()),
            sandboxes: records.iter().map(convert::sandbox).collect(),
        }))
    }

    async fn delete_sandbox(
        &self,
        request: Request<proto::DeleteSandboxRequest>,
    ) -> Result<Response<proto::DeleteSandboxResponse>, Status> {
        let _call = self.calls.token();
        let request = request.into_inner();
        let id = parse_id(&request.id)?;
        let deleted = self.pool.delete(&id, request.force).await;
        deleted.map_err(|error| status(&error))?;
        Ok(Response::new(proto::DeleteSandboxResponse {}))
    }

    async fn watch_sandboxes(
        &self,
        request: Request<proto::WatchSandboxesRequest>,
    ) -> Result<Response<Self::WatchSandboxesStream>, Status> {
        let labels = request.into_inner().labels;
        let changes = watch::watch(self.pool.subscribe(), labels, self.stopping.clone());
        Ok(Response::new(Box::pin(changes)))
    }

    async fn pause_sandbox(
        &self,
        request: Request<proto::PauseSandboxRequest>,
    ) -> Result<Response<proto::PauseSandboxResponse>, Status> {
        let _call = self.calls.token();
        snapshots::pause(&self.pool, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn resume_sandbox(
        &self,
        request: Request<proto::ResumeSandboxRequest>,
    ) -> Result<Response<proto::ResumeSandboxResponse>, Status> {
        let _call = self.calls.token();
        snapshots::resume(&self.pool, &request.into_inner())
            .await
            .map(Response::new)
    }

    async fn snapshot_sandbox(
        &self,
        request: Request<proto::SnapshotSandboxRequest>,
    ) -> Result<Response<proto::SnapshotSandboxResponse>, Status> {
        let _call = self.calls.token();
        snapshots::snapshot(&self.pool, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn rollback_sandbox(
        &self,
        request: Request<proto::RollbackSandboxRequest>,
    ) -> Result<Response<proto::RollbackSandboxResponse>, Status> {
        let _call = self.calls.token();
        snapshots::roll_back(&self.pool, &request.into_inner())
            .await
            .map(Response::new)
    }

    async fn fork_sandbox(
        &self,
        request: Request<proto::ForkSandboxRequest>,
    ) -> Result<Response<proto::ForkSandboxResponse>, Status> {
        let _call = self.calls.token();
        snapshots::fork(&self.pool, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn list_snapshots(
        &self,
        request: Request<proto::ListSnapshotsRequest>,
    ) -> Result<Response<proto::ListSnapshotsResponse>, Status> {
        snapshots::list(&self.pool, &request.into_inner()).map(Response::new)
    }

    async fn delete_snapshot(
        &self,
        request: Request<proto::DeleteSnapshotRequest>,
    ) -> Result<Response<proto::DeleteSnapshotResponse>, Status> {
        let _call = self.calls.token();
        snapshots::delete(&self.pool, &request.into_inner())
            .await
            .map(Response::new)
    }

    async fn list_templates(
        &self,
        _request: Request<proto::ListTemplatesRequest>,
    ) -> Result<Response<proto::ListTemplatesResponse>, Status> {
        let pool = Arc::clone(&self.pool);
        // Reads a few files of each template.
        let listed = tokio::task::spawn_blocking(move || pool.templates()).await;
        let listed =
            listed.map_err(|error| status(&Bug(format!("templates were not read: {error}"))))?;
        let default = &self.pool.config().defaults.template;
        let listed = listed
            .into_iter()
            .map(|summary| convert::template(summary, default));
        let named = self.pool.snapshots().list(SnapshotRecord::is_listed);
        let named = named.iter().filter_map(convert::named_snapshot);
        Ok(Response::new(proto::ListTemplatesResponse {
            templates: listed.chain(named).collect(),
        }))
    }
}

/// Where a page begins, and how long it is.
pub(super) fn page(size: u32, token: &str) -> Result<(u64, usize), Status> {
    let limit = match size {
        0 => DEFAULT_PAGE_SIZE,
        size if size <= MAX_PAGE_SIZE => size,
        size => {
            let mend = format!("is {size}; give at most {MAX_PAGE_SIZE}");
            return Err(invalid("page_size", mend));
        }
    };
    let after = match token {
        "" => 0,
        token => token.parse().map_err(|_| {
            let mend = "is no token of this service; give a reply's next_page_token";
            invalid("page_token", mend.to_owned())
        })?,
    };
    Ok((after, usize::try_from(limit).unwrap_or(usize::MAX)))
}

pub(super) fn parse_id(text: &str) -> Result<SandboxId, Status> {
    text.parse::<SandboxId>().map_err(|error| status(&error))
}

pub(super) fn invalid(field: &str, description: String) -> Status {
    status(&CreateError::Invalid(vec![FieldViolation {
        field: field.to_owned(),
        description,
    }]))
}
