//! Snapshots and restores of tiny guests, on this machine's `/dev/kvm`.

use std::io::{PipeReader, Read as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Result, ensure};
use kvm_bindings::kvm_cpuid_entry2;
use soulbox_proto::vmm::v1;
use soulbox_proto::vmm::v1::{error::Code, reply::Result as Reply, request::Op};
use soulbox_vmm::snapshot;
use soulbox_vmm::testing::{BootSpec, Monitor, RestoreSpec, code, kvm, tiny_guest};

const SHAPE: v1::MachineShape = v1::MachineShape {
    vcpu_count: 1,
    memory_mib: 128,
    block_devices: 0,
    vsock: false,
    net: false,
};

fn monitor() -> Result<Monitor> {
    let program = Path::new(env!("CARGO_BIN_EXE_soulbox-vmm"));
    Ok(Monitor::spawn(program)?)
}

/// Counts in a page of its own and prints each count, from 1 on, with a pause in
/// between.
fn counter() -> Vec<u8> {
    let mut code = Vec::new();
    code.extend([0x66, 0xba, 0xf8, 0x03]); // mov dx, COM1
    code.extend([0x48, 0xc7, 0xc3, 0x00, 0x00, 0x20, 0x00]); // mov rbx, 0x200000
    let body = code.len();
    code.extend([0xfe, 0x03]); // inc byte [rbx]
    code.extend([0x8a, 0x03]); // mov al, [rbx]
    code.extend([0xee]); // out dx, al
    code.extend([0xb9, 0xd0, 0x07, 0x00, 0x00]); // mov ecx, 2000
    code.extend([0xff, 0xc9, 0x75, 0xfc]); // dec ecx; jnz -2
    let back = body as i64 - (code.len() as i64 + 2);
    code.extend([0xeb, back as i8 as u8]); // jmp body
    tiny_guest(&code)
}

fn boot_counter() -> Result<(Monitor, PipeReader)> {
    let mut monitor = monitor()?;
    let (spec, mut console) = BootSpec::new(1, 128, &counter())?
        .with_pagemap(&monitor)?
        .with_console()?;
    monitor.control().boot(spec)?;
    assert_eq!(counts::<3>(&mut console)?, [1, 2, 3]);
    Ok((monitor, console))
}

/// In a shell.
fn restore(folders: &[&Path]) -> Result<(Monitor, PipeReader)> {
    let mut monitor = monitor()?;
    monitor.control().prepare(SHAPE)?;
    let (spec, console) = RestoreSpec::new(folders, None)?
        .with_pagemap(&monitor)?
        .with_console()?;
    monitor.control().restore(spec)?;
    Ok((monitor, console))
}

fn counts<const N: usize>(console: &mut PipeReader) -> Result<[u8; N]> {
    let mut counts = [0; N];
    console.read_exact(&mut counts)?;
    Ok(counts)
}

/// The counts follow each other; the first is at least `least`.
fn goes_on(console: &mut PipeReader, least: u8) -> Result<u8> {
    let [first, second, third] = counts(console)?;
    ensure!(
        first >= least && second == first + 1 && third == second + 1,
        "{first}, {second}, {third} after {least}"
    );
    Ok(third)
}

#[test]
fn a_guest_goes_on_where_it_was() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut parent, mut console) = boot_counter()?;
    let snapshotted = parent.control().snapshot(folder.path(), 0)?;
    ensure!(snapshotted.memory_layers == 1, "{snapshotted:?}");
    ensure!(snapshotted.memory_bytes < 1 << 20, "{snapshotted:?}");
    goes_on(&mut console, 4)?;

    // Without a shell, and twice in one.
    let mut child = monitor()?;
    let (spec, mut console) = RestoreSpec::new(&[folder.path()], Some(kvm()?))?
        .with_pagemap(&child)?
        .with_console()?;
    child.control().restore(spec)?;
    goes_on(&mut console, 4)?;
    for _ in 0..2 {
        let (mut child, mut console) = restore(&[folder.path()])?;
        goes_on(&mut console, 4)?;
        let memory = child.control().metrics()?.memory.unwrap_or_default();
        ensure!(memory.guest_private_bytes < 64 << 10, "{memory:?}");
    }
    Ok(())
}

