//! The network device of a jailed monitor, with real TAPs and guests of a few
//! instructions on this machine's `/dev/kvm`.

use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use soulbox_proto::vmm::v1;
use soulbox_proto::vmm::v1::{error::Code, reply::Result as Reply, request::Op};
use soulbox_vmm::devices::DeviceState;
use soulbox_vmm::devices::virtio::mmio::TransportState;
use soulbox_vmm::machine::layout;
use soulbox_vmm::snapshot;
use soulbox_vmm::testing::tap::TapPeer;
use soulbox_vmm::testing::{BootSpec, GUEST_MAC, Monitor, RestoreSpec, TINY_ENTRY, code, kvm};
use soulbox_vmm::testing::{Control, tiny_guest};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_MRG_RXBUF,
};

const SHAPE: v1::MachineShape = v1::MachineShape {
    vcpu_count: 1,
    memory_mib: 128,
    block_devices: 0,
    vsock: false,
    net: true,
};

/// After entropy and balloon.
const NET_NUMBER: u64 = 2;

const QUEUE_SIZE: u16 = 8;
const HEADER_BYTES: usize = 12;
const WRITE: u16 = 2;

/// Everything a driver prepares, as it lies in guest memory from a page on: the
/// rings of both queues, and their buffers.
struct Rings {
    start: u64,
    bytes: Vec<u8>,
}

const RX_RINGS: usize = 0;
const TX_RINGS: usize = 0x400;
const AVAIL_OFFSET: usize = 0x100;
const USED_OFFSET: usize = 0x200;
const TX_PACKET: usize = 0x800;
const RX_BUFFERS: usize = 0x1000;
const RX_BUFFER_BYTES: usize = 512;

fn frame(bytes: usize, seed: u8) -> Vec<u8> {
    let mut frame = [&GUEST_MAC[..], &[0x02, 0, 0, 0, 0, 0x02], &[0x88, 0xb5]].concat();
    frame.extend((frame.len()..bytes).map(|at| at as u8 ^ seed));
    frame
}

fn monitor() -> Result<Monitor> {
    let program = Path::new(env!("CARGO_BIN_EXE_soulbox-vmm"));
    Ok(Monitor::spawn(program)?)
}

// === impl Rings ===

