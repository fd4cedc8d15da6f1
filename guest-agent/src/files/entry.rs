//! What stat(2) tells, as the protocol says it.

use std::os::fd::AsFd;

use bytes::Bytes;
use rustix::fs::{FileType, Stat, fstat, readlinkat};
use rustix::io::Errno;
use soulbox_proto::guest::v1::{Entry, FileKind};

/// The lowest twelve bits of st_mode.
pub(super) const MODE_BITS: u32 = 0o7777;

/// Of an open file; one that is a symbolic link was opened with O_PATH.
pub(super) fn entry_of(fd: impl AsFd, path: Bytes) -> Result<Entry, Errno> {
    let stat = fstat(&fd)?;
    let mut entry = entry(&stat, path);
    if entry.kind == FileKind::Symlink as i32 {
        entry.target = readlinkat(fd, c"", Vec::new())?.into_bytes().into();
    }
    Ok(entry)
}

/// Without the target of a symbolic link.
pub(super) fn entry(stat: &Stat, path: Bytes) -> Entry {
    let time = |seconds: i64, nanos: u64| {
        Some(prost_types::Timestamp {
            seconds,
            nanos: i32::try_from(nanos).unwrap_or(0),
        })
    };
    Entry {
        path,
        kind: kind(file_type(stat)).into(),
        size_bytes: stat.st_size.cast_unsigned(),
        mode: stat.st_mode & MODE_BITS,
        uid: stat.st_uid,
        gid: stat.st_gid,
        modify_time: time(stat.st_mtime, stat.st_mtime_nsec),
        access_time: time(stat.st_atime, stat.st_atime_nsec),
        change_time: time(stat.st_ctime, stat.st_ctime_nsec),
        target: Bytes::new(),
        inode: stat.st_ino,
        device: stat.st_dev,
        links: stat.st_nlink,
        allocated_bytes: stat.st_blocks.cast_unsigned().saturating_mul(512),
    }
}

pub(super) fn file_type(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

pub(super) fn kind(file_type: FileType) -> FileKind {
    match file_type {
        FileType::RegularFile => FileKind::Regular,
        FileType::Directory => FileKind::Directory,
        FileType::Symlink => FileKind::Symlink,
        FileType::Fifo => FileKind::Fifo,
        FileType::Socket => FileKind::Socket,
        FileType::CharacterDevice => FileKind::CharacterDevice,
        FileType::BlockDevice => FileKind::BlockDevice,
        FileType::Unknown => FileKind::Unspecified,
    }
}
