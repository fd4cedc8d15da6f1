//! Unpacking what a guest sends. It may be anything, and this may be run by root: so
//! nothing lands outside the target, whatever names and links say, and nothing is
//! made that is more than a file, a directory or a link.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, chownat, fchmod,
    fchown, futimens, linkat, mkdirat, openat, openat2, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;
use soulbox_proto::archive::{
    DecompressError, Kind, Member, ParseError, Receiver, make_plain, split,
};

use super::progress::Progress;

/// Whose modes are set at the end.
const MAX_DIRECTORIES: usize = 1_000_000;
/// Neither up nor through a link.
const INSIDE: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS);
/// While it is filled.
const DIRECTORY_MODE: Mode = Mode::RWXU;

#[derive(Debug, thiserror::Error)]
pub(crate) enum UnpackError {
    #[error("what the sandbox sent {0}; copy again")]
    Archive(#[from] ParseError),
    #[error("what the sandbox sent {0}; copy again")]
    Compression(#[from] DecompressError),
    #[error("{path} cannot be made ({source}){}", hint(source))]
    Make { path: PathBuf, source: io::Error },
    #[error(
        "the sandbox sent the path {path:?}, which leads out of {target}; nothing of it was made"
    )]
    Outside { path: String, target: PathBuf },
    #[error("the sandbox sent more than {MAX_DIRECTORIES} directories; copy a part of them")]
    TooMany,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Unpacked {
    pub(super) entries: u64,
    pub(super) file_bytes: u64,
    /// Devices, pipes and sockets.
    pub(super) left_out: u64,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Keep {
    /// Owners, and the bits that make a program run as its owner.
    pub(super) owners: bool,
}

/// Unpacks below a directory. Dropped, it leaves no half of a file.
pub(super) struct Unpacker<'a> {
    target: &'a Path,
    root: OwnedFd,
    /// The directory of the member before, which is mostly that of the next.
    above: Option<(Vec<u8>, OwnedFd)>,
    /// Not whole yet, and in `above`.
    file: Option<(File, Member)>,
    directories: Vec<Member>,
    keep: Keep,
    progress: &'a Progress,
    done: Unpacked,
}

// === impl UnpackError ===

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => "; make room and copy again",
        Some(libc::EACCES | libc::EPERM) => "; see who may write there",
        Some(libc::ELOOP) => "; a symbolic link is in its place",
        _ => "",
    }
}

// === impl Unpacker ===

impl<'a> Unpacker<'a> {
    /// `target` is made if it is not there.
    pub(super) fn new(
        target: &'a Path,
        keep: Keep,
        progress: &'a Progress,
    ) -> Result<Self, UnpackError> {
        let made = match mkdirat(CWD, target, Mode::from_raw_mode(0o777)) {
            Err(Errno::EXIST) => Ok(()),
            made => made,
        };
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let opened = made.and_then(|()| openat(CWD, target, flags, Mode::empty()));
        let root = opened.map_err(|errno| UnpackError::Make {
            path: target.to_owned(),
            source: errno.into(),
        })?;
        Ok(Self {
            target,
            root,
            above: None,
            file: None,
            directories: Vec::new(),
            keep,
            progress,
            done: Unpacked::default(),
        })
    }

    /// To be called when the archive has ended. Directories come last: one that may not be
    /// written to can be filled until then, and what is made in one changes its time.
    pub(super) fn finish(mut self) -> Result<Unpacked, UnpackError> {
        for member in std::mem::take(&mut self.directories).iter().rev() {
            let dressed = inside(&self.root, &member.path)
                .and_then(|directory| self.dress(directory, member));
            dressed.map_err(|errno| self.failed(&member.path, errno))?;
        }
        Ok(std::mem::take(&mut self.done))
    }

