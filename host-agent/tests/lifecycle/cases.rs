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

const FAST: &str = "[capacity]\nvcpus = 8\nmemory_mib = 4096\n[timeouts]\nboot_ms = 20000\nclean_stop_ms = 2000\ndrain_ms = 200\n";

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

async fn a_sandbox_lives_and_leaves_nothing() {
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let created = create(&mut client, "base").await.unwrap();
    let stages: Vec<&str> = created
        .stages
        .iter()
        .map(|stage| stage.stage.as_str())
        .collect();
    assert_eq!(
        stages,
        [
            "admission",
            "prepare",
            "spawn",
            "boot.machine",
            "boot.guest",
            "boot.agent",
            "boot",
            "configure",
            "first_exec",
            "total"
        ]
    );
    let sandbox = created.sandbox.unwrap();
    assert_eq!(sandbox.state(), SandboxState::Running);
    let id = sandbox.id;
    let reply = client
        .get_sandbox(GetSandboxRequest { id: id.clone() })
        .await
        .unwrap();
    assert!(reply.into_inner().usage.is_some());
    let mut events = exec(&mut client, &id, &["exit", "7"]).await;
    assert_eq!(
        finish(&mut events).await.unwrap(),
        (0, exited::Status::Code(7))
    );
    let log = host.path("state/sandboxes").join(&id).join("vmm.log");
    assert!(
        fs::read_to_string(&log)
            .unwrap()
            .contains(&format!("hostname: {id}"))
    );
    delete(&mut client, &id, false).await;
    host.assert_nothing_left();
    assert_all_is_free(&daemon).await;
    assert!(list(&mut client).await.is_empty());
}

async fn the_command_line_passes_everything_through() {
    let host = host();
    let daemon = host.start();
    let run = |args: &'static [&'static str]| {
        let mut all = vec!["run"];
        all.extend_from_slice(args);
        let output = host.soulbox(&all);
        (output.status.code().unwrap(), output)
    };
    assert_eq!(run(&["--", "exit", "42"]).0, 42);
    assert_eq!(run(&["signal", "9"]).0, 137);
    let (code, output) = run(&["missing"]);
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(
        (code, told.as_str()),
        (127, "soulbox: missing is not there; see PATH\n")
    );
    let (code, output) = run(&["--timings", "flood", "3"]);
    assert_eq!((code, output.stdout.len()), (0, 3 << 20));
    assert!(String::from_utf8_lossy(&output.stderr).contains("first_exec"));
    host.assert_nothing_left();

    let kept = host.soulbox(&["run", "--keep", "--", "exit", "0"]);
    let told = String::from_utf8_lossy(&kept.stderr).into_owned();
    let id = told.trim().rsplit(' ').next().unwrap().to_owned();
    let mut echo = std::process::Command::new(env!("CARGO_BIN_EXE_soulbox"))
        .env("SOULBOX_HOST", format!("unix:{}", host.socket().display()))
        .args(["exec", "-i", &id, "cat"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut echo.stdin.take().unwrap(), b"in and out").unwrap();
    let echoed = echo.wait_with_output().unwrap();
    assert_eq!(
        (echoed.status.code(), echoed.stdout.as_slice()),
        (Some(0), b"in and out".as_slice())
    );
    assert!(host.soulbox(&["rm", "--all"]).status.success());
    host.assert_nothing_left();
    drop(daemon);
}

async fn output_is_bounded_in_memory() {
    const MIB: u32 = 1024;
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let id = make(&mut client).await;
    let peak_kib = || {
        let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    let before = peak_kib();
    let mut events = exec(&mut client, &id, &["flood", &MIB.to_string()]).await;
    let (bytes, _) = finish(&mut events).await.unwrap();
    assert_eq!(bytes, usize::try_from(MIB).unwrap() << 20);
    let grown = peak_kib() - before;
    println!("soulboxd grew by {grown} KiB for {MIB} MiB of output");
    assert!(grown < 48 * 1024, "soulboxd grew by {grown} KiB");
}

async fn calls_that_nobody_reads_hold_up_no_others() {
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let id = make(&mut client).await;
    // Programs that read nothing, on one connection; each is sent more than a
    // connection's default window.
    let mut unread = Vec::new();
    for _ in 0..3 {
        let chunk = ProcessInput {
            input: Some(process_input::Input::Stdin(vec![0; 1 << 20].into())),
        };
        let input = [exec_request::Message::Start(start(&id, &["sleep"]))]
            .into_iter()
            .chain((0..4).map(move |_| exec_request::Message::Input(chunk.clone())))
            .map(|message| ExecRequest {
                message: Some(message),
            });
        let input = tokio_stream::iter(input).chain(tokio_stream::pending());
        let mut events = client.exec(input).await.unwrap().into_inner();
        started(&mut events).await;
        unread.push((client.clone(), events));
    }
    // Programs whose callers read nothing; a connection each, for its window is
    // the caller's own.
    for _ in 0..6 {
        let mut client = daemon.sandboxes().await;
        let mut events = exec(&mut client, &id, &["flood", "64"]).await;
        started(&mut events).await;
        unread.push((client, events));
    }
    // Long enough for all windows to be full.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let answered = tokio::time::timeout(PATIENCE / 2, async {
        let mut events = exec(&mut client, &id, &["exit", "7"]).await;
        let (_, status) = finish(&mut events).await.unwrap();
        assert_eq!(status, exited::Status::Code(7));
        delete(&mut client, &id, false).await;
    });
    answered.await.expect("held up");
    host.assert_nothing_left();
}

