//! Which directory each watch is of. A directory that is renamed keeps its watch, so a
//! watch knows only its name and the one above: a path is put together when it is told.

use std::collections::HashMap;

/// What inotify(7) calls a watch descriptor.
pub(super) type Wd = i32;

#[derive(Default)]
pub(super) struct Watches {
    known: HashMap<Wd, Known>,
    below: HashMap<Link, Wd>,
}

struct Known {
    /// None for the one that everything is below.
    link: Option<Link>,
    /// Device and inode: by its path, another may be found.
    id: (u64, u64),
}

/// A name in a directory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Link {
    pub(super) above: Wd,
    pub(super) name: Box<[u8]>,
}

// === impl Watches ===

impl Watches {
    pub(super) fn len(&self) -> usize {
        self.known.len()
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    pub(super) fn has(&self, wd: Wd) -> bool {
        self.known.contains_key(&wd)
    }

    pub(super) fn id(&self, wd: Wd) -> Option<(u64, u64)> {
        self.known.get(&wd).map(|known| known.id)
    }

    /// Also where it was known by another name.
    pub(super) fn insert(&mut self, wd: Wd, link: Option<Link>, id: (u64, u64)) {
        self.forget(wd);
        if let Some(link) = &link {
            self.below.insert(link.clone(), wd);
        }
        self.known.insert(wd, Known { link, id });
    }

    pub(super) fn rename(&mut self, wd: Wd, to: Link) {
        if let Some(id) = self.id(wd) {
            self.insert(wd, Some(to), id);
        }
    }

    pub(super) fn forget(&mut self, wd: Wd) {
        let known = self.known.remove(&wd);
        if let Some(link) = known.and_then(|known| known.link)
            // Another may have taken the name.
            && self.below.get(&link) == Some(&wd)
        {
            self.below.remove(&link);
        }
    }

    pub(super) fn find(&self, link: &Link) -> Option<Wd> {
        self.below.get(link).copied()
    }

    /// Relative to the top; None where it is not known (any longer).
    pub(super) fn path(&self, link: &Link) -> Option<Vec<u8>> {
        let mut path = self.path_of(link.above)?;
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(&link.name);
        Some(path)
    }

    /// That of a directory; empty for the top.
    pub(super) fn path_of(&self, mut wd: Wd) -> Option<Vec<u8>> {
        let mut names: Vec<&[u8]> = Vec::new();
        while let Some(link) = &self.known.get(&wd)?.link {
            names.push(&link.name);
            wd = link.above;
            // A directory cannot be below itself, but what is told may be behind.
            if names.len() > self.known.len() {
                return None;
            }
        }
        names.reverse();
        Some(names.join(&b'/'))
    }

    /// Forgets a directory and all below it, and returns their watches.
    pub(super) fn forget_all(&mut self, top: Wd) -> Vec<Wd> {
        let is_below = |mut wd: Wd| {
            for _ in 0..=self.known.len() {
                if wd == top {
                    return true;
                }
                match self.known.get(&wd).and_then(|known| known.link.as_ref()) {
                    Some(link) => wd = link.above,
                    None => return false,
                }
            }
            false
        };
        let gone: Vec<_> = self
            .known
            .keys()
            .copied()
            .filter(|wd| is_below(*wd))
            .collect();
        for wd in &gone {
            self.forget(*wd);
        }
        gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(above: Wd, name: &str) -> Link {
        Link {
            above,
            name: name.as_bytes().into(),
        }
    }

    /// 1 is the top; 2 is "a", 3 "a/b", 4 "c".
    fn watches() -> Watches {
        let mut watches = Watches::default();
        watches.insert(1, None, (0, 1));
        watches.insert(2, Some(link(1, "a")), (0, 2));
        watches.insert(3, Some(link(2, "b")), (0, 3));
        watches.insert(4, Some(link(1, "c")), (0, 4));
        watches
    }

    #[test]
    fn a_rename_moves_all_that_is_below() {
        let mut watches = watches();
        assert_eq!(watches.path(&link(3, "x")).unwrap(), b"a/b/x");
        watches.rename(2, link(4, "d"));
        assert_eq!(watches.path(&link(3, "x")).unwrap(), b"c/d/b/x");
        assert_eq!(watches.find(&link(1, "a")), None);
        assert_eq!(watches.path(&link(9, "x")), None);
    }

    #[test]
    fn a_name_that_another_has_taken_is_kept() {
        let mut watches = watches();
        watches.insert(5, Some(link(1, "a")), (0, 5));
        watches.forget(2);
        assert_eq!(watches.find(&link(1, "a")), Some(5));
    }

    #[test]
    fn what_is_moved_out_goes_with_all_below() {
        let mut watches = watches();
        let mut gone = watches.forget_all(2);
        gone.sort_unstable();
        assert_eq!((gone, watches.len()), (vec![2, 3], 2));
    }

    #[test]
    fn a_ring_ends() {
        let mut watches = watches();
        watches.rename(2, link(3, "a"));
        assert_eq!(watches.path(&link(3, "x")), None);
        watches.forget_all(1);
    }
}
