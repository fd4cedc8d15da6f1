//! The golden snapshot of each format version from the first released on (1 never
//! was), which every later loader must take. A golden snapshot is never made anew: what was saved by the SoulBox of
//! its time is the point of it. Only while its version has not been released
//! does `make_the_golden_snapshot` replace it.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use soulbox_proto::vmm::v1::{error::Code, reply::Result as Reply, request::Op};
use soulbox_vmm::devices::DeviceState;
use soulbox_vmm::devices::panic::PanicState;
use soulbox_vmm::devices::virtio::ChipState;
use soulbox_vmm::devices::virtio::balloon::{Balloon, BalloonState};
use soulbox_vmm::devices::virtio::mmio::{SavedQueue, TransportState};
use soulbox_vmm::devices::virtio::net::{Net, NetState};
use soulbox_vmm::machine::layout;
use soulbox_vmm::machine::state::MachineState;
use soulbox_vmm::snapshot;
use soulbox_vmm::testing::{BootSpec, Monitor, RestoreSpec, TINY_ENTRY, kvm, tiny_guest};
use soulbox_vmm::vcpu::features;
use tempfile::TempDir;

/// What the guest prints, over and over, from a page of its own.
const WORDS: [u8; 8] = *b"golden\n\0";
const WORDS_AT: u64 = 0x20_0000;
const MEMORY_BYTES: u64 = 128 << 20;
const PAGE_BYTES: usize = 4096;

const V2_SNAPSHOT: &[u8] = include_bytes!("golden/v2/snapshot");
const V2_MEMORY: &[u8] = include_bytes!("golden/v2/memory.zst");

const MSR_IA32_TSC: u32 = 0x10;

/// The guest's instructions.
fn code() -> Vec<u8> {
    let mut code = Vec::new();
    code.extend([0x66, 0xba, 0xf8, 0x03]); // mov dx, COM1
    code.extend([0x48, 0xc7, 0xc3, 0x00, 0x00, 0x20, 0x00]); // mov rbx, WORDS_AT
    code.extend([0x48, 0xb8]); // mov rax, WORDS
    code.extend(WORDS);
    code.extend([0x48, 0x89, 0x03]); // mov [rbx], rax
    code.extend([0x48, 0x89, 0xde]); // again: mov rsi, rbx
    code.extend([0x8a, 0x06]); // next: mov al, [rsi]
    code.extend([0x48, 0xff, 0xc6]); // inc rsi
    code.extend([0x84, 0xc0]); // test al, al
    code.extend([0x74, 0xf4]); // jz again
    code.extend([0xee]); // out dx, al
    code.extend([0xb9, 0xd0, 0x07, 0x00, 0x00]); // mov ecx, 2000
    code.extend([0xff, 0xc9, 0x75, 0xfc]); // dec ecx; jnz -2
    code.extend([0xeb, 0xeb]); // jmp next
    code
}

fn monitor() -> Result<Monitor> {
    let program = Path::new(env!("CARGO_BIN_EXE_soulbox-vmm"));
    Ok(Monitor::spawn(program)?)
}

/// A folder with a golden snapshot as the daemon keeps it.
fn unpack(snapshot: &[u8], memory: &[u8]) -> Result<TempDir> {
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("snapshot"), snapshot)?;
    let file = File::create_new(folder.path().join("memory"))?;
    let memory = zstd::decode_all(memory)?;
    file.set_len(memory.len() as u64)?;
    for (at, page) in (0u64..)
        .step_by(PAGE_BYTES)
        .zip(memory.chunks(PAGE_BYTES))
        .filter(|(_, page)| *page != [0; PAGE_BYTES])
    {
        file.write_all_at(page, at)?;
    }
    Ok(folder)
}

fn decode(folder: &Path) -> Result<MachineState> {
    Ok(snapshot::read(&File::open(folder.join("snapshot"))?)?)
}

fn untouched(queues: usize, size: u16, chip: ChipState) -> DeviceState {
    let queue = SavedQueue {
        size,
        ready: false,
        next_avail: 0,
        next_used: 0,
        event_idx: false,
        desc_table: 0,
        avail_ring: 0,
        used_ring: 0,
    };
    DeviceState::Virtio(TransportState {
        status: 0,
        features_select: 0,
        driver_features_select: 0,
        driver_features: 0,
        queue_select: 0,
        activated: false,
        interrupt_status: 0,
        queues: vec![queue; queues],
        chip,
    })
}

