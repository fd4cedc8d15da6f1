//! The folder of one snapshot. It is made under another name, and renamed when
//! all of it is on disk: there is no torn one.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, SeekFrom};
use rustix::io::Errno;

use super::cold;
use crate::id::SnapshotId;

const STATE: &str = "snapshot";
const MEMORY: &str = "memory";
const COLD_MEMORY: &str = "memory.zst";
const DISK: &str = "disk.0";
const MANIFEST: &str = "manifest.json";
const WORKING_SET: &str = "working_set";
const NEW_WORKING_SET: &str = ".working_set.tmp";

#[derive(Debug, Clone)]
pub struct SnapshotFiles {
    folder: PathBuf,
    draft: PathBuf,
}

/// Open files for the monitor to write.
#[derive(Debug)]
pub struct Draft {
    pub state: File,
    pub memory: File,
    /// Where the disk's layers become one; none when the top one is frozen as it is.
    pub merged: Option<File>,
}

/// What the files of a sealed snapshot take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sizes {
    pub memory_bytes: u64,
    pub disk_bytes: u64,
}

/// Completes the sentence "The snapshot's file … {}".
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    #[error("is missing")]
    Missing { file: &'static str },
    #[error("cannot be opened ({source})")]
    Unreadable {
        file: &'static str,
        source: io::Error,
    },
    #[error("is compressed")]
    Cold,
    #[error("cannot be unpacked ({source})")]
    Thaw { source: io::Error },
}

// === impl SnapshotFiles ===

impl SnapshotFiles {
    pub(super) fn new(snapshots: &Path, id: &SnapshotId) -> Self {
        Self {
            folder: snapshots.join(id.as_str()),
            draft: snapshots.join(format!(".{id}.tmp")),
        }
    }

    /// The snapshot that a folder's name belongs to, also a temporary one.
    pub fn id_of(name: &str) -> Option<SnapshotId> {
        let id = name
            .strip_prefix('.')
            .and_then(|rest| rest.strip_suffix(".tmp"))
            .unwrap_or(name);
        id.parse().ok()
    }

    /// Whether all of it is there under its own name.
    pub fn is_sealed(&self) -> bool {
        self.folder.join(MANIFEST).is_file()
    }

