//! Files that are not whole yet. The name of one says what it is a part of, so that a
//! later copy goes on with it or leaves it alone.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

/// From so many bytes on, going on is worth what is left behind.
pub(super) const WORTH_KEEPING_BYTES: u64 = 1 << 20;
const ENDING: &[u8] = b".soulbox-part";
/// Of a name, with the dot, the digest and the ending.
const MAX_NAME_BYTES: usize = 255;

/// What tells one state of a file from any other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Source {
    pub(super) size: u64,
    pub(super) modified: (i64, i64),
    pub(super) inode: u64,
    pub(super) device: u64,
}

/// A part on this host. Dropped, it stays if it is worth it.
#[derive(Debug)]
pub(super) struct Part {
    path: PathBuf,
    pub(super) file: File,
    pub(super) length: u64,
    keep: bool,
}

/// `.NAME.DIGEST.soulbox-part`
pub(super) fn name(of: &[u8], source: &Source) -> Vec<u8> {
    let mut digest = Sha256::new();
    digest.update(of);
    for number in [source.size, source.inode, source.device] {
        digest.update(number.to_le_bytes());
    }
    for number in [source.modified.0, source.modified.1] {
        digest.update(number.to_le_bytes());
    }
    let digest: String = digest.finalize()[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let room = MAX_NAME_BYTES - digest.len() - ENDING.len() - 2;
    let shown = &of[..of.len().min(room)];
    [b".", shown, b".", digest.as_bytes(), ENDING].concat()
}

// === impl Part ===

impl Part {
    /// Beside the target; with what an earlier copy got, unless `anew`.
    pub(super) fn open(target: &Path, source: &Source, anew: bool) -> io::Result<Self> {
        let of = target.file_name().unwrap_or_default();
        let name = name(of.as_bytes(), source);
        let path = target.with_file_name(std::ffi::OsString::from_vec(name));
        let file = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(anew)
            // Another user's link there would lead elsewhere.
            .custom_flags(libc::O_NOFOLLOW)
            .mode(0o600)
            .open(&path)?;
        let mut length = file.metadata()?.len();
        if length > source.size {
            file.set_len(0)?;
            length = 0;
        }
        Ok(Self {
            path,
            file,
            length,
            keep: true,
        })
    }

    /// It is of no use to anybody.
    pub(super) fn discard(&mut self) {
        self.keep = false;
    }

    pub(super) fn become_target(mut self, target: &Path) -> io::Result<()> {
        std::fs::rename(&self.path, target)?;
        self.length = u64::MAX;
        Ok(())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.keep || self.length < WORTH_KEEPING_BYTES {
            // What cannot be removed is said by its name.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: Source = Source {
        size: 10,
        modified: (1, 2),
        inode: 3,
        device: 4,
    };

    #[test]
    fn a_name_says_what_it_is_a_part_of() {
        let plain = name(b"data.bin", &SOURCE);
        assert!(plain.starts_with(b".data.bin."));
        assert!(plain.ends_with(b".soulbox-part"));
        let others = [
            Source { size: 11, ..SOURCE },
            Source {
                modified: (1, 3),
                ..SOURCE
            },
            Source { inode: 4, ..SOURCE },
            Source {
                device: 5,
                ..SOURCE
            },
        ];
        for other in others {
            assert_ne!(name(b"data.bin", &other), plain, "{other:?}");
        }
        let long = name(&[b'x'; 255], &SOURCE);
        assert_eq!(long.len(), MAX_NAME_BYTES);
        assert_ne!(
            long,
            name(&[b'x'; 254], &SOURCE),
            "cut, they are told apart"
        );
    }

    #[test]
    fn only_what_is_worth_it_stays() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("file");
        let big = Source {
            size: u64::MAX,
            ..SOURCE
        };
        let mut part = Part::open(&target, &big, false).unwrap();
        part.length = 5;
        drop(part);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let mut part = Part::open(&target, &big, false).unwrap();
        part.file.set_len(WORTH_KEEPING_BYTES).unwrap();
        part.length = WORTH_KEEPING_BYTES;
        drop(part);
        let mut part = Part::open(&target, &big, false).unwrap();
        assert_eq!(part.length, WORTH_KEEPING_BYTES);
        part.discard();
        drop(part);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
