//! What a sandbox has on disk.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{MemfdFlags, SealFlags};

use super::error::StartError;
use crate::config::Paths;
use crate::id::SandboxId;
use crate::monitor::ControlSocket;
use crate::text::printable;

/// Root disks of sandboxes and logs of monitors, under the state folder.
pub(super) fn sandboxes_dir(paths: &Paths) -> PathBuf {
    paths.state_dir.join("sandboxes")
}

/// Sockets of running sandboxes.
pub(super) fn sockets_dir(paths: &Paths) -> PathBuf {
    paths.run_dir.join("vm")
}

/// The two folders of one sandbox.
#[derive(Debug)]
pub(super) struct SandboxFiles {
    state: PathBuf,
    run: PathBuf,
}

/// Open files and sockets for one boot.
#[derive(Debug)]
pub(super) struct BootFiles {
    pub(super) log: File,
    pub(super) layer: File,
    pub(super) memory: OwnedFd,
    pub(super) vsock_listener: UnixListener,
    pub(super) control_listener: OwnedFd,
}

// === impl SandboxFiles ===

impl SandboxFiles {
    pub(super) fn new(paths: &Paths, id: &SandboxId) -> Self {
        Self {
            state: sandboxes_dir(paths).join(id.as_str()),
            run: sockets_dir(paths).join(id.as_str()),
        }
    }

    pub(super) fn vsock_socket(&self) -> PathBuf {
        self.run.join("vsock.sock")
    }

    pub(super) fn control_socket(&self) -> PathBuf {
        self.run.join("control.sock")
    }

    fn layer(&self) -> PathBuf {
        self.state.join("root.layer")
    }

    fn log(&self) -> PathBuf {
        self.state.join("vmm.log")
    }

    /// Makes everything a boot needs. Nothing of it may exist yet.
    pub(super) fn create(&self, memory_mib: u32) -> Result<BootFiles, StartError> {
        let prepare = |what| move |source| StartError::Prepare { what, source };
        let folder = |path: &Path| DirBuilder::new().mode(0o700).recursive(true).create(path);
        folder(&self.state).map_err(prepare("state folder"))?;
        folder(&self.run).map_err(prepare("run folder"))?;
        Ok(BootFiles {
            log: new_file(&self.log()).map_err(prepare("log"))?,
            layer: new_file(&self.layer()).map_err(prepare("disk layer"))?,
            memory: memory(memory_mib).map_err(prepare("memory"))?,
            vsock_listener: UnixListener::bind(self.vsock_socket())
                .map_err(prepare("vsock socket"))?,
            control_listener: ControlSocket::listener(&self.control_socket())
                .map_err(prepare("control socket"))?,
        })
    }

    /// Removes both folders. That they are gone already is fine.
    pub(super) fn remove(&self) -> io::Result<()> {
        remove_folder(&self.run)?;
        remove_folder(&self.state)
    }

    /// Bytes that the disk layer holds.
    pub(super) fn layer_allocated_bytes(&self) -> u64 {
        fs::metadata(self.layer()).map_or(0, |metadata| metadata.blocks() * 512)
    }

    /// The last line that the monitor wrote to its log.
    pub(super) fn last_log_line(&self) -> Option<String> {
        const MAX_LINE_CHARS: usize = 500;
        const MAX_TAIL_BYTES: u64 = 4096;
        let mut log = File::open(self.log()).ok()?;
        let length = log.metadata().ok()?.len();
        log.seek(SeekFrom::Start(length.saturating_sub(MAX_TAIL_BYTES)))
            .ok()?;
        let mut tail = Vec::new();
        log.take(MAX_TAIL_BYTES).read_to_end(&mut tail).ok()?;
        let text = String::from_utf8_lossy(&tail);
        let line = text.lines().rev().find(|line| !line.trim().is_empty())?;
        Some(printable(line.trim(), MAX_LINE_CHARS))
    }
}

fn new_file(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}

/// Guest memory: a memfd whose size nobody can change any more, so that a
/// monitor never faults on pages that were cut away.
fn memory(memory_mib: u32) -> io::Result<OwnedFd> {
    let memory = rustix::fs::memfd_create(
        "soulbox-memory",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )?;
    rustix::fs::ftruncate(&memory, u64::from(memory_mib) << 20)?;
    rustix::fs::fcntl_add_seals(
        &memory,
        SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL,
    )?;
    Ok(memory)
}

pub(super) fn remove_folder(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io::Error::new(
            error.kind(),
            format!("{}: {error}", path.display()),
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn what_is_made_is_private_and_goes_again() {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths {
            state_dir: folder.path().join("state"),
            run_dir: folder.path().join("run"),
            ..Paths::default()
        };
        let files = SandboxFiles::new(&paths, &SandboxId::random().unwrap());
        let made = files.create(128).unwrap();
        assert_eq!(made.layer.metadata().unwrap().len(), 0);
        assert_eq!(made.layer.metadata().unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(&files.run).unwrap().mode() & 0o777, 0o700);
        let size = rustix::fs::fstat(made.memory.as_fd()).unwrap().st_size;
        assert_eq!(size, 128 << 20);
        assert!(rustix::fs::ftruncate(&made.memory, 1).is_err());
        // A second boot in the same folder would share a disk: refused.
        assert!(files.create(128).is_err());
        fs::write(files.log(), "one\nlast words \n\n").unwrap();
        assert_eq!(files.last_log_line().unwrap(), "last words");
        let long = "x".repeat(100_000) + "\n\x1b[2Jlast words\n";
        fs::write(files.log(), long).unwrap();
        assert_eq!(files.last_log_line().unwrap(), " [2Jlast words");
        files.remove().unwrap();
        files.remove().unwrap();
        assert!(!files.state.exists() && !files.run.exists());
    }
}
