//! The monitor on this machine's `/dev/kvm`, with guests of a few instructions.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use soulbox_proto::vmm::v1::exited::Reason;
use soulbox_proto::vmm::v1::{self, reply::Result as Reply, request::Op};
use soulbox_vmm::machine::layout::{COM1_PORT, PANIC_PORT, POWER_PORT};
use soulbox_vmm::testing::{BootSpec, Control, Monitor, code, elf, tiny_guest};

const MONITOR: &str = env!("CARGO_BIN_EXE_soulbox-vmm");

fn monitor() -> Result<Monitor> {
    Monitor::spawn(Path::new(MONITOR)).context("the monitor starts")
}

fn guest(parts: &[&[u8]]) -> Vec<u8> {
    tiny_guest(&parts.concat())
}

/// Boots a guest that is expected to end by itself.
fn ends_with(code: &[&[u8]]) -> Result<v1::Exited> {
    let mut monitor = monitor()?;
    monitor
        .control()
        .boot(BootSpec::new(1, 128, &guest(code))?)?;
    let exited = monitor.control().exited()?;
    monitor.wait()?;
    Ok(exited)
}

fn refusal(spec: BootSpec) -> Result<String> {
    let mut monitor = monitor()?;
    let error = monitor.control().boot(spec).expect_err("must be refused");
    Ok(error.to_string())
}

#[test]
fn a_guest_speaks_and_powers_off() -> Result<()> {
    let exited = ends_with(&[
        &code::out(COM1_PORT, b'h'),
        &code::out(COM1_PORT, b'i'),
        &code::out(POWER_PORT, 0x34),
        &code::HALT,
    ])?;
    assert_eq!(exited.reason(), Reason::PoweredOff);
    assert_eq!(exited.console_tail, b"hi");
    Ok(())
}

#[test]
fn a_reset_and_a_crash_are_told_apart() -> Result<()> {
    let reset = ends_with(&[&code::out(POWER_PORT + 2, 1), &code::HALT])?;
    assert_eq!(reset.reason(), Reason::Reset);
    let crash = ends_with(&[&code::CRASH])?;
    assert_eq!(crash.reason(), Reason::Crashed, "{}", crash.message);
    Ok(())
}

#[test]
fn a_panic_is_told_with_the_console() -> Result<()> {
    let mut monitor = monitor()?;
    let code = guest(&[
        &code::out(COM1_PORT, b'!'),
        &code::out(PANIC_PORT, 1),
        &code::HALT,
    ]);
    monitor.control().boot(BootSpec::new(1, 128, &code)?)?;
    let (event, _) = monitor.control().event()?;
    let v1::event::Event::GuestPanic(panic) = event else {
        anyhow::bail!("{event:?}");
    };
    assert_eq!(panic.console_tail, b"!");
    Ok(())
}

/// An instruction that a software KVM cannot emulate in ring 0, where this one
/// is such; on a CPU with vmx or svm it just runs.
#[test]
fn a_kvm_that_cannot_run_guests_says_so() -> Result<()> {
    const POPCNT_EAX: [u8; 4] = [0xf3, 0x0f, 0xb8, 0xc0];
    let exited = ends_with(&[&POPCNT_EAX, &code::out(POWER_PORT, 0x34), &code::HALT])?;
    let hardware = std::fs::read_to_string("/proc/cpuinfo")?
        .split_whitespace()
        .any(|flag| flag == "vmx" || flag == "svm");
    if hardware {
        assert_eq!(exited.reason(), Reason::PoweredOff);
    } else {
        assert_eq!(exited.reason(), Reason::EmulationFailed);
        assert!(
            exited.message.contains("images/bench/run"),
            "{}",
            exited.message
        );
    }
    Ok(())
}

#[test]
fn a_spinning_guest_is_stopped_by_force() -> Result<()> {
    for vcpus in [1, 2, 32] {
        let mut monitor = monitor()?;
        let spec = BootSpec::new(vcpus, 128, &guest(&[&code::SPIN]))?;
        monitor.control().boot(spec)?;
        let reply = monitor
            .control()
            .request(Op::Shutdown(v1::Shutdown {}), &[])?;
        ensure!(matches!(reply, Reply::ShuttingDown(_)), "{reply:?}");
        assert_eq!(monitor.control().exited()?.reason(), Reason::Forced);
        assert!(monitor.wait()?.success());
    }
    Ok(())
}

#[test]
fn metrics_count_what_the_guest_did() -> Result<()> {
    let mut monitor = monitor()?;
    let (spec, mut console) =
        BootSpec::new(1, 128, &guest(&[&code::out(COM1_PORT, b'.'), &code::HALT]))?
            .with_pagemap(&monitor)?
            .with_console()?;
    let started_at_ns = monitor.control().boot(spec)?.started_at_ns;
    console.read_exact(&mut [0])?;
    let metrics = monitor.control().metrics()?;
    assert_eq!(metrics.devices["serial"].values["written_bytes"], 1);
    // The write is the first time that the guest is left, and after the start.
    assert!(metrics.first_exit_ns >= started_at_ns, "{metrics:?}");
    assert_eq!(metrics.console_tail, b".");
    let memory = metrics.memory.context("memory is told")?;
    assert_eq!(memory.guest_bytes, 128 << 20);
    assert!(memory.guest_private_bytes > 0);
    assert!(
        memory.guest_private_bytes < 1 << 20,
        "only what was touched: {memory:?}"
    );
    Ok(())
}

