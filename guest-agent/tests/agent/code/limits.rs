//! Code that has to be interrupted, says too much, or whose caller is not there.

use std::time::Duration;

use soulbox_proto::guest::v1::run_finished::{Ended, Outcome};
use soulbox_proto::guest::v1::*;

use crate::common::interpreters::*;
use crate::common::*;

#[tokio::test]
async fn code_is_interrupted() {
    let guest = Guest::start().await;
    let mut code = Interpreters::of(&guest).await;
    for (language, keep, source, kept) in [
        (
            Language::Python,
            "kept = 1",
            "print('on'); \nwhile True: pass",
            "kept",
        ),
        (
            Language::Python,
            "",
            "import time; print('on'); time.sleep(1000)",
            "kept",
        ),
        (
            Language::Python,
            "",
            "import asyncio; print('on'); await asyncio.sleep(1000)",
            "kept",
        ),
        (
            Language::Python,
            "",
            "import subprocess; subprocess.run('echo on; sleep 1000', shell=True)",
            "kept",
        ),
        (
            Language::Javascript,
            "let kept = 1",
            "console.log('on'); while (true) {}",
            "kept",
        ),
        (
            Language::Javascript,
            "",
            "console.log('on'); await new Promise(() => setInterval(() => {}, 9))",
            "kept",
        ),
        (
            Language::Bash,
            "kept=1",
            "echo on; while :; do :; done",
            "echo $kept",
        ),
        (
            Language::Bash,
            "",
            "f() { while sleep 1000; do :; done; }; echo on; f; echo never",
            "echo $kept",
        ),
    ] {
        code.run_in(language, keep).await.ok();
        let mut call = code.start(run(language, source)).await;
        call.until_output().await;
        assert!(code.interrupt(call.context()).await.unwrap(), "{source}");
        let ran = call.finish().await;
        assert_eq!(ran.outcome(), Outcome::Interrupted, "{source}");
        assert_eq!(ran.out(), "on\n", "{source}");
        let ran = code.run_in(language, kept).await.ok();
        let told = if language == Language::Bash {
            ran.out().trim()
        } else {
            ran.value()
        };
        assert_eq!(told, "1", "{source}");
    }
    assert!(!code.interrupt("python").await.unwrap(), "nothing runs");
    assert_eq!(code.python("kept").await.value(), "1");
    assert_eq!(
        reason(&code.interrupt("nosuchid").await.unwrap_err()).0,
        "CONTEXT_NOT_FOUND"
    );
}

#[tokio::test]
async fn code_has_its_time_and_then_its_interpreter_is_ended() {
    let guest = Guest::start().await;
    let mut code = Interpreters::of(&guest).await;
    let timeout = Some(Duration::from_millis(100).try_into().unwrap());
    code.python("kept = 1").await.ok();
    let request = RunCodeRequest {
        timeout,
        ..run(Language::Python, "while True: pass")
    };
    let ran = code.run(request).await;
    assert_eq!(
        (ran.outcome(), ran.finished.timed_out),
        (Outcome::TimedOut, true)
    );
    assert_eq!(ran.error.unwrap().name, "KeyboardInterrupt");
    assert_eq!(code.python("kept").await.value(), "1");

    // One that does not listen.
    let source =
        "import time\nwhile True:\n    try: time.sleep(1000)\n    except KeyboardInterrupt: pass";
    let request = RunCodeRequest {
        timeout,
        ..run(Language::Python, source)
    };
    let ran = code.run(request).await;
    assert_eq!(
        (ran.outcome(), ran.finished.timed_out),
        (Outcome::InterpreterEnded, true)
    );
    assert_eq!(ran.finished.ended, Some(Ended::Signal(9)));
    assert_eq!(code.python("kept").await.error.unwrap().name, "NameError");

    // Time that it waits for its turn is not its own.
    let context = code.create(Language::Python).await.unwrap();
    let slow = code
        .start(run_in(&context.id, "import time; time.sleep(0.5)"))
        .await;
    let request = RunCodeRequest {
        timeout,
        ..run_in(&context.id, "'in time'")
    };
    assert_eq!(code.run(request).await.value(), "'in time'");
    slow.finish().await.ok();
}