#[test]
fn snapshots_build_on_each_other() -> Result<()> {
    let folders: Vec<_> = (0..4)
        .map(|_| tempfile::tempdir())
        .collect::<Result<_, _>>()?;
    let paths: Vec<&Path> = folders.iter().map(tempfile::TempDir::path).collect();
    let (mut parent, _console) = boot_counter()?;
    parent.control().snapshot(paths[0], 0)?;
    drop(parent);

    let (mut child, mut console) = restore(&paths[..1])?;
    let first = goes_on(&mut console, 4)?;
    let diff = child.control().snapshot(paths[1], 1)?;
    ensure!(
        (diff.memory_layers, diff.memory_runs > 0) == (2, true),
        "{diff:?}"
    );
    ensure!(diff.memory_bytes <= 64 << 10, "{diff:?}");
    drop(child);

    let (mut grandchild, mut console) = restore(&paths[..2])?;
    let second = goes_on(&mut console, first)?;
    grandchild.control().snapshot(paths[2], 2)?;
    // The same again, flattened onto the root.
    goes_on(&mut console, second)?;
    let flat = grandchild.control().snapshot(paths[3], 1)?;
    ensure!(flat.memory_layers == 2, "{flat:?}");
    drop(grandchild);

    let (_deep, mut console) = restore(&paths[..3])?;
    goes_on(&mut console, second)?;
    let (_flat, mut console) = restore(&[paths[0], paths[3]])?;
    goes_on(&mut console, second)?;
    Ok(())
}

#[test]
fn a_paused_machine_stands_still_until_it_is_resumed() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut parent, mut console) = boot_counter()?;
    let new = |name| std::fs::File::create_new(folder.path().join(name)).map(Into::into);
    let snapshot = v1::Snapshot {
        memory_fd: 1,
        leave_paused: true,
        ..Default::default()
    };
    let reply = parent
        .control()
        .request(Op::Snapshot(snapshot), &[new("snapshot")?, new("memory")?])?;
    ensure!(matches!(reply, Reply::Snapshotted(_)), "{reply:?}");
    let told = parent.control().metrics()?.devices["serial"].values["written_bytes"];
    std::thread::sleep(std::time::Duration::from_millis(20));
    let later = parent.control().metrics()?.devices["serial"].values["written_bytes"];
    assert_eq!(told, later);
    let again = parent.control().snapshot(tempfile::tempdir()?.path(), 0);
    assert!(again.unwrap_err().to_string().contains("paused already"));
    let reply = parent.control().request(Op::Resume(v1::Resume {}), &[])?;
    ensure!(matches!(reply, Reply::Resumed(_)), "{reply:?}");
    goes_on(&mut console, 4)?;
    let reply = parent.control().request(Op::Resume(v1::Resume {}), &[])?;
    ensure!(code_of(&reply) == Some(Code::WrongState), "{reply:?}");
    Ok(())
}

#[test]
fn what_cannot_be_restored_is_refused_in_words() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut parent, _console) = boot_counter()?;
    parent.control().snapshot(folder.path(), 0)?;
    let file = |name| {
        let mut options = std::fs::File::options();
        options
            .read(true)
            .write(true)
            .open(folder.path().join(name))
    };
    let refusal = |folders: &[&Path], shape: v1::MachineShape| -> Result<String> {
        let mut monitor = monitor()?;
        monitor.control().prepare(shape)?;
        let spec = RestoreSpec::new(folders, None)?;
        let refused = monitor
            .control()
            .restore(spec)
            .expect_err("must be refused");
        // Nothing was started.
        ensure!(!monitor.wait()?.success());
        Ok(refused.to_string())
    };
    let path = folder.path();
    let other = v1::MachineShape {
        memory_mib: 256,
        ..SHAPE
    };
    let said = refusal(&[path], other)?;
    assert!(
        said.contains("1 vCPUs, 128 MiB") && said.contains("256 MiB"),
        "{said}"
    );
    let said = refusal(&[path, path], SHAPE)?;
    assert!(said.contains("has 1 layers, but 2 came"), "{said}");

    let memory = file("memory")?;
    memory.set_len(64 << 20)?;
    let said = refusal(&[path], SHAPE)?;
    assert!(said.contains("67108864 bytes, not 134217728"), "{said}");
    memory.set_len(128 << 20)?;

    let snapshot = file("snapshot")?;
    let mut byte = [0];
    for (at, expected) in [
        (1, "not a snapshot"),
        (20, "header is damaged"),
        (400, "state is damaged"),
    ] {
        snapshot.read_exact_at(&mut byte, at)?;
        snapshot.write_all_at(&[byte[0] ^ 4], at)?;
        let said = refusal(&[path], SHAPE)?;
        assert!(said.contains(expected), "{said}");
        snapshot.write_all_at(&byte, at)?;
    }
    snapshot.set_len(1000)?;
    let said = refusal(&[path], SHAPE)?;
    assert!(said.contains("truncated: 1000 bytes of"), "{said}");
    Ok(())
}

