//! Real Linux guests: soulboxd, soulbox, the monitor, a Debian template. Where
//! this machine's CPU cannot run them, the tests start themselves again through
//! `images/bench/run`.

#![allow(clippy::unwrap_used)] // without libtest nothing is cfg(test)

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use libtest_mimic::{Arguments, Failed, Trial};

mod guests;
mod support;

/// Set where the launcher has started this program.
const INSIDE: &str = "SOULBOX_GUEST_TESTS_INSIDE";

fn main() {
    let mut args = Arguments::from_args();
    // One after the other: emulated guests get nothing from more.
    args.test_threads.get_or_insert(1);
    if !args.list
        && let Some(error) = move_to_bench()
    {
        eprintln!("{error}");
        std::process::exit(1);
    }
    let trials = guests::ALL
        .iter()
        .map(|(name, test)| Trial::test(*name, move || run(*test)))
        .collect();
    libtest_mimic::run(&args, trials).exit();
}

fn run(test: fn() -> anyhow::Result<()>) -> Result<(), Failed> {
    test().map_err(|error| format!("{error:?}").into())
}

/// Replaces this process by the launcher with this program in it, unless it is
/// inside already. Returns only with what went wrong.
fn move_to_bench() -> Option<String> {
    if std::env::var_os(INSIDE).is_some() {
        return None;
    }
    let templates = guests::template_dir();
    let Ok(templates) = templates.canonicalize() else {
        let path = templates.display();
        return Some(format!(
            "there is no template in {path}: run make images first"
        ));
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let this = std::env::current_exe().unwrap();
    let mut launcher = Command::new(root.join("images/bench/run"));
    for file in [
        this.as_path(),
        Path::new(env!("CARGO_BIN_EXE_soulboxd")),
        Path::new(env!("CARGO_BIN_EXE_soulbox")),
        guests::monitor().as_path(),
        templates.as_path(),
    ] {
        launcher.arg("--file").arg(file);
    }
    launcher
        .arg("--env")
        .arg(format!("{INSIDE}=1"))
        .arg("--")
        .arg(&this)
        .args(std::env::args_os().skip(1));
    let error = launcher.exec();
    Some(format!("images/bench/run could not be started: {error}"))
}
