//! CodeService with this machine's interpreters.

mod common;
mod interpreters;

use std::time::Duration;

use common::*;
use interpreters::*;
use soulbox_proto::guest::v1::run_finished::{Ended, Outcome};
use soulbox_proto::guest::v1::*;
use tonic::Code;

#[tokio::test]
async fn python_keeps_its_state_and_shows_the_last_value() {
    let guest = Guest::start().await;
    let mut code = Interpreters::of(&guest).await;
    assert_eq!(code.python("x = 20").await.results.len(), 0);
    let ran = code.python("print('hi'); x + 1").await;
    assert_eq!((ran.out(), ran.value()), ("hi\n", "21"));
    assert_eq!(
        (ran.started.context_id.as_str(), ran.started.execution_count),
        ("python", 2)
    );
    assert_eq!(
        (ran.outcome(), ran.finished.execution_count),
        (Outcome::Ok, 2)
    );

    let ran = code.python("def f():\n    return 1 / 0\nf()").await;
    assert_eq!(ran.outcome(), Outcome::Failed);
    let error = ran.error.unwrap();
    assert_eq!(
        (error.name.as_str(), error.value.as_str()),
        ("ZeroDivisionError", "division by zero")
    );
    let traceback = error.traceback.join("\n");
    assert!(
        traceback.contains("    return 1 / 0") && !traceback.contains("soulbox"),
        "{traceback}"
    );
    // The state is as it was.
    assert_eq!(code.python("x").await.value(), "20");
    assert_eq!(code.list().await[0].execution_count, 4);
}

#[tokio::test]
async fn python_awaits_at_the_top_level_in_one_loop() {
    let guest = Guest::start().await;
    let mut code = Interpreters::of(&guest).await;
    code.python("import asyncio\nqueue = asyncio.Queue()")
        .await
        .ok();
    code.python("await queue.put(7)\nloop = asyncio.get_running_loop()")
        .await
        .ok();
    let ran = code
        .python("(await queue.get(), loop is asyncio.get_running_loop())")
        .await;
    assert_eq!(ran.value(), "(7, True)");
    // Where nothing awaits no loop runs, so that a program's own start works.
    let ran = code
        .python("async def f(): return 5\nasyncio.run(f())")
        .await;
    assert_eq!(ran.value(), "5");
    assert_eq!(code.python("await f()").await.value(), "5");
}

#[tokio::test]
async fn python_shows_what_objects_are_shown_as() {
    let guest = Guest::start().await;
    let mut code = Interpreters::of(&guest).await;
    let ran = code
        .python(
            "class Rich:\n\
             \x20   def __repr__(self): return 'rich'\n\
             \x20   def _repr_html_(self): return '<b>rich</b>'\n\
             \x20   def _repr_markdown_(self): return '**rich**'\n\
             \x20   def _repr_png_(self): return b'\\x89PNG\\0\\xff'\n\
             \x20   def _repr_jpeg_(self): return 'AAEC'\n\
             \x20   def _repr_latex_(self): return '$rich$'\n\
             \x20   def _repr_json_(self): return {'rich': [1, None]}\n\
             \x20   def _repr_svg_(self): raise ValueError\n\
             print('before')\ndisplay(Rich())\nRich()",
        )
        .await;
    assert_eq!(ran.order, ["stdout", "result", "result"]);
    let (shown, value) = (&ran.results[0], &ran.results[1]);
    assert!(!shown.main && value.main);
    assert_eq!(shown.data, value.data);
    let expected: [(&str, &[u8]); 7] = [
        ("text/plain", b"rich"),
        ("text/html", b"<b>rich</b>"),
        ("text/markdown", b"**rich**"),
        ("image/png", b"\x89PNG\0\xff"),
        ("image/jpeg", &[0, 1, 2]),
        ("text/latex", b"$rich$"),
        ("application/json", b"{\"rich\": [1, null]}"),
    ];
    assert_eq!(value.data.len(), expected.len());
    for (mime, bytes) in expected {
        assert_eq!(value.data[mime], bytes, "{mime}");
    }

    let ran = code
        .python("from IPython.display import HTML, display\ndisplay(HTML('<i>'))\ndisplay({'text/latex': 'x'}, raw=True)")
        .await
        .ok();
    assert_eq!(ran.results[0].data["text/html"], "<i>");
    assert_eq!(ran.results[1].data["text/latex"], "x");
}