    /// Makes the folder under its temporary name. `top` is the layer that the
    /// disk writes to now: it is frozen as it is, or else merged into a new file.
    pub fn begin(&self, top: Option<&Path>) -> io::Result<Draft> {
        remove(&self.draft)?;
        DirBuilder::new().mode(0o700).create(&self.draft)?;
        let file = |name: &str| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(self.draft.join(name))
        };
        let merged = match top {
            Some(top) => {
                fs::hard_link(top, self.draft.join(DISK))?;
                None
            }
            None => Some(file(DISK)?),
        };
        Ok(Draft {
            state: file(STATE)?,
            memory: file(MEMORY)?,
            merged,
        })
    }

    /// A folder whose state is that of `other`, and which has no layers.
    pub fn begin_copy(&self, other: &Self) -> io::Result<()> {
        remove(&self.draft)?;
        DirBuilder::new().mode(0o700).create(&self.draft)?;
        fs::hard_link(other.folder.join(STATE), self.draft.join(STATE))
    }

    /// Makes the folder durable and gives it its name.
    pub fn seal(&self, manifest: &str, compress: bool) -> io::Result<Sizes> {
        if compress && self.draft.join(MEMORY).exists() {
            cold::compress(&self.draft.join(MEMORY), &self.draft.join(COLD_MEMORY))?;
            fs::remove_file(self.draft.join(MEMORY))?;
        }
        fs::write(self.draft.join(MANIFEST), manifest)?;
        self.rename_draft()?;
        Ok(self.sizes())
    }

    /// What it takes now.
    pub fn sizes(&self) -> Sizes {
        let of = |name: &str| allocated(&self.folder.join(name));
        Sizes {
            memory_bytes: of(MEMORY) + of(COLD_MEMORY),
            disk_bytes: of(DISK),
        }
    }

    /// Keeps the disk layer only, under the folder's own name; it need not have
    /// been sealed. Returns what that takes.
    pub fn keep_layer(&self) -> io::Result<u64> {
        let folder = if self.draft.exists() {
            &self.draft
        } else {
            &self.folder
        };
        // The manifest first: without it the folder is no snapshot.
        for name in [MANIFEST, STATE, MEMORY, COLD_MEMORY, WORKING_SET] {
            absent_is_fine(fs::remove_file(folder.join(name)))?;
        }
        let disk_bytes = allocated(&folder.join(DISK));
        if self.draft.exists() {
            self.rename_draft()?;
        }
        Ok(disk_bytes)
    }

    fn rename_draft(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.draft)? {
            File::open(entry?.path())?.sync_all()?;
        }
        File::open(&self.draft)?.sync_all()?;
        fs::rename(&self.draft, &self.folder)?;
        let parent = self.folder.parent().unwrap_or(Path::new("/"));
        File::open(parent)?.sync_all()
    }

    /// Removes all of it, also what has its temporary name. That it is gone
    /// already is fine.
    pub fn remove(&self) -> io::Result<()> {
        remove(&self.draft)?;
        remove(&self.folder)
    }

    pub fn open_state(&self) -> Result<File, LayerError> {
        self.open(STATE)
    }

    /// What its machines touch first, where that has been recorded.
    pub fn open_working_set(&self) -> Option<File> {
        File::open(self.folder.join(WORKING_SET)).ok()
    }

    /// An empty file to record that into; [`Self::keep_working_set`] gives it its
    /// name.
    pub fn new_working_set(&self) -> io::Result<File> {
        let path = self.folder.join(NEW_WORKING_SET);
        absent_is_fine(fs::remove_file(&path))?;
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
    }

    /// It need not be durable: one that is torn is left out of restores.
    pub fn keep_working_set(&self) -> io::Result<()> {
        let new = self.folder.join(NEW_WORKING_SET);
        fs::rename(new, self.folder.join(WORKING_SET))
    }

    /// Takes the memory layer out of the page cache, as far as nobody has mapped it.
    pub fn evict_memory(&self) -> io::Result<()> {
        let memory = File::open(self.folder.join(MEMORY))?;
        Ok(rustix::fs::fadvise(&memory, 0, None, Advice::DontNeed)?)
    }

    /// Reads the memory layer into the page cache, but not its holes. With read(2)
    /// it comes in as large folios, which are mapped at once.
    pub fn cache_memory(&self) -> io::Result<()> {
        let memory = File::open(self.folder.join(MEMORY))?;
        let mut piece = vec![0; 1 << 20];
        let mut hole = 0;
        loop {
            let data = match rustix::fs::seek(&memory, SeekFrom::Data(hole)) {
                // There is no more.
                Err(Errno::NXIO) => return Ok(()),
                found => found?,
            };
            hole = rustix::fs::seek(&memory, SeekFrom::Hole(data))?;
            let mut at = data;
            while at < hole {
                let want = piece
                    .len()
                    .min(usize::try_from(hole - at).unwrap_or(usize::MAX));
                match memory.read_at(&mut piece[..want], at)? {
                    0 => return Ok(()),
                    count => at += count as u64,
                }
            }
        }
    }

    pub fn open_disk(&self) -> Result<File, LayerError> {
        self.open(DISK)
    }

    pub fn open_memory(&self) -> Result<File, LayerError> {
        match self.open(MEMORY) {
            Err(LayerError::Missing { .. }) if self.folder.join(COLD_MEMORY).exists() => {
                Err(LayerError::Cold)
            }
            opened => opened,
        }
    }

    /// Unpacks compressed memory, and returns it with what it takes.
    pub fn thaw(&self) -> Result<(File, u64), LayerError> {
        match self.open_memory() {
            // Somebody was faster.
            Ok(memory) => return Ok((memory, allocated(&self.folder.join(MEMORY)))),
            Err(LayerError::Cold) => {}
            Err(error) => return Err(error),
        }
        let (from, to) = (self.folder.join(COLD_MEMORY), self.folder.join(MEMORY));
        let unpacked = self.folder.join(".memory.tmp");
        let thawed = cold::unpack(&from, &unpacked)
            .and_then(|()| fs::rename(&unpacked, &to))
            .and_then(|()| File::open(&self.folder)?.sync_all())
            .and_then(|()| fs::remove_file(&from));
        if let Err(source) = thawed {
            // What is left of it is only in the way.
            let _ = fs::remove_file(&unpacked);
            return Err(LayerError::Thaw { source });
        }
        Ok((self.open(MEMORY)?, allocated(&to)))
    }

    fn open(&self, file: &'static str) -> Result<File, LayerError> {
        File::open(self.folder.join(file)).map_err(|source| match source.kind() {
            ErrorKind::NotFound => LayerError::Missing { file },
            _ => LayerError::Unreadable { file, source },
        })
    }
}

