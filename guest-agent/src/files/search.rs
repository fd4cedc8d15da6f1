//! Search: finds files by name and by content, with the `ignore` and `grep` crates.
//!
//! The walk is this agent's own, by descriptors: that of `ignore` goes by paths, which
//! could be swapped for links meanwhile, and on threads with the agent's rights.

use std::collections::VecDeque;
use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io::{self, Read, Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use bytes::Bytes;
use grep_matcher::Matcher as _;
use grep_regex::{RegexMatcher, RegexMatcherBuilder};
use grep_searcher::{
    BinaryDetection, MmapChoice, Searcher, SearcherBuilder, Sink, SinkContext, SinkMatch,
};
use ignore::overrides::{Override, OverrideBuilder};
use rustix::fs::{FileType, Mode, OFlags, fstat, openat};
use rustix::io::Errno;
use soulbox_proto::guest::v1::{
    ByteRange, FileKind, SearchEnd, SearchMatch, SearchRequest, SearchResponse, search_response,
};

use super::entry::{file_type, kind};
use super::error::{FileError, Problem, Told as _};
use super::ignored::Ignored;
use super::jobs::Source;
use super::place::{Place, User, View, join, reopen};
use super::tree::{Step, Tree};
use crate::spec::Violations;

const MAX_CONTEXT_LINES: u32 = 100;
const MATCHES: u32 = 1_000;
const MAX_MATCHES: u32 = 100_000;
const MAX_GLOBS: usize = 1_000;
const MAX_PATTERN_BYTES: usize = 64 * 1024;
/// What a pattern may compile to, and what its automaton may grow to meanwhile.
const REGEX_BYTES: usize = 2 * 1024 * 1024;
/// Told of each line.
const MAX_LINE_BYTES: usize = 4096;
const MAX_RANGES: usize = 100;
/// A file with a line that is longer counts as unreadable.
const MAX_HELD_BYTES: usize = 4 * 1024 * 1024;
/// Of matches of one file that wait to be told.
const MAX_WAITING_BYTES: usize = 512 * 1024;
/// Names that are looked at before the caller's presence is.
const STEPS: usize = 256;

const DOING: &str = "search";

/// A [`SearchRequest`] that is sound.
pub(super) struct Asked {
    globs: Override,
    has_globs: bool,
    matcher: Option<RegexMatcher>,
    no_ignore: bool,
    hidden: bool,
    context_lines: usize,
    max_matches: u64,
    max_depth: usize,
}

pub(super) struct Search {
    asked: Asked,
    user: User,
    path: Vec<u8>,
    searcher: Searcher,
    /// None: `path` is a file, or the walk is over.
    tree: Option<Tree>,
    /// For each directory down to the one that is being read.
    ignored: Vec<Ignored>,
    file: Option<Searched>,
    found: VecDeque<SearchMatch>,
    end: SearchEnd,
    told_end: bool,
}

/// A file that is being searched.
struct Searched {
    file: File,
    path: Bytes,
    /// The last line that is told. A file with much to tell is searched again from its
    /// beginning when that has been taken, so that little of it waits.
    upto_line: u64,
}

/// Takes what is found in one file.
struct Lines<'a> {
    matcher: &'a RegexMatcher,
    path: &'a Bytes,
    after_line: u64,
    upto_line: u64,
    left: u64,
    truncated: bool,
    matches: u64,
    found: &'a mut VecDeque<SearchMatch>,
    bytes: usize,
}

/// Stops reading when the caller has gone.
struct WhileHere<'a> {
    file: &'a File,
    gone: &'a dyn Fn() -> bool,
}

// === impl Asked ===

impl Asked {
    pub(super) fn check(request: &SearchRequest) -> Result<Self, Violations> {
        let mut wrong = Violations::default();
        if request.context_lines > MAX_CONTEXT_LINES {
            wrong.add("context_lines", "must be at most 100");
        }
        if request.max_matches > MAX_MATCHES {
            wrong.add("max_matches", "must be at most 100,000");
        }
        if request.globs.len() > MAX_GLOBS {
            wrong.add("globs", "must be at most 1,000");
        }
        if request.pattern.len() > MAX_PATTERN_BYTES {
            wrong.add("pattern", "must have at most 65,536 bytes");
        }
        // What follows compiles them.
        wrong.into_result()?;
        let mut wrong = Violations::default();

        let mut globs = OverrideBuilder::new(".");
        for (index, glob) in request.globs.iter().enumerate() {
            if let Err(error) = globs.add(glob) {
                wrong.add(format!("globs[{index}]"), said(&error));
            }
        }
        let globs = globs.build().unwrap_or_else(|error| {
            wrong.add("globs", said(&error));
            Override::empty()
        });
        let matcher = (!request.pattern.is_empty()).then(|| {
            RegexMatcherBuilder::new()
                .case_insensitive(request.case_insensitive)
                .fixed_strings(request.literal)
                .multi_line(true)
                .line_terminator(Some(b'\n'))
                .size_limit(REGEX_BYTES)
                .dfa_size_limit(REGEX_BYTES)
                .build(&request.pattern)
        });
        let matcher = matcher.transpose().unwrap_or_else(|error| {
            wrong.add("pattern", said(&error));
            None
        });
        wrong.into_result()?;
        let max_matches = match request.max_matches {
            0 => MATCHES,
            matches => matches,
        };
        Ok(Self {
            globs,
            has_globs: !request.globs.is_empty(),
            matcher,
            no_ignore: request.no_ignore,
            hidden: request.hidden,
            context_lines: request.context_lines as usize,
            max_matches: max_matches.into(),
            max_depth: match request.max_depth {
                0 => usize::MAX,
                depth => depth as usize,
            },
        })
    }
}

