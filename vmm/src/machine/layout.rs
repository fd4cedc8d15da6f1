//! Where things lie in the guest's physical address space.
//!
//! ```text
//! 0                boot structures (page tables, GDT, boot_params, command line)
//! 0x000e_0000      ACPI tables, then the VM generation id (reserved in the E820 map)
//! 0x0010_0000      RAM, the kernel first, up to 3 GiB
//! 0xc000_0000      no RAM: virtio-mmio devices, I/O APIC, local APIC, KVM's TSS
//! 0x1_0000_0000    the rest of RAM
//! ```

use vm_memory::GuestAddress;

pub const GDT: GuestAddress = GuestAddress(0x500);
pub const BOOT_PARAMS: GuestAddress = GuestAddress(0x7000);
pub const BOOT_STACK_TOP: u64 = 0x8ff0;
pub const PML4: GuestAddress = GuestAddress(0x9000);
pub const PDPT: GuestAddress = GuestAddress(0xa000);
pub const PAGE_DIRECTORY: GuestAddress = GuestAddress(0xb000);
pub const CMDLINE: GuestAddress = GuestAddress(0x2_0000);
/// End of conventional memory; the E820 map reserves what follows up to 1 MiB.
pub const LOW_RAM_END: u64 = 0x9_fc00;

/// The kernel looks for the RSDP here, and `boot_params` names it too.
pub const ACPI_TABLES: GuestAddress = GuestAddress(0xe_0000);
pub const ACPI_TABLES_END: u64 = 0xf_0000;
/// One page, of which the first 16 bytes are the VM generation id.
pub const VM_GENERATION_ID: GuestAddress = GuestAddress(0xf_0000);

pub const HIGH_RAM_START: GuestAddress = GuestAddress(0x10_0000);
pub const MMIO_GAP_START: u64 = 0xc000_0000;
pub const MMIO_GAP_END: u64 = 0x1_0000_0000;

pub const VIRTIO_MMIO_START: u64 = 0xd000_0000;
pub const VIRTIO_MMIO_BYTES: u64 = 0x1000;

pub const IO_APIC: u32 = 0xfec0_0000;
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// A page and three pages that KVM on Intel hosts wants for itself
/// (KVM_SET_IDENTITY_MAP_ADDR, KVM_SET_TSS_ADDR).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
pub const KVM_TSS: usize = 0xfffb_d000;

/// I/O ports.
pub const COM1_PORT: u16 = 0x3f8;
pub const COM1_PORTS: u16 = 8;
pub const PANIC_PORT: u16 = 0x505;
pub const POWER_PORT: u16 = 0x600;

/// Global system interrupts: pins of the one I/O APIC.
pub const COM1_GSI: u32 = 4;
pub const GENERATION_GSI: u32 = 5;
pub const FIRST_VIRTIO_GSI: u32 = 6;
pub const IO_APIC_PINS: u32 = 24;

/// How many virtio devices a machine can have: one interrupt pin each.
pub const MAX_VIRTIO_DEVICES: usize = (IO_APIC_PINS - FIRST_VIRTIO_GSI) as usize;

const _: () = {
    let end = VIRTIO_MMIO_START + MAX_VIRTIO_DEVICES as u64 * VIRTIO_MMIO_BYTES;
    assert!(
        end <= IO_APIC as u64,
        "virtio devices end below the I/O APIC"
    );
    assert!(
        ACPI_TABLES_END <= VM_GENERATION_ID.0,
        "tables end below the generation id"
    );
};

/// The ranges of RAM for `memory_bytes` of it, in address order.
pub fn ram_ranges(memory_bytes: u64) -> Vec<(GuestAddress, u64)> {
    if memory_bytes <= MMIO_GAP_START {
        vec![(GuestAddress(0), memory_bytes)]
    } else {
        vec![
            (GuestAddress(0), MMIO_GAP_START),
            (GuestAddress(MMIO_GAP_END), memory_bytes - MMIO_GAP_START),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_leaves_the_gap_free() {
        assert_eq!(ram_ranges(128 << 20).len(), 1);
        assert_eq!(ram_ranges(3 << 30), [(GuestAddress(0), 3 << 30)]);
        assert_eq!(
            ram_ranges(4 << 30),
            [(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 1 << 30)]
        );
    }
}
