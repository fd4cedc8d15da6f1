//! Which directory each watch is of. A directory that is renamed keeps its watch, so a
//! watch knows only its name and the one above: a path is put together when it is told.

use std::collections::HashMap;

/// What inotify(7) calls a watch descriptor.
pub(super) type Wd = i32;

#[derive(Default)]
pub(super) struct Watches {
    /// None for the one that everything is below.
    known: HashMap<Wd, Option<Link>>,
    below: HashMap<Link, Wd>,
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

    /// Also where it was known by another name.
    pub(super) fn insert(&mut self, wd: Wd, link: Option<Link>) {
        self.forget(wd);
        if let Some(link) = &link {
            self.below.insert(link.clone(), wd);
        }
        self.known.insert(wd, link);
    }

    pub(super) fn forget(&mut self, wd: Wd) {
        if let Some(Some(link)) = self.known.remove(&wd)
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
        let mut names: Vec<&[u8]> = vec![&link.name];
        let mut above = link.above;
        while let Some(link) = self.known.get(&above)? {
            names.push(&link.name);
            above = link.above;
            // A directory cannot be below itself, but what is told may be behind.
            if names.len() > self.known.len() + 1 {
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
                match self.known.get(&wd) {
                    Some(Some(link)) => wd = link.above,
                    _ => return false,
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
        watches.insert(1, None);
        watches.insert(2, Some(link(1, "a")));
        watches.insert(3, Some(link(2, "b")));
        watches.insert(4, Some(link(1, "c")));
        watches
    }

    #[test]
    fn a_rename_moves_all_that_is_below() {
        let mut watches = watches();
        assert_eq!(watches.path(&link(3, "x")).unwrap(), b"a/b/x");
        watches.insert(2, Some(link(4, "d")));
        assert_eq!(watches.path(&link(3, "x")).unwrap(), b"c/d/b/x");
        assert_eq!(watches.find(&link(1, "a")), None);
        assert_eq!(watches.path(&link(9, "x")), None);
    }

    #[test]
    fn a_name_that_another_has_taken_is_kept() {
        let mut watches = watches();
        watches.insert(5, Some(link(1, "a")));
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
        watches.insert(2, Some(link(3, "a")));
        assert_eq!(watches.path(&link(3, "x")), None);
        watches.forget_all(1);
    }
}