#[tokio::test]
async fn python_understands_lines_as_in_notebooks() {
    let guest = Guest::start().await;
    let mut code = Interpreters::of(&guest).await;
    let folder = guest.folder().to_str().unwrap();
    let ran = code
        .python(&format!(
            "%matplotlib inline\nword = 'there'\n!echo hello {{word}}\n%cd {folder}\n%env A=1\n\
             lines = !printf 'a\\nb'\ntext = '''\n%no magic\n!nor this'''\n(lines, text)"
        ))
        .await
        .ok();
    assert_eq!(ran.out(), format!("hello there\n{folder}\n"));
    assert_eq!(ran.value(), "(['a', 'b'], '\\n%no magic\\n!nor this')");
    assert_eq!(
        code.python("!echo $A $PWD").await.out(),
        format!("1 {folder}\n")
    );
    assert_eq!(
        code.python("%%bash\nfor i in 1 2; do echo $i; done")
            .await
            .out(),
        "1\n2\n"
    );
    let ran = code.python("%unheard_of").await;
    assert_eq!(ran.error.unwrap().name, "UsageError");
    // The error is that of the code as it was written.
    let ran = code.python("x = = 1 % 2").await;
    assert_eq!(ran.error.unwrap().name, "SyntaxError");
    // pip's own line works: it imports at once what it installed.
    let ran = code.python("%pip --version").await;
    assert!(
        ran.out().starts_with("pip ") || ran.err().contains("No module named pip"),
        "{ran:?}"
    );
}

#[tokio::test]
async fn what_ends_python_code_and_not_python() {
    let guest = Guest::start().await;
    let mut code = Interpreters::of(&guest).await;
    code.python("kept = 1").await.ok();
    for (source, name) in [
        ("def deep(): deep()\ndeep()", "RecursionError"),
        ("import sys; sys.exit(3)", "SystemExit"),
        ("input('name? ')", "EOFError"),
        ("x = ", "SyntaxError"),
        ("[0] * (1 << 60)", "MemoryError"),
        (
            "class E(Exception):\n    def __str__(self): raise self\nraise E",
            "E",
        ),
        ("raise ValueError('\\udc80')", "ValueError"),
        ("raise KeyError('k' * 1_000_000)", "KeyError"),
    ] {
        let ran = code.python(source).await;
        assert_eq!(ran.outcome(), Outcome::Failed, "{source}");
        let error = ran.error.unwrap();
        assert_eq!(error.name, name, "{source}");
        let told: usize = error.traceback.iter().map(String::len).sum();
        assert!(error.value.len() + told < 100_000);
    }
    for source in [
        "exit()",
        "",
        "# nothing",
        "sys.stdout.close(); sys.stderr = None",
    ] {
        code.python(source).await.ok();
    }
    let ran = code.python("print('still'); kept").await;
    assert_eq!((ran.out(), ran.value()), ("still\n", "1"));
    assert_eq!(code.list().await[0].restarts, 0);
}

