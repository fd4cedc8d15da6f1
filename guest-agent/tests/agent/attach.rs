//! Programs and their callers: who reads what, who is waited for, what is kept.

use std::time::Duration;

use soulbox_proto::guest::v1::exec_response::Event;
use soulbox_proto::guest::v1::*;
use tonic::Code;

use crate::common::*;

const MIB: u64 = 1 << 20;

fn with_stdin(spec: ProcessSpec) -> ProcessSpec {
    ProcessSpec {
        stdin: true,
        ..spec
    }
}

fn keeping(spec: ProcessSpec, bytes: u32) -> ProcessSpec {
    ProcessSpec {
        keep_output_bytes: bytes,
        ..spec
    }
}

/// Waits until a program is told to have ended.
async fn ended(guest: &Guest, id: u64) -> Exited {
    loop {
        let entry = guest.entry(id).await;
        if let Some(exited) = entry.and_then(|entry| entry.exited) {
            return exited;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_program_outlives_its_caller_and_is_found_again() {
    let guest = Guest::start().await;
    let call = guest
        .exec(with_stdin(sh(
            "echo before; read line; echo got $line; exit 3",
        )))
        .await
        .unwrap();
    let (id, pid) = (call.id, call.pid);
    drop(call);
    let mut entry = guest.entry(id).await.unwrap();
    while entry.callers > 0 {
        entry = guest.entry(id).await.unwrap();
    }
    assert!(entry.exited.is_none() && entry.pid == pid && lives(pid));
    assert_eq!(guest.health().await.running_processes, 1);

    // Its stdin is still open, for whoever comes.
    let mut attached = guest.attach(id).await.unwrap();
    assert_eq!(attached.event().await, Event::Stdout("before\n".into()));
    assert_eq!(guest.entry(id).await.unwrap().callers, 1);
    attached.stdin("line\n").await;
    let finished = attached.finish().await.unwrap();
    assert_eq!((finished.text(), finished.code()), ("got line\n", 3));
    assert_eq!(guest.health().await.running_processes, 0);

    // It has ended, and is still known.
    let late = guest.attach(id).await.unwrap().finish().await.unwrap();
    assert_eq!((late.text(), late.code()), ("before\ngot line\n", 3));
    let only_new = AttachProcess {
        id,
        skip_kept_output: true,
    };
    let late = guest.attach_as(only_new).await.unwrap();
    let late = late.finish().await.unwrap();
    assert_eq!((late.text(), late.dropped, late.code()), ("", 0, 3));
}

#[tokio::test]
async fn several_callers_hear_the_same_and_may_all_speak() {
    let guest = Guest::start().await;
    let mut call = guest.exec(with_stdin(spec(&["cat"]))).await.unwrap();
    call.stdin("one\n").await;
    assert_eq!(call.event().await, Event::Stdout("one\n".into()));
    let mut first = guest.attach(call.id).await.unwrap();
    let second = guest.attach(call.id).await.unwrap();
    assert_eq!(first.event().await, Event::Stdout("one\n".into()));
    first.stdin("two\n").await;
    assert_eq!(first.event().await, Event::Stdout("two\n".into()));
    assert_eq!(guest.entry(call.id).await.unwrap().callers, 3);
    // One that leaves closes nothing.
    drop(first);
    while guest.entry(call.id).await.unwrap().callers > 2 {}
    call.stdin("three\n").await;
    let eof = process_input::Input::StdinEof(StdinEof {});
    second.input(eof).await;
    let finished = second.finish().await.unwrap();
    assert_eq!((finished.text(), finished.code()), ("one\ntwo\nthree\n", 0));
    assert_eq!(call.finish().await.unwrap().text(), "two\nthree\n");
}

#[tokio::test]
async fn a_caller_who_sends_what_cannot_be_is_refused_alone() {
    let guest = Guest::start().await;
    let call = guest.exec(spec(&["sleep", "1000"])).await.unwrap();
    for (input, field) in [
        (process_input::Input::Stdin("x".into()), "input.stdin"),
        (process_input::Input::Signal(65), "input.signal"),
        (
            process_input::Input::Resize(TerminalSize {
                columns: 80,
                rows: 24,
            }),
            "input.resize",
        ),
    ] {
        let attached = guest.attach(call.id).await.unwrap();
        attached.input(input).await;
        assert_eq!(fields(&attached.finish().await.unwrap_err()), [field]);
    }
    assert!(lives(call.pid));
    assert!(guest.signal(call.id, "SIGTERM", false).await.unwrap());
    assert_eq!(call.finish().await.unwrap().signal(), 15);

    let status = guest.attach(1).await.map(drop).unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert_eq!(reason(&status).0, "PROCESS_NOT_FOUND");
    let status = guest.signal(1, "TERM", false).await.unwrap_err();
    assert_eq!(reason(&status).0, "PROCESS_NOT_FOUND");
    let status = guest.signal(1, "TERMINATE", false).await.unwrap_err();
    assert_eq!(fields(&status), ["signal"]);
}

#[tokio::test]
async fn what_nobody_reads_is_dropped_and_counted() {
    const BYTES: u64 = 10 * 1024 * MIB;
    let guest = Guest::start().await;
    guest.sh("true").await;
    let line = format!("head -c {BYTES} /dev/zero; printf end");
    let call = guest.exec(keeping(sh(&line), 100_000)).await.unwrap();
    let id = call.id;
    drop(call);
    assert_eq!(
        ended(&guest, id).await.status,
        Some(exited::Status::Code(0))
    );
    assert_eq!(guest.entry(id).await.unwrap().output_bytes, BYTES + 3);
    let late = guest.attach(id).await.unwrap().finish().await.unwrap();
    assert_eq!(
        (late.dropped, late.stdout.len()),
        (BYTES + 3 - 100_000, 100_000)
    );
    assert!(late.stdout.ends_with(b"\0end"));
    let peak = peak_resident_kib(guest.agent_pid());
    assert!(peak < 32 * 1024, "the agent's peak is {peak} KiB");
}

#[tokio::test]
async fn only_execs_caller_is_waited_for() {
    let guest = Guest::start().await;
    let line = format!("head -c {} /dev/zero", 64 * MIB);
    let call = guest.exec(sh(&line)).await.unwrap();
    let (id, pid) = (call.id, call.pid);
    // This one never reads; it holds up nobody.
    let slow = guest.attach(id).await.unwrap();
    // The first one does not read for a while, and is waited for.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let entry = guest.entry(id).await.unwrap();
    assert!(entry.exited.is_none() && entry.output_bytes < 4 * MIB && lives(pid));
    let finished = call.finish().await.unwrap();
    assert_eq!(
        (finished.stdout.len() as u64, finished.dropped),
        (64 * MIB, 0)
    );

    let slow = slow.finish().await.unwrap();
    assert!(slow.dropped > 0);
    assert_eq!(slow.dropped + slow.stdout.len() as u64, 64 * MIB);
    let peak = peak_resident_kib(guest.agent_pid());
    assert!(peak < 32 * 1024, "the agent's peak is {peak} KiB");
}

#[tokio::test]
async fn a_program_that_waited_for_a_caller_goes_on_without_him() {
    let guest = Guest::start().await;
    let line = format!("head -c {} /dev/zero; echo end >&2", 64 * MIB);
    let call = guest.exec(sh(&line)).await.unwrap();
    let id = call.id;
    tokio::time::sleep(Duration::from_millis(100)).await;
    drop(call);
    ended(&guest, id).await;
    let late = guest.attach(id).await.unwrap().finish().await.unwrap();
    assert_eq!(late.stderr, b"end\n");
    assert!(late.stdout.len() <= 64 * 1024 && late.dropped > 0);
}

#[tokio::test]
async fn the_list_tells_what_was_started_in_order() {
    let guest = Guest::start().await;
    let before = std::time::SystemTime::now();
    let tagged = ProcessSpec {
        tag: "build".to_owned(),
        cwd: "/tmp".into(),
        user: "4242".to_owned(),
        ..spec(&["sleep", "1000"])
    };
    let running = guest.exec(tagged).await.unwrap();
    let line = ProcessSpec {
        shell_line: "exit $((2+3)) # a line".into(),
        user: "root".to_owned(),
        ..ProcessSpec::default()
    };
    assert_eq!(guest.run(line).await.unwrap().code(), 5);
    let long = "x".repeat(100_000);
    guest.run(spec(&["true", &long, "y"])).await.unwrap();

    let list = guest.programs().await;
    assert_eq!(list.len(), 3);
    let first = &list[0];
    assert_eq!((first.id, first.pid), (running.id, running.pid));
    assert_eq!(first.argv, ["sleep", "1000"]);
    assert_eq!(
        (&first.cwd[..], first.user.as_str()),
        (&b"/tmp"[..], "4242")
    );
    assert!(first.tag == "build" && !first.terminal && first.exited.is_none());
    let started = std::time::SystemTime::try_from(first.start_time.unwrap()).unwrap();
    assert!(before <= started && started <= std::time::SystemTime::now());
    assert_eq!(list[1].argv.len(), 3);
    assert_eq!(&list[1].argv[1..], ["-c", "exit $((2+3)) # a line"]);
    assert_eq!(
        list[1].exited.unwrap().status,
        Some(exited::Status::Code(5))
    );
    // Long arguments are cut.
    assert_eq!(list[2].argv.len(), 2);
    assert!(list[2].argv[1].len() <= 1024);
    let mut ids: Vec<_> = list.iter().map(|entry| entry.id).collect();
    ids.sort_unstable();
    ids.dedup();
    assert!(ids.len() == 3 && ids[0] > 0);
}

#[tokio::test]
async fn the_last_that_ended_are_known_and_little_is_kept_of_them() {
    let guest = Guest::start().await;
    let mut ids = Vec::new();
    for _ in 0..70 {
        let call = guest
            .exec(keeping(sh("head -c 1048576 /dev/zero"), 16 << 20))
            .await
            .unwrap();
        ids.push(call.id);
        assert_eq!(call.finish().await.unwrap().stdout.len(), 1 << 20);
    }
    let list = guest.programs().await;
    let known: Vec<_> = list.iter().map(|entry| entry.id).collect();
    assert_eq!(known, ids[6..]);
    let status = guest.attach(ids[0]).await.map(drop).unwrap_err();
    assert_eq!(reason(&status).0, "PROCESS_NOT_FOUND");
    // Output is kept of the last ones, status of all.
    let kept = async |id| guest.attach(id).await.unwrap().finish().await.unwrap();
    let last = kept(ids[69]).await;
    assert_eq!(
        (last.stdout.len(), last.dropped, last.code()),
        (1 << 20, 0, 0)
    );
    let first = kept(ids[6]).await;
    assert_eq!(
        (first.stdout.len(), first.dropped, first.code()),
        (0, MIB, 0)
    );
    let peak = peak_resident_kib(guest.agent_pid());
    assert!(peak < 24 * 1024, "the agent's peak is {peak} KiB");
    assert!(guest.health().await.agent_resident_bytes < 16 * MIB);
}

#[tokio::test]
async fn what_is_left_in_the_background_may_speak_on() {
    let guest = Guest::start().await;
    // Would be killed by SIGPIPE at its next word.
    let line = "(while :; do echo word; sleep 0.01; done) & echo pid $!";
    let call = guest.exec(sh(line)).await.unwrap();
    let id = call.id;
    let finished = call.finish().await.unwrap();
    let pid = finished
        .text()
        .lines()
        .find_map(|line| line.strip_prefix("pid "));
    let pid: u32 = pid.unwrap().parse().unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(lives(pid));
    // What it says is nobody's any more.
    let kept = guest.attach(id).await.unwrap().finish().await.unwrap();
    assert_eq!(kept.stdout, finished.stdout);
    if guest.has_cgroups() {
        // It can still be ended by way of what started it.
        assert!(!guest.signal(id, "TERM", false).await.unwrap());
        assert!(guest.signal(id, "TERM", true).await.unwrap());
        until(|| !lives(pid)).await;
        assert!(!guest.signal(id, "KILL", true).await.unwrap());
    } else {
        guest.sh(&format!("kill -9 {pid}")).await;
        until(|| !lives(pid)).await;
    }
}

#[tokio::test]
async fn signals_go_to_the_group_or_to_all() {
    let guest = Guest::start().await;
    // A child in a session of its own hears only what all hear.
    let child = "trap \"echo child; exit\" USR1; echo ready; while :; do sleep 0.01; done";
    let line =
        format!("setsid sh -c '{child}' & trap 'echo parent' USR1; while :; do sleep 0.01; done");
    // The shell tells of its child's end by a signal, too.
    let line = format!("exec 2>/dev/null; {line}");
    let mut call = guest.exec(sh(&line)).await.unwrap();
    assert_eq!(call.event().await, Event::Stdout("ready\n".into()));
    assert!(guest.signal(call.id, "USR1", false).await.unwrap());
    assert_eq!(call.event().await, Event::Stdout("parent\n".into()));
    if guest.has_cgroups() {
        assert!(guest.signal(call.id, "usr1", true).await.unwrap());
        let mut heard = String::new();
        while heard.lines().count() < 2 {
            match call.event().await {
                Event::Stdout(bytes) => heard.push_str(std::str::from_utf8(&bytes).unwrap()),
                other => panic!("{other:?}"),
            }
        }
        let mut heard: Vec<_> = heard.lines().collect();
        heard.sort_unstable();
        assert_eq!(heard, ["child", "parent"]);
    }
    let id = call.id;
    assert!(guest.signal(id, "9", false).await.unwrap());
    assert_eq!(call.finish().await.unwrap().signal(), 9);
    assert!(!guest.signal(id, "9", false).await.unwrap());
}

#[tokio::test]
async fn silent_programs_and_callers_wake_nobody() {
    let guest = Guest::start().await;
    let call = guest.exec(spec(&["sleep", "1000"])).await.unwrap();
    let _attached = guest.attach(call.id).await.unwrap();
    let _terminal = guest
        .exec(ProcessSpec {
            terminal: Some(TerminalSize {
                columns: 80,
                rows: 24,
            }),
            ..spec(&["sleep", "1000"])
        })
        .await
        .unwrap();
    let pid = guest.agent_pid();
    let sleeps = || {
        let status = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/status"));
        let status = status.unwrap();
        let lines = status.lines();
        let lines = lines.filter(|line| line.contains("ctxt_switches"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    // What the calls themselves caused is over when it has slept for a while.
    let mut before = sleeps();
    loop {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let now = sleeps();
        if now == before {
            break;
        }
        before = now;
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(sleeps(), before);
}

#[tokio::test]
async fn nice_and_shell_lines_are_taken() {
    let guest = Guest::start().await;
    for nice in [-5, 7] {
        let line = ProcessSpec {
            shell_line: "nice".into(),
            user: "4242".to_owned(),
            nice,
            ..ProcessSpec::default()
        };
        let finished = guest.run(line).await.unwrap();
        assert_eq!(finished.text().trim(), nice.to_string());
    }
    let wrong = ProcessSpec {
        nice: 20,
        shell_line: "true".into(),
        ..spec(&["true"])
    };
    let status = guest.run(wrong).await.unwrap_err();
    assert_eq!(fields(&status), ["start.shell_line", "start.nice"]);
}

#[tokio::test]
async fn metrics_are_those_of_the_machine() {
    use soulbox_proto::guest::v1::metrics_service_client::MetricsServiceClient;

    let guest = Guest::start().await;
    let busy = guest.exec(bound(sh("while :; do :; done"))).await.unwrap();
    let mut client = MetricsServiceClient::new(guest.connection().await);
    let told = loop {
        let request = GetMetricsRequest { processes: 1000 };
        let metrics = client.get_metrics(request).await.unwrap().into_inner();
        let process = metrics.processes.iter().find(|p| p.pid == busy.pid);
        if let Some(process) = process.filter(|process| process.cpu_us > 0) {
            let process = process.clone();
            break (metrics, process);
        }
    };
    let (metrics, process) = told;
    assert_eq!(process.parent_pid, guest.agent_pid());
    assert_eq!(
        process.command_line,
        "sh\0-c\0while :; do :; done".as_bytes()
    );
    assert_eq!((process.user.as_str(), process.threads), ("root", 1));
    assert!(metrics.cpus > 0 && metrics.running_processes > 0);
    assert!(metrics.total_processes as usize >= metrics.processes.len());
    let few = GetMetricsRequest { processes: 3 };
    let few = client.get_metrics(few).await.unwrap().into_inner();
    assert_eq!(few.processes.len(), 3);
    let many = GetMetricsRequest { processes: 1001 };
    let status = client.get_metrics(many).await.unwrap_err();
    assert_eq!(fields(&status), ["processes"]);
}
