//! Sandboxes that live, and calls into them.

use super::*;

pub(super) async fn a_sandbox_lives_and_leaves_nothing() {
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

pub(super) async fn the_command_line_passes_everything_through() {
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

pub(super) async fn output_is_bounded_in_memory() {
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

pub(super) async fn calls_that_nobody_reads_hold_up_no_others() {
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
        let input = ExecRequest {
            message: Some(exec_request::Message::Input(chunk)),
        };
        let input = [start(&["sleep"])]
            .into_iter()
            .chain(std::iter::repeat_n(input, 4));
        let input = tokio_stream::iter(input).chain(tokio_stream::pending());
        let call = client.processes().exec(to(&id, input)).await;
        let mut events = call.unwrap().into_inner();
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

pub(super) async fn a_large_argument_list_passes() {
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let id = make(&mut client).await;
    let argument = "x".repeat(1 << 20);
    let exec_with = async |client: &mut Client, count: usize| {
        let mut argv = vec!["exit", "3"];
        argv.extend(std::iter::repeat_n(argument.as_str(), count));
        run(client, &id, &argv).await
    };
    let (_, status) = exec_with(&mut client, 7).await.unwrap();
    assert_eq!(status, exited::Status::Code(3));
    let refused = exec_with(&mut client, 8).await.unwrap_err();
    assert_eq!(reason(&refused), "INVALID_REQUEST");
    assert_eq!(fields(&refused), ["request"]);
    delete(&mut client, &id, false).await;
}

pub(super) async fn a_caller_that_goes_ends_the_program() {
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
