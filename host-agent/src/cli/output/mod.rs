//! Replies as tables for people and as JSON for programs.

mod code;
mod guest;
mod network;

use std::io::Write as _;
use std::time::{Duration, SystemTime};

use comfy_table::{Table, presets};
use prost_types::Timestamp;
use serde_json::{Value, json};
use soulbox_proto::host::v1::watch_sandboxes_response::Kind;
use soulbox_proto::host::v1::{
    Node, Resources64, Sandbox, Snapshot, StageTime, Template, Usage, WatchSandboxesResponse,
};

use super::args::Output;
use super::error::CliError;

pub(super) use self::code::{code_event, context, context_table};
pub(super) use self::guest::{
    entry, entry_details, entry_table, file_event, found, metrics, metrics_page, process,
    process_table,
};
pub(super) use self::network::{
    forward, forward_table, network, network_details, policy, policy_details,
};

const MIB: u64 = 1 << 20;

pub(super) fn line(text: &str) -> Result<(), CliError> {
    writeln!(std::io::stdout(), "{text}").map_err(CliError::Output)
}

/// One document, indented.
pub(super) fn json(value: &Value) -> Result<(), CliError> {
    line(&format!("{value:#}"))
}

pub(super) fn sandbox(sandbox: &Sandbox) -> Value {
    let resources = sandbox.resources.unwrap_or_default();
    json!({
        "id": sandbox.id,
        "template": sandbox.template,
        "state": state(sandbox),
        "vcpus": resources.vcpus,
        "memory_mib": resources.memory_mib,
        "disk_mib": resources.disk_mib,
        "labels": sandbox.labels,
        "network": sandbox.network.as_ref().map(policy),
        "addresses": sandbox.addresses,
        "snapshot_id": sandbox.snapshot_id,
        "parent_id": sandbox.parent_id,
        "create_time": sandbox.create_time.map(rfc3339),
        "expire_time": sandbox.expire_time.map(rfc3339),
        "failure": sandbox.failure.as_ref().map(|failure| json!({
            "reason": failure.reason,
            "message": failure.message,
            "console_tail": failure.console_tail,
        })),
    })
}

pub(super) fn snapshot(snapshot: &Snapshot) -> Value {
    let resources = snapshot.resources.unwrap_or_default();
    json!({
        "id": snapshot.id,
        "name": snapshot.name,
        "template": snapshot.template,
        "sandbox_id": snapshot.sandbox_id,
        "parent_id": snapshot.parent_id,
        "vcpus": resources.vcpus,
        "memory_mib": resources.memory_mib,
        "disk_mib": resources.disk_mib,
        "labels": snapshot.labels,
        "create_time": snapshot.create_time.map(rfc3339),
        "memory_bytes": snapshot.memory_bytes,
        "disk_bytes": snapshot.disk_bytes,
        "cold": snapshot.cold,
        "users": snapshot.users,
    })
}

pub(super) fn usage(usage: Option<&Usage>) -> Value {
    usage.map_or(Value::Null, |usage| {
        json!({
            "guest_private_bytes": usage.guest_private_bytes,
            "monitor_private_bytes": usage.monitor_private_bytes,
            "disk_used_bytes": usage.disk_used_bytes,
        })
    })
}

pub(super) fn node(node: &Node) -> Value {
    let kvm = node.kvm.clone().unwrap_or_default();
    let amounts = |amounts: Option<Resources64>| {
        let amounts = amounts.unwrap_or_default();
        json!({"vcpus": amounts.vcpus, "memory_mib": amounts.memory_mib, "disk_mib": amounts.disk_mib})
    };
    json!({
        "hostname": node.hostname,
        "version": node.version,
        "start_time": node.start_time.map(rfc3339),
        "capacity": amounts(node.capacity),
        "allocatable": amounts(node.allocatable),
        "sandboxes": node.sandboxes,
        "kernel_release": node.kernel_release,
        "cpu_model": node.cpu_model,
        "draining": node.draining,
        "kvm": {
            "usable": kvm.usable,
            "problem": kvm.problem,
            "api_version": kvm.api_version,
            "hardware_virtualization": kvm.hardware_virtualization,
            "max_vcpus": kvm.max_vcpus,
        },
    })
}

pub(super) fn template(template: &Template) -> Value {
    json!({
        "name": template.name,
        "description": template.description,
        "agent_version": template.agent_version,
        "kernel_size_bytes": template.kernel_size_bytes,
        "rootfs_size_bytes": template.rootfs_size_bytes,
        "is_default": template.is_default,
        "problem": template.problem,
    })
}

