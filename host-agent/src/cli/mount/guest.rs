//! What the kernel asks of the mount, asked of the guest.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use fuser::{Errno, FileType};
use prost_types::Timestamp;
use soulbox_proto::guest::v1::metrics_service_client::MetricsServiceClient;
use soulbox_proto::guest::v1::{
    Entry, GetMetricsRequest, GetXattrsRequest, GuestDisk, MakeDirectoryRequest,
    MakeSymlinkRequest, MoveRequest, OpenWrite, RemoveRequest, SetAttributesRequest,
    SetXattrRequest, StatRequest, Xattr, open_write,
};
use tonic::Status;

use super::attributes::Attributes;
use super::errno::errno;
use super::handles::{Handles, OpenFile, touch};
use super::invalidate::Invalidations;
use super::listing::Part;
use super::tree::{Epoch, Tree};
use crate::cli::connect;
use crate::cli::place::{Files, answer};

/// Its owner may write.
pub(super) const OWNER_WRITES: u32 = 0o200;
/// While a removed file is open it has such a name, as under libfuse.
const HIDDEN: &str = ".fuse_hidden-";

/// One mounted directory of one sandbox.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) files: Files,
    /// On a connection of its own: events that wait for the kernel to drop something
    /// must not hold up the answer that the kernel waits for.
    pub(super) watched: Files,
    metrics: MetricsServiceClient<connect::Guest>,
    pub(super) base: Bytes,
    tree: Mutex<Tree>,
    pub(super) handles: Handles,
    pub(super) invalidations: Invalidations,
}

/// A file by its name, as the guest told it.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) parent: u64,
    pub(super) name: Bytes,
    pub(super) attributes: Attributes,
    pub(super) asked: Epoch,
}

/// An open file that has lost its name.
struct Hidden {
    file: Arc<OpenFile>,
    name: Bytes,
}

/// What is to be set; the rest stays.
#[derive(Debug, Default)]
pub(super) struct Changes {
    pub(super) mode: Option<u32>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) size: Option<u64>,
    pub(super) accessed: Option<SystemTime>,
    pub(super) modified: Option<SystemTime>,
}

// === impl Guest ===

impl Guest {
    pub(super) fn new(
        [files, watched]: [Files; 2],
        metrics: MetricsServiceClient<connect::Guest>,
        base: Bytes,
        root: &Attributes,
        invalidations: Invalidations,
    ) -> Self {
        Self {
            files,
            watched,
            metrics,
            tree: Mutex::new(Tree::new(base.clone(), root)),
            base,
            handles: Handles::default(),
            invalidations,
        }
    }

    pub(super) fn tree(&self) -> MutexGuard<'_, Tree> {
        self.tree.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn path(&self, ino: u64) -> Result<(Bytes, Epoch), Errno> {
        let tree = self.tree();
        let path = tree.path(ino).ok_or(Errno::ESTALE)?;
        Ok((path, tree.epoch()))
    }

    fn child_path(&self, parent: u64, name: &[u8]) -> Result<(Bytes, Epoch), Errno> {
        let tree = self.tree();
        let path = tree.child_path(parent, name);
        // The directory has a name, but not one that leaves room for this.
        let error = match tree.path(parent) {
            Some(_) => Errno::ENAMETOOLONG,
            None => Errno::ESTALE,
        };
        Ok((path.ok_or(error)?, tree.epoch()))
    }

    // --- what is there

    pub(super) async fn look_up(&self, parent: u64, name: Bytes) -> Result<Found, Errno> {
        let (path, asked) = self.child_path(parent, &name)?;
        let known = self.tree().child(parent, &name);
        if let Some(ino) = known {
            self.settle(ino).await?;
        }
        let attributes = self.stat(path, false).await?;
        Ok(Found {
            parent,
            name,
            attributes,
            asked,
        })
    }