    fn directory(&mut self, member: &Member) -> Result<(), Errno> {
        if member.path.is_empty() {
            return Ok(());
        }
        self.at(&member.path, |above, name| {
            match mkdirat(above, name, DIRECTORY_MODE) {
                Err(Errno::EXIST) => open_directory(above, name).map(drop),
                made => made,
            }
        })
    }

    fn symlink(&mut self, member: &Member) -> Result<(), Errno> {
        let times = times(member);
        let owners = self.owners(member);
        self.at(&member.path, |above, name| {
            replace(above, name, || {
                symlinkat(member.target.as_slice(), above, name)
            })?;
            if let Some((uid, gid)) = owners {
                chownat(above, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
            }
            utimensat(above, name, &times, AtFlags::SYMLINK_NOFOLLOW)
        })
    }

    /// To what is inside already.
    fn hard_link(&mut self, member: &Member) -> Result<(), Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let (above, name) = split(&member.target);
        let above = inside(&self.root, above)?;
        // What leads out by a link is refused here, before it has another name.
        openat2(&above, name, flags, Mode::empty(), INSIDE)?;
        self.at(&member.path, |to, to_name| {
            replace(to, to_name, || {
                linkat(&above, name, to, to_name, AtFlags::empty())
            })
        })
    }

    fn open_file(&mut self, member: Member) -> Result<(), UnpackError> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW;
        let mode = Mode::RUSR | Mode::WUSR;
        let made = self.at(&member.path, |above, name| {
            replace(above, name, || {
                openat(above, name, flags | OFlags::CLOEXEC, mode)
            })
        });
        let file = made.map_err(|errno| self.failed(&member.path, errno))?;
        self.file = Some((file.into(), member));
        Ok(())
    }

    /// Owner, mode and times.
    fn dress(&self, file: impl AsFd, member: &Member) -> Result<(), Errno> {
        let owners = self.owners(member);
        if let Some((uid, gid)) = owners {
            fchown(&file, Some(uid), Some(gid))?;
        }
        let bits = if self.keep.owners { 0o7777 } else { 0o1777 };
        // After the owner: a change of that clears bits.
        fchmod(&file, Mode::from_raw_mode(member.mode & bits))?;
        futimens(&file, &times(member))
    }

    fn owners(&self, member: &Member) -> Option<(Uid, Gid)> {
        if !self.keep.owners {
            return None;
        }
        // u32::MAX is no id: chown(2) would leave it as it is.
        let id = |id: u64| u32::try_from(id).ok().filter(|&id| id != u32::MAX);
        Some((
            Uid::from_raw(id(member.uid)?),
            Gid::from_raw(id(member.gid)?),
        ))
    }

    /// In the directory that the path is in, which is made if it is not there.
    fn at<T>(
        &mut self,
        path: &[u8],
        act: impl FnOnce(&OwnedFd, &[u8]) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let (above, name) = split(path);
        let is_known = self.above.as_ref().is_some_and(|(known, _)| known == above);
        if !is_known {
            let directory = match inside(&self.root, above) {
                Err(Errno::NOENT) => {
                    make_all(&self.root, above)?;
                    inside(&self.root, above)?
                }
                found => found?,
            };
            self.above = Some((above.to_vec(), directory));
        }
        match &self.above {
            Some((_, directory)) => act(directory, name),
            None => Err(Errno::NOENT),
        }
    }

    fn make_inner(&self, path: &mut Vec<u8>) -> Result<(), UnpackError> {
        if make_plain(path) {
            return Ok(());
        }
        let shown = path.get(..100).unwrap_or(path);
        Err(UnpackError::Outside {
            path: String::from_utf8_lossy(shown).into_owned(),
            target: self.target.to_owned(),
        })
    }

    fn failed(&self, path: &[u8], errno: Errno) -> UnpackError {
        failed(self.target, path, errno.into())
    }

    fn made_one(&mut self) {
        self.done.entries += 1;
        self.progress.entry();
    }
}