// === impl LayerError ===

impl LayerError {
    pub fn file(&self) -> &'static str {
        match self {
            Self::Missing { file } | Self::Unreadable { file, .. } => file,
            Self::Cold | Self::Thaw { .. } => COLD_MEMORY,
        }
    }
}

fn allocated(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.blocks() * 512)
}

fn remove(folder: &Path) -> io::Result<()> {
    absent_is_fine(fs::remove_dir_all(folder))
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::fs::FileExt as _;

    use super::*;

    fn files(folder: &Path) -> SnapshotFiles {
        SnapshotFiles::new(folder, &SnapshotId::random().unwrap())
    }

    #[test]
    fn it_has_no_name_until_it_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let top = folder.path().join("root.0.layer");
        fs::write(&top, "frozen").unwrap();
        let files = files(folder.path());
        // What an earlier try left is no hindrance.
        files.begin(Some(&top)).unwrap();
        let mut draft = files.begin(Some(&top)).unwrap();
        assert!(draft.merged.is_none());
        draft.state.write_all(b"state").unwrap();
        draft.memory.write_all_at(b"page", 1 << 20).unwrap();
        assert!(!files.is_sealed());
        assert!(matches!(
            files.open_state(),
            Err(LayerError::Missing { file: "snapshot" })
        ));
        let sizes = files.seal("{}", false).unwrap();
        assert!(files.is_sealed() && sizes.disk_bytes > 0);
        assert!((1..1 << 20).contains(&sizes.memory_bytes), "{sizes:?}");
        fs::remove_file(&top).unwrap();
        let mut frozen = String::new();
        files
            .open_disk()
            .unwrap()
            .read_to_string(&mut frozen)
            .unwrap();
        assert_eq!(frozen, "frozen");
        let name = files.folder.file_name().unwrap().to_str().unwrap();
        assert!(SnapshotFiles::id_of(name).is_some());
        let name = files.draft.file_name().unwrap().to_str().unwrap();
        assert!(SnapshotFiles::id_of(name).is_some());
        assert!(SnapshotFiles::id_of("README").is_none());
        files.keep_layer().unwrap();
        assert!(files.open_state().is_err() && files.open_disk().is_ok());
        files.remove().unwrap();
        files.remove().unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn cold_memory_comes_back_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let files = files(folder.path());
        let draft = files.begin(None).unwrap();
        draft.merged.unwrap().write_all(b"merged").unwrap();
        draft.memory.set_len(64 << 20).unwrap();
        draft.memory.write_all_at(&[7; 5000], 4096).unwrap();
        draft.memory.write_all_at(b"end", (64 << 20) - 3).unwrap();
        let sizes = files.seal("{}", true).unwrap();
        assert!(sizes.memory_bytes < 64 << 10, "{sizes:?}");
        assert!(matches!(files.open_memory(), Err(LayerError::Cold)));
        let (memory, allocated_bytes) = files.thaw().unwrap();
        assert_eq!(memory.metadata().unwrap().len(), 64 << 20);
        assert!(allocated_bytes < 1 << 20, "{allocated_bytes}");
        let mut bytes = [0; 5001];
        memory.read_exact_at(&mut bytes, 4096).unwrap();
        assert_eq!((bytes[0], bytes[4999], bytes[5000]), (7, 7, 0));
        memory
            .read_exact_at(&mut bytes[..3], (64 << 20) - 3)
            .unwrap();
        assert_eq!(&bytes[..3], b"end");
        assert!(files.open_memory().is_ok() && files.thaw().is_ok());
        assert!(!files.folder.join(COLD_MEMORY).exists());
    }

    #[test]
    fn damaged_cold_memory_is_an_error_and_stays() {
        let folder = tempfile::tempdir().unwrap();
        let files = files(folder.path());
        files.begin(None).unwrap();
        files.seal("{}", true).unwrap();
        fs::write(files.folder.join(COLD_MEMORY), "no frame").unwrap();
        assert!(matches!(files.thaw(), Err(LayerError::Thaw { .. })));
        assert!(matches!(files.open_memory(), Err(LayerError::Cold)));
    }
}