    pub(super) async fn attributes(&self, ino: u64) -> Result<(Attributes, Epoch), Errno> {
        self.settle(ino).await?;
        let kept = self.tree().attributes(ino);
        if let Some(kept) = kept {
            return Ok(kept);
        }
        let (path, asked) = self.path(ino)?;
        let mut attributes = self.stat(path, ino == super::tree::ROOT).await?;
        let known = self.tree().identity(ino);
        if ino != super::tree::ROOT && known != Some(attributes.identity) {
            // Another file has its name now: the kernel looks that up anew.
            return Err(Errno::ESTALE);
        }
        self.show_last_mode(ino, &mut attributes);
        Ok((attributes, asked))
    }

    async fn stat(&self, path: Bytes, follow: bool) -> Result<Attributes, Errno> {
        let request = StatRequest {
            path: self.files.path(path),
            follow,
        };
        let mut client = self.files.client.clone();
        let said = answer(client.stat(request)).await;
        told(said.map_err(|status| errno(&status))?.entry)
    }

    pub(super) async fn target(&self, ino: u64) -> Result<Bytes, Errno> {
        let kept = self.tree().attributes(ino);
        let target = match kept {
            Some((attributes, _)) => attributes.target,
            None => {
                let (path, _) = self.path(ino)?;
                let attributes = self.stat(path, false).await?;
                if attributes.identity.kind != FileType::Symlink {
                    return Err(Errno::EINVAL);
                }
                attributes.target
            }
        };
        match target.is_empty() {
            true => Err(Errno::EIO),
            false => Ok(target),
        }
    }

    /// Entries of a directory that is being read, from `at`.
    pub(super) async fn list(&self, number: u64, at: usize) -> Result<Part, Errno> {
        let reading = self.handles.directory(number).ok_or(Errno::EBADF)?;
        let ino = reading.ino;
        let (path, now) = self.path(ino)?;
        let kept = self.tree().listing(ino);
        if let Some(kept) = kept {
            let rest = kept.get(at..).unwrap_or_default();
            return Ok(Part {
                entries: rest[..rest.len().min(super::listing::PART)].to_vec(),
                asked: now,
                whole: None,
            });
        }
        self.settle_all().await;
        let part = reading.part(&self.files, &path, now, at).await?;
        if let Some(whole) = &part.whole {
            self.tree().keep_listing(ino, whole, part.asked);
        }
        Ok(part)
    }

    /// Of the filesystem that is mounted, as well as it is known.
    pub(super) async fn disk(&self) -> Option<GuestDisk> {
        let mut metrics = self.metrics.clone();
        let request = GetMetricsRequest { processes: 0 };
        let disks = answer(metrics.get_metrics(request)).await.ok()?.disks;
        let is_above = |disk: &GuestDisk| {
            disk.mount_point.as_ref() == b"/"
                || self
                    .base
                    .strip_prefix(disk.mount_point.as_ref())
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
        };
        let above = disks.into_iter().filter(is_above);
        above.max_by_key(|disk| disk.mount_point.len())
    }

    // --- what changes

    pub(super) async fn set(
        &self,
        ino: u64,
        changes: Changes,
    ) -> Result<(Attributes, Epoch), Errno> {
        self.settle(ino).await?;
        let (path, asked) = self.path(ino)?;
        if let Some(file) = self.handles.file(ino)
            && changes.mode.is_some()
        {
            // Set by hand now.
            file.set_last_mode(None);
        }
        let request = SetAttributesRequest {
            path: self.files.path(path),
            mode: changes.mode.map(|mode| mode & 0o7777),
            uid: changes.uid,
            gid: changes.gid,
            modify_time: changes.modified.map(timestamp),
            access_time: changes.accessed.map(timestamp),
            size_bytes: changes.size,
            follow: false,
        };
        let mut client = self.files.client.clone();
        let said = answer(client.set_attributes(request)).await;
        let mut attributes = told(said.map_err(|status| errno(&status))?.entry)?;
        self.show_last_mode(ino, &mut attributes);
        let mut tree = self.tree();
        tree.identify(ino, attributes.identity);
        tree.touch(ino);
        Ok((attributes, asked))
    }