async fn a_large_argument_list_passes() {
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let id = make(&mut client).await;
    let argument = "x".repeat(1 << 20);
    let exec_with = async |client: &mut Client, count: usize| {
        let mut argv = vec!["exit", "3"];
        argv.extend(std::iter::repeat_n(argument.as_str(), count));
        let start = ExecRequest {
            message: Some(exec_request::Message::Start(start(&id, &argv))),
        };
        client.exec(tokio_stream::once(start)).await
    };
    let mut events = exec_with(&mut client, 7).await.unwrap().into_inner();
    let (_, status) = finish(&mut events).await.unwrap();
    assert_eq!(status, exited::Status::Code(3));
    let refused = exec_with(&mut client, 8).await.unwrap_err();
    assert_eq!(reason(&refused), "INVALID_REQUEST");
    assert_eq!(fields(&refused), ["start"]);
    delete(&mut client, &id, false).await;
}

async fn a_caller_that_goes_ends_the_program() {
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let id = make(&mut client).await;
    let log = host.path("state/sandboxes").join(&id).join("vmm.log");
    let mut events = exec(&mut client, &id, &["sleep"]).await;
    started(&mut events).await;
    drop(events);
    eventually("the program goes on", async || {
        fs::read_to_string(&log).unwrap().contains("ended: sleep")
    })
    .await;
    assert_eq!(get(&mut client, &id).await.state(), SandboxState::Running);
}

async fn a_killed_monitor_ends_calls_within_a_second() {
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let id = make(&mut client).await;
    let mut events = exec(&mut client, &id, &["sleep"]).await;
    started(&mut events).await;
    let [monitor] = host.monitors()[..] else {
        panic!("no monitor")
    };
    let pid = rustix::process::Pid::from_raw(monitor).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let killed = Instant::now();
    let status = finish(&mut events).await.unwrap_err();
    // The contract with callers, not a measurement.
    assert!(
        killed.elapsed() < Duration::from_secs(1),
        "{:?}",
        killed.elapsed()
    );
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::Unavailable, "SANDBOX_DIED")
    );
    let sandbox = get(&mut client, &id).await;
    assert_eq!(sandbox.state(), SandboxState::Failed);
    assert_eq!(sandbox.failure.unwrap().reason, "MONITOR_DIED");
    eventually("resources stay taken", async || host.monitors().is_empty()).await;
    let mut events = exec(&mut client, &id, &["exit", "0"]).await;
    assert_eq!(
        reason(&finish(&mut events).await.unwrap_err()),
        "SANDBOX_FAILED"
    );
    delete(&mut client, &id, false).await;
    host.assert_nothing_left();
    assert_all_is_free(&daemon).await;
}

async fn a_guest_that_ends_itself_is_failed() {
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    for (program, expected) in [("panic", "GUEST_PANIC"), ("poweroff", "GUEST_POWERED_OFF")] {
        let id = make(&mut client).await;
        let mut events = exec(&mut client, &id, &[program]).await;
        let status = finish(&mut events).await.unwrap_err();
        assert_eq!(
            (status.code(), reason(&status).as_str()),
            (Code::Unavailable, "SANDBOX_DIED")
        );
        let details = status.get_error_details();
        let metadata = &details.error_info().unwrap().metadata;
        assert_eq!(metadata["failure_reason"], expected);
        if program == "panic" {
            assert!(metadata["console_tail"].contains("Kernel panic"));
        }
        assert_eq!(
            get(&mut client, &id).await.failure.unwrap().reason,
            expected
        );
        delete(&mut client, &id, false).await;
    }
    host.assert_nothing_left();
    assert_all_is_free(&daemon).await;
}

