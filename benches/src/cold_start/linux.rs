//! Sandboxes of a soulboxd: real guests, real programs.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::client::{Client, check_origin, id_of, times};
use crate::daemon;
use crate::guest;
use crate::report::{Promise, Report, Row, ms, progress};
use crate::scratch::Scratch;
use crate::stages::Stages;

/// A size that no snapshot has, next to the default: such a create boots.
const COLD_EXTRA_MIB: u32 = 8;
const DIRTY_MIB: [u32; 2] = [7, 64];
const MIB: f64 = 1024.0 * 1024.0;

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Linux guests")]
#[group(id = "linux")]
pub(crate) struct Options {
    #[command(flatten)]
    pub(super) soulboxd: daemon::Options,
    /// Into how many children to fork, one row each
    #[arg(long, value_name = "N,N…", value_delimiter = ',', default_value = "1,10",
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    forks: Vec<u32>,
}

/// How long soulboxd is left to make what it keeps ready: where everything is
/// emulated by one CPU, a sandbox and the shell after it would be in each other's way.
const SETTLED: Duration = Duration::from_secs(2);

/// Sandboxes made, used once and deleted.
#[derive(Default)]
struct Lives {
    total: Vec<f64>,
    delete: Vec<f64>,
    stages: Stages,
    guest_mib: Vec<f64>,
    monitor_kib: Vec<f64>,
}

pub(super) fn run(options: &Options, scratch: &Scratch, runs: u32) -> Result<Report> {
    let daemon = options.soulboxd.find(scratch)?;
    let copies = scratch.folder()?;
    let mut report = Report::new("cold-start, Linux guests")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut client = Client::connect(daemon.socket()).await?;
        let memory_mib = client.await_template().await?;
        creates(&mut client, memory_mib, runs, &mut report).await?;
        pauses(&mut client, runs, &mut report).await?;
        for dirty_mib in DIRTY_MIB {
            snapshots(&mut client, dirty_mib, runs, copies.path(), &mut report).await?;
        }
        for &children in &options.forks {
            let runs = if children > 10 { runs.min(3) } else { runs };
            forks(&mut client, children, runs, &mut report).await?;
        }
        Ok(report)
    })
}

async fn creates(
    client: &mut Client,
    memory_mib: u32,
    runs: u32,
    report: &mut Report,
) -> Result<()> {
    let (mut booted, mut restored) = (Lives::default(), Lives::default());
    let bar = progress(u64::from(runs))?;
    for _ in 0..runs {
        booted
            .live(client, memory_mib + COLD_EXTRA_MIB, false)
            .await?;
        restored.live(client, 0, true).await?;
        bar.inc(1);
    }
    bar.finish_and_clear();

    let cold = Row::new("cold boot: create to first exec output", "ms", booted.total);
    let warm = Row::new(
        "restored: create to first exec output",
        "ms",
        restored.total,
    );
    let dirtied = Row::new(
        "clone that ran `true`: memory of its own",
        "MiB",
        restored.guest_mib,
    );
    report.promises.extend([
        Promise::at_least(
            "create restored, p50 × faster than booted",
            cold.times(&warm),
            20.0,
        ),
        Promise::at_most("a clone that ran `true` dirtied, p50 MiB", dirtied.p50, 4.0),
    ]);
    report.rows.push(cold);
    booted.stages.report(report);
    report.rows.push(warm);
    restored.stages.report(report);
    report.rows.extend([
        dirtied,
        Row::new(
            "clone's monitor: memory of its own",
            "KiB",
            restored.monitor_kib,
        ),
        Row::new("teardown: forced delete to reply", "ms", restored.delete),
    ]);
    Ok(())
}

// === impl Lives ===

impl Lives {
    async fn live(&mut self, client: &mut Client, memory_mib: u32, restored: bool) -> Result<()> {
        tokio::time::sleep(SETTLED).await;
        let start = Instant::now();
        let created = client.create(memory_mib).await?;
        let id = id_of(created.sandbox.as_ref())?;
        client.run(&id, &["echo", "here"]).await?;
        self.total.push(ms(start.elapsed()));
        check_origin(&created, restored)?;
        self.stages.add(times(&created.stages));
        client.delete(&id).await?;
        if restored {
            self.weigh(client).await?;
        }
        Ok(())
    }

    /// One that ran `true` and nothing else.
    async fn weigh(&mut self, client: &mut Client) -> Result<()> {
        let created = client.create(0).await?;
        let id = id_of(created.sandbox.as_ref())?;
        client.run(&id, &["true"]).await?;
        let usage = client.usage(&id).await?;
        self.guest_mib.push(usage.guest_private_bytes as f64 / MIB);
        self.monitor_kib
            .push(usage.monitor_private_bytes as f64 / 1024.0);
        let start = Instant::now();
        client.delete(&id).await?;
        self.delete.push(ms(start.elapsed()));
        Ok(())
    }
}

