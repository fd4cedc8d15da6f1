//! The calls of `SandboxService` that save sandboxes and bring them back.

use std::sync::Arc;

use soulbox_proto::host::v1::{self as proto};
use tonic::Status;

use super::convert;
use super::sandboxes::{invalid, page, parse_id};
use crate::id::SnapshotId;
use crate::sandbox::{ForkSpec, Pool, SnapshotSpec};
use crate::status::status;

pub(super) async fn pause(
    pool: &Pool,
    request: proto::PauseSandboxRequest,
) -> Result<proto::PauseSandboxResponse, Status> {
    let id = parse_id(&request.id)?;
    let paused = pool.pause(&id, request.cold).await;
    let paused = paused.map_err(|error| status(&error))?;
    Ok(proto::PauseSandboxResponse {
        sandbox: Some(convert::sandbox(&paused.record)),
        stages: convert::stages(paused.stages),
    })
}

pub(super) async fn resume(
    pool: &Pool,
    request: &proto::ResumeSandboxRequest,
) -> Result<proto::ResumeSandboxResponse, Status> {
    let id = parse_id(&request.id)?;
    let resumed = pool.resume(&id).await;
    let resumed = resumed.map_err(|error| status(&error))?;
    Ok(proto::ResumeSandboxResponse {
        sandbox: Some(convert::sandbox(&resumed.record)),
        stages: convert::stages(resumed.stages),
    })
}

pub(super) async fn snapshot(
    pool: &Pool,
    request: proto::SnapshotSandboxRequest,
) -> Result<proto::SnapshotSandboxResponse, Status> {
    let id = parse_id(&request.id)?;
    let spec = SnapshotSpec::parse(request).map_err(|error| status(&error))?;
    let saved = pool.snapshot(&id, spec).await;
    let saved = saved.map_err(|error| status(&error))?;
    let users = pool.snapshot_users(&saved.snapshot.id);
    Ok(proto::SnapshotSandboxResponse {
        snapshot: Some(convert::snapshot(&saved.snapshot, users)),
        stages: convert::stages(saved.stages),
        paused_us: u64::try_from(saved.paused.as_micros()).unwrap_or(u64::MAX),
    })
}

pub(super) async fn roll_back(
    pool: &Pool,
    request: &proto::RollbackSandboxRequest,
) -> Result<proto::RollbackSandboxResponse, Status> {
    let id = parse_id(&request.id)?;
    let to: SnapshotId = request
        .snapshot_id
        .parse()
        .map_err(|_| invalid("snapshot_id", "is not a snapshot id".to_owned()))?;
    let rolled_back = pool.roll_back(&id, &to).await;
    let rolled_back = rolled_back.map_err(|error| status(&error))?;
    Ok(proto::RollbackSandboxResponse {
        sandbox: Some(convert::sandbox(&rolled_back.record)),
        stages: convert::stages(rolled_back.stages),
    })
}

pub(super) async fn fork(
    pool: &Arc<Pool>,
    request: proto::ForkSandboxRequest,
) -> Result<proto::ForkSandboxResponse, Status> {
    let id = parse_id(&request.id)?;
    let spec = ForkSpec::parse(request).map_err(|error| status(&error))?;
    let forked = pool.fork(&id, spec).await?;
    Ok(proto::ForkSandboxResponse {
        children: forked
            .children
            .into_iter()
            .map(|child| proto::Fork {
                sandbox: Some(convert::sandbox(&child.record)),
                stages: convert::stages(child.stages),
            })
            .collect(),
        stages: convert::stages(forked.stages),
        parent_paused_us: u64::try_from(forked.parent_paused.as_micros()).unwrap_or(u64::MAX),
    })
}

pub(super) fn list(
    pool: &Pool,
    request: &proto::ListSnapshotsRequest,
) -> Result<proto::ListSnapshotsResponse, Status> {
    let (after, limit) = page(request.page_size, &request.page_token)?;
    let sandbox = match request.sandbox_id.as_str() {
        "" => None,
        id => {
            let wrong = |_| invalid("sandbox_id", "is not a sandbox id".to_owned());
            Some(id.parse().map_err(wrong)?)
        }
    };
    let mut records = pool.snapshots().list(|record| {
        record.is_listed()
            && record.sequence > after
            && (sandbox.is_none() || record.sandbox == sandbox)
            && request
                .labels
                .iter()
                .all(|(key, value)| record.labels.get(key) == Some(value))
    });
    let more = records.len() > limit;
    records.truncate(limit);
    let next = records.last().filter(|_| more);
    Ok(proto::ListSnapshotsResponse {
        next_page_token: next.map_or_else(String::new, |record| record.sequence.to_string()),
        snapshots: records
            .iter()
            .map(|record| convert::snapshot(record, pool.snapshot_users(&record.id)))
            .collect(),
    })
}

pub(super) async fn delete(
    pool: &Pool,
    request: &proto::DeleteSnapshotRequest,
) -> Result<proto::DeleteSnapshotResponse, Status> {
    let id: SnapshotId = request
        .id
        .parse()
        .map_err(|error| status::<crate::id::ParseIdError>(&error))?;
    let deleted = pool.delete_snapshot(&id).await;
    deleted.map_err(|error| status(&error))?;
    Ok(proto::DeleteSnapshotResponse {})
}
