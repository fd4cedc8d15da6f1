//! The console: a 16550A UART at COM1, output only.

use acpi_tables::aml::{Device as AmlDevice, EISAName, IO, Interrupt, Name, ResourceTemplate};
use acpi_tables::{Aml, AmlSink};
use kvm_ioctls::VmFd;
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Counters, Device, Place};
use crate::console::Console;
use crate::machine::layout;

pub struct SerialDevice {
    uart: Serial<IrqTrigger, NoEvents, Console>,
    console: Console,
}

/// Raises the UART's interrupt.
struct IrqTrigger(EventFd);

// === impl IrqTrigger ===

impl Trigger for IrqTrigger {
    type E = std::io::Error;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.write(1)
    }
}

// === impl SerialDevice ===

impl SerialDevice {
    pub fn new(console: Console) -> std::io::Result<Self> {
        let trigger = IrqTrigger(EventFd::new(EFD_NONBLOCK)?);
        Ok(Self {
            uart: Serial::new(trigger, console.clone()),
            console,
        })
    }
}

impl Device for SerialDevice {
    fn connect(&mut self, vm: &VmFd, place: &Place) -> Result<(), kvm_ioctls::Error> {
        match place.gsi {
            Some(gsi) => vm.register_irqfd(&self.uart.interrupt_evt().0, gsi),
            None => Ok(()),
        }
    }

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
        let mut serial = SerialDevice::new(console.clone()).unwrap();
        for byte in b"hello" {
            serial.write(0, &[*byte]);
        }
        serial.write(0, b"wide");
        assert_eq!(console.tail(), b"hello");
        let mut line_status = [0];
        serial.read(5, &mut line_status);
        assert_eq!(line_status[0] & 0x60, 0x60, "transmitter empty");
    }
}
