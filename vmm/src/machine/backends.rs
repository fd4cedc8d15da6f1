//! From what the client sent to the chips of the machine.

use crate::config::{Disk, Vsock};
use crate::devices::virtio::VirtioDevice;
use crate::events::EventSender;

#[derive(Debug, thiserror::Error)]
#[error("disk {id}")]
pub struct DiskError {
    id: String,
}

pub(super) fn block(disk: Disk) -> Result<Box<dyn VirtioDevice>, DiskError> {
    Err(DiskError { id: disk.id })
}
pub(super) fn vsock(_: Vsock, _: EventSender) -> std::io::Result<Box<dyn VirtioDevice>> {
    Err(std::io::ErrorKind::Unsupported.into())
}
