//! Contexts: what is apart in them, and what becomes of them.

use std::time::Duration;

use soulbox_proto::guest::v1::run_finished::Ended;
use soulbox_proto::guest::v1::*;
use tonic::Code;

use crate::common::interpreters::*;
use crate::common::*;

#[tokio::test]
async fn contexts_are_apart_and_have_their_own_places() {
    let guest = Guest::start().await;
    let mut code = Interpreters::of(&guest).await;
    let request = CreateContextRequest {
        language: Language::Python.into(),
        cwd: "/usr".into(),
        env: vec![variable("NAME", "value")],
        user: "nobody".to_owned(),
    };
    let context = code.create_with(request).await.unwrap();
    assert_eq!(
        (context.user.as_str(), &context.cwd[..]),
        ("nobody", &b"/usr"[..])
    );
    assert_eq!(context.id.len(), 8);
    let source = "import os; (os.getcwd(), os.environ['NAME'], os.getuid() != 0)";
    assert_eq!(
        code.run(run_in(&context.id, source)).await.value(),
        "('/usr', 'value', True)"
    );
    code.run(run_in(&context.id, "x = 1")).await.ok();
    assert_eq!(code.python("x").await.error.unwrap().name, "NameError");

    let other = code.create(Language::Python).await.unwrap();
    let ids: Vec<_> = code
        .list()
        .await
        .into_iter()
        .map(|context| context.id)
        .collect();
    assert_eq!(ids, [context.id.as_str(), "python", other.id.as_str()]);
    let restarted = code.restart(&context.id).await.unwrap();
    assert!(restarted.pid != context.pid && restarted.restarts == 0);
    assert_eq!(
        code.run(run_in(&context.id, "x")).await.error.unwrap().name,
        "NameError"
    );
    for _ in 0..2 {
        code.delete(&context.id).await;
    }
    until(|| !lives(restarted.pid)).await;
    let status = code.try_run(run_in(&context.id, "x")).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).0.as_str()),
        (Code::NotFound, "CONTEXT_NOT_FOUND")
    );
    assert_eq!(
        reason(&code.restart(&context.id).await.unwrap_err()).0,
        "CONTEXT_NOT_FOUND"
    );
}

#[tokio::test]
async fn what_cannot_be_made_is_refused_with_a_reason() {
    let guest = Guest::start().await;
    let mut code = Interpreters::of(&guest).await;
    let python = CreateContextRequest {
        language: Language::Python.into(),
        ..CreateContextRequest::default()
    };
    let script = guest.folder().join("python3");
    std::fs::write(&script, "#!/bin/sh\necho 'not today' >&2\nexit 3\n").unwrap();
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    for (request, wanted) in [
        (
            CreateContextRequest {
                cwd: "/no/such/place".into(),
                ..python.clone()
            },
            "CWD_NOT_FOUND",
        ),
        (
            CreateContextRequest {
                user: "no one".to_owned(),
                ..python.clone()
            },
            "USER_NOT_FOUND",
        ),
        (
            CreateContextRequest {
                env: vec![variable("PATH", "/nonexistent")],
                ..python.clone()
            },
            "INTERPRETER_NOT_FOUND",
        ),
        (
            CreateContextRequest {
                env: vec![variable(
                    "PATH",
                    guest.folder().to_str().unwrap().to_owned(),
                )],
                ..python.clone()
            },
            "INTERPRETER_FAILED",
        ),
        (
            CreateContextRequest {
                cwd: "relative".into(),
                ..python.clone()
            },
            "INVALID_REQUEST",
        ),
        (CreateContextRequest::default(), "INVALID_REQUEST"),
    ] {
        let status = code.create_with(request).await.unwrap_err();
        assert_eq!(reason(&status).0, wanted, "{status:?}");
        if wanted == "INTERPRETER_FAILED" {
            assert!(
                status.message().contains("not today") && status.message().contains("exit code 3")
            );
        }
    }
    let request = RunCodeRequest {
        context_id: "python".to_owned(),
        ..run(Language::Bash, "x")
    };
    assert_eq!(
        fields(&code.try_run(request).await.unwrap_err()),
        ["language"]
    );
    assert_eq!(
        fields(&code.try_run(run(Language::Bash, "a\0b")).await.unwrap_err()),
        ["code"]
    );
    assert_eq!(code.list().await.len(), 1);

    // As many as there may be, of the lightest kind.
    for _ in 1..64 {
        code.create(Language::Bash).await.unwrap();
    }
    let status = code.create(Language::Bash).await.unwrap_err();
    assert_eq!(reason(&status).0, "TOO_MANY_CONTEXTS");
}

