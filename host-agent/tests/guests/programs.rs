//! What programs in a guest see and do.

use std::io::{Read as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};

use super::{eventually, sh, shared, soulbox, status_kib, succeed};

pub(crate) fn python_and_node_run() -> Result<()> {
    let s = shared();
    let python = s
        .host
        .soulbox(&["exec", &s.id, "--", "python3", "-c", "print(6*7)"]);
    assert_eq!(succeed(python)?, "42\n");
    let node = s.host.soulbox(&[
        "exec",
        &s.id,
        "--",
        "node",
        "-e",
        "console.log([1, 2].map(x => x * 21))",
    ]);
    assert_eq!(succeed(node)?, "[ 21, 42 ]\n");
    Ok(())
}

pub(crate) fn exit_codes_are_the_programs() -> Result<()> {
    let s = shared();
    for (line, code) in [
        ("exit 0", 0),
        ("exit 42", 42),
        ("kill -9 $$", 137),
        ("kill -TERM $$", 143),
    ] {
        assert_eq!(sh(&s.host, &s.id, line).status.code(), Some(code), "{line}");
    }
    let late = s
        .host
        .soulbox(&["exec", "--timeout", "1s", &s.id, "--", "sleep", "1000"]);
    assert_eq!(late.status.code(), Some(124));
    let left = sh(&s.host, &s.id, "pgrep -x sleep");
    assert_eq!(left.status.code(), Some(1), "sleep is still running");
    Ok(())
}

pub(crate) fn programs_that_cannot_start() -> Result<()> {
    let s = shared();
    for (args, code, says) in [
        (&["--", "no-such-program"][..], 127, "no-such-program"),
        (&["--", "/etc/passwd"], 126, "/etc/passwd"),
        (
            &["--cwd", "/no/such/folder", "--", "true"],
            126,
            "/no/such/folder",
        ),
        (&["--user", "nobody-here", "--", "true"], 126, "nobody-here"),
    ] {
        let output = s.host.soulbox(&[&["exec", &s.id][..], args].concat());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        assert!(stderr.contains(says), "{stderr}");
    }
    let nowhere = s
        .host
        .soulbox(&["exec", "sb-aaaaaaaaaaaaaaaaaaaa", "--", "true"]);
    assert_eq!(nowhere.status.code(), Some(125));
    Ok(())
}

