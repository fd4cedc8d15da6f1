//! What flows while a program runs, and how calls end.

use std::time::Duration;

use soulbox_proto::guest::v1::exec_response::Event;
use soulbox_proto::guest::v1::*;

use crate::common::*;

fn with_stdin(spec: ProcessSpec) -> ProcessSpec {
    ProcessSpec {
        stdin: true,
        ..spec
    }
}

#[tokio::test]
async fn feeds_stdin_to_its_end() {
    let guest = Guest::start().await;
    let call = guest.exec(with_stdin(spec(&["cat"]))).await.unwrap();
    call.stdin("one ").await;
    call.stdin("two").await;
    call.stdin_eof().await;
    let finished = call.finish().await.unwrap();
    assert_eq!((finished.text(), finished.code()), ("one two", 0));

    // Without stdin there is /dev/null.
    assert_eq!(guest.run(spec(&["cat"])).await.unwrap().stdout, b"");
}

#[tokio::test]
async fn passes_megabytes_through_cat_unchanged() {
    let guest = Guest::start().await;
    let data: Vec<u8> = (0..3 << 20).map(|index: u32| (index / 7) as u8).collect();
    let call = guest.exec(with_stdin(spec(&["cat"]))).await.unwrap();
    let requests = call.requests();
    let chunks: Vec<Vec<u8>> = data.chunks(1 << 20).map(Into::into).collect();
    let sender = tokio::spawn(async move {
        for chunk in chunks {
            let stdin = process_input::Input::Stdin(chunk.into());
            requests.send(request(stdin)).await.unwrap();
        }
        let eof = process_input::Input::StdinEof(StdinEof {});
        requests.send(request(eof)).await.unwrap();
    });
    let finished = call.finish().await.unwrap();
    sender.await.unwrap();
    assert!(finished.stdout == data, "{} bytes", finished.stdout.len());
}

#[tokio::test]
async fn a_program_that_reads_no_stdin_still_speaks_and_is_signalled() {
    let guest = Guest::start().await;
    let line = "trap 'echo caught; exit 3' USR1; echo ready; while :; do sleep 0.01; done";
    let mut call = guest.exec(with_stdin(sh(line))).await.unwrap();
    // More than a pipe holds.
    call.stdin(vec![0; 1 << 20]).await;
    assert_eq!(call.event().await, Event::Stdout("ready\n".into()));
    call.signal(10).await;
    let finished = call.finish().await.unwrap();
    assert_eq!((finished.text(), finished.code()), ("caught\n", 3));
}

#[tokio::test]
async fn a_program_that_closes_its_stdin_is_not_disturbed() {
    let guest = Guest::start().await;
    let mut call = guest
        .exec(with_stdin(sh(
            "exec <&-; echo closed; sleep 0.2; echo done",
        )))
        .await
        .unwrap();
    assert_eq!(call.event().await, Event::Stdout("closed\n".into()));
    call.stdin(vec![0; 1 << 20]).await;
    call.stdin("more").await;
    let finished = call.finish().await.unwrap();
    assert_eq!((finished.text(), finished.code()), ("done\n", 0));
}

#[tokio::test]
async fn signals_reach_the_whole_group() {
    let guest = Guest::start().await;
    let line = "sh -c 'trap \"echo child; exit\" TERM; echo ready; while :; do sleep 0.01; done' & \
                trap 'wait; echo parent; exit 5' TERM; wait";
    let mut call = guest.exec(sh(line)).await.unwrap();
    assert_eq!(call.event().await, Event::Stdout("ready\n".into()));
    call.signal(15).await;
    let finished = call.finish().await.unwrap();
    assert_eq!((finished.text(), finished.code()), ("child\nparent\n", 5));
}

#[tokio::test]
async fn a_timeout_kills_the_group_and_says_so() {
    let guest = Guest::start().await;
    let line = "sleep 1000 & echo $!; trap '' TERM; wait";
    let finished = guest
        .run(with_timeout(sh(line), Duration::from_millis(300)))
        .await
        .unwrap();
    assert_eq!(finished.signal(), 9);
    assert!(finished.exited.timed_out && finished.exited.wall_us >= 300_000);
    let child = finished.text().trim().parse().unwrap();
    until(|| !lives(child)).await;

    let quick = guest.run(with_timeout(sh("exit 1"), LONG)).await.unwrap();
    assert!(quick.code() == 1 && !quick.exited.timed_out);
}

