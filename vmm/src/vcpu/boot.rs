//! The state in which a vCPU enters a kernel: 64-bit mode with the first GiB
//! mapped one to one (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::machine::kvm::{KvmError, refused};
use crate::machine::layout;
use crate::memory::GuestMemory;

/// 64-bit code, data and task segments, at the selectors 0x10, 0x18 and 0x20
/// that the boot protocol asks for (__BOOT_CS, __BOOT_DS).
const GDT: [u64; 5] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x008f_8b00_0000_ffff,
];
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

const CR0_PROTECTED: u64 = 1;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = 1 << 8 | 1 << 10;

const PAGE_PRESENT_WRITABLE: u64 = 3;
const PAGE_LARGE: u64 = 1 << 7;

const MSR_IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, all memory write-back.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// Writes the page tables and the GDT that the boot vCPU starts with.
pub fn write_tables(memory: &GuestMemory) -> Result<(), GuestMemoryError> {
    memory.write_obj(layout::PDPT.0 | PAGE_PRESENT_WRITABLE, layout::PML4)?;
    memory.write_obj(
        layout::PAGE_DIRECTORY.0 | PAGE_PRESENT_WRITABLE,
        layout::PDPT,
    )?;
    // 512 pages of 2 MiB.
    let mut directory = [0u8; 4096];
    for (page, entry) in (0u64..).zip(directory.chunks_exact_mut(8)) {
        let value = (page << 21) | PAGE_PRESENT_WRITABLE | PAGE_LARGE;
        entry.copy_from_slice(&value.to_le_bytes());
    }
    memory.write_slice(&directory, layout::PAGE_DIRECTORY)?;
    for (index, entry) in (0u64..).zip(GDT) {
        memory.write_obj(entry, GuestAddress(layout::GDT.0 + index * 8))?;
    }
    Ok(())
}

/// Sets the boot vCPU to enter the kernel. The others wait for INIT and SIPI in
/// the state that KVM made them in.
pub fn set_registers(vcpu: &VcpuFd, entry: GuestAddress) -> Result<(), KvmError> {
    let mut sregs = vcpu.get_sregs().map_err(refused("KVM_GET_SREGS"))?;
    sregs.gdt.base = layout::GDT.0;
    sregs.gdt.limit = (size_of_val(&GDT) - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = segment(CODE);
    sregs.ds = segment(DATA);
    sregs.es = segment(DATA);
    sregs.fs = segment(DATA);
    sregs.gs = segment(DATA);
    sregs.ss = segment(DATA);
    sregs.tr = segment(TASK);
    sregs.cr0 |= CR0_PROTECTED | CR0_PAGING;
    sregs.cr3 = layout::PML4.0;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LONG_MODE;
    vcpu.set_sregs(&sregs).map_err(refused("KVM_SET_SREGS"))?;

    let regs = kvm_regs {
        rflags: 2,
        rip: entry.0,
        rsp: layout::BOOT_STACK_TOP,
        rbp: layout::BOOT_STACK_TOP,
        rsi: layout::BOOT_PARAMS.0,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(refused("KVM_SET_REGS"))
}

/// MSRs that firmware would have set, on every vCPU.
pub fn set_msrs(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let entry = |index, data| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    let entries = [
        entry(MSR_IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(MSR_MTRR_DEF_TYPE, MTRR_WRITE_BACK),
    ];
    let refused = refused("KVM_SET_MSRS");
    let msrs =
        Msrs::from_entries(&entries).map_err(|_| refused(kvm_ioctls::Error::new(libc::E2BIG)))?;
    let set = vcpu.set_msrs(&msrs).map_err(&refused)?;
    if set == entries.len() {
        Ok(())
    } else {
        Err(refused(kvm_ioctls::Error::new(libc::EINVAL)))
    }
}

/// The hidden part of a segment register, from the descriptor it is loaded with
/// (Intel SDM, volume 3, section 3.4.5).
fn segment(selector: u16) -> kvm_segment {
    let descriptor = GDT[usize::from(selector) / 8];
    let bits = |low: u32, count: u32| ((descriptor >> low) & ((1 << count) - 1)) as u8;
    // Every limit is 0xfffff pages; bases are 0.
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: bits(40, 4),
        s: bits(44, 1),
        dpl: bits(45, 2),
        present: bits(47, 1),
        avl: bits(52, 1),
        l: bits(53, 1),
        db: bits(54, 1),
        g: bits(55, 1),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_are_what_long_mode_wants() {
        let code = segment(CODE);
        assert_eq!(
            (code.type_, code.s, code.present, code.l, code.db),
            (0xb, 1, 1, 1, 0)
        );
        let data = segment(DATA);
        assert_eq!(
            (data.type_, data.s, data.present, data.l, data.db),
            (0x3, 1, 1, 0, 1)
        );
        let task = segment(TASK);
        assert_eq!((task.type_, task.s, task.present), (0xb, 0, 1));
    }
}
