//! Packing a tree of this host.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read as _, Write};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use soulbox_proto::archive::{Kind, Member, append_end, append_header, append_padding};

use super::progress::Progress;

const CHUNK_BYTES: usize = 256 * 1024;

#[derive(Debug, thiserror::Error)]
pub(crate) enum PackError {
    #[error("{path} cannot be read ({source}); see who may read it, and copy again")]
    Read { path: PathBuf, source: io::Error },
    /// The other end says why.
    #[error("the sandbox takes no more of it")]
    Send(#[source] io::Error),
}

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Packed {
    pub(super) entries: u64,
    pub(super) file_bytes: u64,
    /// Devices, pipes and sockets.
    pub(super) left_out: u64,
    /// Files that had another size in the end.
    pub(super) changed: Vec<PathBuf>,
}

struct Packer<'a, W> {
    writer: W,
    root: &'a Path,
    progress: &'a Progress,
    done: Packed,
    /// Headers and such on their way.
    blocks: Vec<u8>,
    buffer: Vec<u8>,
}

/// What is in `root`, not itself. Links stay links.
pub(super) fn pack<W: Write>(
    root: &Path,
    writer: W,
    progress: &Progress,
) -> Result<(Packed, W), PackError> {
    let mut packer = Packer {
        writer,
        root,
        progress,
        done: Packed::default(),
        blocks: Vec::new(),
        buffer: vec![0; CHUNK_BYTES],
    };
    // A directory is followed by what is in it: who unpacks that is done with the
    // directory then, and can give it its mode and time.
    let mut left = vec![packer.inner(Path::new(""))?];
    while let Some(inner) = left.last_mut() {
        match inner.pop() {
            Some(path) if packer.member(&path)? => left.push(packer.inner(&path)?),
            Some(_) => {}
            None => drop(left.pop()),
        }
    }
    packer.write(append_end)?;
    Ok((packer.done, packer.writer))
}

// === impl Packer ===

impl<W: Write> Packer<'_, W> {
    /// What is in a directory.
    fn inner(&self, path: &Path) -> Result<Vec<PathBuf>, PackError> {
        let full = self.root.join(path);
        let entries = std::fs::read_dir(&full).and_then(|entries| {
            entries
                .map(|entry| Ok(path.join(entry?.file_name())))
                .collect()
        });
        entries.map_err(|source| PackError::Read { path: full, source })
    }

    /// True: it is a directory.
    fn member(&mut self, path: &Path) -> Result<bool, PackError> {
        let full = self.root.join(path);
        let failed = |source| PackError::Read {
            path: full.clone(),
            source,
        };
        let found = match full.symlink_metadata() {
            // Removed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            found => found.map_err(failed)?,
        };
        let kind = match found.file_type() {
            kind if kind.is_file() => return self.file(path, &full).map(|()| false),
            kind if kind.is_dir() => Kind::Directory,
            kind if kind.is_symlink() => Kind::Symlink,
            _ => {
                self.done.left_out += 1;
                return Ok(false);
            }
        };
        let target = match kind {
            Kind::Symlink => std::fs::read_link(&full).map_err(failed)?,
            _ => PathBuf::new(),
        };
        let mut member = described(kind, path, &found);
        member.target = target.into_os_string().into_vec();
        self.write(|blocks| append_header(blocks, &member))?;
        self.done.entries += 1;
        self.progress.entry();
        Ok(kind == Kind::Directory)
    }

    fn file(&mut self, path: &Path, full: &Path) -> Result<(), PackError> {
        let failed = |source| PackError::Read {
            path: full.to_owned(),
            source,
        };
        let mut file = match open(full) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            file => file.map_err(failed)?,
        };
        let found = file.metadata().map_err(failed)?;
        if !found.is_file() {
            self.done.left_out += 1;
            return Ok(());
        }
        let member = described(Kind::File, path, &found);
        self.write(|blocks| append_header(blocks, &member))?;
        let mut left = member.size;
        while left > 0 {
            let room = usize::try_from(left).unwrap_or(usize::MAX).min(CHUNK_BYTES);
            let count = file.read(&mut self.buffer[..room]).map_err(failed)?;
            if count == 0 {
                // What was told must follow.
                let rest = io::copy(&mut io::repeat(0).take(left), &mut self.writer);
                rest.map_err(PackError::Send)?;
                break;
            }
            self.writer
                .write_all(&self.buffer[..count])
                .map_err(PackError::Send)?;
            left -= count as u64;
        }
        let is_whole = left == 0 && file.read(&mut [0]).map_err(failed)? == 0;
        if !is_whole {
            self.done.changed.push(full.to_owned());
        }
        self.write(|blocks| append_padding(blocks, member.size))?;
        self.done.entries += 1;
        self.done.file_bytes += member.size;
        self.progress.entry();
        Ok(())
    }

    fn write(&mut self, append: impl FnOnce(&mut Vec<u8>)) -> Result<(), PackError> {
        self.blocks.clear();
        append(&mut self.blocks);
        self.writer.write_all(&self.blocks).map_err(PackError::Send)
    }
}

/// Not one that has become a link or a pipe meanwhile.
fn open(path: &Path) -> io::Result<File> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    OpenOptions::new().read(true).custom_flags(flags).open(path)
}

fn described(kind: Kind, path: &Path, found: &Metadata) -> Member {
    Member {
        kind,
        path: path.as_os_str().as_bytes().to_vec(),
        target: Vec::new(),
        size: if kind == Kind::File { found.size() } else { 0 },
        mode: found.mode() & 0o7777,
        uid: found.uid().into(),
        gid: found.gid().into(),
        // As the agent's own: a fraction takes 1 KiB for each file.
        modified: (found.mtime(), 0),
    }
}
