//! How programs are started, and what is said when they cannot be.

use soulbox_proto::guest::v1::*;

use crate::common::*;

#[tokio::test]
async fn tells_exit_codes_and_signals() {
    let guest = Guest::start().await;
    for code in [0, 1, 42, 255] {
        assert_eq!(guest.sh(&format!("exit {code}")).await.code(), code);
    }
    for signal in [1, 9, 11, 15] {
        assert_eq!(
            guest.sh(&format!("kill -{signal} $$")).await.signal(),
            signal
        );
    }
}

#[tokio::test]
async fn keeps_stdout_and_stderr_apart() {
    let guest = Guest::start().await;
    let finished = guest.sh("echo out; echo err >&2").await;
    assert_eq!(
        (finished.stdout.as_slice(), finished.stderr.as_slice()),
        (&b"out\n"[..], &b"err\n"[..])
    );
}

#[tokio::test]
async fn measures_what_a_program_uses() {
    let guest = Guest::start().await;
    let exited = guest
        .sh("i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done")
        .await
        .exited;
    assert!(exited.wall_us > 0 && exited.user_cpu_us > 0 && exited.max_resident_bytes > 0);
    assert!(!exited.timed_out);
}

#[tokio::test]
async fn arguments_and_variables_are_bytes() {
    let guest = Guest::start().await;
    let mut echo = sh(r#"printf %s "$1$VALUE""#);
    echo.argv
        .extend([b"sh".as_slice().into(), b"\xff\xfe".as_slice().into()]);
    echo.env.push(variable("VALUE", b"\x80\x81".as_slice()));
    assert_eq!(guest.run(echo).await.unwrap().stdout, b"\xff\xfe\x80\x81");
}

#[tokio::test]
async fn gives_the_base_environment_and_nothing_of_its_own() {
    let guest = Guest::start().await;
    let mut env = spec(&["env"]);
    env.env.push(variable("LANG", "C"));
    let finished = guest.run(env).await.unwrap();
    let mut names: Vec<_> = finished
        .text()
        .lines()
        .map(|line| line.split('=').next().unwrap())
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["HOME", "LANG", "LOGNAME", "PATH", "SHELL", "USER"]);
    assert!(finished.text().contains("LANG=C\n") && finished.text().contains("USER=root\n"));
}

#[tokio::test]
async fn starts_with_clean_signals_descriptors_and_session() {
    let guest = Guest::start().await;
    let status = guest
        .sh("exec cat /proc/self/status /proc/self/oom_score_adj")
        .await;
    let lines: Vec<_> = status.text().lines().collect();
    for set in ["SigBlk", "SigIgn", "SigCgt"] {
        assert!(
            lines.contains(&format!("{set}:\t0000000000000000").as_str()),
            "{set} {lines:#?}"
        );
    }
    assert!(
        lines.contains(&"Umask:\t0022") && lines.last() == Some(&"0"),
        "{lines:#?}"
    );

    let descriptors = guest
        .run(self::spec(&["ls", "/proc/self/fd"]))
        .await
        .unwrap();
    // 3 is the folder that ls reads.
    assert_eq!(descriptors.text(), "0\n1\n2\n3\n");

    let session = guest.sh("ps -o pid=,pgid=,sid= -p $$").await;
    let ids: Vec<_> = session.text().split_whitespace().collect();
    assert!(
        ids.len() == 3 && ids.iter().all(|id| id == &ids[0]),
        "{ids:?}"
    );
}

