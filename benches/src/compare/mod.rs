//! The same tiny guest through SoulBox's monitor and through another, in turns
//! within one run.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, ensure};

use crate::clock::{ms_between, ms_since, now_ns};
use crate::floor;
use crate::machine::{self, Snapshot};
use crate::memory::Footprint;
use crate::report::{Report, Row, ms, progress};
use crate::scratch::Scratch;

mod firecracker;
mod http;

use firecracker::Firecracker;

/// Rounds that warm the page cache; they are not kept.
const WARM_UP: u32 = 3;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The other monitor: firecracker=PATH of its binary
    #[arg(long, value_name = "NAME=PATH")]
    peer: Option<Peer>,
    /// How many times each quantity is measured
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Our monitor [default: soulbox-vmm beside this program]
    #[arg(long, value_name = "PATH")]
    monitor: Option<PathBuf>,
    #[command(flatten)]
    scratch: Scratch,
}

/// A binary of Firecracker.
#[derive(Clone, Debug)]
struct Peer(PathBuf);

/// What is measured of each monitor.
#[derive(Default)]
struct Samples {
    boot: Vec<f64>,
    snapshot: Vec<f64>,
    restore: Vec<f64>,
    spawn_restore: Vec<f64>,
    private_kib: Vec<f64>,
    end: Vec<f64>,
}

// === impl Peer ===

impl FromStr for Peer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('=') {
            Some(("firecracker", path)) if !path.is_empty() => Ok(Self(path.into())),
            _ => Err("the only peer known is firecracker=PATH".into()),
        }
    }
}

pub(crate) fn run(options: &Options) -> Result<Report> {
    let Peer(peer) = options.peer.as_ref().context(
        "there is nothing to compare with: download a release of Firecracker and name its \
         binary with --peer firecracker=PATH",
    )?;
    ensure!(peer.is_file(), "{} is not a file", peer.display());
    let program = crate::monitor::find(options.monitor.as_ref())?;
    let kvm = floor::open_kvm()?;

    let bar = progress(u64::from(options.runs))?;
    let (mut floor, mut ours, mut theirs) = (Vec::new(), Samples::default(), Samples::default());
    for round in 0..options.runs + WARM_UP {
        if round == WARM_UP {
            (floor, ours, theirs) = (Vec::new(), Samples::default(), Samples::default());
        }
        floor.push(ms(floor::to_first_exit(&kvm)?));
        ours.soulbox(&program, &options.scratch)?;
        theirs.firecracker(peer, &options.scratch)?;
        bar.set_position(u64::from((round + 1).saturating_sub(WARM_UP)));
    }
    bar.finish_and_clear();

    let floor = Row::new("floor: ioctls to first exit, in process", "ms", floor);
    let mut rows = Vec::new();
    for (ours, theirs) in ours
        .rows("SoulBox", &floor)
        .into_iter()
        .zip(theirs.rows("Firecracker", &floor))
    {
        rows.extend([ours, theirs]);
    }
    rows.insert(0, floor);
    Ok(Report {
        rows,
        ..Report::new("compare")?
    })
}

// === impl Samples ===

impl Samples {
    fn soulbox(&mut self, program: &Path, scratch: &Scratch) -> Result<()> {
        let start = now_ns();
        let mut parent = machine::spawn(program)?;
        let started = machine::boot(&mut parent, 0)?;
        self.boot.push(ms_between(start, started.byte_ns));
        let start = now_ns();
        let (snapshot, _) = Snapshot::take(&mut parent, 0, scratch.folder()?, true)?;
        self.snapshot.push(ms_since(start));
        drop(parent);

        let start = now_ns();
        let mut spawned = machine::spawn(program)?;
        let started = snapshot.restore(&mut spawned, false)?;
        self.spawn_restore.push(ms_between(start, started.byte_ns));

        // Ours waits as a shell, theirs as a process that has its API open.
        let mut shell = machine::prepare(program, snapshot.memory_mib())?;
        let started = snapshot.restore(&mut shell, true)?;
        self.restore
            .push(ms_between(started.sent_ns, started.byte_ns));
        self.private_kib
            .push(Footprint::of(shell.pid())?.private_kib);
        drop(spawned);
        let start = now_ns();
        drop(shell);
        self.end.push(ms_since(start));
        Ok(())
    }

    fn firecracker(&mut self, program: &Path, scratch: &Scratch) -> Result<()> {
        let kept = scratch.folder()?;
        let start = now_ns();
        let mut parent = Firecracker::spawn(program, scratch.folder()?)?;
        parent.boot()?;
        self.boot.push(ms_since(start));
        let start = now_ns();
        let snapshot = parent.snapshot(kept.path())?;
        self.snapshot.push(ms_since(start));
        drop(parent);

        let start = now_ns();
        let mut spawned = Firecracker::spawn(program, scratch.folder()?)?;
        spawned.restore(&snapshot)?;
        self.spawn_restore.push(ms_since(start));

        let mut waiting = Firecracker::spawn(program, scratch.folder()?)?;
        let start = now_ns();
        waiting.restore(&snapshot)?;
        self.restore.push(ms_since(start));
        self.private_kib.push(waiting.footprint()?.private_kib);
        drop(spawned);
        let start = now_ns();
        drop(waiting);
        self.end.push(ms_since(start));
        Ok(())
    }

    fn rows(self, of: &str, floor: &Row) -> [Row; 6] {
        let time =
            |what: &str, samples| Row::new(format!("{what}, {of}"), "ms", samples).beside(floor);
        let private = format!("clone's private memory, {of}");
        [
            time("cold boot: spawn to first byte", self.boot),
            time("full snapshot: request to reply", self.snapshot),
            time("restore: request to first byte", self.restore),
            time("restore: spawn to first byte", self.spawn_restore),
            Row::new(private, "KiB", self.private_kib),
            time("SIGKILL to reaped", self.end),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_named_with_their_paths() {
        let Peer(path) = "firecracker=/opt/fc".parse().unwrap();
        assert_eq!(path, Path::new("/opt/fc"));
        for bad in ["", "firecracker", "firecracker=", "qemu=/usr/bin/qemu"] {
            assert!(bad.parse::<Peer>().is_err(), "{bad}");
        }
    }

    #[test]
    fn without_a_peer_it_says_what_to_do() {
        let options = Options {
            peer: None,
            runs: 1,
            monitor: None,
            scratch: Scratch::default(),
        };
        let error = run(&options).err().unwrap();
        assert!(
            error.to_string().contains("--peer firecracker=PATH"),
            "{error}"
        );
    }
}
