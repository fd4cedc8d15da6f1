//! iperf3: this host's own, here and in a guest.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

/// Of one UDP packet, without headers.
const UDP_BYTES: &str = "64";
/// How long a server may take to listen.
const START: Duration = Duration::from_secs(10);

pub(super) struct Iperf {
    program: PathBuf,
}

/// What goes to the server, or comes from it; the client is on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flow {
    TcpTo,
    TcpFrom,
    UdpTo,
    UdpFrom,
}

/// What was received.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Received {
    pub(super) seconds: f64,
    pub(super) bits: f64,
    /// Of UDP.
    pub(super) packets: f64,
    pub(super) lost_percent: f64,
}

/// A server on this host, on loopback. Dropping it ends it.
pub(super) struct Server {
    child: Child,
    pub(super) address: SocketAddr,
}

#[derive(Deserialize)]
struct Output {
    error: Option<String>,
    end: Option<End>,
}

#[derive(Deserialize)]
struct End {
    sum_received: Option<Sum>,
}

#[derive(Deserialize)]
struct Sum {
    seconds: f64,
    bits_per_second: f64,
    /// Of UDP, with the lost ones.
    #[serde(default)]
    packets: f64,
    #[serde(default)]
    lost_packets: f64,
}

// === impl Flow ===

impl Flow {
    pub(super) const ALL: [Self; 4] = [Self::TcpTo, Self::TcpFrom, Self::UdpTo, Self::UdpFrom];

    pub(super) fn is_udp(self) -> bool {
        matches!(self, Self::UdpTo | Self::UdpFrom)
    }

    fn arguments(self) -> Vec<&'static str> {
        let mut arguments = Vec::new();
        if self.is_udp() {
            // As fast as it can.
            arguments.extend(["--udp", "--length", UDP_BYTES, "--bitrate", "0"]);
        }
        if matches!(self, Self::TcpFrom | Self::UdpFrom) {
            arguments.push("--reverse");
        }
        arguments
    }
}

// === impl Iperf ===

