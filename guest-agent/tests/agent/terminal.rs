//! Programs that have a terminal.

use std::time::Duration;

use soulbox_proto::guest::v1::exec_response::Event;
use soulbox_proto::guest::v1::*;

use crate::common::*;

fn in_terminal(spec: ProcessSpec) -> ProcessSpec {
    ProcessSpec {
        terminal: Some(TerminalSize {
            columns: 100,
            rows: 30,
        }),
        ..spec
    }
}

/// Reads until the terminal has shown `text`, and returns all since the last time.
async fn shown(call: &mut Call, text: &str) -> String {
    let mut all = String::new();
    while !all.contains(text) {
        match call.event().await {
            Event::Stdout(bytes) => all.push_str(&String::from_utf8_lossy(&bytes)),
            other => panic!("{other:?} after {all:?}"),
        }
    }
    all
}

/// What the foreground process group of a process's terminal is called.
fn foreground(pid: u32) -> String {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit_once(") ").map(|(_, fields)| fields);
    // proc(5): tpgid is the sixth from the state.
    let group = fields.and_then(|fields| fields.split(' ').nth(5));
    let name = group.map(|group| std::fs::read_to_string(format!("/proc/{group}/comm")));
    let name = name.and_then(Result::ok).unwrap_or_default();
    name.trim().to_owned()
}

#[tokio::test]
async fn all_three_streams_are_one_terminal_of_its_own() {
    let guest = Guest::start().await;
    let line = "test -t 0 && test -t 1 && test -t 2 && echo yes >&2; tty; stty size; \
                stat -c '%U %a' $(tty); echo $TERM; ps -o pid=,sid=,tpgid= -p $$; echo >/dev/tty";
    let terminal = ProcessSpec {
        user: "daemon".to_owned(),
        ..in_terminal(sh(line))
    };
    let finished = guest.run(terminal).await.unwrap();
    let lines: Vec<_> = finished.text().split("\r\n").collect();
    assert_eq!(lines[0], "yes");
    assert!(lines[1].starts_with("/dev/pts/"), "{lines:?}");
    assert_eq!(lines[2..5], ["30 100", "daemon 620", "xterm-256color"]);
    let ids: Vec<_> = lines[5].split_whitespace().collect();
    assert!(
        ids.len() == 3 && ids.iter().all(|id| id == &ids[0]),
        "{ids:?}"
    );
    assert!(finished.stderr.is_empty());
    assert_eq!(finished.code(), 0);
}

#[tokio::test]
async fn a_shell_is_interactive_and_has_job_control() {
    let guest = Guest::start().await;
    let mut env = in_terminal(spec(&["bash", "--norc", "-i"]));
    env.env.push(variable("PS1", "ready> "));
    let mut call = guest.exec(env).await.unwrap();
    shown(&mut call, "ready> ").await;
    // It echoes what is typed.
    call.stdin("sleep 1000\r").await;
    shown(&mut call, "sleep 1000").await;
    // Ctrl-Z stops the job, Ctrl-C ends it, and the shell stays.
    let shell = call.pid;
    until(|| foreground(shell) == "sleep").await;
    call.stdin("\x1a").await;
    shown(&mut call, "Stopped").await;
    call.stdin("fg\r").await;
    shown(&mut call, "sleep 1000").await;
    until(|| foreground(shell) == "sleep").await;
    call.stdin("\x03").await;
    until(|| foreground(shell) == "bash").await;
    call.stdin("echo status=$?\r").await;
    shown(&mut call, "status=130").await;
    // Ctrl-D is the end of its input.
    call.stdin("\x04").await;
    assert_eq!(call.finish().await.unwrap().code(), 0);
}

#[tokio::test]
async fn a_resize_is_told_to_the_program() {
    let guest = Guest::start().await;
    let line = "trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.01; done";
    let mut call = guest.exec(in_terminal(sh(line))).await.unwrap();
    shown(&mut call, "ready").await;
    let other = guest.attach(call.id).await.unwrap();
    let resize = |columns, rows| process_input::Input::Resize(TerminalSize { columns, rows });
    other.input(resize(65_535, 1)).await;
    let finished = call.finish().await.unwrap();
    assert_eq!(finished.text().trim(), "1 65535");
    assert!(other.finish().await.unwrap().text().contains("1 65535"));

    let call = guest
        .exec(bound(in_terminal(spec(&["sleep", "1000"]))))
        .await
        .unwrap();
    call.input(resize(0, 70_000)).await;
    let status = call.finish().await.unwrap_err();
    assert_eq!(
        fields(&status),
        ["input.resize.columns", "input.resize.rows"]
    );
    let wrong = ProcessSpec {
        terminal: Some(TerminalSize::default()),
        ..spec(&["true"])
    };
    let status = guest.run(wrong).await.unwrap_err();
    assert_eq!(
        fields(&status),
        ["start.terminal.columns", "start.terminal.rows"]
    );
}