#[test]
fn the_second_version_decodes_to_what_it_meant() -> Result<()> {
    let folder = unpack(V2_SNAPSHOT, V2_MEMORY)?;
    let state = decode(folder.path())?;
    let shape = &state.shape;
    assert_eq!((shape.vcpu_count, shape.memory_mib), (1, 128));
    assert_eq!((shape.block_devices, shape.vsock), (0, false));
    assert!(shape.net);
    assert_eq!(state.cpu.name, "host-1");
    assert!(state.cpu.cpuid.iter().any(|entry| entry.function == 1));
    assert_eq!((state.memory.layers, state.memory.runs.len()), (1, 0));
    assert!(state.disk_layers.is_empty());
    let chips = [&state.vm.pic_master, &state.vm.pic_slave, &state.vm.ioapic];
    assert_eq!(chips.map(|chip| chip.chip_id), [0, 1, 2]);
    assert!(state.vm.clock.clock > 0);

    let devices = state.devices.iter();
    let devices: Vec<_> = devices
        .map(|device| (device.name.as_str(), &device.state))
        .collect();
    let [serial, rest @ ..] = devices.as_slice() else {
        anyhow::bail!("there are no devices");
    };
    let ("serial", DeviceState::Serial(serial)) = serial else {
        anyhow::bail!("the serial port comes first: {serial:?}");
    };
    assert_eq!(serial.line_status & 0x60, 0x60, "transmitter empty");
    assert_eq!(serial.interrupt_enable, 0);
    let balloon = ChipState::Balloon(BalloonState {
        target_pages: 0,
        actual_pages: 0,
    });
    let net = ChipState::Net(NetState { link_up: false });
    let expected = [
        ("power", &DeviceState::None),
        ("panic", &DeviceState::Panic(PanicState { panics: 0 })),
        ("generation", &DeviceState::None),
        ("rng", &untouched(1, 16, ChipState::Rng)),
        ("balloon", &untouched(Balloon::QUEUES, 32, balloon)),
        ("net", &untouched(Net::QUEUES, 256, net)),
    ];
    assert_eq!(rest, expected);
    Ok(())
}

#[test]
fn the_second_version_has_the_guest_where_it_was() -> Result<()> {
    let folder = unpack(V2_SNAPSHOT, V2_MEMORY)?;
    let state = decode(folder.path())?;
    let [vcpu] = state.vcpus.as_slice() else {
        anyhow::bail!("{} vCPUs", state.vcpus.len());
    };
    assert_eq!(vcpu.mp_state.mp_state, 0, "runnable");
    let code = code();
    let code_end = TINY_ENTRY + code.len() as u64;
    assert!((TINY_ENTRY..code_end).contains(&vcpu.regs.rip));
    assert_eq!(vcpu.regs.rbx, WORDS_AT);
    assert_eq!(vcpu.regs.rdx as u16, layout::COM1_PORT);
    assert!((WORDS_AT..=WORDS_AT + 8).contains(&vcpu.regs.rsi));
    assert_eq!(vcpu.sregs.cr3, layout::PML4.0);
    assert_eq!(vcpu.sregs.cr0 & 0x8000_0001, 0x8000_0001, "paging");
    assert_eq!(vcpu.sregs.efer & 0x500, 0x500, "long mode");
    assert_eq!(vcpu.sregs.cs.l, 1);
    assert_eq!(vcpu.xcrs.nr_xcrs, 1);
    assert!(vcpu.xsave.len() >= 1024);
    // FCW and MXCSR as they are after reset.
    assert_eq!((vcpu.xsave[0] & 0xffff, vcpu.xsave[6]), (0x37f, 0x1f80));
    assert_eq!(vcpu.msrs.first().map(|msr| msr.0), Some(MSR_IA32_TSC));
    assert!(vcpu.tsc_khz > 0);

    let memory = File::open(folder.path().join("memory"))?;
    assert_eq!(memory.metadata()?.len(), MEMORY_BYTES);
    let mut words = [0; 8];
    memory.read_exact_at(&mut words, WORDS_AT)?;
    assert_eq!(words, WORDS);
    let mut saved_code = vec![0; code.len()];
    memory.read_exact_at(&mut saved_code, TINY_ENTRY)?;
    assert_eq!(saved_code, code);
    Ok(())
}