    pub(super) async fn make_directory(
        &self,
        parent: u64,
        name: Bytes,
        mode: u32,
    ) -> Result<Found, Errno> {
        let (path, asked) = self.child_path(parent, &name)?;
        let request = MakeDirectoryRequest {
            path: self.files.path(path),
            parents: false,
            mode: Some(mode & 0o7777),
        };
        let mut client = self.files.client.clone();
        let said = answer(client.make_directory(request)).await;
        self.made(parent, name, said.map(|said| said.entry), asked)
    }

    pub(super) async fn make_symlink(
        &self,
        parent: u64,
        name: Bytes,
        target: Bytes,
    ) -> Result<Found, Errno> {
        let (path, asked) = self.child_path(parent, &name)?;
        let request = MakeSymlinkRequest {
            path: self.files.path(path),
            target,
        };
        let mut client = self.files.client.clone();
        let said = answer(client.make_symlink(request)).await;
        self.made(parent, name, said.map(|said| said.entry), asked)
    }

    /// A regular file, with nothing in it.
    pub(super) async fn make_file(
        &self,
        parent: u64,
        name: Bytes,
        mode: u32,
        exclusive: bool,
    ) -> Result<Found, Errno> {
        let (path, asked) = self.child_path(parent, &name)?;
        let open = OpenWrite {
            how: match exclusive {
                true => open_write::How::Create,
                false => open_write::How::InPlace,
            }
            .into(),
            // It is opened again for each stream of writes.
            mode: Some((mode & 0o7777) | OWNER_WRITES),
            ..OpenWrite::default()
        };
        let said = touch(&self.files, &path, open).await?;
        self.made(parent, name, Ok(said.entry), asked)
    }

    fn made(
        &self,
        parent: u64,
        name: Bytes,
        said: Result<Option<Entry>, Status>,
        asked: Epoch,
    ) -> Result<Found, Errno> {
        let attributes = told(said.map_err(|status| errno(&status))?)?;
        self.tree().touch(parent);
        Ok(Found {
            parent,
            name,
            attributes,
            asked,
        })
    }

    pub(super) async fn remove(&self, parent: u64, name: Bytes) -> Result<(), Errno> {
        if self.hide(parent, &name).await?.is_some() {
            return Ok(());
        }
        let (path, _) = self.child_path(parent, &name)?;
        self.remove_path(path).await?;
        let mut tree = self.tree();
        tree.detach(parent, &name);
        tree.touch(parent);
        Ok(())
    }

    pub(super) async fn remove_path(&self, path: Bytes) -> Result<(), Errno> {
        let request = RemoveRequest {
            path: self.files.path(path),
            recursive: false,
            missing_ok: false,
        };
        let mut client = self.files.client.clone();
        let said = answer(client.remove(request)).await;
        said.map(drop).map_err(|status| errno(&status))
    }

    /// A file that is open keeps a name until it is closed, which is this: the guest
    /// knows it by nothing else.
    async fn hide(&self, parent: u64, name: &Bytes) -> Result<Option<Hidden>, Errno> {
        let known = self.tree().child(parent, name);
        let Some(file) = known.and_then(|ino| self.handles.file(ino)) else {
            return Ok(None);
        };
        self.settle(file.ino).await?;
        let (ino, process) = (file.ino, std::process::id());
        let hidden = Bytes::from(format!("{HIDDEN}{ino:x}-{process:x}"));
        let (from, _) = self.child_path(parent, name)?;
        let (to, _) = self.child_path(parent, &hidden)?;
        self.move_path(from, to, true, false).await?;
        file.set_hidden(true);
        let mut tree = self.tree();
        tree.rename((parent, name), (parent, &hidden));
        tree.touch(parent);
        Ok(Some(Hidden { file, name: hidden }))
    }

