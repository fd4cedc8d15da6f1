//! The network of sandboxes: what it adds to a create, and what goes through it.
//!
//! Natively, with tiny guests: slots, and restores onto their TAPs, in a network
//! namespace of the bench's own. What goes through the device is not measured
//! there: a guest's ring 0 is emulated, at 650 ns an instruction, and so would be
//! its driver. That is measured with Linux guests of a soulboxd, by iperf3.

use std::path::PathBuf;

use anyhow::Result;

use crate::report::Report;
use crate::scratch::Scratch;
use crate::{daemon, limits, monitor};

mod cpu;
mod host;
mod iperf;
mod linux;
mod shells;
mod slots;
mod traffic;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How many times each quantity is measured [default: 200 natively, 10 with Linux
    /// guests]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    runs: Option<u32>,
    #[command(flatten)]
    scratch: Scratch,
    #[command(flatten)]
    native: Native,
    #[command(flatten)]
    soulboxd: daemon::Options,
    #[command(flatten)]
    traffic: traffic::Options,
}

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Natively")]
#[group(id = "native")]
struct Native {
    /// The monitor to measure [default: soulbox-vmm beside this program]
    #[arg(long, value_name = "PATH")]
    monitor: Option<PathBuf>,
    /// How many slots to have at once
    #[arg(long, value_name = "N", default_value_t = 1000,
          value_parser = clap::value_parser!(u32).range(1..=4096))]
    slots: u32,
}

pub(crate) fn run(options: &Options) -> Result<Report> {
    let mut report = Report::new("net")?;
    if options.soulboxd.names_one() {
        report.bench = "net, Linux guests";
        let daemon = options.soulboxd.find(&options.scratch)?;
        let runs = options.runs.unwrap_or(10);
        linux::run(&daemon, &options.traffic, runs, &mut report)?;
        return Ok(report);
    }
    let runs = options.runs.unwrap_or(200);
    // It may have to be built, which nothing below should know of.
    let program = monitor::find(options.native.monitor.as_ref())?;
    host::enter()?;
    limits::allow_descriptors()?;
    shells::measure(&program, &options.scratch, runs, &mut report)?;
    slots::measure(runs, &mut report)?;
    slots::crowd(options.native.slots, &mut report)?;
    Ok(report)
}
