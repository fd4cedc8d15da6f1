//! From the kernel's events to those of the protocol.

use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use soulbox_proto::guest::v1::watch_event::Kind;
use soulbox_proto::guest::v1::watch_response::Message;
use soulbox_proto::guest::v1::{WatchEvent, WatchOverflow};

use super::watches::{Link, Watches, Wd};
use crate::files::entry::file_type;
use crate::files::error::{FileError, Problem, Told as _};
use crate::files::place::{PATH_MAX_BYTES, Place, User, View, open_at, own_link, reopen};
use crate::files::tree::{Step, Tree};
use crate::files::write::is_hidden_name;

/// How long the other half of a rename is waited for. The kernel tells both together
/// where both are watched.
const RENAME_WAIT: Duration = Duration::from_millis(10);
/// How often a file that is being written is told.
const WRITTEN_EVERY: Duration = Duration::from_millis(100);
/// What is read of the kernel's queue at once …
const BUFFER_BYTES: usize = 64 * 1024;
/// … and how many events are told in one turn. When a directory that came with more is
/// found, the caller is told to look for itself.
const MAX_TOLD: usize = 16 * 1024;

const DOING: &str = "watch";

pub(super) struct Watcher {
    inotify: Arc<OwnedFd>,
    user: User,
    path: Vec<u8>,
    /// What all paths are relative to.
    top: OwnedFd,
    top_wd: Wd,
    /// A file: only what has this name in `top` is told.
    only: Option<Vec<u8>>,
    recursive: bool,
    watches: Watches,
    /// Told by looking into a new directory; the kernel's own event comes after.
    found: HashSet<Link>,
    /// New directories that were not there: renamed, perhaps, which is still to be told.
    lost: Vec<Link>,
    moved: Option<Moved>,
    written: HashMap<Link, Written>,
    told: Vec<Message>,
    failed: Option<FileError>,
    has_more: bool,
    is_over: bool,
}

/// The first half of a rename.
struct Moved {
    cookie: u32,
    link: Link,
    directory: bool,
    until: Instant,
}

/// A file that is being written.
struct Written {
    next: Instant,
    /// Since it was told.
    again: bool,
}

// === impl Watcher ===

