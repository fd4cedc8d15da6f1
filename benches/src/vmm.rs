//! The monitor with guests of a few instructions, beside the floor. All that is
//! compared is measured in turns within one run.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use soulbox_proto::vmm::v1::{self, reply::Result as Reply, request::Op};
use soulbox_vmm::machine::layout::COM1_PORT;
use soulbox_vmm::testing::{BootSpec, Monitor, code, tiny_guest};

use crate::floor;
use crate::report::{Host, Promise, Report, Row, progress};

const MEMORY_MIB: u32 = 128;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How many times each quantity is measured
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// The monitor to measure [default: soulbox-vmm beside this program]
    #[arg(long, value_name = "PATH")]
    monitor: Option<PathBuf>,
}

#[derive(Default)]
struct Samples {
    floor: Vec<f64>,
    spawn_to_first: Vec<f64>,
    boot_to_first: Vec<f64>,
    boot_reply: Vec<f64>,
    stop: Vec<f64>,
    private_kib: Vec<f64>,
}

pub(crate) fn run(options: &Options) -> Result<Report> {
    let program = crate::monitor::find(options.monitor.as_ref())?;
    let kvm = floor::open_kvm()?;
    let guest = tiny_guest(&[&code::out(COM1_PORT, b'.')[..], &code::HALT].concat());

    let bar = progress(u64::from(options.runs))?;
    let mut samples = Samples::default();
    // The first rounds warm the page cache and the allocator's; they are not kept.
    let warm_up = 5;
    for round in 0..options.runs + warm_up {
        if round == warm_up {
            samples = Samples::default();
        }
        samples.floor.push(ms(floor::to_first_exit(&kvm)?));
        spawned_for_it(&program, &guest, &mut samples)?;
        waiting_for_it(&program, &guest, &mut samples)?;
        bar.set_position(u64::from(round.saturating_sub(warm_up - 1)));
    }
    bar.finish_and_clear();

    let floor = Row::new(
        "floor: ioctls to first exit, in process",
        "ms",
        samples.floor,
    );
    let spawn = Row::new("spawn to first instruction", "ms", samples.spawn_to_first).beside(&floor);
    let boot = Row::new(
        "Boot to first instruction, monitor waiting",
        "ms",
        samples.boot_to_first,
    )
    .beside(&floor);
    let reply = Row::new("Boot to reply, monitor waiting", "ms", samples.boot_reply).beside(&floor);
    let stop = Row::new("Shutdown to process gone", "ms", samples.stop);
    let private = Row::new(
        "private memory outside guest RAM",
        "KiB",
        samples.private_kib,
    );
    let promises = vec![
        Promise::at_most("spawn to first instruction, p50 ms", spawn.p50, 4.0),
        Promise::at_most(
            "Boot to first instruction, p50 × floor",
            boot.p50 / floor.p50,
            3.0,
        ),
        Promise::at_most("private memory, p50 KiB", private.p50, 4096.0),
    ];
    Ok(Report {
        bench: "vmm",
        host: Host::here()?,
        rows: vec![floor, spawn, boot, reply, stop, private],
        promises,
    })
}

/// A process started for this machine alone.
fn spawned_for_it(program: &Path, guest: &[u8], samples: &mut Samples) -> Result<()> {
    let (spec, mut console) = BootSpec::new(1, MEMORY_MIB, guest)?.with_console()?;
    let start = Instant::now();
    let mut monitor = Monitor::spawn(program).context("starting the monitor")?;
    monitor.control().boot(spec)?;
    console.read_exact(&mut [0])?;
    samples.spawn_to_first.push(ms(start.elapsed()));
    samples.private_kib.push(private_kib(monitor.pid())?);

    let start = Instant::now();
    let reply = monitor
        .control()
        .request(Op::Shutdown(v1::Shutdown {}), &[])?;
    ensure!(matches!(reply, Reply::ShuttingDown(_)), "{reply:?}");
    monitor.control().exited()?;
    monitor.wait()?;
    samples.stop.push(ms(start.elapsed()));
    Ok(())
}

/// A process that was there already, jailed and waiting for Boot.
fn waiting_for_it(program: &Path, guest: &[u8], samples: &mut Samples) -> Result<()> {
    let mut monitor = Monitor::spawn(program).context("starting the monitor")?;
    // Once it answers, it waits.
    let refused = monitor
        .control()
        .request(Op::GetMetrics(v1::GetMetrics {}), &[])?;
    ensure!(matches!(refused, Reply::Error(_)), "{refused:?}");
    let (spec, mut console) = BootSpec::new(1, MEMORY_MIB, guest)?.with_console()?;
    let start = Instant::now();
    monitor.control().boot(spec)?;
    samples.boot_reply.push(ms(start.elapsed()));
    console.read_exact(&mut [0])?;
    samples.boot_to_first.push(ms(start.elapsed()));
    Ok(())
}

/// Private pages of a process outside its guest's memory file, in KiB.
fn private_kib(pid: u32) -> Result<f64> {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).context("reading smaps")?;
    let mut in_guest_memory = false;
    let mut sum = 0.0;
    for line in smaps.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        if line.contains('-') && !line.ends_with("kB") {
            in_guest_memory = line.contains("/memfd:memory");
        } else if key.starts_with("Private_") && !in_guest_memory {
            let kib = value.trim().trim_end_matches(" kB");
            sum += kib.parse::<f64>().with_context(|| line.to_owned())?;
        }
    }
    Ok(sum)
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
