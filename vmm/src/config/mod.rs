//! What a client asks for, checked whole before anything is opened or made.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use soulbox_proto::vmm::v1;

use crate::devices::virtio::block::BLOCK_BYTES;
use crate::devices::virtio::net::NetConfig;
use crate::machine::{Shape, layout};

mod net;
mod restore;

pub use restore::{
    PrepareRequest, PreparedMemory, RestoreDisk, RestoreRequest, snapshot_files, working_set_file,
};

/// The fewest and the most vCPUs of a machine.
pub const VCPU_COUNT: std::ops::RangeInclusive<u32> = 1..=32;
/// The smallest and the largest guest memory, in MiB: 128 MiB to 1 TiB.
pub const MEMORY_MIB: std::ops::RangeInclusive<u32> = 128..=1024 * 1024;
/// The longest kernel command line, in bytes, without its NUL (COMMAND_LINE_SIZE
/// of x86 is 2,048).
pub const CMDLINE_MAX_BYTES: usize = 2047;
/// The most disks of a machine: the other virtio devices are vsock, rng, balloon
/// and net.
pub const MAX_DISKS: usize = layout::MAX_VIRTIO_DEVICES - 4;

/// A machine and everything it may touch.
#[derive(Debug)]
pub struct BootRequest {
    pub shape: Shape,
    pub cmdline: String,
    pub kvm: OwnedFd,
    pub kernel: File,
    pub attached: Attached,
    pub disks: Vec<Disk>,
    pub vsock: Option<Vsock>,
    pub net: Option<NetConfig>,
}

/// What connects a machine to its client.
#[derive(Debug)]
pub struct Attached {
    pub console: Option<OwnedFd>,
    pub control_listener: Option<OwnedFd>,
    pub pagemap: Option<File>,
}

#[derive(Debug)]
pub struct Disk {
    pub id: String,
    pub size_bytes: u64,
    pub base: File,
    pub frozen: Vec<File>,
    pub layer: Option<File>,
    pub rate_limit: RateLimit,
}

#[derive(Debug)]
pub struct Vsock {
    pub guest_cid: u32,
    pub listener: UnixListener,
}

/// Limits of a device; an absent bucket does not limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimit {
    pub bytes: Option<Bucket>,
    pub operations: Option<Bucket>,
}

/// A token bucket's parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    pub capacity: u64,
    pub refill_time_ms: u64,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    #[error("{field}: {problem}")]
    Invalid {
        field: &'static str,
        problem: String,
    },
    #[error("{field} names descriptor {index}, but the message carries {carried}; send it")]
    MissingFd {
        field: &'static str,
        index: u32,
        carried: usize,
    },
    #[error(
        "{field} names descriptor {index}, which another field has taken; send it once for each"
    )]
    SharedFd { field: &'static str, index: u32 },
    #[error("the message carries {0} descriptors that no field names; send only what is used")]
    SpareFds(usize),
}

/// The descriptors of one message, each of which exactly one field takes.
struct Fds(Vec<Option<OwnedFd>>);

// === impl BootRequest ===

impl BootRequest {
    /// Checks a Boot message and gives its descriptors to the fields that name them.
    pub fn from_message(boot: v1::Boot, fds: Vec<OwnedFd>) -> Result<Self, ConfigError> {
        let machine = boot
            .machine
            .ok_or_else(|| invalid("machine", "is missing"))?;
        let block_devices = machine.block_devices.len();
        let shape = checked_shape(&v1::MachineShape {
            vcpu_count: machine.vcpu_count,
            memory_mib: machine.memory_mib,
            block_devices: block_devices.try_into().unwrap_or(u32::MAX),
            vsock: machine.vsock.is_some(),
            net: machine.net.is_some(),
        })?;
        check_cmdline(&machine.cmdline)?;

        let mut fds = Fds::new(fds);
        let request = Self {
            shape,
            cmdline: machine.cmdline,
            kvm: fds.take("kvm_fd", boot.kvm_fd)?,
            kernel: fds.take("kernel_fd", boot.kernel_fd)?.into(),
            attached: Attached::take(
                &mut fds,
                boot.console_fd,
                boot.control_listener_fd,
                boot.pagemap_fd,
            )?,
            disks: machine
                .block_devices
                .into_iter()
                .map(|device| Disk::from_message(device, &mut fds))
                .collect::<Result<_, _>>()?,
            vsock: machine
                .vsock
                .map(|vsock| Vsock::from_message(vsock, &mut fds))
                .transpose()?,
            net: machine
                .net
                .map(|net| NetConfig::from_message(net, &mut fds))
                .transpose()?,
        };
        fds.finish()?;
        Ok(request)
    }
}

