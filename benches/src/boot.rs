//! A Linux guest's cold boot: from the start of its vCPU to the agent's
//! ready-call, beside the time the same kernel takes to the first output of a
//! bare init (`/bin/echo`). Where the CPU cannot run Linux guests, run this
//! through `images/bench/run`.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use soulbox_proto::guest::READY_PORT;
use soulbox_proto::vmm::v1::{self, event::Event};
use soulbox_vmm::testing::{BootSpec, Monitor};

use crate::clock::ms_since;
use crate::report::{Promise, Report, Row, progress};

const MEMORY_MIB: u32 = 256;
const CMDLINE: &str = "console=ttyS0 root=/dev/vda rootfstype=ext4 rw panic=-1 reboot=acpi \
     quiet loglevel=4 8250.nr_uarts=1";
/// What the bare init prints.
const MARK: &str = "bare-init-is-here";

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How many times each is booted
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// The template's folder, with its manifest.json
    #[arg(long, value_name = "DIR")]
    template: PathBuf,
    /// The monitor to measure [default: soulbox-vmm beside this program]
    #[arg(long, value_name = "PATH")]
    monitor: Option<PathBuf>,
}

pub(crate) fn run(options: &Options) -> Result<Report> {
    let program = crate::monitor::find(options.monitor.as_ref())?;
    let kernel = options.template.join("vmlinux");
    let kernel = std::fs::read(&kernel).with_context(|| format!("reading {}", kernel.display()))?;
    let rootfs = options.template.join("rootfs.ext4");

    let (mut bare, mut ready) = (Vec::new(), Vec::new());
    let bar = progress(u64::from(options.runs))?;
    for _ in 0..options.runs {
        bare.push(to_bare_init(&program, &kernel, &rootfs)?);
        ready.push(to_ready_call(&program, &kernel, &rootfs)?);
        bar.inc(1);
    }
    bar.finish_and_clear();

    let bare = Row::new("kernel entry to a bare init's output", "ms", bare);
    let ready = Row::new("kernel entry to the agent's ready-call", "ms", ready).beside(&bare);
    let ratio = ready.p50 / bare.p50;
    Ok(Report {
        rows: vec![bare, ready],
        promises: vec![Promise::at_most("ready-call, p50 × bare init", ratio, 3.0)],
        ..Report::new("boot")?
    })
}

fn to_bare_init(program: &Path, kernel: &[u8], rootfs: &Path) -> Result<f64> {
    let spec = machine(
        kernel,
        rootfs,
        &format!("{CMDLINE} init=/bin/echo -- {MARK}"),
    )?;
    let mut monitor = Monitor::spawn(program)?;
    let (spec, mut console) = spec.with_pagemap(&monitor)?.with_console()?;
    let booted = monitor.control().boot(spec)?;
    let (mut seen, mut chunk) = (Vec::new(), [0; 4096]);
    while !contains(&seen, MARK.as_bytes()) {
        match console.read(&mut chunk)? {
            0 => bail!("the guest ended: {}", String::from_utf8_lossy(&seen)),
            n => seen.extend_from_slice(&chunk[..n]),
        }
    }
    Ok(ms_since(booted.started_at_ns))
}

fn to_ready_call(program: &Path, kernel: &[u8], rootfs: &Path) -> Result<f64> {
    let folder = tempfile::tempdir()?;
    let listener = UnixListener::bind(folder.path().join("vsock.sock"))?;
    let mut spec = machine(kernel, rootfs, &format!("{CMDLINE} init=/sbin/init"))?;
    let listener_fd = spec.add_fd(listener);
    if let Some(machine) = &mut spec.boot.machine {
        machine.vsock = Some(v1::VsockDevice {
            guest_cid: 3,
            listener_fd,
        });
    }
    let mut monitor = Monitor::spawn(program)?;
    let spec = spec.with_pagemap(&monitor)?;
    let booted = monitor.control().boot(spec)?;
    match monitor.control().event()? {
        (Event::VsockConnection(call), _) if call.host_port == READY_PORT => {
            Ok(ms_since(booted.started_at_ns))
        }
        (Event::Exited(exited), _) => bail!(
            "the guest ended: {}: {}",
            exited.message,
            String::from_utf8_lossy(&exited.console_tail)
        ),
        (other, _) => bail!("{other:?} instead of the ready-call"),
    }
}

/// One vCPU, and the template's disk with a layer of its own.
fn machine(kernel: &[u8], rootfs: &Path, cmdline: &str) -> Result<BootSpec> {
    let mut spec = BootSpec::new(1, MEMORY_MIB, kernel)?;
    let base = File::open(rootfs).with_context(|| format!("opening {}", rootfs.display()))?;
    let size_bytes = base.metadata()?.len();
    let base_fd = spec.add_fd(base);
    let layer_fd = Some(spec.add_fd(tempfile::tempfile()?));
    if let Some(machine) = &mut spec.boot.machine {
        cmdline.clone_into(&mut machine.cmdline);
        machine.block_devices.push(v1::BlockDevice {
            id: "root".into(),
            size_bytes,
            base_fd,
            layer_fd,
            rate_limit: None,
        });
    }
    Ok(spec)
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack
        .windows(needle.len())
        .any(|window| window == needle)
}
