//! What a guest says of its files, checked. All of it is hostile: the kernel of the
//! host gets no kind, size, time or name that it could stumble over.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use fuser::{FileAttr, FileType, INodeNo};
use prost_types::Timestamp;
use soulbox_proto::guest::v1::{Entry, FileKind};

/// Of one name (NAME_MAX).
const MAX_NAME_BYTES: usize = 255;
/// Of a link's target (PATH_MAX, with its NUL).
const MAX_TARGET_BYTES: usize = 4095;
const MODE_BITS: u32 = 0o7777;
const BLOCK_BYTES: u64 = 512;
/// What stat(2) recommends for reads and writes.
const IO_BYTES: u32 = 1 << 20;

/// Which file it is, whatever its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) kind: FileType,
    pub(super) inode: u64,
    pub(super) device: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) identity: Identity,
    pub(super) size: u64,
    pub(super) allocated_bytes: u64,
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) links: u32,
    pub(super) accessed: SystemTime,
    pub(super) modified: SystemTime,
    pub(super) changed: SystemTime,
    /// Of a symbolic link.
    pub(super) target: Bytes,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(super) enum BadEntry {
    #[error("the guest told nothing of the file")]
    Missing,
    #[error("{0} is no kind of file")]
    Kind(i32),
}

// === impl Attributes ===

impl TryFrom<Option<Entry>> for Attributes {
    type Error = BadEntry;

    fn try_from(entry: Option<Entry>) -> Result<Self, BadEntry> {
        let entry = entry.ok_or(BadEntry::Missing)?;
        let kind = match FileKind::try_from(entry.kind) {
            Ok(FileKind::Regular) => FileType::RegularFile,
            Ok(FileKind::Directory) => FileType::Directory,
            Ok(FileKind::Symlink) => FileType::Symlink,
            Ok(FileKind::Fifo) => FileType::NamedPipe,
            Ok(FileKind::Socket) => FileType::Socket,
            Ok(FileKind::CharacterDevice) => FileType::CharDevice,
            Ok(FileKind::BlockDevice) => FileType::BlockDevice,
            Ok(FileKind::Unspecified) | Err(_) => return Err(BadEntry::Kind(entry.kind)),
        };
        let is_target = !entry.target.contains(&0) && entry.target.len() <= MAX_TARGET_BYTES;
        Ok(Self {
            identity: Identity {
                kind,
                inode: entry.inode,
                device: entry.device,
            },
            // The kernel refuses more than a signed number holds.
            size: entry.size_bytes.min(i64::MAX.cast_unsigned()),
            allocated_bytes: entry.allocated_bytes,
            mode: u16::try_from(entry.mode & MODE_BITS).unwrap_or_default(),
            uid: entry.uid,
            gid: entry.gid,
            links: u32::try_from(entry.links).unwrap_or(u32::MAX),
            accessed: time(entry.access_time),
            modified: time(entry.modify_time),
            changed: time(entry.change_time),
            target: if is_target {
                entry.target
            } else {
                Bytes::new()
            },
        })
    }
}

impl Attributes {
    pub(super) fn of_nothing() -> Self {
        Self {
            identity: Identity {
                kind: FileType::RegularFile,
                inode: 0,
                device: 0,
            },
            size: 0,
            allocated_bytes: 0,
            mode: 0,
            uid: 0,
            gid: 0,
            links: 0,
            accessed: UNIX_EPOCH,
            modified: UNIX_EPOCH,
            changed: UNIX_EPOCH,
            target: Bytes::new(),
        }
    }

    pub(super) fn of(&self, ino: u64) -> FileAttr {
        FileAttr {
            ino: INodeNo(ino),
            size: self.size,
            blocks: self.allocated_bytes.div_ceil(BLOCK_BYTES),
            atime: self.accessed,
            mtime: self.modified,
            ctime: self.changed,
            crtime: UNIX_EPOCH,
            kind: self.identity.kind,
            perm: self.mode,
            nlink: self.links,
            uid: self.uid,
            gid: self.gid,
            rdev: 0,
            blksize: IO_BYTES,
            flags: 0,
        }
    }
}

