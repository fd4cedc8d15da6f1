//! The VM as KVM sees it: capabilities, memory slots, interrupt controllers.

use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};

use kvm_bindings::{KVM_API_VERSION, kvm_pre_fault_memory, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use rustix::io::Errno;
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress,
};

use super::layout;
use crate::memory::GuestMemory;

/// `_IOWR(KVMIO, 0xd5, struct kvm_pre_fault_memory)` (linux/kvm.h).
const KVM_PRE_FAULT_MEMORY: libc::c_ulong = 0xc040_aed5;
const _: () = assert!(size_of::<kvm_pre_fault_memory>() == 0x40);

/// What the monitor cannot do without.
const CAPABILITIES: [(Cap, &str); 8] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
];

#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    #[error(
        "the KVM descriptor is not /dev/kvm or speaks API version {0}, not 12; pass /dev/kvm of a current kernel"
    )]
    ApiVersion(i32),
    #[error("this KVM lacks {0}; use a host kernel that has it")]
    MissingCapability(&'static str),
    #[error("this KVM runs at most {max} vCPUs a machine, not {asked}; ask for fewer")]
    TooManyVcpus { max: usize, asked: usize },
    #[error("{operation} was refused by KVM ({error})")]
    Refused {
        operation: &'static str,
        error: kvm_ioctls::Error,
    },
}

/// Takes over a descriptor of `/dev/kvm` once it is known to be one.
#[allow(unsafe_code)]
pub fn open(kvm: OwnedFd, vcpus: usize) -> Result<Kvm, KvmError> {
    // SAFETY: ownership moves from the OwnedFd to the Kvm, so the descriptor is
    // open and closed once. If it is not /dev/kvm, its ioctls fail.
    let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION as i32 {
        return Err(KvmError::ApiVersion(version));
    }
    for (capability, name) in CAPABILITIES {
        if !kvm.check_extension(capability) {
            return Err(KvmError::MissingCapability(name));
        }
    }
    let max = kvm.get_max_vcpus();
    if vcpus > max {
        return Err(KvmError::TooManyVcpus { max, asked: vcpus });
    }
    Ok(kvm)
}

/// Makes the VM with its memory and in-kernel interrupt controllers.
///
/// Memory comes first: a slot registered once the irqchip exists waits for an
/// SRCU grace period of the irqchip's buses (7.5 ms against 0.09 ms measured).
/// There is no PIT: nothing in a hardware-reduced machine needs it, and its
/// kernel thread costs 16–24 ms at teardown.
pub fn create_vm(kvm: &Kvm, memory: &GuestMemory) -> Result<VmFd, KvmError> {
    let vm = kvm.create_vm().map_err(refused("KVM_CREATE_VM"))?;
    set_memory(&vm, memory)?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(refused("KVM_SET_IDENTITY_MAP_ADDR"))?;
    vm.set_tss_address(layout::KVM_TSS)
        .map_err(refused("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip()
        .map_err(refused("KVM_CREATE_IRQCHIP"))?;
    Ok(vm)
}

#[allow(unsafe_code)]
fn set_memory(vm: &VmFd, memory: &GuestMemory) -> Result<(), KvmError> {
    for (slot, region) in (0u32..).zip(memory.iter()) {
        let host_address = region
            .get_host_address(MemoryRegionAddress(0))
            .map_err(|_| refused("KVM_SET_USER_MEMORY_REGION")(errno(libc::EFAULT)))?;
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: host_address as u64,
        };
        // SAFETY: the range is one mapping of `memory`. The machine keeps
        // `memory` until its vCPUs have stopped and the VM is closed, so the
        // guest never reaches an address that has been unmapped.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(refused("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

/// Maps pages for the guest before it touches them, as far as this KVM can
/// (KVM_PRE_FAULT_MEMORY, Linux 6.12, hosts with nested paging).
#[allow(unsafe_code)]
pub fn pre_fault(vcpu: &VcpuFd, start: GuestAddress, bytes: u64) -> Result<(), Errno> {
    let mut range = kvm_pre_fault_memory {
        gpa: start.0,
        size: bytes,
        ..Default::default()
    };
    while range.size > 0 {
        // SAFETY: the kernel reads and writes `range` alone, whose size is part
        // of the ioctl's number, and maps only what a slot has.
        let done = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_PRE_FAULT_MEMORY, &raw mut range) };
        if done < 0 {
            let error = std::io::Error::last_os_error();
            return Err(Errno::from_io_error(&error).unwrap_or(Errno::INVAL));
        }
    }
    Ok(())
}

pub(crate) fn refused(operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |error| KvmError::Refused { operation, error }
}

fn errno(number: i32) -> kvm_ioctls::Error {
    kvm_ioctls::Error::new(number)
}
