//! Snapshots, pauses and rollbacks of real guests.

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};

use super::{Snapshotted, create, emulated, eventually, sh, snapshotted, succeed};

/// `--timings` as `(stage, milliseconds)` is for people; a script reads JSON.
fn json(s: &Snapshotted, args: &[&str]) -> Result<serde_json::Value> {
    let args = [&["--output", "json"], args].concat();
    Ok(serde_json::from_str(&succeed(s.host.soulbox(&args))?)?)
}

fn line(s: &Snapshotted, id: &str, line: &str) -> Result<String> {
    Ok(succeed(sh(&s.host, id, line))?.trim().to_owned())
}

pub(crate) fn a_create_restores_the_template() -> Result<()> {
    let s = snapshotted();
    let created = s.host.soulbox(&["create", "--timings"]);
    let stages = String::from_utf8(created.stderr.clone())?;
    let id = succeed(created)?.trim().to_owned();
    eprintln!("{stages}");
    for stage in ["admission", "restore", "contract", "first_exec", "total"] {
        ensure!(stages.contains(stage), "no {stage} in {stages}");
    }
    let got = json(&s, &["get", &id])?;
    ensure!(got["snapshot_id"] != "", "{got}");
    assert_eq!(line(&s, &id, "python3 -c 'print(6*7)'")?, "42");
    assert_eq!(line(&s, &id, "node -e 'console.log(6*7)'")?, "42");
    succeed(s.host.soulbox(&["rm", "--force", &id]))?;
    Ok(())
}

pub(crate) fn clones_share_no_secret_and_no_name() -> Result<()> {
    let s = snapshotted();
    let ids = [create(&s.host, &[])?, create(&s.host, &[])?];
    for what in [
        "head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n'",
        "cat /proc/sys/kernel/random/uuid",
        "python3 -c 'import random; print(random.getrandbits(128))'",
        "python3 -c 'import os; print(os.getrandom(16).hex())'",
        "python3 -c 'import uuid; print(uuid.uuid4())'",
        "node -e 'console.log(crypto.randomUUID())'",
        "cat /etc/machine-id",
        "cat /proc/sys/kernel/random/boot_id",
        "hostname",
    ] {
        let (one, other) = (line(&s, &ids[0], what)?, line(&s, &ids[1], what)?);
        ensure!(one != other && !one.is_empty(), "{what}: both {one:?}");
    }
    for id in &ids {
        assert_eq!(&line(&s, id, "hostname")?, id);
    }
    succeed(s.host.soulbox(&["rm", "--force", &ids[0], &ids[1]]))?;
    Ok(())
}

pub(crate) fn a_clone_that_runs_true_writes_little() -> Result<()> {
    let s = snapshotted();
    let id = create(&s.host, &[])?;
    line(&s, &id, "true")?;
    let got = json(&s, &["get", &id])?;
    let private = got["usage"]["guest_private_bytes"]
        .as_u64()
        .with_context(|| format!("{got}"))?;
    eprintln!("a clone that ran true has {} KiB of its own", private >> 10);
    ensure!(private <= 4 << 20, "{} KiB", private >> 10);
    succeed(s.host.soulbox(&["rm", "--force", &id]))?;
    Ok(())
}

pub(crate) fn a_pause_keeps_programs_files_and_time() -> Result<()> {
    let s = snapshotted();
    let id = create(&s.host, &[])?;
    // A program that counts, one that waits, and the clocks, before the pause.
    line(
        &s,
        &id,
        "cd /root; setsid python3 -c '
import time
with open(\"ticks\", \"w\", buffering=1) as f:
    while True:
        f.write(\"%d\\n\" % time.monotonic_ns()); time.sleep(0.05)
' >/dev/null 2>&1 </dev/null &
         setsid sh -c 'sleep 3; echo fired >/root/fired' >/dev/null 2>&1 </dev/null &
         echo kept >note; sync; sleep 0.5",
    )?;
    let identity = "cat /etc/machine-id; hostname; cat /proc/sys/kernel/random/boot_id";
    let before = line(&s, &id, identity)?;
    succeed(s.host.soulbox(&["pause", &id]))?;
    let refused = sh(&s.host, &id, "true");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(
        !refused.status.success() && said.contains("resume"),
        "{said}"
    );
    let listed = json(&s, &["get", &id])?;
    assert_eq!(listed["state"], "paused", "{listed}");
    // Hours pass. The emulated host is ours to set the clock of.
    if emulated() {
        advance_clock(Duration::from_secs(3 * 3600))?;
    }
    succeed(s.host.soulbox(&["resume", &id]))?;
    assert_eq!(line(&s, &id, identity)?, before, "it is still itself");
    assert_eq!(line(&s, &id, "cat /root/note")?, "kept");

    let started = Instant::now();
    let guest: f64 = line(&s, &id, "date +%s.%N")?.parse()?;
    let host = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)?
        .as_secs_f64();
    // The call itself takes its time, of which we know only the length.
    let error = host - guest;
    let call = started.elapsed().as_secs_f64();
    ensure!(
        error > -0.1 && error < call + 0.1,
        "the guest is {error} s behind, of a call of {call} s"
    );
    eventually("the timer fires", || {
        Ok(line(&s, &id, "cat /root/fired 2>/dev/null || true")? == "fired")
    })?;
    let mut ticks = Vec::<u64>::new();
    // Where guests are emulated, 50 ms can be half a second.
    eventually("it has counted", || {
        let written = line(&s, &id, "cat /root/ticks")?;
        ticks = written.lines().map(str::parse).collect::<Result<_, _>>()?;
        Ok(ticks.len() > 10)
    })?;
    ensure!(ticks.is_sorted(), "monotonic time went back");
    let longest = ticks.windows(2).map(|pair| pair[1] - pair[0]).max();
    ensure!(
        longest < Some(60_000_000_000),
        "time jumped by {longest:?} ns"
    );
    succeed(s.host.soulbox(&["rm", "--force", &id]))?;
    Ok(())
}

fn advance_clock(by: Duration) -> Result<()> {
    use rustix::time::{ClockId, Timespec, clock_settime};
    let later = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)? + by;
    let later = Timespec {
        tv_sec: later.as_secs() as i64,
        tv_nsec: later.subsec_nanos().into(),
    };
    clock_settime(ClockId::Realtime, later)?;
    Ok(())
}