#[tokio::test]
async fn an_interpreter_that_ends_is_told_of_and_made_anew() {
    let guest = Guest::start().await;
    let mut code = Interpreters::of(&guest).await;
    let ends = [
        (
            "display('last'); import os; os._exit(3)",
            Ended::ExitCode(3),
        ),
        ("import ctypes; ctypes.string_at(0)", Ended::Signal(11)),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            Ended::Signal(9),
        ),
        // Another program in its place, which has no channel.
        (
            "import os; os.execvp('sleep', ['sleep', '1000'])",
            Ended::Signal(9),
        ),
    ];
    for (index, (source, ended)) in ends.into_iter().enumerate() {
        code.python("kept = 1").await.ok();
        let ran = code.python(source).await;
        assert_eq!(ran.outcome(), Outcome::InterpreterEnded, "{source}");
        assert_eq!(ran.finished.ended, Some(ended), "{source}");
        assert_eq!(ran.results.len(), usize::from(index == 0));
        let ran = code.python("kept").await;
        assert_eq!(ran.error.unwrap().name, "NameError");
        assert_eq!(ran.started.execution_count, 1);
        let context = &code.list().await[0];
        assert_eq!(context.restarts as usize, index + 1);
        assert!(lives(context.pid));
    }
    // One that ends between runs, too.
    let pid = code.list().await[0].pid;
    code.python("import os, threading\nthreading.Timer(0.05, os._exit, [5]).start()")
        .await
        .ok();
    until(|| !lives(pid)).await;
    assert_eq!(code.python("1").await.value(), "1");
    assert_eq!(code.list().await[0].restarts as usize, ends.len() + 1);
}

#[tokio::test]
async fn code_that_writes_to_its_runners_channel_loses_its_interpreter() {
    let guest = Guest::start().await;
    let mut code = Interpreters::of(&guest).await;
    for source in [
        "import os; os.write(3, b'\\xff' * 100)",
        "import os; os.write(3, b'\\x05\\0\\0\\0 what'); 1",
        "import os; os.write(3, b'\\0' * 4)",
        "import os; os.write(3, b'\\x00\\x00\\x00\\x7f'); 1",
        "import os; os.close(3)",
        "import os; os.closerange(3, 100); f = open('/dev/zero')",
    ] {
        let ran = code.python(source).await;
        assert_eq!(ran.outcome(), Outcome::InterpreterEnded, "{source}");
        assert_eq!(code.python("6 * 7").await.value(), "42", "{source}");
    }
    // However well it does it.
    let source = "import os\n\
        result = b'\\x22\\x02\\x08\\x01'\n\
        while True: os.write(3, (len(result).to_bytes(4, 'little') + result) * 1000)";
    let request = RunCodeRequest {
        max_result_bytes: 1000,
        ..run(Language::Python, source)
    };
    let ran = code.run(request).await;
    assert_eq!(ran.outcome(), Outcome::InterpreterEnded);
    assert_eq!(ran.error.as_ref().unwrap().name, "ChannelBroken");
    assert!(ran.results.len() < 10_000);
    // Also between runs.
    code.python("import os, threading\nthreading.Timer(0.01, os.write, [3, b'xxxxx']).start()")
        .await
        .ok();
    let pid = code.list().await[0].pid;
    until(|| !lives(pid)).await;
    assert_eq!(code.python("6 * 7").await.value(), "42");
}

