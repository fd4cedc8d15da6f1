//! One function for each way that a sandbox can live or die.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::pin::Pin;
use std::time::{Duration, Instant};

use soulbox_proto::guest::v1::{
    ExecRequest, ProcessInput, ProcessSpec, exec_request, exec_response, exited, process_input,
};
use soulbox_proto::host::v1::watch_sandboxes_response::Kind;
use soulbox_proto::host::v1::{
    CreateSandboxRequest, CreateSandboxResponse, DeleteSandboxRequest, DeleteSnapshotRequest,
    ForkSandboxRequest, ForkSandboxResponse, GetNodeRequest, GetSandboxRequest,
    ListSandboxesRequest, ListSnapshotsRequest, PauseSandboxRequest, PauseSandboxResponse,
    ResumeSandboxRequest, ResumeSandboxResponse, RollbackSandboxRequest, RollbackSandboxResponse,
    Sandbox, SandboxState, Snapshot, SnapshotSandboxRequest, StageTime, WatchSandboxesRequest,
};
use tokio_stream::StreamExt as _;
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt as _;

use crate::support::{
    Client, Daemon, Host, PATIENCE, X86_64, elf, fields, kill_logging_below, last_to, reason, to,
};

mod calls;
mod cli;
mod crashes;
mod daemons;
mod ends;
mod guest;
mod relay;
mod shells;
mod snapshots;

use calls::*;
use cli::*;
use crashes::*;
use daemons::*;
use ends::*;
use guest::*;
use relay::*;
use shells::*;
use snapshots::*;

type Case = fn() -> Pin<Box<dyn Future<Output = ()>>>;

macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        pub const ALL: &[(&str, Case)] = &[$((stringify!($name), || Box::pin($name()))),*];
    };
}

cases! {
    a_sandbox_lives_and_leaves_nothing,
    the_command_line_passes_everything_through,
    output_is_bounded_in_memory,
    calls_that_nobody_reads_hold_up_no_others,
    a_large_argument_list_passes,
    a_caller_that_goes_ends_the_program,
    a_killed_monitor_ends_calls_within_a_second,
    a_guest_that_ends_itself_is_failed,
    a_boot_that_fails_says_why_and_leaves_nothing,
    deleting_works_while_starting_and_many_times,
    a_stubborn_guest_is_killed,
    a_repeated_request_makes_one_sandbox,
    creates_never_oversell,
    a_time_to_live_ends,
    a_killed_daemon_is_followed_by_one_that_adopts,
    a_daemon_that_stops_keeps_or_stops_its_sandboxes,
    a_sandbox_of_a_call_goes_with_it_when_the_daemon_went_first,
    a_hung_monitor_holds_up_no_start,
    a_cut_off_start_is_undone,
    a_retry_after_a_passing_failure_is_a_new_try,
    watchers_see_every_step,
    a_template_is_warm_before_its_sandboxes_are_made,
    a_template_snapshot_of_no_use_is_made_again,
    a_template_rebuilt_under_the_daemon_is_not_mixed_up,
    shells_are_replaced_and_limited,
    a_template_snapshot_that_is_cut_off_leaves_nothing,
    a_paused_sandbox_loses_nothing_and_holds_little,
    many_pauses_keep_chains_short,
    a_resume_that_does_not_fit_stays_paused,
    a_snapshot_is_a_template_and_a_way_back,
    a_fork_is_all_or_nothing,
    a_snapshot_that_cannot_be_loaded_says_why,
    a_snapshot_that_fails_leaves_the_sandbox_running,
    a_monitor_that_makes_no_snapshot_in_time_is_given_up,
    deleting_works_in_the_middle_of_everything,
    the_command_line_saves_and_brings_back,
    a_daemon_killed_while_it_saves_loses_nothing,
    what_was_on_disk_before_the_daemon_died_is_finished,
    a_daemon_killed_while_it_restores_leaves_it_paused,
    a_fork_that_is_cut_off_leaves_no_child,
    a_monitor_that_dies_with_the_daemon_fails_only_its_sandbox,
    a_full_disk_costs_no_sandbox,
    every_end_of_a_sandbox_ends_its_calls,
    connections_are_used_again_and_few_are_kept,
    what_a_hostile_agent_says_does_no_harm,
    a_sandbox_goes_with_its_call_however_that_ends,
    a_daemon_that_stops_tells_its_calls,
    a_terminal_is_the_programs,
    a_terminal_is_as_it_was_afterwards,
    a_program_is_left_listed_attached_to_and_killed,
    code_is_run_and_its_results_kept,
    files_are_listed_written_and_found,
    what_goes_on_is_shown,
    the_real_agent_is_reached,
    the_real_agent_has_terminals,
}

