//! The guest's half of the fork contract: programs stop before a snapshot, and go
//! on when the guest knows who it is.

use std::collections::HashSet;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use soulbox_proto::guest::v1::exec_response::Event;
use soulbox_proto::guest::v1::process_service_client::ProcessServiceClient;
use soulbox_proto::guest::v1::*;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use crate::common::*;

/// Long enough for a program that runs to show it.
const A_WHILE: Duration = Duration::from_millis(100);

const MACHINE_ID: &str = "cat /etc/machine-id";
const BOOT_ID: &str = "cat /proc/sys/kernel/random/boot_id";

/// As after a restore; no clock: it has no namespace.
fn new_identity() -> ConfigureRequest {
    ConfigureRequest {
        entropy: vec![0x5a; 64].into(),
        new_identity: true,
        ..ConfigureRequest::default()
    }
}

async fn configure(guest: &Guest, request: ConfigureRequest) -> Result<(), Status> {
    guest.system().configure(request).await.map(drop)
}

async fn suspend(guest: &Guest) -> Result<(), Status> {
    guest.system().suspend(SuspendRequest {}).await.map(drop)
}

async fn text(guest: &Guest, line: &str) -> String {
    let finished = guest.sh(line).await;
    assert_eq!(finished.code(), 0, "{line}");
    finished.text().to_owned()
}

#[tokio::test]
async fn a_suspended_program_stands_still_until_configure() {
    let guest = Guest::start_as_init().await;
    // Forks all the time, in a session of its own, and has let go of its call.
    let line = "setsid sh -c 'while :; do date +%s%N >/agent/ticks; done' >/dev/null 2>&1 &";
    guest.sh(line).await;
    let ticks = || std::fs::read(guest.folder().join("ticks")).unwrap_or_default();
    until(|| !ticks().is_empty()).await;

    for _ in 0..5 {
        suspend(&guest).await.unwrap();
        suspend(&guest).await.unwrap();
        assert_eq!(guest.cgroup_event("frozen"), Some(true));
        let last = ticks();
        tokio::time::sleep(A_WHILE).await;
        assert_eq!(ticks(), last);
        assert_eq!(guest.health().await.running_processes, 0);

        configure(&guest, new_identity()).await.unwrap();
        until(|| ticks() != last).await;
        assert_eq!(guest.cgroup_event("frozen"), Some(false));
    }
}

#[tokio::test]
async fn a_program_that_is_asked_for_meanwhile_runs_after_configure() {
    let guest = Arc::new(Guest::start_as_init().await);
    let run = |line: &'static str| {
        let guest = Arc::clone(&guest);
        tokio::spawn(async move { guest.sh(line).await })
    };
    // Some of these are being started when the programs stop.
    let early: Vec<_> = (0..8).map(|_| run("echo early")).collect();
    suspend(&guest).await.unwrap();
    let late = run("date +%s%N; cat /etc/machine-id");
    tokio::time::sleep(A_WHILE).await;
    // Nothing else waits for them, and they stand still.
    guest.health().await;
    suspend(&guest).await.unwrap();
    assert!(!late.is_finished());

    let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    configure(&guest, new_identity()).await.unwrap();
    for early in early {
        let early = early.await.unwrap();
        assert_eq!((early.text(), early.code()), ("early\n", 0));
    }
    let late = late.await.unwrap();
    let (ran, id) = late.text().trim().split_once('\n').unwrap();
    assert!(ran.parse::<u128>().unwrap() >= before.as_nanos());
    assert_eq!(id, text(&guest, MACHINE_ID).await.trim());
}

#[tokio::test]
async fn a_suspended_program_that_is_bound_to_its_call_dies_with_it() {
    let guest = Guest::start_as_init().await;
    // What a clone sees of its parent's calls: the connection is gone.
    let mut parent = ProcessServiceClient::new(guest.connection().await);
    let (requests, stream) = tokio::sync::mpsc::channel(1);
    let line = "setsid sleep 1000 & while :; do :; done";
    requests.send(start(bound(sh(line)))).await.unwrap();
    let responses = parent.exec(ReceiverStream::new(stream)).await.unwrap();
    let mut responses = responses.into_inner();
    let first = responses.message().await.unwrap().unwrap().event;
    assert!(matches!(first, Some(Event::Started(_))));

    suspend(&guest).await.unwrap();
    assert_eq!(guest.health().await.running_processes, 1);
    drop((parent, requests, responses));
    until(|| guest.cgroup_event("populated") == Some(false)).await;
    while guest.health().await.running_processes > 0 {
        tokio::task::yield_now().await;
    }
    configure(&guest, new_identity()).await.unwrap();
    assert_eq!(guest.sh("echo yes").await.text(), "yes\n");
}

