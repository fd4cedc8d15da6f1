//! What two machines must share for one shell to do for either: their vCPUs,
//! their memory, and the list of their devices.

use soulbox_proto::vmm::v1;

use crate::bus::{Range, Space};
use crate::config::{ConfigError, checked_shape};
use crate::devices::Place;
use crate::devices::power;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::block::Block;
use crate::devices::virtio::net::Net;
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::Vsock;

use super::layout;
use super::state::ShapeState;

/// A shape that has been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub vcpu_count: u8,
    pub memory_mib: u32,
    pub block_devices: u8,
    pub vsock: bool,
    pub net: bool,
}

/// The kind of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Serial,
    Power,
    Panic,
    Generation,
    /// By its number among the disks.
    Block(usize),
    Vsock,
    Rng,
    Balloon,
    Net,
}

/// A device's entry in the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    pub kind: Kind,
    pub place: Place,
    /// Queues that the driver rings doorbells for.
    pub queues: usize,
}

// === impl Shape ===

impl Shape {
    /// Guest memory, in bytes.
    pub fn memory_bytes(&self) -> u64 {
        u64::from(self.memory_mib) << 20
    }

    /// The one list of devices.
    pub fn slots(&self) -> Vec<Slot> {
        let mut slots = vec![
            fixed(
                Kind::Serial,
                ports(layout::COM1_PORT, layout::COM1_PORTS),
                Some(layout::COM1_GSI),
            ),
            fixed(Kind::Power, ports(layout::POWER_PORT, power::PORTS), None),
            fixed(Kind::Panic, ports(layout::PANIC_PORT, 1), None),
            fixed(Kind::Generation, None, Some(layout::GENERATION_GSI)),
        ];
        let disks =
            (0..usize::from(self.block_devices)).map(|disk| (Kind::Block(disk), Block::QUEUES));
        let vsock = self.vsock.then_some((Kind::Vsock, Vsock::QUEUES));
        let always = [(Kind::Rng, Rng::QUEUES), (Kind::Balloon, Balloon::QUEUES)];
        // The last, so that the others have the places they have without it.
        let net = self.net.then_some((Kind::Net, Net::QUEUES));
        let virtio = disks.chain(vsock).chain(always).chain(net);
        for (number, (kind, queues)) in (0u32..).zip(virtio) {
            let range = Range {
                space: Space::Memory,
                start: layout::VIRTIO_MMIO_START + u64::from(number) * layout::VIRTIO_MMIO_BYTES,
                bytes: layout::VIRTIO_MMIO_BYTES,
            };
            slots.push(Slot {
                kind,
                place: Place {
                    range: Some(range),
                    gsi: Some(layout::FIRST_VIRTIO_GSI + number),
                },
                queues,
            });
        }
        slots
    }

    /// Checks a shape that comes from a snapshot, as one that comes from a client.
    pub fn from_state(state: &ShapeState) -> Result<Self, ConfigError> {
        checked_shape(&v1::MachineShape {
            vcpu_count: state.vcpu_count,
            memory_mib: state.memory_mib,
            block_devices: state.block_devices,
            vsock: state.vsock,
            net: state.net,
        })
    }

    pub fn save(&self) -> ShapeState {
        ShapeState {
            vcpu_count: self.vcpu_count.into(),
            memory_mib: self.memory_mib,
            block_devices: self.block_devices.into(),
            vsock: self.vsock,
            net: self.net,
        }
    }
}

fn fixed(kind: Kind, range: Option<Range>, gsi: Option<u32>) -> Slot {
    Slot {
        kind,
        place: Place { range, gsi },
        queues: 0,
    }
}

fn ports(start: u16, count: u16) -> Option<Range> {
    Some(Range {
        space: Space::Port,
        start: u64::from(start),
        bytes: u64::from(count),
    })
}
