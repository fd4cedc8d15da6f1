//! Requests of the kernel, each answered by a task of its own. The thread that reads
//! them never waits.

use std::ffi::OsStr;
use std::future::Future;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use fuser::{
    BsdFileFlags, Errno, FileHandle, FileType, Filesystem, FopenFlags, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs,
    ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::answers::{OWN_ENTRIES, attributes, created, empty, entries, entry, nothing, xattr};
use super::content::OpenMode;
use super::guest::{Changes, Guest};
use super::listing::Reading;
use super::tree::ROOT;

/// Of one request of the kernel.
const MAX_WRITE_BYTES: u32 = 1 << 20;
/// Reads ahead that may be under way.
const MAX_BACKGROUND: u16 = 64;
/// Where the guest tells nothing of its disk: room, so that programs try.
const UNKNOWN_BLOCKS: u64 = 1 << 30;
const BLOCK_BYTES: u32 = 4096;
const MAX_NAME_BYTES: u32 = 255;

/// What would make the kernel faster, where it knows it.
const WANTED: [InitFlags; 5] = [
    InitFlags::FUSE_DO_READDIRPLUS,
    InitFlags::FUSE_READDIRPLUS_AUTO,
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_ATOMIC_O_TRUNC,
    // Without a watch, a file is compared by its time of change each time it is read.
    InitFlags::FUSE_AUTO_INVAL_DATA,
];

pub(super) struct Mounted {
    guest: Arc<Guest>,
    runtime: Handle,
    /// Told when the kernel has let go.
    ended: Mutex<Option<oneshot::Sender<()>>>,
}

// === impl Mounted ===

impl Mounted {
    pub(super) fn new(guest: Arc<Guest>, runtime: Handle) -> (Self, oneshot::Receiver<()>) {
        let (ended, told) = oneshot::channel();
        let mounted = Self {
            guest,
            runtime,
            ended: Mutex::new(Some(ended)),
        };
        (mounted, told)
    }

    fn answer<F>(&self, answer: impl FnOnce(Arc<Guest>) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.runtime.spawn(answer(Arc::clone(&self.guest)));
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let ended = self.ended.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Some(ended) = ended.take() {
            // Nobody waits where the mount is being taken down.
            let _ = ended.send(());
        }
    }
}

impl Filesystem for Mounted {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        for flag in WANTED {
            // An older kernel does without.
            let _ = config.add_capabilities(flag);
        }
        let _ = config.set_max_write(MAX_WRITE_BYTES);
        let _ = config.set_max_background(MAX_BACKGROUND);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let name = bytes(name);
        self.answer(async move |guest| {
            let asked = guest.tree().epoch();
            match guest.look_up(parent.0, name.clone()).await {
                Ok(found) => entry(&guest, &found, reply),
                Err(error) if error == Errno::ENOENT => {
                    nothing(&guest, parent.0, &name, asked, reply);
                }
                Err(error) => reply.error(error),
            }
        });
    }

    fn forget(&self, _request: &Request, ino: INodeNo, lookups: u64) {
        self.guest.tree().forget(ino.0, lookups);
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        self.answer(async move |guest| {
            let told = guest.attributes(ino.0).await;
            attributes(&guest, ino.0, told, reply);
        });
    }

    fn setattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        accessed: Option<TimeOrNow>,
        modified: Option<TimeOrNow>,
        _changed: Option<SystemTime>,
        _handle: Option<FileHandle>,
        _created: Option<SystemTime>,
        _changed_too: Option<SystemTime>,
        _backed_up: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let changes = Changes {
            mode,
            uid,
            gid,
            size,
            accessed: accessed.map(time),
            modified: modified.map(time),
        };
        self.answer(async move |guest| {
            let told = guest.set(ino.0, changes).await;
            attributes(&guest, ino.0, told, reply);
        });
    }

    fn readlink(&self, _request: &Request, ino: INodeNo, reply: ReplyData) {
        self.answer(async move |guest| match guest.target(ino.0).await {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(error),
        });
    }

    fn mknod(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        _device: u32,
        reply: ReplyEntry,
    ) {
        if mode & libc::S_IFMT != libc::S_IFREG {
            return reply.error(Errno::EPERM);
        }
        let (name, mode) = (bytes(name), mode & !umask);
        self.answer(
            async move |guest| match guest.make_file(parent.0, name, mode, true).await {
                Ok(found) => entry(&guest, &found, reply),
                Err(error) => reply.error(error),
            },
        );
    }

    fn mkdir(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        let (name, mode) = (bytes(name), mode & !umask);
        self.answer(
            async move |guest| match guest.make_directory(parent.0, name, mode).await {
                Ok(found) => entry(&guest, &found, reply),
                Err(error) => reply.error(error),
            },
        );
    }

    fn unlink(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = bytes(name);
        self.answer(async move |guest| empty(guest.remove(parent.0, name).await, reply));
    }

    fn rmdir(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let name = bytes(name);
        self.answer(async move |guest| empty(guest.remove(parent.0, name).await, reply));
    }

    fn symlink(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let (name, target) = (bytes(name), bytes(target.as_os_str()));
        self.answer(
            async move |guest| match guest.make_symlink(parent.0, name, target).await {
                Ok(found) => entry(&guest, &found, reply),
                Err(error) => reply.error(error),
            },
        );
    }

    fn rename(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        new_parent: INodeNo,
        new_name: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let known = RenameFlags::RENAME_NOREPLACE | RenameFlags::RENAME_EXCHANGE;
        if !known.contains(flags) {
            return reply.error(Errno::EINVAL);
        }
        let replace = !flags.contains(RenameFlags::RENAME_NOREPLACE);
        let exchange = flags.contains(RenameFlags::RENAME_EXCHANGE);
        let from = (parent.0, bytes(name));
        let to = (new_parent.0, bytes(new_name));
        self.answer(async move |guest| {
            empty(guest.rename(from, to, replace, exchange).await, reply);
        });
    }

    fn open(&self, _request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let mode = open_mode(flags.0);
        self.answer(async move |guest| match guest.open(ino.0, mode).await {
            Ok(number) => {
                let flags = {
                    let tree = guest.tree();
                    match (tree.is_foreign(ino.0), tree.is_watched()) {
                        // Of /proc: it has no size, and is another each time.
                        (true, _) => FopenFlags::FOPEN_DIRECT_IO,
                        (false, true) => FopenFlags::FOPEN_KEEP_CACHE,
                        (false, false) => FopenFlags::empty(),
                    }
                };
                reply.opened(FileHandle(number), flags);
            }
            Err(error) => reply.error(error),
        });
    }

    fn create(
        &self,
        _request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (name, mode) = (bytes(name), mode & !umask);
        let exclusive = flags & libc::O_EXCL != 0;
        let opened = open_mode(flags);
        self.answer(async move |guest| {
            match guest.make_file(parent.0, name, mode, exclusive).await {
                Ok(found) => created(&guest, found, mode, opened, reply),
                Err(error) => reply.error(error),
            }
        });
    }

    fn read(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.answer(
            async move |guest| match guest.read(handle.0, offset, size as usize).await {
                Ok(data) => reply.data(&data),
                Err(error) => reply.error(error),
            },
        );
    }

    fn write(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let data = Bytes::copy_from_slice(data);
        let size = u32::try_from(data.len()).unwrap_or(u32::MAX);
        self.answer(
            async move |guest| match guest.write(handle.0, offset, data).await {
                Ok(()) => reply.written(size),
                Err(error) => reply.error(error),
            },
        );
    }

    fn flush(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        self.answer(async move |guest| empty(guest.flush(handle.0).await, reply));
    }

    fn fsync(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _data_only: bool,
        reply: ReplyEmpty,
    ) {
        self.answer(async move |guest| empty(guest.sync(handle.0).await, reply));
    }

    fn release(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.answer(async move |guest| {
            guest.close(handle.0).await;
            reply.ok();
        });
    }

    fn opendir(&self, _request: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let number = self.guest.handles.open_directory(Reading::of(ino.0));
        reply.opened(FileHandle(number), FopenFlags::empty());
    }

    fn readdir(
        &self,
        _request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        self.answer(async move |guest| {
            let parent = guest.tree().parent(ino.0);
            for (position, (number, name)) in [(ino.0, "."), (parent, "..")].iter().enumerate() {
                let next = position as u64 + 1;
                let kind = FileType::Directory;
                if next > offset && reply.add(INodeNo(*number), next, kind, name) {
                    return reply.ok();
                }
            }
            let at = offset.saturating_sub(OWN_ENTRIES);
            let part = match guest.list(handle.0, index(at)).await {
                Ok(part) => part,
                Err(error) => return reply.error(error),
            };
            for (next, listed) in (at + OWN_ENTRIES + 1..).zip(&part.entries) {
                let identity = listed.attributes.identity;
                // What has no number yet is told the guest's; 0 would be passed over.
                let number = guest.tree().child(ino.0, &listed.name);
                let number = INodeNo(number.unwrap_or(identity.inode.max(ROOT + 1)));
                let name = OsStr::from_bytes(&listed.name);
                if reply.add(number, next, identity.kind, name) {
                    break;
                }
            }
            reply.ok();
        });
    }

    fn readdirplus(
        &self,
        _request: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        self.answer(async move |guest| {
            let at = offset.saturating_sub(OWN_ENTRIES);
            match guest.list(handle.0, index(at)).await {
                Ok(part) => entries(&guest, ino.0, offset, &part.entries, part.asked, reply),
                Err(error) => reply.error(error),
            }
        });
    }

    fn releasedir(
        &self,
        _request: &Request,
        _ino: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.guest.handles.close_directory(handle.0);
        reply.ok();
    }

    /// A name is in the guest's directory when its call has been answered.
    fn fsyncdir(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _handle: FileHandle,
        _data_only: bool,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn statfs(&self, _request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        self.answer(async move |guest| {
            let size = u64::from(BLOCK_BYTES);
            let blocks = |bytes: u64| bytes / size;
            let unknown = UNKNOWN_BLOCKS;
            let [total, free, available, files, files_free] = match guest.disk().await {
                Some(disk) => [
                    blocks(disk.total_bytes),
                    blocks(disk.total_bytes.saturating_sub(disk.used_bytes)),
                    blocks(disk.available_bytes),
                    disk.inodes,
                    disk.inodes_free,
                ],
                None => [unknown; 5],
            };
            reply.statfs(
                total,
                free,
                available,
                files,
                files_free,
                BLOCK_BYTES,
                MAX_NAME_BYTES,
                BLOCK_BYTES,
            );
        });
    }

    fn setxattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        if is_of_this_host(name) {
            return reply.error(Errno::EOPNOTSUPP);
        }
        let (name, value) = (bytes(name), Bytes::copy_from_slice(value));
        self.answer(async move |guest| {
            empty(set_xattr(&guest, ino.0, name, value, flags).await, reply);
        });
    }

    fn getxattr(
        &self,
        _request: &Request,
        ino: INodeNo,
        name: &OsStr,
        size: u32,
        reply: ReplyXattr,
    ) {
        if is_of_this_host(name) {
            return reply.error(Errno::ENODATA);
        }
        let name = bytes(name);
        self.answer(async move |guest| {
            let found = guest.xattrs(ino.0).await.and_then(|xattrs| {
                let found = xattrs.into_iter().find(|xattr| xattr.name == name);
                found.map(|xattr| xattr.value).ok_or(Errno::ENODATA)
            });
            xattr(found, size, reply);
        });
    }

    fn listxattr(&self, _request: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        self.answer(async move |guest| {
            let names = guest.xattrs(ino.0).await.map(|xattrs| {
                let mut names = Vec::new();
                let shown = |name: &[u8]| {
                    !name.is_empty()
                        && !name.contains(&0)
                        && !is_of_this_host(OsStr::from_bytes(name))
                };
                for xattr in xattrs.iter().filter(|xattr| shown(&xattr.name)) {
                    names.extend_from_slice(&xattr.name);
                    names.push(0);
                }
                Bytes::from(names)
            });
            xattr(names, size, reply);
        });
    }

    fn removexattr(&self, _request: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        if is_of_this_host(name) {
            return reply.error(Errno::ENODATA);
        }
        let name = bytes(name);
        self.answer(async move |guest| empty(guest.set_xattr(ino.0, name, None).await, reply));
    }
}