impl Watcher {
    pub(super) fn open(place: &Place, view: &View, recursive: bool) -> Result<Self, FileError> {
        let path = &place.path;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NONBLOCK;
        let (top, only) = match view.open_directly(path, flags, DOING) {
            // By its name: who replaces it makes another file.
            Err(FileError::Refused {
                problem: Problem::NotADirectory,
                ..
            }) => {
                let last = view.last(path, DOING)?;
                let Some((_, stat)) = last.there else {
                    return Err(FileError::new(Problem::NotFound, DOING, path));
                };
                if !file_type(&stat).is_file() {
                    return Err(FileError::new(Problem::NotARegularFile, DOING, path));
                }
                let directory = reopen(&last.at.directory, flags).told(DOING, path)?;
                (directory, Some(last.at.name))
            }
            top => (top?, None),
        };
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC);
        let inotify = inotify.told(DOING, path)?;
        let mut watcher = Self {
            inotify: Arc::new(inotify),
            user: view.user.clone(),
            path: path.clone(),
            top,
            top_wd: 0,
            recursive: recursive && only.is_none(),
            only,
            watches: Watches::default(),
            found: HashSet::new(),
            lost: Vec::new(),
            moved: None,
            written: HashMap::new(),
            told: Vec::new(),
            failed: None,
            has_more: false,
            is_over: false,
        };
        watcher.add_all().map_err(|errno| no_room(errno, path))?;
        Ok(watcher)
    }

    pub(super) fn inotify(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.inotify)
    }

    pub(super) fn directories(&self) -> u64 {
        self.watches.len() as u64
    }

    /// When a turn is due even if nothing happens.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let moved = self.moved.as_ref().map(|moved| moved.until);
        let again = self.written.values().filter(|written| written.again);
        again.map(|written| written.next).chain(moved).min()
    }

    /// The kernel has told more than a turn takes.
    pub(super) fn has_more(&self) -> bool {
        self.has_more
    }

    /// Nothing comes after what the last turn has told.
    pub(super) fn is_over(&self) -> bool {
        self.is_over
    }

    /// What is to be told by now. An error is the last.
    pub(super) fn turn(&mut self) -> Vec<Result<Message, FileError>> {
        let user = self.user.clone();
        if let Err(error) = user.act().map(|_acting| self.take_in()) {
            self.failed = Some(error);
        }
        let mut told: Vec<_> = std::mem::take(&mut self.told).into_iter().map(Ok).collect();
        if let Some(error) = self.failed.take() {
            self.is_over = true;
            told.push(Err(error));
        }
        told
    }

    fn take_in(&mut self) {
        self.has_more = false;
        let mut buffer = vec![MaybeUninit::uninit(); BUFFER_BYTES];
        let inotify = self.inotify();
        let mut reader = Reader::new(&*inotify, &mut buffer);
        loop {
            if self.told.len() >= MAX_TOLD && reader.is_buffer_empty() {
                self.has_more = true;
                break;
            }
            match reader.next() {
                Ok(event) => {
                    let (wd, events, cookie) = (event.wd(), event.events(), event.cookie());
                    self.event(wd, events, cookie, event.file_name());
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(errno) => {
                    self.failed = Some(FileError::errno(errno, DOING, &self.path));
                    return;
                }
            }
        }
        for link in std::mem::take(&mut self.lost) {
            self.add_new(&link, false);
        }
        if !self.has_more {
            // All events are in that those would have been of.
            self.found.clear();
        }
        let now = Instant::now();
        if self.moved.as_ref().is_some_and(|moved| moved.until <= now) {
            self.moved_out();
        }
        self.tell_written(now);
    }

    fn event(&mut self, wd: Wd, events: ReadFlags, cookie: u32, name: Option<&CStr>) {
        if events.contains(ReadFlags::QUEUE_OVERFLOW) {
            self.overflow();
        } else if !self.watches.has(wd) {
            // Of a directory that was moved out, or that is forgotten.
            if !events.contains(ReadFlags::IGNORED) {
                let _ = inotify::remove_watch(&self.inotify, wd);
            }
        } else if let Some(name) = name.map(CStr::to_bytes).filter(|name| !name.is_empty()) {
            if self.only.as_ref().is_none_or(|only| only == name) {
                let name = name.into();
                self.named(Link { above: wd, name }, events, cookie);
            }
        } else {
            self.itself(wd, events);
        }
    }

    /// About a watched directory itself.
    fn itself(&mut self, wd: Wd, events: ReadFlags) {
        if events.contains(ReadFlags::UNMOUNT) {
            self.tell_overflow();
        }
        let is_top = wd == self.top_wd;
        let ends = ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF | ReadFlags::IGNORED;
        if is_top && events.intersects(ends) {
            if !self.is_over {
                self.tell_path(Kind::Removed, Vec::new(), self.only.is_none());
            }
            self.is_over = true;
        } else if events.contains(ReadFlags::IGNORED) {
            self.watches.forget(wd);
        } else if is_top && events.contains(ReadFlags::ATTRIB) && self.only.is_none() {
            self.tell_path(Kind::Attributes, Vec::new(), true);
        }
    }

    /// About a name in a watched directory.
    fn named(&mut self, link: Link, events: ReadFlags, cookie: u32) {
        let directory = events.contains(ReadFlags::ISDIR);
        // A file that is being uploaded comes to be when it is whole.
        if is_hidden_name(&link.name) {
            return;
        }
        if events.contains(ReadFlags::CREATE) {
            self.created(link, directory);
        } else if events.contains(ReadFlags::MOVED_FROM) {
            self.moved_out();
            self.written.remove(&link);
            self.moved = Some(Moved {
                cookie,
                link,
                directory,
                until: Instant::now() + RENAME_WAIT,
            });
        } else if events.contains(ReadFlags::MOVED_TO) {
            match self.moved.take_if(|moved| moved.cookie == cookie) {
                Some(moved) => self.renamed(&moved.link, link, directory),
                None => self.created(link, directory),
            }
        } else if events.contains(ReadFlags::DELETE) {
            self.found.remove(&link);
            self.written.remove(&link);
            // Another may get the name before the kernel forgets this one.
            if let Some(wd) = self.watches.find(&link) {
                self.watches.forget(wd);
            }
            self.tell(Kind::Removed, &link, directory);
        } else if events.contains(ReadFlags::CLOSE_WRITE) {
            self.written.remove(&link);
            self.tell(Kind::Written, &link, false);
        } else if events.contains(ReadFlags::MODIFY) {
            self.modified(link);
        } else if events.contains(ReadFlags::ATTRIB) {
            self.tell(Kind::Attributes, &link, directory);
        }
    }

    fn created(&mut self, link: Link, directory: bool) {
        if !self.found.remove(&link) {
            self.tell(Kind::Created, &link, directory);
        }
        if directory && self.recursive {
            self.add_new(&link, true);
        }
    }

    fn renamed(&mut self, from: &Link, to: Link, directory: bool) {
        let (Some(path), Some(from_path)) = (self.watches.path(&to), self.watches.path(from))
        else {
            return;
        };
        self.push(WatchEvent {
            kind: Kind::Renamed.into(),
            path: path.into(),
            from: from_path.into(),
            directory,
        });
        if directory && self.recursive {
            if let Some(wd) = self.watches.find(from) {
                self.watches.insert(wd, Some(to.clone()));
            }
            // It may have been renamed before it was looked into, and another have its
            // old name.
            self.add_new(&to, true);
        }
    }

    /// Half a rename was all: it went elsewhere.
    fn moved_out(&mut self) {
        let Some(moved) = self.moved.take() else {
            return;
        };
        self.tell(Kind::Removed, &moved.link, moved.directory);
        if let Some(wd) = self.watches.find(&moved.link) {
            for wd in self.watches.forget_all(wd) {
                let _ = inotify::remove_watch(&self.inotify, wd);
            }
        }
    }

    fn modified(&mut self, link: Link) {
        let now = Instant::now();
        match self.written.get_mut(&link) {
            Some(written) => written.again = true,
            None => {
                self.tell(Kind::Written, &link, false);
                let next = now + WRITTEN_EVERY;
                self.written.insert(link, Written { next, again: false });
            }
        }
    }

    fn tell_written(&mut self, now: Instant) {
        let mut due = Vec::new();
        self.written.retain(|link, written| {
            if written.next > now {
                return true;
            }
            if written.again {
                due.push(link.clone());
            }
            written.next = now + WRITTEN_EVERY;
            // One that rests is told at once when it is written again.
            std::mem::take(&mut written.again)
        });
        for link in due {
            self.tell(Kind::Written, &link, false);
        }
    }

    /// Events were lost, and with them where directories are now.
    fn overflow(&mut self) {
        self.tell_overflow();
        self.found.clear();
        self.lost.clear();
        self.moved = None;
        self.written.clear();
        if let Err(errno) = self.add_all() {
            self.failed = Some(no_room(errno, &self.path));
        }
    }

    // --- what is watched ---

    /// Watches all that there is. What is watched already keeps its watch.
    fn add_all(&mut self) -> Result<(), Errno> {
        self.watches.clear();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let top = open_at(&self.top, b"", flags, Mode::empty(), ResolveFlags::empty())?;
        let ends = WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF;
        (self.top_wd, _) = self.add(top.as_fd(), None, ends)?;
        if self.recursive {
            self.add_tree(top, self.top_wd, false)?;
        }
        Ok(())
    }

    /// Says, too, whether it was watched before.
    fn add(
        &mut self,
        directory: BorrowedFd<'_>,
        link: Option<Link>,
        also: WatchFlags,
    ) -> Result<(Wd, bool), Errno> {
        let events = WatchFlags::CREATE
            | WatchFlags::MODIFY
            | WatchFlags::CLOSE_WRITE
            | WatchFlags::DELETE
            | WatchFlags::MOVE
            | WatchFlags::ATTRIB
            | WatchFlags::ONLYDIR
            | WatchFlags::EXCL_UNLINK;
        let wd = inotify::add_watch(&self.inotify, own_link(directory), events | also)?;
        let known = self.watches.has(wd);
        self.watches.insert(wd, link);
        Ok((wd, known))
    }

    /// Watches what is below a directory that is watched. Each is watched first and
    /// looked into then, so that nothing is missed; `tell` what is found.
    fn add_tree(&mut self, top: OwnedFd, top_wd: Wd, tell: bool) -> Result<(), Errno> {
        let mut tree = Tree::new(top, true)?;
        let mut above = vec![top_wd];
        while let Some(step) = tree.next()? {
            let (name, file_type) = match step {
                Step::Found { name, file_type } => (name, file_type),
                Step::Left { .. } => {
                    above.pop();
                    continue;
                }
            };
            let link = Link {
                above: above.last().copied().unwrap_or(top_wd),
                name: name.to_bytes().into(),
            };
            let directory = file_type.is_dir();
            if tell && !is_hidden_name(&link.name) {
                self.tell(Kind::Created, &link, directory);
                self.found.insert(link.clone());
            }
            // One that the user may not read is not watched.
            if directory && tree.enter(&name).is_ok() {
                let (wd, _) = self.add(tree.directory()?, Some(link), WatchFlags::empty())?;
                above.push(wd);
            }
        }
        Ok(())
    }

    /// Watches a directory that was not there before, and tells what is in it.
    fn add_new(&mut self, link: &Link, again: bool) {
        let Some(path) = self.watches.path(link) else {
            return;
        };
        let added = self.open_below(&path).and_then(|directory| {
            match self.add(directory.as_fd(), Some(link.clone()), WatchFlags::empty())? {
                (_, true) => Ok(()),
                (wd, false) => self.add_tree(directory, wd, true),
            }
        });
        match added {
            Ok(()) => {}
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) if again => {
                self.lost.push(link.clone())
            }
            Err(errno @ (Errno::NOSPC | Errno::NOMEM | Errno::MFILE | Errno::NFILE)) => {
                self.failed = Some(no_room(errno, &path));
            }
            // It has gone, or is not for this user.
            Err(_) => {}
        }
    }

    /// Opens a directory below the top, however long its path is.
    fn open_below(&self, path: &[u8]) -> Result<OwnedFd, Errno> {
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let (mut from, mut rest) = (None::<OwnedFd>, path);
        loop {
            let base = from.as_ref().map_or(self.top.as_fd(), |from| from.as_fd());
            let cut = rest
                .get(..PATH_MAX_BYTES - 1)
                .and_then(|part| part.iter().rposition(|byte| *byte == b'/'));
            let Some(cut) = cut else {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY;
                return open_at(base, rest, flags, Mode::empty(), resolve);
            };
            let flags = OFlags::PATH | OFlags::DIRECTORY;
            from = Some(open_at(base, &rest[..cut], flags, Mode::empty(), resolve)?);
            rest = &rest[cut + 1..];
        }
    }

    // --- what is told ---

    fn tell(&mut self, kind: Kind, link: &Link, directory: bool) {
        let path = match self.only {
            Some(_) => Some(Vec::new()),
            None => self.watches.path(link),
        };
        if let Some(path) = path {
            self.tell_path(kind, path, directory);
        }
    }

    fn tell_path(&mut self, kind: Kind, path: Vec<u8>, directory: bool) {
        self.push(WatchEvent {
            kind: kind.into(),
            path: path.into(),
            from: bytes::Bytes::new(),
            directory,
        });
    }

    fn push(&mut self, event: WatchEvent) {
        // A turn reads less than this from the kernel: a new directory is full of names.
        if self.told.len() > 2 * MAX_TOLD {
            self.tell_overflow();
        }
        if self.told.first() != Some(&Message::Overflow(WatchOverflow {})) {
            self.told.push(Message::Event(event));
        }
    }

    /// Instead of what was to be told: the caller looks at everything anyhow.
    fn tell_overflow(&mut self) {
        self.told.clear();
        self.told.push(Message::Overflow(WatchOverflow {}));
    }
}

fn no_room(errno: Errno, path: &[u8]) -> FileError {
    match errno {
        // fs.inotify.max_user_watches, which is no disk.
        Errno::NOSPC => FileError::new(Problem::OutOfResources, DOING, path),
        errno => FileError::errno(errno, DOING, path),
    }
}