impl Receiver for Unpacker<'_> {
    type Error = UnpackError;

    fn begin(&mut self, mut member: Member) -> Result<(), UnpackError> {
        self.make_inner(&mut member.path)?;
        let made = match member.kind {
            Kind::Other(_) => {
                self.done.left_out += 1;
                return Ok(());
            }
            Kind::Directory => self.directory(&member),
            _ if member.path.is_empty() => Err(Errno::ISDIR),
            Kind::Symlink => self.symlink(&member),
            Kind::HardLink => {
                self.make_inner(&mut member.target)?;
                self.hard_link(&member)
            }
            Kind::File => return self.open_file(member),
        };
        made.map_err(|errno| self.failed(&member.path, errno))?;
        self.made_one();
        if member.kind == Kind::Directory {
            if self.directories.len() == MAX_DIRECTORIES {
                return Err(UnpackError::TooMany);
            }
            self.directories.push(member);
        }
        Ok(())
    }

    fn data(&mut self, data: &[u8]) -> Result<(), UnpackError> {
        let Some((file, member)) = &mut self.file else {
            return Ok(());
        };
        let written = file.write_all(data);
        written.map_err(|error| failed(self.target, &member.path, error))
    }

    fn end(&mut self) -> Result<(), UnpackError> {
        let Some((file, member)) = &self.file else {
            return Ok(());
        };
        let dressed = self.dress(file, member);
        dressed.map_err(|errno| self.failed(&member.path, errno))?;
        self.done.file_bytes += member.size;
        self.file = None;
        self.made_one();
        Ok(())
    }
}

impl Drop for Unpacker<'_> {
    fn drop(&mut self) {
        if let (Some((_, member)), Some((_, above))) = (&self.file, &self.above) {
            let (_, name) = split(&member.path);
            let _ = unlinkat(above, name, AtFlags::empty());
        }
    }
}

fn failed(target: &Path, path: &[u8], source: io::Error) -> UnpackError {
    UnpackError::Make {
        path: target.join(std::ffi::OsStr::from_bytes(path)),
        source,
    }
}

fn inside(root: &OwnedFd, path: &[u8]) -> Result<OwnedFd, Errno> {
    let path = if path.is_empty() { b"." } else { path };
    open_directory(root, path)
}

fn open_directory(above: &OwnedFd, path: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    openat2(above, path, flags, Mode::empty(), INSIDE)
}

fn make_all(root: &OwnedFd, path: &[u8]) -> Result<(), Errno> {
    let mut at = inside(root, b"")?;
    for part in path.split(|&byte| byte == b'/') {
        match mkdirat(&at, part, Mode::from_raw_mode(0o777)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno),
        }
        at = open_directory(&at, part)?;
    }
    Ok(())
}

/// In the place of what has that name, but for a directory.
fn replace<T>(
    above: &OwnedFd,
    name: &[u8],
    make: impl Fn() -> Result<T, Errno>,
) -> Result<T, Errno> {
    match make() {
        Err(Errno::EXIST) => {
            unlinkat(above, name, AtFlags::empty())?;
            make()
        }
        made => made,
    }
}

