//! A path of a request: checked, then resolved with the rights of its user.
//!
//! A path is resolved once, to a descriptor: of the file itself, or of the directory
//! that has its name. What follows goes by that descriptor and at most one name, so
//! nothing that is swapped meanwhile leads elsewhere.

use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, Stat, fstat, openat2, readlinkat};
use rustix::io::Errno;
use soulbox_proto::guest::v1::FilePath;
use tonic_types::FieldViolation;

use super::entry::file_type;
use super::error::{FileError, Problem, Told as _};
use crate::spec::Violations;
use crate::sys::credentials::{Acting, act_as};
use crate::users::{Identity, Users};

/// What Linux takes of a path, with its NUL; `PATH_MAX` of linux/limits.h.
pub(super) const PATH_MAX_BYTES: usize = 4096;
/// How many symbolic links lead on; path_resolution(7).
const MAX_LINKS: usize = 40;
/// How often a lookup is tried that a rename elsewhere may have disturbed; openat2(2)
/// says EAGAIN then.
const MAX_TRIES: usize = 256;

/// What opens nothing, and so never waits and disturbs nobody.
const LOOK: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);

/// A [`FilePath`] that is sound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Without NUL. Empty: the home, or the root.
    pub(super) path: Vec<u8>,
    user: String,
    root: Option<Vec<u8>>,
}

/// A user whose rights a thread can take.
#[derive(Clone)]
pub(super) struct User(Arc<Identity>);

/// What paths are taken from, as its user sees it.
pub(super) struct View {
    pub(super) user: User,
    /// None where every path is absolute.
    base: Option<OwnedFd>,
    resolve: ResolveFlags,
}

/// A name in a directory that is held open.
pub(super) struct Named {
    pub(super) directory: OwnedFd,
    /// One component, and neither "." nor "..".
    pub(super) name: Vec<u8>,
    /// It was written with a slash behind.
    pub(super) wants_directory: bool,
}

/// A [`Named`] whose symbolic links have been followed, with what is there.
pub(super) struct Last {
    pub(super) at: Named,
    pub(super) there: Option<(OwnedFd, Stat)>,
}

// === impl Place ===

impl Place {
    /// `field` is the message's name of it.
    pub(super) fn check(path: Option<FilePath>, field: &str) -> Result<Self, Violations> {
        let Some(FilePath { path, user, root }) = path else {
            return Err(Violations::of(field, "is missing"));
        };
        let mut wrong = Violations::default();
        for (bytes, part) in [(&path, "path"), (&root, "root")] {
            wrong
                .0
                .extend(path_violation(bytes, format!("{field}.{part}")));
        }
        if !root.is_empty() && !root.starts_with(b"/") {
            wrong.add(format!("{field}.root"), "must be an absolute path");
        }
        if user.contains('\0') {
            wrong.add(format!("{field}.user"), "holds a NUL byte");
        }
        wrong.into_result()?;
        Ok(Self {
            path: path.into(),
            user,
            root: (!root.is_empty()).then(|| root.into()),
        })
    }

    /// The same user and root with another path, which `field` names.
    pub(super) fn sibling(&self, path: Option<FilePath>, field: &str) -> Result<Self, Violations> {
        let path = path.map(|path| FilePath {
            user: String::new(),
            root: bytes::Bytes::new(),
            ..path
        });
        let checked = Self::check(path, field)?;
        Ok(Self {
            path: checked.path,
            ..self.clone()
        })
    }

    /// Gives the work the rights of the place's user, on this thread.
    pub(super) fn visit<T>(
        &self,
        work: impl FnOnce(&View) -> Result<T, FileError>,
    ) -> Result<T, FileError> {
        let users = Users::read(Path::new("/etc"));
        let user = User(Arc::new(users.find(&self.user)?));
        let acting = user.act()?;
        let result = View::open(self, user).and_then(|view| work(&view));
        drop(acting);
        result
    }
}

/// What is wrong with bytes that are to be a path.
pub(super) fn path_violation(bytes: &[u8], field: String) -> Option<FieldViolation> {
    let problem = if bytes.contains(&0) {
        "holds a NUL byte"
    } else if bytes.len() >= PATH_MAX_BYTES {
        "must have at most 4,095 bytes"
    } else {
        return None;
    };
    Some(FieldViolation::new(field, problem))
}

// === impl User ===

impl User {
    /// Until the guard is dropped, this thread has the user's rights.
    pub(super) fn act(&self) -> Result<Acting, FileError> {
        let Identity {
            uid, gid, groups, ..
        } = &*self.0;
        act_as(*uid, *gid, groups).told("act as user", self.0.name.as_bytes())
    }

