//! The machine's devices.
//!
//! Chip logic lives in types that know no bus ([`virtio::VirtioDevice`], the
//! UART of `vm-superio`). A [`Device`] puts a chip on the bus. The machine
//! keeps one list of them; building, restoring, describing to ACPI, serving
//! events, saving, counting and tearing down all go through that list.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;

use acpi_tables::{Aml, AmlSink};
use serde::{Deserialize, Serialize};

use self::virtio::Interrupt;
use crate::bus::Range;

pub mod generation;
pub mod panic;
pub mod power;
pub mod serial;
pub mod virtio;

/// What a device counts, by the counter's name.
pub type Counters = BTreeMap<&'static str, u64>;

/// Where a device sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub range: Option<Range>,
    /// The pin of the I/O APIC that its interrupt is wired to.
    pub gsi: Option<u32>,
}

/// The lifecycle of everything on the bus. In the order of their calls:
///
/// 1. `restore`, by the machine while it is built from a snapshot; then `resume`
///    before its vCPUs run.
/// 2. `describe`, by the ACPI tables of a machine that boots.
/// 3. `read` and `write`, by vCPU threads; `source_ready`, by the event loop;
///    `counters`, on request. All under the device's lock.
/// 4. `pause`, `save`, `resume`, for a snapshot: no vCPU runs from the first to
///    the last, and the event loop does not call either.
/// 5. `Drop`, when vCPUs and the event loop have stopped.
///
/// A device gets its interrupt and doorbells from the [`Wire`](crate::machine::Wire)
/// that it is made with, which KVM knows already.
pub trait Device: Send {
    /// Appends the device's ACPI objects, in the scope of `\_SB`.
    fn describe(&self, _place: &Place, _sink: &mut dyn AmlSink) {}

    /// A vCPU reads at `offset` into the device's range.
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    /// A vCPU writes at `offset` into the device's range.
    fn write(&mut self, _offset: u64, _data: &[u8]) {}

    /// Registers of its interrupt, which vCPUs reach without the device's lock: who
    /// handles an interrupt would wait for what the event loop does next.
    fn interrupt(&self) -> Option<Interrupt> {
        None
    }

    /// Descriptors that the event loop watches for readability.
    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    /// A source is readable, by its place in [`Device::sources`].
    fn source_ready(&mut self, _source: usize) {}

    /// Brings everything in flight to rest, so that memory and files hold all
    /// that the device has said is done.
    fn pause(&mut self) {}

    /// What a restored device needs besides guest memory and files. Only while
    /// paused.
    fn save(&self) -> DeviceState {
        DeviceState::None
    }

    /// Takes over the state of a saved device, which is untrusted. The device is
    /// new, and paused afterwards.
    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        match state {
            DeviceState::None => Ok(()),
            _ => Err(StateError::Kind),
        }
    }

    /// Goes on after `pause` or `restore`. The guest may have been promised an
    /// interrupt that the pause has swallowed: it is given one.
    fn resume(&mut self) {}

    /// The chip, where the machine has business with it beyond this trait.
    fn chip(&mut self) -> Chip<'_> {
        Chip::Other
    }

    fn counters(&self) -> Counters;
}

/// A chip that does more than be a device.
pub enum Chip<'a> {
    Disk(&'a mut virtio::block::Block),
    Vsock(&'a mut virtio::vsock::Vsock),
    Balloon(&'a mut virtio::balloon::Balloon),
    Net(&'a mut virtio::net::Net),
    Generation(&'a mut generation::GenerationDevice),
    Other,
}

/// What is saved of a device. Enums of the codec are numbered by their order:
/// new variants go last, and a changed one is a new one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// It has none.
    None,
    Serial(serial::SerialState),
    Panic(panic::PanicState),
    Virtio(virtio::mmio::TransportState),
}

/// Why a saved state cannot be a device's.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("it is of another kind of device")]
    Kind,
    #[error("queue {queue} is {problem}")]
    Queue { queue: usize, problem: &'static str },
    #[error("{0}")]
    Chip(String),
}

/// AML that is already encoded, to be put inside other AML.
pub struct RawAml(pub Vec<u8>);

// === impl RawAml ===

impl Aml for RawAml {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}
