//! The real agent behind the daemon. Its programs are this machine's.

use super::*;

pub(super) async fn the_real_agent_is_reached() {
    const MIB: usize = 1 << 20;
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let id = create(&mut client, "real").await.unwrap().sandbox.unwrap().id;
    let sh = |line: &str| {
        let output = host.soulbox(&["exec", "--user", "0:0", "--cwd", "/", &id, "sh", "-c", line]);
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code().unwrap(), output.stdout, told)
    };
    assert_eq!(sh("echo out; echo err >&2; exit 7"), (7, b"out\n".to_vec(), "err\n".to_owned()));
    let (code, stdout, _) = sh("head -c 33554432 /dev/zero");
    assert_eq!((code, stdout.len()), (0, 32 * MIB));
    let missing = host.soulbox(&["exec", "--user", "0:0", &id, "no-such-program"]);
    assert_eq!(missing.status.code(), Some(127));
    let wrong = ProcessSpec::default();
    let wrong = ExecRequest {
        message: Some(exec_request::Message::Start(wrong)),
    };
    let call = client.processes().exec(to(&id, tokio_stream::once(wrong))).await;
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