#[tokio::test]
async fn a_program_is_found_again_after_a_fork() {
    let guest = Guest::start_as_init().await;
    let mut parent = ProcessServiceClient::new(guest.connection().await);
    let (requests, stream) = tokio::sync::mpsc::channel(1);
    let line = "while :; do echo tick; sleep 0.01; done";
    requests.send(start(sh(line))).await.unwrap();
    let responses = parent.exec(ReceiverStream::new(stream)).await.unwrap();
    let mut responses = responses.into_inner();
    let first = responses.message().await.unwrap().unwrap().event;
    let Some(Event::Started(Started { id, .. })) = first else {
        panic!("{first:?}")
    };
    let ended = guest.exec(sh("echo said; exit 4")).await.unwrap();
    let ended_id = ended.id;
    ended.finish().await.unwrap();

    // Of the parent's connections a clone has none.
    suspend(&guest).await.unwrap();
    drop((parent, requests, responses));
    while guest.entry(id).await.unwrap().callers > 0 {}
    // Also before it knows who it is, it can be asked what it was doing.
    let mut attached = guest.attach(id).await.unwrap();
    assert!(matches!(attached.event().await, Event::Stdout(_)));
    let output = async || guest.entry(id).await.unwrap().output_bytes;
    let said = output().await;
    tokio::time::sleep(A_WHILE).await;
    assert_eq!(output().await, said);

    configure(&guest, new_identity()).await.unwrap();
    while output().await <= said {}
    let known: Vec<_> = guest
        .programs()
        .await
        .iter()
        .map(|entry| entry.id)
        .collect();
    assert_eq!(known, [id, ended_id]);
    let late = guest.attach(ended_id).await.unwrap();
    let late = late.finish().await.unwrap();
    assert_eq!((late.text(), late.code()), ("said\n", 4));
    let new = guest.exec(sh("true")).await.unwrap();
    assert!(!known.contains(&new.id));
    assert!(guest.signal(id, "TERM", true).await.unwrap());
    assert_eq!(attached.finish().await.unwrap().signal(), 15);
}

#[tokio::test]
async fn every_identity_is_new_and_leaves_nothing_behind() {
    let guest = Guest::start_as_init().await;
    let own = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let (mut machine_ids, mut boot_ids) = (HashSet::new(), HashSet::from([own]));
    // A guest that has never been anybody gets ids in any case.
    configure(&guest, ConfigureRequest::default())
        .await
        .unwrap();
    assert!(machine_ids.insert(text(&guest, MACHINE_ID).await));
    assert!(boot_ids.insert(text(&guest, BOOT_ID).await));

    let left = "wc -l </proc/self/mountinfo; ls /proc/1/fd /run/soulbox | wc -l";
    let count = async || {
        let said = text(&guest, left).await;
        let numbers = said.split_whitespace().map(str::parse);
        numbers.collect::<Result<Vec<u32>, _>>().unwrap()
    };
    let before = count().await;
    for round in 0..300 {
        let request = ConfigureRequest {
            hostname: format!("sb-{round}"),
            ..new_identity()
        };
        configure(&guest, request).await.unwrap();
        if round % 100 == 0 {
            assert!(machine_ids.insert(text(&guest, MACHINE_ID).await));
            assert!(boot_ids.insert(text(&guest, BOOT_ID).await));
        }
    }
    // A connection of the beginning may have been closed since.
    let after = count().await;
    let grown = after
        .iter()
        .zip(&before)
        .any(|(after, before)| after > before);
    assert!(!grown, "{before:?}, then {after:?}");
    for id in &machine_ids {
        let id = id.trim_end();
        assert!(id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit()));
    }
    for id in &boot_ids {
        assert!(id.len() == 37 && id.bytes().filter(|byte| *byte == b'-').count() == 4);
    }

    // Without a name it keeps its own, and without a new identity its ids.
    configure(&guest, new_identity()).await.unwrap();
    let names = "hostname; cat /etc/hostname; tail -n1 /etc/hosts";
    assert_eq!(
        text(&guest, names).await,
        "sb-299\nsb-299\n127.0.1.1 sb-299\n"
    );
    let ids = [MACHINE_ID, BOOT_ID].join(";");
    let before = text(&guest, &ids).await;
    let renamed = ConfigureRequest {
        hostname: "other".to_owned(),
        ..ConfigureRequest::default()
    };
    configure(&guest, renamed).await.unwrap();
    assert_eq!(text(&guest, &ids).await, before);
    assert_eq!(text(&guest, names).await, "other\nother\n127.0.1.1 other\n");
}

