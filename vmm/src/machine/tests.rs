//! What a machine checks of a state before it touches KVM.

use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixListener;

use kvm_bindings::{kvm_clock_data, kvm_cpuid_entry2, kvm_irqchip};
use proptest::prelude::*;

use super::restore::{check_fit, restore_devices};
use super::state::{ShapeState, VmState};
use super::*;
use crate::config::{RateLimit, RestoreDisk};
use crate::devices::panic::PanicState;
use crate::devices::serial::SerialState;
use crate::devices::virtio::ChipState;
use crate::devices::virtio::balloon::BalloonState;
use crate::devices::virtio::block::{BlockState, Ring};
use crate::devices::virtio::mmio::{SavedQueue, TransportState};
use crate::devices::virtio::net::{DEFAULT_MTU, NetState};
use crate::devices::virtio::vsock::VsockState;
use crate::devices::{DeviceState, StateError};
use crate::events;
use crate::memory::runs::{Run, RunsError};
use crate::snapshot::tests::{read_bytes, sealed};
use crate::vcpu::state::VcpuState;

const SHAPE: Shape = Shape {
    vcpu_count: 2,
    memory_mib: 128,
    block_devices: 1,
    vsock: true,
    net: true,
};
const DISK_BYTES: u64 = 1 << 20;
const LAYERS: usize = 3;

/// A state as a machine of [`SHAPE`] saves it, made without KVM.
pub(crate) fn saved() -> MachineState {
    let device = |name: &str, state| NamedDevice {
        name: name.into(),
        state,
    };
    let chip = kvm_irqchip {
        chip_id: 1,
        ..Default::default()
    };
    MachineState {
        shape: SHAPE.save(),
        cpu: CpuProfile {
            name: cpuid::PROFILE.into(),
            cpuid: (0..3u32)
                .map(|function| kvm_cpuid_entry2 {
                    function,
                    eax: 0x0102_0304 * function,
                    ..Default::default()
                })
                .collect(),
        },
        memory: MemoryState {
            layers: LAYERS as u32,
            runs: vec![run(1, 8, 1), run(100, 300, 2)],
        },
        disk_layers: vec![0],
        vm: VmState {
            pic_master: chip,
            pic_slave: chip,
            ioapic: chip,
            clock: kvm_clock_data {
                clock: 123_456_789,
                ..Default::default()
            },
        },
        vcpus: vec![vcpu(); 2],
        devices: vec![
            device(
                "serial",
                DeviceState::Serial(SerialState {
                    baud_divisor_low: 12,
                    baud_divisor_high: 0,
                    interrupt_enable: 0,
                    interrupt_identification: 1,
                    line_control: 3,
                    line_status: 0x60,
                    modem_control: 8,
                    modem_status: 0xb0,
                    scratch: 0,
                }),
            ),
            device("power", DeviceState::None),
            device("panic", DeviceState::Panic(PanicState { panics: 0 })),
            device("generation", DeviceState::None),
            device(
                "block.root",
                idle(
                    1,
                    ChipState::Block(BlockState {
                        id: "root".into(),
                        size_bytes: DISK_BYTES,
                        writable: false,
                    }),
                ),
            ),
            device(
                "vsock",
                idle(
                    3,
                    ChipState::Vsock(VsockState {
                        guest_cid: 3,
                        next_host_port: 1 << 30,
                        spares: Vec::new(),
                        lost: Vec::new(),
                    }),
                ),
            ),
            device("rng", in_use(1, 16, ChipState::Rng)),
            device(
                "balloon",
                in_use(
                    3,
                    32,
                    ChipState::Balloon(BalloonState {
                        target_pages: 512,
                        actual_pages: 256,
                    }),
                ),
            ),
            device(
                "net",
                in_use(2, 256, ChipState::Net(NetState { link_up: false })),
            ),
        ],
    }
}

fn run(start_page: u64, pages: u64, layer: u32) -> Run {
    Run {
        start_page,
        pages,
        layer,
        layer_page: start_page,
    }
}

fn vcpu() -> VcpuState {
    VcpuState {
        mp_state: Default::default(),
        regs: Default::default(),
        sregs: Default::default(),
        xsave: (0..1024).collect(),
        xcrs: Default::default(),
        debug_regs: Default::default(),
        lapic: Default::default(),
        msrs: vec![(0x10, 1 << 40), (0x1b, 0xfee0_0900), (0x6e0, 0)],
        events: Default::default(),
        tsc_khz: 2_000_000,
    }
}