#[test]
fn features_that_this_host_lacks_are_named() -> Result<()> {
    const LEAF_EXTENDED_FEATURES: u32 = 7;
    const AVX512_VP2INTERSECT: u32 = 1 << 8;
    let folder = tempfile::tempdir()?;
    let (mut parent, _console) = boot_counter()?;
    parent.control().snapshot(folder.path(), 0)?;
    let path = folder.path().join("snapshot");
    let mut state = snapshot::read(&std::fs::File::open(&path)?)?;
    let entry = kvm_cpuid_entry2 {
        function: LEAF_EXTENDED_FEATURES,
        edx: AVX512_VP2INTERSECT,
        ..Default::default()
    };
    let cpuid = &mut state.cpu.cpuid;
    match cpuid
        .iter_mut()
        .find(|e| e.function == entry.function && e.index == 0)
    {
        // No CPU that is made today has it; one that does proves nothing here.
        Some(found) if found.edx & entry.edx != 0 => return Ok(()),
        Some(found) => found.edx |= entry.edx,
        None => cpuid.push(entry),
    }
    snapshot::write(&std::fs::File::create(&path)?, &state)?;
    let mut child = monitor()?;
    child.control().prepare(SHAPE)?;
    let refused = child
        .control()
        .restore(RestoreSpec::new(&[folder.path()], None)?)
        .expect_err("must be refused")
        .to_string();
    assert!(refused.contains("lacks: avx512_vp2intersect;"), "{refused}");
    Ok(())
}

#[test]
fn a_full_disk_leaves_the_machine_running() -> Result<()> {
    let (mut parent, mut console) = boot_counter()?;
    // A file that cannot grow stands for a disk that is full.
    let (reader, writer) = std::io::pipe()?;
    drop(reader);
    let full = std::fs::File::options().write(true).open("/dev/full")?;
    let folder = tempfile::tempdir()?;
    let memory = std::fs::File::create_new(folder.path().join("memory"))?;
    for (state, expected) in [(full.into(), Code::DiskFull), (writer.into(), Code::Host)] {
        let snapshot = v1::Snapshot {
            memory_fd: 1,
            ..Default::default()
        };
        let fds = [state, memory.try_clone()?.into()];
        let reply = parent.control().request(Op::Snapshot(snapshot), &fds)?;
        ensure!(code_of(&reply) == Some(expected), "{reply:?}");
        goes_on(&mut console, 4)?;
    }
    parent.control().snapshot(tempfile::tempdir()?.path(), 0)?;
    goes_on(&mut console, 4)?;
    Ok(())
}

