//! The part of a machine that is the same whatever it starts from. Made ahead of
//! need it is a shell.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvm_bindings::CpuId;
use kvm_ioctls::{IoEventAddress, VmFd};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_INT_VRING, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_QUEUE_NOTIFY,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::kvm::{self, KvmError, refused};
use super::restore::fill_in;
use super::shape::{Shape, Slot};
use super::{BuildError, Stopwatch};
use crate::config::PreparedMemory;
use crate::devices::virtio::block::Ring;
use crate::memory::{self, GuestMemory};
use crate::vcpu::{self, VcpuThread, cpuid, state};

/// A VM with its vCPUs, interrupt controllers, addresses of RAM, and the wires
/// of its devices; without devices and state, and without memory but perhaps a
/// first layer.
pub struct Frame {
    pub(super) shape: Shape,
    pub(super) slots: Vec<Slot>,
    pub(super) wires: Vec<Wire>,
    /// One for each disk.
    pub(super) rings: Vec<Ring>,
    pub(super) vcpus: Vec<FrameVcpu>,
    /// The CPUID of all vCPUs, before each one's topology.
    pub(super) cpuid: CpuId,
    pub(super) msr_indices: Arc<[u32]>,
    pub(super) xsave_words: usize,
    pub(super) vm: VmFd,
    pub(super) memory: GuestMemory,
    has_first_layer: bool,
}

/// A vCPU as KVM makes it, with CPUID and the MSRs that firmware would set. Its
/// thread waits.
pub(super) struct FrameVcpu {
    pub(super) thread: VcpuThread,
    /// The MSRs that it has now.
    pub(super) initial_msrs: Vec<(u32, u64)>,
}

/// The descriptors that connect a device to KVM.
#[derive(Debug)]
pub struct Wire {
    /// Raises the device's interrupt.
    pub interrupt: EventFd,
    /// Rung by the driver, one for each queue.
    pub doorbells: Vec<EventFd>,
    /// Takes the driver's word that it has seen used buffers, which nobody needs, so
    /// that it stays in the kernel: InterruptStatus goes on to tell of them, and a
    /// driver bears to look once too often.
    acknowledged: EventFd,
}

// === impl Wire ===

impl Wire {
    pub fn new(queues: usize) -> std::io::Result<Self> {
        Ok(Self {
            interrupt: EventFd::new(EFD_NONBLOCK)?,
            acknowledged: EventFd::new(EFD_NONBLOCK)?,
            doorbells: (0..queues)
                .map(|_| EventFd::new(EFD_NONBLOCK))
                .collect::<Result<_, _>>()?,
        })
    }

    fn connect(&self, vm: &VmFd, slot: &Slot) -> Result<(), KvmError> {
        if let Some(gsi) = slot.place.gsi {
            vm.register_irqfd(&self.interrupt, gsi)
                .map_err(refused("KVM_IRQFD"))?;
        }
        if let Some(range) = slot.place.range {
            let notify = range.start + u64::from(VIRTIO_MMIO_QUEUE_NOTIFY);
            for (queue, doorbell) in (0u32..).zip(&self.doorbells) {
                vm.register_ioevent(doorbell, &IoEventAddress::Mmio(notify), queue)
                    .map_err(refused("KVM_IOEVENTFD"))?;
            }
            let acknowledge = range.start + u64::from(VIRTIO_MMIO_INTERRUPT_ACK);
            vm.register_ioevent(
                &self.acknowledged,
                &IoEventAddress::Mmio(acknowledge),
                VIRTIO_MMIO_INT_VRING,
            )
            .map_err(refused("KVM_IOEVENTFD"))?;
        }
        Ok(())
    }
}

// === impl Frame ===

impl Frame {
    pub fn new(shape: Shape, kvm: OwnedFd, stages: &mut Stopwatch) -> Result<Self, BuildError> {
        let kvm = kvm::open(kvm, usize::from(shape.vcpu_count))?;
        let memory = memory::reserve(shape.memory_bytes())?;
        let vm = kvm::create_vm(&kvm, &memory)?;
        stages.mark("kvm");

        let slots = shape.slots();
        let mut wires = Vec::with_capacity(slots.len());
        for slot in &slots {
            let wire = Wire::new(slot.queues).map_err(BuildError::EventFd)?;
            wire.connect(&vm, slot)?;
            wires.push(wire);
        }
        let rings = (0..shape.block_devices).map(|_| Ring::new());
        let rings = rings.collect::<Result<_, _>>()?;
        stages.mark("wires");

        let cpuid = cpuid::template(&kvm, shape.vcpu_count)?;
        let msr_indices = kvm
            .get_msr_index_list()
            .map_err(refused("KVM_GET_MSR_INDEX_LIST"))?;
        let msr_indices: Arc<[u32]> = msr_indices.as_slice().into();
        let mut vcpus = Vec::new();
        for index in 0..shape.vcpu_count {
            let fd = vm
                .create_vcpu(u64::from(index))
                .map_err(refused("KVM_CREATE_VCPU"))?;
            // CPUID first: it decides which MSRs there are.
            state::set_cpuid(&fd, &cpuid::for_vcpu(&cpuid, index, shape.vcpu_count))?;
            vcpu::boot::set_msrs(&fd)?;
            let initial_msrs = state::read_msrs(&fd, &msr_indices)?;
            let thread = VcpuThread::spawn(index, fd).map_err(BuildError::Thread)?;
            vcpus.push(FrameVcpu {
                thread,
                initial_msrs,
            });
        }
        stages.mark("vcpus");
        Ok(Self {
            shape,
            slots,
            wires,
            rings,
            vcpus,
            cpuid,
            msr_indices,
            xsave_words: state::xsave_words(&vm),
            vm,
            memory,
            has_first_layer: false,
        })
    }

    /// Maps the first memory layer of what the machine will probably be, and fills in
    /// its working set: off the path of a restore, in which that is most of the work.
    pub fn prepare_memory(&mut self, prepared: PreparedMemory) -> Result<(), BuildError> {
        memory::map_first_layer(&self.memory, &prepared.layer)?;
        self.has_first_layer = true;
        if let (Some(file), Some(vcpu)) = (prepared.working_set, self.vcpus.first()) {
            let memory = self.memory.clone();
            let filled = vcpu.thread.call(move |fd| fill_in(fd, &memory, &file))?;
            filled.wait()?;
        }
        Ok(())
    }

    pub fn has_first_layer(&self) -> bool {
        self.has_first_layer
    }

    /// Wakes the boot vCPU's thread, which has something to do soon.
    pub fn wake(&self) {
        if let Some(vcpu) = self.vcpus.first() {
            // One that has ended says so when it is told to start.
            let _ = vcpu.thread.call(|_| ());
        }
    }

    pub fn shape(&self) -> Shape {
        self.shape
    }
}