pub(super) fn sandbox_table(sandboxes: &[Sandbox]) -> Result<(), CliError> {
    let mut table = table(&[
        "ID", "STATE", "TEMPLATE", "VCPUS", "MEMORY", "DISK", "AGE", "ENDS IN", "REASON",
    ]);
    for sandbox in sandboxes {
        let resources = sandbox.resources.unwrap_or_default();
        let reason = sandbox
            .failure
            .as_ref()
            .map(|failure| failure.reason.clone());
        table.add_row([
            sandbox.id.clone(),
            state(sandbox).to_owned(),
            sandbox.template.clone(),
            resources.vcpus.to_string(),
            format!("{} MiB", resources.memory_mib),
            format!("{} MiB", resources.disk_mib),
            sandbox.create_time.map(age).unwrap_or_default(),
            sandbox.expire_time.map_or_else(|| "-".to_owned(), left),
            reason.unwrap_or_default(),
        ]);
    }
    line(&table.to_string())
}

pub(super) fn sandbox_details(sandbox: &Sandbox, usage: Option<&Usage>) -> Result<(), CliError> {
    sandbox_table(std::slice::from_ref(sandbox))?;
    for (what, id) in [
        ("from snapshot", &sandbox.snapshot_id),
        ("forked from", &sandbox.parent_id),
    ] {
        if !id.is_empty() {
            line(&format!("{what} {id}"))?;
        }
    }
    for (key, value) in &sandbox.labels {
        line(&format!("label {key}={value}"))?;
    }
    for address in &sandbox.addresses {
        line(&format!("reached at {address}"))?;
    }
    if let Some(usage) = usage {
        line(&format!(
            "uses {} MiB of guest memory, {} KiB in its monitor, {} MiB of disk",
            usage.guest_private_bytes / MIB,
            usage.monitor_private_bytes / 1024,
            usage.disk_used_bytes / MIB
        ))?;
    }
    if let Some(failure) = &sandbox.failure {
        line(&format!("failed: {}", failure.message))?;
        if !failure.console_tail.is_empty() {
            line(&format!(
                "the console's last lines:\n{}",
                failure.console_tail.trim_end()
            ))?;
        }
    }
    Ok(())
}

pub(super) fn node_details(node: &Node) -> Result<(), CliError> {
    let kvm = node.kvm.clone().unwrap_or_default();
    let (capacity, left) = (
        node.capacity.unwrap_or_default(),
        node.allocatable.unwrap_or_default(),
    );
    let of = |left: u64, all: u64, unit: &str| format!("{left} of {all}{unit} left");
    let state = if node.draining {
        "draining"
    } else {
        "taking sandboxes"
    };
    let kvm_state = if kvm.usable {
        format!(
            "usable, API {}, up to {} vCPUs",
            kvm.api_version, kvm.max_vcpus
        )
    } else {
        format!("not usable: {}", kvm.problem)
    };
    let virtualization = if kvm.hardware_virtualization {
        "the CPU shows vmx or svm".to_owned()
    } else {
        "none: the CPU shows neither vmx nor svm, so guest kernels may not run".to_owned()
    };
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    for (name, value) in [
        ("host", node.hostname.clone()),
        ("version", node.version.clone()),
        ("state", state.to_owned()),
        ("sandboxes", node.sandboxes.to_string()),
        ("vcpus", of(left.vcpus, capacity.vcpus, "")),
        ("memory", of(left.memory_mib, capacity.memory_mib, " MiB")),
        ("disk", of(left.disk_mib, capacity.disk_mib, " MiB")),
        ("cpu", node.cpu_model.clone()),
        ("kernel", node.kernel_release.clone()),
        ("kvm", kvm_state),
        ("virtualization", virtualization),
    ] {
        table.add_row([name.to_owned(), value]);
    }
    line(&trim(&table))
}

pub(super) fn template_table(templates: &[Template]) -> Result<(), CliError> {
    let mut table = table(&["NAME", "DISK", "AGENT", "DEFAULT", "PROBLEM", "DESCRIPTION"]);
    for template in templates {
        table.add_row([
            template.name.clone(),
            format!("{} MiB", template.rootfs_size_bytes / MIB),
            template.agent_version.clone(),
            if template.is_default { "yes" } else { "" }.to_owned(),
            template.problem.clone(),
            template.description.clone(),
        ]);
    }
    line(&trim(&table))
}

pub(super) fn snapshot_table(snapshots: &[Snapshot]) -> Result<(), CliError> {
    let mut table = table(&[
        "ID", "NAME", "TEMPLATE", "SANDBOX", "MEMORY", "DISK", "AGE", "USERS",
    ]);
    for snapshot in snapshots {
        let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / MIB as f64);
        table.add_row([
            snapshot.id.clone(),
            snapshot.name.clone(),
            snapshot.template.clone(),
            snapshot.sandbox_id.clone(),
            mib(snapshot.memory_bytes) + if snapshot.cold { " cold" } else { "" },
            mib(snapshot.disk_bytes),
            snapshot.create_time.map(age).unwrap_or_default(),
            snapshot.users.len().to_string(),
        ]);
    }
    line(&trim(&table))
}