const FAST: &str = "[capacity]\nvcpus = 8\nmemory_mib = 4096\n[timeouts]\nboot_ms = 20000\nclean_stop_ms = 2000\ndrain_ms = 200\n[shells]\nmaximum = 0\n[templates]\nsnapshot = false\n";

fn host() -> Host {
    host_with(FAST)
}

fn host_with(config: &str) -> Host {
    let monitor = std::env::current_exe().unwrap();
    // The faked monitor asks nothing of it, so any usable device will do.
    let host = Host::with_paths(&[("monitor", &monitor)], config);
    for behaviour in [
        "base",
        "refuse",
        "emulation",
        "die",
        "mute",
        "stubborn",
        "real",
    ] {
        let mut kernel = elf(X86_64, 1 << 20);
        kernel.extend_from_slice(behaviour.as_bytes());
        host.template(behaviour, &kernel);
    }
    host
}

fn request(template: &str) -> CreateSandboxRequest {
    CreateSandboxRequest {
        template: template.to_owned(),
        ..CreateSandboxRequest::default()
    }
}

async fn create(client: &mut Client, template: &str) -> Result<CreateSandboxResponse, Status> {
    Ok(client.create_sandbox(request(template)).await?.into_inner())
}

async fn make(client: &mut Client) -> String {
    create(client, "base").await.unwrap().sandbox.unwrap().id
}

fn start(argv: &[&str]) -> ExecRequest {
    let spec = ProcessSpec {
        argv: argv
            .iter()
            .map(|arg| arg.as_bytes().to_vec().into())
            .collect(),
        kill_on_disconnect: true,
        ..ProcessSpec::default()
    };
    ExecRequest {
        message: Some(exec_request::Message::Start(spec)),
    }
}

async fn exec(client: &mut Client, id: &str, argv: &[&str]) -> Events {
    try_exec(client, id, argv).await.unwrap()
}

async fn try_exec(client: &mut Client, id: &str, argv: &[&str]) -> Result<Events, Status> {
    let requests = tokio_stream::once(start(argv));
    Ok(client
        .processes()
        .exec(to(id, requests))
        .await?
        .into_inner())
}

/// Runs a program; the bytes of stdout and the exit status.
async fn run(
    client: &mut Client,
    id: &str,
    argv: &[&str],
) -> Result<(usize, exited::Status), Status> {
    finish(&mut try_exec(client, id, argv).await?).await
}

type Events = Streaming<soulbox_proto::guest::v1::ExecResponse>;

/// Reads until the program has started.
async fn started(events: &mut Events) {
    let event = events.message().await.unwrap().unwrap().event.unwrap();
    assert!(
        matches!(event, exec_response::Event::Started(_)),
        "{event:?}"
    );
}

/// The bytes of stdout and the exit status.
async fn finish(events: &mut Events) -> Result<(usize, exited::Status), Status> {
    let mut bytes = 0;
    while let Some(message) = events.message().await? {
        match message.event.unwrap() {
            exec_response::Event::Stdout(chunk) => bytes += chunk.len(),
            exec_response::Event::Exited(exited) => return Ok((bytes, exited.status.unwrap())),
            _ => {}
        }
    }
    panic!("no exit status");
}

async fn delete(client: &mut Client, id: &str, force: bool) {
    let id = id.to_owned();
    client
        .delete_sandbox(DeleteSandboxRequest { id, force })
        .await
        .unwrap();
}

async fn get(client: &mut Client, id: &str) -> Sandbox {
    let reply = client
        .get_sandbox(GetSandboxRequest { id: id.to_owned() })
        .await;
    reply.unwrap().into_inner().sandbox.unwrap()
}

