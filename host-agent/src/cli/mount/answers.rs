//! Answers to the kernel. Each is written with the tree locked: what an event says of
//! it comes before, and it is not kept, or after, and it is dropped again.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::time::Duration;

use bytes::Bytes;
use fuser::{
    Errno, FileHandle, FileType, FopenFlags, Generation, INodeNo, ReplyAttr, ReplyCreate,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyXattr,
};

use super::attributes::Attributes;
use super::content::OpenMode;
use super::guest::{Found, Guest};
use super::tree::{Epoch, Listed, absent};

/// "." and ".." come before what the guest lists.
pub(super) const OWN_ENTRIES: u64 = 2;
const GENERATION: Generation = Generation(0);

pub(super) fn entry(guest: &Guest, found: &Found, reply: ReplyEntry) {
    let mut tree = guest.tree();
    match tree.look_up(found.parent, &found.name, &found.attributes) {
        Some(ino) => {
            tree.keep_attributes(ino, &found.attributes, found.asked);
            let ttl = tree.ttl(ino, found.asked);
            reply.entry(&ttl, &found.attributes.of(ino), GENERATION);
        }
        None => reply.error(Errno::ESTALE),
    }
}

pub(super) fn nothing(guest: &Guest, parent: u64, name: &Bytes, asked: Epoch, reply: ReplyEntry) {
    let mut tree = guest.tree();
    let (mut ttl, dropped) = tree.look_up_nothing(parent, name, asked);
    if let Some(dropped) = dropped
        && !guest.invalidations.try_send(dropped)
    {
        ttl = Duration::ZERO;
    }
    match ttl.is_zero() {
        true => reply.error(Errno::ENOENT),
        false => reply.entry(&ttl, &absent(), GENERATION),
    }
}

pub(super) fn attributes(
    guest: &Guest,
    ino: u64,
    told: Result<(Attributes, Epoch), Errno>,
    reply: ReplyAttr,
) {
    match told {
        Ok((attributes, asked)) => {
            let mut tree = guest.tree();
            tree.keep_attributes(ino, &attributes, asked);
            reply.attr(&tree.ttl(ino, asked), &attributes.of(ino));
        }
        Err(error) => reply.error(error),
    }
}

pub(super) fn created(
    guest: &Guest,
    mut found: Found,
    mode: u32,
    opened: OpenMode,
    reply: ReplyCreate,
) {
    let ino = {
        let mut tree = guest.tree();
        tree.look_up(found.parent, &found.name, &found.attributes)
    };
    let Some(ino) = ino else {
        return reply.error(Errno::ESTALE);
    };
    let number = guest.open_new(ino, mode, opened.appends);
    guest.show_last_mode(ino, &mut found.attributes);
    let tree = guest.tree();
    let ttl = tree.ttl(ino, found.asked);
    let attributes = found.attributes.of(ino);
    let flags = FopenFlags::empty();
    reply.created(&ttl, &attributes, GENERATION, FileHandle(number), flags);
}

pub(super) fn entries(
    guest: &Guest,
    ino: u64,
    offset: u64,
    listed: &[Listed],
    asked: Epoch,
    mut reply: ReplyDirectoryPlus,
) {
    let mut tree = guest.tree();
    let parent = tree.parent(ino);
    for (position, (number, name)) in [(ino, "."), (parent, "..")].iter().enumerate() {
        let next = position as u64 + 1;
        let mut attributes = absent();
        attributes.ino = INodeNo(*number);
        attributes.kind = FileType::Directory;
        let ttl = Duration::ZERO;
        if next > offset && reply.add(INodeNo(*number), next, name, &ttl, &attributes, GENERATION) {
            return reply.ok();
        }
    }
    let first = offset.max(OWN_ENTRIES) + 1;
    for (next, listed) in (first..).zip(listed) {
        let Some(number) = tree.look_up(ino, &listed.name, &listed.attributes) else {
            break;
        };
        tree.keep_attributes(number, &listed.attributes, asked);
        let ttl = tree.ttl(number, asked);
        let attributes = listed.attributes.of(number);
        let name = OsStr::from_bytes(&listed.name);
        if reply.add(INodeNo(number), next, name, &ttl, &attributes, GENERATION) {
            // There was no room: the kernel has not learnt of it.
            tree.forget(number, 1);
            break;
        }
    }
    reply.ok();
}

pub(super) fn empty(outcome: Result<(), Errno>, reply: ReplyEmpty) {
    match outcome {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(error),
    }
}

/// Its size, where the caller has no room yet.
pub(super) fn xattr(found: Result<Bytes, Errno>, room: u32, reply: ReplyXattr) {
    match found {
        Ok(value) => match (u32::try_from(value.len()), room) {
            (Ok(size), 0) => reply.size(size),
            (Ok(size), room) if size <= room => reply.data(&value),
            _ => reply.error(Errno::ERANGE),
        },
        Err(error) => reply.error(error),
    }
}