    pub(super) fn is_root(&self) -> bool {
        self.0.uid == 0
    }
}

// === impl View ===

impl View {
    /// To be called with the rights of the user.
    fn open(place: &Place, user: User) -> Result<Self, FileError> {
        // A magic link of /proc would lead to whatever the agent has open.
        let mut resolve = ResolveFlags::NO_MAGICLINKS;
        let base = match &place.root {
            Some(root) => {
                let opened = open_at(CWD, root, LOOK | OFlags::DIRECTORY, Mode::empty(), resolve);
                resolve |= ResolveFlags::IN_ROOT;
                Some(opened.told("open the root", root)?)
            }
            None if place.path.starts_with(b"/") => None,
            None => {
                let home = user.0.home.as_bytes();
                let opened = open_at(CWD, home, LOOK | OFlags::DIRECTORY, Mode::empty(), resolve);
                Some(opened.told("open the home", home)?)
            }
        };
        Ok(Self {
            user,
            base,
            resolve,
        })
    }

    /// Of another place of the same user.
    pub(super) fn beside(&self, place: &Place) -> Result<Self, FileError> {
        Self::open(place, self.user.clone())
    }

    fn base(&self) -> BorrowedFd<'_> {
        self.base.as_ref().map_or(CWD, AsFd::as_fd)
    }

    fn open_path(&self, path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
        open_at(self.base(), path, flags, Mode::empty(), self.resolve)
    }

    /// Opens the file that a path leads to. For directories: see [`reopen`] for others.
    pub(super) fn open_directly(
        &self,
        path: &[u8],
        flags: OFlags,
        doing: &'static str,
    ) -> Result<OwnedFd, FileError> {
        self.open_path(path, flags)
            .map_err(|errno| lost(errno, doing, path))
    }

    /// The file itself, with O_PATH.
    pub(super) fn look(
        &self,
        path: &[u8],
        follow: bool,
        doing: &'static str,
    ) -> Result<OwnedFd, FileError> {
        let flags = if follow {
            LOOK
        } else {
            LOOK | OFlags::NOFOLLOW
        };
        self.open_directly(path, flags, doing)
    }

    /// The directory that has a path's last name, which is not looked at.
    pub(super) fn parent(&self, path: &[u8], doing: &'static str) -> Result<Named, FileError> {
        let Some((directory, name)) = split(path) else {
            // "/", "..", "": no name by which the kernel would change it.
            return Err(FileError::new(Problem::Busy, doing, path));
        };
        let opened = self.open_path(directory, LOOK | OFlags::DIRECTORY);
        let directory = opened.map_err(|errno| lost(errno, doing, path))?;
        Ok(Named {
            directory,
            name: name.to_vec(),
            wants_directory: path.ends_with(b"/"),
        })
    }

    /// The name that is left when all symbolic links have been followed, and what is
    /// there. Each step begins at the base, so none leads out of a root.
    pub(super) fn last(&self, path: &[u8], doing: &'static str) -> Result<Last, FileError> {
        let asked = path;
        let mut path = path.to_vec();
        for links in 0..MAX_LINKS {
            if split(&path).is_none() {
                return Err(FileError::new(Problem::IsADirectory, doing, &path));
            }
            let at = self.parent(&path, doing)?;
            let (fd, stat) = match at.look() {
                Err(Errno::NOENT) => {
                    let last = Last { at, there: None };
                    return self.agrees(last, links, asked, doing);
                }
                looked => looked.told(doing, &path)?,
            };
            if !file_type(&stat).is_symlink() {
                let there = Some((fd, stat));
                return self.agrees(Last { at, there }, links, asked, doing);
            }
            let target = readlinkat(&fd, c"", Vec::new()).told(doing, &path)?;
            let (directory, _) = split(&path).unwrap_or_default();
            path = join(directory, target.as_bytes());
        }
        Err(FileError::new(Problem::TooManyLinks, doing, asked))
    }

    /// Has the kernel follow the links, too: it may refuse to, such as those of others
    /// in a sticky directory (`fs.protected_symlinks`).
    fn agrees(
        &self,
        last: Last,
        links: usize,
        asked: &[u8],
        doing: &'static str,
    ) -> Result<Last, FileError> {
        if links == 0 {
            return Ok(last);
        }
        let same = match (self.open_path(asked, LOOK), &last.there) {
            (Err(Errno::NOENT), None) => true,
            (Err(errno), _) => return Err(lost(errno, doing, asked)),
            (Ok(fd), Some((_, there))) => id(&fstat(&fd).told(doing, asked)?) == id(there),
            (Ok(_), None) => false,
        };
        if same {
            Ok(last)
        } else {
            Err(FileError::new(Problem::Changed, doing, asked))
        }
    }
}

