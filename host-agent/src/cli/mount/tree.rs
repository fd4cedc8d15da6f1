//! The names that the kernel knows, and what may be kept of them.
//!
//! Files are numbered as in the guest where that is free, so that programs see the
//! same inode numbers each time. A number belongs to one name: hard links and what
//! is replaced have others. The kernel's forgetting bounds the table.
//!
//! What is kept is only dropped, never followed: events of the guest come later
//! than our own changes, so they say that something is to be looked at anew, not
//! what it is.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use fuser::FileType;

use super::attributes::{Attributes, Identity, nothing};

pub(super) const ROOT: u64 = 1;
/// Numbers from here on are ours.
const OWN_NUMBERS: u64 = 1 << 63;
/// The longest path that the guest takes, without its NUL.
const MAX_PATH_BYTES: usize = 4095;
/// How long the kernel may keep what a watch vouches for.
pub(super) const KEPT: Duration = Duration::from_secs(24 * 60 * 60);
/// Names that are known not to be there; the kernel forgets those silently.
const MAX_ABSENT: usize = 16 * 1024;
/// Entries of listings, in all.
const MAX_LISTED: usize = 256 * 1024;

/// One directory, read to its end.
pub(super) type Listing = Arc<Vec<Listed>>;

#[derive(Debug, Clone)]
pub(super) struct Listed {
    pub(super) name: Bytes,
    pub(super) attributes: Attributes,
}

/// What the kernel is to drop.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Stale {
    Attributes(u64),
    /// And attributes.
    Content(u64),
    Name(u64, Bytes),
}

/// Counts changes: what was asked before one may be older than it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Epoch(u64);

#[derive(Debug)]
pub(super) struct Tree {
    base: Bytes,
    device: u64,
    nodes: HashMap<u64, Node>,
    next_number: u64,
    epoch: Epoch,
    /// None: nothing is kept, for nobody would say when it changes.
    kept_since: Option<Epoch>,
    absent: Absent,
    listings: HashMap<u64, Listing>,
    listed: usize,
}

#[derive(Debug)]
struct Node {
    /// None: no name leads to it any more.
    name: Option<(u64, Bytes)>,
    children: HashMap<Bytes, u64>,
    lookups: u64,
    identity: Identity,
    /// On another filesystem of the guest, where a watch may see nothing (/proc).
    foreign: bool,
    changed: Epoch,
    /// The guest has let us read it, and nothing of it has changed since.
    readable: bool,
    /// What the guest said last, and when that was asked for.
    told: Option<(Attributes, Epoch)>,
}

#[derive(Debug, Default)]
struct Absent {
    names: HashSet<(u64, Bytes)>,
    order: VecDeque<(u64, Bytes)>,
}

// === impl Tree ===

impl Tree {
    pub(super) fn new(base: Bytes, root: &Attributes) -> Self {
        let epoch = Epoch(0);
        let mut node = Node::new(None, root.identity, false, epoch);
        node.lookups = 1;
        Self {
            base,
            device: root.identity.device,
            nodes: HashMap::from([(ROOT, node)]),
            next_number: OWN_NUMBERS,
            epoch,
            kept_since: None,
            absent: Absent::default(),
            listings: HashMap::new(),
            listed: 0,
        }
    }

    pub(super) fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// None: it has no name any more, or too long a one.
    pub(super) fn path(&self, ino: u64) -> Option<Bytes> {
        self.path_of(ino, &[])
    }

    pub(super) fn child_path(&self, parent: u64, name: &[u8]) -> Option<Bytes> {
        self.path_of(parent, name)
    }

    fn path_of(&self, ino: u64, last: &[u8]) -> Option<Bytes> {
        let mut parts = vec![last];
        let mut bytes = self.base.len() + last.len() + 1;
        let mut at = ino;
        while at != ROOT {
            let (parent, name) = self.nodes.get(&at)?.name.as_ref()?;
            parts.push(name);
            bytes += name.len() + 1;
            if bytes > MAX_PATH_BYTES {
                return None;
            }
            at = *parent;
        }
        let mut path = BytesMut::with_capacity(bytes);
        path.put_slice(&self.base);
        for part in parts.iter().rev().filter(|part| !part.is_empty()) {
            if !path.ends_with(b"/") {
                path.put_u8(b'/');
            }
            path.put_slice(part);
        }
        (path.len() <= MAX_PATH_BYTES).then(|| path.freeze())
    }

