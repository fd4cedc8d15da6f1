//! What happens when a part dies, and what is left after it.

use std::io::Read as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::{create, eventually, host, sh, soulbox, succeed};

pub(crate) fn a_guest_panic_fails_the_sandbox() -> Result<()> {
    let host = host("");
    let _daemon = host.start();
    let id = create(&host, &[])?;
    let panic = sh(
        &host,
        &id,
        "echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger",
    );
    assert_eq!(panic.status.code(), Some(125));
    let mut shown = String::new();
    eventually("the sandbox has failed", || {
        shown = succeed(host.soulbox(&["get", &id, "--output", "json"]))?;
        Ok(shown.contains("GUEST_PANIC"))
    })?;
    ensure!(shown.contains("Kernel panic"), "no last lines in {shown}");
    ensure!(host.monitors().is_empty());
    succeed(host.soulbox(&["rm", &id]))?;
    host.assert_nothing_left();
    Ok(())
}

pub(crate) fn a_killed_monitor_ends_its_calls() -> Result<()> {
    let host = host("");
    let _daemon = host.start();
    let id = create(&host, &[])?;
    let mut client = soulbox(
        &host,
        &["exec", &id, "--", "sh", "-c", "echo started; sleep 1000"],
    )
    .stdout(Stdio::piped())
    .stderr(Stdio::piped())
    .spawn()?;
    client
        .stdout
        .as_mut()
        .context("stdout")?
        .read_exact(&mut [0; 8])?;
    let killed_at = Instant::now();
    kill_process(
        Pid::from_raw(host.monitors()[0]).context("pid")?,
        Signal::KILL,
    )?;
    let output = client.wait_with_output()?;
    let took = killed_at.elapsed();
    assert_eq!(output.status.code(), Some(125));
    let stderr = String::from_utf8_lossy(&output.stderr);
    // The second that is promised, where seconds are those of a real CPU.
    let promised = Duration::from_secs(if super::emulated() { 20 } else { 1 });
    ensure!(took < promised, "the call ended after {took:?}: {stderr}");
    eventually("the sandbox has failed", || {
        Ok(succeed(host.soulbox(&["get", &id, "--output", "json"]))?.contains("MONITOR_DIED"))
    })?;
    succeed(host.soulbox(&["rm", &id]))?;
    host.assert_nothing_left();
    Ok(())
}

pub(crate) fn sigterm_drains_and_stops() -> Result<()> {
    let host = host("[shutdown]\nsandboxes = \"stop\"\n");
    let mut daemon = host.start();
    let id = create(&host, &[])?;
    let mut client = soulbox(
        &host,
        &[
            "exec",
            &id,
            "--",
            "sh",
            "-c",
            "echo started; sleep 2; echo done",
        ],
    )
    .stdout(Stdio::piped())
    .spawn()?;
    client
        .stdout
        .as_mut()
        .context("stdout")?
        .read_exact(&mut [0; 8])?;
    daemon.terminate();
    let output = client.wait_with_output()?;
    assert_eq!(
        (output.status.code(), &output.stdout[..]),
        (Some(0), &b"done\n"[..])
    );
    host.assert_nothing_left();
    ensure!(!host.socket().exists());
    Ok(())
}

pub(crate) fn a_killed_daemon_is_followed_by_one_that_adopts() -> Result<()> {
    let host = host("");
    let mut daemon = host.start();
    let id = create(&host, &[])?;
    succeed(sh(
        &host,
        &id,
        "echo kept > /root/note; (sleep 1000 &) >/dev/null 2>&1",
    ))?;
    let monitors = host.monitors();
    daemon.kill();
    assert_eq!(host.monitors(), monitors, "the machine outlives the daemon");

    let _next = host.start();
    assert_eq!(succeed(sh(&host, &id, "cat /root/note"))?, "kept\n");
    assert_eq!(host.monitors(), monitors);
    succeed(host.soulbox(&["rm", &id]))?;
    host.assert_nothing_left();
    Ok(())
}

pub(crate) fn what_cannot_be_adopted_is_cleaned_up() -> Result<()> {
    let host = host("");
    let mut daemon = host.start();
    let id = create(&host, &[])?;
    // One is killed with the daemon; another is still starting.
    let mut starting = soulbox(&host, &["create"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    eventually("a second monitor runs", || Ok(host.monitors().len() == 2))?;
    let dead = host.monitors()[0];
    daemon.kill();
    starting.wait()?;
    kill_process(Pid::from_raw(dead).context("pid")?, Signal::KILL)?;

    let next = host.start();
    eventually("nothing half made is left", || {
        Ok(host.monitors().len() <= 1)
    })?;
    let log = next.log().join("\n");
    ensure!(log.contains("sb-"), "the daemon says what it did: {log}");
    let left = succeed(host.soulbox(&["ls", "--output", "json"]))?;
    ensure!(!left.contains("STARTING"), "{left}");
    ensure!(left.contains(&id), "what was running has a record: {left}");
    succeed(host.soulbox(&["rm", "--all"]))?;
    host.assert_nothing_left();
    Ok(())
}