pub(crate) fn streams_are_apart_and_stdin_ends() -> Result<()> {
    let s = shared();
    let output = sh(&s.host, &s.id, "echo out; echo err >&2");
    assert_eq!(
        (&output.stdout[..], &output.stderr[..]),
        (&b"out\n"[..], &b"err\n"[..])
    );

    let mut child = soulbox(&s.host, &["exec", "-i", &s.id, "--", "sha256sum"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut stdin = child.stdin.take().context("stdin")?;
    stdin.write_all(&vec![b'x'; 3 << 20])?;
    drop(stdin);
    let sum = succeed(child.wait_with_output()?)?;
    let in_guest = succeed(sh(
        &s.host,
        &s.id,
        "head -c 3145728 /dev/zero | tr '\\0' x | sha256sum",
    ))?;
    assert_eq!(sum, in_guest);

    // A program that never reads does not stop its output.
    let deaf = soulbox(&s.host, &["exec", "-i", &s.id, "--", "echo", "done"])
        .stdin(Stdio::from(std::fs::File::open("/dev/zero")?))
        .output()?;
    assert_eq!(deaf.stdout, b"done\n");
    Ok(())
}

pub(crate) fn arguments_and_environment_are_bytes() -> Result<()> {
    let s = shared();
    let odd = std::ffi::OsStr::from_bytes(b"\xff\xfe\x80 x");
    let output = soulbox(&s.host, &["exec", &s.id, "--", "printf", "%s"])
        .arg(odd)
        .output()?;
    assert_eq!(output.stdout, odd.as_bytes());

    // 128 KiB of environment fits.
    let one = "v".repeat(32 << 10);
    let mut command = soulbox(&s.host, &["exec"]);
    for index in 0..4 {
        command.arg("--env").arg(format!("BIG{index}={one}"));
    }
    command.args([&s.id, "--", "sh", "-c", "echo ${#BIG0} ${#BIG3}"]);
    assert_eq!(succeed(command.output()?)?, "32768 32768\n");
    Ok(())
}

pub(crate) fn the_root_is_writable_and_the_users_own() -> Result<()> {
    let s = shared();
    let user = s.host.soulbox(&[
        "exec",
        &s.id,
        "--",
        "sh",
        "-c",
        "id -un; pwd; hostname; echo hi > note; cat note",
    ]);
    assert_eq!(succeed(user)?, format!("user\n/home/user\n{}\nhi\n", s.id));
    let root = s.host.soulbox(&[
        "exec",
        &s.id,
        "--",
        "sudo",
        "sh",
        "-c",
        "dd if=/dev/urandom of=/big bs=1M count=32 status=none && sync && stat -c %s /big",
    ]);
    assert_eq!(succeed(root)?, "33554432\n");
    // It is in the layer, not in memory.
    let layer = s
        .host
        .path("state/sandboxes")
        .join(&s.id)
        .join("root.0.layer");
    use std::os::unix::fs::MetadataExt as _;
    let allocated = std::fs::metadata(&layer)?.blocks() * 512;
    ensure!(allocated >= 32 << 20, "the layer holds {allocated} bytes");
    Ok(())
}

pub(crate) fn out_of_memory_kills_the_program_only() -> Result<()> {
    let s = shared();
    // Piece by piece: one piece of more than there is would only be refused.
    let line = "kept = []\nwhile True: kept.append(b'x' * (1 << 20))";
    let hungry = s
        .host
        .soulbox(&["exec", &s.id, "--", "python3", "-c", line]);
    assert_eq!(
        hungry.status.code(),
        Some(137),
        "{}",
        String::from_utf8_lossy(&hungry.stderr)
    );
    assert_eq!(succeed(sh(&s.host, &s.id, "echo alive"))?, "alive\n");
    Ok(())
}

pub(crate) fn a_client_that_goes_takes_its_program_along() -> Result<()> {
    let s = shared();
    let line = "echo started; exec sleep 4321";
    let mut client = soulbox(&s.host, &["exec", &s.id, "--", "sh", "-c", line])
        .stdout(Stdio::piped())
        .spawn()?;
    client
        .stdout
        .take()
        .context("stdout")?
        .read_exact(&mut [0; 8])?;
    client.kill()?;
    client.wait()?;
    eventually("the program of a client that is gone ends", || {
        Ok(sh(&s.host, &s.id, "pgrep -f 'sleep 4321' | grep -v $$")
            .status
            .code()
            == Some(1))
    })
}

/// A GiB; in the emulated bench, where that takes minutes, an eighth of it.
pub(crate) fn a_gibibyte_of_output_in_bounded_memory() -> Result<()> {
    let bytes: u64 = if super::emulated() {
        128 << 20
    } else {
        1 << 30
    };
    let s = shared();
    let mut client = soulbox(
        &s.host,
        &[
            "exec",
            &s.id,
            "--",
            "head",
            "-c",
            &bytes.to_string(),
            "/dev/zero",
        ],
    )
    .stdout(Stdio::piped())
    .spawn()?;
    let mut stdout = client.stdout.take().context("stdout")?;
    let (mut total, mut buffer) = (0u64, vec![0; 1 << 20]);
    let mut client_peak_kib = 0;
    loop {
        let n = stdout.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        ensure!(
            buffer[..n].iter().all(|byte| *byte == 0),
            "a byte was changed"
        );
        total += n as u64;
        if let Ok(status) = std::fs::read_to_string(format!("/proc/{}/status", client.id())) {
            client_peak_kib = status_kib(&status, "VmHWM:").unwrap_or(client_peak_kib);
        }
    }
    ensure!(client.wait()?.success());
    assert_eq!(total, bytes);

    let peak_kib = |pid: i32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        status_kib(&status, "VmHWM:")
    };
    let daemon_kib = peak_kib(s.daemon.pid())?;
    let got = succeed(s.host.soulbox(&["get", &s.id, "--output", "json"]))?;
    let got: serde_json::Value = serde_json::from_str(&got)?;
    let monitor_kib = got["usage"]["monitor_private_bytes"]
        .as_u64()
        .with_context(|| format!("{got}"))?
        >> 10;
    let agent_kib = status_kib(
        &succeed(sh(&s.host, &s.id, "cat /proc/1/status"))?,
        "VmHWM:",
    )?;
    eprintln!(
        "peaks of {bytes} bytes: soulbox {client_peak_kib}, soulboxd {daemon_kib}, soulbox-vmm {monitor_kib} (its own, afterwards), soulbox-guest {agent_kib} KiB"
    );
    for (name, kib, most_mib) in [
        ("soulbox", client_peak_kib, 64),
        ("soulboxd", daemon_kib, 64),
        ("soulbox-vmm", monitor_kib, 8),
        ("soulbox-guest", agent_kib, 16),
    ] {
        ensure!(kib < most_mib << 10, "{name} took {kib} KiB");
    }
    Ok(())
}
