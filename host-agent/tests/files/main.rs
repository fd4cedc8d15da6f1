//! `soulbox mount` and `soulbox cp`, the real programs, against the real agent as a
//! process of this machine, and against one that lies.
//!
//! This same binary is that agent: with `--serve-unix` it serves, without, it runs
//! the tests. Nothing here needs a virtual machine; /dev/fuse and root are needed.

#![allow(clippy::unwrap_used, unreachable_pub)]

mod copy;
mod hostile;
mod mount;
mod world;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};
use soulbox_guest::options::{Options, Wanted};

type Case = (&'static str, fn());

fn main() -> ExitCode {
    if std::env::args().any(|argument| argument == "--serve-unix") {
        let arguments = std::env::args_os().skip(1);
        let Ok(Wanted::Run(options)) = Options::parse(arguments, std::process::id()) else {
            panic!("the agent has other options now");
        };
        soulbox_guest::run(options).unwrap();
        return ExitCode::SUCCESS;
    }
    assert!(
        rustix::process::geteuid().is_root(),
        "these tests mount: run them as root"
    );
    let cases = [mount::ALL, copy::ALL, hostile::ALL].concat();
    let trials = cases
        .into_iter()
        .map(|(name, case): Case| {
            Trial::test(name, move || {
                case();
                Ok(())
            })
        })
        .collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
