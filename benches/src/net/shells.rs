//! What a network adds to a restore into a shell.

use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use kvm_ioctls::Kvm;
use soulbox_host::net::Slot;
use soulbox_vmm::testing::Monitor;

use super::slots::{READY, Slots};
use crate::clock::{ms_between, ms_since, now_ns};
use crate::floor;
use crate::machine::{self, Snapshot, Started};
use crate::report::{Promise, Report, Row, ms, progress};
use crate::scratch::Scratch;

/// Rounds that warm the page cache and the allocators; they are not kept.
const WARM_UP: u32 = 5;
/// How old a VM is at least before it is ended, as in `cold-start`.
const SETTLED: Duration = Duration::from_millis(50);

/// What a guest is restored with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum With {
    NoDevice,
    /// A device whose link is down.
    NoTap,
    /// The TAP of a slot that was taken before, when no other is being made.
    Tap,
    /// As a create does it: taking the slot is in the time, and the next one is being
    /// made meanwhile.
    Take,
}

/// Times to the first byte, by the place in [`With::ALL`].
#[derive(Default)]
struct Starts {
    floor: Vec<f64>,
    to_byte: [Vec<f64>; With::ALL.len()],
    /// Shutdown to the process being gone.
    shut_down: [Vec<f64>; With::ALL.len()],
}

/// The snapshots of a guest without a network device and of one with it.
struct Snapshots {
    without: Snapshot,
    with: Snapshot,
}

pub(super) fn measure(
    program: &Path,
    scratch: &Scratch,
    runs: u32,
    report: &mut Report,
) -> Result<()> {
    let kvm = floor::open_kvm()?;
    let snapshots = Snapshots {
        without: Snapshot::of_new_guest(program, 0, scratch.folder()?)?,
        with: Snapshot::of_new_guest_with_net(program, scratch.folder()?)?,
    };
    let slots = Slots::start(READY)?;
    let bar = progress(u64::from(runs))?;
    let mut starts = Starts::default();
    for round in 0..runs + WARM_UP {
        if round == WARM_UP {
            starts = Starts::default();
        }
        starts.round(program, &kvm, &snapshots, &slots, round as usize)?;
        bar.set_position(u64::from((round + 1).saturating_sub(WARM_UP)));
    }
    bar.finish_and_clear();
    slots.stop();
    starts.report(report);
    Ok(())
}

// === impl With ===

impl With {
    const ALL: [Self; 4] = [Self::NoDevice, Self::NoTap, Self::Tap, Self::Take];

    fn name(self) -> &'static str {
        match self {
            Self::NoDevice => "without a network device",
            Self::NoTap => "with one whose link is down",
            Self::Tap => "on the TAP of a slot",
            Self::Take => "taking a slot, on its TAP",
        }
    }
}

// === impl Snapshots ===

impl Snapshots {
    fn of(&self, with: With) -> &Snapshot {
        match with {
            With::NoDevice => &self.without,
            With::NoTap | With::Tap | With::Take => &self.with,
        }
    }
}

// === impl Starts ===

impl Starts {
    /// All of it in turns, another one first each time. All shells are there before,
    /// as in a pool, and the floor comes before each restore: it keeps the host awake.
    fn round(
        &mut self,
        program: &Path,
        kvm: &Kvm,
        snapshots: &Snapshots,
        slots: &Slots,
        round: usize,
    ) -> Result<()> {
        let mut shells = With::ALL
            .iter()
            .map(|with| snapshots.of(*with).prepare(program))
            .collect::<Result<Vec<Monitor>>>()?;
        let Slot { index, tap, .. } = slots.take()?;
        let (mut used, mut early) = (vec![index], Some(tap));
        for turn in 0..With::ALL.len() {
            let place = (round + turn) % With::ALL.len();
            let with = With::ALL[place];
            slots.await_ready()?;
            self.floor.push(ms(floor::to_first_exit(kvm)?));

            let start = now_ns();
            let tap = match with {
                With::NoDevice | With::NoTap => None,
                With::Tap => early.take(),
                With::Take => {
                    let Slot { index, tap, .. } = slots.take()?;
                    used.push(index);
                    Some(tap)
                }
            };
            let took = ms_since(start);
            let snapshot = snapshots.of(with);
            let Started {
                sent_ns, byte_ns, ..
            } = snapshot.restore_on(&mut shells[place], true, tap)?;
            self.to_byte[place].push(took + ms_between(sent_ns, byte_ns));
        }
        slots.await_ready()?;
        std::thread::sleep(SETTLED);
        for (shell, samples) in shells.iter_mut().zip(&mut self.shut_down) {
            let start = now_ns();
            machine::shut_down(shell)?;
            samples.push(ms_since(start));
        }
        for index in used {
            slots.release(index)?;
        }
        Ok(())
    }

    fn report(self, report: &mut Report) {
        let floor = Row::new("floor: ioctls to first exit, in process", "ms", self.floor);
        let restores = rows("restore to first byte", self.to_byte).map(|row| row.beside(&floor));
        report.promises.push(Promise::at_most(
            "a create with a network, p50 ms later than without",
            restores[3].p50 - restores[0].p50,
            0.3,
        ));
        report.rows.push(floor);
        report.rows.extend(restores);
        // The last two are the same by then.
        let ends = rows("Shutdown to process gone", self.shut_down);
        report.rows.extend(ends.into_iter().take(3));
    }
}

fn rows(what: &str, samples: [Vec<f64>; With::ALL.len()]) -> [Row; With::ALL.len()] {
    let mut all = With::ALL.iter();
    samples.map(|samples| {
        let with = all.next().map_or("", |with| with.name());
        Row::new(format!("{what}, {with}"), "ms", samples)
    })
}
