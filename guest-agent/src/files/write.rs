//! Write: a stream into a file.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;

use bytes::Bytes;
use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, RenameFlags, Uid, fchmod, fchown, fstat, fsync, ftruncate, openat,
    renameat_with, unlinkat,
};
use rustix::io::Errno;
use soulbox_proto::guest::v1::open_write::How;
use soulbox_proto::guest::v1::write_request::Message;
use soulbox_proto::guest::v1::{OpenWrite, WriteRequest, WriteResponse};

use super::change::{above, check_mode, make_directories};
use super::entry::{MODE_BITS, entry_of, file_type};
use super::error::{FileError, Problem, Told as _};
use super::incoming::{Piece, Sink};
use super::place::{Last, Named, Place, User, View, reopen};
use super::xattr;
use crate::spec::Violations;

const FILE_MODE: u32 = 0o644;
/// How files begin that are not whole yet, before sixteen digits.
const HIDDEN_PREFIX: &[u8] = b".soulbox-";
/// How often a name is looked up anew that others make and remove meanwhile.
const MAX_TRIES: u32 = 16;

const DOING: &str = "write";

/// An [`OpenWrite`] that is sound.
pub(super) struct Asked {
    how: How,
    offset: u64,
    truncate: bool,
    mode: Mode,
    make_parents: bool,
    expected_size_bytes: Option<u64>,
    sync: bool,
}

/// A file that is being written.
pub(super) struct Writer {
    user: User,
    path: Vec<u8>,
    file: File,
    target: Target,
    sync: bool,
    written_bytes: u64,
}

enum Target {
    /// A hidden file takes the name when it is whole.
    Fresh {
        hidden: Hidden,
        name: Vec<u8>,
        mode: Mode,
        /// Whose place it takes.
        old: Option<Old>,
        /// Nobody's.
        create: bool,
    },
    At {
        offset: u64,
        truncate: bool,
    },
    End,
}

/// What a new file takes over.
struct Old {
    file: OwnedFd,
    owner: (u32, u32),
    mode: u32,
}

/// A file under a name that nobody asked for; it goes when this is dropped.
struct Hidden {
    directory: OwnedFd,
    name: Vec<u8>,
    renamed: bool,
}

pub(super) fn piece(request: WriteRequest) -> Result<Piece, Violations> {
    match request.message {
        Some(Message::Data(data)) => Ok(Piece::Data(data)),
        Some(Message::Commit(_)) => Ok(Piece::Commit),
        Some(Message::Open(_)) => Err(Violations::of("open", "must be the first message only")),
        None => Err(Violations::of("message", "must hold data or commit")),
    }
}

// === impl Asked ===

impl Asked {
    pub(super) fn check(open: &OpenWrite) -> Result<Self, Violations> {
        let how = open.how();
        let mut wrong = Violations::default();
        if how == How::Unspecified {
            wrong.add("open.how", "must be REPLACE, CREATE, IN_PLACE or APPEND");
        }
        if open.offset != 0 && how != How::InPlace {
            wrong.add("open.offset", "is for IN_PLACE only");
        }
        if i64::try_from(open.offset).is_err() {
            wrong.add("open.offset", "must be less than 2^63");
        }
        if open.truncate && how != How::InPlace {
            wrong.add("open.truncate", "is for IN_PLACE only");
        }
        if open.expected_size_bytes.is_some() && !matches!(how, How::InPlace | How::Append) {
            let problem = "is for IN_PLACE and APPEND only";
            wrong.add("open.expected_size_bytes", problem);
        }
        let mode = check_mode(open.mode, "open.mode").unwrap_or_else(|violations| {
            wrong.0.extend(violations.0);
            None
        });
        wrong.into_result()?;
        Ok(Self {
            how,
            offset: open.offset,
            truncate: open.truncate,
            mode: mode.unwrap_or(Mode::from_raw_mode(FILE_MODE)),
            make_parents: open.make_parents,
            expected_size_bytes: open.expected_size_bytes,
            sync: open.sync,
        })
    }
}

// === impl Writer ===

