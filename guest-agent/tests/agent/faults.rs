//! Programs that mean no good, or are too many.

use std::sync::Arc;
use std::time::Duration;

use soulbox_proto::guest::v1::exec_response::Event;
use soulbox_proto::guest::v1::*;

use crate::common::*;

/// Nobody else's, so that their limit of processes counts those of a test only.
const OWN_USER: &str = "654321";

fn limited(spec: ProcessSpec, cgroup: CgroupLimits) -> ProcessSpec {
    ProcessSpec {
        cgroup: Some(cgroup),
        ..spec
    }
}

async fn refused_for_want_of_a_controller(guest: &Guest, cgroup: CgroupLimits) {
    let Err(status) = guest.run(limited(sh("true"), cgroup)).await else {
        panic!("limits that nothing can enforce were taken")
    };
    assert_eq!(status.code(), tonic::Code::FailedPrecondition);
    assert_eq!(reason(&status), ("LIMITS_UNAVAILABLE".into(), "126".into()));
}

#[tokio::test]
async fn a_fork_bomb_is_killed_as_a_whole() {
    let guest = Guest::start().await;
    if !guest.has_cgroups() {
        return;
    }
    // As many as it may have, each of which tries for more, ignores what it can, and
    // leaves its parent and session. Bash tries again when a fork fails.
    let bomb = "trap '' TERM HUP INT; while :; do setsid bash -c \"$1\" bash \"$1\" & \
                sleep 0.1; done 2>/dev/null";
    let bomb = ProcessSpec {
        user: OWN_USER.to_owned(),
        cwd: "/".into(),
        limits: Some(ResourceLimits {
            processes: Some(48),
            ..ResourceLimits::default()
        }),
        ..spec(&["bash", "-c", bomb, "bash", bomb])
    };
    let call = guest.exec(bomb).await.unwrap();
    let owned = || {
        let count = std::process::Command::new("pgrep")
            .args(["-c", "-U", OWN_USER])
            .output();
        let count = String::from_utf8(count.unwrap().stdout).unwrap();
        count.trim().parse::<u32>().unwrap()
    };
    until(|| owned() >= 40).await;
    // The guest serves on.
    assert_eq!(guest.sh("echo on").await.text(), "on\n");
    assert!(guest.signal(call.id, "KILL", false).await.unwrap());
    assert_eq!(call.finish().await.unwrap().signal(), 9);
    until(|| owned() == 0).await;

    // A time-out does the same.
    let line = "for i in 1 2 3 4 5 6 7 8; do setsid sleep 1000 & done; sleep 1000";
    let timed = ProcessSpec {
        user: OWN_USER.to_owned(),
        cwd: "/".into(),
        ..with_timeout(sh(line), Duration::from_millis(500))
    };
    let finished = guest.run(timed).await.unwrap();
    assert!(finished.exited.timed_out && finished.signal() == 9);
    until(|| owned() == 0).await;
}

#[tokio::test]
async fn a_guest_without_room_for_a_process_can_still_be_helped() {
    let guest = Arc::new(Guest::start_as_init().await);
    // Of the namespace, as it would be of the guest. Once they have come round, the
    // kernel gives out none below 300, and the agent's threads have theirs, too.
    let pid_max = "/proc/sys/kernel/pid_max";
    let before = std::fs::read_to_string(pid_max).unwrap();
    let set = guest
        .sh(&format!("echo 500 >{pid_max} && cat {pid_max}"))
        .await;
    let after = std::fs::read_to_string(pid_max).unwrap();
    if after != before {
        // Before Linux 6.14 it is the machine's.
        std::fs::write(pid_max, before).unwrap();
        return;
    }
    assert_eq!(set.text(), "500\n");
    // A shell that cannot fork ends, and makes room for another's.
    let bomb = "while :; do setsid sh -c \"$1\" sh \"$1\" & done";
    let line = "exec 2>/dev/null; sh -c \"$1\" sh \"$1\" & exec sleep 1000";
    let call = guest.exec(spec(&["sh", "-c", line, "sh", bomb]));
    let call = call.await.unwrap();
    // More at once than the agent has threads.
    let full = loop {
        let mut tries = tokio::task::JoinSet::new();
        for _ in 0..100 {
            let guest = Arc::clone(&guest);
            tries.spawn(async move { guest.run(spec(&["true"])).await });
        }
        let results = tries.join_all().await;
        if let Some(status) = results.into_iter().find_map(Result::err) {
            break status;
        }
    };
    assert_eq!(reason(&full), ("OUT_OF_RESOURCES".into(), "126".into()));
    assert!(guest.health().await.running_processes > 0);
    assert!(guest.signal(call.id, "KILL", true).await.unwrap());
    if guest.has_cgroups() {
        let again = async { while guest.run(spec(&["true"])).await.is_err() {} };
        tokio::time::timeout(LONG, again).await.unwrap();
        assert_eq!(guest.sh("echo on").await.text(), "on\n");
    }
}

