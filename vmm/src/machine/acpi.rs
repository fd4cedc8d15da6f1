//! The ACPI tables of a hardware-reduced machine (ACPI 6.5): RSDP, XSDT, FADT,
//! MADT and a DSDT that every device of the machine adds itself to.

use acpi_tables::aml::Scope;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::DeviceSlot;
use super::layout;
use crate::bus::lock;
use crate::devices::power;
use crate::memory::GuestMemory;

const OEM_ID: [u8; 6] = *b"SOULBX";
const OEM_TABLE_ID: [u8; 8] = *b"SOULBOX1";
const OEM_REVISION: u32 = 1;
/// Legacy devices that the machine does not have (IAPC_BOOT_ARCH): VGA, CMOS
/// clock; and MSI is not supported, for there is no PCI.
const IAPC_BOOT_ARCH: u16 = 1 << 2 | 1 << 3 | 1 << 5;

#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    #[error("the ACPI tables take {0} bytes, more than their place; use fewer devices")]
    TooLarge(u64),
    #[error("the ACPI tables could not be written to guest memory")]
    Write(#[source] GuestMemoryError),
}

/// Places tables one after the other.
struct Writer<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

/// Writes the tables and returns the address of the RSDP.
pub fn write(
    memory: &GuestMemory,
    vcpu_count: u8,
    devices: &[DeviceSlot],
) -> Result<GuestAddress, AcpiError> {
    // The RSDP comes first, where a kernel would look for it, but is written
    // last, when all other addresses are known.
    let mut writer = Writer {
        memory,
        next: layout::ACPI_TABLES.0 + Rsdp::len() as u64,
    };
    let dsdt = writer.place(&dsdt(devices))?;
    let fadt = writer.place(&encode(&fadt(dsdt)))?;
    let madt = writer.place(&encode(&madt(vcpu_count)))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = writer.place(&encode(&xsdt))?;
    writer.next = layout::ACPI_TABLES.0;
    writer.place(&encode(&Rsdp::new(OEM_ID, xsdt)))?;
    Ok(layout::ACPI_TABLES)
}

fn dsdt(devices: &[DeviceSlot]) -> Vec<u8> {
    let mut objects = Vec::new();
    for slot in devices {
        lock(&slot.device).describe(&slot.place, &mut objects);
    }
    // 36 bytes of header; revision 2 makes AML integers 64 bits wide.
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&Scope::raw("\\_SB_".into(), objects));
    table.as_slice().to_vec()
}

fn fadt(dsdt: u64) -> impl Aml {
    let port = |offset: u16| {
        let address = u64::from(layout::POWER_PORT + offset);
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            address,
        )
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.sleep_control_reg = port(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(power::SLEEP_STATUS);
    fadt.reset_reg = port(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.iapc_boot_arch = IAPC_BOOT_ARCH.into();
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE_ID).into();
    fadt.finalize()
}

fn madt(vcpu_count: u8) -> MADT {
    let controller = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, controller);
    madt.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    for id in 0..vcpu_count {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt
}

fn encode(table: &dyn Aml) -> Vec<u8> {
    let mut bytes: Vec<u8> = Vec::new();
    table.to_aml_bytes(&mut bytes as &mut dyn AmlSink);
    bytes
}

// === impl Writer ===

impl Writer<'_> {
    fn place(&mut self, table: &[u8]) -> Result<u64, AcpiError> {
        let address = self.next;
        let end = address + table.len() as u64;
        if end > layout::ACPI_TABLES_END {
            return Err(AcpiError::TooLarge(end - layout::ACPI_TABLES.0));
        }
        self.memory
            .write_slice(table, GuestAddress(address))
            .map_err(AcpiError::Write)?;
        self.next = end.next_multiple_of(16);
        Ok(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_has_its_signature_and_checksum() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let rsdp = write(&memory, 32, &[]).unwrap();
        let read = |address: u64, bytes: usize| {
            let mut data = vec![0; bytes];
            memory.read_slice(&mut data, GuestAddress(address)).unwrap();
            data
        };
        let table = |address: u64| {
            let length: u32 = memory.read_obj(GuestAddress(address + 4)).unwrap();
            read(address, length as usize)
        };
        let pointer =
            |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());

        let rsdp = read(rsdp.0, 36);
        assert_eq!((&rsdp[..8], sum(&rsdp)), (&b"RSD PTR "[..], 0));
        let xsdt = table(pointer(&rsdp, 24));
        assert_eq!((&xsdt[..4], sum(&xsdt)), (&b"XSDT"[..], 0));
        let fadt = table(pointer(&xsdt, 36));
        assert_eq!((&fadt[..4], sum(&fadt)), (&b"FACP"[..], 0));
        let madt = table(pointer(&xsdt, 44));
        assert_eq!((&madt[..4], sum(&madt)), (&b"APIC"[..], 0));
        assert_eq!(madt.len(), 44 + 12 + 32 * 8);
        let dsdt = table(pointer(&fadt, 140));
        assert_eq!((&dsdt[..4], sum(&dsdt)), (&b"DSDT"[..], 0));
    }
}
