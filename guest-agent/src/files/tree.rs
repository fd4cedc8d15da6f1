//! Walks a tree of directories by descriptors: nothing that is renamed or swapped for
//! a link meanwhile leads the walk out of it.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, fstat, openat, openat2, statat,
};
use rustix::io::Errno;

use super::entry::file_type;
use super::place::id;

/// Directories that are held open at once. Those above are opened again by ".." when
/// the walk comes back to them, if they are still the same.
const MAX_OPEN: usize = 48;

/// A walk, depth first, that enters only what it is told to.
pub(super) struct Tree {
    levels: Vec<Level>,
    /// From the top to the directory that is being read; empty for the top.
    path: Vec<u8>,
    resolve: ResolveFlags,
}

struct Level {
    /// None while it is closed.
    directory: Option<Dir>,
    id: (u64, u64),
    /// Of the last name that was read.
    offset: i64,
    /// Of `path`, without the level's own name.
    parent_path_bytes: usize,
}

pub(super) enum Step {
    /// In the directory that is being read.
    Found { name: CString, file_type: FileType },
    /// The walk is back in the directory that has this one.
    Left { name: CString },
}

// === impl Tree ===

impl Tree {
    /// Of a directory that is open for reading. Without `mounts`, another filesystem
    /// or a bind mount below is not entered, but EXDEV.
    pub(super) fn new(top: OwnedFd, mounts: bool) -> Result<Self, Errno> {
        let mut resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        if !mounts {
            resolve |= ResolveFlags::NO_XDEV;
        }
        let mut tree = Self {
            levels: Vec::new(),
            path: Vec::new(),
            resolve,
        };
        tree.push(top, 0)?;
        Ok(tree)
    }

    /// The directory that is being read.
    pub(super) fn directory(&self) -> Result<BorrowedFd<'_>, Errno> {
        let level = self.levels.last().ok_or(Errno::BADF)?;
        level.directory.as_ref().ok_or(Errno::BADF)?.fd()
    }

    pub(super) fn path(&self) -> &[u8] {
        &self.path
    }

    /// Of what has this name in the directory that is being read.
    pub(super) fn path_of(&self, name: &CStr) -> Vec<u8> {
        let mut path = self.path.clone();
        push_name(&mut path, name.to_bytes());
        path
    }

    /// None at the end.
    pub(super) fn next(&mut self) -> Result<Option<Step>, Errno> {
        let Some(level) = self.levels.last_mut() else {
            return Ok(None);
        };
        let directory = level.directory.as_mut().ok_or(Errno::BADF)?;
        while let Some(found) = directory.read() {
            let found = found?;
            level.offset = found.offset();
            let name = found.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            let file_type = match found.file_type() {
                FileType::Unknown => match statat(directory.fd()?, name, AtFlags::SYMLINK_NOFOLLOW)
                {
                    Err(Errno::NOENT) => continue,
                    stat => file_type(&stat?),
                },
                told => told,
            };
            return Ok(Some(Step::Found {
                name: name.to_owned(),
                file_type,
            }));
        }
        self.leave()
    }

    /// Goes down into a directory of the one that is being read.
    pub(super) fn enter(&mut self, name: &CStr) -> Result<(), Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let child = openat2(self.directory()?, name, flags, Mode::empty(), self.resolve)?;
        let parent_path_bytes = self.path.len();
        push_name(&mut self.path, name.to_bytes());
        self.push(child, parent_path_bytes)?;
        if let Some(above) = self.levels.len().checked_sub(MAX_OPEN + 1) {
            self.levels[above].directory = None;
        }
        Ok(())
    }

    fn push(&mut self, directory: OwnedFd, parent_path_bytes: usize) -> Result<(), Errno> {
        let id = id(&fstat(&directory)?);
        self.levels.push(Level {
            directory: Some(Dir::new(directory)?),
            id,
            offset: 0,
            parent_path_bytes,
        });
        Ok(())
    }

    fn leave(&mut self) -> Result<Option<Step>, Errno> {
        let Some(left) = self.levels.pop() else {
            return Ok(None);
        };
        let Some(level) = self.levels.last_mut() else {
            return Ok(None);
        };
        let name = &self.path[left.parent_path_bytes..];
        let name = name.strip_prefix(b"/").unwrap_or(name).to_vec();
        self.path.truncate(left.parent_path_bytes);
        if level.directory.is_none() {
            let below = left.directory.ok_or(Errno::BADF)?;
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let above = openat(below.fd()?, c"..", flags, Mode::empty())?;
            if id(&fstat(above.as_fd())?) != level.id {
                return Err(Errno::STALE);
            }
            let mut above = Dir::new(above)?;
            above.seek(level.offset)?;
            level.directory = Some(above);
        }
        let name = CString::new(name).map_err(|_| Errno::INVAL)?;
        Ok(Some(Step::Left { name }))
    }
}

fn push_name(path: &mut Vec<u8>, name: &[u8]) {
    if !path.is_empty() {
        path.push(b'/');
    }
    path.extend_from_slice(name);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs::File;
    use std::path::Path;

    use super::*;

    fn walk(top: &Path) -> BTreeSet<String> {
        let mut tree = Tree::new(File::open(top).unwrap().into(), true).unwrap();
        let mut found = BTreeSet::new();
        while let Some(step) = tree.next().unwrap() {
            if let Step::Found { name, file_type } = step {
                found.insert(String::from_utf8(tree.path_of(&name)).unwrap());
                if file_type.is_dir() {
                    tree.enter(&name).unwrap();
                }
            }
        }
        found
    }

    #[test]
    fn a_walk_deeper_than_it_holds_open_finds_everything() {
        let folder = tempfile::tempdir().unwrap();
        let mut path = folder.path().to_owned();
        let mut expected = BTreeSet::new();
        // Each level has something that is read before or after going down.
        for _ in 0..3 * MAX_OPEN {
            for name in ["a", "z", "d"] {
                let name = path.join(name);
                if name.ends_with("d") {
                    std::fs::create_dir(&name).unwrap();
                } else {
                    File::create(&name).unwrap();
                }
                let name = name.strip_prefix(folder.path()).unwrap();
                expected.insert(name.to_str().unwrap().to_owned());
            }
            path.push("d");
        }
        assert_eq!(walk(folder.path()), expected);
    }

    #[test]
    fn a_directory_that_became_a_link_is_not_entered() {
        let folder = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc", folder.path().join("d")).unwrap();
        let mut tree = Tree::new(File::open(folder.path()).unwrap().into(), true).unwrap();
        assert!(tree.enter(c"d").is_err());
    }
}