#[tokio::test]
async fn a_program_that_is_bound_to_its_call_is_killed_with_all_it_started() {
    let guest = Guest::start().await;
    // A child, and one that has left the session and its parent.
    let line = "sleep 1001 & echo $!; setsid sh -c 'sleep 1002 & echo $!'; wait";
    let mut call = guest.exec(bound(sh(line))).await.unwrap();
    let mut text = String::new();
    while text.lines().count() < 2 {
        match call.event().await {
            Event::Stdout(bytes) => text.push_str(std::str::from_utf8(&bytes).unwrap()),
            other => panic!("{other:?}"),
        }
    }
    let pids: Vec<u32> = text.lines().map(|line| line.parse().unwrap()).collect();
    let main = call.pid;
    assert!(lives(main) && pids.iter().all(|pid| lives(*pid)));
    assert_eq!(guest.health().await.running_processes, 1);
    drop(call);
    until(|| !lives(main) && !lives(pids[0])).await;
    if guest.has_cgroups() {
        until(|| !lives(pids[1])).await;
    }
    while guest.health().await.running_processes > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn what_is_left_in_the_background_holds_no_call_and_lives_on() {
    let guest = Guest::start().await;
    // The second never pauses.
    for line in [
        "sleep 1000 & echo $!",
        "while :; do echo y; sleep 0.01; done & echo $!",
    ] {
        let finished = guest.sh(line).await;
        assert_eq!(finished.code(), 0);
        let pid: u32 = finished
            .text()
            .lines()
            .find(|line| *line != "y")
            .unwrap()
            .parse()
            .unwrap();
        assert!(lives(pid));
        guest.sh(&format!("kill -9 {pid}")).await;
        until(|| !lives(pid)).await;
    }
}

#[tokio::test]
async fn nothing_is_lost_of_what_was_written_before_the_end() {
    let guest = Guest::start().await;
    // The writer outlives the program by a moment, as in `cmd > >(tee log)`.
    let finished = guest
        .sh("(sleep 0.05; echo late) & head -c 65536 /dev/zero")
        .await;
    assert_eq!(finished.stdout.len(), 65_536 + "late\n".len());

    // A caller who starts to read after the end gets all the same.
    let call = guest
        .exec(sh("head -c 300000 /dev/zero; sleep 1000 &"))
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(call.finish().await.unwrap().stdout.len(), 300_000);
}

#[tokio::test]
async fn a_caller_who_ends_his_side_still_gets_the_result() {
    let guest = Guest::start().await;
    let first = start(with_stdin(sh("cat; echo end")));
    let (requests, mut responses) = guest.send(vec![first]).await.unwrap();
    drop(requests);
    let mut last = None;
    while let Some(response) = responses.message().await.unwrap() {
        last = response.event;
    }
    let Some(Event::Exited(exited)) = last else {
        panic!("{last:?}")
    };
    assert_eq!(exited.status, Some(exited::Status::Code(0)));
}

#[tokio::test]
async fn much_output_takes_little_memory() {
    const BYTES: u64 = 256 << 20;
    let guest = Guest::start().await;
    guest.sh("true").await;
    let mut call = guest
        .exec(sh(&format!("head -c {BYTES} /dev/zero")))
        .await
        .unwrap();
    // The program waits for a caller who does not read.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut bytes = 0;
    loop {
        match call.event().await {
            Event::Stdout(chunk) => {
                assert!(chunk.len() <= 64 * 1024);
                bytes += chunk.len() as u64;
            }
            Event::Exited(_) => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(bytes, BYTES);
    let peak = peak_resident_kib(guest.agent_pid());
    assert!(peak < 32 * 1024, "the agent's peak is {peak} KiB");
}

#[tokio::test]
async fn two_streams_share_the_way() {
    let guest = Guest::start().await;
    let line = "head -c 8388608 /dev/zero & head -c 8388608 /dev/zero >&2; wait";
    let finished = guest.sh(line).await;
    assert_eq!(
        (finished.stdout.len(), finished.stderr.len()),
        (8 << 20, 8 << 20)
    );
}

#[tokio::test]
async fn orphans_are_reaped() {
    let guest = Guest::start().await;
    let finished = guest
        .sh("for i in 1 2 3 4 5; do (sleep 0.05 & echo $!) ; done")
        .await;
    let orphans: Vec<u32> = finished
        .text()
        .lines()
        .map(|line| line.parse().unwrap())
        .collect();
    assert_eq!(orphans.len(), 5);
    // Gone, not zombies.
    until(|| {
        orphans
            .iter()
            .all(|pid| !std::path::Path::new(&format!("/proc/{pid}")).exists())
    })
    .await;
}

#[tokio::test]
async fn many_at_once_end_with_their_own_status() {
    let guest = std::sync::Arc::new(Guest::start().await);
    let calls: Vec<_> = (0..200)
        .map(|index: u32| {
            let guest = std::sync::Arc::clone(&guest);
            tokio::spawn(async move {
                let finished = guest
                    .sh(&format!("echo {index}; exit {}", index % 256))
                    .await;
                assert_eq!(
                    (finished.text().trim(), finished.code()),
                    (index.to_string().as_str(), index)
                );
            })
        })
        .collect();
    for call in calls {
        call.await.unwrap();
    }
    // Their cgroups go as others come and go: one waits for the next.
    while guest.cgroups() > 1 {
        guest.sh("true").await;
    }
    assert_eq!(guest.health().await.running_processes, 0);
}

#[tokio::test]
async fn only_pid_1_configures_and_turns_off() {
    let guest = Guest::start().await;
    let status = guest
        .system()
        .shutdown(ShutdownRequest {})
        .await
        .unwrap_err();
    assert_eq!(reason(&status).0, "NOT_INIT");
    let named = ConfigureRequest {
        hostname: "other".to_owned(),
        ..ConfigureRequest::default()
    };
    assert_eq!(
        reason(&guest.system().configure(named).await.unwrap_err()).0,
        "NOT_INIT"
    );
    let wrong = ConfigureRequest {
        hostname: "a b".to_owned(),
        ..ConfigureRequest::default()
    };
    assert_eq!(
        fields(&guest.system().configure(wrong).await.unwrap_err()),
        ["hostname"]
    );

    let health = guest.health().await;
    assert_eq!(health.agent_version, env!("CARGO_PKG_VERSION"));
    assert!(health.agent_resident_bytes > 0 && health.uptime_us > 0);
}
