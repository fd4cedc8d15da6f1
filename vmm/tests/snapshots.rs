//! Snapshots and restores of tiny guests, natively.

use std::io::Read as _;
use std::path::Path;

use anyhow::{Result, ensure};
use soulbox_proto::vmm::v1;
use soulbox_vmm::testing::{BootSpec, Monitor, RestoreSpec, code, kvm, tiny_guest};

const COM1_PORT: u16 = 0x3f8;

fn monitor() -> Result<Monitor> {
    let program = Path::new(env!("CARGO_BIN_EXE_soulbox-vmm"));
    Ok(Monitor::spawn(program)?)
}

/// Writes a byte that it has in a register, raises it, and waits for a while:
/// what it prints tells where it was.
fn counter() -> Vec<u8> {
    let mut code = Vec::new();
    // mov dx, COM1; mov al, 'a'; mov rbx, 0x200000
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xb0, b'a']);
    code.extend([0x48, 0xc7, 0xc3, 0x00, 0x00, 0x20, 0x00]);
    // out dx, al; inc al; mov [rbx], al; mov ecx, N; loop; jmp back
    let body = code.len();
    code.extend([0xee, 0xfe, 0xc0, 0x88, 0x03]);
    code.extend([0xb9, 0xd0, 0x07, 0x00, 0x00]);
    code.extend([0xff, 0xc9, 0x75, 0xfc]);
    let back = body as i64 - (code.len() as i64 + 2);
    code.extend([0xeb, back as i8 as u8]);
    tiny_guest(&code)
}

#[test]
fn a_guest_goes_on_where_it_was() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut parent = monitor()?;
    let (spec, mut console) = BootSpec::new(1, 128, &counter())?
        .with_pagemap(&parent)?
        .with_console()?;
    parent.control().boot(spec)?;
    let mut told = [0; 3];
    console.read_exact(&mut told)?;
    assert_eq!(&told, b"abc");
    let snapshotted = parent.control().snapshot(folder.path(), 0)?;
    ensure!(snapshotted.memory_layers == 1, "{snapshotted:?}");
    ensure!(snapshotted.memory_bytes < 1 << 20, "{snapshotted:?}");
    // The parent goes on.
    console.read_exact(&mut told)?;

    for shell in [false, true] {
        let mut child = monitor()?;
        let kvm = if shell {
            child.control().prepare(v1::MachineShape {
                vcpu_count: 1,
                memory_mib: 128,
                block_devices: 0,
                vsock: false,
            })?;
            None
        } else {
            Some(kvm()?)
        };
        let (spec, mut console) = RestoreSpec::new(&[folder.path()], kvm)?
            .with_pagemap(&child)?
            .with_console()?;
        let (restored, _) = child.control().restore(spec)?;
        let mut told = [0; 3];
        console.read_exact(&mut told)?;
        ensure!(
            told[0] >= b'c' && told[1] == told[0] + 1,
            "{told:?} {restored:?}"
        );
    }
    let _ = code::HALT;
    let _ = COM1_PORT;
    Ok(())
}
