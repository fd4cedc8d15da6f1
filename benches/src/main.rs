//! SoulBox's measurements of itself. Each subcommand is one bench; each gives a
//! table for a person, JSON for a script, and fails when a promise is broken.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod agent;
mod boot;
mod client;
mod clock;
mod cold_start;
mod compare;
mod daemon;
mod floor;
mod guest;
mod limits;
mod machine;
mod memory;
mod monitor;
mod net;
mod picture;
mod report;
mod scratch;
mod services;
mod stages;

/// Measures SoulBox on this machine.
#[derive(Debug, Parser)]
#[command(name = "soulbox-benches", version)]
struct Cli {
    /// Write the figures as JSON to this file; "-" for standard output,
    /// instead of the table
    #[arg(long, global = true, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the distributions of all times as SVG to this file
    #[arg(long, global = true, value_name = "FILE")]
    svg: Option<PathBuf>,
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, Subcommand)]
enum Bench {
    /// Cold boot, restore, pause, fork and teardown, and their memory: tiny guests
    /// on the monitor itself, or Linux through a soulboxd
    #[command(alias = "vmm")]
    ColdStart(cold_start::Options),
    /// The same tiny guest through another monitor, side by side
    Compare(compare::Options),
    /// Network slots and what a network adds to a restore: tiny guests on the monitor
    /// itself; or what goes through it, with sandboxes of a soulboxd
    Net(net::Options),
    /// What a guest's agent serves: programs, code, files, a mount of them, and what it
    /// takes when idle
    Guest(services::Options),
    /// A Linux guest's cold boot, beside the same kernel with a bare init
    Boot(boot::Options),
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    let report = match cli.bench {
        Bench::ColdStart(options) => cold_start::run(&options)?,
        Bench::Compare(options) => compare::run(&options)?,
        Bench::Net(options) => net::run(&options)?,
        Bench::Guest(options) => services::run(&options)?,
        Bench::Boot(options) => boot::run(&options)?,
    };
    report.write(cli.json.as_deref())?;
    if let Some(path) = &cli.svg {
        picture::draw(&report, path)?;
    }
    Ok(if report.promises_kept() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
