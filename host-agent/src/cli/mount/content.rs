//! What is in files: opening, reading and writing them.

use std::sync::Arc;

use bytes::Bytes;
use fuser::Errno;
use soulbox_proto::guest::v1::{OpenWrite, WriteResponse, open_write};

use super::attributes::Attributes;
use super::guest::{Changes, Guest, OWNER_WRITES};
use super::handles::{Handle, OpenFile, Wanted, touch};
use super::tree::Stale;

/// How a file is opened.
#[derive(Debug, Clone, Copy)]
pub(super) struct OpenMode {
    pub(super) reads: bool,
    pub(super) writes: bool,
    pub(super) appends: bool,
    pub(super) truncates: bool,
}

// === impl Guest ===

impl Guest {
    /// The handle's number.
    pub(super) async fn open(&self, ino: u64, mode: OpenMode) -> Result<u64, Errno> {
        let (path, asked) = self.path(ino)?;
        if mode.writes {
            self.settle(ino).await?;
            let open = OpenWrite {
                how: open_write::How::InPlace.into(),
                truncate: mode.truncates,
                ..OpenWrite::default()
            };
            let before = self.tree().identity(ino);
            let said = touch(&self.files, &path, open).await?;
            self.wrote(ino, &said);
            // The guest's file was removed, and this made another.
            if before.is_some() && before != self.tree().identity(ino) {
                self.invalidations.send(vec![Stale::Content(ino)]).await;
            }
        }
        let (number, handle) = self.handles.open(ino, mode.appends);
        let is_known = self.tree().is_readable(ino);
        if mode.reads && !mode.writes && !is_known {
            let started = match self.wanted(ino, 0, 0) {
                Ok(wanted) => handle.start_reading(&self.files, &wanted).await,
                Err(error) => Err(error),
            };
            if let Err(error) = started {
                self.close(number).await;
                return Err(error);
            }
            self.tree().set_readable(ino, asked);
        }
        Ok(number)
    }

    /// A handle of a file that this made.
    pub(super) fn open_new(&self, ino: u64, mode: u32, appends: bool) -> u64 {
        let (number, handle) = self.handles.open(ino, appends);
        if mode & OWNER_WRITES == 0 {
            handle.file.set_last_mode(Some(mode & 0o7777));
        }
        number
    }

    pub(super) fn show_last_mode(&self, ino: u64, attributes: &mut Attributes) {
        let mode = self.handles.file(ino).and_then(|file| file.last_mode());
        if let Some(mode) = mode.and_then(|mode| u16::try_from(mode).ok()) {
            attributes.mode = mode;
        }
    }

    fn wanted(&self, ino: u64, offset: u64, size: usize) -> Result<Wanted, Errno> {
        let tree = self.tree();
        Ok(Wanted {
            path: tree.path(ino).ok_or(Errno::ESTALE)?,
            identity: tree.identity(ino).ok_or(Errno::ESTALE)?,
            offset,
            size,
            now: tree.epoch(),
            unchanged_since: tree.changed_at(ino),
        })
    }

    pub(super) async fn read(
        &self,
        number: u64,
        offset: u64,
        size: usize,
    ) -> Result<Vec<u8>, Errno> {
        let handle = self.handle(number)?;
        let ino = handle.file.ino;
        self.settle(ino).await?;
        let wanted = self.wanted(ino, offset, size)?;
        handle.read(&self.files, &wanted).await
    }

    pub(super) async fn write(&self, number: u64, offset: u64, data: Bytes) -> Result<(), Errno> {
        let handle = self.handle(number)?;
        let file = &handle.file;
        file.take_failure()?;
        let (path, _) = self.path(file.ino)?;
        let sent = file
            .write(&self.files, &path, offset, data, handle.appends)
            .await;
        match sent {
            Ok(Some(ended)) => self.wrote(file.ino, &ended),
            Ok(None) => {}
            Err(error) => {
                self.not_written(file.ino).await;
                return Err(error);
            }
        }
        Ok(())
    }

    /// All of it is in the guest, and nothing went wrong.
    pub(super) async fn flush(&self, number: u64) -> Result<(), Errno> {
        let handle = self.handle(number)?;
        self.settle_file(&handle.file).await?;
        handle.file.take_failure()
    }

    pub(super) async fn sync(&self, number: u64) -> Result<(), Errno> {
        self.flush(number).await?;
        let (path, _) = self.path(self.handle(number)?.file.ino)?;
        let open = OpenWrite {
            how: open_write::How::InPlace.into(),
            sync: true,
            ..OpenWrite::default()
        };
        touch(&self.files, &path, open).await.map(drop)
    }

    pub(super) async fn close(&self, number: u64) {
        let Ok(handle) = self.handle(number) else {
            return;
        };
        // Nobody is left to hear of an error: flush came before.
        let _ = self.settle_file(&handle.file).await;
        let Some(file) = self.handles.close(number) else {
            return;
        };
        if file.is_hidden() {
            let _ = self.remove_hidden(&file).await;
        } else if let Some(mode) = file.last_mode() {
            let changes = Changes {
                mode: Some(mode),
                ..Changes::default()
            };
            let _ = self.set(file.ino, changes).await;
        }
    }

    async fn remove_hidden(&self, file: &OpenFile) -> Result<(), Errno> {
        let (path, _) = self.path(file.ino)?;
        self.remove_path(path).await
    }

    /// Before the mount goes: nothing of it is left in the guest.
    pub(super) async fn end(&self) {
        for file in self.handles.files() {
            let _ = self.settle_file(&file).await;
            if file.is_hidden() {
                let _ = self.remove_hidden(&file).await;
            }
        }
    }

    fn handle(&self, number: u64) -> Result<Arc<Handle>, Errno> {
        self.handles.get(number).ok_or(Errno::EBADF)
    }

    /// What was written to it is in the guest. What went wrong is told to those who
    /// wrote, not to who asks now.
    pub(super) async fn settle(&self, ino: u64) -> Result<(), Errno> {
        match self.handles.file(ino) {
            Some(file) => {
                if let Err(error) = self.settle_file(&file).await {
                    file.set_failure(error);
                }
                Ok(())
            }
            None => Ok(()),
        }
    }

    pub(super) async fn settle_file(&self, file: &OpenFile) -> Result<(), Errno> {
        match file.settle().await {
            Ok(Some(said)) => self.wrote(file.ino, &said),
            Ok(None) => {}
            Err(error) => {
                self.not_written(file.ino).await;
                return Err(error);
            }
        }
        Ok(())
    }

    pub(super) async fn settle_all(&self) {
        for file in self.handles.files() {
            if let Err(error) = self.settle_file(&file).await {
                file.set_failure(error);
            }
        }
    }

    /// Files that nobody reads or writes any more.
    pub(super) async fn settle_idle(&self) {
        self.handles.drop_idle();
        for file in self.handles.files() {
            match file.settle_idle().await {
                Some(Ok(said)) => self.wrote(file.ino, &said),
                Some(Err(error)) => {
                    file.set_failure(error);
                    self.not_written(file.ino).await;
                }
                None => {}
            }
        }
    }

    /// The kernel keeps what it wrote, and the guest does not have that.
    async fn not_written(&self, ino: u64) {
        self.tree().touch(ino);
        self.invalidations.send(vec![Stale::Content(ino)]).await;
    }

    fn wrote(&self, ino: u64, said: &WriteResponse) {
        let mut tree = self.tree();
        if let Ok(attributes) = Attributes::try_from(said.entry.clone()) {
            tree.identify(ino, attributes.identity);
        }
        tree.touch(ino);
    }
}
