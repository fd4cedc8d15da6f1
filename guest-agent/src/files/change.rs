//! MakeDirectory, Move, MakeSymlink and SetAttributes.

use std::os::fd::{AsFd, OwnedFd};

use bytes::Bytes;
use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, RenameFlags, Timespec, Timestamps, UTIME_OMIT, Uid, chmod, chownat,
    fstat, ftruncate, mkdirat, renameat_with, symlinkat, utimensat,
};
use rustix::io::Errno;
use soulbox_proto::guest::v1::{
    Entry, MakeDirectoryRequest, MakeDirectoryResponse, MoveRequest, SetAttributesRequest,
};

use super::entry::{MODE_BITS, entry_of, file_type};
use super::error::{FileError, Problem, Told as _};
use super::place::{Named, Place, View, own_link, reopen, split};
use crate::spec::Violations;

const DIRECTORY_MODE: u32 = 0o755;
/// What the agent's umask takes away.
const UMASK: u32 = 0o022;

/// What SetAttributes changes, checked.
pub(super) struct Attributes {
    mode: Option<Mode>,
    owner: Option<Uid>,
    group: Option<Gid>,
    times: Option<Timestamps>,
    size_bytes: Option<u64>,
    follow: bool,
}

/// Checks the lowest twelve bits of st_mode.
pub(super) fn check_mode(mode: Option<u32>, field: &str) -> Result<Option<Mode>, Violations> {
    match mode {
        Some(mode) if mode & !MODE_BITS != 0 => {
            Err(Violations::of(field, "must be at most 07777 (octal)"))
        }
        mode => Ok(mode.map(Mode::from_raw_mode)),
    }
}

// === MakeDirectory ===

pub(super) fn make_directory(
    place: &Place,
    view: &View,
    request: &MakeDirectoryRequest,
    mode: Option<Mode>,
) -> Result<MakeDirectoryResponse, FileError> {
    const DOING: &str = "make the directory";
    let path = &place.path;
    let mode = mode.unwrap_or(Mode::from_raw_mode(DIRECTORY_MODE));
    let (directory, made) = if request.parents {
        make_directories(view, path, mode, DOING)?
    } else {
        let at = match view.parent(path, DOING) {
            // "/" and its like are there.
            Err(FileError::Refused {
                problem: Problem::Busy,
                ..
            }) => return Err(FileError::new(Problem::Exists, DOING, path)),
            at => at?,
        };
        mkdirat(&at.directory, &at.name[..], mode).told(DOING, path)?;
        (made_directory(&at, mode).told(DOING, path)?, true)
    };
    let entry = entry_of(directory, Bytes::copy_from_slice(path)).told(DOING, path)?;
    Ok(MakeDirectoryResponse {
        entry: Some(entry),
        made,
    })
}

/// Makes a directory and those above it, as far as they are missing. Those above get
/// the usual mode. Says whether the last one was made.
pub(super) fn make_directories(
    view: &View,
    path: &[u8],
    mode: Mode,
    doing: &'static str,
) -> Result<(OwnedFd, bool), FileError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    match view.open_directly(path, flags, doing) {
        Err(FileError::Refused {
            problem: Problem::NotFound,
            ..
        }) => {}
        opened => return Ok((opened?, false)),
    }
    // From the top: what is there is followed wherever it leads, and what is not is
    // made in the directory before it.
    let mut made = false;
    for end in ends_of_names(path) {
        let upto = &path[..end];
        match view.open_directly(upto, flags, doing) {
            Err(FileError::Refused {
                problem: Problem::NotFound,
                ..
            }) => {}
            opened => {
                opened?;
                continue;
            }
        }
        let at = view.parent(upto, doing)?;
        let usual = Mode::from_raw_mode(DIRECTORY_MODE);
        let mode = if end == path.len() { mode } else { usual };
        match mkdirat(&at.directory, &at.name[..], mode) {
            Ok(()) => {
                made_directory(&at, mode).told(doing, upto)?;
                made = true;
            }
            // Somebody else made it, or it is a link that leads nowhere.
            Err(Errno::EXIST) => made = false,
            Err(errno) => return Err(FileError::errno(errno, doing, upto)),
        }
    }
    Ok((view.open_directly(path, flags, doing)?, made))
}