#[tokio::test]
async fn pids_are_limited() {
    let guest = Guest::start().await;
    let pids = CgroupLimits {
        pids: Some(8),
        ..CgroupLimits::default()
    };
    if !guest.has_controller("pids") {
        return refused_for_want_of_a_controller(&guest, pids).await;
    }
    let line = "for i in $(seq 20); do sleep 1000 & done";
    let call = guest.exec(limited(sh(line), pids)).await.unwrap();
    let finished = call.finish().await.unwrap();
    assert!(!finished.stderr.is_empty() && finished.code() != 0);
    guest.sh("true").await;
}

#[tokio::test]
async fn memory_is_limited() {
    let guest = Guest::start().await;
    let memory = CgroupLimits {
        memory_bytes: Some(32 << 20),
        ..CgroupLimits::default()
    };
    if !guest.has_controller("memory") {
        return refused_for_want_of_a_controller(&guest, memory).await;
    }
    // All of it dies, not the one process that was too much.
    let line = "sleep 1000 & tail /dev/zero";
    let finished = guest.run(limited(sh(line), memory)).await.unwrap();
    assert_eq!(finished.signal(), 9);
    assert!(!finished.exited.timed_out);
    assert_eq!(guest.sh("echo on").await.text(), "on\n");
}

#[tokio::test]
async fn cpu_is_limited() {
    let guest = Guest::start().await;
    let cpu = CgroupLimits {
        cpu_millis: Some(100),
        ..CgroupLimits::default()
    };
    if !guest.has_controller("cpu") {
        return refused_for_want_of_a_controller(&guest, cpu).await;
    }
    let line = "cat /sys/fs/cgroup$(tail -n1 /proc/self/cgroup | cut -d: -f3)/cpu.max";
    let finished = guest.run(limited(sh(line), cpu)).await.unwrap();
    assert_eq!(finished.text(), "10000 100000\n");
}

#[tokio::test]
async fn limits_that_make_no_sense_are_refused() {
    let guest = Guest::start().await;
    let none = CgroupLimits {
        cpu_millis: Some(0),
        memory_bytes: Some(4096),
        pids: Some(0),
    };
    let status = guest.run(limited(sh("true"), none)).await.unwrap_err();
    let fields = fields(&status);
    let names = ["cpu_millis", "memory_bytes", "pids"];
    assert_eq!(fields, names.map(|name| format!("start.cgroup.{name}")));
    // Without one nothing is needed.
    let nothing = limited(sh("true"), CgroupLimits::default());
    assert_eq!(guest.run(nothing).await.unwrap().code(), 0);
}

#[tokio::test]
async fn a_thousand_at_once() {
    const CONNECTIONS: usize = 10;
    const EACH: usize = 100;
    // The agent inherits it, as in a guest the agent has more.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let most = rustix::process::Rlimit {
        current: limit.maximum,
        ..limit
    };
    rustix::process::setrlimit(rustix::process::Resource::Nofile, most).unwrap();

    let guest = Arc::new(Guest::start().await);
    let mut calls = Vec::new();
    for _ in 0..CONNECTIONS {
        let channel = guest.connection().await;
        for _ in 0..EACH {
            let cat = ProcessSpec {
                stdin: true,
                ..spec(&["cat"])
            };
            calls.push(guest.exec_on(channel.clone(), cat).await.unwrap());
        }
    }
    assert_eq!(guest.health().await.running_processes, 1000);
    let mut pids: Vec<_> = calls.iter().map(|call| call.pid).collect();
    pids.sort_unstable();
    pids.dedup();
    assert_eq!(pids.len(), 1000);
    let peak = peak_resident_kib(guest.agent_pid());
    assert!(peak < 48 * 1024, "the agent's peak is {peak} KiB");
    for (index, call) in calls.into_iter().enumerate() {
        call.stdin(index.to_string()).await;
        call.stdin_eof().await;
        let finished = call.finish().await.unwrap();
        assert_eq!(
            (finished.text(), finished.code()),
            (index.to_string().as_str(), 0)
        );
    }
    let health = guest.health().await;
    assert_eq!(health.running_processes, 0);
    assert_eq!(guest.programs().await.len(), 64);
}

