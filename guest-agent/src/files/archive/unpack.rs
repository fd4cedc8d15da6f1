//! Puts what an archive says below a directory, and nothing of it elsewhere: every name
//! is looked up from that directory with RESOLVE_BENEATH, and no link is written to.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};

use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT, Uid, chownat,
    fchmod, fchown, futimens, linkat, mkdirat, openat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;

use super::parse::{Item, ItemKind, ParseError, Receiver};
use crate::files::entry::MODE_BITS;
use crate::files::error::{FileError, Problem, Told as _};
use crate::files::place::open_at;

/// What the agent's umask takes away.
const UMASK: u32 = 0o022;
/// Directories whose mode and time wait until all is in them; of more, those that were
/// entered first get theirs at once.
const MAX_WAITING: usize = 64;

const DOING: &str = "unpack";

pub(super) struct Unpack {
    top: OwnedFd,
    keep_owners: bool,
    /// Where the last entry was, which is where the next one is most often.
    parent: Option<(Vec<u8>, OwnedFd)>,
    file: Option<Unpacked>,
    /// Each below the one before.
    directories: Vec<Made>,
    pub(super) entries: u64,
    pub(super) file_bytes: u64,
}

/// A file that is not whole yet.
struct Unpacked {
    file: File,
    item: Item,
    directory: OwnedFd,
    name: Vec<u8>,
}

struct Made {
    path: Vec<u8>,
    directory: OwnedFd,
    item: Item,
}

impl From<ParseError> for FileError {
    fn from(error: ParseError) -> Self {
        Self::field("data", &error.to_string())
    }
}

// === impl Unpack ===

impl Unpack {
    pub(super) fn new(top: OwnedFd, keep_owners: bool) -> Self {
        Self {
            top,
            keep_owners,
            parent: None,
            file: None,
            directories: Vec::new(),
            entries: 0,
            file_bytes: 0,
        }
    }

    /// To be called when the archive has ended.
    pub(super) fn finish(&mut self) -> Result<(), FileError> {
        while let Some(made) = self.directories.pop() {
            self.complete(&made)?;
        }
        Ok(())
    }

    /// What is below `top`, whatever links are in it.
    fn open(&self, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        open_at(&self.top, path, flags, Mode::empty(), resolve)
    }

