//! Download: a file or a tree as a tar stream.

use std::collections::HashMap;
use std::ffi::CStr;
use std::io::Write as _;
use std::os::fd::{BorrowedFd, OwnedFd};

use bytes::Bytes;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, fstat, openat, readlinkat, statat};
use rustix::io::Errno;
use soulbox_proto::archive::{Kind, Member, append_end, append_header, append_padding};
use soulbox_proto::guest::v1::{
    Compression, DownloadBegin, DownloadResponse, Entry, download_response,
};
use zstd::stream::write::Encoder;

use crate::files::entry::{MODE_BITS, entry, file_type};
use crate::files::error::{FileError, Problem, Told as _};
use crate::files::jobs::Source;
use crate::files::place::{Place, User, View, id, join, reopen, split};
use crate::files::tree::{Step, Tree};

/// About what one response holds.
const CHUNK_BYTES: usize = 256 * 1024;
/// Files with several names that are told as such; the others are told as files.
const MAX_LINKS: usize = 65_536;
/// The fastest: the stream is local, and shares its processor with programs.
const LEVEL: i32 = 1;

const DOING: &str = "download";

pub(crate) struct Download {
    user: User,
    path: Vec<u8>,
    entry: Option<Entry>,
    may_compress: bool,
    compress: Option<Encoder<'static, Vec<u8>>>,
    /// What follows.
    tree: Option<Tree>,
    file: Option<Body>,
    /// Where each file is that has several names.
    links: HashMap<(u64, u64), Vec<u8>>,
    archive: Vec<u8>,
    /// Nothing comes after what is in `archive`.
    ended: bool,
    over: bool,
}

/// The rest of a file.
struct Body {
    file: OwnedFd,
    size: u64,
    left: u64,
}

// === impl Download ===

impl Download {
    pub(crate) fn open(
        place: &Place,
        view: &View,
        compression: Compression,
    ) -> Result<Self, FileError> {
        let path = &place.path;
        let top = view.look(path, true, DOING)?;
        let stat = fstat(&top).told(DOING, path)?;
        let mut download = Self {
            user: view.user.clone(),
            path: path.clone(),
            entry: Some(entry(&stat, Bytes::copy_from_slice(path))),
            may_compress: compression == Compression::Zstd,
            compress: None,
            tree: None,
            file: None,
            links: HashMap::new(),
            archive: Vec::with_capacity(CHUNK_BYTES),
            ended: false,
            over: false,
        };
        let mut member = Member::default();
        let top_type = file_type(&stat);
        if top_type.is_dir() {
            let top = reopen(&top, OFlags::RDONLY | OFlags::DIRECTORY).told(DOING, path)?;
            member.path = b"./".to_vec();
            describe(&mut member, Kind::Directory, &stat);
            append_header(&mut download.archive, &member);
            download.tree = Some(Tree::new(top, true).told(DOING, path)?);
        } else if top_type.is_file() {
            let file = reopen(&top, OFlags::RDONLY).told(DOING, path)?;
            let (_, name) = split(path).unwrap_or((b"", b"file"));
            member.path = name.to_vec();
            describe(&mut member, Kind::File, &stat);
            download.begin_file(file, &member);
        } else {
            return Err(FileError::new(Problem::NotARegularFile, DOING, path));
        }
        Ok(download)
    }

    /// Fills a chunk, as far as there is something.
    fn fill(&mut self) -> Result<(), FileError> {
        while self.archive.len() < CHUNK_BYTES && !self.ended {
            if let Some(body) = &mut self.file {
                if body.read(&mut self.archive).told(DOING, &self.path)? {
                    self.file = None;
                }
                continue;
            }
            let Some(tree) = &mut self.tree else {
                append_end(&mut self.archive);
                self.ended = true;
                continue;
            };
            match tree.next() {
                Ok(Some(Step::Found { name, file_type })) => self.add(&name, file_type)?,
                Ok(Some(Step::Left { .. })) => {}
                Ok(None) => self.tree = None,
                Err(errno) => {
                    let path = join(&self.path, tree.path());
                    return Err(FileError::errno(errno, DOING, &path));
                }
            }
        }
        Ok(())
    }

    /// One name of the tree. What has gone meanwhile is left out, and so are sockets,
    /// pipes and devices.
    fn add(&mut self, name: &CStr, told: FileType) -> Result<(), FileError> {
        let Some(tree) = &mut self.tree else {
            return Ok(());
        };
        let mut member = Member {
            path: tree.path_of(name),
            ..Member::default()
        };
        let added = match told {
            FileType::RegularFile => self.add_file(name, &mut member),
            FileType::Directory => self.add_directory(name, &mut member),
            FileType::Symlink => self.add_symlink(name, &mut member),
            _ => Ok(()),
        };
        match added {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => {
                let path = join(&self.path, &member.path);
                Err(FileError::errno(errno, DOING, &path))
            }
        }
    }