/// The last line of what a parser says, which is what it is about.
fn said(error: &dyn std::error::Error) -> String {
    let text = error.to_string();
    let line = text.lines().last().unwrap_or_default();
    format!(
        "is not understood: {}",
        line.chars().take(200).collect::<String>()
    )
}

// === impl Search ===

impl Search {
    pub(super) fn open(place: &Place, view: &View, asked: Asked) -> Result<Self, FileError> {
        let path = &place.path;
        let searcher = SearcherBuilder::new()
            .binary_detection(BinaryDetection::quit(0))
            .memory_map(MmapChoice::never())
            .heap_limit(Some(MAX_HELD_BYTES))
            .line_number(true)
            .before_context(asked.context_lines)
            .after_context(asked.context_lines)
            .build();
        let mut search = Self {
            searcher,
            user: view.user.clone(),
            path: path.clone(),
            tree: None,
            ignored: Vec::new(),
            file: None,
            found: VecDeque::new(),
            end: SearchEnd::default(),
            told_end: false,
            asked,
        };
        let top = view.look(path, true, DOING)?;
        let top_type = file_type(&fstat(&top).told(DOING, path)?);
        if top_type.is_dir() {
            let top = reopen(&top, OFlags::RDONLY | OFlags::DIRECTORY).told(DOING, path)?;
            let tree = Tree::new(top, true).told(DOING, path)?;
            search.ignored.push(search.ignored_in(&tree));
            search.tree = Some(tree);
        } else if top_type.is_file() {
            let shown = Bytes::copy_from_slice(path);
            match search.asked.matcher {
                Some(_) => {
                    let file = reopen(&top, OFlags::RDONLY).told(DOING, path)?;
                    search.start(file, shown);
                }
                None => search.tell_name(shown, top_type),
            }
        } else {
            return Err(FileError::new(Problem::NotARegularFile, DOING, path));
        }
        Ok(search)
    }

    fn ignored_in(&self, tree: &Tree) -> Ignored {
        match tree.directory() {
            Ok(directory) if !self.asked.no_ignore => Ignored::read(directory, tree.path()),
            _ => Ignored::default(),
        }
    }

    /// Goes on until something is found, or nothing more is to be.
    fn advance(&mut self, gone: &dyn Fn() -> bool) {
        for _ in 0..STEPS {
            if !self.found.is_empty() || self.is_over() {
                return;
            }
            if let Some(file) = self.file.take() {
                self.search(file, gone);
            } else {
                self.step();
            }
        }
    }

    fn is_over(&self) -> bool {
        self.end.truncated || (self.file.is_none() && self.tree.is_none())
    }

    /// The next name of the tree.
    fn step(&mut self) {
        let Some(tree) = &mut self.tree else { return };
        match tree.next() {
            Ok(Some(Step::Found { name, file_type })) => self.look_at(&name, file_type),
            Ok(Some(Step::Left { .. })) => {
                self.ignored.pop();
            }
            Ok(None) => self.tree = None,
            Err(errno) => {
                self.end.unreadable += 1;
                // The way back up has been lost.
                if matches!(errno, Errno::STALE | Errno::BADF) {
                    self.tree = None;
                }
            }
        }
    }

    fn look_at(&mut self, name: &CStr, file_type: FileType) {
        let Some(tree) = &mut self.tree else { return };
        let path = tree.path_of(name);
        let relative = Path::new(OsStr::from_bytes(&path));
        let is_dir = file_type.is_dir();
        let wanted = self.asked.globs.matched(relative, is_dir);
        let left_out = || {
            let hidden = !self.asked.hidden && name.to_bytes().starts_with(b".");
            hidden || Ignored::any(&self.ignored, relative, is_dir)
        };
        // Who names it wants it.
        if wanted.is_ignore() || (!wanted.is_whitelist() && left_out()) {
            return;
        }
        let shown = Bytes::from(join(&self.path, &path));
        let directory = tree.directory();
        if self.asked.matcher.is_none() {
            if !is_dir || wanted.is_whitelist() || !self.asked.has_globs {
                self.tell_name(shown, file_type);
            }
        } else if file_type.is_file() {
            match directory.and_then(|directory| open_regular(directory, name)) {
                Ok(Some(file)) => self.start(file, shown),
                Ok(None) => {}
                Err(_) => self.end.unreadable += 1,
            }
            return;
        }
        self.enter(name, is_dir);
    }