async fn pauses(client: &mut Client, runs: u32, report: &mut Report) -> Result<()> {
    let created = client.create(0).await?;
    let id = id_of(created.sandbox.as_ref())?;
    let (mut paused, mut resumed, mut answered) = (Vec::new(), Vec::new(), Vec::new());
    let (mut pausing, mut resuming) = (Stages::default(), Stages::default());
    for _ in 0..runs {
        let start = Instant::now();
        pausing.add(times(&client.pause(&id).await?));
        paused.push(ms(start.elapsed()));
        let start = Instant::now();
        resuming.add(times(&client.resume(&id).await?));
        resumed.push(ms(start.elapsed()));
        client.run(&id, &["echo", "back"]).await?;
        answered.push(ms(start.elapsed()));
    }
    client.delete(&id).await?;
    report.rows.push(Row::new("pause to reply", "ms", paused));
    pausing.report(report);
    report.rows.push(Row::new("resume to reply", "ms", resumed));
    resuming.report(report);
    let name = "resume to first exec output";
    report.rows.push(Row::new(name, "ms", answered));
    Ok(())
}

async fn snapshots(
    client: &mut Client,
    dirty_mib: u32,
    runs: u32,
    copies: &Path,
    report: &mut Report,
) -> Result<()> {
    let copied = vec![1; (dirty_mib as usize) << 20];
    let (mut copy, mut total, mut still) = (Vec::new(), Vec::new(), Vec::new());
    let (mut forked, mut written) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        let start = Instant::now();
        guest::copy_to(copies, &copied)?;
        copy.push(ms(start.elapsed()));

        let id = dirtied(client, dirty_mib).await?;
        let start = Instant::now();
        let taken = client.snapshot(&id).await?;
        total.push(ms(start.elapsed()));
        still.push(taken.paused_us as f64 / 1e3);
        let snapshot = taken.snapshot.context("a reply without its snapshot")?;
        written.push(snapshot.memory_bytes as f64 / MIB);
        client.delete(&id).await?;

        let id = dirtied(client, dirty_mib).await?;
        let fork = client.fork(&id, 1).await?;
        forked.push(fork.parent_paused_us as f64 / 1e3);
        for child in &fork.children {
            client.delete(&id_of(child.sandbox.as_ref())?).await?;
        }
        client.delete(&id).await?;
    }
    let row = |what: &str, unit, samples| {
        Row::new(format!("{dirty_mib} MiB dirty: {what}"), unit, samples)
    };
    let copy = row("as many bytes to a new file", "ms", copy);
    let forked = row("fork, the parent stands still", "ms", forked);
    if dirty_mib == DIRTY_MIB[0] {
        let promise = format!("fork's pause with {dirty_mib} MiB dirty, p50 × copying them");
        report
            .promises
            .push(Promise::at_most(promise, forked.times(&copy), 5.0));
    }
    report.rows.extend([
        copy,
        row("snapshot to reply", "ms", total),
        row("snapshot, the sandbox stands still", "ms", still),
        row("snapshot, memory written", "MiB", written),
        forked,
    ]);
    Ok(())
}

/// A new sandbox in which a program has written so much memory, which stays.
async fn dirtied(client: &mut Client, dirty_mib: u32) -> Result<String> {
    let created = client.create(0).await?;
    let id = id_of(created.sandbox.as_ref())?;
    let script = format!("head -c {dirty_mib}M /dev/urandom > /dev/shm/dirty && echo done");
    client.run(&id, &["sh", "-c", &script]).await?;
    Ok(id)
}

async fn forks(client: &mut Client, children: u32, runs: u32, report: &mut Report) -> Result<()> {
    let (mut total, mut still, mut own) = (Vec::new(), Vec::new(), Vec::new());
    let mut stages = Stages::default();
    for _ in 0..runs {
        let parent = id_of(client.create(0).await?.sandbox.as_ref())?;
        client.run(&parent, &["echo", "parent"]).await?;
        let start = Instant::now();
        let forked = client.fork(&parent, children).await?;
        total.push(ms(start.elapsed()));
        still.push(forked.parent_paused_us as f64 / 1e3);
        stages.add(times(&forked.stages));
        ensure!(
            forked.children.len() == children as usize,
            "a fork of {children} has {} children",
            forked.children.len()
        );
        for child in &forked.children {
            let id = id_of(child.sandbox.as_ref())?;
            own.push(client.usage(&id).await?.guest_private_bytes as f64 / MIB);
            client.delete(&id).await?;
        }
        client.delete(&parent).await?;
    }
    let name = |what: &str| format!("fork of {children}: {what}");
    report
        .rows
        .push(Row::new(name("call to reply"), "ms", total));
    stages.report(report);
    report
        .rows
        .push(Row::new(name("the parent stands still"), "ms", still));
    report
        .rows
        .push(Row::new(name("memory of a child alone"), "MiB", own));
    Ok(())
}