async fn a_boot_that_fails_says_why_and_leaves_nothing() {
    let host = host_with(&FAST.replace("boot_ms = 20000", "boot_ms = 1500"));
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    for (template, code, expected, says) in [
        (
            "refuse",
            Code::FailedPrecondition,
            "KERNEL_INVALID",
            "of no use",
        ),
        (
            "emulation",
            Code::FailedPrecondition,
            "EMULATION_FAILED",
            "images/bench/run",
        ),
        ("die", Code::Unavailable, "MONITOR_DIED", "monitor ended"),
        ("mute", Code::DeadlineExceeded, "BOOT_TIMEOUT", "1500 ms"),
    ] {
        let status = create(&mut client, template).await.unwrap_err();
        assert_eq!(
            (status.code(), reason(&status).as_str()),
            (code, expected),
            "{status:?}"
        );
        assert!(status.message().contains(says), "{status:?}");
        if template == "mute" {
            let details = status.get_error_details();
            let metadata = &details.error_info().unwrap().metadata;
            assert!(metadata["console_tail"].contains("Linux version"));
        }
        host.assert_nothing_left();
    }
    assert_all_is_free(&daemon).await;
    assert!(list(&mut client).await.is_empty());
}

async fn deleting_works_while_starting_and_many_times() {
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let mut creating = client.clone();
    let creating = tokio::spawn(async move { create(&mut creating, "mute").await });
    eventually("nothing starts", async || !host.monitors().is_empty()).await;
    let id = list(&mut client).await[0].id.clone();
    let deletes: Vec<_> = (0..8)
        .map(|_| {
            let (mut client, id) = (client.clone(), id.clone());
            tokio::spawn(async move { delete(&mut client, &id, false).await })
        })
        .collect();
    for delete in deletes {
        delete.await.unwrap();
    }
    let status = creating.await.unwrap().unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::Aborted, "SANDBOX_DELETED")
    );
    host.assert_nothing_left();
    // A caller that goes away while its sandbox starts leaves none.
    let mut leaving = client.clone();
    let leaving = tokio::spawn(async move { create(&mut leaving, "mute").await });
    eventually("nothing starts", async || !host.monitors().is_empty()).await;
    leaving.abort();
    eventually("it stays", async || list(&mut client).await.is_empty()).await;
    host.assert_nothing_left();
    assert_all_is_free(&daemon).await;
}

async fn a_stubborn_guest_is_killed() {
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let id = create(&mut client, "stubborn")
        .await
        .unwrap()
        .sandbox
        .unwrap()
        .id;
    delete(&mut client, &id, false).await;
    host.assert_nothing_left();
    // A forced delete overtakes one that waits for the guest.
    let id = create(&mut client, "stubborn")
        .await
        .unwrap()
        .sandbox
        .unwrap()
        .id;
    let (mut patient, patient_id) = (client.clone(), id.clone());
    let patient = tokio::spawn(async move { delete(&mut patient, &patient_id, false).await });
    eventually("no stop", async || {
        get(&mut client, &id).await.state() == SandboxState::Stopping
    })
    .await;
    delete(&mut client, &id, true).await;
    patient.await.unwrap();
    host.assert_nothing_left();
    assert_all_is_free(&daemon).await;
}

async fn a_repeated_request_makes_one_sandbox() {
    let host = host();
    let mut daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let mut repeated = request("base");
    repeated.request_id = "one".to_owned();
    let calls: Vec<_> = (0..6)
        .map(|_| {
            let (mut client, request) = (client.clone(), repeated.clone());
            tokio::spawn(async move { client.create_sandbox(request).await.unwrap().into_inner() })
        })
        .collect();
    let mut replies = Vec::new();
    for call in calls {
        replies.push(call.await.unwrap());
    }
    assert!(replies.iter().all(|reply| *reply == replies[0]));
    assert_eq!(list(&mut client).await.len(), 1);
    // Also by the next daemon.
    daemon.kill();
    let next = host.start();
    let mut client = next.sandboxes().await;
    let again = client
        .create_sandbox(repeated.clone())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(again, replies[0]);
    repeated.template = "stubborn".to_owned();
    let other = client.create_sandbox(repeated).await.unwrap_err();
    assert_eq!(other.code(), Code::AlreadyExists);
    assert!(host.soulbox(&["rm", "--all"]).status.success());
    host.assert_nothing_left();
}

