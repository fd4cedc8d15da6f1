//! The VM generation id: 128 bits in guest memory that are new whenever the
//! guest's state may have been copied, and a notification that they are
//! (Microsoft, "Virtual Machine Generation ID", 2012; Linux drivers/virt/vmgenid.c).
//!
//! The notification goes through a Generic Event Device (ACPI 6.5, section
//! 5.6.9), because a hardware-reduced machine has no general-purpose events.

use acpi_tables::aml::{
    Arg, Device as AmlDevice, Equal, If, Interrupt, Method, Name, Notify, Package, Path,
    ResourceTemplate,
};
use acpi_tables::{Aml, AmlSink};
use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestMemoryError};
use vmm_sys_util::eventfd::EventFd;

use super::{Chip, Counters, Device, Place};
use crate::machine::Wire;
use crate::machine::layout::VM_GENERATION_ID;
use crate::memory::GuestMemory;

/// The value of Notify that means "the generation id has changed".
const CHANGED: u8 = 0x80;

pub struct GenerationDevice {
    memory: GuestMemory,
    changed: EventFd,
}

#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    #[error("the host's random numbers could not be read")]
    Random(#[source] rustix::io::Errno),
    #[error("guest memory does not reach up to the generation id")]
    Memory(#[source] GuestMemoryError),
}

// === impl GenerationDevice ===

impl GenerationDevice {
    pub fn new(memory: &GuestMemory, wire: Wire) -> Self {
        Self {
            memory: memory.clone(),
            changed: wire.interrupt,
        }
    }

    /// Writes a fresh id into guest memory.
    pub fn renew(&self) -> Result<(), GenerationError> {
        let mut id = [0u8; 16];
        // 16 bytes are never cut short (getrandom(2)).
        getrandom(&mut id, GetRandomFlags::empty()).map_err(GenerationError::Random)?;
        self.memory
            .write_slice(&id, VM_GENERATION_ID)
            .map_err(GenerationError::Memory)
    }

    /// Tells the guest that its id has changed.
    pub fn ring(&self) {
        // Fails only when the counter is full: then it rings already.
        let _ = self.changed.write(1);
    }
}

impl Device for GenerationDevice {
    fn describe(&self, place: &Place, sink: &mut dyn AmlSink) {
        let gsi = place.gsi.unwrap_or_default();
        let (low, high) = (VM_GENERATION_ID.0 as u32, (VM_GENERATION_ID.0 >> 32) as u32);
        AmlDevice::new(
            "VGEN".into(),
            vec![
                &Name::new("_HID".into(), &"SOULVGEN"),
                &Name::new("_CID".into(), &"VM_Gen_Counter"),
                &Name::new("_DDN".into(), &"VM_Gen_Counter"),
                &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
            ],
        )
        .to_aml_bytes(sink);
        AmlDevice::new(
            "GED_".into(),
            vec![
                &Name::new("_HID".into(), &"ACPI0013"),
                &Name::new("_UID".into(), &0u8),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&Interrupt::new(true, true, false, false, gsi)]),
                ),
                &Method::new(
                    "_EVT".into(),
                    1,
                    true,
                    vec![&If::new(
                        &Equal::new(&Arg(0), &gsi),
                        vec![&Notify::new(&Path::new("\\_SB_.VGEN"), &CHANGED)],
                    )],
                ),
            ],
        )
        .to_aml_bytes(sink);
    }

    fn chip(&mut self) -> Chip<'_> {
        Chip::Generation(self)
    }

    fn counters(&self) -> Counters {
        Counters::new()
    }
}
