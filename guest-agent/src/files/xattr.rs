//! Extended attributes, xattr(7).

use std::os::fd::{AsFd as _, BorrowedFd};

use bytes::Bytes;
use rustix::fs::{XattrFlags, getxattr, listxattr, removexattr, setxattr};
use rustix::io::Errno;
use soulbox_proto::guest::v1::{SetXattrRequest, Xattr};

use super::error::{FileError, Problem, Told as _};
use super::place::{Place, View, own_link};
use crate::spec::Violations;

/// The kernel's own limits of a name, of a value and of a list of names; XATTR_*_MAX
/// of linux/limits.h.
const MAX_NAME_BYTES: usize = 255;
const MAX_VALUE_BYTES: usize = 64 * 1024;
const MAX_LIST_BYTES: usize = 64 * 1024;
/// Of all values of a reply, which gRPC limits.
const MAX_REPLY_BYTES: usize = 2 * 1024 * 1024;

pub(super) fn check(request: &SetXattrRequest) -> Result<(), Violations> {
    let mut wrong = Violations::default();
    let name = &request.name;
    if name.is_empty() || name.len() > MAX_NAME_BYTES || name.contains(&0) {
        wrong.add("name", "must have 1 to 255 bytes and no NUL byte");
    }
    if request
        .value
        .as_ref()
        .is_some_and(|value| value.len() > MAX_VALUE_BYTES)
    {
        wrong.add("value", "must have at most 65,536 bytes");
    }
    wrong.into_result()
}

pub(super) fn get(place: &Place, view: &View, follow: bool) -> Result<Vec<Xattr>, FileError> {
    const DOING: &str = "read the extended attributes of";
    let path = &place.path;
    let file = view.look(path, follow, DOING)?;
    read(file.as_fd())
        .told(DOING, path)?
        .ok_or_else(|| FileError::new(Problem::TooLarge, DOING, path))
}

/// None where they are more than a reply holds.
fn read(file: BorrowedFd<'_>) -> Result<Option<Vec<Xattr>>, Errno> {
    let link = own_link(file);
    let mut xattrs = Vec::new();
    let mut bytes = 0;
    for name in names(&link)? {
        let mut value = Vec::with_capacity(MAX_VALUE_BYTES);
        match getxattr(&link, &name[..], rustix::buffer::spare_capacity(&mut value)) {
            Ok(_) => value.shrink_to_fit(),
            // It has gone, or its namespace is not for this user.
            Err(Errno::NODATA | Errno::PERM | Errno::ACCESS | Errno::OPNOTSUPP) => continue,
            Err(errno) => return Err(errno),
        }
        bytes += name.len() + value.len();
        if bytes > MAX_REPLY_BYTES {
            return Ok(None);
        }
        xattrs.push(Xattr {
            name: name.into(),
            value: value.into(),
        });
    }
    Ok(Some(xattrs))
}

fn names(link: &str) -> Result<Vec<Vec<u8>>, Errno> {
    let mut list = Vec::with_capacity(MAX_LIST_BYTES);
    match listxattr(link, rustix::buffer::spare_capacity(&mut list)) {
        // A filesystem that has none.
        Err(Errno::OPNOTSUPP) => Ok(Vec::new()),
        Err(errno) => Err(errno),
        Ok(_) => {
            let names = list
                .split(|byte| *byte == 0)
                .filter(|name| !name.is_empty());
            Ok(names.map(<[u8]>::to_vec).collect())
        }
    }
}

pub(super) fn set(place: &Place, view: &View, request: &SetXattrRequest) -> Result<(), FileError> {
    const DOING: &str = "change the extended attributes of";
    let file = view.look(&place.path, request.follow, DOING)?;
    let (link, name) = (own_link(file.as_fd()), &request.name[..]);
    let done = match &request.value {
        Some(value) => setxattr(&link, name, value, XattrFlags::empty()),
        None => match removexattr(&link, name) {
            Err(Errno::NODATA) => Ok(()),
            done => done,
        },
    };
    done.told(DOING, &place.path)
}

/// Gives a new file the `user.` attributes and the access list of the one whose place
/// it takes. What its filesystem or user cannot set is left out.
pub(super) fn copy(from: BorrowedFd<'_>, to: BorrowedFd<'_>) {
    let Ok(Some(xattrs)) = read(from) else { return };
    let link = own_link(to);
    for Xattr { name, value } in xattrs {
        if name.starts_with(b"user.") || name == Bytes::from_static(b"system.posix_acl_access") {
            let _ = setxattr(&link, &name[..], &value, XattrFlags::empty());
        }
    }
}