pub(crate) fn many_pauses_lose_nothing() -> Result<()> {
    const PAUSES: usize = 50;
    let s = snapshotted();
    let id = create(&s.host, &[])?;
    line(&s, &id, "mkdir /root/d; touch /root/d/sum")?;
    for round in 0..PAUSES {
        line(
            &s,
            &id,
            &format!(
                "head -c 20000 /dev/urandom >/root/d/{round}; cd /root/d; md5sum {round} >>sum"
            ),
        )?;
        succeed(s.host.soulbox(&["pause", &id]))?;
        succeed(s.host.soulbox(&["resume", &id]))?;
    }
    // Once from the page cache, once from the disk.
    for drop in ["", "sync; echo 3 >/proc/sys/vm/drop_caches; "] {
        let checked = line(
            &s,
            &id,
            &format!("{drop}cd /root/d; md5sum -c sum | grep -c OK"),
        )?;
        assert_eq!(checked, PAUSES.to_string());
    }
    succeed(s.host.soulbox(&["rm", "--force", &id]))?;
    s.nothing_but_template_snapshots()
}

pub(crate) fn a_paused_sandbox_survives_the_daemon() -> Result<()> {
    let mut s = snapshotted();
    let id = create(&s.host, &[])?;
    line(&s, &id, "echo before >/root/note")?;
    succeed(s.host.soulbox(&["pause", &id]))?;
    s.restart()?;
    succeed(s.host.soulbox(&["resume", &id]))?;
    assert_eq!(line(&s, &id, "cat /root/note")?, "before");
    succeed(s.host.soulbox(&["rm", "--force", &id]))?;
    Ok(())
}

pub(crate) fn a_sandbox_is_rolled_back() -> Result<()> {
    let s = snapshotted();
    let id = create(&s.host, &[])?;
    line(&s, &id, "echo one >/root/note")?;
    let snapshot = s.snapshot(&id, &[])?;
    line(&s, &id, "echo two >/root/note; touch /root/later; sync")?;
    for _ in 0..2 {
        succeed(s.host.soulbox(&["rollback", &id, &snapshot]))?;
        assert_eq!(line(&s, &id, "cat /root/note; ls /root")?, "one\nnote");
        line(&s, &id, "echo three >/root/note; sync")?;
    }
    let refused = s.host.soulbox(&["snapshot", "rm", &snapshot]);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(!refused.status.success() && said.contains(&id), "{said}");
    succeed(s.host.soulbox(&["rm", "--force", &id]))?;
    succeed(s.host.soulbox(&["snapshot", "rm", &snapshot]))?;
    s.nothing_but_template_snapshots()
}

pub(crate) fn a_snapshot_is_a_template() -> Result<()> {
    let s = snapshotted();
    let id = create(&s.host, &[])?;
    line(&s, &id, "echo mine >/root/note")?;
    let snapshot = s.snapshot(&id, &["--name", "with-note"])?;
    succeed(s.host.soulbox(&["rm", "--force", &id]))?;
    let children = [
        create(&s.host, &["--template", "with-note"])?,
        create(&s.host, &["--template", &snapshot])?,
    ];
    for child in &children {
        assert_eq!(line(&s, child, "cat /root/note")?, "mine");
        assert_eq!(&line(&s, child, "hostname")?, child);
    }
    succeed(
        s.host
            .soulbox(&["rm", "--force", &children[0], &children[1]]),
    )?;
    succeed(s.host.soulbox(&["snapshot", "rm", &snapshot]))?;
    s.nothing_but_template_snapshots()
}

