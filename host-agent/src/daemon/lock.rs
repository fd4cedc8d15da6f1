//! One daemon per state folder.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

#[derive(Debug, thiserror::Error)]
pub(super) enum LockError {
    #[error("paths.state_dir {} cannot be made or written; see its permissions, or run soulboxd as root", .path.display())]
    Folder { path: PathBuf, source: io::Error },
    #[error("another soulboxd uses {}; stop it, or give this one its own paths.state_dir, paths.run_dir and listen.unix_path", .path.display())]
    Held { path: PathBuf },
}

/// Held as long as this lives, and no longer than the process.
#[derive(Debug)]
pub(super) struct StateLock {
    _file: File,
}

// === impl StateLock ===

impl StateLock {
    pub(super) fn take(state_dir: &Path) -> Result<Self, LockError> {
        let folder = |source| LockError::Folder {
            path: state_dir.to_owned(),
            source,
        };
        fs::create_dir_all(state_dir).map_err(folder)?;
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(state_dir.join("lock"))
            .map_err(folder)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { _file: file }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(LockError::Held {
                path: state_dir.to_owned(),
            }),
            Err(error) => Err(folder(error.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_held_by_one_and_freed_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let first = StateLock::take(&path).unwrap();
        assert!(matches!(
            StateLock::take(&path),
            Err(LockError::Held { .. })
        ));
        drop(first);
        StateLock::take(&path).unwrap();
    }
}