/// Checks the shape of a machine.
pub(crate) fn checked_shape(shape: &v1::MachineShape) -> Result<Shape, ConfigError> {
    let (vcpus, mib) = (shape.vcpu_count, shape.memory_mib);
    if !VCPU_COUNT.contains(&vcpus) {
        return Err(invalid(
            "machine.vcpu_count",
            format!("{vcpus} is not within 1–32"),
        ));
    }
    if !MEMORY_MIB.contains(&mib) {
        return Err(invalid(
            "machine.memory_mib",
            format!("{mib} is not within 128–1,048,576 (1 TiB)"),
        ));
    }
    match u8::try_from(shape.block_devices) {
        Ok(block_devices) if usize::from(block_devices) <= MAX_DISKS => Ok(Shape {
            vcpu_count: vcpus as u8,
            memory_mib: mib,
            block_devices,
            vsock: shape.vsock,
            net: shape.net,
        }),
        _ => Err(invalid(
            "machine.block_devices",
            format!("at most {MAX_DISKS} fit"),
        )),
    }
}

fn check_cmdline(cmdline: &str) -> Result<(), ConfigError> {
    if cmdline.len() > CMDLINE_MAX_BYTES {
        return Err(invalid(
            "machine.cmdline",
            format!("{} bytes; at most {CMDLINE_MAX_BYTES} fit", cmdline.len()),
        ));
    }
    if !cmdline.bytes().all(|b| (0x20..0x7f).contains(&b)) {
        return Err(invalid(
            "machine.cmdline",
            "holds a byte that is not printable ASCII",
        ));
    }
    Ok(())
}

// === impl Attached ===

impl Attached {
    fn take(
        fds: &mut Fds,
        console: Option<u32>,
        control_listener: Option<u32>,
        pagemap: Option<u32>,
    ) -> Result<Self, ConfigError> {
        Ok(Self {
            console: fds.take_optional("console_fd", console)?,
            control_listener: fds.take_optional("control_listener_fd", control_listener)?,
            pagemap: fds.take_optional("pagemap_fd", pagemap)?.map(File::from),
        })
    }
}

// === impl Disk ===

impl Disk {
    fn from_message(device: v1::BlockDevice, fds: &mut Fds) -> Result<Self, ConfigError> {
        let field = "machine.block_devices.id";
        if device.id.is_empty() || device.id.len() > 20 {
            return Err(invalid(field, "must have 1–20 bytes"));
        }
        let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        if !device.id.bytes().all(plain) {
            return Err(invalid(field, "may hold only letters, digits, '-' and '_'"));
        }
        if device.size_bytes == 0 || !device.size_bytes.is_multiple_of(BLOCK_BYTES) {
            return Err(invalid(
                "machine.block_devices.size_bytes",
                format!(
                    "{} is not a multiple of {BLOCK_BYTES} above 0",
                    device.size_bytes
                ),
            ));
        }
        Ok(Self {
            id: device.id,
            size_bytes: device.size_bytes,
            base: fds
                .take("machine.block_devices.base_fd", device.base_fd)?
                .into(),
            frozen: Vec::new(),
            layer: fds
                .take_optional("machine.block_devices.layer_fd", device.layer_fd)?
                .map(File::from),
            rate_limit: RateLimit::from_message(
                "machine.block_devices.rate_limit",
                device.rate_limit,
            )?,
        })
    }
}

// === impl Vsock ===

impl Vsock {
    fn from_message(vsock: v1::VsockDevice, fds: &mut Fds) -> Result<Self, ConfigError> {
        // 0, 1 and 2 are the hypervisor, loopback and the host; the last value
        // means "any" (vsock(7)).
        if vsock.guest_cid < 3 || vsock.guest_cid == u32::MAX {
            return Err(invalid(
                "machine.vsock.guest_cid",
                format!("{} is reserved; use 3 or above", vsock.guest_cid),
            ));
        }
        Ok(Self {
            guest_cid: vsock.guest_cid,
            listener: fds
                .take("machine.vsock.listener_fd", vsock.listener_fd)?
                .into(),
        })
    }
}

// === impl RateLimit ===

impl RateLimit {
    /// An absent one does not limit.
    fn from_message(
        field: &'static str,
        limit: Option<v1::RateLimit>,
    ) -> Result<Self, ConfigError> {
        let limit = limit.unwrap_or_default();
        let bucket = |bucket: Option<v1::TokenBucket>| match bucket {
            Some(b) if b.capacity == 0 || b.refill_time_ms == 0 => Err(invalid(
                field,
                "capacity and refill_time_ms must be above 0",
            )),
            Some(b) => Ok(Some(Bucket {
                capacity: b.capacity,
                refill_time_ms: b.refill_time_ms,
            })),
            None => Ok(None),
        };
        Ok(Self {
            bytes: bucket(limit.bytes)?,
            operations: bucket(limit.operations)?,
        })
    }
}