    /// The directory of that path, made where it is missing.
    fn parent(&mut self, path: &[u8]) -> Result<OwnedFd, FileError> {
        if let Some((known, directory)) = &self.parent
            && known == path
        {
            return directory.try_clone().told(DOING, path);
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let directory = match self.open(path, flags) {
            Err(Errno::NOENT) => {
                let ends = (0..path.len()).filter(|at| path[*at] == b'/');
                for end in ends.chain([path.len()]) {
                    let (above, name) = match path[..end].iter().rposition(|byte| *byte == b'/') {
                        Some(slash) => (&path[..slash], &path[slash + 1..end]),
                        None => (&b""[..], &path[..end]),
                    };
                    let above = self.open(above, flags).map_err(|errno| out(errno, path))?;
                    match mkdirat(above, name, Mode::from_raw_mode(0o755)) {
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(errno) => return Err(FileError::errno(errno, DOING, path)),
                    }
                }
                self.open(path, flags)
            }
            opened => opened,
        };
        let directory = directory.map_err(|errno| out(errno, path))?;
        let copy = directory.try_clone().told(DOING, path)?;
        self.parent = Some((path.to_vec(), copy));
        Ok(directory)
    }

    fn begin_file(&mut self, directory: OwnedFd, name: &[u8], item: Item) -> Result<(), FileError> {
        let mode = Mode::from_raw_mode(item.mode & 0o777 | 0o200);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let make = || openat(&directory, name, flags | OFlags::CLOEXEC, mode);
        let file = instead(&directory, name, make).told(DOING, &item.path)?;
        self.file = Some(Unpacked {
            file: file.into(),
            name: name.to_vec(),
            directory,
            item,
        });
        Ok(())
    }

    fn make_directory(
        &mut self,
        directory: &OwnedFd,
        name: &[u8],
        path: Vec<u8>,
        item: Item,
    ) -> Result<(), FileError> {
        // Others follow into it, which its own mode might not allow.
        match mkdirat(directory, name, Mode::from_raw_mode(0o700)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(FileError::errno(errno, DOING, &path)),
        }
        // A link to a directory may be there already, and stays, if it leads nowhere else.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NONBLOCK;
        let made = self.open(&path, flags).map_err(|errno| out(errno, &path))?;
        let made = Made {
            path,
            directory: made,
            item,
        };
        if self.directories.len() >= MAX_WAITING {
            return self.complete(&made);
        }
        self.directories.push(made);
        Ok(())
    }

    /// Gives the directories that what follows is not in their mode and time.
    fn leave(&mut self, path: &[u8]) -> Result<(), FileError> {
        let is_below = |above: &[u8]| {
            let rest = path.strip_prefix(above);
            rest.is_some_and(|rest| rest.starts_with(b"/"))
        };
        while let Some(made) = self.directories.pop_if(|made| !is_below(&made.path)) {
            self.complete(&made)?;
        }
        Ok(())
    }

    fn complete(&self, made: &Made) -> Result<(), FileError> {
        let Made {
            path,
            directory,
            item,
        } = made;
        let set = self.own(directory, item).and_then(|()| {
            fchmod(directory, mode_of(item))?;
            futimens(directory, &times_of(item))
        });
        match set {
            // One of somebody else's that was there before.
            Err(Errno::PERM) => Ok(()),
            set => set.told(DOING, path),
        }
    }

    fn own(&self, file: impl std::os::fd::AsFd, item: &Item) -> Result<(), Errno> {
        if !self.keep_owners {
            return Ok(());
        }
        let (owner, group) = owner_of(item)?;
        fchown(file, Some(owner), Some(group))
    }

    fn make_symlink(&self, directory: &OwnedFd, name: &[u8], item: &Item) -> Result<(), Errno> {
        instead(directory, name, || {
            symlinkat(&item.link[..], directory, name)
        })?;
        if self.keep_owners {
            let (owner, group) = owner_of(item)?;
            chownat(
                directory,
                name,
                Some(owner),
                Some(group),
                AtFlags::SYMLINK_NOFOLLOW,
            )?;
        }
        utimensat(directory, name, &times_of(item), AtFlags::SYMLINK_NOFOLLOW)
    }

    /// To a file of the same archive, or that was below the directory before.
    fn make_hard_link(
        &mut self,
        directory: &OwnedFd,
        name: &[u8],
        item: &Item,
    ) -> Result<(), FileError> {
        let target = names(&item.link)?;
        let Some((target_name, above)) = target.split_last() else {
            return Err(FileError::new(Problem::IsADirectory, DOING, &item.link));
        };
        let above = self
            .open(&above.join(&b'/'), OFlags::PATH | OFlags::DIRECTORY)
            .map_err(|errno| out(errno, &item.link))?;
        let make = || linkat(&above, *target_name, directory, name, AtFlags::empty());
        instead(directory, name, make).told(DOING, &item.path)
    }
}

impl Receiver for Unpack {
    type Error = FileError;

    fn begin(&mut self, item: Item) -> Result<(), FileError> {
        let names = names(&item.path)?;
        let Some((name, above)) = names.split_last() else {
            // The directory itself, which keeps what it has.
            return match item.kind {
                ItemKind::Directory => Ok(()),
                _ => Err(FileError::new(Problem::IsADirectory, DOING, &item.path)),
            };
        };
        let (name, above) = (name.to_vec(), above.join(&b'/'));
        let path = names.join(&b'/');
        self.leave(&path)?;
        let directory = self.parent(&above)?;
        self.entries += 1;
        match item.kind {
            ItemKind::File => self.begin_file(directory, &name, item),
            ItemKind::Directory => self.make_directory(&directory, &name, path, item),
            ItemKind::Symlink => {
                let made = self.make_symlink(&directory, &name, &item);
                made.told(DOING, &item.path)
            }
            ItemKind::HardLink => self.make_hard_link(&directory, &name, &item),
            ItemKind::Other => Err(FileError::new(Problem::NotSupported, DOING, &item.path)),
        }
    }

