//! From nothing, from a snapshot, from a running sandbox: how long until a guest
//! runs, and what it takes.

use anyhow::{Result, bail};

use crate::report::Report;
use crate::scratch::Scratch;

mod client;
mod crowd;
mod daemon;
mod linux;
mod tiny;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// What runs in the machines [default: linux with --host or --daemon, else tiny]
    #[arg(long, value_enum)]
    guest: Option<Guest>,
    /// How many times each quantity is measured [default: 200 with tiny guests, 10
    /// with Linux]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    runs: Option<u32>,
    #[command(flatten)]
    scratch: Scratch,
    #[command(flatten)]
    tiny: tiny::Options,
    #[command(flatten)]
    linux: linux::Options,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Guest {
    /// A few instructions on the monitor itself
    Tiny,
    /// Sandboxes of a soulboxd
    Linux,
}

pub(crate) fn run(options: &Options) -> Result<Report> {
    let has_daemon = options.linux.names_a_daemon();
    let guest = options.guest.unwrap_or(match has_daemon {
        true => Guest::Linux,
        false => Guest::Tiny,
    });
    match guest {
        Guest::Tiny => tiny::run(&options.tiny, &options.scratch, options.runs.unwrap_or(200)),
        Guest::Linux if has_daemon => {
            linux::run(&options.linux, &options.scratch, options.runs.unwrap_or(10))
        }
        Guest::Linux => bail!(
            "Linux guests are run by a soulboxd: name a running one with --host unix:SOCKET, \
             or have one started with --daemon BIN_DIR --templates DIR"
        ),
    }
}