    /// What was to take its place did not come.
    async fn show(&self, parent: u64, name: &Bytes, hidden: Hidden) -> Result<(), Errno> {
        let (from, _) = self.child_path(parent, &hidden.name)?;
        let (to, _) = self.child_path(parent, name)?;
        self.move_path(from, to, false, false).await?;
        hidden.file.set_hidden(false);
        let mut tree = self.tree();
        tree.rename((parent, &hidden.name), (parent, name));
        tree.touch(parent);
        Ok(())
    }

    pub(super) async fn rename(
        &self,
        from: (u64, Bytes),
        to: (u64, Bytes),
        replace: bool,
        exchange: bool,
    ) -> Result<(), Errno> {
        self.settle_all().await;
        let mut hidden = None;
        if replace && !exchange && from != to {
            hidden = self.hide(to.0, &to.1).await?;
        }
        let (from_path, asked) = self.child_path(from.0, &from.1)?;
        let (to_path, _) = self.child_path(to.0, &to.1)?;
        let moved = self.move_path(from_path, to_path, replace, exchange).await;
        if let (Err(_), Some(hidden)) = (&moved, hidden) {
            self.show(to.0, &to.1, hidden).await?;
        }
        moved?;
        let stale = {
            let mut tree = self.tree();
            let seen_meanwhile = tree.epoch() != asked;
            match exchange {
                true => tree.exchange((from.0, &from.1), (to.0, &to.1)),
                false => tree.rename((from.0, &from.1), (to.0, &to.1)),
            }
            tree.touch(from.0);
            tree.touch(to.0);
            let moved = [tree.child(to.0, &to.1), tree.child(from.0, &from.1)];
            let mut stale = Vec::new();
            // An event may have told of them by a name that they did not have yet.
            for ino in moved.into_iter().flatten().filter(|_| seen_meanwhile) {
                stale.extend(tree.forget_all_of(ino));
            }
            stale
        };
        self.invalidations.send(stale).await;
        Ok(())
    }

    async fn move_path(
        &self,
        from: Bytes,
        to: Bytes,
        replace: bool,
        exchange: bool,
    ) -> Result<(), Errno> {
        let request = MoveRequest {
            from: self.files.path(from),
            to: self.files.path(to),
            replace: replace && !exchange,
            exchange,
        };
        let mut client = self.files.client.clone();
        // "move" is a word of Rust.
        let said = answer(client.r#move(request)).await;
        said.map(drop).map_err(|status| errno(&status))
    }

    // --- extended attributes

    pub(super) async fn xattrs(&self, ino: u64) -> Result<Vec<Xattr>, Errno> {
        let (path, _) = self.path(ino)?;
        let request = GetXattrsRequest {
            path: self.files.path(path),
            follow: false,
        };
        let mut client = self.files.client.clone();
        let said = answer(client.get_xattrs(request)).await;
        Ok(said.map_err(|status| errno(&status))?.xattrs)
    }

    /// None removes it.
    pub(super) async fn set_xattr(
        &self,
        ino: u64,
        name: Bytes,
        value: Option<Bytes>,
    ) -> Result<(), Errno> {
        let (path, _) = self.path(ino)?;
        let request = SetXattrRequest {
            path: self.files.path(path),
            name,
            value,
            follow: false,
        };
        let mut client = self.files.client.clone();
        let said = answer(client.set_xattr(request)).await;
        said.map_err(|status| errno(&status))?;
        self.tree().touch(ino);
        Ok(())
    }
}

fn told(entry: Option<Entry>) -> Result<Attributes, Errno> {
    Attributes::try_from(entry).map_err(|_| Errno::EIO)
}

fn timestamp(time: SystemTime) -> Timestamp {
    Timestamp::from(time)
}
