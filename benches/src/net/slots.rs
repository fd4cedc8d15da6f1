//! Slots as soulboxd keeps them: taken, used, given back, and many at once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use soulbox_host::config::Network as Config;
use soulbox_host::net::{Denied, Network, NoSlot, Policy, Rule, Slot};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::memory::{Footprint, available_kib};
use crate::report::{Promise, Report, Row, ms, progress};

/// As many as soulboxd keeps ready by default.
pub(super) const READY: u32 = 16;
/// The refill is timed by so many slots at a time, so often.
const BATCH: u32 = 50;
const BATCHES: u32 = 5;
/// How long slots may take to be there.
const PATIENCE: Duration = Duration::from_secs(300);
const LOOK: Duration = Duration::from_micros(200);
/// What the kernel clears away after a namespace is gone, it clears away later.
const SETTLED: Duration = Duration::from_secs(2);

/// Slots that are kept ready.
pub(super) struct Slots {
    network: Arc<Network>,
    wanted: u32,
    /// Attempts that are denied, which nobody makes; without it there is no log.
    _denied: mpsc::Receiver<Denied>,
    runtime: Runtime,
}

/// What a sandbox does with its slot.
#[derive(Default)]
struct Lives {
    take_us: Vec<f64>,
    resolver: Vec<f64>,
    apply: Vec<f64>,
    counters: Vec<f64>,
    close: Vec<f64>,
    release: Vec<f64>,
}

// === impl Slots ===