/// While it is the present version: an older one is written as the present one.
#[test]
fn the_second_version_is_written_as_it_was_read() -> Result<()> {
    let folder = unpack(V2_SNAPSHOT, V2_MEMORY)?;
    let again = tempfile::tempfile()?;
    snapshot::write(&again, &decode(folder.path())?)?;
    let mut bytes = vec![0; usize::try_from(again.metadata()?.len())?];
    again.read_exact_at(&mut bytes, 0)?;
    assert!(bytes == V2_SNAPSHOT, "the encoding has changed");
    Ok(())
}

#[test]
fn the_second_version_runs_where_its_cpu_features_are() -> Result<()> {
    let folder = unpack(V2_SNAPSHOT, V2_MEMORY)?;
    let wanted = decode(folder.path())?.cpu.cpuid;
    let host = kvm_ioctls::Kvm::new()?.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let missing = features::missing(&wanted, host.as_slice());

    let mut monitor = monitor()?;
    let (spec, mut console) = RestoreSpec::new(&[folder.path()], Some(kvm()?))?
        .with_net(None)
        .with_pagemap(&monitor)?
        .with_console()?;
    match monitor.control().restore(spec) {
        Ok(_) => {
            assert_eq!(missing, [""; 0]);
            let mut told = [0; 14];
            console.read_exact(&mut told)?;
            let told = String::from_utf8_lossy(&told);
            ensure!("golden\ngolden\ngolden\n".contains(&*told), "{told:?}");
        }
        Err(refused) if !missing.is_empty() => {
            let refused = refused.to_string();
            for feature in missing {
                assert!(refused.contains(&feature), "{feature}: {refused}");
            }
        }
        // Its features alone do not tell which registers a CPU of another model
        // has, nor how large its XSAVE area is.
        Err(refused) => {
            let model = |cpuid: &[kvm_bindings::kvm_cpuid_entry2]| {
                let entry = cpuid.iter().find(|entry| entry.function == 1);
                entry.map(|entry| entry.eax)
            };
            assert_ne!(model(&wanted), model(host.as_slice()), "{refused}");
            let said = refused.to_string();
            assert!(
                ["MSR", "XSAVE"].iter().any(|what| said.contains(what)),
                "{said}"
            );
        }
    }
    Ok(())
}

#[test]
fn what_a_host_lacks_is_named() -> Result<()> {
    let folder = unpack(V2_SNAPSHOT, V2_MEMORY)?;
    let mut state = decode(folder.path())?;
    for entry in &mut state.cpu.cpuid {
        if (entry.function, entry.index) == (7, 0) {
            // No host has, and KVM offers, all of them.
            entry.ebx = u32::MAX;
        }
    }
    snapshot::write(&File::create(folder.path().join("snapshot"))?, &state)?;
    let host = kvm_ioctls::Kvm::new()?.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let missing = features::missing(&state.cpu.cpuid, host.as_slice());
    assert!(!missing.is_empty());

    let mut monitor = monitor()?;
    let spec = RestoreSpec::new(&[folder.path()], Some(kvm()?))?.with_net(None);
    let reply = monitor
        .control()
        .request(Op::Restore(spec.restore), &spec.fds)?;
    let Reply::Error(error) = reply else {
        anyhow::bail!("{reply:?}");
    };
    assert_eq!(error.code(), Code::Cpu);
    assert!(error.message.contains(&missing.join(", ")), "{error:?}");
    // Nothing was started.
    assert!(!monitor.wait()?.success());
    Ok(())
}

#[test]
fn golden_snapshots_are_small() {
    assert!(V2_SNAPSHOT.len() + V2_MEMORY.len() < 64 << 10);
}

#[test]
#[ignore = "replaces the golden snapshot of a version that has not been released yet"]
fn make_the_golden_snapshot() -> Result<()> {
    let target = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v2");
    let folder = tempfile::tempdir()?;
    let mut monitor = monitor()?;
    let (spec, mut console) = BootSpec::new(1, 128, &tiny_guest(&code()))?
        .with_net(None)
        .with_pagemap(&monitor)?
        .with_console()?;
    monitor.control().boot(spec)?;
    let mut told = [0; 14];
    console.read_exact(&mut told)?;
    assert_eq!(&told, b"golden\ngolden\n");
    monitor.control().snapshot(folder.path(), 0)?;

    std::fs::copy(folder.path().join("snapshot"), target.join("snapshot"))?;
    let memory = File::open(folder.path().join("memory"))?;
    let packed = zstd::encode_all(memory, 19).context("memory is packed")?;
    std::fs::write(target.join("memory.zst"), packed)?;
    Ok(())
}
