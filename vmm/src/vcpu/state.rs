//! All that KVM knows of a vCPU, saved and put back (Documentation/virt/kvm/api.rst).

use std::mem::offset_of;

use kvm_bindings::{
    CpuId, Msrs, Xsave, kvm_debugregs, kvm_dtable, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcr, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::xsave;
use crate::machine::kvm::{KvmError, refused};
use crate::snapshot::list::at_most;

const MSR_IA32_TSC: u32 = 0x10;
const MSR_IA32_TSC_DEADLINE: u32 = 0x6e0;

/// MSRs that KVM_GET_MSRS takes at once (KVM_MAX_MSR_ENTRIES in
/// arch/x86/kvm/x86.c).
const MSR_BATCH: usize = 256;

/// The most that a state may have of either: several times what any CPU has.
const MAX_MSRS: usize = 4096;
const MAX_XSAVE_WORDS: usize = 1 << 14;

/// A vCPU. Its CPUID is the machine's, with a topology that its number decides.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VcpuState {
    pub mp_state: kvm_mp_state,
    pub regs: kvm_regs,
    pub sregs: kvm_sregs,
    /// The XSAVE area (Intel SDM, volume 1, section 13.4), as large as this host
    /// makes it (KVM_CAP_XSAVE2), in 32-bit words.
    #[serde(deserialize_with = "at_most::<MAX_XSAVE_WORDS, _, _>")]
    pub xsave: Vec<u32>,
    pub xcrs: kvm_xcrs,
    pub debug_regs: kvm_debugregs,
    pub lapic: kvm_lapic_state,
    /// Index and value, in the order in which they are to be set.
    #[serde(deserialize_with = "at_most::<MAX_MSRS, _, _>")]
    pub msrs: Vec<(u32, u64)>,
    pub events: kvm_vcpu_events,
    pub tsc_khz: u32,
}

// The codec writes these as they lie in memory: their layout is the format.
const _: () = {
    assert!(size_of::<kvm_mp_state>() == 4);
    assert!(size_of::<kvm_regs>() == 144);
    assert!(size_of::<kvm_sregs>() == 312);
    assert!(size_of::<kvm_segment>() == 24 && size_of::<kvm_dtable>() == 16);
    assert!(size_of::<kvm_xcrs>() == 392);
    assert!(size_of::<kvm_debugregs>() == 128);
    assert!(size_of::<kvm_lapic_state>() == 1024);
    assert!(size_of::<kvm_vcpu_events>() == 64);
    assert!(size_of::<kvm_xcr>() == 16);
    // Each of these is the last field that is not padding.
    assert!(offset_of!(kvm_regs, rflags) == 136);
    assert!(offset_of!(kvm_sregs, interrupt_bitmap) == 280);
    assert!(offset_of!(kvm_xcrs, xcrs) == 8);
    assert!(offset_of!(kvm_debugregs, flags) == 48);
    assert!(offset_of!(kvm_vcpu_events, exception_payload) == 56);
    // The XSAVE area is no structure here, but of words in KVM's order.
    assert!(size_of::<kvm_xsave>() == 4096);
};

#[derive(Debug, thiserror::Error)]
pub enum RestoreVcpuError {
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error("MSR {0:#x} was not accepted by this host")]
    Msr(u32),
    #[error("the XSAVE area has {actual} bytes, but this host's has {expected}")]
    Xsave { actual: usize, expected: usize },
}

/// Reads a vCPU that is not running, with no exit left half done.
pub fn save(vcpu: &VcpuFd, msr_indices: &[u32], xsave_words: usize) -> Result<VcpuState, KvmError> {
    // The order is KVM's: MP state first, for it takes in pending INITs and
    // SIPIs; events after all that they may change.
    let mp_state = vcpu.get_mp_state().map_err(refused("KVM_GET_MP_STATE"))?;
    let regs = vcpu.get_regs().map_err(refused("KVM_GET_REGS"))?;
    let sregs = vcpu.get_sregs().map_err(refused("KVM_GET_SREGS"))?;
    let xsave = xsave::get(vcpu, xsave_words)?;
    let xcrs = vcpu.get_xcrs().map_err(refused("KVM_GET_XCRS"))?;
    let debug_regs = vcpu
        .get_debug_regs()
        .map_err(refused("KVM_GET_DEBUGREGS"))?;
    let lapic = vcpu.get_lapic().map_err(refused("KVM_GET_LAPIC"))?;
    let tsc_khz = vcpu.get_tsc_khz().map_err(refused("KVM_GET_TSC_KHZ"))?;
    let msrs = read_msrs(vcpu, msr_indices)?;
    let events = vcpu
        .get_vcpu_events()
        .map_err(refused("KVM_GET_VCPU_EVENTS"))?;
    Ok(VcpuState {
        mp_state,
        regs,
        sregs,
        xsave,
        xcrs,
        debug_regs,
        lapic,
        msrs,
        events,
        tsc_khz,
    })
}

