//! What the ignore files of a directory leave out, as gitignore(5) says.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use ignore::gitignore::{Gitignore, GitignoreBuilder};
use rustix::fs::{Mode, OFlags, openat};

/// The first has the last word.
const NAMES: [&str; 3] = [".rgignore", ".ignore", ".gitignore"];
/// What is read of each.
const MAX_BYTES: u64 = 256 * 1024;

/// Of one directory.
#[derive(Default)]
pub(super) struct Ignored(Vec<Gitignore>);

// === impl Ignored ===

impl Ignored {
    /// `path` is that of the directory, relative to where the walk began.
    pub(super) fn read(directory: BorrowedFd<'_>, path: &[u8]) -> Self {
        let files = NAMES.iter().filter_map(|name| {
            let text = read(directory, name)?;
            let root = if path.is_empty() { b"." } else { path };
            let mut builder = GitignoreBuilder::new(Path::new(OsStr::from_bytes(root)));
            for line in text.lines() {
                // A line that is no pattern means nothing to git, too.
                let _ = builder.add_line(None, line);
            }
            builder.build().ok()
        });
        Self(files.collect())
    }

    /// Whether something is left out by the directories above it, the last of which
    /// it is in.
    pub(super) fn any(above: &[Self], path: &Path, is_dir: bool) -> bool {
        let files = above.iter().rev().flat_map(|ignored| &ignored.0);
        let decides = files
            .map(|file| file.matched(path, is_dir))
            .find(|found| !found.is_none());
        decides.is_some_and(|found| found.is_ignore())
    }
}

fn read(directory: BorrowedFd<'_>, name: &str) -> Option<String> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = openat(directory, name, flags, Mode::empty()).ok()?;
    let mut text = Vec::new();
    File::from(file)
        .take(MAX_BYTES)
        .read_to_end(&mut text)
        .ok()?;
    Some(String::from_utf8_lossy(&text).into_owned())
}
