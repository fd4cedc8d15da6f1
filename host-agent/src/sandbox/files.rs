//! What a sandbox has on disk.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use super::error::StartError;
use crate::config::Paths;
use crate::id::SandboxId;
use crate::monitor::ControlSocket;
use crate::text::printable;

/// Root disks of sandboxes and logs of monitors, under the state folder.
pub(super) fn sandboxes_dir(paths: &Paths) -> PathBuf {
    paths.state_dir.join("sandboxes")
}

/// Logs of shells, under the state folder.
pub(super) fn shells_dir(paths: &Paths) -> PathBuf {
    paths.state_dir.join("shells")
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

/// Open files and sockets for one machine.
#[derive(Debug)]
pub(super) struct BootFiles {
    pub(super) layer: File,
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

    /// What the root disk writes to.
    pub(super) fn layer(&self, number: u32) -> PathBuf {
        self.state.join(format!("root.{number}.layer"))
    }

    fn log(&self) -> PathBuf {
        self.state.join("vmm.log")
    }

    /// Makes everything a machine needs but its log. Nothing of it may exist yet.
    pub(super) fn create(&self, layer: u32) -> Result<BootFiles, StartError> {
        let prepare = |what| move |source| StartError::Prepare { what, source };
        let folder = |path: &Path| DirBuilder::new().mode(0o700).recursive(true).create(path);
        folder(&self.state).map_err(prepare("state folder"))?;
        folder(&self.run).map_err(prepare("run folder"))?;
        Ok(BootFiles {
            layer: new_file(&self.layer(layer)).map_err(prepare("disk layer"))?,
            vsock_listener: UnixListener::bind(self.vsock_socket())
                .map_err(prepare("vsock socket"))?,
            control_listener: ControlSocket::listener(&self.control_socket())
                .map_err(prepare("control socket"))?,
        })
    }

    /// As [`Self::create`], for a sandbox that comes back: what its last machine
    /// wrote to goes, for what is wanted of it is in a snapshot.
    pub(super) fn renew(&self, layer: u32) -> Result<BootFiles, StartError> {
        let prepare = |what| move |source| StartError::Prepare { what, source };
        self.clear(None).map_err(prepare("old layers"))?;
        self.create(layer)
    }

    /// Removes sockets, and layers except for one.
    pub(super) fn clear(&self, but: Option<u32>) -> io::Result<()> {
        remove_folder(&self.run)?;
        self.remove_layers(but)
    }

    /// Removes layers except for one. Those that a snapshot keeps have another
    /// name there.
    pub(super) fn remove_layers(&self, but: Option<u32>) -> io::Result<()> {
        let kept = but.map(|number| self.layer(number));
        for entry in fs::read_dir(&self.state)? {
            let path = entry?.path();
            if path.extension().is_some_and(|kind| kind == "layer") && Some(&path) != kept.as_ref()
            {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }

    /// An empty layer for a machine that runs.
    pub(super) fn next_layer(&self, number: u32) -> io::Result<File> {
        let path = self.layer(number);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => new_file(&path),
        }
    }

    /// Where a monitor is to write what it says.
    pub(super) fn open_log(&self) -> io::Result<File> {
        OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(self.log())
    }

    /// Takes over the log of a monitor that has one.
    pub(super) fn take_log(&self, log: &Path) -> io::Result<()> {
        fs::rename(log, self.log())
    }

    /// Removes both folders. That they are gone already is fine.
    pub(super) fn remove(&self) -> io::Result<()> {
        remove_folder(&self.run)?;
        remove_folder(&self.state)
    }

    /// Bytes that a disk layer holds.
    pub(super) fn layer_allocated_bytes(&self, number: u32) -> u64 {
        fs::metadata(self.layer(number)).map_or(0, |metadata| metadata.blocks() * 512)
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
        let made = files.create(0).unwrap();
        assert_eq!(made.layer.metadata().unwrap().len(), 0);
        assert_eq!(made.layer.metadata().unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(&files.run).unwrap().mode() & 0o777, 0o700);
        // A second machine in the same folder would share a disk: refused.
        assert!(files.create(0).is_err());
        files.open_log().unwrap();
        fs::write(files.log(), "one\nlast words \n\n").unwrap();
        assert_eq!(files.last_log_line().unwrap(), "last words");
        let long = "x".repeat(100_000) + "\n\x1b[2Jlast words\n";
        fs::write(files.log(), long).unwrap();
        assert_eq!(files.last_log_line().unwrap(), " [2Jlast words");
        files.remove().unwrap();
        files.remove().unwrap();
        assert!(!files.state.exists() && !files.run.exists());
    }

    #[test]
    fn one_that_comes_back_has_one_layer() {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths {
            state_dir: folder.path().join("state"),
            run_dir: folder.path().join("run"),
            ..Paths::default()
        };
        let files = SandboxFiles::new(&paths, &SandboxId::random().unwrap());
        files.create(0).unwrap();
        files.open_log().unwrap();
        fs::write(files.layer(1), "of a try that failed").unwrap();
        assert_eq!(files.next_layer(1).unwrap().metadata().unwrap().len(), 0);
        files.renew(2).unwrap();
        assert!(!files.layer(0).exists() && !files.layer(1).exists());
        assert!(files.layer(2).exists() && files.log().exists());
        files.clear(Some(2)).unwrap();
        assert!(files.layer(2).exists() && !files.run.exists());
    }
}