impl Iperf {
    pub(super) fn find() -> Result<Self> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let program = std::env::split_paths(&path)
            .map(|folder| folder.join("iperf3"))
            .find(|program| program.is_file())
            .context("there is no iperf3; `images/setup bench` installs it")?;
        Ok(Self { program })
    }

    pub(super) fn program(&self) -> &Path {
        &self.program
    }

    /// The loader, and the libraries that it loads.
    pub(super) fn libraries(&self) -> Result<(PathBuf, Vec<PathBuf>)> {
        let output = Command::new("ldd").arg(&self.program).output();
        let output = output.context("running ldd")?;
        ensure!(
            output.status.success(),
            "ldd {}: {}",
            self.program.display(),
            String::from_utf8_lossy(&output.stderr)
        );
        libraries(&String::from_utf8_lossy(&output.stdout))
    }

    /// Sends for so long, in a process that this waits for.
    pub(super) fn run(&self, server: SocketAddr, flow: Flow, seconds: u32) -> Result<Received> {
        let output = Command::new(&self.program)
            .args(["--json", "--connect-timeout", "10000"])
            .args(["--client", &server.ip().to_string()])
            .args(["--port", &server.port().to_string()])
            .args(["--time", &seconds.to_string()])
            .args(flow.arguments())
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("running {}", self.program.display()))?;
        parse(&output.stdout).with_context(|| {
            let errors = String::from_utf8_lossy(&output.stderr);
            format!("iperf3 to {server}, {flow:?} {errors}")
        })
    }

    pub(super) fn serve(&self) -> Result<Server> {
        // Free a moment ago.
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let child = Command::new(&self.program)
            .args(["--server", "--bind", "127.0.0.1"])
            .args(["--port", &address.port().to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("starting {}", self.program.display()))?;
        let server = Server { child, address };
        let give_up = Instant::now() + START;
        // Connecting would be a client that says nothing.
        while !listens(address.port())? {
            ensure!(Instant::now() < give_up, "iperf3 does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// On 127.0.0.1, by the host's table, in which the state of a listener is 0A.
fn listens(port: u16) -> Result<bool> {
    let table = std::fs::read_to_string("/proc/net/tcp").context("reading /proc/net/tcp")?;
    let local = format!("0100007F:{port:04X}");
    Ok(table.lines().any(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        fields.next() == Some(&local) && fields.nth(1) == Some("0A")
    }))
}

fn parse(json: &[u8]) -> Result<Received> {
    let output: Output = serde_json::from_slice(json).context("reading what iperf3 says")?;
    if let Some(error) = output.error {
        bail!("{error}");
    }
    let sum = output.end.and_then(|end| end.sum_received);
    let sum = sum.context("iperf3 does not tell what was received")?;
    let packets = sum.packets - sum.lost_packets;
    let lost_percent = match sum.packets > 0.0 {
        true => 100.0 * sum.lost_packets / sum.packets,
        false => 0.0,
    };
    Ok(Received {
        seconds: sum.seconds,
        bits: sum.bits_per_second * sum.seconds,
        packets,
        lost_percent,
    })
}

/// From what ldd prints: `NAME => PATH (ADDRESS)`, and the loader's `PATH (ADDRESS)`.
fn libraries(printed: &str) -> Result<(PathBuf, Vec<PathBuf>)> {
    let mut loader = None;
    let mut libraries = Vec::new();
    for line in printed.lines() {
        let what = line.split(" (").next().unwrap_or_default().trim();
        match what.split_once(" => ") {
            Some((name, "not found")) => bail!("{name} is missing; install iperf3 again"),
            Some((_, path)) => libraries.push(PathBuf::from(path)),
            None if what.starts_with('/') => loader = Some(PathBuf::from(what)),
            // The kernel's own.
            None => {}
        }
    }
    let loader = loader.context("iperf3 is not a program that a loader loads")?;
    Ok((loader, libraries))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_found_as_ldd_prints_them() {
        let printed = "\tlinux-vdso.so.1 (0x00007ffd)\n\
            \tlibiperf.so.0 => /lib/x86_64-linux-gnu/libiperf.so.0 (0x00007f01)\n\
            \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f00)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x00007f02)\n";
        let (loader, libraries) = super::libraries(printed).unwrap();
        assert_eq!(loader, Path::new("/lib64/ld-linux-x86-64.so.2"));
        let names: Vec<_> = libraries
            .iter()
            .filter_map(|path| path.file_name())
            .collect();
        assert_eq!(names, ["libiperf.so.0", "libc.so.6"]);
        let missing = super::libraries("\tlibsctp.so.1 => not found\n").unwrap_err();
        assert!(missing.to_string().contains("libsctp"), "{missing}");
        assert!(super::libraries("\tstatically linked\n").is_err());
    }

    #[test]
    fn what_was_received_is_read() {
        let tcp = br#"{"start": {}, "end": {"sum_sent": {"seconds": 2.0, "bits_per_second": 9},
            "sum_received": {"start": 0, "seconds": 2.0, "bytes": 100, "bits_per_second": 400.0}}}"#;
        let received = parse(tcp).unwrap();
        assert_eq!((received.bits, received.packets), (800.0, 0.0));

        let udp = br#"{"end": {"sum": {"packets": 210, "lost_packets": 50}, "sum_received":
            {"seconds": 2.0, "bits_per_second": 1.0, "packets": 200, "lost_packets": 50}}}"#;
        let received = parse(udp).unwrap();
        assert_eq!((received.packets, received.lost_percent), (150.0, 25.0));

        let refused = br#"{"start": {}, "error": "unable to connect", "end": {}}"#;
        let error = parse(refused).unwrap_err();
        assert_eq!(error.to_string(), "unable to connect");
        for nothing in [&b""[..], b"{}", br#"{"end": {"sum_received": {}}}"#] {
            assert!(parse(nothing).is_err());
        }
    }
}