impl Rings {
    /// One frame to be sent, and four buffers for what comes.
    fn new(start: u64, frame: &[u8]) -> Self {
        let mut rings = Self {
            start,
            bytes: vec![0; 0x2000],
        };
        for index in 0..4 {
            let at = RX_BUFFERS + usize::from(index) * RX_BUFFER_BYTES;
            rings.descriptor(RX_RINGS, index, at, RX_BUFFER_BYTES, WRITE);
        }
        rings.available(RX_RINGS, 4);
        rings.descriptor(TX_RINGS, 0, TX_PACKET, HEADER_BYTES + frame.len(), 0);
        rings.available(TX_RINGS, 1);
        rings.put(TX_PACKET + HEADER_BYTES, frame);
        rings
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn descriptor(&mut self, rings: usize, index: u16, at: usize, len: usize, flags: u16) {
        let place = rings + 16 * usize::from(index);
        self.put(place, &(self.start + at as u64).to_le_bytes());
        self.put(place + 8, &(len as u32).to_le_bytes());
        self.put(place + 12, &flags.to_le_bytes());
    }

    /// The first descriptors, a chain each.
    fn available(&mut self, rings: usize, count: u16) {
        self.put(rings + AVAIL_OFFSET + 2, &count.to_le_bytes());
        for head in 0..count {
            let place = rings + AVAIL_OFFSET + 4 + 2 * usize::from(head);
            self.put(place, &head.to_le_bytes());
        }
    }

    fn queues(&self) -> [[u64; 3]; 2] {
        [RX_RINGS, TX_RINGS].map(|rings| {
            [0, AVAIL_OFFSET, USED_OFFSET].map(|part| self.start + (rings + part) as u64)
        })
    }
}

/// Waits until the counter is what it should be.
fn counts(control: &mut Control, counter: &str, expected: u64) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let metrics = control.metrics()?;
        let values = &metrics.devices["net"].values;
        if values[counter] == expected {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{values:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A driver in 26 instructions: it writes the registers one after the other.
fn driver() -> Vec<u8> {
    const CODE_BYTES: usize = 0x1000;
    const PAGE_DIRECTORY: u64 = TINY_ENTRY + CODE_BYTES as u64;
    const RINGS: u64 = PAGE_DIRECTORY + 0x1000;
    let rings = Rings::new(RINGS, &frame(64, 1));

    let mut code = Vec::new();
    // The page tables that the guest is entered with end below the devices: the
    // fourth GiB gets a page directory of its own.
    code.extend([0x48, 0xc7, 0xc0]); // mov rax, …
    code.extend((PAGE_DIRECTORY as u32 | 3).to_le_bytes());
    code.extend([0x48, 0x89, 0x04, 0x25]); // mov […], rax
    code.extend((layout::PDPT.0 as u32 + 3 * 8).to_le_bytes());
    code.push(0xbf); // mov edi, …
    let device = layout::VIRTIO_MMIO_START + NET_NUMBER * layout::VIRTIO_MMIO_BYTES;
    code.extend((device as u32).to_le_bytes());
    let mut write = |register: u32, value: u32| {
        code.extend([0xc7, 0x87]); // mov dword [rdi + …], …
        code.extend(register.to_le_bytes());
        code.extend(value.to_le_bytes());
    };
    write(reg::VIRTIO_MMIO_STATUS, 1);
    write(reg::VIRTIO_MMIO_STATUS, 3);
    let features: u64 = 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_NET_F_MRG_RXBUF;
    for (select, bits) in [(0, features as u32), (1, (features >> 32) as u32)] {
        write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
        write(reg::VIRTIO_MMIO_DRIVER_FEATURES, bits);
    }
    write(reg::VIRTIO_MMIO_STATUS, 11);
    for (queue, [descriptors, available, used]) in (0..).zip(rings.queues()) {
        write(reg::VIRTIO_MMIO_QUEUE_SEL, queue);
        write(reg::VIRTIO_MMIO_QUEUE_NUM, u32::from(QUEUE_SIZE));
        write(reg::VIRTIO_MMIO_QUEUE_DESC_LOW, descriptors as u32);
        write(reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, available as u32);
        write(reg::VIRTIO_MMIO_QUEUE_USED_LOW, used as u32);
        write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
    }
    write(reg::VIRTIO_MMIO_STATUS, 15);
    write(reg::VIRTIO_MMIO_QUEUE_NOTIFY, 1);
    code.extend(code::HALT);
    assert!(code.len() <= CODE_BYTES);

    code.resize(CODE_BYTES, 0);
    // Pages of 2 MiB, from 0xc0000000 on.
    let entries = (0..512u64).map(|entry| (0xc000_0000 + (entry << 21)) | 0x83);
    code.extend(entries.flat_map(u64::to_le_bytes));
    code.extend(rings.bytes);
    code
}

#[test]
fn a_guest_sends_and_receives() -> Result<()> {
    let (peer, tap) = TapPeer::new()?;
    let mut monitor = monitor()?;
    let spec = BootSpec::new(1, 128, &tiny_guest(&driver()))?.with_net(Some(tap));
    monitor.control().boot(spec)?;
    ensure!(peer.receive()? == frame(64, 1));
    for seed in 0..4 {
        peer.send(&frame(200, seed))?;
    }
    counts(monitor.control(), "rx_packets", 4)?;
    counts(monitor.control(), "tx_packets", 1)?;

    // The fifth has no buffer.
    peer.send(&frame(200, 4))?;
    counts(monitor.control(), "rx_packets", 4)
}

/// A snapshot of a machine that halts, in which the network device is made to be
/// in use: with these features, and rings that lie ready in memory.
fn snapshot_in_use(folder: &Path, features: u64, sent: &[u8]) -> Result<Rings> {
    let mut parent = monitor()?;
    let spec = BootSpec::new(1, 128, &tiny_guest(&code::HALT))?
        .with_net(None)
        .with_pagemap(&parent)?;
    parent.control().boot(spec)?;
    parent.control().snapshot(folder, 0)?;
    drop(parent);

    let rings = Rings::new(0x40_0000, sent);
    let memory = std::fs::File::options()
        .write(true)
        .open(folder.join("memory"))?;
    memory.write_all_at(&rings.bytes, rings.start)?;
    let path = folder.join("snapshot");
    let mut state = snapshot::read(&std::fs::File::open(&path)?)?;
    let transport = net_of(&mut state.devices).context("there is a net")?;
    transport.status = 15;
    transport.driver_features = features;
    transport.activated = true;
    for (queue, addresses) in transport.queues.iter_mut().zip(rings.queues()) {
        [queue.desc_table, queue.avail_ring, queue.used_ring] = addresses;
        (queue.size, queue.ready) = (QUEUE_SIZE, true);
    }
    snapshot::write(&std::fs::File::create(&path)?, &state)?;
    Ok(rings)
}

fn net_of(devices: &mut [soulbox_vmm::machine::state::NamedDevice]) -> Option<&mut TransportState> {
    let net = devices.iter_mut().find(|device| device.name == "net")?;
    match &mut net.state {
        DeviceState::Virtio(transport) => Some(transport),
        _ => None,
    }
}

const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4;

#[test]
fn a_restored_driver_goes_on_where_it_was() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let sent = frame(900, 1);
    let rings = snapshot_in_use(folder.path(), FEATURES, &sent)?;
    let (peer, tap) = TapPeer::new()?;
    let mut child = monitor()?;
    child.control().prepare(SHAPE)?;
    let spec = RestoreSpec::new(&[folder.path()], None)?
        .with_pagemap(&child)?
        .with_net(Some(tap));
    child.control().restore(spec)?;
    ensure!(peer.receive()? == sent);
    // Merged from two buffers, of four.
    let received = frame(800, 2);
    peer.send(&received)?;
    counts(child.control(), "rx_packets", 1)?;

    // What the guest has of it is in the next snapshot.
    let next = tempfile::tempdir()?;
    child.control().snapshot(next.path(), 1)?;
    let mut state = snapshot::read(&std::fs::File::open(next.path().join("snapshot"))?)?;
    let memory = std::fs::File::open(next.path().join("memory"))?;
    let mut packet = vec![0; HEADER_BYTES + received.len()];
    let at = rings.start + RX_BUFFERS as u64;
    let runs = &state.memory.runs;
    let run = runs.iter().rfind(|run| run.start_bytes() <= at);
    let run = run.context("there is a run")?;
    memory.read_exact_at(&mut packet, run.layer_bytes() + (at - run.start_bytes()))?;
    ensure!(packet[HEADER_BYTES..] == received);
    ensure!(packet[10..12] == [2, 0], "two buffers");
    let transport = net_of(&mut state.devices).context("there is a net")?;
    let positions = |queue: &soulbox_vmm::devices::virtio::mmio::SavedQueue| {
        (queue.next_avail, queue.next_used)
    };
    let positions: Vec<_> = transport.queues.iter().map(positions).collect();
    assert_eq!(positions, [(2, 2), (1, 1)]);

    // And it goes on after it.
    peer.send(&received)?;
    counts(child.control(), "rx_packets", 2)?;
    drop(child);

    // A clone of the clone has sent that frame already, and two buffers left.
    let (peer, tap) = TapPeer::new()?;
    let mut grandchild = monitor()?;
    let folders = [folder.path(), next.path()];
    let spec = RestoreSpec::new(&folders, Some(kvm()?))?.with_net(Some(tap));
    grandchild.control().restore(spec)?;
    peer.send(&frame(800, 3))?;
    counts(grandchild.control(), "rx_packets", 1)?;
    counts(grandchild.control(), "tx_packets", 0)?;
    assert!(peer.try_receive()?.is_none());
    Ok(())
}

#[test]
fn a_restored_machine_may_have_no_tap_until_another_time() -> Result<()> {
    let folder = tempfile::tempdir()?;
    snapshot_in_use(folder.path(), FEATURES, &frame(60, 1))?;
    let mut child = monitor()?;
    let spec = RestoreSpec::new(&[folder.path()], Some(kvm()?))?.with_net(None);
    child.control().restore(spec)?;
    counts(child.control(), "tx_dropped_link_down", 1)?;
    let reply = set_net(
        child.control(),
        v1::SetNet {
            link_up: Some(true),
            ..Default::default()
        },
    )?;
    ensure!(code_of(&reply) == Some(Code::WrongState), "{reply:?}");
    counts(child.control(), "link_up", 0)
}

#[test]
fn limits_and_link_change_while_it_runs() -> Result<()> {
    let folder = tempfile::tempdir()?;
    snapshot_in_use(folder.path(), FEATURES, &frame(60, 1))?;
    let (peer, tap) = TapPeer::new()?;
    let mut child = monitor()?;
    let mut spec = RestoreSpec::new(&[folder.path()], Some(kvm()?))?.with_net(Some(tap));
    let one_in_an_hour = v1::RateLimit {
        bytes: None,
        operations: Some(v1::TokenBucket {
            capacity: 1,
            refill_time_ms: 3_600_000,
        }),
    };
    if let Some(net) = &mut spec.restore.net {
        net.rx = Some(one_in_an_hour);
    }
    child.control().restore(spec)?;
    ensure!(peer.receive()? == frame(60, 1));
    peer.send(&frame(60, 2))?;
    peer.send(&frame(60, 3))?;
    counts(child.control(), "rx_throttled", 1)?;
    counts(child.control(), "rx_packets", 1)?;
    let set = |child: &mut Monitor, set| -> Result<()> {
        let reply = set_net(child.control(), set)?;
        ensure!(matches!(reply, Reply::NetSet(_)), "{reply:?}");
        Ok(())
    };
    let unlimited = v1::SetNet {
        rx: Some(v1::RateLimit::default()),
        ..Default::default()
    };
    set(&mut child, unlimited)?;
    counts(child.control(), "rx_packets", 2)?;
    let link = |up| v1::SetNet {
        link_up: Some(up),
        ..Default::default()
    };
    set(&mut child, link(false))?;
    peer.send(&frame(60, 4))?;
    counts(child.control(), "rx_dropped_link_down", 1)?;
    set(&mut child, link(true))?;
    peer.send(&frame(60, 5))?;
    counts(child.control(), "rx_packets", 3)?;

    let empty = v1::SetNet {
        tx: Some(v1::RateLimit {
            bytes: Some(v1::TokenBucket::default()),
            operations: None,
        }),
        ..Default::default()
    };
    let reply = set_net(child.control(), empty)?;
    ensure!(code_of(&reply) == Some(Code::Invalid), "{reply:?}");
    Ok(())
}

#[test]
fn a_network_device_that_cannot_be_is_refused_in_words() -> Result<()> {
    let mut monitor = monitor()?;
    let refused = |monitor: &mut Monitor, change: &dyn Fn(&mut BootSpec)| -> Result<String> {
        let (_peer, tap) = TapPeer::new()?;
        let mut spec = BootSpec::new(1, 128, &tiny_guest(&code::SPIN))?.with_net(Some(tap));
        change(&mut spec);
        let reply = monitor.control().request(Op::Boot(spec.boot), &spec.fds)?;
        // It has not begun: the monitor waits for a better one.
        ensure!(code_of(&reply) == Some(Code::Invalid), "{reply:?}");
        match reply {
            Reply::Error(error) => Ok(error.message),
            other => anyhow::bail!("{other:?}"),
        }
    };
    let net = |spec: &mut BootSpec, change: fn(&mut v1::Net)| {
        if let Some(net) = spec.boot.machine.as_mut().and_then(|m| m.net.as_mut()) {
            change(net);
        }
    };
    type Change = fn(&mut v1::Net);
    let changes: [(Change, &str); 7] = [
        (|net| net.mac = vec![2; 5], "net.mac: 5 bytes"),
        (|net| net.mac = vec![1, 0, 0, 0, 0, 1], "net.mac: [01, 00"),
        (|net| net.mac = vec![0; 6], "is not of one host"),
        (|net| net.mtu = 67, "net.mtu: 67 is"),
        (|net| net.mtu = 65_536, "net.mtu: 65536 is"),
        (|net| net.tap_fd = Some(9), "net.tap_fd names descriptor 9"),
        (
            |net| {
                net.rx = Some(v1::RateLimit {
                    bytes: Some(v1::TokenBucket::default()),
                    operations: None,
                });
            },
            "net.rx: capacity",
        ),
    ];
    for (change, expected) in changes {
        let said = refused(&mut monitor, &|spec| net(spec, change))?;
        ensure!(said.contains(expected), "{said}");
    }
    // Something else than a TAP, and one of another kind.
    let null = std::fs::File::open("/dev/null")?;
    let said = refused(&mut monitor, &|spec| {
        if let (Some(last), Ok(null)) = (spec.fds.last_mut(), null.try_clone()) {
            *last = null.into();
        }
    })?;
    ensure!(said.starts_with("net.tap_fd: it is not a TAP"), "{said}");
    let (_peer, tun) = TapPeer::with_flags(libc::IFF_TAP | libc::IFF_NO_PI)?;
    let said = refused(&mut monitor, &|spec| {
        if let (Some(last), Ok(tun)) = (spec.fds.last_mut(), tun.try_clone()) {
            *last = tun;
        }
    })?;
    ensure!(said.contains("IFF_VNET_HDR"), "{said}");

    // A better one.
    let spec = BootSpec::new(1, 128, &tiny_guest(&code::SPIN))?.with_net(None);
    monitor.control().boot(spec)?;
    counts(monitor.control(), "link_up", 0)
}

#[test]
fn a_machine_without_one_has_none_to_change() -> Result<()> {
    let mut monitor = monitor()?;
    let reply = set_net(monitor.control(), v1::SetNet::default())?;
    ensure!(code_of(&reply) == Some(Code::WrongState), "{reply:?}");
    let spec = BootSpec::new(1, 128, &tiny_guest(&code::SPIN))?;
    monitor.control().boot(spec)?;
    let reply = set_net(monitor.control(), v1::SetNet::default())?;
    ensure!(code_of(&reply) == Some(Code::WrongState), "{reply:?}");
    Ok(())
}

fn set_net(control: &mut Control, set: v1::SetNet) -> Result<Reply> {
    Ok(control.request(Op::SetNet(set), &[])?)
}

fn code_of(reply: &Reply) -> Option<Code> {
    match reply {
        Reply::Error(error) => Some(error.code()),
        _ => None,
    }
}