#[tokio::test]
async fn calls_of_one_context_wait_for_each_other() {
    let guest = Guest::start().await;
    let mut code = Interpreters::of(&guest).await;
    code.python("said = []").await.ok();
    let mut calls = Vec::new();
    for index in 0..10 {
        let source = format!("import time; time.sleep(0.02); said.append({index})");
        calls.push(code.start(run(Language::Python, &source)).await);
    }
    assert!(code.list().await[0].busy);
    // This one leaves while it waits: it is never run.
    drop(calls.remove(5));
    for call in calls {
        call.finish().await.ok();
    }
    assert_eq!(
        code.python("said").await.value(),
        "[0, 1, 2, 3, 4, 6, 7, 8, 9]"
    );
    assert!(!code.list().await[0].busy);
}

#[tokio::test]
async fn what_is_said_between_runs_is_told_by_the_next() {
    let guest = Guest::start().await;
    let mut code = Interpreters::of(&guest).await;
    let mark = guest.folder().join("mark");
    let source = format!(
        "(sleep 0.1; echo late; head -c 300000 /dev/zero; touch {}) &",
        mark.display()
    );
    assert_eq!(code.run_in(Language::Bash, &source).await.ok().out(), "");
    // It would wait for ever on a pipe that nobody reads.
    until(|| mark.exists()).await;
    let ran = code.run_in(Language::Bash, "echo now").await.ok();
    assert!(ran.out().starts_with("late\n") && ran.out().ends_with("now\n"));
    assert_eq!(
        ran.stdout.len() as u64 + ran.finished.dropped_output_bytes,
        300_009
    );
}

#[tokio::test]
async fn a_context_ends_what_runs_in_it() {
    let guest = Guest::start().await;
    let mut code = Interpreters::of(&guest).await;
    for delete in [false, true] {
        let mut call = code
            .start(run(Language::Python, "print('on')\nwhile True: pass"))
            .await;
        call.until_output().await;
        let waiting = code.start(run(Language::Python, "'next'")).await;
        if delete {
            code.delete("python").await;
            assert_eq!(reason(&waiting.status().await).0, "CONTEXT_NOT_FOUND");
        } else {
            code.restart("python").await.unwrap();
            assert_eq!(waiting.finish().await.value(), "'next'");
        }
        assert_eq!(call.finish().await.finished.ended, Some(Ended::Signal(9)));
    }
    assert!(code.list().await.is_empty());
    if guest.has_cgroups() {
        until(|| guest.cgroups() == 0).await;
    }
}

#[tokio::test]
async fn a_guest_that_stops_ends_its_runs() {
    let mut guest = Guest::start().await;
    let mut code = Interpreters::of(&guest).await;
    let mut call = code
        .start(run(Language::Python, "print('on')\nwhile True: pass"))
        .await;
    call.until_output().await;
    let waiting = code.start(run(Language::Python, "1")).await;
    let pid = code.list().await[0].pid;
    let agent = rustix::process::Pid::from_raw(guest.agent_pid().cast_signed()).unwrap();
    rustix::process::kill_process(agent, rustix::process::Signal::TERM).unwrap();
    assert_eq!(reason(&call.status().await).0, "STOPPING");
    assert_eq!(reason(&waiting.status().await).0, "STOPPING");
    drop(code);
    assert!(guest.ended().await.success());
    assert!(!lives(pid));
}

#[tokio::test]
async fn suspended_code_goes_on_and_knows_of_its_new_identity() {
    let guest = Guest::start_as_init().await;
    let mut code = Interpreters::of(&guest).await;
    let configure = async |new_identity| {
        let request = ConfigureRequest {
            new_identity,
            ..ConfigureRequest::default()
        };
        guest.system().configure(request).await.unwrap();
    };
    let draw = "import random; random.seed(7); first = random.random(); random.seed(7)";
    let same = "random.random() == first";

    code.python(draw).await.ok();
    configure(false).await;
    assert_eq!(code.python(same).await.value(), "True");

    // As in a snapshot: code runs on in the copy, code that comes meanwhile waits.
    code.python(draw).await.ok();
    code.run_in(Language::Javascript, "let kept = 1").await.ok();
    let mut running = code
        .start(run(
            Language::Bash,
            "echo on; until [ -e /agent/go ]; do sleep 0.01; done",
        ))
        .await;
    running.until_output().await;
    guest.system().suspend(SuspendRequest {}).await.unwrap();
    let waiting = code.start(run(Language::Python, same)).await;
    std::fs::write(guest.folder().join("go"), "").unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    configure(true).await;
    assert_eq!(waiting.finish().await.value(), "False");
    running.finish().await.ok();
    assert_eq!(code.run_in(Language::Javascript, "kept").await.value(), "1");
    // Once.
    code.python(draw).await.ok();
    assert_eq!(code.python(same).await.value(), "True");
}