    pub(super) fn child(&self, parent: u64, name: &[u8]) -> Option<u64> {
        self.nodes.get(&parent)?.children.get(name).copied()
    }

    pub(super) fn parent(&self, ino: u64) -> u64 {
        let node = self.nodes.get(&ino);
        node.and_then(|node| node.name.as_ref())
            .map_or(ROOT, |(parent, _)| *parent)
    }

    pub(super) fn identity(&self, ino: u64) -> Option<Identity> {
        self.nodes.get(&ino).map(|node| node.identity)
    }

    /// When it last changed, as far as is known.
    pub(super) fn changed_at(&self, ino: u64) -> Epoch {
        self.nodes.get(&ino).map_or(self.epoch, |node| node.changed)
    }

    pub(super) fn is_foreign(&self, ino: u64) -> bool {
        self.nodes.get(&ino).is_none_or(|node| node.foreign)
    }

    pub(super) fn is_readable(&self, ino: u64) -> bool {
        self.kept_since.is_some() && self.nodes.get(&ino).is_some_and(|node| node.readable)
    }

    pub(super) fn set_readable(&mut self, ino: u64, asked: Epoch) {
        if self.may_keep(ino, asked)
            && let Some(node) = self.nodes.get_mut(&ino)
        {
            node.readable = true;
        }
    }

    /// The kernel asks again when a file or a directory has been read, for its time of
    /// access. And a link's target it would keep until an event says otherwise, also
    /// while nobody watches.
    pub(super) fn keep_attributes(&mut self, ino: u64, told: &Attributes, asked: Epoch) {
        if let Some(node) = self.nodes.get_mut(&ino) {
            node.told = Some((told.clone(), asked));
        }
    }

    pub(super) fn attributes(&self, ino: u64) -> Option<(Attributes, Epoch)> {
        let told = self.nodes.get(&ino)?.told.as_ref()?;
        self.may_keep(ino, told.1).then(|| told.clone())
    }

    /// Whether what was asked then is still so, and somebody would say if not.
    pub(super) fn may_keep(&self, ino: u64, asked: Epoch) -> bool {
        let kept = self.kept_since.is_some_and(|since| since <= asked);
        kept && self
            .nodes
            .get(&ino)
            .is_some_and(|node| !node.foreign && node.changed <= asked)
    }

    /// How long the kernel may keep it.
    pub(super) fn ttl(&self, ino: u64, asked: Epoch) -> Duration {
        match self.may_keep(ino, asked) {
            true => KEPT,
            false => Duration::ZERO,
        }
    }

    /// The number of the file of this name, which the kernel now knows once more.
    /// None: the directory is no more.
    pub(super) fn look_up(&mut self, parent: u64, name: &Bytes, told: &Attributes) -> Option<u64> {
        let identity = told.identity;
        if let Some(ino) = self.child(parent, name) {
            let node = self.nodes.get_mut(&ino)?;
            if node.identity == identity {
                node.lookups += 1;
                return Some(ino);
            }
            self.detach(parent, name);
        }
        let above = self.nodes.get(&parent)?;
        let is_other_directory =
            identity.kind == FileType::Directory && identity.device != self.device;
        let foreign = above.foreign || is_other_directory;
        // What was asked of the directory before it changed is old of this, too.
        let changed = above.changed;
        let ino = self.number(identity);
        let mut node = Node::new(Some((parent, name.clone())), identity, foreign, changed);
        node.lookups = 1;
        self.nodes.insert(ino, node);
        self.nodes
            .get_mut(&parent)?
            .children
            .insert(name.clone(), ino);
        self.absent.remove(parent, name);
        Some(ino)
    }

    fn number(&mut self, identity: Identity) -> u64 {
        let wanted = identity.inode;
        let is_free = wanted > ROOT && wanted < OWN_NUMBERS && !self.nodes.contains_key(&wanted);
        if is_free && identity.device == self.device {
            return wanted;
        }
        loop {
            let number = self.next_number;
            self.next_number = number.checked_add(1).unwrap_or(OWN_NUMBERS);
            if !self.nodes.contains_key(&number) {
                return number;
            }
        }
    }