    fn data(&mut self, data: &[u8]) -> Result<(), FileError> {
        let Some(Unpacked { file, item, .. }) = &mut self.file else {
            return Ok(());
        };
        file.write_all(data).told(DOING, &item.path)?;
        self.file_bytes += data.len() as u64;
        Ok(())
    }

    fn end(&mut self) -> Result<(), FileError> {
        let Some(unpacked) = &self.file else {
            return Ok(());
        };
        let Unpacked { file, item, .. } = unpacked;
        let set = self.own(file.as_fd(), item).and_then(|()| {
            // Only what making it has not done.
            if self.keep_owners || item.mode & (0o7000 | UMASK) != 0 || item.mode & 0o200 == 0 {
                fchmod(file, mode_of(item))?;
            }
            futimens(file, &times_of(item))
        });
        set.told(DOING, &item.path)?;
        self.file = None;
        Ok(())
    }
}

impl Drop for Unpack {
    fn drop(&mut self) {
        // One that is not whole is worse than none.
        if let Some(unpacked) = &self.file {
            let _ = unlinkat(&unpacked.directory, &unpacked.name[..], AtFlags::empty());
        }
    }
}

/// The names of a path that leads down only.
fn names(path: &[u8]) -> Result<Vec<&[u8]>, FileError> {
    if path.contains(&0) {
        return Err(FileError::field("data", "has a name with a NUL byte"));
    }
    let names = path.split(|byte| *byte == b'/');
    let names: Vec<_> = names.filter(|name| !matches!(*name, b"" | b".")).collect();
    if path.starts_with(b"/") || names.contains(&&b".."[..]) {
        return Err(FileError::new(Problem::PathEscapes, DOING, path));
    }
    Ok(names)
}

/// Makes something under a name, and in the place of what has it.
fn instead<T>(
    directory: &OwnedFd,
    name: &[u8],
    make: impl Fn() -> Result<T, Errno>,
) -> Result<T, Errno> {
    match make() {
        Err(Errno::EXIST) => {
            unlinkat(directory, name, AtFlags::empty())?;
            make()
        }
        made => made,
    }
}

/// An error of openat2(2), to which EXDEV means a way out.
fn out(errno: Errno, path: &[u8]) -> FileError {
    match errno {
        Errno::XDEV => FileError::new(Problem::PathEscapes, DOING, path),
        errno => FileError::errno(errno, DOING, path),
    }
}

fn mode_of(item: &Item) -> Mode {
    Mode::from_raw_mode(item.mode & MODE_BITS)
}

fn times_of(item: &Item) -> Timestamps {
    Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: item.mtime,
            tv_nsec: 0,
        },
    }
}

fn owner_of(item: &Item) -> Result<(Uid, Gid), Errno> {
    // u32::MAX is "as it is" to chown(2).
    let id = |id| u32::try_from(id).ok().filter(|id| *id != u32::MAX);
    match (id(item.uid), id(item.gid)) {
        (Some(uid), Some(gid)) => Ok((Uid::from_raw(uid), Gid::from_raw(gid))),
        _ => Err(Errno::INVAL),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn names_lead_down_or_nowhere(path in prop::collection::vec(
            prop_oneof![Just(b'/'), Just(b'.'), Just(0), Just(b'a')], 0..12)
        ) {
            if let Ok(names) = names(&path) {
                for name in names {
                    prop_assert!(!matches!(name, b"" | b"." | b".."));
                    prop_assert!(!name.contains(&b'/') && !name.contains(&0));
                }
            }
        }
    }
}