impl Writer {
    pub(super) fn open(place: &Place, view: &View, asked: &Asked) -> Result<Self, FileError> {
        let path = &place.path;
        if asked.make_parents
            && let Some(above) = above(path)
        {
            make_directories(view, above, Mode::from_raw_mode(0o755), DOING)?;
        }
        let mut tries = 0;
        loop {
            let last = view.last(path, DOING)?;
            check_target(&last, path)?;
            let opened = match asked.how {
                How::InPlace | How::Append => open_there(last, asked),
                _ => open_hidden(last, asked, path)?,
            };
            match opened {
                // Somebody made or removed it between two calls.
                Err(Errno::EXIST | Errno::NOENT) if tries < MAX_TRIES => tries += 1,
                Err(errno) => return Err(FileError::errno(errno, DOING, path)),
                Ok((file, target)) => {
                    let writer = Self {
                        user: view.user.clone(),
                        path: path.clone(),
                        file,
                        target,
                        sync: asked.sync,
                        written_bytes: 0,
                    };
                    writer.check_size(asked.expected_size_bytes)?;
                    return Ok(writer);
                }
            }
        }
    }

    fn check_size(&self, expected: Option<u64>) -> Result<(), FileError> {
        let Some(expected) = expected else {
            return Ok(());
        };
        let stat = fstat(&self.file).told(DOING, &self.path)?;
        if stat.st_size.cast_unsigned() != expected {
            return Err(FileError::new(Problem::Changed, DOING, &self.path));
        }
        Ok(())
    }

    fn write(&mut self, data: &[u8]) -> std::io::Result<()> {
        match &self.target {
            Target::At { offset, .. } => {
                let offset = offset.checked_add(self.written_bytes);
                let offset = offset.ok_or(std::io::ErrorKind::FileTooLarge)?;
                self.file.write_all_at(data, offset)?;
            }
            Target::Fresh { .. } | Target::End => self.file.write_all(data)?,
        }
        self.written_bytes += data.len() as u64;
        Ok(())
    }

    fn commit(&mut self) -> Result<(), Errno> {
        match &mut self.target {
            Target::End => {}
            Target::At { offset, truncate } => {
                if *truncate {
                    ftruncate(&self.file, *offset + self.written_bytes)?;
                }
            }
            Target::Fresh {
                hidden,
                name,
                mode,
                old,
                create,
            } => {
                match old {
                    Some(old) => take_after(&self.file, old)?,
                    None => fchmod(&self.file, *mode)?,
                }
                if self.sync {
                    fsync(&self.file)?;
                }
                hidden.rename(name, *create)?;
                if self.sync {
                    hidden.sync_directory()?;
                }
                return Ok(());
            }
        }
        if self.sync {
            fsync(&self.file)?;
        }
        Ok(())
    }
}

impl Sink for Writer {
    type Reply = WriteResponse;

    fn put(&mut self, data: Bytes) -> Result<(), FileError> {
        let _acting = self.user.act()?;
        self.write(&data).told(DOING, &self.path)
    }

    fn finish(mut self) -> Result<WriteResponse, FileError> {
        let user = self.user.clone();
        let _acting = user.act()?;
        self.commit().told(DOING, &self.path)?;
        let path = Bytes::copy_from_slice(&self.path);
        let entry = entry_of(&self.file, path).told(DOING, &self.path)?;
        Ok(WriteResponse {
            entry: Some(entry),
            written_bytes: self.written_bytes,
        })
    }
}

fn check_target(last: &Last, path: &[u8]) -> Result<(), FileError> {
    let refuse = |problem| Err(FileError::new(problem, DOING, path));
    match &last.there {
        Some((_, stat)) if file_type(stat).is_dir() => refuse(Problem::IsADirectory),
        Some((_, stat)) if !file_type(stat).is_file() => refuse(Problem::NotARegularFile),
        Some(_) if last.at.wants_directory => refuse(Problem::NotADirectory),
        None if last.at.wants_directory => refuse(Problem::IsADirectory),
        _ => Ok(()),
    }
}

