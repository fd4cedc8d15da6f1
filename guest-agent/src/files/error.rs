//! Why a call about files failed.

use rustix::io::Errno;
use tonic::{Code, Status};

use crate::spec::Violations;
use crate::status::{excerpt, refused};
use crate::users::NoSuchUser;

#[derive(Debug, thiserror::Error)]
pub(crate) enum FileError {
    #[error("the request has bad fields")]
    Bad(Violations),
    #[error(transparent)]
    NoSuchUser(#[from] NoSuchUser),
    #[error("cannot {doing} {path}: {problem}")]
    Refused {
        problem: Problem,
        /// "read", "make" …
        doing: &'static str,
        /// Quoted and cut.
        path: String,
    },
}

/// What is wrong with a file or a path. Each is a reason of filesystem.proto.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Problem {
    #[error("it is not there: check the path, or make what is missing of it")]
    NotFound,
    #[error("it is there already: ask to replace it, or choose another name")]
    Exists,
    #[error("a part of the path is no directory: check it")]
    NotADirectory,
    #[error("it is a directory: name a file in it")]
    IsADirectory,
    #[error("the directory is not empty: remove recursively, or remove what is in it first")]
    DirectoryNotEmpty,
    #[error("it is no regular file: devices, pipes and sockets are for programs in the sandbox")]
    NotARegularFile,
    #[error("the user may not: name another user, or change the mode or the owner")]
    PermissionDenied,
    #[error("its filesystem is read-only: choose another place")]
    ReadOnly,
    #[error("the disk or the user's quota is full: remove something first")]
    DiskFull,
    #[error("it would be larger than the filesystem or a limit allows: write less")]
    TooLarge,
    #[error("a name in it is too long: a name has at most 255 bytes, a path 4,095")]
    NameTooLong,
    #[error(
        "its symbolic links form a loop, or one is a magic link of /proc, which is not followed: \
         name what they lead to"
    )]
    TooManyLinks,
    #[error("it leads out of the root or the directory it belongs in: name something inside")]
    PathEscapes,
    #[error("it leads to another filesystem: copy, then remove")]
    CrossesFilesystems,
    #[error("it is in use, as the root or a place where something is mounted: unmount that first")]
    Busy,
    #[error("it is not what you knew, for it has changed meanwhile: look at it anew")]
    Changed,
    #[error("its filesystem or its kind of file cannot do that: choose another place")]
    NotSupported,
    #[error("the sandbox has no room for it (memory, open files or watches): end something first")]
    OutOfResources,
    #[error("the kernel says \"{0}\"")]
    Failed(Errno),
}

/// Says what was being done when a system call failed.
pub(super) trait Told<T> {
    fn told(self, doing: &'static str, path: &[u8]) -> Result<T, FileError>;
}

// === impl FileError ===

impl FileError {
    pub(super) fn new(problem: Problem, doing: &'static str, path: &[u8]) -> Self {
        Self::Refused {
            problem,
            doing,
            path: excerpt(path),
        }
    }

    pub(super) fn errno(errno: Errno, doing: &'static str, path: &[u8]) -> Self {
        Self::new(errno.into(), doing, path)
    }