#[tokio::test]
async fn identity_is_in_memory_and_not_on_the_disk() {
    let guest = Guest::start_as_init().await;
    let named = ConfigureRequest {
        hostname: "clone".to_owned(),
        ..new_identity()
    };
    configure(&guest, named).await.unwrap();
    let files = "/etc/hostname /etc/hosts /etc/machine-id";
    let modes = format!("stat -c '%n %a %U' {files}");
    let expected = "/etc/hostname 644 root\n/etc/hosts 644 root\n/etc/machine-id 644 root\n";
    assert_eq!(text(&guest, &modes).await, expected);
    // Root may write them, and may take them away, which shows the template's.
    text(&guest, "echo 10.0.0.1 more >>/etc/hosts").await;
    configure(&guest, new_identity()).await.unwrap();
    assert!(
        text(&guest, "cat /etc/hosts")
            .await
            .contains("10.0.0.1 more\n")
    );
    let under = format!("umount {files}; cat {files}");
    assert_eq!(
        text(&guest, &under).await,
        "template\n127.0.0.1 localhost\n"
    );
    // Configure does with what is there.
    let again = ConfigureRequest {
        hostname: "again".to_owned(),
        ..new_identity()
    };
    configure(&guest, again).await.unwrap();
    assert_eq!(
        text(&guest, "cat /etc/hostname /etc/hosts").await,
        "again\n127.0.0.1 localhost\n127.0.1.1 again\n"
    );
    assert_eq!(text(&guest, MACHINE_ID).await.len(), 33);

    let kernels = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let uncovered = format!("umount /proc/sys/kernel/random/boot_id; {BOOT_ID}");
    assert_eq!(text(&guest, &uncovered).await, kernels);
    configure(&guest, new_identity()).await.unwrap();
    assert_ne!(text(&guest, BOOT_ID).await, kernels);
    let mode = "stat -c %a /proc/sys/kernel/random/boot_id";
    assert_eq!(text(&guest, mode).await, "444\n");
}

#[tokio::test]
async fn when_a_step_fails_nothing_goes_on() {
    let guest = Guest::start_as_init().await;
    configure(&guest, new_identity()).await.unwrap();
    text(&guest, "mount -o remount,bind,ro /etc/machine-id").await;
    suspend(&guest).await.unwrap();

    let status = configure(&guest, new_identity()).await.unwrap_err();
    assert_eq!(reason(&status).0, "NOT_CONFIGURED");
    assert!(status.message().contains("machine-id"), "{status:?}");
    assert_eq!(guest.cgroup_event("frozen"), Some(true));

    let too_much = ConfigureRequest {
        entropy: vec![0; 513].into(),
        ..ConfigureRequest::default()
    };
    let status = configure(&guest, too_much).await.unwrap_err();
    assert_eq!(fields(&status), ["entropy"]);
    assert_eq!(guest.cgroup_event("frozen"), Some(true));

    configure(&guest, ConfigureRequest::default())
        .await
        .unwrap();
    assert_eq!(guest.cgroup_event("frozen"), Some(false));
}

#[tokio::test]
async fn a_program_that_cannot_stop_is_told_of_and_all_go_on() {
    if !Path::new("/dev/fuse").exists() {
        // Nothing else makes a program wait for as long as a test likes.
        return;
    }
    let guest = Guest::start_as_init().await;
    // A filesystem that nobody serves: what asks it sleeps, and hears SIGKILL only.
    let line = "exec 3<>/dev/fuse; mkdir /mnt; \
                mount -i -t fuse -o fd=3,rootmode=40000,user_id=0,group_id=0 none /mnt; \
                echo mounted; stat /mnt/file";
    let mut stuck = guest.exec(sh(line)).await.unwrap();
    assert_eq!(stuck.event().await, Event::Stdout("mounted\n".into()));
    let state = "ps -o stat= -C stat";
    while !guest.sh(state).await.text().contains('D') {}

    let (suspended, ()) = tokio::join!(suspend(&guest), async {
        // The agent serves on while it waits.
        assert_eq!(guest.health().await.running_processes, 1);
    });
    let status = suspended.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert_eq!(reason(&status).0, "NOT_SUSPENDED");
    assert_eq!(guest.sh("echo on").await.text(), "on\n");

    assert!(guest.signal(stuck.id, "KILL", true).await.unwrap());
    drop(stuck);
    until(|| guest.cgroup_event("populated") == Some(false)).await;
    suspend(&guest).await.unwrap();
    configure(&guest, new_identity()).await.unwrap();
}

#[tokio::test]
async fn a_suspended_guest_turns_off() {
    let mut guest = Guest::start_as_init().await;
    guest.sh("setsid sleep 1000 >/dev/null 2>&1 &").await;
    let call = guest.exec(sh("trap 'echo no' TERM; sleep 1000")).await;
    let call = call.unwrap();
    suspend(&guest).await.unwrap();
    let (waiting, finished, ()) = tokio::join!(guest.run(sh("true")), call.finish(), async {
        tokio::time::sleep(A_WHILE).await;
        guest.system().shutdown(ShutdownRequest {}).await.unwrap();
    });
    assert_eq!(reason(&waiting.unwrap_err()).0, "STOPPING");
    assert_eq!(finished.unwrap().signal(), 9);
    assert_eq!(guest.ended().await.signal(), Some(2));
}

#[tokio::test]
async fn an_agent_that_is_no_init_stops_nothing() {
    let guest = Guest::start().await;
    for status in [
        suspend(&guest).await.unwrap_err(),
        configure(&guest, new_identity()).await.unwrap_err(),
    ] {
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert_eq!(reason(&status).0, "NOT_INIT");
    }
    assert_eq!(guest.sh("echo runs").await.text(), "runs\n");
}
