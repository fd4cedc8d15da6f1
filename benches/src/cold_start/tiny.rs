//! The monitor with guests of a few instructions, beside the floor. All that is
//! compared is measured in turns within one run.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use kvm_ioctls::Kvm;
use soulbox_proto::vmm::v1::{self, request::Op};

use super::crowd::{self, Forks};
use crate::clock::{ms_between, ms_since, now_ns};
use crate::floor;
use crate::guest;
use crate::machine::{self, Snapshot};
use crate::report::{Promise, Report, Row, ms, progress};
use crate::scratch::Scratch;
use crate::stages::Stages;

/// What is dirty when a machine is snapshotted, in MiB.
const DIRTY_MIB: [u32; 3] = [7, 64, 512];
/// Rounds that warm the page cache and the allocators; they are not kept.
const WARM_UP: u32 = 5;
/// How old a VM is before it is ended. Making one leaves SRCU callbacks
/// behind that its end waits for (srcu_barrier in kvm_destroy_vm): until it is
/// 12 ms old its end takes 12 ms, afterwards one. No sandbox lives that short.
const SETTLED: Duration = Duration::from_millis(50);
/// The slow quantities are measured less often.
const SLOW_RUNS: u32 = 10;

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Tiny guests")]
#[group(id = "tiny")]
pub(crate) struct Options {
    /// The monitor to measure [default: soulbox-vmm beside this program]
    #[arg(long, value_name = "PATH")]
    monitor: Option<PathBuf>,
    /// Also start this many clones that are alive at once
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    alive: Option<u32>,
}

#[derive(Default)]
struct Starts {
    floor: Vec<f64>,
    spawn_to_boot: Vec<f64>,
    wait_to_boot: Vec<f64>,
    without_shell: Vec<f64>,
    shell_to_run: Vec<f64>,
    shell_to_exit: Vec<f64>,
    shell_to_byte: Vec<f64>,
    shell_stages: Stages,
    shut_down: Vec<f64>,
    killed: Vec<f64>,
}

/// One size of dirty memory.
#[derive(Default)]
struct Saves {
    snapshot: Vec<f64>,
    paused: Vec<f64>,
    copy: Vec<f64>,
    resume: Vec<f64>,
}

pub(crate) fn run(options: &Options, scratch: &Scratch, runs: u32) -> Result<Report> {
    let program = crate::monitor::find(options.monitor.as_ref())?;
    let mut report = Report::new("cold-start")?;
    let slow_runs = runs.min(SLOW_RUNS);
    starts(&program, scratch, runs, &mut report)?;
    for dirty_mib in DIRTY_MIB {
        saves(&program, scratch, dirty_mib, slow_runs, &mut report)?;
    }
    let mut forks = Forks::default();
    for (children, runs) in [(1, runs), (10, slow_runs), (100, slow_runs.min(5))] {
        forks.measure(&program, scratch, children, runs)?;
    }
    forks.report(&mut report);
    if let Some(clones) = options.alive {
        crowd::alive(&program, scratch, clones, &mut report)?;
    }
    Ok(report)
}

fn starts(program: &Path, scratch: &Scratch, runs: u32, report: &mut Report) -> Result<()> {
    let kvm = floor::open_kvm()?;
    let snapshot = Snapshot::of_new_guest(program, 0, scratch.folder()?)?;
    let bar = progress(u64::from(runs))?;
    let mut samples = Starts::default();
    for round in 0..runs + WARM_UP {
        if round == WARM_UP {
            samples = Starts::default();
        }
        samples.round(program, &kvm, &snapshot)?;
        bar.set_position(u64::from((round + 1).saturating_sub(WARM_UP)));
    }
    bar.finish_and_clear();
    samples.report(report);
    Ok(())
}

// === impl Starts ===

impl Starts {
    /// All of it in turns. The shell is there before the rest, as in a pool; what
    /// comes just before its restore keeps the host awake.
    fn round(&mut self, program: &Path, kvm: &Kvm, snapshot: &Snapshot) -> Result<()> {
        let mut shell = machine::prepare(program, snapshot.memory_mib())?;
        self.restore_without_shell(program, snapshot)?;
        self.cold_boots(program)?;
        self.floor.push(ms(floor::to_first_exit(kvm)?));

        let started = snapshot.restore(&mut shell, true)?;
        self.shell_to_run
            .push(ms_between(started.sent_ns, started.kvm_run_ns));
        self.shell_to_byte
            .push(ms_between(started.sent_ns, started.byte_ns));
        let first_exit_ns = machine::first_exit_ns(&mut shell)?;
        self.shell_to_exit
            .push(ms_between(started.sent_ns, first_exit_ns));
        self.shell_stages.add(started.stages());

        let start = now_ns();
        machine::shut_down(&mut shell)?;
        self.shut_down.push(ms_since(start));
        Ok(())
    }

    fn restore_without_shell(&mut self, program: &Path, snapshot: &Snapshot) -> Result<()> {
        let start = now_ns();
        let mut monitor = machine::spawn(program)?;
        let started = snapshot.restore(&mut monitor, false)?;
        self.without_shell.push(ms_between(start, started.byte_ns));

        std::thread::sleep(SETTLED);
        let start = now_ns();
        // Kills and reaps.
        drop(monitor);
        self.killed.push(ms_since(start));
        Ok(())
    }