#[tokio::test]
async fn what_is_too_much_is_left_out_and_said() {
    let guest = Guest::start().await;
    let mut code = Interpreters::of(&guest).await;
    let ran = code.python("'x' * 100_000_000").await.ok();
    assert_eq!(ran.results[0].omitted, ["text/plain"]);
    assert!(ran.results[0].data.is_empty());
    let request = RunCodeRequest {
        max_result_bytes: 1000,
        ..run(
            Language::Python,
            "display({'text/plain': 'small', 'text/html': 'x' * 900}, raw=True)\n\
             for _ in range(1000): display('again')",
        )
    };
    let ran = code.run(request).await.ok();
    assert_eq!(ran.results[0].omitted, ["text/html"]);
    assert_eq!(ran.results[0].data["text/plain"], "small");
    assert!((2..20).contains(&ran.results.len()));
    let ran = code
        .run_in(
            Language::Javascript,
            "'x'.repeat(5_000_000).split('').join('y').slice(0)",
        )
        .await;
    assert!(ran.results[0].data.len() + ran.results[0].omitted.len() == 1);

    let request = RunCodeRequest {
        max_output_bytes: 100_000,
        ..run(
            Language::Bash,
            "head -c 1000000 /dev/zero; head -c 1000000 /dev/zero >&2",
        )
    };
    let ran = code.run(request).await.ok();
    assert_eq!(ran.stdout.len() + ran.stderr.len(), 100_000);
    assert_eq!(ran.finished.dropped_output_bytes, 1_900_000);
}

#[tokio::test]
async fn a_caller_that_leaves_interrupts_only_if_it_asked_to() {
    let guest = Guest::start().await;
    let mut code = Interpreters::of(&guest).await;
    let source = "import time\ntry:\n    print('on'); time.sleep(0.3); how = 'ran on'\nexcept KeyboardInterrupt:\n    how = 'interrupted'";
    for (interrupt_on_disconnect, how) in [(false, "'ran on'"), (true, "'interrupted'")] {
        let request = RunCodeRequest {
            interrupt_on_disconnect,
            ..run(Language::Python, source)
        };
        let mut call = code.start(request).await;
        call.until_output().await;
        drop(call);
        assert_eq!(code.python("how").await.value(), how);
    }
}

#[tokio::test]
async fn a_caller_that_does_not_read_holds_its_code_back_and_nobody_else() {
    let guest = Guest::start().await;
    let mut code = Interpreters::of(&guest).await;
    let flood = "import sys\nfor n in range(100_000): sys.stdout.write('x' * 1000 + '\\n')";
    let request = RunCodeRequest {
        max_output_bytes: 64 * 1024 * 1024,
        ..run(Language::Python, flood)
    };
    let lazy = code.start(request).await;
    // Others go on, and the agent does not fill up.
    assert_eq!(code.run_in(Language::Bash, "echo hi").await.out(), "hi\n");
    // It stands in write(2) on its stdout.
    let call = format!("/proc/{}/syscall", code.list().await[0].pid);
    let stands = || std::fs::read_to_string(&call).is_ok_and(|call| call.starts_with("1 0x1 "));
    until(|| {
        (0..10).all(|_| {
            std::thread::sleep(Duration::from_millis(5));
            stands()
        })
    })
    .await;
    assert!(code.interrupt("python").await.unwrap());
    // What was not taken waits for it; the context does not.
    assert_eq!(code.python("'next'").await.value(), "'next'");
    assert!(peak_resident_kib(guest.agent_pid()) < 64 * 1024);
    let ran = lazy.finish().await;
    assert_eq!(ran.outcome(), Outcome::Interrupted);
    // Past its limit output waits for nobody.
    let request = RunCodeRequest {
        max_output_bytes: 1000,
        ..run(Language::Python, flood)
    };
    let lazy = code.start(request).await;
    assert_eq!(code.python("n").await.value(), "99999");
    assert_eq!(
        lazy.finish().await.finished.dropped_output_bytes,
        100_100_000 - 1000
    );
}
