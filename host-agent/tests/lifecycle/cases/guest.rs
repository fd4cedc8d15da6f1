//! The real agent behind the daemon. Its programs are this machine's.

use std::process::Child;

use super::*;
use crate::pty::{self, Terminal};

pub(super) async fn the_real_agent_is_reached() {
    const MIB: usize = 1 << 20;
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let id = create(&mut client, "real")
        .await
        .unwrap()
        .sandbox
        .unwrap()
        .id;
    let sh = |line: &str| {
        let output = host.soulbox(&["exec", "--user", "0:0", "--cwd", "/", &id, "sh", "-c", line]);
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code().unwrap(), output.stdout, told)
    };
    assert_eq!(
        sh("echo out; echo err >&2; exit 7"),
        (7, b"out\n".to_vec(), "err\n".to_owned())
    );
    let (code, stdout, _) = sh("head -c 33554432 /dev/zero");
    assert_eq!((code, stdout.len()), (0, 32 * MIB));
    let missing = host.soulbox(&["exec", "--user", "0:0", &id, "no-such-program"]);
    assert_eq!(missing.status.code(), Some(127));
    let wrong = ProcessSpec::default();
    let wrong = ExecRequest {
        message: Some(exec_request::Message::Start(wrong)),
    };
    let call = client
        .processes()
        .exec(to(&id, tokio_stream::once(wrong)))
        .await;
    let refused = call.unwrap_err();
    assert_eq!(reason(&refused), "INVALID_REQUEST");
    assert_eq!(fields(&refused), ["start.argv"]);
    // Both ways at once, and more than all windows hold.
    let mut echo = std::process::Command::new(env!("CARGO_BIN_EXE_soulbox"))
        .env("SOULBOX_HOST", format!("unix:{}", host.socket().display()))
        .args(["exec", "-i", "--user", "0:0", "--cwd", "/", &id, "cat"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let sent: Vec<u8> = (0..8 * MIB).map(|at| (at / 251) as u8).collect();
    let (mut stdin, bytes) = (echo.stdin.take().unwrap(), sent.clone());
    let sending = std::thread::spawn(move || std::io::Write::write_all(&mut stdin, &bytes));
    let echoed = echo.wait_with_output().unwrap();
    sending.join().unwrap().unwrap();
    assert!(echoed.status.success() && echoed.stdout == sent);
    delete(&mut client, &id, true).await;
    host.assert_nothing_left();
}

/// A program of this machine with these arguments, if there is one.
fn process_with(args: &str) -> bool {
    let args = args.replace(' ', "\0") + "\0";
    fs::read_dir("/proc").unwrap().flatten().any(|entry| {
        fs::read(entry.path().join("cmdline")).is_ok_and(|line| line == args.as_bytes())
    })
}

/// A pager and an editor, which have the whole screen, at a terminal with a shell.
fn screens(terminal: &Terminal, child: &Child) {
    // Terminfo's smcup and rmcup of xterm: the other screen, and back.
    let (enter, leave) = ("\x1b[?1049h", "\x1b[?1049l");
    let type_line = |line: &str| terminal.press(format!("{line}\r").as_bytes());
    let start = |line: &str| {
        terminal.clear();
        type_line(line);
        terminal.wait_for(enter);
    };
    start("seq -f 'line %g.' 1000 | less");
    terminal.wait_for("line 24.");
    terminal.press(b"G");
    terminal.wait_for("line 1000.");
    terminal.press(b"?^line 5.0\\.\r");
    // What it found is shown in reverse (smso).
    terminal.wait_for("\x1b[7mline 590.");
    terminal.press(b"q");
    terminal.wait_for(leave);

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("note");
    start(&format!("vim.tiny {}", file.display()));
    terminal.press("iwritten in vi: äöü".as_bytes());
    terminal.press(b"\x1b");
    terminal.resize(66, 22);
    cli::signal(child, rustix::process::Signal::WINCH);
    // It says so in its last line once it has heard of the size.
    cli::wait_for("it has not heard of the size", || {
        terminal.clear();
        type_line(":set columns? lines?");
        std::thread::sleep(Duration::from_millis(100));
        let shown = terminal.shown();
        shown.contains("columns=66") && shown.contains("lines=22")
    });
    // The list of two takes a key more.
    terminal.press(b"\r");
    type_line(":wq");
    terminal.wait_for(leave);
    let written = fs::read_to_string(&file).unwrap();
    assert_eq!(written, "written in vi: äöü\n");
}

pub(super) async fn the_real_agent_has_terminals() {
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let id = create(&mut client, "real")
        .await
        .unwrap()
        .sandbox
        .unwrap()
        .id;
    let terminal = Terminal::new(101, 37);
    let shell = [
        "--user",
        "0:0",
        "--cwd",
        "/",
        &id,
        "bash",
        "--norc",
        "--noprofile",
        "-i",
    ];
    let mut command = cli::soulbox(&host, &[&["exec", "-it"], &shell[..]].concat());
    let child = terminal.spawn(command.env("TERM", "xterm-256color"));
    let type_line = |line: &str| terminal.press(format!("{line}\r").as_bytes());
    type_line("stty size; echo $TERM-$((40+2))");
    terminal.wait_for("37 101\r\n");
    terminal.wait_for("xterm-256color-42\r\n");
    terminal.resize(80, 25);
    cli::signal(&child, rustix::process::Signal::WINCH);
    // The size is there some time after the signal.
    type_line("until [ \"$(stty size)\" = '25 80' ]; do :; done; echo sized-$((1+1))");
    terminal.wait_for("sized-2\r\n");
    // Ctrl-C is the program's, and so is Ctrl-Z.
    type_line("sleep 87654.1");
    cli::wait_for("nothing sleeps", || process_with("sleep 87654.1"));
    terminal.press(b"\x03");
    type_line("echo interrupted-$?");
    terminal.wait_for("interrupted-130\r\n");
    type_line("sleep 87654.2");
    cli::wait_for("nothing sleeps", || process_with("sleep 87654.2"));
    terminal.press(b"\x1a");
    terminal.wait_for("Stopped");
    type_line("kill -9 %1; wait; echo jobs-$((3+4))");
    terminal.wait_for("jobs-7\r\n");
    screens(&terminal, &child);
    type_line("exit 5");
    assert_eq!(pty::ended(child).code(), Some(5));

    // Left alone, and found again.
    let detached = host.soulbox(&[&["exec", "-dit", "--tag", "kept"], &shell[..]].concat());
    assert!(detached.status.success(), "{detached:?}");
    let program = String::from_utf8(detached.stdout).unwrap();
    let program = program.trim();
    let terminal = Terminal::new(90, 30);
    let child = terminal.spawn(&mut cli::soulbox(&host, &["attach", "-i", &id, program]));
    terminal.press(b"echo found-$((5+5)); stty size\r");
    terminal.wait_for("found-10\r\n");
    terminal.wait_for("30 90\r\n");
    let listed = cli::printed(host.soulbox(&["ps", &id]));
    assert!(
        listed.contains("kept") && listed.contains("running"),
        "{listed}"
    );
    cli::printed(host.soulbox(&["kill", "-s", "KILL", &id, program]));
    assert_eq!(pty::ended(child).code(), Some(137));

    // A caller that is killed takes its program along.
    let sleep = [
        "exec", "--user", "0:0", "--cwd", "/", &id, "sleep", "87654.3",
    ];
    let mut child = cli::soulbox(&host, &sleep).spawn().unwrap();
    cli::wait_for("nothing sleeps", || process_with("sleep 87654.3"));
    child.kill().unwrap();
    child.wait().unwrap();
    cli::wait_for("it sleeps on", || !process_with("sleep 87654.3"));

    let page = cli::printed(host.soulbox(&["top", "--once", &id]));
    assert!(
        page.contains("cpu: user") && page.contains("memory:"),
        "{page}"
    );
    delete(&mut client, &id, true).await;
    host.assert_nothing_left();
}
