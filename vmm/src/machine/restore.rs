//! What a snapshot must be to become a machine: checks of a state that is
//! untrusted.

use std::fs::File;
use std::os::unix::net::UnixListener;

use kvm_ioctls::VcpuFd;

use super::kvm;
use super::state::{self, MachineState, NamedDevice};
use super::{DeviceSlot, Parts, Shape};
use crate::bus::lock;
use crate::config::{Disk, RestoreDisk, Vsock};
use crate::devices::virtio::ChipState;
use crate::devices::virtio::net::NetConfig;
use crate::devices::{DeviceState, StateError};
use crate::memory::runs::{self, RunsError};
use crate::memory::working_set::WorkingSet;
use crate::memory::{self, GuestMemory};
use crate::vcpu::state::RestoreVcpuError;

/// Why a snapshot cannot become a machine here.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error("the snapshot needs CPU features that this host lacks: {}; restore it on a host that has them", .0.join(", "))]
    Cpu(Vec<String>),
    #[error("the snapshot is of a machine of {0}, but there are {1} for it")]
    Shape(String, String),
    #[error(
        "the snapshot's {what} has {expected} layers, but {actual} came with it; send all of its chain"
    )]
    Layers {
        what: &'static str,
        expected: u32,
        actual: usize,
    },
    #[error("the snapshot's map of memory is damaged")]
    Runs(#[from] RunsError),
    #[error("the snapshot's state of device {name} does not fit: {error}")]
    Device { name: String, error: StateError },
    #[error("the snapshot's state of vCPU {index} was not accepted")]
    Vcpu {
        index: u8,
        #[source]
        error: RestoreVcpuError,
    },
}

// === impl Parts ===

impl Parts {
    /// What the client sent for a snapshot, with what the snapshot knows of it.
    pub fn of_snapshot(
        state: &MachineState,
        disks: Vec<RestoreDisk>,
        vsock_listener: Option<UnixListener>,
        net: Option<NetConfig>,
        pagemap: Option<File>,
    ) -> Result<Self, RestoreError> {
        let chips = || {
            state
                .devices
                .iter()
                .filter_map(|device| match &device.state {
                    DeviceState::Virtio(transport) => Some(&transport.chip),
                    _ => None,
                })
        };
        let saved_disks: Vec<_> = chips()
            .filter_map(|chip| match chip {
                ChipState::Block(disk) => Some(disk),
                _ => None,
            })
            .collect();
        if saved_disks.len() != disks.len() {
            let words = |disks: usize| format!("{disks} disks");
            return Err(RestoreError::Shape(
                words(saved_disks.len()),
                words(disks.len()),
            ));
        }
        let disks = saved_disks
            .into_iter()
            .zip(disks)
            .map(|(saved, sent)| Disk {
                id: saved.id.clone(),
                size_bytes: saved.size_bytes,
                base: sent.base,
                frozen: sent.frozen,
                layer: sent.layer,
                rate_limit: sent.rate_limit,
            });
        let guest_cid = chips().find_map(|chip| match chip {
            ChipState::Vsock(vsock) => u32::try_from(vsock.guest_cid).ok(),
            _ => None,
        });
        let vsock = match (guest_cid, vsock_listener) {
            (Some(guest_cid), Some(listener)) => Some(Vsock {
                guest_cid,
                listener,
            }),
            (None, None) => None,
            (saved, _) => {
                let words = |vsock| if vsock { "a vsock" } else { "no vsock" };
                let (saved, sent) = (words(saved.is_some()), words(saved.is_none()));
                return Err(RestoreError::Shape(saved.into(), sent.into()));
            }
        };
        let saved_net = chips().any(|chip| matches!(chip, ChipState::Net(_)));
        if saved_net != net.is_some() {
            let words = |net| if net { "a net" } else { "no net" };
            let (saved, sent) = (words(saved_net), words(net.is_some()));
            return Err(RestoreError::Shape(saved.into(), sent.into()));
        }
        Ok(Self {
            disks: disks.collect(),
            vsock,
            net,
            pagemap,
        })
    }
}

/// Checks that a state, which is untrusted, is of this machine.
pub(super) fn check_fit(
    state: &MachineState,
    shape: Shape,
    parts: &Parts,
    layers: usize,
) -> Result<(), RestoreError> {
    let saved = &state.shape;
    if *saved != shape.save() {
        let words = |shape: &state::ShapeState| {
            let a_or_no = |there| if there { "a" } else { "no" };
            format!(
                "{} vCPUs, {} MiB, {} disks, {} vsock and {} net",
                shape.vcpu_count,
                shape.memory_mib,
                shape.block_devices,
                a_or_no(shape.vsock),
                a_or_no(shape.net)
            )
        };
        return Err(RestoreError::Shape(words(saved), words(&shape.save())));
    }
    if state.vcpus.len() != usize::from(shape.vcpu_count) {
        let (saved, wanted) = (state.vcpus.len(), shape.vcpu_count);
        let words = |vcpus: usize| format!("the state of {vcpus} vCPUs");
        return Err(RestoreError::Shape(words(saved), words(wanted.into())));
    }
    let layers_of = |what, expected: u32, actual: usize| {
        if expected as usize == actual {
            Ok(())
        } else {
            Err(RestoreError::Layers {
                what,
                expected,
                actual,
            })
        }
    };
    layers_of("memory", state.memory.layers, layers)?;
    if state.memory.layers == 0 {
        return layers_of("memory", 1, 0);
    }
    runs::check(
        &state.memory.runs,
        shape.memory_bytes() / memory::PAGE_BYTES,
        state.memory.layers,
    )?;
    if state.disk_layers.len() != parts.disks.len() {
        return layers_of("disk", state.disk_layers.len() as u32, parts.disks.len());
    }
    for (expected, disk) in state.disk_layers.iter().zip(&parts.disks) {
        layers_of("disk", *expected, disk.frozen.len())?;
    }
    Ok(())
}

pub(super) fn restore_devices(
    devices: &[DeviceSlot],
    saved: Vec<NamedDevice>,
) -> Result<(), RestoreError> {
    if saved.len() != devices.len() {
        let words = |devices: usize| format!("{devices} devices");
        return Err(RestoreError::Shape(
            words(saved.len()),
            words(devices.len()),
        ));
    }
    for (slot, saved) in devices.iter().zip(saved) {
        let error = |error| RestoreError::Device {
            name: slot.name.clone(),
            error,
        };
        if slot.name != saved.name {
            return Err(error(StateError::Kind));
        }
        lock(&slot.device).restore(saved.state).map_err(error)?;
    }
    Ok(())
}

/// Maps what the guest is about to touch, for this process and, as far as this KVM
/// can, for the guest. One vCPU does so for all.
pub(super) fn fill_in(vcpu: &VcpuFd, memory: &GuestMemory, working_set: &File) {
    let ram_pages = memory::size_bytes(memory) / memory::PAGE_BYTES;
    let Some(set) = WorkingSet::read(working_set, ram_pages) else {
        return;
    };
    memory::populate_to_write(memory, &set.written);
    let touched = runs::bridged(&[&set.read[..], &set.written].concat());
    let mapped = memory::parts(memory, &touched)
        .try_for_each(|stretch| kvm::pre_fault(vcpu, stretch.guest_address, stretch.bytes));
    if mapped.is_err() {
        memory::populate_to_read(memory, &set.read);
    }
}
