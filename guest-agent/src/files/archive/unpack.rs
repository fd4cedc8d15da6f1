//! Puts what an archive says below a directory, and nothing of it elsewhere: every name
//! is looked up from that directory with RESOLVE_BENEATH, and no link is written to.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, UTIME_OMIT, Uid, chownat,
    fchmod, fchown, futimens, linkat, mkdirat, openat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;
use soulbox_proto::archive::{Kind, Member, Receiver, make_plain, split};

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
    parent: Option<(Vec<u8>, Arc<OwnedFd>)>,
    file: Option<Unpacked>,
    /// Each below the one before.
    directories: Vec<Made>,
    pub(super) entries: u64,
    pub(super) file_bytes: u64,
}

/// A file that is not whole yet.
struct Unpacked {
    file: File,
    member: Member,
    parent: Arc<OwnedFd>,
}

struct Made {
    directory: Arc<OwnedFd>,
    member: Member,
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
    fn parent(&mut self, path: &[u8]) -> Result<Arc<OwnedFd>, FileError> {
        if let Some(made) = self.directories.last()
            && made.member.path == path
        {
            return Ok(Arc::clone(&made.directory));
        }
        if let Some((known, directory)) = &self.parent
            && known == path
        {
            return Ok(Arc::clone(directory));
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let directory = match self.open(path, flags) {
            Err(Errno::NOENT) => {
                let ends = (0..path.len()).filter(|at| path[*at] == b'/');
                for end in ends.chain([path.len()]) {
                    let (above, name) = split(&path[..end]);
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
        let directory = Arc::new(directory.map_err(|errno| out(errno, path))?);
        self.parent = Some((path.to_vec(), Arc::clone(&directory)));
        Ok(directory)
    }

    fn begin_file(&mut self, parent: Arc<OwnedFd>, member: Member) -> Result<(), FileError> {
        let (_, name) = split(&member.path);
        let mode = Mode::from_raw_mode(member.mode & 0o777 | 0o200);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let make = || openat(&parent, name, flags | OFlags::CLOEXEC, mode);
        let file = instead(&parent, name, make).told(DOING, &member.path)?;
        self.file = Some(Unpacked {
            file: file.into(),
            member,
            parent,
        });
        Ok(())
    }

    fn make_directory(&mut self, parent: &OwnedFd, member: Member) -> Result<(), FileError> {
        let (_, name) = split(&member.path);
        // Others follow into it, which its own mode might not allow.
        match mkdirat(parent, name, Mode::from_raw_mode(0o700)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(FileError::errno(errno, DOING, &member.path)),
        }
        // A link to a directory may be there already, and stays, if it leads nowhere else.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NONBLOCK;
        let directory = self.open(&member.path, flags);
        let made = Made {
            directory: Arc::new(directory.map_err(|errno| out(errno, &member.path))?),
            member,
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
        while let Some(made) = self.directories.pop_if(|made| !is_below(&made.member.path)) {
            self.complete(&made)?;
        }
        Ok(())
    }

    fn complete(&self, made: &Made) -> Result<(), FileError> {
        let Made { directory, member } = made;
        let set = self.own(directory, member).and_then(|()| {
            fchmod(directory, Mode::from_raw_mode(member.mode))?;
            futimens(directory, &times_of(member))
        });
        match set {
            // One of somebody else's that was there before.
            Err(Errno::PERM) => Ok(()),
            set => set.told(DOING, &member.path),
        }
    }

    fn own(&self, file: impl AsFd, member: &Member) -> Result<(), Errno> {
        if !self.keep_owners {
            return Ok(());
        }
        let (owner, group) = owner_of(member)?;
        fchown(file, Some(owner), Some(group))
    }

    fn make_symlink(&self, parent: &OwnedFd, member: &Member) -> Result<(), Errno> {
        let (_, name) = split(&member.path);
        instead(parent, name, || symlinkat(&member.target[..], parent, name))?;
        if self.keep_owners {
            let (owner, group) = owner_of(member)?;
            let (owner, group) = (Some(owner), Some(group));
            chownat(parent, name, owner, group, AtFlags::SYMLINK_NOFOLLOW)?;
        }
        utimensat(parent, name, &times_of(member), AtFlags::SYMLINK_NOFOLLOW)
    }

    /// To a file of the same archive, or that was below the directory before.
    fn make_hard_link(&self, parent: &OwnedFd, member: &mut Member) -> Result<(), FileError> {
        make_inner(&mut member.target)?;
        if member.target.is_empty() {
            return Err(FileError::new(Problem::IsADirectory, DOING, b"."));
        }
        let (above, target) = split(&member.target);
        let above = self.open(above, OFlags::PATH | OFlags::DIRECTORY);
        let above = above.map_err(|errno| out(errno, &member.target))?;
        let (_, name) = split(&member.path);
        let make = || linkat(&above, target, parent, name, AtFlags::empty());
        instead(parent, name, make).told(DOING, &member.path)
    }
}

impl Receiver for Unpack {
    type Error = FileError;

    fn begin(&mut self, mut member: Member) -> Result<(), FileError> {
        make_inner(&mut member.path)?;
        if member.path.is_empty() {
            // The directory itself, which keeps what it has.
            return match member.kind {
                Kind::Directory => Ok(()),
                _ => Err(FileError::new(Problem::IsADirectory, DOING, b".")),
            };
        }
        self.leave(&member.path)?;
        let (above, _) = split(&member.path);
        let parent = self.parent(above)?;
        self.entries += 1;
        match member.kind {
            Kind::File => self.begin_file(parent, member),
            Kind::Directory => self.make_directory(&parent, member),
            Kind::Symlink => {
                let made = self.make_symlink(&parent, &member);
                made.told(DOING, &member.path)
            }
            Kind::HardLink => self.make_hard_link(&parent, &mut member),
            Kind::Other(_) => Err(FileError::new(Problem::NotSupported, DOING, &member.path)),
        }
    }

    fn data(&mut self, data: &[u8]) -> Result<(), FileError> {
        let Some(Unpacked { file, member, .. }) = &mut self.file else {
            return Ok(());
        };
        file.write_all(data).told(DOING, &member.path)?;
        self.file_bytes += data.len() as u64;
        Ok(())
    }

    fn end(&mut self) -> Result<(), FileError> {
        let Some(unpacked) = &self.file else {
            return Ok(());
        };
        let Unpacked { file, member, .. } = unpacked;
        let set = self.own(file, member).and_then(|()| {
            // Only what making it has not done.
            if self.keep_owners || member.mode & (0o7000 | UMASK) != 0 || member.mode & 0o200 == 0 {
                fchmod(file, Mode::from_raw_mode(member.mode))?;
            }
            futimens(file, &times_of(member))
        });
        set.told(DOING, &member.path)?;
        self.file = None;
        Ok(())
    }
}

impl Drop for Unpack {
    fn drop(&mut self) {
        // One that is not whole is worse than none.
        if let Some(Unpacked { member, parent, .. }) = &self.file {
            let (_, name) = split(&member.path);
            let _ = unlinkat(parent, name, AtFlags::empty());
        }
    }
}

fn make_inner(path: &mut Vec<u8>) -> Result<(), FileError> {
    match make_plain(path) {
        true => Ok(()),
        false => Err(FileError::new(Problem::PathEscapes, DOING, path)),
    }
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

fn times_of(member: &Member) -> Timestamps {
    let (seconds, nanos) = member.modified;
    Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: seconds,
            tv_nsec: nanos.into(),
        },
    }
}

fn owner_of(member: &Member) -> Result<(Uid, Gid), Errno> {
    // u32::MAX is "as it is" to chown(2).
    let id = |id| u32::try_from(id).ok().filter(|id| *id != u32::MAX);
    match (id(member.uid), id(member.gid)) {
        (Some(uid), Some(gid)) => Ok((Uid::from_raw(uid), Gid::from_raw(gid))),
        _ => Err(Errno::INVAL),
    }
}