/// What makes the kernel remember that there is no such file.
pub(super) fn nothing() -> FileAttr {
    Attributes::of_nothing().of(0)
}

/// The last part of a path that a listing tells, if it can be a name.
pub(super) fn name(path: &Bytes) -> Option<Bytes> {
    let start = path.iter().rposition(|&byte| byte == b'/');
    let name = path.slice(start.map_or(0, |slash| slash + 1)..);
    is_name(&name).then_some(name)
}

pub(super) fn is_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= MAX_NAME_BYTES
        && name != b"."
        && name != b".."
        && !name.iter().any(|&byte| byte == 0 || byte == b'/')
}

/// The epoch, where a clock cannot show it.
fn time(timestamp: Option<Timestamp>) -> SystemTime {
    let Some(Timestamp { seconds, nanos }) = timestamp else {
        return UNIX_EPOCH;
    };
    let nanos = u32::try_from(nanos).unwrap_or(0).min(999_999_999);
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let second = match seconds {
        0.. => UNIX_EPOCH.checked_add(whole),
        _ => UNIX_EPOCH.checked_sub(whole),
    };
    second
        .and_then(|second| second.checked_add(Duration::from_nanos(nanos.into())))
        .unwrap_or(UNIX_EPOCH)
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    fn timestamps() -> impl Strategy<Value = Option<Timestamp>> {
        let edges = prop_oneof![any::<i64>(), Just(i64::MIN), Just(i64::MAX), Just(-1)];
        proptest::option::of(
            (edges, any::<i32>()).prop_map(|(seconds, nanos)| Timestamp { seconds, nanos }),
        )
    }

    prop_compose! {
        pub(in crate::cli::mount) fn entries()(
            path in proptest::collection::vec(any::<u8>(), 0..300),
            kind in -1..9_i32,
            numbers in any::<[u64; 4]>(),
            mode in any::<u32>(),
            ids in any::<[u32; 2]>(),
            times in [timestamps(), timestamps(), timestamps()],
            target in proptest::collection::vec(any::<u8>(), 0..5000),
            allocated_bytes in any::<u64>(),
        ) -> Entry {
            let [size_bytes, inode, device, links] = numbers;
            let [modify_time, access_time, change_time] = times;
            Entry {
                path: path.into(),
                kind,
                size_bytes,
                mode,
                uid: ids[0],
                gid: ids[1],
                modify_time,
                access_time,
                change_time,
                target: target.into(),
                inode,
                device,
                links,
                allocated_bytes,
            }
        }
    }

    proptest! {
        #[test]
        fn whatever_a_guest_says_the_kernel_can_take_it(entry in entries()) {
            if let Some(name) = name(&entry.path) {
                prop_assert!(is_name(&name));
            }
            match Attributes::try_from(Some(entry.clone())) {
                Ok(attributes) => {
                    let told = attributes.of(7);
                    prop_assert_eq!(told.ino, INodeNo(7));
                    prop_assert!(i64::try_from(told.size).is_ok());
                    prop_assert!(u32::from(told.perm) <= MODE_BITS);
                    prop_assert!(attributes.target.len() <= MAX_TARGET_BYTES);
                    prop_assert!(!attributes.target.contains(&0));
                }
                Err(error) => prop_assert_eq!(error, BadEntry::Kind(entry.kind)),
            }
        }
    }

    #[test]
    fn only_what_can_be_a_name_is_one() {
        let told = |path: &'static [u8]| name(&Bytes::from_static(path));
        assert_eq!(told(b"a").as_deref(), Some(&b"a"[..]));
        assert_eq!(told(b"/root/x/\xff").as_deref(), Some(&b"\xff"[..]));
        for bad in [
            &b""[..],
            b"/",
            b"a/",
            b".",
            b"..",
            b"a/..",
            b"nul\0",
            &[b'x'; 256],
        ] {
            assert_eq!(name(&Bytes::copy_from_slice(bad)), None, "{bad:?}");
        }
    }

    #[test]
    fn times_before_the_epoch_are_told() {
        let second = time(Some(Timestamp {
            seconds: -1,
            nanos: 500_000_000,
        }));
        assert_eq!(second, UNIX_EPOCH - Duration::from_millis(500));
    }
}
