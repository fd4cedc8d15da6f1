//! The console: a 16550A UART at COM1, output only.

use acpi_tables::aml::{Device as AmlDevice, EISAName, IO, Interrupt, Name, ResourceTemplate};
use acpi_tables::{Aml, AmlSink};
use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};
use vmm_sys_util::eventfd::EventFd;

use super::{Counters, Device, DeviceState, Place, StateError};
use crate::console::Console;
use crate::machine::{Wire, layout};

pub struct SerialDevice {
    uart: Serial<IrqTrigger, NoEvents, Console>,
    console: Console,
}

/// Raises the UART's interrupt.
struct IrqTrigger(EventFd);

/// The UART's registers, by their names in the 16550A's data sheet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    pub baud_divisor_low: u8,
    pub baud_divisor_high: u8,
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
}

// === impl IrqTrigger ===

impl Trigger for IrqTrigger {
    type E = std::io::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.write(1)
    }
}

// === impl SerialDevice ===

impl SerialDevice {
    pub fn new(console: Console, wire: Wire) -> Self {
        Self {
            uart: Serial::new(IrqTrigger(wire.interrupt), console.clone()),
            console,
        }
    }
}

impl Device for SerialDevice {
    fn describe(&self, place: &Place, sink: &mut dyn AmlSink) {
        let (port, ports) = (layout::COM1_PORT, layout::COM1_PORTS as u8);
        AmlDevice::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &0u8),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &Interrupt::new(true, true, false, false, place.gsi.unwrap_or_default()),
                        &IO::new(port, port, 1, ports),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // Registers are one byte wide; wider accesses reach nothing.
        match data {
            [byte] => *byte = self.uart.read(offset as u8),
            _ => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let [byte] = data {
            // The console never fails, and an interrupt that cannot be raised
            // is pending already.
            let _ = self.uart.write(offset as u8, *byte);
        }
    }

    fn save(&self) -> DeviceState {
        let state = self.uart.state();
        DeviceState::Serial(SerialState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
        })
    }

    fn restore(&mut self, state: DeviceState) -> Result<(), StateError> {
        let DeviceState::Serial(state) = state else {
            return Err(StateError::Kind);
        };
        let state = vm_superio::SerialState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            // Nothing is ever received.
            in_buffer: Vec::new(),
        };
        let unusable = |error: &dyn std::fmt::Debug| StateError::Chip(format!("{error:?}"));
        let interrupt = self.uart.interrupt_evt().0.try_clone();
        let trigger = IrqTrigger(interrupt.map_err(|error| unusable(&error))?);
        self.uart = Serial::from_state(&state, trigger, NoEvents, self.console.clone())
            .map_err(|error| unusable(&error))?;
        Ok(())
    }

    fn counters(&self) -> Counters {
        let (written, dropped) = self.console.counts();
        Counters::from([("written_bytes", written), ("dropped_bytes", dropped)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_guest_sends_is_on_the_console() {
        let console = Console::new(None).unwrap();
        let mut serial = SerialDevice::new(console.clone(), Wire::new(0).unwrap());
        for byte in b"hello" {
            serial.write(0, &[*byte]);
        }
        serial.write(0, b"wide");
        assert_eq!(console.tail(), b"hello");
        let mut line_status = [0];
        serial.read(5, &mut line_status);
        assert_eq!(line_status[0] & 0x60, 0x60, "transmitter empty");
    }

    #[test]
    fn registers_survive_a_snapshot() {
        let device = || SerialDevice::new(Console::new(None).unwrap(), Wire::new(0).unwrap());
        let mut serial = device();
        serial.write(7, &[0x5a]);
        serial.write(3, &[0x03]);
        let state = serial.save();
        let mut other = device();
        other.restore(state.clone()).unwrap();
        assert_eq!(other.save(), state);
        assert!(other.restore(DeviceState::None).is_err());
    }
}
