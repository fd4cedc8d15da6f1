//! What goes through a guest's network device, and what it costs its monitor.
//!
//! iperf3 is this host's own, carried into the guest with its libraries: its server
//! is there, its client here, at the address of the sandbox's slot. So a packet goes
//! through a veth pair, the slot's rules and address translation, the TAP and the
//! device, as any of a sandbox does. The floor is the same iperf3 through this
//! host's loopback: no device, no rules, no guest.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::cpu::CpuTime;
use super::iperf::{Flow, Iperf, Received};
use crate::client::Client;
use crate::report::{Report, Row, ms, progress};

/// The guest's ports.
const IPERF: u16 = 5201;
const ECHO: u16 = 5202;
/// Where iperf3 lies in the guest.
const FOLDER: &str = "/tmp/iperf3";
const MEGA: f64 = 1e6;

/// Waits in the guest until a socket listens: `$1` is -t or -u, `$2` its port.
const LISTENS: &str = r#"
listens() {
    for i in $(seq 600); do
        ss -Hln "$1" "sport = :$2" | grep -q . && return 0
        sleep 0.1
    done
    echo "nothing listens on port $2" && return 1
}
"#;

const ECHO_SERVER: &str = "
import socket, sys
echo = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
echo.bind(('0.0.0.0', int(sys.argv[1])))
while True:
    data, peer = echo.recvfrom(2048)
    echo.sendto(data, peer)
";

/// Of a ping, in bytes: what ping(8) sends.
const PING_BYTES: usize = 56;
const PINGS: u32 = 200;
/// They warm the way: neighbours, connection tracking, Python.
const WARM_UP_PINGS: u32 = 20;
const PING_TIMEOUT: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Linux guests")]
#[group(id = "traffic")]
pub(crate) struct Options {
    /// How long each run of iperf3 takes
    #[arg(long, value_name = "SECONDS", default_value_t = 5,
          value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
}

/// A sandbox that serves, as the host sees it.
pub(super) struct Guest<'a> {
    pub(super) id: &'a str,
    pub(super) address: IpAddr,
    /// The process of its monitor.
    pub(super) monitor: u32,
}

/// One flow, over all runs.
struct Samples {
    flow: Flow,
    floor: Vec<f64>,
    rate: Vec<f64>,
    lost_percent: Vec<f64>,
    for_monitor: Vec<f64>,
    for_devices: Vec<f64>,
}