async fn list(client: &mut Client) -> Vec<Sandbox> {
    let reply = client.list_sandboxes(ListSandboxesRequest::default()).await;
    reply.unwrap().into_inner().sandboxes
}

/// Runs a program and returns what it says.
async fn word(client: &mut Client, id: &str, argv: &[&str]) -> String {
    let mut events = exec(client, id, argv).await;
    let mut said = Vec::new();
    while let Some(message) = events.message().await.unwrap() {
        match message.event.unwrap() {
            exec_response::Event::Stdout(chunk) => said.extend_from_slice(&chunk),
            exec_response::Event::Exited(_) => return String::from_utf8(said).unwrap(),
            _ => {}
        }
    }
    panic!("no exit status");
}

/// The guest's word of memory.
async fn get_word(client: &mut Client, id: &str) -> String {
    word(client, id, &["get"]).await
}

/// All that was written to the guest's disk.
async fn read_disk(client: &mut Client, id: &str) -> String {
    word(client, id, &["read"]).await
}

fn stages(stages: &[StageTime]) -> Vec<String> {
    stages.iter().map(|stage| stage.stage.clone()).collect()
}

async fn pause(client: &mut Client, id: &str) -> Result<PauseSandboxResponse, Status> {
    let request = PauseSandboxRequest {
        id: id.to_owned(),
        cold: false,
    };
    Ok(client.pause_sandbox(request).await?.into_inner())
}

async fn resume(client: &mut Client, id: &str) -> Result<ResumeSandboxResponse, Status> {
    let request = ResumeSandboxRequest { id: id.to_owned() };
    Ok(client.resume_sandbox(request).await?.into_inner())
}

async fn save(client: &mut Client, id: &str, name: &str) -> Result<Snapshot, Status> {
    let request = SnapshotSandboxRequest {
        id: id.to_owned(),
        name: name.to_owned(),
        ..SnapshotSandboxRequest::default()
    };
    let reply = client.snapshot_sandbox(request).await?.into_inner();
    Ok(reply.snapshot.unwrap())
}

async fn roll_back(
    client: &mut Client,
    id: &str,
    to: &str,
) -> Result<RollbackSandboxResponse, Status> {
    let request = RollbackSandboxRequest {
        id: id.to_owned(),
        snapshot_id: to.to_owned(),
    };
    Ok(client.rollback_sandbox(request).await?.into_inner())
}

async fn fork(client: &mut Client, id: &str, count: u32) -> Result<ForkSandboxResponse, Status> {
    let request = ForkSandboxRequest {
        id: id.to_owned(),
        count,
        ..ForkSandboxRequest::default()
    };
    Ok(client.fork_sandbox(request).await?.into_inner())
}

async fn list_snapshots(client: &mut Client) -> Vec<Snapshot> {
    let reply = client.list_snapshots(ListSnapshotsRequest::default()).await;
    reply.unwrap().into_inner().snapshots
}

async fn delete_snapshot(client: &mut Client, id: &str) -> Result<(), Status> {
    let request = DeleteSnapshotRequest { id: id.to_owned() };
    client.delete_snapshot(request).await.map(drop)
}

fn vmm_log(host: &Host, id: &str) -> std::path::PathBuf {
    host.path("state/sandboxes").join(id).join("vmm.log")
}

fn files_below(host: &Host, folder: &str) -> usize {
    fs::read_dir(host.path(folder)).unwrap().count()
}

fn kill(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

impl Host {
    /// From now on the faked monitors fail so, at a step.
    fn fault(&self, fault: &str) {
        let _ = fs::remove_file(self.path("here"));
        fs::write(self.path("fault"), fault).unwrap();
    }

    fn no_fault(&self) {
        fs::remove_file(self.path("fault")).unwrap();
    }

    /// Waits until a faked monitor has come to where it is to fail.
    async fn wait_for_fault(&self) {
        eventually("no fault", async || self.path("here").exists()).await;
    }
}

async fn assert_all_is_free(daemon: &Daemon) {
    let node = daemon
        .node()
        .await
        .get_node(GetNodeRequest {})
        .await
        .unwrap();
    let node = node.into_inner().node.unwrap();
    assert_eq!(node.capacity, node.allocatable);
}

/// Waits until `done`; a case that waits too long has failed.
async fn eventually(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done().await {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
