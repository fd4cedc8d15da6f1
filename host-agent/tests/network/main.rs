//! Network slots, in real namespaces of this kernel.
//!
//! Each test has a network and a mount namespace of its own, which play the host,
//! and in them another network namespace, which plays the internet. A guest is a
//! third, with the slot's TAP as the only way out of it: a whole Linux network
//! stack, without a machine. With `--daemon` this binary is a daemon to be killed.

#![allow(clippy::unwrap_used, unreachable_pub)]

mod cases;
mod daemon;
mod guest;
mod world;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

fn main() -> ExitCode {
    if let Some(kill_at) = std::env::args().skip_while(|arg| arg != "--daemon").nth(1) {
        daemon::main(&kill_at);
    }
    let trials = cases::ALL
        .iter()
        .map(|(name, case)| {
            Trial::test(*name, || {
                world::run(*case);
                Ok(())
            })
        })
        .collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