/// Puts into a vCPU that has not run, and has its CPUID, what KVM takes without a
/// look into guest memory: before that is mapped, and while.
pub fn restore_registers(
    vcpu: &VcpuFd,
    state: &VcpuState,
    xsave_words: usize,
) -> Result<(), RestoreVcpuError> {
    let own_khz = vcpu.get_tsc_khz().map_err(refused("KVM_GET_TSC_KHZ"))?;
    // Within 250 ppm, as the kernel's own clocks bear; more needs scaling.
    if state.tsc_khz.abs_diff(own_khz) > own_khz / 4000 {
        vcpu.set_tsc_khz(state.tsc_khz)
            .map_err(refused("KVM_SET_TSC_KHZ"))?;
    }
    vcpu.set_mp_state(state.mp_state)
        .map_err(refused("KVM_SET_MP_STATE"))?;
    vcpu.set_regs(&state.regs)
        .map_err(refused("KVM_SET_REGS"))?;
    // XCR0 first: it says which parts of the XSAVE area may be in use.
    vcpu.set_xcrs(&state.xcrs)
        .map_err(refused("KVM_SET_XCRS"))?;
    if state.xsave.len() != xsave_words {
        return Err(RestoreVcpuError::Xsave {
            actual: state.xsave.len() * 4,
            expected: xsave_words * 4,
        });
    }
    xsave::set(vcpu, &state.xsave)?;
    vcpu.set_debug_regs(&state.debug_regs)
        .map_err(refused("KVM_SET_DEBUGREGS"))?;
    Ok(())
}

/// Puts in the rest, for which KVM may read and write guest memory: page-directory
/// pointers, and what MSRs name (the clock's page among it). `initial` are the
/// values that the MSRs have already.
pub fn restore_system(
    vcpu: &VcpuFd,
    state: &VcpuState,
    initial: &[(u32, u64)],
) -> Result<(), RestoreVcpuError> {
    vcpu.set_sregs(&state.sregs)
        .map_err(refused("KVM_SET_SREGS"))?;
    // Its layout hangs on the APIC base of the sregs, the deadline timer of the MSRs
    // on its mode.
    vcpu.set_lapic(&state.lapic)
        .map_err(refused("KVM_SET_LAPIC"))?;
    write_msrs(vcpu, &state.msrs, initial)?;
    vcpu.set_vcpu_events(&state.events)
        .map_err(refused("KVM_SET_VCPU_EVENTS"))?;
    Ok(())
}

/// Sets the CPUID of a vCPU that has not run.
pub fn set_cpuid(vcpu: &VcpuFd, cpuid: &CpuId) -> Result<(), KvmError> {
    vcpu.set_cpuid2(cpuid).map_err(refused("KVM_SET_CPUID2"))
}

/// Reads those of the MSRs that the vCPU has.
pub fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, KvmError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(MSR_BATCH)];
        let entries: Vec<_> = batch.iter().map(|&index| entry(index, 0)).collect();
        let mut msrs = msrs(&entries)?;
        let read = vcpu.get_msrs(&mut msrs).map_err(refused("KVM_GET_MSRS"))?;
        let taken = &msrs.as_slice()[..read.min(batch.len())];
        values.extend(taken.iter().map(|msr| (msr.index, msr.data)));
        // One that KVM lists and the vCPU's CPUID does not have ends a batch.
        let skipped = usize::from(read < batch.len());
        rest = &rest[(read + skipped).min(rest.len())..];
    }
    // The deadline is relative to the TSC.
    values.sort_by_key(|(index, _)| match *index {
        MSR_IA32_TSC => 0,
        MSR_IA32_TSC_DEADLINE => 2,
        _ => 1,
    });
    Ok(values)
}

/// Writes the MSRs that differ from what the vCPU has; those that count always.
fn write_msrs(
    vcpu: &VcpuFd,
    values: &[(u32, u64)],
    initial: &[(u32, u64)],
) -> Result<(), RestoreVcpuError> {
    let counts = |index| matches!(index, MSR_IA32_TSC | MSR_IA32_TSC_DEADLINE);
    let differs =
        |&&(index, value): &&(u32, u64)| counts(index) || !initial.contains(&(index, value));
    let entries: Vec<_> = values
        .iter()
        .filter(differs)
        .map(|&(index, value)| entry(index, value))
        .collect();
    for batch in entries.chunks(MSR_BATCH) {
        let msrs = msrs(batch)?;
        let set = vcpu.set_msrs(&msrs).map_err(refused("KVM_SET_MSRS"))?;
        if let Some(refused) = batch.get(set) {
            return Err(RestoreVcpuError::Msr(refused.index));
        }
    }
    Ok(())
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

fn msrs(entries: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    let too_many = |_| refused("KVM_SET_MSRS")(kvm_ioctls::Error::new(libc::E2BIG));
    Msrs::from_entries(entries).map_err(too_many)
}

/// Words of this host's XSAVE area (KVM_CAP_XSAVE2; 4 KiB before Linux 5.17).
pub fn xsave_words(vm: &kvm_ioctls::VmFd) -> usize {
    let bytes = vm.check_extension_int(kvm_ioctls::Cap::Xsave2);
    usize::try_from(bytes)
        .unwrap_or(0)
        .max(size_of::<kvm_bindings::kvm_xsave>())
        / 4
}

pub(super) fn new_xsave(words: usize) -> Result<Xsave, KvmError> {
    let extra = words.saturating_sub(size_of::<kvm_bindings::kvm_xsave>() / 4);
    Xsave::new(extra).map_err(|_| refused("KVM_GET_XSAVE2")(kvm_ioctls::Error::new(libc::ENOMEM)))
}
