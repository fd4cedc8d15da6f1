//! SoulBox's measurements of itself. Each subcommand is one bench; each gives a
//! table for a person, JSON for a script, and fails when a promise is broken.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod boot;
mod floor;
mod monitor;
mod report;
mod vmm;

/// Measures SoulBox on this machine.
#[derive(Debug, Parser)]
#[command(name = "soulbox-benches", version)]
struct Cli {
    /// Write the figures as JSON to this file; "-" for standard output,
    /// instead of the table
    #[arg(long, global = true, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// The monitor with tiny guests, beside the bare sequence of ioctls
    Vmm(vmm::Options),
    /// A Linux guest's cold boot, beside the same kernel with a bare init
    Boot(boot::Options),
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    let report = match cli.bench {
        Bench::Vmm(options) => vmm::run(&options)?,
        Bench::Boot(options) => boot::run(&options)?,
    };
    report.write(cli.json.as_deref())?;
    Ok(if report.promises_kept() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