async fn creates_never_oversell() {
    let host = host_with(&FAST.replace("vcpus = 8", "vcpus = 3"));
    let daemon = host.start();
    let client = daemon.sandboxes().await;
    let creates: Vec<_> = (0..8)
        .map(|_| {
            let mut client = client.clone();
            tokio::spawn(async move { create(&mut client, "base").await })
        })
        .collect();
    let mut made = 0;
    for create in creates {
        match create.await.unwrap() {
            Ok(_) => made += 1,
            Err(status) => {
                assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
                assert!(
                    status.message().contains("vcpus (1 wanted, 0 left)"),
                    "{status:?}"
                );
                assert!(status.get_error_details().retry_info().is_some());
            }
        }
    }
    assert_eq!(made, 3);
    assert!(host.soulbox(&["rm", "--all"]).status.success());
    assert_all_is_free(&daemon).await;
    host.assert_nothing_left();
}

async fn a_time_to_live_ends() {
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let mut short = request("base");
    short.ttl = Some(prost_types::Duration {
        seconds: 2,
        nanos: 0,
    });
    let created = client.create_sandbox(short).await.unwrap().into_inner();
    assert!(created.sandbox.unwrap().expire_time.is_some());
    eventually("it lives on", async || list(&mut client).await.is_empty()).await;
    host.assert_nothing_left();
    assert_all_is_free(&daemon).await;
}

async fn a_killed_daemon_is_followed_by_one_that_adopts() {
    let host = host();
    let mut daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let lives = make(&mut client).await;
    let dies = make(&mut client).await;
    let monitors = host.monitors();
    daemon.kill();
    let log = host.path("state/sandboxes").join(&dies).join("vmm.log");
    let victim = monitors
        .into_iter()
        .find(|pid| fs::read_link(format!("/proc/{pid}/fd/1")).is_ok_and(|path| path == log));
    let victim = rustix::process::Pid::from_raw(victim.unwrap()).unwrap();
    rustix::process::kill_process(victim, rustix::process::Signal::KILL).unwrap();

    let mut next = host.start();
    let summary = next.wait_for_log("records and host agree");
    assert!(
        summary.contains("adopted=1") && summary.contains("failed=1"),
        "{summary}"
    );
    let mut client = next.sandboxes().await;
    let mut events = exec(&mut client, &lives, &["exit", "5"]).await;
    assert_eq!(
        finish(&mut events).await.unwrap().1,
        exited::Status::Code(5)
    );
    assert_eq!(get(&mut client, &dies).await.state(), SandboxState::Failed);
    delete(&mut client, &lives, false).await;
    delete(&mut client, &dies, false).await;
    host.assert_nothing_left();
    assert_all_is_free(&next).await;
}

async fn a_daemon_that_stops_keeps_or_stops_its_sandboxes() {
    let host = host();
    let mut daemon = host.start();
    let id = make(&mut daemon.sandboxes().await).await;
    daemon.terminate();
    assert_eq!(host.monitors().len(), 1);
    let mut next = host.start();
    assert!(next.wait_for_log("adopted").contains(&id));
    next.terminate();
    let config = fs::read_to_string(host.path("soulboxd.toml")).unwrap();
    let stops = format!("{config}\n[shutdown]\nsandboxes = \"stop\"\n");
    fs::write(host.path("soulboxd.toml"), stops).unwrap();
    let mut last = host.start();
    last.wait_for_log("adopted");
    last.terminate();
    host.assert_nothing_left();
}

async fn a_sandbox_of_a_call_goes_with_it_when_the_daemon_went_first() {
    let host = host();
    let mut daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let id = make(&mut client).await;
    let kept = make(&mut client).await;
    let start = ExecStart {
        delete_sandbox_after: true,
        ..start(&id, &["sleep"])
    };
    let mut events = exec_start(&mut client, start).await;
    started(&mut events).await;
    daemon.kill();
    let mut next = host.start();
    let summary = next.wait_for_log("records and host agree");
    assert!(
        summary.contains("adopted=1") && summary.contains("deleted=1"),
        "{summary}"
    );
    assert!(next.wait_for_log("was to go with a call").contains(&id));
    let mut client = next.sandboxes().await;
    delete(&mut client, &kept, false).await;
    assert!(list(&mut client).await.is_empty());
    host.assert_nothing_left();
    assert_all_is_free(&next).await;
}

