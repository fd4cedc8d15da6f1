//! FilesystemService.

use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt};
use std::path::{Path, PathBuf};

use soulbox_proto::guest::v1::*;

use crate::common::*;

mod archive;
mod content;
mod paths;
mod search;
mod tree;
mod watch;

/// Nobody's uid.
pub(super) const USER: &str = "54321";
pub(super) const UID: u32 = 54_321;

/// A folder that every user may write, as /tmp is.
pub(super) fn shared(guest: &Guest) -> PathBuf {
    let folder = guest.folder().join("shared");
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, PermissionsExt::from_mode(0o777)).unwrap();
    folder
}

pub(super) fn names(entries: &[Entry]) -> Vec<&str> {
    let names = entries.iter().map(|entry| std::str::from_utf8(&entry.path));
    names.map(Result::unwrap).collect()
}

pub(super) fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

/// Files that nobody asked for.
pub(super) fn leftovers(folder: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(folder)
        .unwrap()
        .map(|file| file.unwrap().path());
    let hidden = |path: &PathBuf| {
        path.file_name()
            .unwrap()
            .as_bytes()
            .starts_with(b".soulbox-")
    };
    files.filter(hidden).collect()
}

pub(super) fn touch(path: impl AsRef<Path>) {
    fs::create_dir_all(path.as_ref().parent().unwrap()).unwrap();
    fs::write(path, "").unwrap();
}