#[test]
fn the_monitor_ends_with_its_client() -> Result<()> {
    let mut before_boot = monitor()?;
    before_boot.abandon()?;
    assert!(before_boot.wait()?.success());

    let mut running = monitor()?;
    running
        .control()
        .boot(BootSpec::new(1, 128, &guest(&[&code::SPIN]))?)?;
    running.abandon()?;
    assert!(running.wait()?.success());
    Ok(())
}

#[test]
fn a_new_client_takes_over_through_the_control_listener() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let address = SocketAddrUnix::new(folder.path().join("control.sock"))?;
    let socket = || {
        let flags = SocketFlags::CLOEXEC;
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
    };
    let listener = socket()?;
    rustix::net::bind(&listener, &address)?;
    rustix::net::listen(&listener, 4)?;

    let mut monitor = monitor()?;
    let mut spec = BootSpec::new(1, 128, &guest(&[&code::SPIN]))?;
    spec.boot.control_listener_fd = Some(spec.add_fd(listener));
    monitor.control().boot(spec)?;
    monitor.abandon()?;

    let new_client = socket()?;
    rustix::net::connect(&new_client, &address)?;
    let mut control = Control::new(new_client);
    assert!(control.metrics()?.memory.is_some());
    control.request(Op::Shutdown(v1::Shutdown {}), &[])?;
    assert_eq!(control.exited()?.reason(), Reason::Forced);
    assert!(monitor.wait()?.success());
    Ok(())
}

#[test]
fn requests_out_of_place_are_refused_and_change_nothing() -> Result<()> {
    let mut monitor = monitor()?;
    let control = monitor.control();
    let code_of = |reply| match reply {
        Reply::Error(error) => error.code(),
        _ => v1::error::Code::Unspecified,
    };
    let reply = control.request(Op::GetMetrics(v1::GetMetrics {}), &[])?;
    assert_eq!(code_of(reply), v1::error::Code::WrongState);
    let reply = control.request(Op::Boot(v1::Boot::default()), &[])?;
    assert_eq!(code_of(reply), v1::error::Code::Invalid);

    let image = guest(&[&code::SPIN]);
    control.boot(BootSpec::new(1, 128, &image)?)?;
    let again = BootSpec::new(1, 128, &image)?;
    let reply = control.request(Op::Boot(again.boot), &again.fds)?;
    assert_eq!(code_of(reply), v1::error::Code::WrongState);
    assert!(control.metrics()?.memory.is_some());
    Ok(())
}

#[test]
fn a_boot_that_cannot_be_is_refused_in_words() -> Result<()> {
    let image = guest(&[&code::HALT]);

    let mut not_kvm = BootSpec::new(1, 128, &image)?;
    not_kvm.fds[0] = std::fs::File::open("/dev/null")?.into();
    assert!(refusal(not_kvm)?.contains("not /dev/kvm"));

    assert!(refusal(BootSpec::new(1, 128, &image[..100])?)?.contains("truncated"));
    assert!(refusal(BootSpec::new(1, 128, b"#!/bin/sh\n")?)?.contains("truncated"));
    assert!(refusal(BootSpec::new(1, 128, &[0; 4096])?)?.contains("neither"));
    let arm = elf(183, 0x10_0000, &code::HALT);
    assert!(refusal(BootSpec::new(1, 128, &arm)?)?.contains("another architecture"));
    let far = elf(62, 200 << 20, &code::HALT);
    assert!(refusal(BootSpec::new(1, 128, &far)?)?.contains("needs memory up to 201 MiB"));
    assert!(refusal(BootSpec::new(33, 128, &image)?)?.contains("vcpu_count: 33"));
    Ok(())
}

/// What it is given is all it has: it can open nothing, whatever happens in it.
#[test]
fn the_monitor_is_jailed() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let stray = std::fs::File::create(folder.path().join("stray"))?;
    rustix::io::fcntl_setfd(&stray, rustix::io::FdFlags::empty())?;
    let mut monitor = monitor()?;
    monitor
        .control()
        .boot(BootSpec::new(1, 128, &guest(&[&code::SPIN]))?)?;
    // What a client left open by mistake does not come along.
    let links = std::fs::read_dir(format!("/proc/{}/fd", monitor.pid()))?
        .map(|entry| std::fs::read_link(entry?.path()))
        .collect::<std::io::Result<Vec<_>>>()?;
    ensure!(
        !links.iter().any(|link| link.ends_with("stray")),
        "{links:?}"
    );
    let status = std::fs::read_to_string(format!("/proc/{}/status", monitor.pid()))?;
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .map(str::trim)
            .unwrap_or_default()
            .to_owned()
    };
    assert_eq!(field("Seccomp:"), "2");
    // The jail's filter and the seal, on vCPU threads too.
    for task in std::fs::read_dir(format!("/proc/{}/task", monitor.pid()))? {
        let status = std::fs::read_to_string(task?.path().join("status"))?;
        ensure!(status.contains("Seccomp_filters:\t2\n"), "{status}");
    }
    assert_eq!(field("NoNewPrivs:"), "1");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(field(set), "0000000000000000", "{set}");
    }
    Ok(())
}

#[test]
fn the_command_line_is_checked() -> Result<()> {
    let run = |args: &[&str]| std::process::Command::new(MONITOR).args(args).output();
    assert!(run(&["--help"])?.status.success());
    let version = String::from_utf8(run(&["--version"])?.stdout)?;
    assert!(version.starts_with("soulbox-vmm "));
    for args in [
        &[][..],
        &["--control-fd"],
        &["--control-fd", "x"],
        &["--frobnicate"],
    ] {
        assert_eq!(run(args)?.status.code(), Some(2), "{args:?}");
    }
    assert_eq!(run(&["--control-fd", "57"])?.status.code(), Some(2));
    Ok(())
}
