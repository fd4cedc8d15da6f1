//! `/dev/kvm`: whether it can be used, and what to do when not.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use kvm_ioctls::{Cap, Kvm};

use crate::sync::lock;

/// The only version there has been since Linux 2.6.22
/// (Documentation/virt/kvm/api.rst, 4.1).
const API_VERSION: i32 = 12;

/// What the monitor cannot do without, as it checks it itself.
const NEEDED: [(Cap, &str); 8] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
];

#[derive(Debug, Clone, thiserror::Error)]
pub enum KvmError {
    #[error("{} is missing; load the module (`modprobe kvm_intel` or `modprobe kvm_amd`), or turn virtualization on in the firmware", .path.display())]
    Missing { path: PathBuf },
    #[error("soulboxd may not open {}; run it as a user who may, such as one in the group kvm", .path.display())]
    Permission { path: PathBuf },
    #[error("{} cannot be opened ({message}); see the kernel's log", .path.display())]
    Open { path: PathBuf, message: String },
    #[error("{} is no KVM device; set paths.kvm to the one of this host, usually /dev/kvm", .path.display())]
    NotKvm { path: PathBuf },
    #[error(
        "KVM speaks API version {found}, but {API_VERSION} is needed; update the host's kernel"
    )]
    ApiVersion { found: i32 },
    #[error("KVM lacks {name}; update the host's kernel")]
    Capability { name: &'static str },
}

/// An open `/dev/kvm` and what it says of itself.
#[derive(Debug, Clone)]
pub struct UsableKvm {
    pub device: Arc<File>,
    pub api_version: u32,
    pub max_vcpus: u32,
}

/// Opens the device when it is first wanted, and again as long as that fails:
/// mending the host needs no restart of the daemon.
#[derive(Debug)]
pub struct KvmDevice {
    path: PathBuf,
    opened: Mutex<Option<UsableKvm>>,
}

// === impl KvmDevice ===

impl KvmDevice {
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            opened: Mutex::default(),
        }
    }

    pub fn get(&self) -> Result<UsableKvm, KvmError> {
        let mut opened = lock(&self.opened);
        if let Some(usable) = opened.as_ref() {
            return Ok(usable.clone());
        }
        let usable = open(&self.path)?;
        Ok(opened.insert(usable).clone())
    }
}

fn open(path: &Path) -> Result<UsableKvm, KvmError> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(|error| open_error(path, &error))?;
    let not_kvm = || KvmError::NotKvm {
        path: path.to_owned(),
    };
    let c_path = CString::new(path.as_os_str().as_bytes()).map_err(|_| not_kvm())?;
    // A second descriptor, for these questions only: kvm-ioctls takes over a
    // descriptor's number, and this crate keeps descriptors owned.
    let kvm = Kvm::new_with_path(c_path)
        .map_err(|error| open_error(path, &io::Error::from_raw_os_error(error.errno())))?;
    let found = kvm.get_api_version();
    match u32::try_from(found) {
        Err(_) => return Err(not_kvm()),
        Ok(_) if found != API_VERSION => return Err(KvmError::ApiVersion { found }),
        Ok(_) => {}
    }
    for (capability, name) in NEEDED {
        if !kvm.check_extension(capability) {
            return Err(KvmError::Capability { name });
        }
    }
    Ok(UsableKvm {
        device: Arc::new(device),
        api_version: found.unsigned_abs(),
        max_vcpus: u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX),
    })
}

fn open_error(path: &Path, error: &io::Error) -> KvmError {
    let path = path.to_owned();
    match error.kind() {
        io::ErrorKind::NotFound => KvmError::Missing { path },
        io::ErrorKind::PermissionDenied => KvmError::Permission { path },
        _ => KvmError::Open {
            path,
            message: error.to_string(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_is_found_once_it_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kvm");
        let device = KvmDevice::new(&path);
        assert!(matches!(device.get(), Err(KvmError::Missing { .. })));
        std::fs::write(&path, b"").unwrap();
        assert!(matches!(device.get(), Err(KvmError::NotKvm { .. })));
    }

    #[test]
    fn errors_are_told_apart() {
        let error = |kind: io::ErrorKind| open_error(Path::new("/dev/kvm"), &kind.into());
        assert!(matches!(
            error(io::ErrorKind::PermissionDenied),
            KvmError::Permission { .. }
        ));
        let busy = error(io::ErrorKind::ResourceBusy).to_string();
        assert!(busy.contains("/dev/kvm"), "{busy}");
    }
}