#[tokio::test]
async fn closing_stdin_hangs_up() {
    let guest = Guest::start().await;
    let call = guest
        .exec(in_terminal(spec(&["sleep", "1000"])))
        .await
        .unwrap();
    call.stdin_eof().await;
    assert_eq!(call.finish().await.unwrap().signal(), 1);

    // What was said before is told; what reads gets the end.
    let line = "trap '' HUP; echo before; while read line; do :; done; exit 7";
    let mut call = guest.exec(in_terminal(sh(line))).await.unwrap();
    shown(&mut call, "before").await;
    call.stdin_eof().await;
    assert_eq!(call.finish().await.unwrap().code(), 7);
}

#[tokio::test]
async fn a_caller_who_says_nothing_more_or_leaves_does_not_hang_up() {
    let guest = Guest::start().await;
    // Half-closed: it has nothing to type.
    let first = start(in_terminal(sh("sleep 0.2; echo end")));
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

    let mut call = guest.exec(in_terminal(spec(&["cat"]))).await.unwrap();
    call.stdin("typed\r").await;
    shown(&mut call, "typed\r\ntyped\r\n").await;
    let (id, pid) = (call.id, call.pid);
    drop(call);
    while guest.entry(id).await.unwrap().callers > 0 {}
    assert!(lives(pid) && guest.entry(id).await.unwrap().terminal);
    let attached = guest.attach(id).await.unwrap();
    attached.stdin("again\r\x04").await;
    let finished = attached.finish().await.unwrap();
    assert_eq!(
        finished.text(),
        "typed\r\ntyped\r\nagain\r\nagain\r\n",
        "{finished:?}"
    );
    assert_eq!(finished.code(), 0);
}

#[tokio::test]
async fn much_flows_through_a_terminal_both_ways() {
    let guest = Guest::start().await;
    let line = "stty raw -echo; echo ready; head -c 1000000 | wc -c; seq 200000";
    let mut call = guest.exec(in_terminal(sh(line))).await.unwrap();
    shown(&mut call, "ready").await;
    let requests = call.requests();
    let typing = tokio::spawn(async move {
        for _ in 0..10 {
            let chunk = process_input::Input::Stdin(vec![b'x'; 100_000].into());
            requests.send(request(chunk)).await.unwrap();
        }
    });
    let finished = call.finish().await.unwrap();
    typing.await.unwrap();
    let mut lines = finished.text().lines().filter(|line| !line.is_empty());
    assert_eq!(lines.next(), Some("1000000"));
    assert!(lines.eq((1..=200_000).map(|number| number.to_string())));
}

#[tokio::test]
async fn a_time_out_kills_what_a_terminal_stopped() {
    let guest = Guest::start().await;
    let line = "sleep 1000 & echo $!; kill -STOP $!; kill -STOP $$";
    let stopped = with_timeout(in_terminal(sh(line)), Duration::from_millis(300));
    let finished = guest.run(stopped).await.unwrap();
    assert!(finished.exited.timed_out && finished.signal() == 9);
    let child = finished.text().trim().parse().unwrap();
    until(|| !lives(child)).await;
}

#[tokio::test]
async fn a_screen_program_runs() {
    let guest = Guest::start().await;
    let file = guest.folder().join("lines");
    let text: String = (1..=500).map(|line| format!("line {line}\n")).collect();
    std::fs::write(&file, text).unwrap();
    let mut call = guest
        .exec(in_terminal(spec(&["less", file.to_str().unwrap()])))
        .await
        .unwrap();
    shown(&mut call, "line 29").await;
    call.stdin("G").await;
    shown(&mut call, "line 500").await;
    call.stdin("q").await;
    assert_eq!(call.finish().await.unwrap().code(), 0);
}