async fn set_xattr(
    guest: &Guest,
    ino: u64,
    name: Bytes,
    value: Bytes,
    flags: i32,
) -> Result<(), Errno> {
    if flags != 0 {
        let there = guest
            .xattrs(ino)
            .await?
            .iter()
            .any(|xattr| xattr.name == name);
        if there && flags & libc::XATTR_CREATE != 0 {
            return Err(Errno::EEXIST);
        }
        if !there && flags & libc::XATTR_REPLACE != 0 {
            return Err(Errno::ENODATA);
        }
    }
    guest.set_xattr(ino, name, Some(value)).await
}

/// Capabilities, labels and access lists are for one kernel, and here it would be the
/// wrong one. The kernel asks for them with every write.
fn is_of_this_host(name: &OsStr) -> bool {
    let name = name.as_bytes();
    name.starts_with(b"security.") || name.starts_with(b"system.")
}

fn open_mode(flags: i32) -> OpenMode {
    let access = OpenFlags(flags).acc_mode();
    let truncates = flags & libc::O_TRUNC != 0;
    OpenMode {
        reads: access != OpenAccMode::O_WRONLY,
        writes: access != OpenAccMode::O_RDONLY || truncates,
        appends: flags & libc::O_APPEND != 0,
        truncates,
    }
}

fn bytes(text: &OsStr) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

fn time(time: TimeOrNow) -> SystemTime {
    match time {
        TimeOrNow::SpecificTime(time) => time,
        TimeOrNow::Now => SystemTime::now(),
    }
}
