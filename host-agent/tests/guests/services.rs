//! Processes, files and code of real guests, and what the people who use them run.

use std::fs;
use std::io::{Read as _, Write as _};
use std::process::{Child, Stdio};

use anyhow::{Context, Result, ensure};

use super::{create, eventually, sh, shared, snapshotted, soulbox, status_kib, succeed};
use crate::support::Host;

/// `soulbox code run` in the sandbox's Python.
fn python(host: &Host, id: &str, code: &str) -> Result<String> {
    succeed(host.soulbox(&["code", "run", id, code]))
}

/// What the agent holds of memory, in KiB, as the kernel counts it.
fn agent_kib(host: &Host, id: &str) -> Result<u64> {
    let status = succeed(sh(host, id, "cat /proc/1/status"))?;
    status_kib(&status, "VmRSS:")
}

pub(crate) fn people_build_and_serve() -> Result<()> {
    let s = shared();
    let build = "cd && rm -rf c && mkdir c && cd c && \
        printf '#include <stdio.h>\\nint main(void) { puts(\"built here\"); return 3; }\\n' >hello.c && \
        printf 'hello: hello.c\\n\\tcc -O2 -Wall -o $@ $<\\n' >Makefile && \
        make --quiet && { ./hello; echo $?; }";
    assert_eq!(succeed(sh(&s.host, &s.id, build))?, "built here\n3\n");

    let clone = "cd && rm -rf git && mkdir git && cd git && git init --quiet --bare served.git && \
        git init --quiet work && cd work && echo text >file && git add file && \
        git -c user.name=a -c user.email=a@b commit --quiet -m one && \
        git push --quiet ../served.git HEAD:main && cd .. && \
        git --git-dir=served.git symbolic-ref HEAD refs/heads/main && \
        (git daemon --base-path=. --export-all --reuseaddr --listen=127.0.0.1 --port=9418 & \
         echo $! >pid) && \
        for i in $(seq 100); do git clone --quiet git://127.0.0.1/served.git clone 2>/dev/null && break; sleep 0.2; done && \
        kill $(cat pid) && cat clone/file";
    assert_eq!(succeed(sh(&s.host, &s.id, clone))?, "text\n");

    // A wheel is a zip of the module and what says so.
    let wheel = "cd && rm -rf pip && mkdir pip && cd pip && python3 - <<'END' && \
        pip install --quiet --no-index --no-deps --root-user-action=ignore ./tiny-1.0-py3-none-any.whl && \
        python3 -c 'import tiny; print(tiny.word)'\n\
import zipfile\n\
wheel = zipfile.ZipFile('tiny-1.0-py3-none-any.whl', 'w')\n\
wheel.writestr('tiny.py', 'word = \"installed\"\\n')\n\
info = 'tiny-1.0.dist-info/'\n\
wheel.writestr(info + 'METADATA', 'Metadata-Version: 2.1\\nName: tiny\\nVersion: 1.0\\n')\n\
wheel.writestr(info + 'WHEEL', 'Wheel-Version: 1.0\\nGenerator: a\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n')\n\
wheel.writestr(info + 'RECORD', '')\n\
wheel.close()\n\
END\n";
    assert_eq!(succeed(sh(&s.host, &s.id, wheel))?, "installed\n");

    let npm = "cd && rm -rf npm && mkdir npm && cd npm && \
        printf '{\"name\": \"a\", \"scripts\": {\"say\": \"node say.js\"}}' >package.json && \
        echo 'console.log(process.env.npm_lifecycle_event)' >say.js && \
        npm run --silent say";
    assert_eq!(succeed(sh(&s.host, &s.id, npm))?, "say\n");

    let serve = "cd && rm -rf www && mkdir www && cd www && echo page >index.html && \
        (python3 -m http.server --bind 127.0.0.1 8123 >/dev/null 2>&1 & echo $! >pid) && \
        for i in $(seq 100); do curl --silent --fail http://127.0.0.1:8123/ && break; sleep 0.2; done; \
        kill $(cat pid)";
    assert_eq!(succeed(sh(&s.host, &s.id, serve))?, "page\n");
    Ok(())
}

