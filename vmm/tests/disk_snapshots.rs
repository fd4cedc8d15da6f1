//! Disks in snapshots of jailed monitors: what a disk does there must be what
//! the jail allows. The guest has no driver; its layers are written here.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use soulbox_proto::vmm::v1;
use soulbox_proto::vmm::v1::{error::Code, reply::Result as Reply, request::Op};
use soulbox_vmm::testing::{BootSpec, Monitor, RestoreSpec, code, tiny_guest};
use tempfile::TempDir;

const BLOCK: usize = 4096;
const DISK_BYTES: u64 = 64 * BLOCK as u64;
/// Where block 0 is in a layer: behind the header and the bitmap.
const DATA_START: u64 = 2 * BLOCK as u64;

struct Folder(TempDir);

// === impl Folder ===

impl Folder {
    fn new() -> Result<Self> {
        let folder = Self(tempfile::tempdir()?);
        std::fs::write(folder.path("base"), vec![0xba; DISK_BYTES as usize])?;
        Ok(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn open(&self, name: &str) -> Result<File> {
        Ok(File::open(self.path(name))?)
    }

    fn new_file(&self, name: &str) -> Result<File> {
        let mut options = File::options();
        Ok(options
            .read(true)
            .write(true)
            .create_new(true)
            .open(self.path(name))?)
    }

    /// Writes a layer that holds one block, filled with its number.
    fn layer_with(&self, name: &str, block: u8) -> Result<File> {
        let file = self.new_file(name)?;
        let mut header = b"SBXLAYER".to_vec();
        header.extend(1u32.to_le_bytes());
        header.extend((BLOCK as u32).to_le_bytes());
        header.extend(DISK_BYTES.to_le_bytes());
        let checksum = header.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        header.extend(checksum.to_le_bytes());
        file.set_len(DATA_START + DISK_BYTES)?;
        file.write_all_at(&header, 0)?;
        file.write_all_at(&[1 << (block % 8)], BLOCK as u64 + u64::from(block) / 8)?;
        let place = DATA_START + u64::from(block) * BLOCK as u64;
        file.write_all_at(&[block; BLOCK], place)?;
        Ok(file)
    }

    /// The blocks of a layer, and whether each is filled with its number.
    fn blocks(&self, name: &str) -> Result<Vec<u8>> {
        let layer = std::fs::read(self.path(name))?;
        let has = |block: &u8| layer[BLOCK + usize::from(block / 8)] >> (block % 8) & 1 == 1;
        let blocks: Vec<u8> = (0..64).filter(has).collect();
        for &block in &blocks {
            let start = DATA_START as usize + usize::from(block) * BLOCK;
            ensure!(layer[start..start + BLOCK] == [block; BLOCK], "{block}");
        }
        Ok(blocks)
    }
}

fn monitor() -> Result<Monitor> {
    let program = Path::new(env!("CARGO_BIN_EXE_soulbox-vmm"));
    Ok(Monitor::spawn(program)?)
}

/// Snapshots into files called `snapshot.<name>` and `memory.<name>`.
fn snapshot(
    monitor: &mut Monitor,
    folder: &Folder,
    name: &str,
    keep_memory_layers: u32,
    next: Option<File>,
    merge: Option<(File, u32)>,
) -> Result<Reply> {
    let mut fds: Vec<OwnedFd> = vec![
        folder.new_file(&format!("snapshot.{name}"))?.into(),
        folder.new_file(&format!("memory.{name}"))?.into(),
    ];
    let mut add = |file: File| {
        fds.push(file.into());
        (fds.len() - 1) as u32
    };
    let disk = v1::SnapshotDisk {
        next_layer_fd: next.map(&mut add),
        keep: merge.as_ref().map_or(0, |(_, keep)| *keep),
        merged_layer_fd: merge.map(|(file, _)| add(file)),
    };
    let snapshot = v1::Snapshot {
        memory_fd: 1,
        keep_memory_layers,
        disks: vec![disk],
        ..Default::default()
    };
    Ok(monitor.control().request(Op::Snapshot(snapshot), &fds)?)
}

/// Restores the snapshot called `name` in a shell.
fn restore(
    folder: &Folder,
    name: &str,
    memory: &[&str],
    frozen: &[&str],
    top: File,
) -> Result<Monitor> {
    let mut monitor = monitor()?;
    monitor.control().prepare(v1::MachineShape {
        vcpu_count: 1,
        memory_mib: 128,
        block_devices: 1,
        vsock: false,
        net: false,
    })?;
    let mut spec = RestoreSpec {
        restore: v1::Restore::default(),
        fds: Vec::new(),
    };
    spec.restore.state_fd = spec.add_fd(folder.open(&format!("snapshot.{name}"))?);
    for name in memory {
        let memory = spec.add_fd(folder.open(&format!("memory.{name}"))?);
        spec.restore.memory_fds.push(memory);
    }
    let mut disk = v1::RestoreDisk {
        base_fd: spec.add_fd(folder.open("base")?),
        ..Default::default()
    };
    for name in frozen {
        disk.frozen_layer_fds.push(spec.add_fd(folder.open(name)?));
    }
    disk.layer_fd = Some(spec.add_fd(top));
    spec.restore.disks.push(disk);
    let spec = spec.with_pagemap(&monitor)?;
    monitor.control().restore(spec)?;
    Ok(monitor)
}

fn layers(monitor: &mut Monitor) -> Result<u64> {
    Ok(monitor.control().metrics()?.devices["block.root"].values["layers"])
}

#[test]
fn disks_are_frozen_and_merged_in_the_jail() -> Result<()> {
    let folder = Folder::new()?;
    let mut parent = monitor()?;
    let mut spec = BootSpec::new(1, 128, &tiny_guest(&code::HALT))?;
    let disk = v1::BlockDevice {
        id: "root".into(),
        size_bytes: DISK_BYTES,
        base_fd: spec.add_fd(folder.open("base")?),
        layer_fd: Some(spec.add_fd(folder.layer_with("a", 1)?)),
        rate_limit: None,
    };
    spec.boot
        .machine
        .get_or_insert_default()
        .block_devices
        .push(disk);
    let spec = spec.with_pagemap(&parent)?;
    parent.control().boot(spec)?;
    assert_eq!(layers(&mut parent)?, 1);

    let reply = snapshot(
        &mut parent,
        &folder,
        "1",
        0,
        Some(folder.new_file("b")?),
        None,
    )?;
    ensure!(matches!(reply, Reply::Snapshotted(_)), "{reply:?}");
    assert_eq!(layers(&mut parent)?, 2);
    assert_eq!(folder.blocks("a")?, [1]);

    // While the parent has it open, and with a top layer of its own.
    let top = folder.layer_with("c", 2)?;
    let mut child = restore(&folder, "1", &["1"], &["a"], top)?;
    assert_eq!(layers(&mut child)?, 2);
    let merge = Some((folder.new_file("ac")?, 0));
    let next = Some(folder.new_file("d")?);
    let reply = snapshot(&mut child, &folder, "2", 1, next, merge)?;
    ensure!(matches!(reply, Reply::Snapshotted(_)), "{reply:?}");
    assert_eq!(layers(&mut child)?, 2);
    assert_eq!(folder.blocks("ac")?, [1, 2]);

    let top = folder.new_file("e")?;
    let mut grandchild = restore(&folder, "2", &["1", "2"], &["ac"], top)?;
    assert_eq!(layers(&mut grandchild)?, 2);

    // A refused freeze leaves the machine as it was.
    let next = Some(folder.open("base")?);
    let reply = snapshot(&mut grandchild, &folder, "3", 2, next, None)?;
    let Reply::Error(error) = &reply else {
        anyhow::bail!("{reply:?}");
    };
    assert_eq!(error.code(), Code::Disk, "{error:?}");
    assert_eq!(layers(&mut grandchild)?, 2);
    let next = Some(folder.new_file("f")?);
    let reply = snapshot(&mut grandchild, &folder, "4", 2, next, None)?;
    ensure!(matches!(reply, Reply::Snapshotted(_)), "{reply:?}");
    assert_eq!(layers(&mut grandchild)?, 3);
    Ok(())
}