/// A shell that has a first layer is for what builds on it, and for anything else.
#[test]
fn memory_is_prepared_ahead() -> Result<()> {
    let folders = [tempfile::tempdir()?, tempfile::tempdir()?];
    let [root, diff] = folders.each_ref().map(tempfile::TempDir::path);
    let (mut parent, mut console) = boot_counter()?;
    parent.control().snapshot(root, 0)?;
    let other = tempfile::tempdir()?;
    let least_of_other = goes_on(&mut console, 4)?;
    parent.control().snapshot(other.path(), 0)?;
    let (mut child, mut console) = restore(&[root])?;
    let least_of_diff = goes_on(&mut console, 4)?;
    child.control().snapshot(diff, 1)?;

    let prepared = |memory: &Path, working_set: &Path| -> Result<Monitor> {
        let mut monitor = monitor()?;
        let prepare = v1::Prepare {
            shape: Some(SHAPE),
            kvm_fd: 0,
            memory_fd: Some(1),
            working_set_fd: Some(2),
        };
        let files = [memory, working_set].map(std::fs::File::open);
        let mut fds = vec![kvm()?];
        for file in files {
            fds.push(file?.into());
        }
        monitor.control().prepare_with(prepare, fds)?;
        Ok(monitor)
    };
    let memory = root.join("memory");
    let working_set = root.join("working_set");
    let file = std::fs::File::create_new(&working_set)?;
    let record = Op::RecordWorkingSet(v1::RecordWorkingSet { file_fd: 0 });
    child.control().request(record, &[file.into()])?;
    for (spec, least) in [
        (RestoreSpec::on_first_layer(&[root])?, 4),
        (RestoreSpec::on_first_layer(&[root, diff])?, least_of_diff),
        (RestoreSpec::new(&[root, diff], None)?, least_of_diff),
        (RestoreSpec::new(&[other.path()], None)?, least_of_other),
    ] {
        let mut child = prepared(&memory, &working_set)?;
        let (spec, mut console) = spec.with_pagemap(&child)?.with_console()?;
        child.control().restore(spec)?;
        goes_on(&mut console, least)?;
        // What was filled in is its own.
        let memory = child.control().metrics()?.memory.unwrap_or_default();
        ensure!(memory.guest_private_bytes < 64 << 10, "{memory:?}");
    }
    // Or is booted.
    let mut booted = prepared(&memory, &working_set)?;
    let (spec, mut console) = BootSpec::new(1, 128, &counter())?.with_console()?;
    booted.control().boot(spec)?;
    assert_eq!(counts::<3>(&mut console)?, [1, 2, 3]);

    // A working set that is none costs nothing; a layer of another size, the shell.
    let mut child = prepared(&memory, &memory)?;
    let (spec, mut console) = RestoreSpec::on_first_layer(&[root])?.with_console()?;
    child.control().restore(spec)?;
    goes_on(&mut console, 4)?;
    let Err(refused) = prepared(&working_set, &working_set) else {
        anyhow::bail!("a layer of another size was taken");
    };
    ensure!(refused.to_string().contains("memory layer 0"), "{refused}");
    let mut plain = monitor()?;
    plain.control().prepare(SHAPE)?;
    let spec = RestoreSpec::on_first_layer(&[root])?;
    let refused = plain.control().restore(spec).unwrap_err().to_string();
    ensure!(refused.contains("no memory layer is prepared"), "{refused}");
    // It waits for a better one.
    plain.control().restore(RestoreSpec::new(&[root], None)?)?;
    Ok(())
}

#[test]
fn requests_that_do_not_fit_change_nothing() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut monitor = monitor()?;
    let no_shell = RestoreSpec::new(&[], None);
    assert!(no_shell.is_err());
    let reply = monitor.control().request(Op::Resume(v1::Resume {}), &[])?;
    ensure!(code_of(&reply) == Some(Code::WrongState), "{reply:?}");
    monitor.control().prepare(SHAPE)?;
    let again = monitor.control().prepare(SHAPE).unwrap_err();
    assert!(again.to_string().contains("a shell already"), "{again}");
    // Of another shape than the shell, then of its own.
    let other = BootSpec::new(2, 128, &tiny_guest(&code::HALT))?;
    let refused = monitor.control().boot(other).unwrap_err();
    assert!(refused.to_string().contains("another shape"), "{refused}");
    monitor
        .control()
        .boot(BootSpec::new(1, 128, &tiny_guest(&code::SPIN))?)?;
    let refused = monitor.control().snapshot(folder.path(), 0).unwrap_err();
    assert!(refused.to_string().contains("no pagemap"), "{refused}");
    let spares = v1::OpenSpares {
        guest_port: 1,
        count: 1,
    };
    let reply = monitor.control().request(Op::OpenSpares(spares), &[])?;
    ensure!(
        code_of(&reply) == Some(Code::WrongState),
        "no vsock: {reply:?}"
    );
    Ok(())
}

fn code_of(reply: &Reply) -> Option<Code> {
    match reply {
        Reply::Error(error) => Some(error.code()),
        _ => None,
    }
}
