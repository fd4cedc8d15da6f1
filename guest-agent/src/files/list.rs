//! List: what is in a directory, by pages that need no memory between calls.
//!
//! A page begins after the entry that the token names, wherever that would be: each
//! directory is read through, and the names that come next are kept, no more of them
//! than the page has room for.

use std::collections::BinaryHeap;
use std::mem::MaybeUninit;
use std::ops::Bound;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bytes::Bytes;
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RawDir, SeekFrom, openat, readlinkat, seek, statat,
};
use rustix::io::Errno;
use soulbox_proto::guest::v1::{Entry, FileKind, ListRequest, ListResponse};

use super::entry::{entry, file_type};
use super::error::{FileError, Told as _};
use super::place::{PATH_MAX_BYTES, Place, View, join};
use crate::spec::Violations;

const MAX_DEPTH: u32 = 256;
const PAGE_SIZE: u32 = 1_000;
const MAX_PAGE_SIZE: u32 = 10_000;
/// A page ends when its entries have about so many bytes: a reply stays well below
/// what gRPC takes (4 MiB).
const PAGE_BYTES: usize = 1024 * 1024;
/// What an entry takes beside its path and target.
const ENTRY_BYTES: usize = 100;
/// Directories that are kept by name on the way down, for each level.
const DIRECTORIES: usize = 256;
/// A path within a tree may be longer than one that Linux takes at once.
const MAX_TOKEN_BYTES: usize = 16 * PATH_MAX_BYTES;
/// Marks the layout of tokens.
const TOKEN_V1: u8 = 1;
/// getdents64(2) fills as much at once.
const BUFFER_BYTES: usize = 32 * 1024;

const DOING: &str = "list";

pub(super) struct Asked {
    depth: u32,
    page_size: usize,
    /// Names from the directory to the last entry told.
    after: Vec<Vec<u8>>,
}

struct Listing<'a> {
    asked_path: &'a [u8],
    page_size: usize,
    entries: Vec<Entry>,
    bytes: usize,
    /// Relative to the directory, of the last entry.
    last: Vec<u8>,
    /// Directories that were looked into at the level that is being told.
    visited: u64,
    buffer: Vec<MaybeUninit<u8>>,
}

// === impl Asked ===

impl Asked {
    pub(super) fn check(request: &ListRequest) -> Result<Self, Violations> {
        let mut wrong = Violations::default();
        if request.depth > MAX_DEPTH {
            wrong.add("depth", "must be at most 256");
        }
        if request.page_size > MAX_PAGE_SIZE {
            wrong.add("page_size", "must be at most 10,000");
        }
        let depth = request.depth.max(1);
        let after = names_of_token(&request.page_token)
            .filter(|names| names.len() <= depth as usize)
            .unwrap_or_else(|| {
                let problem = "must be next_page_token of the reply before, with the same depth";
                wrong.add("page_token", problem);
                Vec::new()
            });
        wrong.into_result()?;
        let page_size = match request.page_size {
            0 => PAGE_SIZE,
            size => size,
        };
        Ok(Self {
            depth,
            page_size: page_size as usize,
            after,
        })
    }
}

/// None where it is no token. What it says is only compared with names.
fn names_of_token(token: &[u8]) -> Option<Vec<Vec<u8>>> {
    let path = match token {
        [] => return Some(Vec::new()),
        [TOKEN_V1, path @ ..] if token.len() <= MAX_TOKEN_BYTES => path,
        _ => return None,
    };
    let names: Vec<_> = path
        .split(|byte| *byte == b'/')
        .map(<[u8]>::to_vec)
        .collect();
    let sound = |name: &Vec<u8>| !name.is_empty() && !name.contains(&0);
    names.iter().all(sound).then_some(names)
}

pub(super) fn list(place: &Place, view: &View, asked: &Asked) -> Result<ListResponse, FileError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NONBLOCK;
    let directory = view.open_directly(&place.path, flags, DOING)?;
    let mut listing = Listing {
        asked_path: &place.path,
        page_size: asked.page_size,
        entries: Vec::new(),
        bytes: 0,
        last: Vec::new(),
        visited: 0,
        buffer: Vec::with_capacity(BUFFER_BYTES),
    };
    listing.buffer.resize(BUFFER_BYTES, MaybeUninit::uninit());

    let mut after: Vec<&[u8]> = asked.after.iter().map(Vec::as_slice).collect();
    let mut level = u32::try_from(after.len()).unwrap_or(MAX_DEPTH).max(1);
    while level <= asked.depth && !listing.is_full() {
        listing.visited = 0;
        let walked = listing.walk(directory.as_fd(), &mut Vec::new(), level - 1, &after);
        walked.told(DOING, &place.path)?;
        if listing.visited == 0 {
            break;
        }
        after.clear();
        level += 1;
    }

    let mut next_page_token = Vec::new();
    if listing.is_full() {
        next_page_token.push(TOKEN_V1);
        next_page_token.extend_from_slice(&listing.last);
    }
    Ok(ListResponse {
        entries: listing.entries,
        next_page_token: next_page_token.into(),
    })
}

// === impl Listing ===

