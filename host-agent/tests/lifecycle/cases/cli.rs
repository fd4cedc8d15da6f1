//! The command line of a guest's services, at a terminal and elsewhere.

use std::process::{Command, Output};

use serde_json::{Value, json};

use super::*;
use crate::pty::{self, Terminal};

/// A host with one sandbox.
async fn with_sandbox() -> (Host, Daemon, String) {
    let host = host();
    let daemon = host.start();
    let id = make(&mut daemon.sandboxes().await).await;
    (host, daemon, id)
}

pub(super) fn soulbox(host: &Host, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_soulbox"));
    command
        .env("SOULBOX_HOST", format!("unix:{}", host.socket().display()))
        .args(args);
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What it printed, once it has succeeded.
pub(super) fn printed(output: Output) -> String {
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout)
}

fn lines(output: Output) -> Vec<Value> {
    let printed = printed(output);
    let values = printed
        .lines()
        .map(|line| serde_json::from_str(line).unwrap());
    values.collect()
}

pub(super) fn signal(child: &std::process::Child, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(child.id().try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

pub(super) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(super) async fn a_terminal_is_the_programs() {
    let (host, _daemon, id) = with_sandbox().await;
    let terminal = Terminal::new(101, 37);
    let mut command = soulbox(&host, &["exec", "-it", &id, "terminal"]);
    let child = terminal.spawn(command.env("TERM", "xterm-test"));
    terminal.wait_for("size 101x37 TERM=xterm-test\r\n");
    // Keys that would make signals are bytes, and none is echoed.
    wait_for("it echoes", || {
        let modes = terminal.settings().local_modes;
        !modes.contains(rustix::termios::LocalModes::ECHO)
    });
    terminal.press(b"\x03");
    terminal.wait_for("keys b\"\\x03\"\r\n");
    terminal.press(b"\x1a");
    terminal.wait_for("keys b\"\\x1a\"\r\n");
    terminal.press("ä\r".as_bytes());
    terminal.wait_for("keys b\"\\xc3\\xa4\\r\"");
    terminal.resize(80, 25);
    signal(&child, rustix::process::Signal::WINCH);
    terminal.wait_for("size 80x25\r\n");
    terminal.press(b"q");
    assert_eq!(pty::ended(child).code(), Some(7));
    assert!(!terminal.shown().contains('ä'), "{:?}", terminal.shown());

    // A terminal without its keys; and none at all.
    let output = host.soulbox(&["exec", "--env", "TERM=x", "-t", &id, "terminal", "once"]);
    assert_eq!(output.status.code(), Some(9), "{}", text(&output.stderr));
    assert!(text(&output.stdout).starts_with("size 80x24 TERM=x\r\n"));
    let output = host.soulbox(&["exec", "-it", &id, "terminal"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(text(&output.stderr).contains("no terminal"));
}

pub(super) async fn a_terminal_is_as_it_was_afterwards() {
    let (host, mut daemon, id) = with_sandbox().await;
    let terminal = Terminal::new(80, 24);
    let before = terminal.settings();
    let is_raw = || terminal.settings().local_modes != before.local_modes;
    let is_back = || {
        let now = terminal.settings();
        (now.local_modes, now.input_modes, now.output_modes)
            == (before.local_modes, before.input_modes, before.output_modes)
    };
    let start = || {
        let child = terminal.spawn(&mut soulbox(&host, &["exec", "-it", &id, "terminal"]));
        wait_for("it is not raw", is_raw);
        child
    };
    for (number, code) in [
        (rustix::process::Signal::TERM, 128 + 15),
        (rustix::process::Signal::HUP, 128 + 1),
        (rustix::process::Signal::QUIT, 128 + 3),
        (rustix::process::Signal::INT, 128 + 2),
    ] {
        let child = start();
        signal(&child, number);
        assert_eq!(pty::ended(child).code(), Some(code), "{number:?}");
        assert!(is_back(), "{number:?}");
    }
    // The daemon goes away in the middle.
    let child = start();
    daemon.kill();
    assert_eq!(pty::ended(child).code(), Some(125));
    assert!(is_back());
}

pub(super) async fn a_program_is_left_listed_attached_to_and_killed() {
    let (host, _daemon, id) = with_sandbox().await;
    let id = id.as_str();
    let started =
        printed(host.soulbox(&["exec", "-d", "--tag", "mine", id, "daemon", "a\x1b[2Jb"]));
    let program = started.trim();
    assert_eq!(program, "41");
    let listed = printed(host.soulbox(&["ps", id]));
    for expected in ["41", "running", "mine", "daemon a [2Jb"] {
        assert!(listed.contains(expected), "{listed}");
    }
    let listed: Value =
        serde_json::from_str(&printed(host.soulbox(&["--json", "ps", id]))).unwrap();
    assert_eq!(listed[0]["argv"], json!(["daemon", "a\x1b[2Jb"]));
    assert_eq!(listed[0]["exited"], Value::Null);

    // Leaving is not killing.
    let attach = || {
        let mut command = soulbox(&host, &["attach", id, program]);
        command.stdin(std::process::Stdio::null());
        command.stdout(std::process::Stdio::piped());
        command.stderr(std::process::Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut kept = [0; 5];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut kept).unwrap();
        assert_eq!(&kept, b"kept\n");
        child
    };
    let left = attach();
    signal(&left, rustix::process::Signal::INT);
    assert_eq!(pty::ended(left).code(), Some(130));
    assert!(printed(host.soulbox(&["ps", id])).contains("running"));

    let attached = attach();
    printed(host.soulbox(&["kill", "-s", "INT", "--tree", id, program]));
    let output = attached.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(128 + 15));
    assert!(text(&output.stderr).contains("3 bytes of output are missing"));
    let log = fs::read_to_string(vmm_log(&host, id)).unwrap();
    assert!(log.contains("signal: \"INT\", whole_tree: true"), "{log}");
    let again = host.soulbox(&["kill", id, program]);
    assert!(text(&again.stderr).contains("had ended"));
    assert!(printed(host.soulbox(&["ps", id])).contains("killed by 15"));
    let unknown = host.soulbox(&["attach", id, "1"]);
    assert_eq!(unknown.status.code(), Some(125));
    let nowhere = host.soulbox(&["ps", "sb\u{7f}"]);
    assert!(text(&nowhere.stderr).contains("no sandbox's id"));
}

pub(super) async fn code_is_run_and_its_results_kept() {
    let (host, _daemon, id) = with_sandbox().await;
    let id = id.as_str();
    let saved = host.path("saved");
    let ran = host.soulbox(&[
        "code",
        "run",
        id,
        "--save-dir",
        saved.to_str().unwrap(),
        "1 + 1",
    ]);
    assert_eq!(printed(ran), "ran 1 + 1\n2\n");
    assert_eq!(fs::read(saved.join("result-1.png")).unwrap(), b"\x89PNG");
    let events = lines(host.soulbox(&["--json", "code", "run", id, "x"]));
    let kinds: Vec<_> = events
        .iter()
        .map(|event| event["event"].as_str().unwrap())
        .collect();
    assert_eq!(kinds, ["started", "stdout", "result", "finished"]);
    assert_eq!(events[2]["data"]["image/png"], "iVBORw==");

    let mut piped = soulbox(&host, &["code", "run", id, "-"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut piped.stdin.take().unwrap(), b"y").unwrap();
    assert_eq!(printed(piped.wait_with_output().unwrap()), "ran y\n2\n");

    let failed = host.soulbox(&["code", "run", "--language", "bash", id, "fail"]);
    assert_eq!(failed.status.code(), Some(1));
    assert_eq!(
        text(&failed.stderr),
        "warned\nTraceback\nZeroDivisionError\n"
    );

    // Ctrl-C interrupts the code.
    let mut waiting = soulbox(&host, &["--json", "code", "run", id, "wait"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut started = String::new();
    BufReader::new(waiting.stdout.as_mut().unwrap())
        .read_line(&mut started)
        .unwrap();
    signal(&waiting, rustix::process::Signal::INT);
    assert_eq!(pty::ended(waiting).code(), Some(130));

    let made = printed(host.soulbox(&["code", "new", id, "--language", "javascript"]));
    assert_eq!(made, "abcd1234\n");
    let listed = printed(host.soulbox(&["code", "contexts", id]));
    assert!(
        listed.contains("python") && listed.contains("/home/ [2J"),
        "{listed}"
    );
    // Only those that the template has are known to this agent.
    assert!(
        !host
            .soulbox(&["code", "restart", id, "none"])
            .status
            .success()
    );
}

pub(super) async fn files_are_listed_written_and_found() {
    let (host, _daemon, id) = with_sandbox().await;
    let id = id.as_str();
    let listed = printed(host.soulbox(&["fs", "ls", id, "folder"]));
    assert!(
        listed.contains("-rw-r--r--") && listed.contains("b [31m"),
        "{listed}"
    );
    let listed: Value =
        serde_json::from_str(&printed(host.soulbox(&["fs", "ls", "--json", id]))).unwrap();
    assert_eq!(listed.as_array().unwrap().len(), 2);
    assert_eq!(printed(host.soulbox(&["fs", "cat", id, "a"])), "onetwo");
    let mut writing = soulbox(&host, &["fs", "write", "--append", id, "a"])
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let bytes = vec![b'x'; 3 << 20];
    std::io::Write::write_all(&mut writing.stdin.take().unwrap(), &bytes).unwrap();
    assert!(pty::ended(writing).success());
    let log = fs::read_to_string(vmm_log(&host, id)).unwrap();
    let whole = format!("written: {}, whole: true", bytes.len());
    assert!(
        log.contains("open: Append") && log.contains(&whole),
        "{log}"
    );
    let found = printed(host.soulbox(&["fs", "find", id, "--grep", "fn", "src"]));
    assert_eq!(found, "src/a.rs:3:fn a() {}\n");
    let mut watching = soulbox(&host, &["fs", "watch", id, "-r", "."])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut event = String::new();
    BufReader::new(watching.stdout.as_mut().unwrap())
        .read_line(&mut event)
        .unwrap();
    watching.kill().unwrap();
    watching.wait().unwrap();
    assert_eq!(event, "renamed    old -> new\n");
    let missing = host.soulbox(&["fs", "stat", id, "none"]);
    assert_eq!(missing.status.code(), Some(1));
    assert_eq!(text(&missing.stderr), "soulbox: there is no such file\n");
}

pub(super) async fn what_goes_on_is_shown() {
    let (host, _daemon, id) = with_sandbox().await;
    let page = printed(host.soulbox(&["top", "--once", &id]));
    assert!(
        page.contains("2 CPUs") && page.contains("/sbin/init ]0;x"),
        "{page}"
    );
    let [metrics] = &lines(host.soulbox(&["top", "--once", "--json", &id]))[..] else {
        panic!("not one line");
    };
    assert_eq!(metrics["uptime_us"], 5_000_000);
    // In a terminal each page is drawn over the one before.
    let terminal = Terminal::new(80, 24);
    let mut child = terminal.spawn(&mut soulbox(&host, &["top", "--interval", "10ms", &id]));
    terminal.wait_for("\x1b[Hup 5s");
    wait_for("it is drawn once", || {
        terminal.shown().matches("\x1b[H").count() > 2
    });
    child.kill().unwrap();
    child.wait().unwrap();
}