/// What tells one file from all others.
pub(super) fn id(stat: &Stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

/// An error of openat2(2), to which EXDEV means a way out of the root.
fn lost(errno: Errno, doing: &'static str, path: &[u8]) -> FileError {
    match errno {
        Errno::XDEV => FileError::new(Problem::PathEscapes, doing, path),
        errno => FileError::errno(errno, doing, path),
    }
}

pub(super) fn open_at(
    base: impl AsFd,
    path: &[u8],
    flags: OFlags,
    mode: Mode,
    resolve: ResolveFlags,
) -> Result<OwnedFd, Errno> {
    let path = if path.is_empty() { b"." } else { path };
    let mut tries = 0;
    loop {
        match openat2(&base, path, flags | OFlags::CLOEXEC, mode, resolve) {
            Err(Errno::AGAIN) if tries < MAX_TRIES => tries += 1,
            Err(Errno::INTR) => {}
            opened => return opened,
        }
    }
}

/// Opens what an O_PATH descriptor is of, and nothing else that may have its name.
pub(super) fn reopen(fd: &OwnedFd, flags: OFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    rustix::fs::open(own_link(fd.as_fd()), flags, Mode::empty())
}

/// The one way by which calls that take no descriptor reach an open file.
pub(super) fn own_link(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// The directory and the last name of a path; None where that is no name.
pub(super) fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    let slashes = path.iter().rev().take_while(|byte| **byte == b'/').count();
    let path = &path[..path.len() - slashes];
    let (directory, name) = match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => path.split_at(slash + 1),
        None => (&b""[..], path),
    };
    (!matches!(name, b"" | b"." | b"..")).then_some((directory, name))
}

/// A path below a directory, or one of its own.
pub(super) fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if directory.is_empty() || name.starts_with(b"/") {
        return name.to_vec();
    }
    let mut path = Vec::with_capacity(directory.len() + 1 + name.len());
    path.extend_from_slice(directory);
    if !directory.ends_with(b"/") {
        path.push(b'/');
    }
    path.extend_from_slice(name);
    path
}

// === impl Named ===

impl Named {
    /// What is there, with O_PATH; a symbolic link is itself.
    pub(super) fn look(&self) -> Result<(OwnedFd, Stat), Errno> {
        let flags = LOOK | OFlags::NOFOLLOW;
        let fd = rustix::fs::openat(&self.directory, &self.name[..], flags, Mode::empty())?;
        let stat = fstat(&fd)?;
        Ok((fd, stat))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_path_is_split_at_its_last_name() {
        let parts = |path: &'static str| {
            let (directory, name) = split(path.as_bytes())?;
            Some([directory, name].map(|part| std::str::from_utf8(part).unwrap()))
        };
        assert_eq!(parts("a"), Some(["", "a"]));
        assert_eq!(parts("/a"), Some(["/", "a"]));
        assert_eq!(parts("a/b//"), Some(["a/", "b"]));
        assert_eq!(parts("../b"), Some(["../", "b"]));
        for path in ["", "/", "//", "..", "a/..", "a/./"] {
            assert_eq!(parts(path), None);
        }
    }

    #[test]
    fn what_is_no_path_is_told_by_field() {
        let wrong = FilePath {
            path: vec![b'x'; PATH_MAX_BYTES].into(),
            user: "u\0".to_owned(),
            root: "relative\0".into(),
        };
        let fields: Vec<_> = Place::check(Some(wrong), "path")
            .unwrap_err()
            .0
            .into_iter()
            .map(|violation| violation.field)
            .collect();
        assert_eq!(fields, ["path.path", "path.root", "path.root", "path.user"]);
        assert!(Place::check(None, "path").is_err());
        let longest = FilePath {
            path: vec![b'x'; PATH_MAX_BYTES - 1].into(),
            ..FilePath::default()
        };
        assert!(Place::check(Some(longest), "path").is_ok());
    }

    proptest! {
        #[test]
        fn the_parts_of_a_path_make_it(path in proptest::collection::vec(
            prop_oneof![Just(b'/'), Just(b'.'), Just(b'a')], 0..12)
        ) {
            if let Some((directory, name)) = split(&path) {
                prop_assert!(!name.contains(&b'/') && !name.is_empty());
                prop_assert!(name != b"." && name != b"..");
                let whole = join(directory, name);
                prop_assert!(path.starts_with(&whole));
                prop_assert!(path[whole.len()..].iter().all(|byte| *byte == b'/'));
            }
        }
    }
}