impl Listing<'_> {
    fn is_full(&self) -> bool {
        self.entries.len() >= self.page_size || self.bytes >= PAGE_BYTES
    }

    /// Tells what lies `down` levels below what is in this directory, after the names
    /// of `after`, as far as the page has room.
    fn walk(
        &mut self,
        directory: BorrowedFd<'_>,
        path: &mut Vec<u8>,
        down: u32,
        after: &[&[u8]],
    ) -> Result<(), Errno> {
        if down == 0 {
            self.visited += 1;
            return self.tell(directory, path, after.first().copied());
        }
        let length = path.len();
        let mut from = after
            .first()
            .map_or(Bound::Unbounded, |name| Bound::Included(name.to_vec()));
        loop {
            let names = self.names(directory, &from, DIRECTORIES, true)?;
            for name in &names {
                let Some(child) = open_child(directory, name)? else {
                    continue;
                };
                let rest = match after {
                    [first, rest @ ..] if *first == &name[..] => rest,
                    _ => &[],
                };
                push_name(path, name);
                self.walk(child.as_fd(), path, down - 1, rest)?;
                path.truncate(length);
                if self.is_full() {
                    return Ok(());
                }
            }
            match names.last() {
                Some(last) if names.len() == DIRECTORIES => from = Bound::Excluded(last.to_vec()),
                _ => return Ok(()),
            }
        }
    }

    /// Tells what is in this directory.
    fn tell(
        &mut self,
        directory: BorrowedFd<'_>,
        path: &mut Vec<u8>,
        after: Option<&[u8]>,
    ) -> Result<(), Errno> {
        let length = path.len();
        let mut from = after.map_or(Bound::Unbounded, |name| Bound::Excluded(name.to_vec()));
        while !self.is_full() {
            let room = self.page_size - self.entries.len();
            let names = self.names(directory, &from, room, false)?;
            for name in &names {
                push_name(path, name);
                let told = self.tell_one(directory, name, path);
                path.truncate(length);
                told?;
                if self.is_full() {
                    return Ok(());
                }
            }
            match names.last() {
                // Some of them had gone.
                Some(last) if names.len() == room => from = Bound::Excluded(last.to_vec()),
                _ => return Ok(()),
            }
        }
        Ok(())
    }

    fn tell_one(
        &mut self,
        directory: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
    ) -> Result<(), Errno> {
        let stat = match statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(()),
            stat => stat?,
        };
        let mut entry = entry(&stat, Bytes::from(join(self.asked_path, path)));
        if entry.kind == FileKind::Symlink as i32 {
            let target = readlinkat(directory, name, Vec::new());
            entry.target = target
                .map(|target| target.into_bytes().into())
                .unwrap_or_default();
        }
        self.bytes += ENTRY_BYTES + entry.path.len() + entry.target.len();
        self.entries.push(entry);
        self.last.clear();
        self.last.extend_from_slice(path);
        Ok(())
    }

    /// The first `limit` names after `from`, in order.
    fn names(
        &mut self,
        directory: BorrowedFd<'_>,
        from: &Bound<Vec<u8>>,
        limit: usize,
        directories: bool,
    ) -> Result<Vec<Box<[u8]>>, Errno> {
        seek(directory, SeekFrom::Start(0))?;
        let mut read = RawDir::new(directory, &mut self.buffer);
        // The largest is on top: it goes when a smaller one comes.
        let mut names: BinaryHeap<Box<[u8]>> = BinaryHeap::new();
        while let Some(found) = read.next() {
            let found = found?;
            let name = found.file_name().to_bytes();
            let before = match from {
                Bound::Unbounded => false,
                Bound::Included(from) => name < &from[..],
                Bound::Excluded(from) => name <= &from[..],
            };
            let full = names.len() == limit;
            if before
                || (full && names.peek().is_some_and(|largest| name > &largest[..]))
                || matches!(name, b"." | b"..")
                || (directories && !is_directory(directory, found.file_name(), found.file_type()))
            {
                continue;
            }
            if full {
                names.pop();
            }
            names.push(name.into());
        }
        Ok(names.into_sorted_vec())
    }
}

fn is_directory(directory: BorrowedFd<'_>, name: &std::ffi::CStr, told: FileType) -> bool {
    match told {
        FileType::Unknown => statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| file_type(&stat).is_dir()),
        told => told.is_dir(),
    }
}

/// None where the user may not look into it, or it has gone.
fn open_child(directory: BorrowedFd<'_>, name: &[u8]) -> Result<Option<OwnedFd>, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match openat(directory, name, flags, Mode::empty()) {
        Ok(child) => Ok(Some(child)),
        Err(Errno::MFILE | Errno::NFILE | Errno::NOMEM) => Err(Errno::MFILE),
        Err(_) => Ok(None),
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
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_token_of_something_else_is_refused() {
        for token in [
            &b"x"[..],
            b"\x02a",
            b"\x01",
            b"\x01a//b",
            b"\x01a\0",
            b"\x01/a",
        ] {
            assert_eq!(names_of_token(token), None, "{token:?}");
        }
        let long = [&[TOKEN_V1][..], &[b'a'; MAX_TOKEN_BYTES]].concat();
        assert_eq!(names_of_token(&long), None);
        let request = ListRequest {
            page_token: b"\x01a/b".as_slice().into(),
            ..ListRequest::default()
        };
        assert!(Asked::check(&request).is_err(), "it is deeper than asked");
    }

    proptest! {
        #[test]
        fn any_token_is_names_or_nothing(token in prop::collection::vec(
            prop_oneof![Just(0), Just(1), Just(b'/'), Just(b'.'), any::<u8>()], 0..20)
        ) {
            for name in names_of_token(&token).unwrap_or_default() {
                prop_assert!(!name.is_empty() && !name.contains(&b'/') && !name.contains(&0));
            }
        }
    }
}
