//! Why a copy failed.

use std::io;
use std::path::PathBuf;

use super::pack::PackError;
use super::unpack::UnpackError;

#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyError {
    #[error(
        "one of the two must be SANDBOX:PATH, and the other a path here; to copy between sandboxes, copy here first"
    )]
    Sides,
    #[error("{path} cannot be read ({source}); give a file or a directory that you may read")]
    Read { path: PathBuf, source: io::Error },
    #[error(
        "{path} cannot be written ({source}); the disk is full: make room and copy again, nothing of it was left"
    )]
    Full { path: PathBuf, source: io::Error },
    #[error("{path} cannot be written ({source}); see who may write there")]
    Write { path: PathBuf, source: io::Error },
    #[error("{path} is no file or directory; pipes, sockets and devices are not copied")]
    Kind { path: String },
    #[error("{path} is a directory, and - is one file; name the file, or a directory to copy to")]
    DirectoryToStdio { path: String },
    #[error("{path} is a file; a directory is not copied onto it: name another place")]
    DirectoryOntoFile { path: String },
    #[error("{path} is not there; make it first, or leave the slash at its end out")]
    NoDirectory { path: String },
    #[error(
        "{path} changed while it was copied, each time; stop what writes to it, or copy a snapshot"
    )]
    Changed { path: String },
    #[error("{path} cannot be a file's name; give the file's name after the directory")]
    NoName { path: String },
    #[error(transparent)]
    Unpack(#[from] UnpackError),
    #[error(transparent)]
    Pack(#[from] PackError),
    #[error("the copy's thread failed; this is a bug in soulbox, please report it")]
    Thread,
}

// === impl CopyError ===

impl CopyError {
    pub(super) fn write(path: impl Into<PathBuf>, source: io::Error) -> Self {
        let path = path.into();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::Full { path, source }
            }
            _ => Self::Write { path, source },
        }
    }

    pub(super) fn read(path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::Read {
            path: path.into(),
            source,
        }
    }
}
