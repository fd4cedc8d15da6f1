//! The machine's devices.
//!
//! Chip logic lives in types that know no bus ([`virtio::VirtioDevice`], the
//! UART of `vm-superio`). A [`Device`] puts a chip on the bus. The machine
//! keeps one list of them; building, describing to ACPI, serving events,
//! counting and tearing down all go through that list.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;

use acpi_tables::{Aml, AmlSink};
use kvm_ioctls::VmFd;

use crate::bus::Range;

pub mod generation;
pub mod panic;
pub mod power;
pub mod serial;
pub mod virtio;

/// What a device counts, by the counter's name.
pub type Counters = BTreeMap<&'static str, u64>;

/// Where a device sits.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub range: Option<Range>,
    /// The pin of the I/O APIC that its interrupt is wired to.
    pub gsi: Option<u32>,
}

/// The lifecycle of everything on the bus. In the order of their calls:
///
/// 1. `connect`, by the machine while it is built: wires interrupts and
///    doorbells to KVM.
/// 2. `describe`, by the ACPI tables: what the guest is told.
/// 3. `read` and `write`, by vCPU threads; `source_ready`, by the event loop;
///    `counters`, on request. All under the device's lock.
/// 4. `Drop`, when vCPUs and the event loop have stopped.
pub trait Device: Send {
    /// Wires the device to KVM at its place.
    fn connect(&mut self, _vm: &VmFd, _place: &Place) -> Result<(), kvm_ioctls::Error> {
        Ok(())
    }

    /// Appends the device's ACPI objects, in the scope of `\_SB`.
    fn describe(&self, _place: &Place, _sink: &mut dyn AmlSink) {}

    /// A vCPU reads at `offset` into the device's range.
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    /// A vCPU writes at `offset` into the device's range.
    fn write(&mut self, _offset: u64, _data: &[u8]) {}

    /// Descriptors that the event loop watches for readability.
    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    /// A source is readable, by its place in [`Device::sources`].
    fn source_ready(&mut self, _source: usize) {}

    fn counters(&self) -> Counters;
}

/// AML that is already encoded, to be put inside other AML.
pub struct RawAml(pub Vec<u8>);

// === impl RawAml ===

impl Aml for RawAml {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}