/// Where each name of a path ends; the last one at the path's own end.
fn ends_of_names(path: &[u8]) -> Vec<usize> {
    let last = path.iter().rposition(|byte| *byte != b'/');
    let ends = path.iter().enumerate().skip(1).filter_map(|(index, byte)| {
        (*byte == b'/' && path[index - 1] != b'/' && Some(index) < last).then_some(index)
    });
    ends.chain([path.len()]).collect()
}

/// Opens a directory that has just been made, and gives it the bits of its mode that
/// the umask has taken.
fn made_directory(at: &Named, mode: Mode) -> Result<OwnedFd, Errno> {
    let (directory, stat) = at.look()?;
    let wanted = mode.as_raw_mode();
    if wanted & (UMASK | 0o7000) != 0 && file_type(&stat).is_dir() {
        // A directory takes the group bit from the one that it is in.
        let inherited = stat.st_mode & 0o2000;
        chmod(
            own_link(directory.as_fd()),
            Mode::from_raw_mode(wanted | inherited),
        )?;
    }
    Ok(directory)
}

// === Move ===

pub(super) fn check_move(request: &MoveRequest) -> Result<(), Violations> {
    if request.replace && request.exchange {
        return Err(Violations::of("exchange", "must not be set with replace"));
    }
    Ok(())
}

pub(super) fn rename(
    from: &Place,
    to: &Place,
    view: &View,
    to_view: &View,
    request: &MoveRequest,
) -> Result<Entry, FileError> {
    const DOING: &str = "move";
    let from_at = view.parent(&from.path, DOING)?;
    let to_at = to_view.parent(&to.path, DOING)?;
    let flags = match (request.replace, request.exchange) {
        (_, true) => RenameFlags::EXCHANGE,
        (true, _) => RenameFlags::empty(),
        (false, false) => RenameFlags::NOREPLACE,
    };
    let (old, new) = (&from_at.name[..], &to_at.name[..]);
    if from_at.wants_directory || to_at.wants_directory {
        let (_, stat) = from_at.look().told(DOING, &from.path)?;
        if !file_type(&stat).is_dir() {
            return Err(FileError::new(Problem::NotADirectory, DOING, &from.path));
        }
    }
    renameat_with(&from_at.directory, old, &to_at.directory, new, flags).map_err(|errno| {
        // Which of the two it is about.
        let about_target = matches!(errno, Errno::EXIST | Errno::NOTEMPTY | Errno::ISDIR);
        let path = if about_target { &to.path } else { &from.path };
        match errno {
            // Into itself.
            Errno::INVAL => FileError::field("to.path", "must not be below what is moved"),
            errno => FileError::errno(errno, DOING, path),
        }
    })?;
    let (moved, _) = to_at.look().told(DOING, &to.path)?;
    entry_of(moved, Bytes::copy_from_slice(&to.path)).told(DOING, &to.path)
}

// === MakeSymlink ===

pub(super) fn make_symlink(place: &Place, view: &View, target: &[u8]) -> Result<Entry, FileError> {
    const DOING: &str = "make the link";
    let path = &place.path;
    let at = match view.parent(path, DOING) {
        Err(FileError::Refused {
            problem: Problem::Busy,
            ..
        }) => return Err(FileError::new(Problem::Exists, DOING, path)),
        at => at?,
    };
    symlinkat(target, &at.directory, &at.name[..]).told(DOING, path)?;
    let (link, _) = at.look().told(DOING, path)?;
    entry_of(link, Bytes::copy_from_slice(path)).told(DOING, path)
}

// === SetAttributes ===

