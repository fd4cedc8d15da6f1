//! Paths of members, which only lead down.

/// Leaves the names of a path, with one "/" between them; nothing of "./". False: the path
/// leads out of where it begins.
#[must_use]
pub fn make_plain(path: &mut Vec<u8>) -> bool {
    let is_slash = |byte: &u8| *byte == b'/';
    let is_name = |name: &&[u8]| !matches!(*name, b"" | b".");
    if path.starts_with(b"/") || path.split(is_slash).any(|name| name == b"..") {
        return false;
    }
    if !path.split(is_slash).all(|name| is_name(&name)) {
        let names: Vec<_> = path.split(is_slash).filter(is_name).collect();
        *path = names.join(&b'/');
    }
    true
}

/// The directory and the name of a plain path.
pub fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (b"", path),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plain(path: &[u8]) -> Option<Vec<u8>> {
        let mut path = path.to_vec();
        make_plain(&mut path).then_some(path)
    }

    #[test]
    fn paths_are_made_plain_or_refused() {
        for (path, expected) in [
            ("./a//b/./c/", Some("a/b/c")),
            ("a/b", Some("a/b")),
            ("./", Some("")),
            ("", Some("")),
            ("..a/b..", Some("..a/b..")),
            ("/a", None),
            ("..", None),
            ("a/..", None),
            ("a/../b", None),
        ] {
            let expected = expected.map(|path| path.as_bytes().to_vec());
            assert_eq!(plain(path.as_bytes()), expected, "{path:?}");
        }
        assert_eq!(split(b"a/b/c"), (&b"a/b"[..], &b"c"[..]));
        assert_eq!(split(b"c"), (&b""[..], &b"c"[..]));
    }

    proptest! {
        #[test]
        fn a_plain_path_leads_down_to_where_the_path_did(path in prop::collection::vec(
            prop_oneof![Just(b'/'), Just(b'.'), Just(b'a')], 0..12)
        ) {
            let names = |path: &[u8]| -> Vec<Vec<u8>> {
                let names = path.split(|byte| *byte == b'/');
                names.filter(|name| !matches!(*name, b"" | b".")).map(<[u8]>::to_vec).collect()
            };
            match plain(&path) {
                Some(plain) => {
                    prop_assert_eq!(names(&plain), names(&path));
                    let is_name = |name: &[u8]| !matches!(name, b"" | b"." | b"..");
                    let mut all = plain.split(|byte| *byte == b'/');
                    prop_assert!(plain.is_empty() || all.all(is_name));
                }
                None => prop_assert!(path.starts_with(b"/") || names(&path).contains(&b"..".to_vec())),
            }
        }
    }
}