pub(super) async fn measure(
    client: &mut Client,
    guest: &Guest<'_>,
    options: &Options,
    runs: u32,
    report: &mut Report,
) -> Result<()> {
    let iperf = Iperf::find()?;
    start_iperf(client, guest.id, &iperf).await?;
    let floor = iperf.serve()?;
    let server = SocketAddr::new(guest.address, IPERF);
    let mut flows = Flow::ALL.map(Samples::new);
    let bar = progress(u64::from(runs))?;
    for _ in 0..runs {
        for samples in &mut flows {
            // These block: nothing else is to be done meanwhile.
            let flow = samples.flow;
            samples.add_floor(&iperf.run(floor.address, flow, options.seconds)?);
            let before = CpuTime::of(guest.monitor)?;
            let received = iperf.run(server, flow, options.seconds)?;
            samples.add(&received, CpuTime::of(guest.monitor)?.since(before));
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    for samples in flows {
        samples.report(report);
    }

    start_echo(client, guest.id).await?;
    let pings = pings(SocketAddr::new(guest.address, ECHO))?;
    let name = "ping: a UDP packet to the guest and back";
    report.rows.push(Row::new(name, "ms", pings));
    Ok(())
}

/// The guest's own loader and C library may be others: it gets all of the host's.
async fn start_iperf(client: &mut Client, id: &str, iperf: &Iperf) -> Result<()> {
    let (loader, libraries) = iperf.libraries()?;
    client.run(id, &["mkdir", "-p", FOLDER]).await?;
    for file in libraries.iter().chain([&loader]) {
        upload(client, id, file).await?;
    }
    upload(client, id, iperf.program()).await?;
    let script = format!(
        "{LISTENS}
        cd {FOLDER} && chmod +x {loader} &&
        ./{loader} --library-path {FOLDER} ./iperf3 --server --daemon --port {IPERF} &&
        listens -t {IPERF}",
        loader = name(&loader)?,
    );
    let started = client.run(id, &["sh", "-c", &script]).await;
    started.context("starting iperf3 in the guest")
}

async fn upload(client: &mut Client, id: &str, file: &Path) -> Result<()> {
    let bytes = std::fs::read(file).with_context(|| format!("reading {}", file.display()))?;
    let path = format!("{FOLDER}/{}", name(file)?);
    let uploaded = client.upload(id, &path, &bytes).await;
    uploaded.with_context(|| format!("uploading {}", file.display()))
}

fn name(file: &Path) -> Result<&str> {
    let name = file.file_name().and_then(|name| name.to_str());
    name.with_context(|| format!("{} has no name", file.display()))
}

async fn start_echo(client: &mut Client, id: &str) -> Result<()> {
    let script = format!(
        "{LISTENS}
        setsid python3 -c \"$1\" {ECHO} </dev/null >/dev/null 2>&1 &
        listens -u {ECHO}"
    );
    let started = client
        .run(id, &["sh", "-c", &script, "sh", ECHO_SERVER])
        .await;
    started.context("starting a UDP echo in the guest")
}

/// One after the other. The slot's address answers no ICMP: it is translated for TCP
/// and UDP alone.
fn pings(to: SocketAddr) -> Result<Vec<f64>> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(PING_TIMEOUT))?;
    let mut times = Vec::new();
    for number in 0..PINGS + WARM_UP_PINGS {
        let mut ping = [0; PING_BYTES];
        ping[..4].copy_from_slice(&number.to_le_bytes());
        let start = Instant::now();
        socket.send(&ping)?;
        let mut back = [0; PING_BYTES];
        let length = socket.recv(&mut back).context("waiting for an echo")?;
        times.push(ms(start.elapsed()));
        ensure!(back[..length] == ping, "an echo of another packet");
    }
    Ok(times.split_off(WARM_UP_PINGS as usize))
}

// === impl Samples ===

impl Samples {
    fn new(flow: Flow) -> Self {
        Self {
            flow,
            floor: Vec::new(),
            rate: Vec::new(),
            lost_percent: Vec::new(),
            for_monitor: Vec::new(),
            for_devices: Vec::new(),
        }
    }

    /// Megabits, or packets.
    fn amount(&self, received: &Received) -> f64 {
        match self.flow.is_udp() {
            true => received.packets,
            false => received.bits / MEGA,
        }
    }

    fn add_floor(&mut self, received: &Received) {
        let rate = self.amount(received) / received.seconds;
        self.floor.push(rate);
    }

    fn add(&mut self, received: &Received, cpu: CpuTime) {
        let amount = self.amount(received);
        self.rate.push(amount / received.seconds);
        self.lost_percent.push(received.lost_percent);
        self.for_monitor.push(amount / cpu.monitor);
        self.for_devices.push(amount / cpu.devices);
    }

    fn report(self, report: &mut Report) {
        let name = match self.flow {
            Flow::TcpTo => "TCP, host to guest",
            Flow::TcpFrom => "TCP, guest to host",
            Flow::UdpTo => "UDP of 64 bytes, host to guest",
            Flow::UdpFrom => "UDP of 64 bytes, guest to host",
        };
        let (rate, each) = match self.flow.is_udp() {
            true => ("packets/s", "packets"),
            false => ("Mbit/s", "Mbit"),
        };
        let row = |what: &str, unit, samples| Row::new(format!("{name}: {what}"), unit, samples);
        let floor = row("floor, loopback", rate, self.floor);
        let received = row("received", rate, self.rate).beside(&floor);
        report.rows.extend([floor, received]);
        if self.flow.is_udp() {
            report.rows.push(row("lost", "%", self.lost_percent));
        }
        report.rows.extend([
            row(
                "for a CPU-second of monitor and guest",
                each,
                self.for_monitor,
            ),
            row(
                "for one of the thread of its devices",
                each,
                self.for_devices,
            ),
        ]);
    }
}