fn times(member: &Member) -> Timestamps {
    let (seconds, nanos) = member.modified;
    let modified = Timespec {
        tv_sec: seconds,
        tv_nsec: nanos.into(),
    };
    Timestamps {
        last_access: modified,
        last_modification: modified,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

    use proptest::collection::vec;
    use proptest::prelude::*;

    use soulbox_proto::archive::{Parser, append_end, append_header, append_padding};

    use super::*;

    fn archive(members: &[(Member, &[u8])]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (member, data) in members {
            append_header(&mut bytes, member);
            bytes.extend_from_slice(data);
            append_padding(&mut bytes, data.len() as u64);
        }
        append_end(&mut bytes);
        bytes
    }

    fn member(kind: Kind, path: &str, target: &str, size: usize) -> Member {
        Member {
            kind,
            path: path.as_bytes().to_vec(),
            target: target.as_bytes().to_vec(),
            size: size as u64,
            mode: if kind == Kind::Directory {
                0o755
            } else {
                0o644
            },
            uid: 12345,
            gid: 12345,
            modified: (1_000_000_000, 5),
        }
    }

    fn unpack(archive: &[u8], target: &Path, keep: Keep) -> Result<Unpacked, UnpackError> {
        let progress = Progress::silent();
        let mut unpacker = Unpacker::new(target, keep, &progress)?;
        let mut parser = Parser::default();
        for piece in archive.chunks(700) {
            parser.feed(piece, &mut unpacker)?;
        }
        parser.finish()?;
        unpacker.finish()
    }

    fn try_unpack(members: &[(Member, &[u8])], target: &Path) -> Result<Unpacked, UnpackError> {
        unpack(&archive(members), target, Keep { owners: false })
    }

    /// A folder with the target in it, and what must stay as it is.
    fn world() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("outside"), "mine").unwrap();
        std::fs::create_dir(folder.path().join("elsewhere")).unwrap();
        let target = folder.path().join("target");
        std::fs::create_dir(&target).unwrap();
        (folder, target)
    }

    fn assert_untouched(folder: &Path) {
        assert_eq!(std::fs::read(folder.join("outside")).unwrap(), b"mine");
        assert_eq!(
            std::fs::metadata(folder.join("outside")).unwrap().nlink(),
            1
        );
        let elsewhere = std::fs::read_dir(folder.join("elsewhere")).unwrap();
        assert_eq!(elsewhere.count(), 0);
        assert_eq!(std::fs::read_dir(folder).unwrap().count(), 3);
    }

    #[test]
    fn nothing_lands_outside() {
        let up = "../outside";
        let cases: [&[(Member, &[u8])]; 9] = [
            &[(member(Kind::File, up, "", 4), b"evil")],
            &[(member(Kind::File, "a/../../outside", "", 4), b"evil")],
            &[(member(Kind::File, "/tmp/soulbox-evil", "", 4), b"evil")],
            &[
                (member(Kind::Symlink, "link", "../elsewhere", 0), b""),
                (member(Kind::File, "link/file", "", 4), b"evil"),
            ],
            &[
                (member(Kind::Symlink, "link", "..", 0), b""),
                (member(Kind::Directory, "link/elsewhere/made", "", 0), b""),
            ],
            &[
                (member(Kind::Symlink, "link", "../elsewhere", 0), b""),
                (member(Kind::Directory, "link", "", 0), b""),
            ],
            &[(member(Kind::HardLink, "link", "../outside", 0), b"")],
            &[
                (member(Kind::Symlink, "up", "..", 0), b""),
                (member(Kind::HardLink, "link", "up/outside", 0), b""),
            ],
            &[(member(Kind::Directory, "..", "", 0), b"")],
        ];
        for members in cases {
            let (folder, target) = world();
            let refused = try_unpack(members, &target);
            assert!(refused.is_err(), "{members:?}");
            assert_untouched(folder.path());
        }
        assert!(!Path::new("/tmp/soulbox-evil").exists());
    }

    /// The link is replaced, not written through.
    #[test]
    fn a_link_in_a_files_place_is_replaced() {
        let (folder, target) = world();
        let members = [
            (member(Kind::Symlink, "name", "../outside", 0), &b""[..]),
            (member(Kind::File, "name", "", 4), b"evil"),
            (member(Kind::HardLink, "again", "name", 0), b""),
        ];
        let done = try_unpack(&members, &target).unwrap();
        assert_eq!(done.entries, 3);
        assert_untouched(folder.path());
        assert!(target.join("name").symlink_metadata().unwrap().is_file());
        assert_eq!(std::fs::read(target.join("again")).unwrap(), b"evil");
    }

    #[test]
    fn devices_and_privileged_bits_are_left_out() {
        let (_folder, target) = world();
        let device = member(Kind::Other(b'3'), "null", "", 0);
        let mut program = member(Kind::File, "program", "", 0);
        program.mode = 0o6755;
        let done = try_unpack(&[(device, b""), (program, b"")], &target).unwrap();
        assert_eq!((done.entries, done.left_out), (1, 1));
        assert!(!target.join("null").exists());
        let program = std::fs::metadata(target.join("program")).unwrap();
        assert_eq!(program.permissions().mode() & 0o7777, 0o755);
        assert_ne!(program.uid(), 12345);
        assert_eq!((program.mtime(), program.mtime_nsec()), (1_000_000_000, 5));
    }

    #[test]
    fn a_directory_that_may_not_be_written_to_is_filled() {
        let (_folder, target) = world();
        let mut sealed = member(Kind::Directory, "sealed", "", 0);
        sealed.mode = 0o500;
        let members = [
            (sealed, &b""[..]),
            (member(Kind::File, "sealed/deep/er/file", "", 2), b"hi"),
        ];
        try_unpack(&members, &target).unwrap();
        let sealed = std::fs::metadata(target.join("sealed")).unwrap();
        assert_eq!(sealed.permissions().mode() & 0o7777, 0o500);
        assert_eq!(sealed.mtime(), 1_000_000_000);
        assert_eq!(
            std::fs::read(target.join("sealed/deep/er/file")).unwrap(),
            b"hi"
        );
    }

    #[test]
    fn half_a_file_is_none() {
        let (_folder, target) = world();
        let members = [
            (member(Kind::File, "whole", "", 4), &b"data"[..]),
            (member(Kind::File, "half", "", 4000), &[7; 4000]),
        ];
        let archive = archive(&members);
        let cut = unpack(&archive[..3000], &target, Keep { owners: false });
        assert!(matches!(
            cut,
            Err(UnpackError::Archive(ParseError::Truncated))
        ));
        assert_eq!(std::fs::read(target.join("whole")).unwrap(), b"data");
        assert!(!target.join("half").exists());
    }

    fn parts() -> impl Strategy<Value = String> {
        prop_oneof![
            Just("..".to_owned()),
            Just(".".to_owned()),
            Just(String::new()),
            "[ab]",
            "[ab]",
        ]
    }

    prop_compose! {
        fn hostile()(
            kind in prop_oneof![
                Just(Kind::File), Just(Kind::Directory), Just(Kind::Symlink), Just(Kind::HardLink)
            ],
            path in vec(parts(), 1..4),
            target in vec(parts(), 1..5),
        ) -> Member {
            let size = if kind == Kind::File { 4 } else { 0 };
            member(kind, &path.join("/"), &target.join("/"), size)
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn no_sequence_of_members_touches_what_is_outside(members in vec(hostile(), 1..12)) {
            let (folder, target) = world();
            let members: Vec<_> = members
                .iter()
                .map(|member| {
                    let data: &[u8] = if member.kind == Kind::File { b"evil" } else { b"" };
                    (member.clone(), data)
                })
                .collect();
            let _ = try_unpack(&members, &target);
            assert_untouched(folder.path());
        }
    }

    #[test]
    fn owners_are_kept_when_asked() {
        assert!(rustix::process::geteuid().is_root(), "run this as root");
        let (_folder, target) = world();
        let mut file = member(Kind::File, "file", "", 0);
        file.mode = 0o4755;
        let members = [
            (file, &b""[..]),
            (member(Kind::Symlink, "link", "x", 0), b""),
        ];
        let keep = Keep { owners: true };
        unpack(&archive(&members), &target, keep).unwrap();
        let owners: BTreeMap<_, _> = ["file", "link"]
            .map(|name| (name, target.join(name).symlink_metadata().unwrap()))
            .into();
        assert!(
            owners
                .values()
                .all(|found| (found.uid(), found.gid()) == (12345, 12345))
        );
        assert_eq!(owners["file"].permissions().mode() & 0o7777, 0o4755);
    }
}