impl Attributes {
    pub(super) fn check(request: &SetAttributesRequest) -> Result<Self, Violations> {
        let mut wrong = Violations::default();
        let mode = check_mode(request.mode, "mode").unwrap_or_else(|violations| {
            wrong.0.extend(violations.0);
            None
        });
        // u32::MAX is "as it is" to chown(2).
        for (id, field) in [(request.uid, "uid"), (request.gid, "gid")] {
            if id == Some(u32::MAX) {
                wrong.add(field, "must be less than 4,294,967,295");
            }
        }
        let mut time = |time: Option<prost_types::Timestamp>, field| match time {
            None => Timespec {
                tv_sec: 0,
                tv_nsec: UTIME_OMIT,
            },
            Some(time) => {
                if !(0..1_000_000_000).contains(&time.nanos) {
                    wrong.add(field, "must have 0 to 999,999,999 nanos");
                }
                Timespec {
                    tv_sec: time.seconds,
                    tv_nsec: time.nanos.into(),
                }
            }
        };
        let times = Timestamps {
            last_access: time(request.access_time, "access_time"),
            last_modification: time(request.modify_time, "modify_time"),
        };
        if request
            .size_bytes
            .is_some_and(|size| i64::try_from(size).is_err())
        {
            wrong.add("size_bytes", "must be less than 2^63");
        }
        wrong.into_result()?;
        let has_times = request.access_time.is_some() || request.modify_time.is_some();
        Ok(Self {
            mode,
            owner: request.uid.map(Uid::from_raw),
            group: request.gid.map(Gid::from_raw),
            times: has_times.then_some(times),
            size_bytes: request.size_bytes,
            follow: request.follow,
        })
    }

    pub(super) fn set(&self, place: &Place, view: &View) -> Result<Entry, FileError> {
        const DOING: &str = "change";
        let path = &place.path;
        let file = view.look(path, self.follow, DOING)?;
        let stat = fstat(&file).told(DOING, path)?;
        if let Some(size) = self.size_bytes {
            match file_type(&stat) {
                file_type if file_type.is_file() => {}
                file_type if file_type.is_dir() => {
                    return Err(FileError::new(Problem::IsADirectory, DOING, path));
                }
                _ => return Err(FileError::new(Problem::NotARegularFile, DOING, path)),
            }
            let cut = reopen(&file, OFlags::WRONLY).and_then(|file| ftruncate(file, size));
            cut.told(DOING, path)?;
        }
        // The owner before the mode, of which a change of owner takes setuid away; the
        // times last, which the others change.
        if self.owner.is_some() || self.group.is_some() {
            let owned = chownat(&file, c"", self.owner, self.group, AtFlags::EMPTY_PATH);
            owned.told(DOING, path)?;
        }
        if let Some(mode) = self.mode {
            chmod(own_link(file.as_fd()), mode).told(DOING, path)?;
        }
        if let Some(times) = &self.times {
            utimensat(file.as_fd(), c"", times, AtFlags::EMPTY_PATH).told(DOING, path)?;
        }
        entry_of(file, Bytes::copy_from_slice(path)).told(DOING, path)
    }
}

/// The part of a path above its last name.
pub(super) fn above(path: &[u8]) -> Option<&[u8]> {
    split(path).map(|(directory, _)| directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_directory_of_a_path_is_made_in_turn() {
        let upto = |path: &'static str| -> Vec<_> {
            let ends = ends_of_names(path.as_bytes());
            ends.into_iter().map(|end| &path[..end]).collect()
        };
        assert_eq!(upto("a"), ["a"]);
        assert_eq!(upto("a/b"), ["a", "a/b"]);
        assert_eq!(upto("/a//b/c/"), ["/a", "/a//b", "/a//b/c/"]);
        assert_eq!(upto("../a"), ["..", "../a"]);
    }

    #[test]
    fn attributes_out_of_range_are_told_by_field() {
        let request = SetAttributesRequest {
            mode: Some(0o10000),
            uid: Some(u32::MAX),
            gid: Some(u32::MAX),
            modify_time: Some(prost_types::Timestamp {
                seconds: 0,
                nanos: -1,
            }),
            size_bytes: Some(u64::MAX),
            ..SetAttributesRequest::default()
        };
        let wrong = Attributes::check(&request).err().unwrap();
        let fields: Vec<_> = wrong
            .0
            .into_iter()
            .map(|violation| violation.field)
            .collect();
        assert_eq!(fields, ["mode", "uid", "gid", "modify_time", "size_bytes"]);
    }
}