pub(crate) fn children_of_a_fork_are_on_their_own() -> Result<()> {
    let s = snapshotted();
    let parent = create(&s.host, &[])?;
    // Draws a number of the kernel's and one of its own every tenth of a second.
    line(
        &s,
        &parent,
        "cd /root; echo ours >note; setsid python3 -c '
import os, time
with open(\"drawn\", \"w\", buffering=1) as f:
    while True:
        f.write(os.getrandom(8).hex() + \"\\n\"); time.sleep(0.1)
' >/dev/null 2>&1 </dev/null & sleep 0.5",
    )?;
    // An Exec that is under way belongs to the parent alone.
    let mut under_way = super::soulbox(
        &s.host,
        &["exec", &parent, "--", "sh", "-c", "sleep 15; echo done"],
    )
    .stdout(std::process::Stdio::piped())
    .spawn()?;
    std::thread::sleep(Duration::from_secs(1));
    let children = s.fork(&parent, 3)?;
    let random = "cat /root/drawn";
    let mut all: Vec<(String, Vec<String>)> = Vec::new();
    for id in children.iter().chain([&parent]) {
        assert_eq!(line(&s, id, "cat /root/note")?, "ours");
        line(&s, id, &format!("echo {id} >/root/own; sleep 0.5"))?;
        let drawn = line(&s, id, random)?.lines().map(str::to_owned).collect();
        all.push((id.clone(), drawn));
    }
    // Up to the fork the same; from there on never again.
    for (number, (id, drawn)) in all.iter().enumerate() {
        for (other, others) in &all[number + 1..] {
            let shared = drawn.iter().zip(others).take_while(|(a, b)| a == b).count();
            ensure!(shared > 0, "{id} and {other} have no past in common");
            ensure!(drawn.len() > shared + 1, "{id} drew nothing after the fork");
            let again = drawn[shared..].iter().find(|mine| others.contains(mine));
            ensure!(again.is_none(), "{id} and {other} both drew {again:?}");
        }
    }
    for child in &children {
        let running = line(&s, child, "pgrep -c -x sleep || true")?;
        assert_eq!(running, "0", "an Exec of the parent's runs on in {child}");
        assert_eq!(
            &line(&s, child, "hostname; cat /root/own")?,
            &format!("{child}\n{child}")
        );
    }
    let done = under_way.wait_with_output_in(Duration::from_secs(120))?;
    assert_eq!(done, b"done\n");
    // Children need their parent no more.
    succeed(s.host.soulbox(&["rm", "--force", &parent]))?;
    let grandchildren = s.fork(&children[0], 2)?;
    for id in children[1..].iter().chain(&grandchildren) {
        assert_eq!(line(&s, id, "cat /root/note")?, "ours");
    }
    let all: Vec<&str> = children
        .iter()
        .chain(&grandchildren)
        .map(String::as_str)
        .collect();
    succeed(s.host.soulbox(&[&["rm", "--force"], &all[..]].concat()))?;
    s.nothing_but_template_snapshots()
}

/// A child process that must end in time.
trait WaitIn {
    fn wait_with_output_in(&mut self, limit: Duration) -> Result<Vec<u8>>;
}

impl WaitIn for std::process::Child {
    fn wait_with_output_in(&mut self, limit: Duration) -> Result<Vec<u8>> {
        use std::io::Read as _;
        let deadline = Instant::now() + limit;
        while self.try_wait()?.is_none() {
            ensure!(Instant::now() < deadline, "it did not end");
            std::thread::sleep(Duration::from_millis(50));
        }
        let mut output = Vec::new();
        self.stdout
            .take()
            .context("piped")?
            .read_to_end(&mut output)?;
        Ok(output)
    }
}

pub(crate) fn memory_comes_back_to_the_host() -> Result<()> {
    let s = snapshotted();
    let id = create(&s.host, &[])?;
    let private = || -> Result<u64> {
        let got = json(&s, &["get", &id])?;
        got["usage"]["guest_private_bytes"]
            .as_u64()
            .context("usage")
    };
    line(&s, &id, "python3 -c 'x = bytearray(100 << 20)'")?;
    // Free page reporting takes its two seconds (Linux mm/page_reporting.c).
    eventually("freed memory is given back", || Ok(private()? < 50 << 20))?;
    succeed(s.host.soulbox(&["rm", "--force", &id]))?;
    Ok(())
}

pub(crate) fn a_monitor_killed_while_paused_is_not_missed() -> Result<()> {
    let s = snapshotted();
    let id = create(&s.host, &[])?;
    line(&s, &id, "echo kept >/root/note")?;
    succeed(s.host.soulbox(&["pause", &id]))?;
    ensure!(s.monitors_of(&id)?.is_empty(), "its memory is not freed");
    succeed(s.host.soulbox(&["resume", &id]))?;
    for pid in s.monitors_of(&id)? {
        let pid = rustix::process::Pid::from_raw(pid).context("a pid")?;
        rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
    }
    eventually("the sandbox is failed", || {
        Ok(json(&s, &["get", &id])?["state"] == "failed")
    })?;
    succeed(s.host.soulbox(&["rm", "--force", &id]))?;
    s.nothing_but_template_snapshots()
}
