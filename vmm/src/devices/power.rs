//! Power off and reset: the sleep and reset registers of hardware-reduced ACPI
//! (ACPI 6.5, sections 4.8.3.6 and 4.8.3.7).

use acpi_tables::AmlSink;
use acpi_tables::aml::{Name, Package};
use soulbox_proto::vmm::v1::exited::Reason;

use super::{Counters, Device, Place};
use crate::events::EventSender;

/// Offsets into the device's ports.
pub const SLEEP_CONTROL: u16 = 0;
pub const SLEEP_STATUS: u16 = 1;
pub const RESET: u16 = 2;
pub const PORTS: u16 = 3;

/// What the guest writes to [`RESET`].
pub const RESET_VALUE: u8 = 1;

/// SLP_TYP of S5, as `\_S5` tells it to the guest.
const S5_SLEEP_TYPE: u8 = 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_ENABLE: u8 = 1 << 5;

pub struct PowerDevice {
    events: EventSender,
}

// === impl PowerDevice ===

impl PowerDevice {
    pub fn new(events: EventSender) -> Self {
        Self { events }
    }
}

impl Device for PowerDevice {
    fn describe(&self, _place: &Place, sink: &mut dyn AmlSink) {
        use acpi_tables::Aml;
        Name::new("\\_S5_".into(), &Package::new(vec![&S5_SLEEP_TYPE, &0u8])).to_aml_bytes(sink);
    }

    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // SLEEP_STATUS: WAK_STS is never set, for the machine never wakes.
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        let power_off = (S5_SLEEP_TYPE << SLEEP_TYPE_SHIFT) | SLEEP_ENABLE;
        if offset == u64::from(SLEEP_CONTROL) && value == power_off {
            self.events
                .exit(Reason::PoweredOff, "the guest powered itself off");
        } else if offset == u64::from(RESET) && value == RESET_VALUE {
            self.events
                .exit(Reason::Reset, "the guest asked for a reset");
        }
    }

    fn counters(&self) -> Counters {
        Counters::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::{self, MachineEvent};

    fn written(offset: u16, value: u8) -> Option<Reason> {
        let (sender, receiver) = events::channel().unwrap();
        PowerDevice::new(sender).write(u64::from(offset), &[value]);
        match receiver.next() {
            Some(MachineEvent::Exit(exit)) => Some(exit.reason),
            _ => None,
        }
    }

    #[test]
    fn only_the_right_values_end_the_machine() {
        assert_eq!(written(SLEEP_CONTROL, 0x34), Some(Reason::PoweredOff));
        assert_eq!(written(SLEEP_CONTROL, 0x14), None, "not enabled");
        assert_eq!(written(SLEEP_CONTROL, 0x30), None, "another sleep state");
        assert_eq!(written(RESET, RESET_VALUE), Some(Reason::Reset));
        assert_eq!(written(RESET, 0), None);
    }
}