    /// How long the kernel may keep that there is no such name, and what it must drop
    /// for that.
    pub(super) fn look_up_nothing(
        &mut self,
        parent: u64,
        name: &Bytes,
        asked: Epoch,
    ) -> (Duration, Option<Stale>) {
        self.detach(parent, name);
        if !self.may_keep(parent, asked) {
            return (Duration::ZERO, None);
        }
        let dropped = self.absent.insert(parent, name.clone());
        (
            KEPT,
            dropped.map(|(parent, name)| Stale::Name(parent, name)),
        )
    }

    pub(super) fn forget(&mut self, ino: u64, lookups: u64) {
        if let Some(node) = self.nodes.get_mut(&ino) {
            node.lookups = node.lookups.saturating_sub(lookups);
        }
        self.collect(ino);
    }

    /// Drops a node that nobody knows, and those above that were there for it alone.
    fn collect(&mut self, mut ino: u64) {
        while ino != ROOT
            && let Some(node) = self.nodes.get(&ino)
            && node.lookups == 0
            && node.children.is_empty()
        {
            let name = self.nodes.remove(&ino).and_then(|node| node.name);
            self.drop_listing(ino);
            let Some((parent, name)) = name else { return };
            if let Some(above) = self.nodes.get_mut(&parent) {
                above.children.remove(&name);
            }
            ino = parent;
        }
    }

    /// The name leads nowhere now.
    pub(super) fn detach(&mut self, parent: u64, name: &[u8]) {
        let above = self.nodes.get_mut(&parent);
        let Some(ino) = above.and_then(|above| above.children.remove(name)) else {
            return;
        };
        if let Some(node) = self.nodes.get_mut(&ino) {
            node.name = None;
        }
        self.drop_listing(ino);
        self.collect(ino);
    }

    /// Takes the file of one name to another, whose file loses it.
    pub(super) fn rename(&mut self, from: (u64, &[u8]), to: (u64, &Bytes)) {
        let Some(ino) = self.child(from.0, from.1) else {
            self.detach(to.0, to.1);
            return;
        };
        if self.child(to.0, to.1) == Some(ino) || self.is_below(to.0, ino) {
            return;
        }
        self.detach(to.0, to.1);
        self.unlink(from.0, from.1);
        self.link(to.0, to.1, ino);
    }

    pub(super) fn exchange(&mut self, one: (u64, &Bytes), other: (u64, &Bytes)) {
        let first = self.child(one.0, one.1);
        let second = self.child(other.0, other.1);
        if first == second {
            return;
        }
        let loops = |ino: Option<u64>, parent| ino.is_some_and(|ino| self.is_below(parent, ino));
        if loops(first, other.0) || loops(second, one.0) {
            return;
        }
        self.unlink(one.0, one.1);
        self.unlink(other.0, other.1);
        if let Some(ino) = first {
            self.link(other.0, other.1, ino);
        }
        if let Some(ino) = second {
            self.link(one.0, one.1, ino);
        }
    }

    fn unlink(&mut self, parent: u64, name: &[u8]) {
        if let Some(above) = self.nodes.get_mut(&parent) {
            above.children.remove(name);
        }
    }

    fn link(&mut self, parent: u64, name: &Bytes, ino: u64) {
        if let Some(above) = self.nodes.get_mut(&parent) {
            above.children.insert(name.clone(), ino);
        }
        if let Some(node) = self.nodes.get_mut(&ino) {
            node.name = Some((parent, name.clone()));
        }
        self.absent.remove(parent, name);
    }

    fn is_below(&self, mut ino: u64, above: u64) -> bool {
        while ino != above {
            match self.nodes.get(&ino).and_then(|node| node.name.as_ref()) {
                Some((parent, _)) => ino = *parent,
                None => return false,
            }
        }
        true
    }

    /// What was written may have made it another file (overlayfs copies it up).
    pub(super) fn identify(&mut self, ino: u64, identity: Identity) {
        if let Some(node) = self.nodes.get_mut(&ino)
            && node.identity.kind == identity.kind
        {
            node.identity = identity;
        }
    }