/// A device that no driver has touched.
fn idle(queues: usize, chip: ChipState) -> DeviceState {
    let queue = SavedQueue {
        size: 16,
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

/// A device in use, its rings in guest memory.
fn in_use(queues: u64, size: u16, chip: ChipState) -> DeviceState {
    let queue = |number: u64| SavedQueue {
        size,
        ready: true,
        next_avail: 0,
        next_used: 0,
        event_idx: false,
        desc_table: 0x20_0000 + number * 0x1000,
        avail_ring: 0x20_0400 + number * 0x1000,
        used_ring: 0x20_0800 + number * 0x1000,
    };
    DeviceState::Virtio(TransportState {
        status: 15,
        features_select: 1,
        driver_features_select: 1,
        // VIRTIO_F_VERSION_1, and free page reporting of a balloon.
        driver_features: 1 << 32 | u64::from(queues == 3) << 5,
        queue_select: 0,
        activated: true,
        interrupt_status: 1,
        queues: (0..queues).map(queue).collect(),
        chip,
    })
}

fn disk() -> RestoreDisk {
    let base = tempfile::tempfile().unwrap();
    base.set_len(DISK_BYTES).unwrap();
    // For reading only, as a base has to be.
    let base = File::open(format!("/proc/self/fd/{}", base.as_raw_fd())).unwrap();
    RestoreDisk {
        base,
        frozen: Vec::new(),
        layer: None,
        rate_limit: RateLimit::default(),
    }
}

fn listener() -> Option<UnixListener> {
    let folder = tempfile::tempdir().unwrap();
    Some(UnixListener::bind(folder.path().join("vsock")).unwrap())
}

fn net() -> Option<NetConfig> {
    Some(NetConfig {
        mac: [2, 0, 0, 0, 0, 1],
        tap: None,
        mtu: DEFAULT_MTU,
        rx: RateLimit::default(),
        tx: RateLimit::default(),
    })
}

fn parts(state: &MachineState) -> Result<Parts, RestoreError> {
    Parts::of_snapshot(state, vec![disk()], listener(), net(), None)
}

/// All that a restore does with a state but KVM's part, as in [`Machine::new`].
fn try_restore(state: MachineState) -> Result<Vec<DeviceSlot>, BuildError> {
    if let Ok(shape) = Shape::from_state(&state.shape) {
        assert_eq!(shape.save(), state.shape);
    }
    let parts = parts(&state)?;
    check_fit(&state, SHAPE, &parts, LAYERS)?;
    let memory = memory::reserve(SHAPE.memory_bytes()).unwrap();
    memory::map_anonymous(&memory).unwrap();
    let (events, _receiver) = events::channel().unwrap();
    let console = Console::new(None).unwrap();
    let mut backends =
        backends::Backends::new(parts, vec![Ring::new().unwrap()], console, &memory, &events);
    let mut devices = Vec::new();
    for slot in SHAPE.slots() {
        let (name, device) = backends.device(slot.kind, Wire::new(slot.queues).unwrap())?;
        devices.push(DeviceSlot {
            name,
            place: slot.place,
            device,
        });
    }
    restore_devices(&devices, state.devices)?;
    for slot in &devices {
        lock(&slot.device).resume();
    }
    Ok(devices)
}

/// Why the state, with something of it changed, is no machine.
fn refusal(change: impl FnOnce(&mut MachineState)) -> RestoreError {
    let mut state = saved();
    change(&mut state);
    match try_restore(state) {
        Err(BuildError::Restore(error)) => error,
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("it must be refused"),
    }
}

/// The transport of a device of [`saved`].
fn transport(state: &mut MachineState, name: &str) -> TransportState {
    let device = state.devices.iter().find(|device| device.name == name);
    match device.map(|device| device.state.clone()) {
        Some(DeviceState::Virtio(transport)) => transport,
        other => panic!("{other:?}"),
    }
}

fn with_transport(state: &mut MachineState, name: &str, change: impl FnOnce(&mut TransportState)) {
    let mut changed = transport(state, name);
    change(&mut changed);
    for device in &mut state.devices {
        if device.name == name {
            device.state = DeviceState::Virtio(changed.clone());
        }
    }
}

#[test]
fn a_saved_state_is_restored() {
    let devices = try_restore(saved()).unwrap();
    for (slot, saved) in devices.iter().zip(saved().devices) {
        assert_eq!(slot.name, saved.name);
        let mut device = lock(&slot.device);
        device.pause();
        match (device.save(), saved.state) {
            (DeviceState::Virtio(mut again), DeviceState::Virtio(saved)) => {
                // A restored driver is given an interrupt, and may be given one
                // more of a kind.
                assert_eq!(
                    again.interrupt_status & saved.interrupt_status,
                    saved.interrupt_status
                );
                again.interrupt_status = saved.interrupt_status;
                assert_eq!(again.status, saved.status, "{}", slot.name);
                if saved.activated {
                    assert_eq!(again, saved);
                }
            }
            (again, saved) => assert_eq!(again, saved),
        }
    }
}

#[test]
fn a_machine_of_another_shape_is_refused() {
    let shapes: [fn(&mut ShapeState); 5] = [
        |shape| shape.vcpu_count = 1,
        |shape| shape.memory_mib = 256,
        |shape| shape.block_devices = 2,
        |shape| shape.vsock = false,
        |shape| shape.net = false,
    ];
    for change in shapes {
        let error = refusal(|state| change(&mut state.shape));
        assert!(matches!(error, RestoreError::Shape(..)), "{error}");
    }
    let error = refusal(|state| drop(state.vcpus.pop()));
    assert!(
        error.to_string().contains("the state of 1 vCPUs"),
        "{error}"
    );
    let error = refusal(|state| drop(state.devices.remove(0)));
    assert!(error.to_string().contains("8 devices"), "{error}");
    for (vcpu_count, memory_mib, block_devices) in [
        (0, 128, 0),
        (33, 128, 0),
        (1, 127, 0),
        (1, u32::MAX, 0),
        (1, 128, 15),
        (1, 128, u32::MAX),
    ] {
        let shape = ShapeState {
            vcpu_count,
            memory_mib,
            block_devices,
            vsock: false,
            net: false,
        };
        assert!(Shape::from_state(&shape).is_err(), "{shape:?}");
    }
}

#[test]
fn what_was_sent_must_be_what_the_snapshot_has() {
    let state = saved();
    let shape = |parts: Result<Parts, RestoreError>| match parts {
        Err(RestoreError::Shape(saved, sent)) => (saved, sent),
        other => panic!("{other:?}"),
    };
    let of = |disks, listener| Parts::of_snapshot(&state, disks, listener, net(), None);
    let (saved, sent) = shape(of(Vec::new(), listener()));
    assert_eq!((saved.as_str(), sent.as_str()), ("1 disks", "0 disks"));
    let (saved, sent) = shape(of(vec![disk()], None));
    assert_eq!((saved.as_str(), sent.as_str()), ("a vsock", "no vsock"));
    let mut no_vsock = state.clone();
    no_vsock.devices.retain(|device| device.name != "vsock");
    let parts = Parts::of_snapshot(&no_vsock, vec![disk()], listener(), net(), None);
    let (saved, sent) = shape(parts);
    assert_eq!((saved.as_str(), sent.as_str()), ("no vsock", "a vsock"));
    let parts = Parts::of_snapshot(&state, vec![disk()], listener(), None, None);
    let (saved, sent) = shape(parts);
    assert_eq!((saved.as_str(), sent.as_str()), ("a net", "no net"));
    // What is in the state and not in the request.
    let parts = of(vec![disk()], listener()).unwrap();
    assert_eq!(parts.disks[0].id, "root");
    assert_eq!(parts.disks[0].size_bytes, DISK_BYTES);
    assert_eq!(parts.vsock.map(|vsock| vsock.guest_cid), Some(3));
}

#[test]
fn a_missing_layer_is_told() {
    let layers = |error| match error {
        RestoreError::Layers {
            what,
            expected,
            actual,
        } => (what, expected, actual),
        other => panic!("{other}"),
    };
    let memory = |layers| refusal(move |state: &mut MachineState| state.memory.layers = layers);
    assert_eq!(layers(memory(4)), ("memory", 4, 3));
    assert_eq!(layers(memory(2)), ("memory", 2, 3));
    assert_eq!(layers(memory(u32::MAX)), ("memory", u32::MAX, 3));
    assert_eq!(layers(memory(0)), ("memory", 0, 3));
    let disk = |layers: &[u32]| {
        let layers = layers.to_vec();
        refusal(move |state: &mut MachineState| state.disk_layers = layers)
    };
    assert_eq!(layers(disk(&[1])), ("disk", 1, 0));
    assert_eq!(layers(disk(&[])), ("disk", 0, 1));
    assert_eq!(layers(disk(&[0, 0])), ("disk", 2, 1));
    // A snapshot is at least a root.
    let mut state = saved();
    state.memory.layers = 0;
    let parts = parts(&state).unwrap();
    assert!(check_fit(&state, SHAPE, &parts, 0).is_err());
}

#[test]
fn a_map_of_memory_that_leads_astray_is_refused() {
    let ram = SHAPE.memory_bytes() / memory::PAGE_BYTES;
    for (runs, expected) in [
        (vec![run(0, 0, 1)], RunsError::Range),
        (vec![run(ram, 1, 1)], RunsError::Range),
        (vec![run(ram - 1, 2, 1)], RunsError::Range),
        (vec![run(u64::MAX, 1, 1)], RunsError::Range),
        (vec![run(1, u64::MAX, 1)], RunsError::Range),
        (vec![run(8, 8, 1), run(15, 1, 2)], RunsError::Range),
        (vec![run(8, 8, 1), run(0, 1, 2)], RunsError::Range),
        (vec![run(0, 1, 0)], RunsError::Layer(0)),
        (vec![run(0, 1, 3)], RunsError::Layer(3)),
        (vec![run(0, 1, u32::MAX)], RunsError::Layer(u32::MAX)),
    ] {
        let error = refusal(|state| state.memory.runs = runs);
        assert!(
            matches!(&error, RestoreError::Runs(error) if *error == expected),
            "{error:?}"
        );
    }
}

#[test]
fn a_device_that_is_another_is_refused() {
    let device = |error| match error {
        RestoreError::Device { name, error } => (name, error),
        other => panic!("{other}"),
    };
    let (name, error) = device(refusal(|state| state.devices[0].name = "console".into()));
    assert!(name == "serial" && matches!(error, StateError::Kind));
    let (name, error) = device(refusal(|state| state.devices[0].state = DeviceState::None));
    assert!(name == "serial" && matches!(error, StateError::Kind));
    let swapped = refusal(|state| {
        let rng = transport(state, "rng");
        with_transport(state, "balloon", |balloon| balloon.chip = rng.chip);
    });
    let (name, error) = device(swapped);
    assert!(name == "balloon" && matches!(error, StateError::Kind));
}

#[test]
fn a_queue_outside_memory_is_refused() {
    let bad_queue = |change: fn(&mut SavedQueue)| {
        let refused = refusal(|state| {
            with_transport(state, "balloon", |balloon| change(&mut balloon.queues[1]));
        });
        match refused {
            RestoreError::Device {
                name,
                error: StateError::Queue { queue: 1, .. },
            } => assert_eq!(name, "balloon"),
            other => panic!("{other:?}"),
        }
    };
    let end = SHAPE.memory_bytes();
    assert_eq!(end, 0x800_0000);
    bad_queue(|queue| queue.desc_table = 0x800_0000);
    bad_queue(|queue| queue.desc_table = 0x800_0000 - 16);
    bad_queue(|queue| queue.avail_ring = u64::MAX - 1);
    bad_queue(|queue| queue.used_ring = 0xd000_0000);
    bad_queue(|queue| queue.used_ring = 0x20_1802);
    bad_queue(|queue| queue.ready = false);
    bad_queue(|queue| queue.size = 0);
    bad_queue(|queue| queue.size = 3);
    bad_queue(|queue| queue.size = 64);
    for queues in [0, 2, 4] {
        let error = refusal(|state| {
            with_transport(state, "balloon", |balloon| {
                let queue = balloon.queues[0].clone();
                balloon.queues.resize(queues, queue);
            });
        });
        assert!(
            error.to_string().contains("not one of this device's"),
            "{error}"
        );
    }
}

#[test]
fn a_transport_that_contradicts_itself_is_refused() {
    let changes: [fn(&mut TransportState); 3] = [
        |rng| rng.driver_features |= 1 << 40,
        // In use, but its driver never said so.
        |rng| rng.status = 11,
        |rng| rng.status = 0,
    ];
    for change in changes {
        let error = refusal(|state| with_transport(state, "rng", change));
        assert!(
            matches!(&error, RestoreError::Device { name, error: StateError::Chip(_) } if name == "rng"),
            "{error:?}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// However a state is changed, it is refused or makes devices that stand
    /// what the event loop and a driver do with them.
    #[test]
    fn a_mutated_state_is_survived(
        mutations in prop::collection::vec(
            (any::<prop::sample::Index>(), any::<u8>(), 0..12u8),
            1..6,
        ),
    ) {
        let mut body = postcard::to_stdvec(&saved()).unwrap();
        // Most of a state are the registers of its vCPUs: mutate the ends, where
        // everything else is.
        for (at, byte, kind) in mutations {
            let (head, tail) = (256, 512.min(body.len()));
            let at = match at.index(head + tail) {
                at if at < head => at.min(body.len()),
                at => body.len() - (at - head),
            };
            match kind {
                0 if at < body.len() => drop(body.remove(at)),
                1 => body.insert(at, byte),
                2..7 if at < body.len() => body[at] ^= 1 << (byte % 8),
                _ if at < body.len() => body[at] = byte,
                _ => {}
            }
        }
        if let Ok(state) = read_bytes(&sealed(&body))
            && let Ok(devices) = try_restore(state)
        {
            for slot in &devices {
                let mut device = lock(&slot.device);
                for source in 0..device.sources().len() {
                    device.source_ready(source);
                }
                device.write(0x50, &0u32.to_le_bytes());
                device.pause();
                let _ = device.save();
            }
        }
    }
}
