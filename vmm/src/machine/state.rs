//! What a snapshot holds of a machine: plain data, from an untrusted file.

use std::mem::offset_of;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES,
    kvm_clock_data, kvm_cpuid_entry2, kvm_ioapic_state, kvm_irqchip, kvm_pic_state,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::kvm::{KvmError, refused};
use super::layout::MAX_VIRTIO_DEVICES;
use crate::config::VCPU_COUNT;
use crate::devices::DeviceState;
use crate::memory::runs::Run;
use crate::snapshot::list::at_most;
use crate::vcpu::state::VcpuState;

/// The most runs of memory: more mappings than a host lets a process have, were
/// vm.max_map_count sixteen times its default.
pub const MAX_RUNS: usize = 1 << 20;

const MAX_VCPUS: usize = *VCPU_COUNT.end() as usize;

/// The most devices: the virtio devices, and serial, power, panic, generation.
const MAX_DEVICES: usize = MAX_VIRTIO_DEVICES + 4;

/// A machine that stands still. Fields are numbered by their order: a change
/// here is a new format version ([`crate::snapshot`]).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineState {
    pub shape: ShapeState,
    pub cpu: CpuProfile,
    pub memory: MemoryState,
    /// For each disk, the frozen layers it is read through, the snapshot's own
    /// last.
    #[serde(deserialize_with = "at_most::<MAX_VIRTIO_DEVICES, _, _>")]
    pub disk_layers: Vec<u32>,
    pub vm: VmState,
    /// By their number.
    #[serde(deserialize_with = "at_most::<MAX_VCPUS, _, _>")]
    pub vcpus: Vec<VcpuState>,
    /// In the order of the machine's list.
    #[serde(deserialize_with = "at_most::<MAX_DEVICES, _, _>")]
    pub devices: Vec<NamedDevice>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShapeState {
    pub vcpu_count: u32,
    pub memory_mib: u32,
    pub block_devices: u32,
    pub vsock: bool,
    pub net: bool,
}

/// The CPU that the guest was told of.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CpuProfile {
    /// How it was made: which rules of [`crate::vcpu::cpuid`].
    pub name: String,
    /// Before each vCPU's topology is put in.
    #[serde(deserialize_with = "at_most::<KVM_MAX_CPUID_ENTRIES, _, _>")]
    pub cpuid: Vec<kvm_cpuid_entry2>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryState {
    /// Files that memory is mapped from, the snapshot's own last.
    pub layers: u32,
    /// What is not in the root.
    #[serde(deserialize_with = "at_most::<MAX_RUNS, _, _>")]
    pub runs: Vec<Run>,
}

/// What KVM keeps for the whole machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmState {
    pub pic_master: kvm_irqchip,
    pub pic_slave: kvm_irqchip,
    pub ioapic: kvm_irqchip,
    pub clock: kvm_clock_data,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedDevice {
    pub name: String,
    pub state: DeviceState,
}

// The codec writes these as they lie in memory: their layout is the format.
const _: () = {
    assert!(size_of::<kvm_irqchip>() == 520);
    assert!(size_of::<kvm_pic_state>() == 16 && size_of::<kvm_ioapic_state>() == 216);
    assert!(offset_of!(kvm_irqchip, chip_id) == 0 && offset_of!(kvm_irqchip, chip) == 8);
    assert!(offset_of!(kvm_clock_data, clock) == 0);
    assert!(offset_of!(kvm_cpuid_entry2, eax) == 12 && offset_of!(kvm_cpuid_entry2, edx) == 24);
    assert!(size_of::<kvm_clock_data>() == 48);
    assert!(size_of::<kvm_cpuid_entry2>() == 40);
};

// === impl VmState ===

impl VmState {
    /// Reads what a VM whose vCPUs stand still has.
    pub fn save(vm: &VmFd) -> Result<Self, KvmError> {
        let chip = |chip_id| {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            vm.get_irqchip(&mut chip)
                .map_err(refused("KVM_GET_IRQCHIP"))?;
            Ok(chip)
        };
        Ok(Self {
            pic_master: chip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: chip(KVM_IRQCHIP_IOAPIC)?,
            clock: vm.get_clock().map_err(refused("KVM_GET_CLOCK"))?,
        })
    }

    /// Puts it into a VM whose vCPUs have not run.
    pub fn restore(&self, vm: &VmFd) -> Result<(), KvmError> {
        let chips = [
            (KVM_IRQCHIP_PIC_MASTER, &self.pic_master),
            (KVM_IRQCHIP_PIC_SLAVE, &self.pic_slave),
            (KVM_IRQCHIP_IOAPIC, &self.ioapic),
        ];
        for (chip_id, saved) in chips {
            // Whatever the file says it is.
            let chip = kvm_irqchip { chip_id, ..*saved };
            vm.set_irqchip(&chip).map_err(refused("KVM_SET_IRQCHIP"))?;
        }
        // Without flags the guest's clock goes on from where it stood: time that
        // passed while it was saved is the wall clock's business.
        let clock = kvm_clock_data {
            clock: self.clock.clock,
            ..Default::default()
        };
        vm.set_clock(&clock).map_err(refused("KVM_SET_CLOCK"))
    }
}
