//! From what the client sent to the devices of the machine.

use std::sync::{Arc, Mutex};

use super::frame::Wire;
use super::shape::Kind;
use super::{BuildError, Parts};
use crate::bus::SharedDevice;
use crate::config::{Disk, Vsock};
use crate::console::Console;
use crate::devices::generation::GenerationDevice;
use crate::devices::panic::PanicDevice;
use crate::devices::power::PowerDevice;
use crate::devices::serial::SerialDevice;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::block::{Block, BlockConfig, BlockError, Ring};
use crate::devices::virtio::mmio::VirtioMmio;
use crate::devices::virtio::net::{Net, NetConfig};
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::{self, Admission, GuestConnection, NewVsockError, VsockConfig};
use crate::events::{EventSender, MachineEvent};
use crate::memory::GuestMemory;
use crate::memory::pagemap::Pagemap;

/// What devices are made from, until they are.
pub(super) struct Backends<'a> {
    disks: std::vec::IntoIter<Disk>,
    rings: std::vec::IntoIter<Ring>,
    vsock: Option<Vsock>,
    net: Option<NetConfig>,
    pub(super) pagemap: Option<Pagemap>,
    console: Console,
    memory: &'a GuestMemory,
    events: &'a EventSender,
}

// === impl Backends ===

impl<'a> Backends<'a> {
    pub(super) fn new(
        parts: Parts,
        rings: Vec<Ring>,
        console: Console,
        memory: &'a GuestMemory,
        events: &'a EventSender,
    ) -> Self {
        Self {
            disks: parts.disks.into_iter(),
            rings: rings.into_iter(),
            vsock: parts.vsock,
            net: parts.net,
            pagemap: parts.pagemap.map(Pagemap::new),
            console,
            memory,
            events,
        }
    }

    /// Makes the next device of the list; its name and itself.
    pub(super) fn device(
        &mut self,
        kind: Kind,
        wire: Wire,
    ) -> Result<(String, SharedDevice), BuildError> {
        let events = || self.events.try_clone().map_err(BuildError::EventFd);
        let (name, chip): (_, Box<dyn VirtioDevice>) = match kind {
            Kind::Serial => {
                let serial = SerialDevice::new(self.console.clone(), wire);
                return Ok(("serial".into(), shared(serial)));
            }
            Kind::Power => return Ok(("power".into(), shared(PowerDevice::new(events()?)))),
            Kind::Panic => return Ok(("panic".into(), shared(PanicDevice::new(events()?)))),
            Kind::Generation => {
                let generation = GenerationDevice::new(self.memory, wire);
                return Ok(("generation".into(), shared(generation)));
            }
            Kind::Block(_) => {
                let disk = self.disks.next().ok_or(BuildError::Missing("a disk"))?;
                let ring = self.rings.next().ok_or(BuildError::Missing("a ring"))?;
                (format!("block.{}", disk.id), Box::new(block(disk, ring)?))
            }
            Kind::Vsock => {
                let vsock = self.vsock.take().ok_or(BuildError::Missing("the vsock"))?;
                ("vsock".into(), Box::new(new_vsock(vsock, events()?)?))
            }
            Kind::Rng => ("rng".into(), Box::new(Rng::new())),
            Kind::Balloon => ("balloon".into(), Box::new(Balloon::new())),
            Kind::Net => {
                let net = self.net.take().ok_or(BuildError::Missing("the net"))?;
                ("net".into(), Box::new(Net::new(net)?))
            }
        };
        let transport = VirtioMmio::new(chip, self.memory.clone(), wire);
        Ok((name, shared(transport)))
    }
}

fn shared(device: impl crate::devices::Device + 'static) -> SharedDevice {
    Arc::new(Mutex::new(device))
}

fn block(disk: Disk, ring: Ring) -> Result<Block, BlockError> {
    Block::new(
        BlockConfig {
            id: disk.id,
            size_bytes: disk.size_bytes,
            base: disk.base,
            frozen: disk.frozen,
            layer: disk.layer,
            rate_limit: disk.rate_limit,
        },
        ring,
    )
}

/// A guest's connections go to the client, which takes or closes them.
fn new_vsock(vsock: Vsock, events: EventSender) -> Result<vsock::Vsock, NewVsockError> {
    let on_guest_connection = Box::new(move |connection: GuestConnection| {
        events.send(MachineEvent::VsockConnection {
            host_port: connection.host_port,
            guest_port: connection.guest_port,
            stream: connection.stream,
        });
        Admission::Accepted
    });
    vsock::Vsock::new(VsockConfig {
        guest_cid: u64::from(vsock.guest_cid),
        listener: vsock.listener,
        on_guest_connection,
    })
}
