//! Many clones of one tiny guest: forks, and a crowd that is alive at once.

use std::panic::resume_unwind;
use std::path::Path;
use std::thread::available_parallelism;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use soulbox_vmm::testing::Monitor;

use crate::clock::{ms_since, now_ns};
use crate::limits;
use crate::machine::{self, SharedConsole, Snapshot};
use crate::memory::{Footprint, available_kib};
use crate::report::{Promise, Report, Row, progress};
use crate::scratch::Scratch;

const THREADS_PER_CPU: usize = 4;

/// Forks of one guest, and the memory of the children.
#[derive(Default)]
pub(super) struct Forks {
    rows: Vec<Row>,
    private_kib: Vec<f64>,
    own_kib: Vec<f64>,
    shared_kib: Vec<f64>,
}

/// Where clones come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// Shells that are there already.
    Shells,
    /// New processes.
    Spawned,
}

// === impl Forks ===

impl Forks {
    /// Snapshot of a parent, and as many restores into shells; the time is until
    /// every child has run. The parent is kept paused: the tiny guest waits in a
    /// loop, and would take a CPU from its children, which a guest that idles
    /// does not.
    pub(super) fn measure(
        &mut self,
        program: &Path,
        scratch: &Scratch,
        children: u32,
        runs: u32,
    ) -> Result<()> {
        let mut samples = Vec::new();
        let bar = progress(u64::from(runs))?;
        for _ in 0..runs {
            let mut parent = machine::spawn(program)?;
            machine::boot(&mut parent, 0)?;
            let memory_mib = crate::guest::memory_mib(0);
            let mut shells: Vec<_> = (0..children)
                .map(|_| machine::prepare(program, memory_mib))
                .collect::<Result<_>>()?;
            let mut console = SharedConsole::new()?;
            let folder = scratch.folder()?;

            let start = now_ns();
            let (snapshot, _) = Snapshot::take(&mut parent, 0, folder, true)?;
            start_all(&snapshot, &mut shells, &console)?;
            console.await_restored(shells.len())?;
            samples.push(ms_since(start));

            self.weigh(&mut shells)?;
            end_all(shells);
            bar.inc(1);
        }
        bar.finish_and_clear();
        let name = format!("fork of {children}: Snapshot to every child's first byte");
        self.rows.push(Row::new(name, "ms", samples));
        Ok(())
    }

    fn weigh(&mut self, clones: &mut [Monitor]) -> Result<()> {
        // Pages that only one process has mapped count as private: a clone among
        // others is what is wanted.
        if clones.len() < 2 {
            return Ok(());
        }
        for clone in clones {
            let footprint = Footprint::of(clone.pid())?;
            let memory = clone.control().metrics()?.memory.unwrap_or_default();
            let guest_kib = memory.guest_private_bytes as f64 / 1024.0;
            self.private_kib.push(footprint.private_kib);
            self.own_kib.push(footprint.private_kib - guest_kib);
            self.shared_kib.push(footprint.shared_kib);
        }
        Ok(())
    }

    pub(super) fn report(self, report: &mut Report) {
        report.rows.extend(self.rows);
        let private = Row::new("clone: private memory", "KiB", self.private_kib);
        let own = Row::new("clone: of it, outside guest RAM", "KiB", self.own_kib);
        let shared = Row::new("clone: shared with other processes", "KiB", self.shared_kib);
        report.promises.push(Promise::at_most(
            "private memory of an idle clone's process, p50 KiB",
            private.p50,
            1024.0,
        ));
        report.rows.extend([private, own, shared]);
    }
}

/// Starts so many clones and keeps them all, from shells and from nothing.
pub(super) fn alive(
    program: &Path,
    scratch: &Scratch,
    clones: u32,
    report: &mut Report,
) -> Result<()> {
    // A clone takes two here.
    limits::allow_descriptors()?;
    let snapshot = Snapshot::of_new_guest(program, 0, scratch.folder()?)?;
    for source in [Source::Shells, Source::Spawned] {
        let before_kib = available_kib()?;
        let mut console = SharedConsole::new()?;
        let mut crowd = Vec::new();
        if source == Source::Shells {
            crowd = make_all(clones, || machine::prepare(program, snapshot.memory_mib()))?;
        }
        let start = now_ns();
        match source {
            Source::Shells => start_all(&snapshot, &mut crowd, &console)?,
            Source::Spawned => {
                crowd = make_all(clones, || {
                    let mut monitor = machine::spawn(program)?;
                    snapshot.restore_to(&mut monitor, false, console.writer())?;
                    Ok(monitor)
                })?;
            }
        }
        console
            .await_restored(crowd.len())
            .with_context(|| format!("waiting for {clones} clones"))?;
        let took = ms_since(start);
        let taken_kib = before_kib - available_kib()?;

        let from = match source {
            Source::Shells => "in shells that were there",
            Source::Spawned => "spawn included",
        };
        report.promises.push(Promise::at_most(
            format!("{clones} clones alive, {from}, seconds"),
            took / 1e3,
            3.0,
        ));
        report.rows.push(Row::new(
            format!("{clones} alive {from}: until the last one's byte"),
            "ms",
            vec![took],
        ));
        report.rows.push(Row::new(
            format!("{clones} alive {from}: host memory for each"),
            "KiB",
            vec![taken_kib / f64::from(clones)],
        ));
        let start = now_ns();
        end_all(crowd);
        report.rows.push(Row::new(
            format!("{clones} alive {from}: killed and reaped"),
            "ms",
            vec![ms_since(start)],
        ));
    }
    Ok(())
}

fn start_all(snapshot: &Snapshot, shells: &mut [Monitor], console: &SharedConsole) -> Result<()> {
    in_parallel(shells, |shell| {
        snapshot.restore_to(shell, true, console.writer())
    })
}

fn make_all(count: u32, make: impl Fn() -> Result<Monitor> + Sync) -> Result<Vec<Monitor>> {
    let mut made: Vec<_> = (0..count).map(|_| None).collect();
    in_parallel(&mut made, |slot| {
        *slot = Some(make()?);
        Ok(())
    })?;
    Ok(made.into_iter().flatten().collect())
}

/// All are killed before any is reaped.
fn end_all(crowd: Vec<Monitor>) {
    for monitor in &crowd {
        if let Some(pid) = Pid::from_raw(monitor.pid() as i32) {
            // Not reaped, so the number is still its; dropping kills it again.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// Does it on every item. Making a VM waits for the kernel's workers, so there are
/// more threads than CPUs.
fn in_parallel<T: Send>(items: &mut [T], f: impl Fn(&mut T) -> Result<()> + Sync) -> Result<()> {
    if let [item] = items {
        return f(item);
    }
    let threads = THREADS_PER_CPU * available_parallelism()?.get();
    let share = items.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        let threads: Vec<_> = items
            .chunks_mut(share)
            .map(|share| scope.spawn(|| share.iter_mut().try_for_each(&f)))
            .collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })
}