/// The file itself, or an empty one.
fn open_there(last: Last, asked: &Asked) -> Result<(File, Target), Errno> {
    let (flags, target) = match asked.how {
        How::Append => (OFlags::WRONLY | OFlags::APPEND, Target::End),
        _ => {
            let (offset, truncate) = (asked.offset, asked.truncate);
            (OFlags::WRONLY, Target::At { offset, truncate })
        }
    };
    let file = match last.there {
        Some((there, _)) => reopen(&there, flags)?,
        // One that is not there has no size that the caller could have known but 0.
        None if asked.expected_size_bytes.is_some_and(|size| size > 0) => {
            return Err(Errno::STALE);
        }
        None => {
            let file = make(&last.at, &last.at.name, flags)?;
            fchmod(&file, asked.mode)?;
            file
        }
    };
    Ok((file.into(), target))
}

/// A new file beside the one whose name it is to have.
fn open_hidden(
    last: Last,
    asked: &Asked,
    path: &[u8],
) -> Result<Result<(File, Target), Errno>, FileError> {
    let Last { at, there } = last;
    let create = asked.how == How::Create;
    if let Some((there, _)) = &there {
        if create {
            return Err(FileError::new(Problem::Exists, DOING, path));
        }
        // Who may not write the file may not replace it, although its directory would
        // let them. A program that runs may be replaced.
        match reopen(there, OFlags::WRONLY) {
            Ok(_) | Err(Errno::TXTBSY) => {}
            Err(errno) => return Ok(Err(errno)),
        }
    }
    let name = hidden_name().told(DOING, path)?;
    let file = match make(&at, &name, OFlags::WRONLY) {
        Ok(file) => file,
        Err(errno) => return Ok(Err(errno)),
    };
    let target = Target::Fresh {
        hidden: Hidden {
            directory: at.directory,
            name,
            renamed: false,
        },
        name: at.name,
        mode: asked.mode,
        old: there.map(|(file, stat)| Old {
            file,
            owner: (stat.st_uid, stat.st_gid),
            mode: stat.st_mode & MODE_BITS,
        }),
        create,
    };
    Ok(Ok((file.into(), target)))
}

fn make(at: &Named, name: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(&at.directory, name, flags, Mode::RUSR | Mode::WUSR)
}

fn hidden_name() -> std::io::Result<Vec<u8>> {
    let mut random = [0; 8];
    File::open("/dev/urandom")?.read_exact(&mut random)?;
    let random = u64::from_ne_bytes(random);
    Ok([HIDDEN_PREFIX, format!("{random:016x}").as_bytes()].concat())
}

/// Whether a file is one that is not whole yet. Watch does not tell it.
pub(super) fn is_hidden_name(name: &[u8]) -> bool {
    let digits = name.strip_prefix(HIDDEN_PREFIX);
    digits.is_some_and(|digits| digits.len() == 16 && digits.iter().all(u8::is_ascii_hexdigit))
}

/// Gives a new file the owner, the mode and the attributes of an old one. A user who
/// may write a file of somebody else cannot make another one theirs: EPERM.
fn take_after(file: &File, old: &Old) -> Result<(), Errno> {
    let own = fstat(file)?;
    if (own.st_uid, own.st_gid) != old.owner {
        let (owner, group) = (Uid::from_raw(old.owner.0), Gid::from_raw(old.owner.1));
        fchown(file, Some(owner), Some(group))?;
    }
    xattr::copy(old.file.as_fd(), file.as_fd());
    fchmod(file, Mode::from_raw_mode(old.mode))
}

// === impl Hidden ===

impl Hidden {
    fn rename(&mut self, name: &[u8], create: bool) -> Result<(), Errno> {
        let flags = if create {
            RenameFlags::NOREPLACE
        } else {
            RenameFlags::empty()
        };
        renameat_with(
            &self.directory,
            &self.name[..],
            &self.directory,
            name,
            flags,
        )?;
        self.renamed = true;
        Ok(())
    }

    /// So that the name outlives a crash, too.
    fn sync_directory(&self) -> Result<(), Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match openat(&self.directory, c".", flags, Mode::empty()) {
            // One that the user may not read.
            Err(Errno::ACCESS) => Ok(()),
            directory => fsync(directory?),
        }
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        if !self.renamed {
            let _ = unlinkat(&self.directory, &self.name[..], AtFlags::empty());
        }
    }
}