    fn cold_boots(&mut self, program: &Path) -> Result<()> {
        let start = now_ns();
        let mut monitor = machine::spawn(program)?;
        let started = machine::boot(&mut monitor, 0)?;
        self.spawn_to_boot.push(ms_between(start, started.byte_ns));
        drop(monitor);

        let mut waiting = machine::spawn(program)?;
        // Once it answers, jailed and with nothing to measure, it waits.
        let metrics = Op::GetMetrics(v1::GetMetrics {});
        waiting.control().request(metrics, &[])?;
        let started = machine::boot(&mut waiting, 0)?;
        self.wait_to_boot
            .push(ms_between(started.sent_ns, started.byte_ns));
        Ok(())
    }

    fn report(self, report: &mut Report) {
        let floor = Row::new("floor: ioctls to first exit, in process", "ms", self.floor);
        let row = |name, samples| Row::new(name, "ms", samples).beside(&floor);
        let cold = row("cold boot: spawn to first byte", self.spawn_to_boot);
        let waiting = row("cold boot: Boot to first byte, no spawn", self.wait_to_boot);
        let without = row("restore, no shell: spawn to first byte", self.without_shell);
        let to_run = row(
            "restore into a shell: Restore to KVM_RUN",
            self.shell_to_run,
        );
        let to_exit = row(
            "restore into a shell: Restore to first exit",
            self.shell_to_exit,
        );
        let to_byte = row(
            "restore into a shell: Restore to first byte",
            self.shell_to_byte,
        );
        let shut_down = Row::new("teardown: Shutdown to process gone", "ms", self.shut_down);
        let killed = Row::new("teardown: SIGKILL to process reaped", "ms", self.killed);
        report.promises.extend([
            Promise::at_most("cold boot from spawn, p50 ms", cold.p50, 4.0),
            Promise::at_most(
                "cold boot without spawn, p50 × floor",
                waiting.times(&floor),
                3.0,
            ),
            Promise::at_most("restore without a shell, p50 ms", without.p50, 3.0),
            Promise::at_most(
                "restore into a shell to first exit, p50 × floor",
                to_exit.times(&floor),
                1.5,
            ),
            Promise::at_most(
                "restore into a shell to first exit, p50 ms",
                to_exit.p50,
                0.7,
            ),
            Promise::at_most(
                "restore into a shell to first byte, p99 ms",
                to_byte.p99,
                3.0,
            ),
            Promise::at_most("teardown by Shutdown, p50 ms", shut_down.p50, 1.0),
        ]);
        report
            .rows
            .extend([floor, cold, waiting, without, to_run, to_exit, to_byte]);
        self.shell_stages.report(report);
        report.rows.extend([shut_down, killed]);
    }
}

fn saves(
    program: &Path,
    scratch: &Scratch,
    dirty_mib: u32,
    runs: u32,
    report: &mut Report,
) -> Result<()> {
    let copied = vec![1; (dirty_mib as usize) << 20];
    let bar = progress(u64::from(runs))?;
    let mut samples = Saves::default();
    for _ in 0..runs {
        samples.save(program, scratch, dirty_mib, &copied)?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    samples.report(dirty_mib, report);
    Ok(())
}

// === impl Saves ===

impl Saves {
    fn save(
        &mut self,
        program: &Path,
        scratch: &Scratch,
        dirty_mib: u32,
        copied: &[u8],
    ) -> Result<()> {
        let folder = scratch.folder()?;
        let start = now_ns();
        guest::copy_to(folder.path(), copied)?;
        self.copy.push(ms_since(start));

        let mut parent = machine::spawn(program)?;
        machine::boot(&mut parent, dirty_mib)?;
        let start = now_ns();
        let (snapshot, snapshotted) = Snapshot::take(&mut parent, dirty_mib, folder, false)?;
        self.snapshot.push(ms_since(start));
        self.paused.push(snapshotted.paused_ns as f64 / 1e6);
        drop(parent);

        let mut shell = machine::prepare(program, snapshot.memory_mib())?;
        let started = snapshot
            .restore(&mut shell, true)
            .with_context(|| format!("resuming with {dirty_mib} MiB"))?;
        self.resume
            .push(ms_between(started.sent_ns, started.byte_ns));
        Ok(())
    }

    fn report(self, dirty_mib: u32, report: &mut Report) {
        let row =
            |what: &str, samples| Row::new(format!("{dirty_mib} MiB dirty: {what}"), "ms", samples);
        let copy = row("as many bytes to a new file", self.copy);
        let snapshot = row("Snapshot to its reply", self.snapshot);
        let paused = row("of it, the guest stands still", self.paused);
        let resume = row("resumed in a shell, to first byte", self.resume);
        if dirty_mib == DIRTY_MIB[0] {
            let promise = format!("pause with {dirty_mib} MiB dirty, p50 × copying them");
            let ratio = paused.times(&copy);
            report.promises.push(Promise::at_most(promise, ratio, 5.0));
        }
        report.rows.extend([copy, snapshot, paused, resume]);
    }
}
