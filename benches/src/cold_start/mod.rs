//! From nothing, from a snapshot, from a running sandbox: how long until a guest
//! runs, and what it takes.

use anyhow::Result;

use crate::report::Report;
use crate::scratch::Scratch;

mod crowd;
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
    let guest = options
        .guest
        .unwrap_or(match options.linux.soulboxd.names_one() {
            true => Guest::Linux,
            false => Guest::Tiny,
        });
    match guest {
        Guest::Tiny => tiny::run(&options.tiny, &options.scratch, options.runs.unwrap_or(200)),
        Guest::Linux => linux::run(&options.linux, &options.scratch, options.runs.unwrap_or(10)),
    }
}