pub(crate) fn limits_hold() -> Result<()> {
    let s = shared();
    // A fork bomb meets its limit, is told apart from others, and dies as a whole.
    let bomb = ":() { : | : & }; :; sleep 1000";
    let mut running = soulbox(
        &s.host,
        &["exec", "--pids", "40", &s.id, "--", "bash", "-c", bomb],
    )
    .stdout(Stdio::piped())
    .stderr(Stdio::null())
    .spawn()?;
    eventually("the bomb is at its limit", || {
        let count = succeed(sh(&s.host, &s.id, "pgrep -cx bash || true"))?;
        Ok(count.trim().parse::<u32>()? > 10)
    })?;
    let count = succeed(sh(&s.host, &s.id, "pgrep -cx bash || true"))?;
    ensure!(count.trim().parse::<u32>()? <= 41, "{count} processes");
    running.kill()?;
    running.wait()?;
    eventually("nothing of it is left", || {
        Ok(sh(&s.host, &s.id, "pgrep -x bash").status.code() == Some(1))
    })?;

    let hungry =
        "x = bytearray(100 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1\nprint('whole')";
    let program = ["--", "python3", "-c", hungry];
    let limited = ["exec", "--memory-limit", "48M", &s.id];
    let output = s.host.soulbox(&[&limited[..], &program].concat());
    assert_eq!(output.status.code(), Some(137), "{output:?}");
    let free = ["exec", &s.id];
    let output = s.host.soulbox(&[&free[..], &program].concat());
    assert_eq!(succeed(output)?, "whole\n");

    // A tenth of a CPU: the kernel says that it held the program back.
    let spin = "import time\nend = time.monotonic() + 3\nwhile time.monotonic() < end: pass\n\
                own = open('/proc/self/cgroup').read().strip().split('::')[1]\n\
                print(open('/sys/fs/cgroup' + own + '/cpu.stat').read())";
    let limited = [
        "exec", "--user", "root", "--cpus", "0.1", &s.id, "--", "python3", "-c", spin,
    ];
    let stat = succeed(s.host.soulbox(&limited))?;
    let throttled = stat
        .lines()
        .find_map(|line| line.strip_prefix("nr_throttled "));
    ensure!(
        throttled.context("nr_throttled")?.trim().parse::<u32>()? > 0,
        "{stat}"
    );
    Ok(())
}

pub(crate) fn programs_are_left_and_found_again() -> Result<()> {
    let s = shared();
    let line = "echo begun; read word; echo got $word; exit 5";
    let detached = [
        "exec", "--detach", "-i", "--tag", "job", &s.id, "--", "sh", "-c", line,
    ];
    let job = succeed(s.host.soulbox(&detached))?.trim().to_owned();
    let listed = succeed(s.host.soulbox(&["ps", &s.id]))?;
    ensure!(listed.contains(&job) && listed.contains("job"), "{listed}");
    let mut attached = soulbox(&s.host, &["attach", "-i", &s.id, &job])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut stdout = attached.stdout.take().context("stdout")?;
    let mut begun = [0; 6];
    stdout.read_exact(&mut begun)?;
    assert_eq!(&begun, b"begun\n");
    attached
        .stdin
        .take()
        .context("stdin")?
        .write_all(b"this\n")?;
    let mut rest = String::new();
    stdout.read_to_string(&mut rest)?;
    assert_eq!(
        (rest.as_str(), attached.wait()?.code()),
        ("got this\n", Some(5))
    );
    // What it said is kept, and how it ended.
    let late = s.host.soulbox(&["attach", &s.id, &job]);
    assert_eq!(late.status.code(), Some(5));
    assert_eq!(late.stdout, b"begun\ngot this\n");

    let sleeper = [
        "exec",
        "--detach",
        &s.id,
        "--",
        "sh",
        "-c",
        "sleep 1001 & sleep 1002",
    ];
    let job = succeed(s.host.soulbox(&sleeper))?.trim().to_owned();
    succeed(s.host.soulbox(&["kill", "--signal", "KILL", &s.id, &job]))?;
    eventually("all of it is killed", || {
        Ok(sh(&s.host, &s.id, "pgrep -f 'sleep 100[12]'").status.code() == Some(1))
    })
}