async fn a_hung_monitor_holds_up_no_start() {
    let host = host();
    let mut daemon = host.start();
    let mut client = daemon.sandboxes().await;
    for _ in 0..3 {
        make(&mut client).await;
    }
    daemon.kill();
    for monitor in &host.monitors()[..2] {
        let pid = rustix::process::Pid::from_raw(*monitor).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    }
    // One that is asked to stop before it is ready does.
    let mut asked = host
        .soulboxd()
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(asked.stderr.take().unwrap())
        .lines()
        .map(Result::unwrap);
    assert!(log.any(|line| line.contains("adopted")));
    let pid = rustix::process::Pid::from_raw(asked.id().try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let rest: Vec<String> = log.collect();
    assert!(asked.wait().unwrap().success(), "{rest:#?}");
    assert!(
        rest.iter()
            .any(|line| line.contains("stopped before it was ready")),
        "{rest:#?}"
    );

    let mut next = host.start();
    let summary = next.wait_for_log("records and host agree");
    assert!(
        summary.contains("adopted=1") && summary.contains("failed=2"),
        "{summary}"
    );
    let reasons: Vec<_> = list(&mut next.sandboxes().await)
        .await
        .into_iter()
        .filter_map(|sandbox| sandbox.failure)
        .map(|failure| failure.reason)
        .collect();
    assert_eq!(reasons, ["MONITOR_LOST", "MONITOR_LOST"]);
    assert!(host.soulbox(&["rm", "--all"]).status.success());
    host.assert_nothing_left();
    assert_all_is_free(&next).await;
}

async fn a_retry_after_a_passing_failure_is_a_new_try() {
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let with_id = |template: &str, request_id: &str| CreateSandboxRequest {
        request_id: request_id.to_owned(),
        ..request(template)
    };
    let died = client.create_sandbox(with_id("die", "one")).await;
    assert_eq!(reason(&died.unwrap_err()), "MONITOR_DIED");
    client.create_sandbox(with_id("base", "one")).await.unwrap();
    // One that every try would have is remembered.
    let refused = client.create_sandbox(with_id("refuse", "two")).await;
    assert_eq!(reason(&refused.unwrap_err()), "KERNEL_INVALID");
    let other = client.create_sandbox(with_id("base", "two")).await;
    assert_eq!(reason(&other.unwrap_err()), "REQUEST_ID_REUSED");
    assert!(host.soulbox(&["rm", "--all"]).status.success());
    host.assert_nothing_left();
}

async fn a_cut_off_start_is_undone() {
    let host = host();
    let mut daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let mut starting = request("mute");
    starting.request_id = "cut off".to_owned();
    let call = tokio::spawn(async move { client.create_sandbox(starting).await });
    eventually("nothing starts", async || !host.monitors().is_empty()).await;
    daemon.kill();
    assert!(call.await.unwrap().is_err());
    let mut next = host.start();
    let summary = next.wait_for_log("records and host agree");
    assert!(summary.contains("undone=1"), "{summary}");
    host.assert_nothing_left();
    // Its id is free again.
    let mut client = next.sandboxes().await;
    let mut again = request("base");
    again.request_id = "cut off".to_owned();
    client.create_sandbox(again).await.unwrap();
    assert!(host.soulbox(&["rm", "--all", "--force"]).status.success());
    host.assert_nothing_left();
}

async fn watchers_see_every_step() {
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let first = make(&mut client).await;
    let changes = client
        .watch_sandboxes(WatchSandboxesRequest::default())
        .await;
    let mut changes = changes.unwrap().into_inner();
    let mut second_client = client.clone();
    let mut seen = Vec::new();
    let next = async |changes: &mut Streaming<_>, seen: &mut Vec<(Kind, SandboxState)>| {
        let change: soulbox_proto::host::v1::WatchSandboxesResponse =
            changes.message().await.unwrap().unwrap();
        let sandbox = change.sandbox.as_ref().unwrap();
        seen.push((change.kind(), sandbox.state()));
        (change.kind(), sandbox.id.clone())
    };
    assert_eq!(
        next(&mut changes, &mut seen).await,
        (Kind::Current, first.clone())
    );
    let id = make(&mut second_client).await;
    delete(&mut second_client, &id, false).await;
    while next(&mut changes, &mut seen).await.0 != Kind::Deleted {}
    seen.dedup();
    use SandboxState::{Pending, Running, Starting, Stopped, Stopping};
    let steps = [Pending, Starting, Running, Stopping, Stopped];
    let mut expected = vec![(Kind::Current, Running)];
    expected.extend(steps.map(|state| (Kind::Changed, state)));
    expected.push((Kind::Deleted, Stopped));
    assert_eq!(seen, expected);
    delete(&mut second_client, &first, true).await;
    host.assert_nothing_left();
}
