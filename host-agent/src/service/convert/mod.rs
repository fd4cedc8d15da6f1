//! Records as the protocol shows them.

mod network;

use soulbox_proto::host::v1 as proto;

use crate::admission::Amounts;
use crate::record::{Resources, SandboxRecord, SnapshotRecord, State};
use crate::sandbox::Created;
use crate::template::TemplateSummary;
use crate::time::Stage;

pub(crate) use network::{policy_from_proto, policy_to_proto};

pub(super) fn sandbox(record: &SandboxRecord) -> proto::Sandbox {
    proto::Sandbox {
        id: record.id.to_string(),
        template: record.template.clone(),
        state: state(record.state).into(),
        resources: Some(resources(record.resources)),
        labels: record.labels.clone().into_iter().collect(),
        create_time: Some(record.created_at.into()),
        expire_time: record.expires_at.map(Into::into),
        failure: record.failure.as_ref().map(|failure| proto::Failure {
            reason: failure.reason.clone(),
            message: failure.message.clone(),
            console_tail: failure.console_tail.clone(),
        }),
        snapshot_id: record
            .snapshot
            .as_ref()
            .map_or_else(String::new, ToString::to_string),
        parent_id: record
            .parent
            .as_ref()
            .map_or_else(String::new, ToString::to_string),
        network: record.network.as_deref().map(policy_to_proto),
        addresses: addresses(record),
    }
}

/// Where the host reaches its ports, while it runs.
pub(super) fn addresses(record: &SandboxRecord) -> Vec<String> {
    let slot = record.slot.filter(|_| record.state == State::Running);
    slot.map(|slot| vec![slot.ipv4.to_string(), slot.ipv6.to_string()])
        .unwrap_or_default()
}

pub(super) fn created(created: Created) -> proto::CreateSandboxResponse {
    proto::CreateSandboxResponse {
        sandbox: Some(sandbox(&created.record)),
        stages: stages(created.stages),
        restored: created.restored,
    }
}

pub(super) fn stages(stages: Vec<Stage>) -> Vec<proto::StageTime> {
    stages
        .into_iter()
        .map(|stage| proto::StageTime {
            stage: stage.name,
            duration_us: stage.duration_us,
        })
        .collect()
}

pub(super) fn snapshot(record: &SnapshotRecord, users: Vec<String>) -> proto::Snapshot {
    let or_empty = |id: Option<String>| id.unwrap_or_default();
    proto::Snapshot {
        id: record.id.to_string(),
        name: or_empty(record.name.clone()),
        template: record.template.clone(),
        sandbox_id: or_empty(record.sandbox.as_ref().map(ToString::to_string)),
        parent_id: or_empty(record.parent().map(ToString::to_string)),
        resources: Some(resources(record.resources)),
        labels: record.labels.clone().into_iter().collect(),
        create_time: Some(record.created_at.into()),
        memory_bytes: record.memory_bytes,
        disk_bytes: record.disk_bytes,
        cold: record.cold,
        users,
    }
}

pub(super) fn amounts(amounts: Amounts) -> proto::Resources64 {
    proto::Resources64 {
        vcpus: amounts.vcpus,
        memory_mib: amounts.memory_mib,
        disk_mib: amounts.disk_mib,
    }
}

pub(super) fn template(summary: TemplateSummary, default: &str) -> proto::Template {
    let is_default = summary.name == default;
    let problem = summary.problem.map(|problem| problem.to_string());
    let mut template = proto::Template {
        name: summary.name,
        is_default,
        problem: problem.unwrap_or_default(),
        ..proto::Template::default()
    };
    if let Some(manifest) = summary.manifest {
        template.description = manifest.description;
        template.agent_version = manifest.agent_version;
        template.kernel_size_bytes = manifest.kernel.size_bytes;
        template.rootfs_size_bytes = manifest.rootfs.size_bytes;
    }
    template
}

/// A snapshot as a template, if it has the name for that.
pub(super) fn named_snapshot(record: &SnapshotRecord) -> Option<proto::Template> {
    Some(proto::Template {
        name: record.name.clone()?,
        description: format!("snapshot {} of {}", record.id, record.template),
        rootfs_size_bytes: u64::from(record.resources.disk_mib) << 20,
        ..proto::Template::default()
    })
}

fn resources(resources: Resources) -> proto::Resources {
    proto::Resources {
        vcpus: resources.vcpus,
        memory_mib: resources.memory_mib,
        disk_mib: resources.disk_mib,
    }
}

fn state(state: State) -> proto::SandboxState {
    match state {
        State::Pending => proto::SandboxState::Pending,
        State::Starting => proto::SandboxState::Starting,
        State::Running => proto::SandboxState::Running,
        State::Stopping => proto::SandboxState::Stopping,
        State::Stopped => proto::SandboxState::Stopped,
        State::Failed => proto::SandboxState::Failed,
        State::Pausing => proto::SandboxState::Pausing,
        State::Paused => proto::SandboxState::Paused,
        State::Resuming => proto::SandboxState::Resuming,
    }
}