pub(crate) fn code_keeps_its_state() -> Result<()> {
    let s = shared();
    assert_eq!(python(&s.host, &s.id, "x = 41")?, "");
    assert_eq!(python(&s.host, &s.id, "x + 1")?.trim(), "42");
    let failed = s.host.soulbox(&["code", "run", &s.id, "1 / 0"]);
    assert_eq!(failed.status.code(), Some(1));
    let stderr = String::from_utf8_lossy(&failed.stderr);
    ensure!(stderr.contains("ZeroDivisionError"), "{stderr}");
    for (language, code, expected) in [
        (
            "javascript",
            "const y = await Promise.resolve(6); y * 7",
            "42",
        ),
        ("typescript", "const z: number = 42; z", "42"),
        ("bash", "echo $((6 * 7))", "42"),
    ] {
        let args = ["code", "run", "--language", language, &s.id, code];
        assert_eq!(
            succeed(s.host.soulbox(&args))?.trim(),
            expected,
            "{language}"
        );
    }
    let endless = ["code", "run", "--timeout", "2s", &s.id, "while True: pass"];
    let stopped = s.host.soulbox(&endless);
    ensure!(!stopped.status.success(), "{stopped:?}");
    assert_eq!(python(&s.host, &s.id, "x")?.trim(), "41");
    let killed = s
        .host
        .soulbox(&["code", "run", &s.id, "import os; os._exit(3)"]);
    ensure!(!killed.status.success(), "{killed:?}");
    assert_eq!(python(&s.host, &s.id, "'x' in globals()")?.trim(), "False");
    Ok(())
}

/// A conversation goes on in each fork, and no two draw the same numbers.
pub(crate) fn code_survives_a_snapshot() -> Result<()> {
    let s = snapshotted();
    let id = create(&s.host, &[])?;
    python(&s.host, &id, "import random; seen = [1, 2]; random.seed(7)")?;
    let program = [
        "exec",
        "--detach",
        &id,
        "--",
        "sh",
        "-c",
        "echo kept; sleep 1000",
    ];
    let job = succeed(s.host.soulbox(&program))?.trim().to_owned();
    let children = s.fork(&id, 2)?;
    let mut drawn = Vec::new();
    for child in &children {
        assert_eq!(
            python(&s.host, child, "seen.append(3); seen")?.trim(),
            "[1, 2, 3]"
        );
        drawn.push(python(&s.host, child, "random.random()")?);
        let listed = succeed(s.host.soulbox(&["ps", child]))?;
        ensure!(listed.contains(&job), "{job} is not in {listed}");
    }
    ensure!(drawn[0] != drawn[1], "{drawn:?}");
    assert_eq!(python(&s.host, &id, "seen")?.trim(), "[1, 2]");
    succeed(s.host.soulbox(&["rm", "--force", "--all"]))?;
    s.nothing_but_template_snapshots()
}

/// Calls in flight end with a reason when their machine is taken from them.
pub(crate) fn a_pause_ends_every_call() -> Result<()> {
    let s = snapshotted();
    let id = create(&s.host, &[])?;
    succeed(sh(&s.host, &id, "mkdir -p /root/watched"))?;
    let begin = |args: &[&str]| -> Result<Child> {
        let mut command = soulbox(&s.host, args);
        Ok(command
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?)
    };
    let calls = [
        begin(&["exec", &id, "--", "sleep", "1000"])?,
        begin(&["code", "run", &id, "import time; time.sleep(1000)"])?,
        begin(&["fs", "watch", "--user", "root", &id, "/root/watched"])?,
    ];
    eventually("they have begun", || {
        let line = "pgrep -x sleep && pgrep -f runner && ls /proc/1/fd -l | grep inotify";
        let all = sh(&s.host, &id, line).status.success();
        let some = sh(
            &s.host,
            &id,
            "pgrep -x sleep && ls -l /proc/1/fd | grep -q inotify",
        );
        Ok(all || some.status.success())
    })?;
    succeed(s.host.soulbox(&["pause", &id]))?;
    for call in calls {
        let output = call.wait_with_output()?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(
            !output.status.success() && !stderr.is_empty(),
            "{:?}: {stderr}",
            output.status
        );
    }
    succeed(s.host.soulbox(&["resume", &id]))?;
    assert_eq!(python(&s.host, &id, "1 + 1")?.trim(), "2");
    succeed(s.host.soulbox(&["rm", "--force", &id]))?;
    Ok(())
}