/// One line for each change, so that programs can read it as it comes.
pub(super) fn change(format: Output, change: &WatchSandboxesResponse) -> Result<(), CliError> {
    let kind = match change.kind() {
        Kind::Current => "current",
        Kind::Changed => "changed",
        Kind::Deleted => "deleted",
        Kind::Denied => "denied",
        Kind::Unspecified => "unknown",
    };
    let shown = change.sandbox.clone().unwrap_or_default();
    line(&match (format, &change.denied) {
        (Output::Table, None) => format!("{kind:8} {} {}", shown.id, state(&shown)),
        (Output::Table, Some(denied)) => {
            format!("{kind:8} {} {}", shown.id, network::denied_words(denied))
        }
        (Output::Json, denied) => {
            let denied = denied.as_ref().map(network::denied);
            json!({"kind": kind, "sandbox": sandbox(&shown), "denied": denied}).to_string()
        }
    })
}

/// Where the time went, to standard error: standard output is the program's.
pub(super) fn stages(format: Output, stages: &[StageTime]) {
    if format == Output::Json {
        eprintln!("{}", json!({ "stages": stages_json(stages) }));
        return;
    }
    let mut table = table(&["STAGE", "MS"]);
    for stage in stages {
        let millis = Duration::from_micros(stage.duration_us).as_secs_f64() * 1000.0;
        table.add_row([stage.stage.clone(), format!("{millis:.2}")]);
    }
    if let Some(column) = table.column_mut(1) {
        column.set_cell_alignment(comfy_table::CellAlignment::Right);
    }
    eprintln!("{}", trim(&table));
}

pub(super) fn stages_json(stages: &[StageTime]) -> Value {
    stages
        .iter()
        .map(|stage| json!({"stage": stage.stage, "duration_us": stage.duration_us}))
        .collect()
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    table
}

fn trim(table: &Table) -> String {
    table.trim_fmt()
}

fn state(sandbox: &Sandbox) -> &'static str {
    use soulbox_proto::host::v1::SandboxState;
    match sandbox.state() {
        SandboxState::Pending => "pending",
        SandboxState::Starting => "starting",
        SandboxState::Running => "running",
        SandboxState::Stopping => "stopping",
        SandboxState::Stopped => "stopped",
        SandboxState::Failed => "failed",
        SandboxState::Pausing => "pausing",
        SandboxState::Paused => "paused",
        SandboxState::Resuming => "resuming",
        SandboxState::Unspecified => "unknown",
    }
}

fn age(since: Timestamp) -> String {
    let since = SystemTime::try_from(since).unwrap_or(SystemTime::UNIX_EPOCH);
    rough(SystemTime::now().duration_since(since).unwrap_or_default())
}

fn left(until: Timestamp) -> String {
    let until = SystemTime::try_from(until).unwrap_or(SystemTime::UNIX_EPOCH);
    rough(until.duration_since(SystemTime::now()).unwrap_or_default())
}

/// A duration in its largest unit.
fn rough(duration: Duration) -> String {
    match duration.as_secs() {
        seconds @ 0..120 => format!("{seconds}s"),
        seconds @ 120..7200 => format!("{}m", seconds / 60),
        seconds @ 7200..172_800 => format!("{}h", seconds / 3600),
        seconds => format!("{}d", seconds / 86400),
    }
}

/// prost writes timestamps as RFC 3339.
fn rfc3339(time: Timestamp) -> String {
    time.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_rough_for_people_and_exact_for_programs() {
        assert_eq!(rough(Duration::from_secs(119)), "119s");
        assert_eq!(rough(Duration::from_secs(3600)), "60m");
        assert_eq!(rough(Duration::from_secs(86400 * 3)), "3d");
        let time = Timestamp {
            seconds: 1_700_000_000,
            nanos: 500_000_000,
        };
        assert_eq!(rfc3339(time), "2023-11-14T22:13:20.500Z");
    }

    #[test]
    fn a_failed_sandbox_shows_why() {
        let shown = sandbox(&Sandbox {
            failure: Some(soulbox_proto::host::v1::Failure {
                reason: "GUEST_PANIC".to_owned(),
                ..Default::default()
            }),
            ..Sandbox::default()
        });
        assert_eq!(shown["failure"]["reason"], "GUEST_PANIC");
        assert_eq!(shown["expire_time"], Value::Null);
    }
}
