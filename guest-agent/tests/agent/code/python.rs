//! Python with this machine's interpreter.

use soulbox_proto::guest::v1::run_finished::{Ended, Outcome};
use soulbox_proto::guest::v1::*;

use crate::common::interpreters::*;
use crate::common::*;

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
