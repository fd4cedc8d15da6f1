//! JavaScript, TypeScript and Bash with this machine's interpreters.

use soulbox_proto::guest::v1::run_finished::{Ended, Outcome};
use soulbox_proto::guest::v1::*;

use crate::common::interpreters::*;
use crate::common::*;

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