#[tokio::test]
async fn a_program_that_fills_its_pipes_and_reads_nothing_disturbs_nobody() {
    let guest = Guest::start().await;
    let line = "yes & yes >&2";
    let greedy = ProcessSpec {
        stdin: true,
        ..sh(line)
    };
    let call = guest.exec(greedy).await.unwrap();
    call.stdin(vec![0; 1 << 20]).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    // Another caller's input waits behind that, his signal does not.
    let other = guest.attach(call.id).await.unwrap();
    other.stdin("more").await;
    assert_eq!(guest.sh("echo on").await.text(), "on\n");
    other.input(process_input::Input::Signal(15)).await;
    let finished = call.finish().await.unwrap();
    assert_eq!(finished.signal(), 15);
    other.finish().await.unwrap();
}

#[tokio::test]
async fn daemons_that_fork_twice_are_reaped_and_can_be_killed() {
    let guest = Guest::start().await;
    let line = "setsid sh -c '(exec sleep 1000 >/dev/null 2>&1) & echo $!' ; \
                setsid sh -c 'sleep 0.05 & echo $!; exec sleep 0.02' & wait";
    let mut call = guest
        .exec(sh(&format!("{line}; sleep 1000")))
        .await
        .unwrap();
    let mut text = String::new();
    while text.lines().count() < 2 {
        match call.event().await {
            Event::Stdout(bytes) => text.push_str(std::str::from_utf8(&bytes).unwrap()),
            other => panic!("{other:?}"),
        }
    }
    let pids: Vec<u32> = text.lines().map(|line| line.parse().unwrap()).collect();
    let is_gone = |pid| !std::path::Path::new(&format!("/proc/{pid}")).exists();
    until(|| is_gone(pids[1])).await;
    assert!(lives(pids[0]));
    guest.signal(call.id, "KILL", false).await.unwrap();
    assert_eq!(call.finish().await.unwrap().signal(), 9);
    if guest.has_cgroups() {
        until(|| is_gone(pids[0])).await;
    }
}

#[tokio::test]
async fn a_program_that_kills_every_other_ends_them_and_not_the_agent() {
    let guest = Guest::start_as_init().await;
    let mut victims = Vec::new();
    for _ in 0..5 {
        victims.push(guest.exec(sh("trap '' TERM; sleep 1000")).await.unwrap());
    }
    let id = victims[0].id;
    let watcher = guest.attach(id).await.unwrap();
    // Also itself, where its shell does not.
    let killer = guest.sh("kill -9 -1; echo done").await;
    assert_eq!(killer.text(), "done\n");
    for victim in victims {
        assert_eq!(victim.finish().await.unwrap().signal(), 9);
    }
    assert_eq!(watcher.finish().await.unwrap().signal(), 9);
    assert_eq!(guest.sh("echo on").await.text(), "on\n");
    assert_eq!(guest.health().await.running_processes, 0);
}

#[tokio::test]
async fn a_cgroup_is_used_again_only_when_it_is_as_new() {
    let guest = Guest::start().await;
    if !guest.has_cgroups() {
        return;
    }
    let own = "tail -n1 /proc/self/cgroup";
    let first = guest.sh(own).await.text().to_owned();
    assert_eq!(guest.sh(own).await.text(), first);
    // One that was killed would kill what comes after.
    let killed = guest.exec(spec(&["sleep", "1000"])).await.unwrap();
    guest.signal(killed.id, "KILL", false).await.unwrap();
    killed.finish().await.unwrap();
    let second = guest.sh(own).await.text().to_owned();
    assert_ne!(second, first);
    // Root can do that, too.
    let line =
        format!("echo 1 >$(findmnt -nt cgroup2 -o TARGET)$({own} | cut -d: -f3)/cgroup.kill");
    assert_eq!(guest.sh(&line).await.signal(), 9);
    let third = guest.sh(own).await.text().to_owned();
    assert_ne!(third, second);
    // And take it away.
    let line = format!("findmnt -nt cgroup2 -o TARGET; {own} | cut -d: -f3");
    let folder = guest.sh(&line).await.text().replace('\n', "");
    std::fs::remove_dir(&folder).unwrap();
    assert_eq!(guest.sh("echo on").await.text(), "on\n");
    // What is left in one keeps it.
    let left = guest
        .sh(&format!("{own}; sleep 1000 >/dev/null 2>&1 & echo $!"))
        .await;
    let (folder, pid) = left.text().split_once('\n').unwrap();
    assert_ne!(guest.sh(own).await.text().trim(), folder);
    guest.sh(&format!("kill -9 {pid}")).await;
    while guest.cgroups() > 1 {
        guest.sh("true").await;
    }
}
