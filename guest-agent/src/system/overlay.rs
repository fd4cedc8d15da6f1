//! Small files that say which guest this is, in memory and over those of the
//! template.
//!
//! Every restore writes them. On the root disk that would dirty the journal and
//! the page cache of each clone, wake its disk some seconds later, take blocks of
//! its layer, and leave in a snapshot's disk names that are none of its clones'.
//! So they are files in /run, bind mounted over those that programs know, as
//! container engines do with /etc/hosts and systemd with a transient
//! /etc/machine-id. The price is theirs, too: such a file can be written but not
//! replaced (rename gives EBUSY, so `sed -i` fails). A symlink would not have it,
//! but readers that open with O_NOFOLLOW or look from outside would find nothing.
//!
//! A file is mounted once and then only written, in place. So nothing piles up
//! however often that happens, and a program in a mount namespace of its own,
//! which has a copy of the mount, sees the new content too.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::Path;

use rustix::mount::mount_bind;

const FOLDER: &str = "/run/soulbox";

/// Lays a copy in memory over the file, with its mode, and makes it first where
/// the template has none.
pub(crate) fn lay_over(path: &str) -> io::Result<()> {
    if !Path::new(path).exists() {
        File::create_new(path)?;
    }
    let name = Path::new(path).file_name().unwrap_or_default();
    let copy = Path::new(FOLDER).join(name);
    fs::create_dir_all(FOLDER)?;
    // Not into the copy of an earlier time, which a mount may still show.
    let _ = fs::remove_file(&copy);
    fs::copy(path, &copy)?;
    Ok(mount_bind(&copy, path)?)
}

/// Makes the file hold `text`; touches nothing where it does. In place: truncated
/// first, it would be without content for a moment, and ext4 would write it out
/// when it is closed.
pub(super) fn write(path: &str, text: &[u8]) -> io::Result<()> {
    if fs::read(path).is_ok_and(|held| held == text) {
        return Ok(());
    }
    let mut options = File::options();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    file.write_all(text)?;
    file.set_len(u64::try_from(text.len()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    #[test]
    fn writes_in_place_and_only_what_differs() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let path = path.to_str().unwrap();
        for text in ["longer text\n", "short\n", "", "longer text\n"] {
            write(path, text.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(path).unwrap(), text);
        }
        let before = fs::metadata(path).unwrap();
        write(path, b"longer text\n").unwrap();
        let after = fs::metadata(path).unwrap();
        assert_eq!(
            (before.ino(), before.modified().unwrap()),
            (after.ino(), after.modified().unwrap())
        );
        write(path, b"another text").unwrap();
        assert_eq!(fs::metadata(path).unwrap().ino(), before.ino());
    }

    #[test]
    fn says_what_it_cannot_write() {
        assert!(write("/nonexistent/file", b"x").is_err());
    }
}
