//! Read: a regular file as a stream.

use std::os::fd::OwnedFd;

use bytes::Bytes;
use rustix::buffer::spare_capacity;
use rustix::fs::{OFlags, SeekFrom, fstat, seek};
use rustix::io::Errno;
use soulbox_proto::guest::v1::{Entry, ReadResponse, read_response};

use super::entry::{entry, file_type};
use super::error::{FileError, Problem, Told as _};
use super::jobs::Source;
use super::place::{Place, View, reopen};

/// The most that one response holds.
pub(super) const CHUNK_BYTES: usize = 256 * 1024;
/// The least that is read at once of a file that tells no size.
const LEAST_BYTES: usize = 16 * 1024;

const DOING: &str = "read";

pub(super) struct Reader {
    file: OwnedFd,
    path: Vec<u8>,
    /// Not told yet.
    entry: Option<Entry>,
    /// What the file has from here on, as far as it tells.
    known: u64,
    /// What the caller wants at most.
    wanted: u64,
}

// === impl Reader ===

impl Reader {
    /// `length` 0 is all.
    pub(super) fn open(
        place: &Place,
        view: &View,
        offset: u64,
        length: u64,
    ) -> Result<Self, FileError> {
        let path = &place.path;
        let (file, entry) = open_regular(view, path, OFlags::RDONLY, DOING)?;
        if offset > 0 {
            seek(&file, SeekFrom::Start(offset)).told(DOING, path)?;
        }
        Ok(Self {
            file,
            path: path.clone(),
            known: entry.size_bytes.saturating_sub(offset),
            entry: Some(entry),
            wanted: if length == 0 { u64::MAX } else { length },
        })
    }

    /// The next chunk, empty at the end.
    fn chunk(&mut self) -> Result<Bytes, FileError> {
        let room = usize::try_from(self.known).unwrap_or(usize::MAX);
        let most = usize::try_from(self.wanted).unwrap_or(usize::MAX);
        let room = room.clamp(LEAST_BYTES, CHUNK_BYTES).min(most);
        let mut chunk = Vec::with_capacity(room);
        while chunk.len() < room {
            match rustix::io::read(&self.file, spare_capacity(&mut chunk)) {
                // Such as /proc/kmsg says EAGAIN: that was all for now.
                Ok(0) | Err(Errno::AGAIN) => {
                    self.wanted = 0;
                    break;
                }
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(FileError::errno(errno, DOING, &self.path)),
            }
        }
        // The allocator may have given more room than was asked for.
        chunk.truncate(most);
        let length = chunk.len() as u64;
        self.wanted = self.wanted.saturating_sub(length);
        self.known = self.known.saturating_sub(length);
        Ok(chunk.into())
    }
}

impl Source for Reader {
    type Item = ReadResponse;

    fn next(&mut self, _: &dyn Fn() -> bool) -> Result<Option<ReadResponse>, FileError> {
        let message = match self.entry.take() {
            Some(entry) => read_response::Message::Entry(entry),
            None if self.wanted == 0 => return Ok(None),
            None => {
                let chunk = self.chunk()?;
                if chunk.is_empty() {
                    return Ok(None);
                }
                read_response::Message::Data(chunk)
            }
        };
        Ok(Some(ReadResponse {
            message: Some(message),
        }))
    }
}

/// Opens a regular file for reading, and tells what it is. Anything else is refused
/// without being opened: to open a pipe or a device may wait, or do something.
pub(super) fn open_regular(
    view: &View,
    path: &[u8],
    flags: OFlags,
    doing: &'static str,
) -> Result<(OwnedFd, Entry), FileError> {
    let found = view.look(path, true, doing)?;
    let stat = fstat(&found).told(doing, path)?;
    let file_type = file_type(&stat);
    if file_type.is_dir() {
        return Err(FileError::new(Problem::IsADirectory, doing, path));
    }
    if !file_type.is_file() {
        return Err(FileError::new(Problem::NotARegularFile, doing, path));
    }
    let file = reopen(&found, flags).told(doing, path)?;
    let entry = entry(&stat, Bytes::copy_from_slice(path));
    Ok((file, entry))
}