    /// We have changed it, or what is in it.
    pub(super) fn touch(&mut self, ino: u64) {
        self.epoch.0 += 1;
        self.mark(ino);
    }

    fn mark(&mut self, ino: u64) {
        let epoch = self.epoch;
        if let Some(node) = self.nodes.get_mut(&ino) {
            node.changed = epoch;
        }
        let parent = self.parent(ino);
        self.drop_listing(ino);
        self.drop_listing(parent);
    }

    pub(super) fn listing(&self, ino: u64) -> Option<Listing> {
        self.listings.get(&ino).cloned()
    }

    pub(super) fn keep_listing(&mut self, ino: u64, listing: &Listing, asked: Epoch) {
        let count = listing.len();
        if !self.may_keep(ino, asked) || count > MAX_LISTED {
            return;
        }
        self.drop_listing(ino);
        if self.listed + count > MAX_LISTED {
            self.listings.clear();
            self.listed = 0;
        }
        self.listed += count;
        self.listings.insert(ino, Arc::clone(listing));
    }

    fn drop_listing(&mut self, ino: u64) {
        if let Some(listing) = self.listings.remove(&ino) {
            self.listed -= listing.len();
        }
    }

    /// Something happened at this path below the root; empty is the root itself.
    pub(super) fn changed(&mut self, path: &[u8], whole_tree: bool) -> Vec<Stale> {
        self.epoch.0 += 1;
        let mut stale = Vec::new();
        let mut at = ROOT;
        let mut parts = path
            .split(|&byte| byte == b'/')
            .filter(|part| !part.is_empty());
        let mut part = parts.next();
        while let Some(name) = part {
            part = parts.next();
            match (self.child(at, name), part) {
                (Some(ino), Some(_)) => at = ino,
                // The kernel does not know the directory, so nothing in it.
                (None, Some(_)) => return stale,
                (known, None) => {
                    let name = Bytes::copy_from_slice(name);
                    self.absent.remove(at, &name);
                    self.mark(at);
                    stale.push(Stale::Attributes(at));
                    stale.push(Stale::Name(at, name));
                    let Some(ino) = known else { return stale };
                    at = ino;
                }
            }
        }
        self.invalidate(at, whole_tree, &mut stale);
        stale
    }

    /// All that the kernel may have of it, and with `whole_tree` of what is below.
    fn invalidate(&mut self, ino: u64, whole_tree: bool, stale: &mut Vec<Stale>) {
        let mut left = vec![ino];
        while let Some(ino) = left.pop() {
            self.mark(ino);
            stale.push(Stale::Content(ino));
            let Some(node) = self.nodes.get_mut(&ino) else {
                continue;
            };
            node.readable = false;
            if whole_tree {
                for (name, child) in &node.children {
                    stale.push(Stale::Name(ino, name.clone()));
                    left.push(*child);
                }
            }
        }
    }

    /// Of one file, or of a directory with all below.
    pub(super) fn forget_all_of(&mut self, ino: u64) -> Vec<Stale> {
        self.epoch.0 += 1;
        let mut stale = Vec::new();
        self.invalidate(ino, true, &mut stale);
        stale
    }

    /// All that the kernel may have.
    fn everything(&mut self) -> Vec<Stale> {
        self.epoch.0 += 1;
        let epoch = self.epoch;
        let absent = self.absent.clear();
        let mut stale: Vec<_> = absent
            .map(|(parent, name)| Stale::Name(parent, name))
            .collect();
        self.listings.clear();
        self.listed = 0;
        // Also what has no name: a program may have it open.
        for (&ino, node) in &mut self.nodes {
            node.changed = epoch;
            node.readable = false;
            stale.push(Stale::Content(ino));
            let names = node.children.keys();
            stale.extend(names.map(|name| Stale::Name(ino, name.clone())));
        }
        stale
    }

    /// Events were lost.
    pub(super) fn overflowed(&mut self) -> Vec<Stale> {
        self.everything()
    }

    /// From now on somebody says what changes.
    pub(super) fn watched(&mut self) -> Vec<Stale> {
        let stale = self.everything();
        self.kept_since = Some(self.epoch);
        stale
    }