impl Slots {
    /// Returns when the first is ready.
    pub(super) fn start(wanted: u32) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()?;
        let config = Config {
            slots_ready: wanted,
            ..Config::default()
        };
        let started = runtime.block_on(Network::start(&config, &[]))?;
        Ok(Self {
            network: started.network,
            wanted,
            _denied: started.denied,
            runtime,
        })
    }

    /// Waits until all are, and none is being made.
    pub(super) fn await_ready(&self) -> Result<()> {
        let give_up = Instant::now() + PATIENCE;
        while self.network.ready() < self.wanted as usize {
            ensure!(Instant::now() < give_up, "slots are not made");
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    pub(super) fn take(&self) -> Result<Slot> {
        self.network.take().context("taking a slot that is ready")
    }

    /// Of a slot whose TAP nobody has any more.
    pub(super) fn release(&self, index: u32) -> Result<()> {
        Ok(self.runtime.block_on(self.network.release(index))?)
    }

    /// All at once, as when a host is emptied.
    fn release_all(&self, slots: Vec<Slot>) -> Result<()> {
        let indices: Vec<u32> = slots.iter().map(|slot| slot.index).collect();
        drop(slots);
        self.runtime.block_on(async {
            let mut releases = JoinSet::new();
            for index in indices {
                let network = Arc::clone(&self.network);
                releases.spawn(async move { network.release(index).await });
            }
            let released: Result<Vec<()>, _> = releases.join_all().await.into_iter().collect();
            released.map(drop).context("releasing slots")
        })
    }

    pub(super) fn stop(self) {
        self.runtime.block_on(self.network.stop());
    }
}

/// One slot after the other, and as many as can be had.
pub(super) fn measure(runs: u32, report: &mut Report) -> Result<()> {
    let slots = Slots::start(READY)?;
    let mut lives = Lives::default();
    let bar = progress(u64::from(runs))?;
    for _ in 0..runs {
        lives.live(&slots)?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    lives.report(report);
    refill(&slots, report)?;
    slots.stop();
    Ok(())
}

// === impl Lives ===

impl Lives {
    fn live(&mut self, slots: &Slots) -> Result<()> {
        slots.await_ready()?;
        let start = Instant::now();
        let slot = slots.take()?;
        self.take_us.push(start.elapsed().as_secs_f64() * 1e6);
        // The next one is made at once, and not beside what follows.
        slots.await_ready()?;
        let Slots {
            network, runtime, ..
        } = slots;

        let start = Instant::now();
        let resolver = runtime.block_on(network.bind_resolver(slot.index))?;
        self.resolver.push(ms(start.elapsed()));
        drop(resolver);

        let policy = policy()?;
        let start = Instant::now();
        runtime.block_on(network.apply(slot.index, &policy))?;
        self.apply.push(ms(start.elapsed()));

        let start = Instant::now();
        runtime.block_on(network.counters(slot.index))?;
        self.counters.push(ms(start.elapsed()));

        let Slot { index, tap, .. } = slot;
        let start = Instant::now();
        drop(tap);
        self.close.push(ms(start.elapsed()));

        let start = Instant::now();
        slots.release(index)?;
        self.release.push(ms(start.elapsed()));
        Ok(())
    }

    fn report(self, report: &mut Report) {
        let take = Row::new("slot: taking a ready one", "µs", self.take_us);
        report.promises.push(Promise::at_most(
            "taking a ready slot, p99 µs",
            take.p99,
            100.0,
        ));
        report.rows.extend([
            take,
            Row::new("slot: sockets for its resolver", "ms", self.resolver),
            Row::new("slot: applying a policy", "ms", self.apply),
            Row::new("slot: reading its counters", "ms", self.counters),
            Row::new("slot: closing its TAP", "ms", self.close),
            Row::new("slot: release until it is gone", "ms", self.release),
        ]);
    }
}

/// One of each kind of rule.
fn policy() -> Result<Policy> {
    Ok(Policy {
        internet: false,
        allow: vec![Rule::parse("10.1.0.0/16", "tcp", &["443", "8000-8999"])?],
        deny: vec![Rule::parse("203.0.113.0/24", "any", &[])?],
        allow_domains: vec!["*.example.com".parse()?],
        ..Policy::default()
    })
}

/// Takes slots as fast as they are made.
fn refill(slots: &Slots, report: &mut Report) -> Result<()> {
    let mut taken = Vec::new();
    let mut take_us = Vec::new();
    slots.await_ready()?;
    take_so_many(slots, READY, &mut taken, &mut take_us)?;
    let mut rates = Vec::new();
    for _ in 0..BATCHES {
        let start = Instant::now();
        take_so_many(slots, BATCH, &mut taken, &mut take_us)?;
        rates.push(f64::from(BATCH) / start.elapsed().as_secs_f64());
    }
    slots.release_all(taken)?;
    let rate = Row::new("slots made while they are taken", "/s", rates);
    report.promises.push(Promise::at_least(
        "slots made while they are taken, p50 a second",
        rate.p50,
        50.0,
    ));
    report.rows.extend([
        Row::new("slot: taking one while others are made", "µs", take_us),
        rate,
    ]);
    Ok(())
}

fn take_so_many(
    slots: &Slots,
    count: u32,
    taken: &mut Vec<Slot>,
    take_us: &mut Vec<f64>,
) -> Result<()> {
    let give_up = Instant::now() + PATIENCE;
    for _ in 0..count {
        loop {
            let start = Instant::now();
            match slots.network.take() {
                Ok(slot) => {
                    take_us.push(start.elapsed().as_secs_f64() * 1e6);
                    taken.push(slot);
                    break;
                }
                Err(NoSlot::NotReady) if start < give_up => std::thread::sleep(LOOK),
                Err(error) => return Err(error).context("taking slots while others are made"),
            }
        }
    }
    Ok(())
}

/// So many slots at once, from none to all and to none again.
pub(super) fn crowd(count: u32, report: &mut Report) -> Result<()> {
    std::thread::sleep(SETTLED);
    let before_kib = available_kib()?;
    let own_before = Footprint::of(std::process::id())?;
    let start = Instant::now();
    let slots = Slots::start(count)?;
    slots.await_ready()?;
    let made = ms(start.elapsed());
    let host_kib = before_kib - available_kib()?;
    let own_kib = Footprint::of(std::process::id())?.private_kib - own_before.private_kib;
    let start = Instant::now();
    slots.stop();
    let stopped = ms(start.elapsed());

    let row = |what: &str, unit, value| {
        Row::new(format!("{count} slots at once: {what}"), unit, vec![value])
    };
    let each = |kib: f64| kib / f64::from(count);
    report.rows.extend([
        row("until all are ready", "ms", made),
        row("host memory for each", "KiB", each(host_kib)),
        row("this process's part of it", "KiB", each(own_kib)),
        row("until all are gone", "ms", stopped),
    ]);
    Ok(())
}
