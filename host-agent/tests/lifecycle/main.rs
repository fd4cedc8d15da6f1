//! The life of sandboxes in the real soulboxd, over a monitor that is faked.
//!
//! The daemon starts this same binary as its monitor: with `--control-fd` it
//! speaks the control protocol and serves a toy agent over vsock; without, it
//! runs the tests. What real guests do is tested in `guest`.

#![allow(clippy::unwrap_used, unreachable_pub)]

#[path = "../support/mod.rs"]
mod support;

mod agent;
mod cases;
mod monitor;
mod pty;
mod raw;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

fn main() -> ExitCode {
    if std::env::args().any(|arg| arg == "--control-fd") {
        monitor::main();
    }
    let trials = cases::ALL
        .iter()
        .map(|(name, case)| {
            Trial::test(*name, || {
                let runtime = tokio::runtime::Builder::new_multi_thread()
                    .worker_threads(2)
                    .enable_all()
                    .build()
                    .unwrap();
                runtime.block_on(case());
                Ok(())
            })
        })
        .collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