    pub(super) fn field(field: &str, description: &str) -> Self {
        Self::Bad(Violations::of(field, description))
    }
}

impl<T> Told<T> for Result<T, Errno> {
    fn told(self, doing: &'static str, path: &[u8]) -> Result<T, FileError> {
        self.map_err(|errno| FileError::errno(errno, doing, path))
    }
}

impl<T> Told<T> for std::io::Result<T> {
    fn told(self, doing: &'static str, path: &[u8]) -> Result<T, FileError> {
        self.map_err(|error| {
            let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
            FileError::errno(errno, doing, path)
        })
    }
}

impl From<Violations> for FileError {
    fn from(violations: Violations) -> Self {
        Self::Bad(violations)
    }
}

impl From<FileError> for Status {
    fn from(error: FileError) -> Self {
        let message = error.to_string();
        match error {
            FileError::Bad(violations) => violations.into(),
            FileError::NoSuchUser(_) => refused(Code::NotFound, "USER_NOT_FOUND", message),
            FileError::Refused { problem, .. } => {
                let (code, reason) = problem.reason();
                refused(code, reason, message)
            }
        }
    }
}

// === impl Problem ===

impl Problem {
    fn reason(self) -> (Code, &'static str) {
        match self {
            Self::NotFound => (Code::NotFound, "FILE_NOT_FOUND"),
            Self::Exists => (Code::AlreadyExists, "FILE_EXISTS"),
            Self::NotADirectory => (Code::FailedPrecondition, "NOT_A_DIRECTORY"),
            Self::IsADirectory => (Code::FailedPrecondition, "IS_A_DIRECTORY"),
            Self::DirectoryNotEmpty => (Code::FailedPrecondition, "DIRECTORY_NOT_EMPTY"),
            Self::NotARegularFile => (Code::FailedPrecondition, "NOT_A_REGULAR_FILE"),
            Self::PermissionDenied => (Code::PermissionDenied, "PERMISSION_DENIED"),
            Self::ReadOnly => (Code::FailedPrecondition, "READ_ONLY"),
            Self::DiskFull => (Code::ResourceExhausted, "DISK_FULL"),
            Self::TooLarge => (Code::OutOfRange, "FILE_TOO_LARGE"),
            Self::NameTooLong => (Code::InvalidArgument, "NAME_TOO_LONG"),
            Self::TooManyLinks => (Code::FailedPrecondition, "TOO_MANY_LINKS"),
            Self::PathEscapes => (Code::FailedPrecondition, "PATH_ESCAPES"),
            Self::CrossesFilesystems => (Code::FailedPrecondition, "CROSSES_FILESYSTEMS"),
            Self::Busy => (Code::FailedPrecondition, "FILE_BUSY"),
            Self::Changed => (Code::Aborted, "FILE_CHANGED"),
            Self::NotSupported => (Code::FailedPrecondition, "NOT_SUPPORTED"),
            Self::OutOfResources => (Code::ResourceExhausted, "OUT_OF_RESOURCES"),
            Self::Failed(_) => (Code::Internal, "FILE_FAILED"),
        }
    }
}

impl From<Errno> for Problem {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::NOENT => Self::NotFound,
            Errno::EXIST => Self::Exists,
            Errno::NOTDIR => Self::NotADirectory,
            Errno::ISDIR => Self::IsADirectory,
            Errno::NOTEMPTY => Self::DirectoryNotEmpty,
            Errno::ACCESS | Errno::PERM => Self::PermissionDenied,
            Errno::ROFS => Self::ReadOnly,
            Errno::NOSPC | Errno::DQUOT => Self::DiskFull,
            Errno::FBIG | Errno::OVERFLOW | Errno::MLINK => Self::TooLarge,
            Errno::NAMETOOLONG => Self::NameTooLong,
            Errno::LOOP => Self::TooManyLinks,
            Errno::XDEV => Self::CrossesFilesystems,
            Errno::BUSY | Errno::TXTBSY => Self::Busy,
            Errno::STALE | Errno::AGAIN => Self::Changed,
            Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOTTY | Errno::SPIPE => Self::NotSupported,
            Errno::NXIO | Errno::NODEV => Self::NotARegularFile,
            Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS => Self::OutOfResources,
            other => Self::Failed(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use tonic_types::StatusExt as _;

    use super::*;

    #[test]
    fn a_message_names_the_path_and_what_to_do_and_stays_small() {
        let error = FileError::errno(Errno::NOENT, "read", &[b'a'; 4000]);
        let status = Status::from(error);
        assert!(status.message().starts_with("cannot read \"aaa"));
        assert!(status.message().contains("check the path"));
        assert!(status.message().len() < 400);
        let info = status.get_details_error_info().unwrap();
        assert_eq!(info.reason, "FILE_NOT_FOUND");
    }

    #[test]
    fn every_errno_has_a_reason() {
        for raw in 1..134 {
            let (_, reason) = Problem::from(Errno::from_raw_os_error(raw)).reason();
            assert!(!reason.is_empty());
        }
    }
}