#[tokio::test]
async fn what_code_forks_does_not_answer_for_it() {
    let guest = Guest::start().await;
    let mut code = Interpreters::of(&guest).await;
    let ran = code
        .python(
            "import os, sys, multiprocessing\n\
             pid = os.fork()\n\
             if pid: os.waitpid(pid, 0)\n\
             else: display('child')\n\
             'parent'",
        )
        .await
        .ok();
    assert_eq!(ran.value(), "'parent'");
    assert_eq!(ran.results.len(), 1);
    // Which has nobody to show it to.
    assert_eq!(ran.out(), "child\n");
    let ran = code
        .python(
            "def double(x): return 2 * x\n\
             with multiprocessing.get_context('fork').Pool(2) as pool: r = pool.map(double, [1, 2, 3])\n\
             r",
        )
        .await;
    assert_eq!(ran.value(), "[2, 4, 6]");
    // A daemon that holds its pipes does not hold up the end.
    let ran = code
        .python("import subprocess; p = subprocess.Popen(['sleep', '1000']); p.pid")
        .await
        .ok();
    let pid = ran.value().parse().unwrap();
    assert!(lives(pid));
    code.restart("python").await.unwrap();
    if guest.has_cgroups() {
        until(|| !lives(pid)).await;
    }
}

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
async fn javascript_keeps_what_it_declares() {
    let guest = Guest::start().await;
    let mut code = Interpreters::of(&guest).await;
    for (source, value) in [
        (
            "const x = 1; let y = 2; class A { sum() { return x + y } } function f() { return 3 }",
            None,
        ),
        ("new A().sum() + f()", Some("6")),
        ("const x = 5; new A().sum()", Some("7")),
        (
            "const { p: [q, r = 8], ...s } = { p: [1], t: 2 }; [q, r, s]",
            Some("[ 1, 8, { t: 2 } ]"),
        ),
        ("{a: 1}", Some("{ a: 1 }")),
        (
            "const slow = await new Promise((done) => setTimeout(done, 5, 9)); slow",
            Some("9"),
        ),
        ("slow + 1", Some("10")),
        (
            "for await (const one of [1, 2]) { var last = one }\nlet un, de = 2; last",
            Some("2"),
        ),
        ("[last, un, de]", Some("[ 2, undefined, 2 ]")),
        (
            "import fs, { statSync as stat } from 'fs'\nimport * as path from 'node:path'\npath.sep",
            Some("'/'"),
        ),
        (
            "[typeof fs.readFileSync, typeof stat, path.sep]",
            Some("[ 'function', 'function', '/' ]"),
        ),
        ("(await import('os')).EOL.length", Some("1")),
        ("require('path').basename('/a/b')", Some("'b'")),
        (
            "async function main() { return 'done' }; main()",
            Some("'done'"),
        ),
        ("let undefinedOne", None),
        (
            "if (true) { let inner = 1 } typeof inner",
            Some("'undefined'"),
        ),
        ("[1, 2].map((n) => n * 2)", Some("[ 2, 4 ]")),
        ("new Map([[1, 2]])", Some("Map(1) { 1 => 2 }")),
    ] {
        let ran = code.run_in(Language::Javascript, source).await.ok();
        assert_eq!(ran.results.first().map(text), value, "{source}");
    }
    // Names that Node has, and that it computes.
    let source = "const crypto = require('crypto'), { performance } = require('perf_hooks'), fetch = 3, Buffer = 4, \
        process = 5\ncrypto.createHash('md5').digest('hex').length + fetch + Buffer + process";
    let ran = code.run_in(Language::Javascript, source).await.ok();
    assert_eq!(ran.value(), "44");
    let source = "console.log('x'.repeat(3_000_000)); console.error('end')";
    let ran = code.run_in(Language::Javascript, source).await;
    assert_eq!((ran.stdout.len(), ran.err()), (3_000_001, "end\n"));
    let ran = code
        .run_in(
            Language::Javascript,
            "console.log('out'); console.error('err')",
        )
        .await;
    assert_eq!((ran.out(), ran.err()), ("out\n", "err\n"));
    let ran = code
        .run_in(
            Language::Javascript,
            "display({ 'text/html': '<b>', 'image/png': 'AAEC' }); display(new Uint8Array(2)); undefined",
        )
        .await
        .ok();
    assert_eq!(ran.results[0].data["image/png"], &[0_u8, 1, 2][..]);
    assert_eq!(text(&ran.results[1]), "Uint8Array(2) [ 0, 0 ]");
    assert_eq!(ran.results.len(), 2);
}

