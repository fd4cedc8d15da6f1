//! Sandboxes of a soulboxd with a network and without one.

use std::net::IpAddr;
use std::time::Instant;

use anyhow::{Context, Result};
use soulbox_proto::host::v1::{CreateSandboxResponse, Sandbox};

use super::cpu;
use super::traffic::{self, Guest};
use crate::client::{Client, check_origin, id_of, times};
use crate::daemon::Daemon;
use crate::report::{Report, Row, ms, progress};
use crate::stages::Stages;

/// Runs of iperf3 each way, at most.
const TRAFFIC_RUNS: u32 = 5;

/// Creates of one kind.
#[derive(Default)]
struct Creates {
    total: Vec<f64>,
    stages: Stages,
}

pub(super) fn run(
    daemon: &Daemon,
    options: &traffic::Options,
    runs: u32,
    report: &mut Report,
) -> Result<()> {
    // One thread keeps the connection to soulboxd alive while iperf3 has the other.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut client = Client::connect(daemon.socket()).await?;
        client.await_template().await?;
        creates(&mut client, runs, report).await?;

        let before = cpu::monitors_with_tap()?;
        let created = client.create(0).await?;
        let sandbox = created.sandbox.context("a reply without its sandbox")?;
        let guest = Guest {
            id: &sandbox.id,
            address: ipv4(&sandbox)?,
            monitor: cpu::new_monitor(&before)?,
        };
        let runs = runs.min(TRAFFIC_RUNS);
        traffic::measure(&mut client, &guest, options, runs, report).await?;
        client.delete(&sandbox.id).await
    })
}

/// In turns, each from the call to the output of its first program.
async fn creates(client: &mut Client, runs: u32, report: &mut Report) -> Result<()> {
    let (mut without, mut with) = (Creates::default(), Creates::default());
    let bar = progress(u64::from(runs))?;
    for _ in 0..runs {
        let start = Instant::now();
        let created = client.create_without_network().await?;
        without.used(client, start, &created).await?;
        let start = Instant::now();
        let created = client.create(0).await?;
        with.used(client, start, &created).await?;
        ipv4(
            created
                .sandbox
                .as_ref()
                .context("a reply without its sandbox")?,
        )?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    let name = "create to first exec output";
    let total = Row::new(format!("{name}, without a network"), "ms", without.total);
    let later = Row::new(format!("{name}, with one"), "ms", with.total).beside(&total);
    report.rows.push(total);
    without.stages.report(report);
    report.rows.push(later);
    with.stages.report(report);
    Ok(())
}

// === impl Creates ===

impl Creates {
    async fn used(
        &mut self,
        client: &mut Client,
        start: Instant,
        created: &CreateSandboxResponse,
    ) -> Result<()> {
        let id = id_of(created.sandbox.as_ref())?;
        client.run(&id, &["echo", "here"]).await?;
        self.total.push(ms(start.elapsed()));
        check_origin(created, true)?;
        self.stages.add(times(&created.stages));
        client.delete(&id).await
    }
}

/// Where the host reaches the sandbox's ports.
fn ipv4(sandbox: &Sandbox) -> Result<IpAddr> {
    sandbox
        .addresses
        .iter()
        .filter_map(|address| address.parse().ok())
        .find(IpAddr::is_ipv4)
        .context("a sandbox without a network; see [network] in soulboxd's configuration")
}
