//! The agent as PID 1, in namespaces where it may do what it does to a guest.

use std::os::unix::process::ExitStatusExt as _;

use soulbox_proto::guest::v1::exec_response::Event;
use soulbox_proto::guest::v1::*;

use crate::common::*;

#[tokio::test]
async fn sets_the_guest_up() {
    let guest = Guest::start_as_init().await;
    for (line, expected) in [
        ("tr '\\0' '\\n' </proc/1/cmdline | head -n1", "/init\n"),
        ("hostname", "template\n"),
        (
            "readlink /dev/fd /dev/stdin",
            "/proc/self/fd\n/proc/self/fd/0\n",
        ),
        (
            "stat -c %a /tmp /run /dev/shm /run/lock",
            "1777\n755\n1777\n1777\n",
        ),
        (
            "stat -f -c %T /proc /sys /dev/pts /dev/shm /run",
            "proc\nsysfs\ndevpts\ntmpfs\ntmpfs\n",
        ),
        ("stat -f -c %T /sys/fs/cgroup", "cgroup2fs\n"),
        ("cat /sys/class/net/lo/flags", "0x9\n"),
        (
            "echo yes >/dev/null; echo yes >/tmp/file; cat /tmp/file",
            "yes\n",
        ),
        (
            "cut -d/ -f2 /proc/self/cgroup | tail -n1 | cut -c1-12",
            "soulbox-test\n",
        ),
    ] {
        let finished = guest.sh(line).await;
        assert_eq!(
            finished.text(),
            expected,
            "{line}: {}",
            String::from_utf8_lossy(&finished.stderr)
        );
    }
}

#[tokio::test]
async fn programs_have_terminals() {
    let guest = Guest::start_as_init().await;
    let line = "tty; stat -c '%U %G %a' $(tty); stat -c '%a' /dev/pts/ptmx; echo >/dev/tty; \
                SHELL=/bin/sh script -qec tty /dev/null";
    let terminal = ProcessSpec {
        user: "daemon".to_owned(),
        terminal: Some(TerminalSize {
            columns: 80,
            rows: 24,
        }),
        ..sh(line)
    };
    let finished = guest.run(terminal).await.unwrap();
    // And may make more, as tmux does.
    let expected = "/dev/pts/0\r\ndaemon tty 620\r\n666\r\n\r\n/dev/pts/1\r\n";
    assert_eq!(finished.text(), expected);
}

#[tokio::test]
async fn becomes_who_it_is_told_to_be() {
    let guest = Guest::start_as_init().await;
    // No clock: it has no namespace.
    for name in ["first", "second.example"] {
        let configure = ConfigureRequest {
            hostname: name.to_owned(),
            ..ConfigureRequest::default()
        };
        guest.system().configure(configure).await.unwrap();
        let finished = guest.sh("hostname; cat /etc/hostname /etc/hosts").await;
        let expected = format!("{name}\n{name}\n127.0.0.1 localhost\n127.0.1.1 {name}\n");
        assert_eq!(finished.text(), expected);
    }
    let id = guest.sh("cat /etc/machine-id").await;
    let id = id.text().trim_end();
    assert!(
        id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit()),
        "{id}"
    );
}

#[tokio::test]
async fn reaps_what_others_leave() {
    let guest = Guest::start_as_init().await;
    let left = guest
        .sh("for i in 1 2 3; do (setsid sleep 0.05 &) ; done")
        .await;
    assert_eq!(left.code(), 0);
    let zombies = "for stat in /proc/[0-9]*/stat; do cat $stat; done 2>/dev/null | grep -c ') Z '";
    loop {
        let finished = guest.sh("ls -d /proc/[0-9]* | wc -l").await;
        // PID 1, this shell, its ls and its wc.
        if finished.text().trim() == "4" {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    assert_eq!(guest.sh(zombies).await.text(), "0\n");
}

#[tokio::test]
async fn turns_off_after_programs_and_calls_have_ended() {
    let mut guest = Guest::start_as_init().await;
    // One ends when it is asked to, one when it has to, one is left behind.
    guest
        .sh("(trap '' TERM; exec sleep 1000) >/dev/null 2>&1 &")
        .await;
    let line = "trap 'echo bye; exit 7' TERM; echo ready; while :; do sleep 0.01; done";
    let mut polite = guest.exec(sh(line)).await.unwrap();
    assert_eq!(polite.event().await, Event::Stdout("ready\n".into()));
    let mut stubborn = guest
        .exec(sh("trap '' TERM; echo ready; while :; do sleep 0.01; done"))
        .await
        .unwrap();
    assert_eq!(stubborn.event().await, Event::Stdout("ready\n".into()));

    guest.system().shutdown(ShutdownRequest {}).await.unwrap();
    let polite = polite.finish().await.unwrap();
    assert_eq!((polite.text(), polite.code()), ("bye\n", 7));
    assert_eq!(stubborn.finish().await.unwrap().signal(), 9);
    // In a PID namespace the kernel makes of a power-off the end by this signal.
    assert_eq!(guest.ended().await.signal(), Some(2));
}