    /// Nobody says any more what changes.
    pub(super) fn unwatched(&mut self) -> Vec<Stale> {
        self.kept_since = None;
        self.everything()
    }

    pub(super) fn is_watched(&self) -> bool {
        self.kept_since.is_some()
    }
}

// === impl Node ===

impl Node {
    fn new(name: Option<(u64, Bytes)>, identity: Identity, foreign: bool, changed: Epoch) -> Self {
        Self {
            name,
            children: HashMap::new(),
            lookups: 0,
            identity,
            foreign,
            changed,
            readable: false,
            told: None,
        }
    }
}

// === impl Absent ===

impl Absent {
    /// The one that had to go for it.
    fn insert(&mut self, parent: u64, name: Bytes) -> Option<(u64, Bytes)> {
        let key = (parent, name);
        if !self.names.insert(key.clone()) {
            return None;
        }
        self.order.push_back(key);
        let mut dropped = None;
        // Those that were removed meanwhile are still in order.
        while self.order.len() > MAX_ABSENT {
            let oldest = self.order.pop_front()?;
            if self.names.remove(&oldest) {
                dropped = Some(oldest);
            }
        }
        dropped
    }

    fn remove(&mut self, parent: u64, name: &Bytes) {
        self.names.remove(&(parent, name.clone()));
    }

    fn clear(&mut self) -> impl Iterator<Item = (u64, Bytes)> + use<> {
        self.order.clear();
        std::mem::take(&mut self.names).into_iter()
    }
}