    fn directory(&self) -> Result<BorrowedFd<'_>, Errno> {
        self.tree.as_ref().ok_or(Errno::BADF)?.directory()
    }

    fn add_file(&mut self, name: &CStr, member: &mut Member) -> Result<(), Errno> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
        let opened = openat(
            self.directory()?,
            name,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
        );
        let file = match opened {
            // It has become a link or a socket.
            Err(Errno::LOOP | Errno::NXIO) => return Ok(()),
            file => file?,
        };
        let stat = fstat(&file)?;
        if !file_type(&stat).is_file() {
            return Ok(());
        }
        describe(member, Kind::File, &stat);
        if stat.st_nlink > 1 {
            if let Some(first) = self.links.get(&id(&stat)) {
                describe(member, Kind::HardLink, &stat);
                member.target.clone_from(first);
                append_header(&mut self.archive, member);
                return Ok(());
            }
            if self.links.len() < MAX_LINKS {
                self.links.insert(id(&stat), member.path.clone());
            }
        }
        self.begin_file(file, member);
        Ok(())
    }

    fn begin_file(&mut self, file: OwnedFd, member: &Member) {
        append_header(&mut self.archive, member);
        let size = member.size;
        if size > 0 {
            let left = size;
            self.file = Some(Body { file, size, left });
        }
    }

    fn add_directory(&mut self, name: &CStr, member: &mut Member) -> Result<(), Errno> {
        let tree = self.tree.as_mut().ok_or(Errno::BADF)?;
        match tree.enter(name) {
            // It has become something else.
            Err(Errno::NOTDIR | Errno::LOOP) => return Ok(()),
            entered => entered?,
        }
        let stat = fstat(tree.directory()?)?;
        describe(member, Kind::Directory, &stat);
        member.path.push(b'/');
        append_header(&mut self.archive, member);
        Ok(())
    }

    fn add_symlink(&mut self, name: &CStr, member: &mut Member) -> Result<(), Errno> {
        let directory = self.directory()?;
        let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        member.target = match readlinkat(directory, name, Vec::new()) {
            Err(Errno::INVAL) => return Ok(()),
            target => target?.into_bytes(),
        };
        describe(member, Kind::Symlink, &stat);
        append_header(&mut self.archive, member);
        Ok(())
    }

    /// The first response. Compresses where that makes the first chunk smaller by a
    /// tenth or more: else it only costs time.
    fn begin(&mut self, entry: Entry) -> Result<DownloadBegin, FileError> {
        let mut compression = Compression::Unspecified;
        if self.may_compress {
            let sample = zstd::bulk::compress(&self.archive, LEVEL).told(DOING, &self.path)?;
            if sample.len() < self.archive.len() / 10 * 9 {
                compression = Compression::Zstd;
                let encoder = Encoder::new(Vec::new(), LEVEL).told(DOING, &self.path)?;
                self.compress = Some(encoder);
            }
        }
        Ok(DownloadBegin {
            compression: compression.into(),
            entry: Some(entry),
        })
    }

    /// The next bytes on the wire. Empty at the end.
    fn data(&mut self) -> Result<Vec<u8>, FileError> {
        loop {
            self.fill()?;
            let ended = self.ended;
            let Some(encoder) = &mut self.compress else {
                self.over = ended;
                let next = if ended { 0 } else { CHUNK_BYTES };
                return Ok(std::mem::replace(
                    &mut self.archive,
                    Vec::with_capacity(next),
                ));
            };
            let written = encoder.write_all(&self.archive);
            self.archive.clear();
            let compressed = written.and_then(|()| match self.compress.take() {
                Some(encoder) if ended => encoder.finish(),
                Some(mut encoder) => {
                    let enough = encoder.get_ref().len() >= CHUNK_BYTES / 2;
                    let compressed = if enough {
                        std::mem::take(encoder.get_mut())
                    } else {
                        Vec::new()
                    };
                    self.compress = Some(encoder);
                    Ok(compressed)
                }
                None => Ok(Vec::new()),
            });
            let compressed = compressed.told(DOING, &self.path)?;
            self.over = ended;
            if ended || !compressed.is_empty() {
                return Ok(compressed);
            }
        }
    }
}

impl Source for Download {
    type Item = DownloadResponse;

    fn next(&mut self, _: &dyn Fn() -> bool) -> Result<Option<DownloadResponse>, FileError> {
        if self.over {
            return Ok(None);
        }
        let user = self.user.clone();
        let _acting = user.act()?;
        let message = match self.entry.take() {
            Some(entry) => {
                self.fill()?;
                download_response::Message::Begin(self.begin(entry)?)
            }
            None => download_response::Message::Data(self.data()?.into()),
        };
        Ok(Some(DownloadResponse {
            message: Some(message),
        }))
    }
}

// === impl Body ===

impl Body {
    /// Appends what there is room for, and says whether that was all. The header has
    /// told a size: a file that became shorter is filled up, one that grew is cut.
    fn read(&mut self, archive: &mut Vec<u8>) -> Result<bool, Errno> {
        let room = CHUNK_BYTES.saturating_sub(archive.len());
        let wanted = usize::try_from(self.left).unwrap_or(usize::MAX).min(room);
        let start = archive.len();
        archive.resize(start + wanted, 0);
        let mut filled = start;
        while filled < archive.len() {
            match rustix::io::read(&self.file, &mut archive[filled..]) {
                // Zeroes are there already.
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        self.left -= wanted as u64;
        if self.left == 0 {
            append_padding(archive, self.size);
        }
        Ok(self.left == 0)
    }
}

fn describe(member: &mut Member, kind: Kind, stat: &Stat) {
    member.kind = kind;
    member.mode = stat.st_mode & MODE_BITS;
    member.uid = stat.st_uid.into();
    member.gid = stat.st_gid.into();
    // A fraction takes a header and a record, 1 KiB, for each file: a fifth more time for
    // small ones.
    member.modified = (stat.st_mtime, 0);
    member.size = match kind {
        Kind::File => stat.st_size.cast_unsigned(),
        _ => 0,
    };
}
