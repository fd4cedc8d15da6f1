//! Remove.

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, openat2, unlinkat};
use rustix::io::Errno;

use super::error::{FileError, Problem, Told as _};
use super::place::{Place, View, join};
use super::tree::{Step, Tree};

const DOING: &str = "remove";
/// How often a directory is emptied into which somebody goes on putting files.
const MAX_TRIES: u32 = 8;

/// Returns how many names have been removed.
pub(super) fn remove(
    place: &Place,
    view: &View,
    recursive: bool,
    missing_ok: bool,
) -> Result<u64, FileError> {
    let path = &place.path;
    // "/", the root and what ends in ".." have no name here, and are refused.
    let at = match view.parent(path, DOING) {
        Err(FileError::Refused {
            problem: Problem::NotFound,
            ..
        }) if missing_ok => return Ok(0),
        at => at?,
    };
    if !at.wants_directory {
        match unlinkat(&at.directory, &at.name[..], AtFlags::empty()) {
            Ok(()) => return Ok(1),
            Err(Errno::NOENT) if missing_ok => return Ok(0),
            Err(Errno::ISDIR) => {}
            Err(errno) => return Err(FileError::errno(errno, DOING, path)),
        }
    }
    match unlinkat(&at.directory, &at.name[..], AtFlags::REMOVEDIR) {
        Ok(()) => return Ok(1),
        Err(Errno::NOENT) if missing_ok => return Ok(0),
        Err(Errno::NOTEMPTY | Errno::EXIST) if recursive => {}
        Err(errno) => return Err(FileError::errno(errno, DOING, path)),
    }

    // What is mounted here is not entered.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let mut removed = 0;
    for _ in 0..MAX_TRIES {
        let top = openat2(&at.directory, &at.name[..], flags, Mode::empty(), resolve)
            .map_err(|errno| stuck(errno, path))?;
        removed += empty(top, path)?;
        match unlinkat(&at.directory, &at.name[..], AtFlags::REMOVEDIR) {
            Ok(()) => return Ok(removed + 1),
            Err(Errno::NOTEMPTY | Errno::EXIST) => {}
            Err(errno) => return Err(FileError::errno(errno, DOING, path)),
        }
    }
    Err(FileError::new(Problem::DirectoryNotEmpty, DOING, path))
}

/// Removes what is in a directory.
fn empty(top: std::os::fd::OwnedFd, path: &[u8]) -> Result<u64, FileError> {
    let mut tree = Tree::new(top, false).told(DOING, path)?;
    let mut removed = 0;
    loop {
        let step = tree.next();
        let shown = || join(path, tree.path());
        let (name, flag) = match step.map_err(|errno| stuck(errno, &shown()))? {
            None => return Ok(removed),
            Some(Step::Found { name, file_type }) if !file_type.is_dir() => {
                (name, AtFlags::empty())
            }
            Some(Step::Found { name, .. }) => {
                let shown = join(path, &tree.path_of(&name));
                match tree.enter(&name) {
                    Ok(()) | Err(Errno::NOENT) => continue,
                    // It may be empty, and need not be read then.
                    Err(Errno::ACCESS) => (name, AtFlags::REMOVEDIR),
                    Err(errno) => return Err(stuck(errno, &shown)),
                }
            }
            Some(Step::Left { name }) => (name, AtFlags::REMOVEDIR),
        };
        let directory = tree.directory().told(DOING, path)?;
        match unlinkat(directory, &name, flag) {
            Ok(()) => removed += 1,
            // Others remove, too, or go on putting files in: see `remove`.
            Err(Errno::NOENT | Errno::NOTEMPTY | Errno::EXIST | Errno::ISDIR | Errno::NOTDIR) => {}
            Err(errno) => {
                let shown = join(path, &tree.path_of(&name));
                return Err(FileError::errno(errno, DOING, &shown));
            }
        }
    }
}

fn stuck(errno: Errno, path: &[u8]) -> FileError {
    match errno {
        Errno::XDEV => FileError::new(Problem::Busy, DOING, path),
        errno => FileError::errno(errno, DOING, path),
    }
}