// === impl Fds ===

impl Fds {
    fn new(fds: Vec<OwnedFd>) -> Self {
        Self(fds.into_iter().map(Some).collect())
    }

    /// All have been taken.
    fn finish(self) -> Result<(), ConfigError> {
        match self.0.iter().flatten().count() {
            0 => Ok(()),
            spare => Err(ConfigError::SpareFds(spare)),
        }
    }

    fn take(&mut self, field: &'static str, index: u32) -> Result<OwnedFd, ConfigError> {
        let carried = self.0.len();
        self.0
            .get_mut(index as usize)
            .ok_or(ConfigError::MissingFd {
                field,
                index,
                carried,
            })?
            .take()
            .ok_or(ConfigError::SharedFd { field, index })
    }

    fn take_optional(
        &mut self,
        field: &'static str,
        index: Option<u32>,
    ) -> Result<Option<OwnedFd>, ConfigError> {
        index.map(|index| self.take(field, index)).transpose()
    }
}

fn invalid(field: &'static str, problem: impl Into<String>) -> ConfigError {
    ConfigError::Invalid {
        field,
        problem: problem.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn boot() -> v1::Boot {
        v1::Boot {
            machine: Some(v1::MachineConfig {
                vcpu_count: 1,
                memory_mib: 128,
                cmdline: "quiet".into(),
                block_devices: vec![v1::BlockDevice {
                    id: "root".into(),
                    size_bytes: 4096,
                    base_fd: 3,
                    layer_fd: Some(4),
                    rate_limit: None,
                }],
                vsock: None,
                net: None,
            }),
            kvm_fd: 0,
            kernel_fd: 2,
            console_fd: None,
            control_listener_fd: None,
            pagemap_fd: Some(1),
        }
    }

    fn fds(n: usize) -> Vec<OwnedFd> {
        let open = || File::open("/dev/null").map(OwnedFd::from);
        (0..n).map(|_| open().expect("/dev/null opens")).collect()
    }

    fn refused(change: impl FnOnce(&mut v1::Boot), n: usize) -> String {
        let mut boot = boot();
        change(&mut boot);
        BootRequest::from_message(boot, fds(n))
            .expect_err("must be refused")
            .to_string()
    }

    #[test]
    fn takes_a_good_request() {
        let request = BootRequest::from_message(boot(), fds(5)).unwrap();
        assert_eq!(request.shape.memory_bytes(), 128 << 20);
        assert_eq!(request.disks[0].id, "root");
        assert!(request.disks[0].layer.is_some());
    }

    #[test]
    fn names_the_field_that_is_wrong() {
        let machine =
            |b: &mut v1::Boot, f: fn(&mut v1::MachineConfig)| f(b.machine.as_mut().unwrap());
        for (change, expected) in [
            (
                (|m| m.vcpu_count = 0) as fn(&mut v1::MachineConfig),
                "machine.vcpu_count: 0",
            ),
            (|m| m.vcpu_count = 33, "machine.vcpu_count: 33"),
            (|m| m.memory_mib = 127, "machine.memory_mib: 127"),
            (
                |m| m.memory_mib = 1024 * 1024 + 1,
                "machine.memory_mib: 1048577",
            ),
            (
                |m| m.cmdline = "x".repeat(2048),
                "machine.cmdline: 2048 bytes",
            ),
            (|m| m.cmdline = "é".into(), "machine.cmdline: holds"),
            (
                |m| m.block_devices[0].id = "a/b".into(),
                "machine.block_devices.id: may",
            ),
            (
                |m| m.block_devices[0].size_bytes = 4097,
                "machine.block_devices.size_bytes: 4097",
            ),
        ] {
            let message = refused(|b| machine(b, change), 5);
            assert!(message.starts_with(expected), "{message}");
        }
    }

    #[test]
    fn each_descriptor_is_named_exactly_once() {
        assert!(refused(|_| (), 4).contains("layer_fd names descriptor 4"));
        assert!(refused(|_| (), 6).contains("1 descriptors that no field names"));
        assert!(refused(|b| b.kernel_fd = 1, 5).contains("another field has taken"));
    }

    proptest! {
        /// Whatever bytes decode to a Boot, checking them never panics.
        #[test]
        fn any_message_is_checked(bytes in prop::collection::vec(any::<u8>(), 0..256), n in 0..6usize) {
            if let Ok(boot) = <v1::Boot as prost::Message>::decode(bytes.as_slice()) {
                let _ = BootRequest::from_message(boot, fds(n));
            }
        }
    }
}
