//! From what the client sent to the chips of the machine.

use crate::config::{Disk, Vsock};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::block::{Block, BlockConfig, BlockError};
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::{self, Admission, GuestConnection, NewVsockError, VsockConfig};
use crate::events::{EventSender, MachineEvent};

pub(super) fn block(disk: Disk) -> Result<Box<dyn VirtioDevice>, BlockError> {
    let block = Block::new(BlockConfig {
        id: disk.id,
        size_bytes: disk.size_bytes,
        base: disk.base,
        layer: disk.layer,
        rate_limit: disk.rate_limit,
    })?;
    Ok(Box::new(block))
}

/// A guest's connections go to the client, which takes or closes them.
pub(super) fn vsock(
    vsock: Vsock,
    events: EventSender,
) -> Result<Box<dyn VirtioDevice>, NewVsockError> {
    let on_guest_connection = Box::new(move |connection: GuestConnection| {
        events.send(MachineEvent::VsockConnection {
            host_port: connection.host_port,
            guest_port: connection.guest_port,
            stream: connection.stream,
        });
        Admission::Accepted
    });
    let device = vsock::Vsock::new(VsockConfig {
        guest_cid: u64::from(vsock.guest_cid),
        listener: vsock.listener,
        on_guest_connection,
    })?;
    Ok(Box::new(device))
}

pub(super) fn rng() -> Box<dyn VirtioDevice> {
    Box::new(Rng::new())
}