    fn enter(&mut self, name: &CStr, is_dir: bool) {
        let Some(tree) = &mut self.tree else { return };
        if !is_dir || self.ignored.len() >= self.asked.max_depth {
            return;
        }
        match tree.enter(name) {
            Ok(()) => {
                let ignored = self.tree.as_ref().map(|tree| self.ignored_in(tree));
                self.ignored.extend(ignored);
            }
            Err(_) => self.end.unreadable += 1,
        }
    }

    fn tell_name(&mut self, path: Bytes, file_type: FileType) {
        if self.end.matches == self.asked.max_matches {
            self.end.truncated = true;
            return;
        }
        self.end.matches += 1;
        self.found.push_back(SearchMatch {
            path,
            kind: kind(file_type).into(),
            ..SearchMatch::default()
        });
    }

    fn start(&mut self, file: OwnedFd, path: Bytes) {
        self.end.files_searched += 1;
        self.file = Some(Searched {
            file: file.into(),
            path,
            upto_line: 0,
        });
    }

    fn search(&mut self, mut searched: Searched, gone: &dyn Fn() -> bool) {
        let Some(matcher) = &self.asked.matcher else {
            return;
        };
        let mut lines = Lines {
            matcher,
            path: &searched.path,
            after_line: searched.upto_line,
            upto_line: searched.upto_line,
            left: self.asked.max_matches - self.end.matches,
            truncated: false,
            matches: 0,
            found: &mut self.found,
            bytes: 0,
        };
        let reader = WhileHere {
            file: &searched.file,
            gone,
        };
        let read = self.searcher.search_reader(matcher, reader, &mut lines);
        let (full, upto_line) = (lines.is_full(), lines.upto_line);
        self.end.matches += lines.matches;
        self.end.truncated |= lines.truncated;
        searched.upto_line = upto_line;
        let rewound = searched.file.seek(SeekFrom::Start(0));
        if read.is_err() {
            self.end.unreadable += 1;
        } else if full && rewound.is_ok() {
            self.file = Some(searched);
        }
    }
}

impl Source for Search {
    type Item = SearchResponse;

    fn next(&mut self, gone: &dyn Fn() -> bool) -> Result<Option<SearchResponse>, FileError> {
        if self.told_end {
            return Ok(None);
        }
        while self.found.is_empty() && !self.is_over() {
            if gone() {
                return Ok(None);
            }
            let user = self.user.clone();
            let _acting = user.act()?;
            self.advance(gone);
        }
        let message = match self.found.pop_front() {
            Some(found) => search_response::Message::Match(found),
            None => {
                self.told_end = true;
                search_response::Message::End(self.end)
            }
        };
        Ok(Some(SearchResponse {
            message: Some(message),
        }))
    }
}

/// None where it is not what its directory said.
fn open_regular(
    directory: std::os::fd::BorrowedFd<'_>,
    name: &CStr,
) -> Result<Option<OwnedFd>, Errno> {
    let flags =
        OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = match openat(directory, name, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        file => file?,
    };
    let is_file = file_type(&fstat(&file)?).is_file();
    Ok(is_file.then_some(file))
}

// === impl Lines ===

impl Lines<'_> {
    fn is_full(&self) -> bool {
        self.bytes > MAX_WAITING_BYTES
    }

    /// Returns whether to go on.
    fn tell(&mut self, line_number: Option<u64>, bytes: &[u8], context: bool) -> bool {
        let line_number = line_number.unwrap_or(0);
        if line_number <= self.after_line {
            return true;
        }
        if self.is_full() {
            return false;
        }
        if !context {
            if self.left == 0 {
                self.truncated = true;
                return false;
            }
            self.left -= 1;
            self.matches += 1;
        }
        let line = bytes.strip_suffix(b"\n").unwrap_or(bytes);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let mut ranges = Vec::new();
        if !context {
            // A regex for lines cannot fail on one.
            let _ = self.matcher.find_iter(line, |found| {
                let cut = |at: usize| u32::try_from(at.min(MAX_LINE_BYTES)).unwrap_or(u32::MAX);
                ranges.push(ByteRange {
                    start: cut(found.start()),
                    end: cut(found.end()),
                });
                found.end() < MAX_LINE_BYTES && ranges.len() < MAX_RANGES
            });
        }
        let line = line.get(..MAX_LINE_BYTES).unwrap_or(line);
        self.bytes += line.len() + self.path.len() + ranges.len() * size_of::<ByteRange>();
        self.upto_line = line_number;
        self.found.push_back(SearchMatch {
            path: self.path.clone(),
            line_number,
            line: Bytes::copy_from_slice(line),
            ranges,
            context,
            kind: FileKind::Regular.into(),
        });
        true
    }
}

impl Sink for Lines<'_> {
    type Error = io::Error;

    fn matched(&mut self, _: &Searcher, found: &SinkMatch<'_>) -> io::Result<bool> {
        Ok(self.tell(found.line_number(), found.bytes(), false))
    }

    fn context(&mut self, _: &Searcher, context: &SinkContext<'_>) -> io::Result<bool> {
        Ok(self.tell(context.line_number(), context.bytes(), true))
    }
}

impl Read for WhileHere<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if (self.gone)() {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        self.file.read(buffer)
    }
}