/// An answer for a name that is not there.
pub(super) fn absent() -> fuser::FileAttr {
    nothing()
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::super::attributes::tests::entries;
    use super::*;

    fn told(inode: u64, kind: FileType) -> Attributes {
        let mut told = Attributes::of_nothing();
        told.identity = Identity {
            kind,
            inode,
            device: 1,
        };
        told
    }

    fn tree() -> Tree {
        let mut tree = Tree::new(Bytes::from_static(b"/base"), &told(2, FileType::Directory));
        tree.watched();
        tree
    }

    fn bytes(name: &str) -> Bytes {
        Bytes::copy_from_slice(name.as_bytes())
    }

    #[test]
    fn a_file_has_the_guests_number_where_that_is_free() {
        let mut tree = tree();
        let file = told(7, FileType::RegularFile);
        assert_eq!(tree.look_up(ROOT, &bytes("a"), &file), Some(7));
        assert_eq!(tree.look_up(ROOT, &bytes("a"), &file), Some(7));
        let hard_link = tree.look_up(ROOT, &bytes("b"), &file).unwrap();
        assert!(hard_link >= OWN_NUMBERS);
        let root = told(ROOT, FileType::Directory);
        assert!(tree.look_up(ROOT, &bytes("c"), &root).unwrap() >= OWN_NUMBERS);
        // Another file in its place is another number; the first lives while it is known.
        let other = tree.look_up(ROOT, &bytes("a"), &told(8, FileType::RegularFile));
        assert_eq!(other, Some(8));
        assert_eq!(tree.path(7), None);
        assert_eq!(tree.path(8).as_deref(), Some(&b"/base/a"[..]));
        tree.forget(7, 2);
        assert_eq!(tree.identity(7), None);
    }

    #[test]
    fn what_was_asked_before_a_change_is_not_kept() {
        let mut tree = tree();
        let asked = tree.epoch();
        let file = told(7, FileType::RegularFile);
        let ino = tree.look_up(ROOT, &bytes("a"), &file).unwrap();
        assert_eq!(tree.ttl(ino, asked), KEPT);
        let stale = tree.changed(b"a", false);
        assert!(stale.contains(&Stale::Content(ino)));
        assert!(stale.contains(&Stale::Name(ROOT, bytes("a"))));
        assert_eq!(tree.ttl(ino, asked), Duration::ZERO);
        assert_eq!(tree.ttl(ino, tree.epoch()), KEPT);
        // Of a name that is not known yet as well.
        let asked = tree.epoch();
        tree.changed(b"b", false);
        let ino = tree
            .look_up(ROOT, &bytes("b"), &told(9, FileType::RegularFile))
            .unwrap();
        assert_eq!(tree.ttl(ino, asked), Duration::ZERO);
        assert_eq!(
            tree.look_up_nothing(ROOT, &bytes("c"), asked).0,
            Duration::ZERO
        );
        // And nothing is without a watch.
        let asked = tree.epoch();
        tree.unwatched();
        assert_eq!(tree.ttl(ino, tree.epoch()), Duration::ZERO);
        tree.watched();
        assert_eq!(tree.ttl(ino, asked), Duration::ZERO);
        assert_eq!(tree.ttl(ino, tree.epoch()), KEPT);
    }

    #[test]
    fn all_that_the_kernel_may_have_is_dropped_after_an_overflow() {
        let mut tree = tree();
        let asked = tree.epoch();
        let directory = told(7, FileType::Directory);
        let ino = tree.look_up(ROOT, &bytes("dir"), &directory).unwrap();
        tree.look_up(ino, &bytes("file"), &told(8, FileType::RegularFile));
        tree.look_up_nothing(ino, &bytes("none"), asked);
        // A directory that is gone, with something open in it.
        tree.detach(ROOT, b"dir");
        let stale = tree.overflowed();
        for wanted in [
            Stale::Content(ROOT),
            Stale::Content(7),
            Stale::Content(8),
            Stale::Name(7, bytes("file")),
            Stale::Name(7, bytes("none")),
        ] {
            assert!(stale.contains(&wanted), "{wanted:?}");
        }
    }

    #[test]
    fn absent_names_are_bounded() {
        let mut tree = tree();
        let mut dropped = 0;
        for number in 0..MAX_ABSENT + 10 {
            let name = bytes(&number.to_string());
            let (ttl, stale) = tree.look_up_nothing(ROOT, &name, tree.epoch());
            assert_eq!(ttl, KEPT);
            dropped += usize::from(stale.is_some());
        }
        assert_eq!(dropped, 10);
        assert_eq!(tree.absent.names.len(), MAX_ABSENT);
    }

    #[test]
    fn what_is_in_a_directory_moves_with_it() {
        let mut tree = tree();
        let directory = |inode| told(inode, FileType::Directory);
        let dir = tree.look_up(ROOT, &bytes("dir"), &directory(7)).unwrap();
        let inner = tree.look_up(dir, &bytes("inner"), &directory(8)).unwrap();
        tree.rename((ROOT, b"dir"), (ROOT, &bytes("moved")));
        assert_eq!(tree.path(inner).as_deref(), Some(&b"/base/moved/inner"[..]));
        // Into itself: the kernel never asks, and it would be a ring.
        tree.rename((ROOT, b"moved"), (inner, &bytes("ring")));
        assert_eq!(tree.path(inner).as_deref(), Some(&b"/base/moved/inner"[..]));
        let other = tree.look_up(ROOT, &bytes("other"), &directory(9)).unwrap();
        tree.exchange((ROOT, &bytes("other")), (dir, &bytes("inner")));
        assert_eq!(tree.path(other).as_deref(), Some(&b"/base/moved/inner"[..]));
        assert_eq!(tree.path(inner).as_deref(), Some(&b"/base/other"[..]));
    }

    #[test]
    fn paths_that_the_guest_does_not_take_are_none() {
        let mut tree = tree();
        let mut at = ROOT;
        let name = Bytes::from(vec![b'x'; 255]);
        for inode in 10..25 {
            at = tree
                .look_up(at, &name, &told(inode, FileType::Directory))
                .unwrap();
        }
        assert_eq!(tree.path(at).map(|path| path.len()), Some(5 + 15 * 256));
        assert_eq!(tree.child_path(at, &name), None);
    }

    #[derive(Debug, Clone)]
    enum Step {
        LookUp(usize, u8, soulbox_proto::guest::v1::Entry),
        Nothing(usize, u8),
        Forget(usize),
        Detach(usize, u8),
        Rename(usize, u8, usize, u8),
        Exchange(usize, u8, usize, u8),
        Changed(Vec<u8>, bool),
        Touch(usize),
        Overflow,
    }

    fn steps() -> impl Strategy<Value = Step> {
        let (node, name) = (0..8_usize, 0..4_u8);
        let event = vec(
            prop_oneof![Just(b'/'), Just(b'a'), Just(b'b'), Just(b'.')],
            0..12,
        );
        prop_oneof![
            6 => (node.clone(), name.clone(), entries()).prop_map(|(node, name, mut entry)| {
                // Few numbers, so that they meet.
                entry.inode %= 6;
                entry.device %= 2;
                Step::LookUp(node, name, entry)
            }),
            1 => (node.clone(), name.clone()).prop_map(|(node, name)| Step::Nothing(node, name)),
            2 => node.clone().prop_map(Step::Forget),
            1 => (node.clone(), name.clone()).prop_map(|(node, name)| Step::Detach(node, name)),
            2 => (node.clone(), name.clone(), node.clone(), name.clone())
                .prop_map(|(a, b, c, d)| Step::Rename(a, b, c, d)),
            1 => (node.clone(), name.clone(), node.clone(), name)
                .prop_map(|(a, b, c, d)| Step::Exchange(a, b, c, d)),
            2 => (event, any::<bool>()).prop_map(|(path, whole)| Step::Changed(path, whole)),
            1 => node.prop_map(Step::Touch),
            1 => Just(Step::Overflow),
        ]
    }

    /// Every child knows its parent, every name leads to its node, and all ends at the root.
    fn assert_sound(tree: &Tree) {
        for (ino, node) in &tree.nodes {
            for (name, child) in &node.children {
                assert_eq!(tree.nodes[child].name, Some((*ino, name.clone())));
            }
            if let Some((parent, name)) = &node.name {
                assert_eq!(tree.child(*parent, name), Some(*ino));
            }
            // It ends, whether it has a path or not.
            tree.path(*ino);
            assert!(node.lookups > 0 || !node.children.is_empty() || *ino == ROOT);
        }
        let listed: usize = tree.listings.values().map(|listing| listing.len()).sum();
        assert_eq!(tree.listed, listed);
    }

    proptest! {
        #[test]
        fn the_table_is_sound_whatever_guest_and_kernel_do(all in vec(steps(), 0..60)) {
            let mut tree = tree();
            let mut known = vec![(ROOT, 0_u64)];
            for step in all {
                let node = |at: usize| known[at % known.len()].0;
                let name = |name: u8| bytes(["a", "b", "c", "d"][usize::from(name)]);
                match step {
                    Step::LookUp(at, child, entry) => {
                        let parent = node(at);
                        let Ok(told) = Attributes::try_from(Some(entry)) else { continue };
                        let found = tree.look_up(parent, &name(child), &told);
                        if let Some(ino) = found {
                            prop_assert_ne!(ino, ROOT);
                            prop_assert_eq!(tree.identity(ino), Some(told.identity));
                            match known.iter_mut().find(|(known, _)| *known == ino) {
                                Some((_, lookups)) => *lookups += 1,
                                None => known.push((ino, 1)),
                            }
                        }
                    }
                    Step::Nothing(at, child) => {
                        let epoch = tree.epoch();
                        tree.look_up_nothing(node(at), &name(child), epoch);
                    }
                    Step::Forget(at) => {
                        let at = at % known.len();
                        if known[at].0 != ROOT {
                            let (ino, lookups) = known.swap_remove(at);
                            tree.forget(ino, lookups);
                        }
                    }
                    Step::Detach(at, child) => tree.detach(node(at), &name(child)),
                    Step::Rename(a, b, c, d) => tree.rename((node(a), &name(b)), (node(c), &name(d))),
                    Step::Exchange(a, b, c, d) => {
                        tree.exchange((node(a), &name(b)), (node(c), &name(d)));
                    }
                    Step::Changed(path, whole) => drop(tree.changed(&path, whole)),
                    Step::Touch(at) => tree.touch(node(at)),
                    Step::Overflow => drop(tree.overflowed()),
                }
                assert_sound(&tree);
            }
            // What the kernel has forgotten takes no room.
            for (ino, lookups) in known.into_iter().filter(|(ino, _)| *ino != ROOT) {
                tree.forget(ino, lookups);
            }
            prop_assert_eq!(tree.nodes.len(), 1);
        }
    }
}