#[tokio::test]
async fn javascript_errors_have_their_own_frames_only() {
    let guest = Guest::start().await;
    let mut code = Interpreters::of(&guest).await;
    for (source, name, line) in [
        (
            "function f() { throw new TypeError('bad') }\nf()",
            "TypeError",
            "    at cell-1.js:2:1",
        ),
        ("await 1\nf()\n1", "TypeError", "    at cell-2.js:2:1"),
        ("x +", "SyntaxError", "SyntaxError: Unexpected end of input"),
        ("throw 3", "Uncaught", "Uncaught 3"),
        ("throw null", "Uncaught", "Uncaught null"),
        (
            "function r() { r() }\nr()",
            "RangeError",
            "RangeError: Maximum call stack size exceeded",
        ),
        (
            "await Promise.reject(new Error('no'))",
            "Error",
            "Error: no",
        ),
        ("await import('./nowhere.mjs')", "Error", ""),
    ] {
        let ran = code.run_in(Language::Javascript, source).await;
        assert_eq!(ran.outcome(), Outcome::Failed, "{source}");
        let error = ran.error.unwrap();
        assert_eq!(error.name, name, "{source}");
        let told = &error.traceback;
        assert!(
            line.is_empty() || told.iter().any(|told| told == line),
            "{source}: {told:?}"
        );
        assert!(
            told.iter().all(|line| !line.contains("soulbox-runner")),
            "{told:?}"
        );
    }
    // What fails between runs is said, and nothing ends.
    let ran = code
        .run_in(
            Language::Javascript,
            "setTimeout(() => { throw new Error('late') }, 1); Promise.reject(7); \
             await new Promise((done) => setTimeout(done, 50)); 'alive'",
        )
        .await;
    assert_eq!(ran.value(), "'alive'");
    assert!(ran.err().contains("late") && ran.err().contains("Uncaught 7"));
    let ran = code.run_in(Language::Javascript, "process.exit(4)").await;
    assert_eq!(ran.finished.ended, Some(Ended::ExitCode(4)));
}

#[tokio::test]
async fn typescript_is_run_or_says_what_is_missing() {
    let guest = Guest::start().await;
    let mut code = Interpreters::of(&guest).await;
    match code
        .try_run(run(
            Language::Typescript,
            "interface P { x: number }\nconst p: P = { x: 1 }",
        ))
        .await
    {
        Ok(ran) => {
            ran.ok();
            let ran = code
                .run_in(Language::Typescript, "enum E { A = 4 }; (p as P).x + E.A")
                .await;
            assert_eq!(ran.value(), "5");
        }
        Err(status) => {
            assert_eq!(reason(&status).0, "INTERPRETER_NOT_FOUND");
            assert!(status.message().contains("sucrase"), "{status:?}");
        }
    }
}

#[tokio::test]
async fn bash_keeps_its_state() {
    let guest = Guest::start().await;
    let mut code = Interpreters::of(&guest).await;
    let source = "cd /usr; x='a b'; declare -A m=([k]=v); f() { echo \"f:$1\"; }; export Y=2";
    code.run_in(Language::Bash, source).await.ok();
    let ran = code
        .run_in(
            Language::Bash,
            "pwd; f \"$x\"; echo ${m[k]}; bash -c 'echo $Y'; echo e >&2",
        )
        .await
        .ok();
    assert_eq!((ran.out(), ran.err()), ("/usr\nf:a b\nv\n2\n", "e\n"));
    for (source, status) in [
        ("false", "1"),
        ("(exit 37)", "37"),
        ("nosuchcommand", "127"),
        ("echo 'a", "2"),
        ("kill -9 $BASHPID & wait $!", "137"),
    ] {
        let ran = code.run_in(Language::Bash, source).await;
        assert_eq!(ran.outcome(), Outcome::Failed, "{source}");
        let error = ran.error.unwrap();
        assert_eq!(
            (error.name.as_str(), error.value.as_str()),
            ("ExitStatus", status),
            "{source}"
        );
    }
    // What it starts has no way to the agent.
    let ran = code.run_in(Language::Bash, "set -x; true >&3").await;
    assert_eq!(ran.outcome(), Outcome::Failed);
    let ran = code.run_in(Language::Bash, "echo ${m[k]}").await.ok();
    assert_eq!((ran.out(), ran.err()), ("v\n", ""));
    let ran = code.run_in(Language::Bash, "exit 9").await;
    assert_eq!(ran.finished.ended, Some(Ended::ExitCode(9)));
}

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
