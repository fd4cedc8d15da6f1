//! What programs hear when the guest refuses something.

use fuser::Errno;
use soulbox_proto::ERROR_DOMAIN;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// Reasons of FilesystemService (filesystem.proto) as errno(3).
const REASONS: &[(&str, i32)] = &[
    ("FILE_NOT_FOUND", libc::ENOENT),
    ("FILE_EXISTS", libc::EEXIST),
    ("NOT_A_DIRECTORY", libc::ENOTDIR),
    ("IS_A_DIRECTORY", libc::EISDIR),
    ("DIRECTORY_NOT_EMPTY", libc::ENOTEMPTY),
    ("NOT_A_REGULAR_FILE", libc::EINVAL),
    ("PERMISSION_DENIED", libc::EACCES),
    ("READ_ONLY", libc::EROFS),
    ("DISK_FULL", libc::ENOSPC),
    ("FILE_TOO_LARGE", libc::EFBIG),
    ("NAME_TOO_LONG", libc::ENAMETOOLONG),
    ("TOO_MANY_LINKS", libc::ELOOP),
    ("PATH_ESCAPES", libc::EPERM),
    ("CROSSES_FILESYSTEMS", libc::EXDEV),
    ("FILE_BUSY", libc::EBUSY),
    ("FILE_CHANGED", libc::ESTALE),
    ("NOT_SUPPORTED", libc::EOPNOTSUPP),
    ("USER_NOT_FOUND", libc::EPERM),
    ("OUT_OF_RESOURCES", libc::ENOMEM),
    ("INVALID_REQUEST", libc::EINVAL),
];

/// The stable reason of a status that SoulBox has made.
pub(super) fn reason(status: &Status) -> Option<String> {
    let info = status.get_details_error_info()?;
    (info.domain == ERROR_DOMAIN).then_some(info.reason)
}

/// Never ENOSYS: the kernel would not ask for that again.
pub(super) fn errno(status: &Status) -> Errno {
    let reason = reason(status).unwrap_or_default();
    let known = REASONS.iter().find(|(name, _)| *name == reason);
    Errno::from_i32(match (known, status.code()) {
        (Some((_, errno)), _) => *errno,
        // Also what a mount says whose program is gone.
        (None, Code::Unavailable) => libc::ENOTCONN,
        (None, Code::DeadlineExceeded) => libc::ETIMEDOUT,
        (None, Code::Unimplemented) => libc::EOPNOTSUPP,
        (None, _) => libc::EIO,
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic_types::ErrorDetails;

    use super::*;

    fn refused(code: Code, reason: &str, domain: &str) -> Status {
        let details = ErrorDetails::with_error_info(reason, domain, HashMap::new());
        Status::with_error_details(code, "", details)
    }

    #[test]
    fn a_reason_decides_and_then_the_code() {
        let number = |status: &Status| errno(status).code();
        let full = refused(Code::ResourceExhausted, "DISK_FULL", ERROR_DOMAIN);
        assert_eq!(number(&full), libc::ENOSPC);
        let other = refused(Code::ResourceExhausted, "DISK_FULL", "example.com");
        assert_eq!(number(&other), libc::EIO);
        let died = refused(Code::Unavailable, "SANDBOX_DIED", ERROR_DOMAIN);
        assert_eq!(number(&died), libc::ENOTCONN);
        assert_eq!(
            number(&Status::unimplemented("")),
            libc::EOPNOTSUPP,
            "ENOSYS would turn the call off"
        );
        assert_eq!(number(&Status::unknown("")), libc::EIO);
    }
}