#[tokio::test]
async fn looks_a_name_up_in_the_path_of_the_process() {
    let guest = Guest::start().await;
    let tool = guest.folder().join("own-tool");
    std::fs::write(&tool, "#!/bin/sh\necho found\n").unwrap();
    std::fs::set_permissions(&tool, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut own = spec(&["own-tool"]);
    let status = guest.run(own.clone()).await.unwrap_err();
    assert_eq!(reason(&status), ("COMMAND_NOT_FOUND".into(), "127".into()));
    own.env.push(variable(
        "PATH",
        format!("/nowhere:{}", guest.folder().display()),
    ));
    assert_eq!(guest.run(own).await.unwrap().text(), "found\n");
}

#[tokio::test]
async fn says_why_a_program_cannot_be_started() {
    let guest = Guest::start().await;
    let plain = guest.folder().join("plain");
    std::fs::write(&plain, "text").unwrap();
    let plain = plain.to_str().unwrap();
    let lost = guest.folder().join("lost");
    std::fs::write(&lost, "#!/no/such/interpreter\n").unwrap();
    std::fs::set_permissions(&lost, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let in_folder = |cwd: &str| ProcessSpec {
        cwd: cwd.to_owned().into(),
        ..spec(&["true"])
    };
    let as_user = |user: &str| ProcessSpec {
        user: user.to_owned(),
        ..spec(&["true"])
    };

    for (spec, expected, exit_code) in [
        (spec(&["no-such-program"]), "COMMAND_NOT_FOUND", "127"),
        (spec(&["/no/such/program"]), "COMMAND_NOT_FOUND", "127"),
        (spec(&["/etc/passwd/x"]), "COMMAND_NOT_FOUND", "127"),
        (spec(&[&"x".repeat(5000)]), "COMMAND_NOT_FOUND", "127"),
        (spec(&[plain]), "COMMAND_NOT_EXECUTABLE", "126"),
        (spec(&["/tmp"]), "COMMAND_NOT_EXECUTABLE", "126"),
        (
            spec(&[lost.to_str().unwrap()]),
            "COMMAND_NOT_EXECUTABLE",
            "126",
        ),
        (in_folder("/no/such/folder"), "CWD_NOT_FOUND", "126"),
        (in_folder("/etc/passwd"), "CWD_NOT_FOUND", "126"),
        (as_user("no-such-user"), "USER_NOT_FOUND", "126"),
    ] {
        let status = guest.run(spec).await.unwrap_err();
        assert_eq!(
            reason(&status),
            (expected.into(), exit_code.into()),
            "{status:?}"
        );
        assert!(status.message().len() > 20, "{status:?}");
    }
    // Nothing of what failed is left.
    assert_eq!(guest.health().await.running_processes, 0);
    guest.sh("true").await;
}

#[tokio::test]
async fn takes_as_long_arguments_as_the_kernel() {
    let guest = Guest::start().await;
    let length = 128 * 1024 - "VALUE=".len() - 1;
    let mut longest = sh("printf %s \"$VALUE\"");
    longest.env.push(variable("VALUE", vec![b'x'; length]));
    assert_eq!(
        guest.run(longest.clone()).await.unwrap().stdout.len(),
        length
    );

    longest.env[0].value = vec![b'x'; length + 1].into();
    let status = guest.run(longest).await.unwrap_err();
    assert_eq!(reason(&status), ("ARGUMENTS_TOO_LONG".into(), "126".into()));

    let mut many = spec(&["true"]);
    many.argv
        .extend((0..64).map(|_| vec![b'x'; 100 * 1024].into()));
    let status = guest.run(many).await.unwrap_err();
    assert_eq!(reason(&status), ("ARGUMENTS_TOO_LONG".into(), "126".into()));
}

#[tokio::test]
async fn runs_as_the_user_and_in_the_folder_it_is_told() {
    let guest = Guest::start().await;
    let as_user = |user: &str, line: &str| ProcessSpec {
        user: user.to_owned(),
        ..sh(line)
    };
    let ids = "echo $(id -u) $(id -g) $(id -G)";
    for (user, expected) in [
        ("0", "0 0 0"),
        ("4242", "4242 4242 4242"),
        ("4242:17", "4242 17 17"),
        ("root:0", ""),
    ] {
        let finished = guest.run(as_user(user, ids)).await;
        if expected.is_empty() {
            assert_eq!(reason(&finished.unwrap_err()).0, "USER_NOT_FOUND");
        } else {
            assert!(finished.unwrap().text().starts_with(expected), "{user}");
        }
    }
    let named = guest
        .run(as_user("daemon", "echo $(id -un) $HOME $USER; pwd"))
        .await
        .unwrap();
    assert!(
        named.text().starts_with("daemon /usr/sbin daemon\n"),
        "{}",
        named.text()
    );
    // A user's own standard streams can be opened by name, and root's files cannot.
    let opened = guest
        .run(as_user("4242", "echo yes >/dev/stdout; cat /etc/shadow"))
        .await
        .unwrap();
    assert_eq!((opened.text(), opened.code()), ("yes\n", 1));

    assert_eq!(guest.run(sh("pwd")).await.unwrap().text(), "/root\n");
    let in_folder = ProcessSpec {
        cwd: guest.folder().to_str().unwrap().to_owned().into(),
        ..sh("pwd")
    };
    assert_eq!(
        guest.run(in_folder).await.unwrap().text().trim(),
        guest.folder().to_str().unwrap()
    );
}

#[tokio::test]
async fn sets_the_limits_it_is_told() {
    let guest = Guest::start().await;
    let limited = |limits: ResourceLimits, line: &str| ProcessSpec {
        limits: Some(limits),
        ..sh(line)
    };
    let none = ResourceLimits::default();

    let files = ResourceLimits {
        open_files: Some(17),
        ..none
    };
    assert_eq!(
        guest
            .run(limited(files, "ulimit -Sn; ulimit -Hn"))
            .await
            .unwrap()
            .text(),
        "17\n17\n"
    );
    let cpu = ResourceLimits {
        cpu_seconds: Some(1),
        ..none
    };
    assert_eq!(
        guest
            .run(limited(cpu, "while :; do :; done"))
            .await
            .unwrap()
            .signal(),
        24
    );
    let size = ResourceLimits {
        file_size_bytes: Some(1024),
        core_bytes: Some(0),
        ..none
    };
    let file = guest.folder().join("big");
    let line = format!("exec head -c 4096 /dev/zero >{}", file.display());
    assert_eq!(guest.run(limited(size, &line)).await.unwrap().signal(), 25);
    assert_eq!(std::fs::metadata(file).unwrap().len(), 1024);
    let memory = ResourceLimits {
        address_space_bytes: Some(256 << 20),
        ..none
    };
    assert_eq!(
        guest
            .run(limited(memory, "ulimit -v"))
            .await
            .unwrap()
            .text(),
        "262144\n"
    );

    let refused = ResourceLimits {
        open_files: Some(u64::MAX),
        ..none
    };
    let status = guest.run(limited(refused, "true")).await.unwrap_err();
    assert_eq!(fields(&status), ["start.limits"]);
}

#[tokio::test]
async fn refuses_what_breaks_the_protocol() {
    let guest = Guest::start().await;
    let eof = || request(process_input::Input::StdinEof(StdinEof {}));
    let first = |request: ExecRequest| guest.send(vec![request]);

    let status = first(eof()).await.map(drop).unwrap_err();
    assert_eq!(fields(&status), ["start"]);
    let status = first(ExecRequest { message: None })
        .await
        .map(drop)
        .unwrap_err();
    assert_eq!(fields(&status), ["start"]);
    let status = first(start(ProcessSpec::default()))
        .await
        .map(drop)
        .unwrap_err();
    assert_eq!(fields(&status), ["start.argv"]);

    // A program that is bound to its call is killed with it.
    for (input, field) in [
        (start(spec(&["true"])), "start"),
        (request(process_input::Input::Signal(0)), "input.signal"),
        (request(process_input::Input::Signal(65)), "input.signal"),
        (
            request(process_input::Input::Stdin(vec![0; (1 << 20) + 1].into())),
            "input.stdin",
        ),
        (ExecRequest { message: None }, "input"),
    ] {
        let call = guest
            .exec(bound(ProcessSpec {
                stdin: true,
                ..spec(&["sleep", "1000"])
            }))
            .await
            .unwrap();
        let pid = call.pid;
        call.requests().send(input).await.unwrap();
        assert_eq!(fields(&call.finish().await.unwrap_err()), [field]);
        until(|| !lives(pid)).await;
    }
    let call = guest.exec(bound(spec(&["sleep", "1000"]))).await.unwrap();
    call.stdin("x").await;
    assert_eq!(fields(&call.finish().await.unwrap_err()), ["input.stdin"]);
}
