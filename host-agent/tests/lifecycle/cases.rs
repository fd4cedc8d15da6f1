//! One function for each way that a sandbox can live or die.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::pin::Pin;
use std::time::{Duration, Instant};

use soulbox_proto::guest::v1::{ProcessInput, ProcessSpec, exec_response, exited, process_input};
use soulbox_proto::host::v1::sandbox_service_client::SandboxServiceClient;
use soulbox_proto::host::v1::watch_sandboxes_response::Kind;
use soulbox_proto::host::v1::{
    CreateSandboxRequest, CreateSandboxResponse, DeleteSandboxRequest, ExecRequest, ExecStart,
    GetNodeRequest, GetSandboxRequest, ListSandboxesRequest, Sandbox, SandboxState,
    WatchSandboxesRequest, exec_request,
};
use tokio_stream::StreamExt as _;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt as _;

use crate::support::{Daemon, Host, PATIENCE, X86_64, elf, fields, reason};

mod calls;
mod daemons;
mod ends;

use calls::*;
use daemons::*;
use ends::*;

type Client = SandboxServiceClient<Channel>;
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
}

const FAST: &str = "[capacity]\nvcpus = 8\nmemory_mib = 4096\n[timeouts]\nboot_ms = 20000\nclean_stop_ms = 2000\ndrain_ms = 200\n[shells]\nmaximum = 0\nminimum = 0\n[templates]\nsnapshot = false\n";

fn host() -> Host {
    host_with(FAST)
}

fn host_with(config: &str) -> Host {
    let monitor = std::env::current_exe().unwrap();
    // The faked monitor asks nothing of it, so any usable device will do.
    let host = Host::with_paths(&[("monitor", &monitor)], config);
    for behaviour in ["base", "refuse", "emulation", "die", "mute", "stubborn"] {
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

fn start(id: &str, argv: &[&str]) -> ExecStart {
    ExecStart {
        sandbox_id: id.to_owned(),
        process: Some(ProcessSpec {
            argv: argv
                .iter()
                .map(|arg| arg.as_bytes().to_vec().into())
                .collect(),
            ..ProcessSpec::default()
        }),
        delete_sandbox_after: false,
    }
}

async fn exec_start(client: &mut Client, start: ExecStart) -> Events {
    let start = ExecRequest {
        message: Some(exec_request::Message::Start(start)),
    };
    client
        .exec(tokio_stream::once(start))
        .await
        .unwrap()
        .into_inner()
}

async fn exec(client: &mut Client, id: &str, argv: &[&str]) -> Events {
    exec_start(client, start(id, argv)).await
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