pub(crate) fn files_go_both_ways() -> Result<()> {
    let s = shared();
    let here = tempfile::tempdir()?;
    let tree = here.path().join("tree");
    fs::create_dir_all(tree.join("deep/er"))?;
    for number in 0..300 {
        fs::write(
            tree.join(format!("deep/{number}")),
            format!("file {number}\n"),
        )?;
    }
    fs::write(tree.join("deep/er/large"), vec![7; 5 << 20])?;
    std::os::unix::fs::symlink("deep/1", tree.join("link"))?;
    let (local, back) = (tree.display().to_string(), here.path().join("back"));
    succeed(s.host.soulbox(&["cp", &local, &format!("{}:copied", s.id)]))?;
    let count = "find ~user/copied -type f | wc -l; readlink ~user/copied/link; stat -c %U ~user/copied/link";
    assert_eq!(succeed(sh(&s.host, &s.id, count))?, "301\ndeep/1\nuser\n");
    let back_to = back.display().to_string();
    succeed(
        s.host
            .soulbox(&["cp", &format!("{}:copied", s.id), &back_to]),
    )?;
    let same = std::process::Command::new("diff")
        .args(["-r", &local, &back_to])
        .output()?;
    ensure!(same.status.success(), "{same:?}");

    succeed(s.host.soulbox(&["fs", "mkdir", "-p", &s.id, "a/b"]))?;
    let mut write = soulbox(&s.host, &["fs", "write", &s.id, "a/b/c"])
        .stdin(Stdio::piped())
        .spawn()?;
    write.stdin.take().context("stdin")?.write_all(b"words\n")?;
    ensure!(write.wait()?.success());
    assert_eq!(
        succeed(s.host.soulbox(&["fs", "cat", &s.id, "a/b/c"]))?,
        "words\n"
    );
    let refused = s.host.soulbox(&["fs", "write", &s.id, "/etc/not-mine"]);
    ensure!(!refused.status.success());
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(said.contains("the user may not"), "{said}");
    Ok(())
}

pub(crate) fn files_are_mounted() -> Result<()> {
    let s = shared();
    let here = tempfile::tempdir()?;
    let at = here.path().join("mounted");
    fs::create_dir(&at)?;
    succeed(sh(
        &s.host,
        &s.id,
        "rm -rf /srv/app && mkdir -p /srv/app && echo one >/srv/app/file",
    ))?;
    let from = format!("{}:/srv/app", s.id);
    let at_text = at.display().to_string();
    let mut mount = soulbox(&s.host, &["mount", "--user", "root", &from, &at_text])
        .stderr(Stdio::piped())
        .spawn()?;
    eventually("it is mounted", || Ok(at.join("file").exists()))?;
    assert_eq!(fs::read_to_string(at.join("file"))?, "one\n");
    fs::write(at.join("file"), "two\n")?;
    assert_eq!(succeed(sh(&s.host, &s.id, "cat /srv/app/file"))?, "two\n");
    succeed(sh(
        &s.host,
        &s.id,
        "echo three >/srv/app/file; mkdir /srv/app/new",
    ))?;
    eventually("what changes inside is seen", || {
        Ok(fs::read_to_string(at.join("file"))? == "three\n" && at.join("new").is_dir())
    })?;
    let pid = rustix::process::Pid::from_child(&mount);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
    ensure!(mount.wait()?.success());
    ensure!(fs::read_dir(&at)?.next().is_none(), "it is still mounted");
    Ok(())
}

pub(crate) fn an_agent_stays_light() -> Result<()> {
    let s = shared();
    // All services have been used by now, or are here.
    python(&s.host, &s.id, "1")?;
    succeed(s.host.soulbox(&["fs", "ls", &s.id, "/"]))?;
    succeed(s.host.soulbox(&["top", "--once", &s.id]))?;
    let resident = agent_kib(&s.host, &s.id)?;
    ensure!(resident <= 10 << 10, "{resident} KiB");
    // It sleeps: what wakes it in five seconds are the calls that look.
    let line = "a=$(grep ^voluntary /proc/1/status | cut -f2); sleep 5; \
                b=$(grep ^voluntary /proc/1/status | cut -f2); echo $((b - a))";
    let wakeups: u64 = succeed(sh(&s.host, &s.id, line))?.trim().parse()?;
    ensure!(wakeups <= 10, "{wakeups} wake-ups in five idle seconds");
    Ok(())
}
