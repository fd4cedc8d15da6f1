//! pvpanic: one port by which the guest kernel says that it panicked
//! (QEMU's docs/specs/pvpanic; Linux drivers/misc/pvpanic).

use acpi_tables::aml::{Device as AmlDevice, IO, Name, ResourceTemplate};
use acpi_tables::{Aml, AmlSink};

use serde::{Deserialize, Serialize};

use super::{Counters, Device, DeviceState, Place, StateError};
use crate::events::{EventSender, MachineEvent};
use crate::machine::layout;

/// The event bit for "the guest has panicked".
const PANICKED: u8 = 1;

pub struct PanicDevice {
    events: EventSender,
    panics: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PanicState {
    pub panics: u64,
}

// === impl PanicDevice ===

impl PanicDevice {
    pub fn new(events: EventSender) -> Self {
        Self { events, panics: 0 }
    }
}

impl Device for PanicDevice {
    fn describe(&self, _place: &Place, sink: &mut dyn AmlSink) {
        let port = layout::PANIC_PORT;
        AmlDevice::new(
            "PEVT".into(),
            vec![
                &Name::new("_HID".into(), &"QEMU0001"),
                &Name::new("_STA".into(), &0xfu8),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&IO::new(port, port, 1, 1)]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }

    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // The events that are understood.
        data.fill(0);
        data[0] = PANICKED;
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        // Told once: a guest that keeps writing must not fill the queue.
        if data.first().is_some_and(|bits| bits & PANICKED != 0) {
            self.panics += 1;
            if self.panics == 1 {
                self.events.send(MachineEvent::GuestPanic);
            }
        }
    }

    fn save(&self) -> DeviceState {
        DeviceState::Panic(PanicState {
            panics: self.panics,
        })
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        let DeviceState::Panic(state) = state else {
            return Err(StateError::Kind);
        };
        self.panics = state.panics;
        Ok(())
    }

    fn counters(&self) -> Counters {
        Counters::from([("panics", self.panics)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events;

    #[test]
    fn a_panic_is_told_once() {
        let (sender, receiver) = events::channel().unwrap();
        let mut device = PanicDevice::new(sender);
        device.write(0, &[2]);
        assert!(receiver.next().is_none());
        device.write(0, &[PANICKED]);
        device.write(0, &[PANICKED]);
        assert!(matches!(receiver.next(), Some(MachineEvent::GuestPanic)));
        assert!(receiver.next().is_none());
        assert_eq!(device.counters()["panics"], 2);
    }
}
