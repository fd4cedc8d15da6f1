//! The floor: the shortest sequence of ioctls from nothing to a guest's first
//! exit, in this process. What a monitor takes beyond it is the monitor's.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::VolatileMemory;
use vm_memory::mmap::MmapRegionBuilder;

const MEMORY_BYTES: usize = 128 << 20;
/// `mov al, '.'; mov dx, 0x3f8; out dx, al`, in real mode.
const CODE: [u8; 6] = [0xb0, b'.', 0xba, 0xf8, 0x03, 0xee];
const ENTRY: u64 = 0x1000;

/// Builds a VM of one vCPU and 128 MiB and runs it to its first exit. Teardown
/// is not in the time.
#[allow(unsafe_code)]
pub(crate) fn to_first_exit(kvm: &Kvm) -> Result<Duration> {
    let start = Instant::now();
    let memory = MmapRegionBuilder::<()>::new(MEMORY_BYTES)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
        .build()?;
    let vm = kvm.create_vm()?;
    let slot = kvm_userspace_memory_region {
        memory_size: MEMORY_BYTES as u64,
        userspace_addr: memory.as_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: `memory` is mapped until the end of this function, after the last
    // KVM_RUN.
    unsafe { vm.set_user_memory_region(slot)? };
    vm.create_irq_chip()?;
    let mut vcpu = vm.create_vcpu(0)?;
    memory
        .get_slice(ENTRY as usize, CODE.len())?
        .copy_from(&CODE);
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    vcpu.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    regs.rip = ENTRY;
    regs.rflags = 2;
    vcpu.set_regs(&regs)?;
    match vcpu.run()? {
        VcpuExit::IoOut(0x3f8, b".") => Ok(start.elapsed()),
        other => bail!("the floor's guest left with {other:?}"),
    }
}

/// Opens `/dev/kvm`, and says what to do where that fails.
pub(crate) fn open_kvm() -> Result<Kvm> {
    Kvm::new().context("opening /dev/kvm; run on a host with KVM and as a user who may")
}
