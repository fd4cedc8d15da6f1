//! Headers as they are written: ustar, and before it a pax header for what does not
//! fit; pax(1), "pax Interchange Format".

use rustix::fs::Stat;
use tar::{EntryType, Header};

use super::{BLOCK_BYTES, padding};
use crate::files::entry::MODE_BITS;

/// What fits a ustar header's octal digits: eleven of a size or a time, seven of an id.
const MAX_SIZE: u64 = (1 << 33) - 1;
const MAX_ID: u32 = (1 << 21) - 1;

/// Appends the header of one entry. The path of a directory ends with "/".
pub(super) fn append_header(
    archive: &mut Vec<u8>,
    entry_type: EntryType,
    stat: &Stat,
    path: &[u8],
    link: &[u8],
    size: u64,
) {
    let mut header = Header::new_ustar();
    let mut pax = Vec::new();
    if let Some(ustar) = header.as_ustar_mut() {
        match split(path, ustar.prefix.len(), ustar.name.len()) {
            Some((prefix, name)) => {
                ustar.prefix[..prefix.len()].copy_from_slice(prefix);
                ustar.name[..name.len()].copy_from_slice(name);
            }
            None => {
                let name = &path[..ustar.name.len().min(path.len())];
                ustar.name[..name.len()].copy_from_slice(name);
                append_record(&mut pax, "path", path);
            }
        }
        let fits = link.len().min(ustar.linkname.len());
        ustar.linkname[..fits].copy_from_slice(&link[..fits]);
        if fits < link.len() {
            append_record(&mut pax, "linkpath", link);
        }
    }
    header.set_entry_type(entry_type);
    header.set_mode(stat.st_mode & MODE_BITS);
    for (key, id) in [("uid", stat.st_uid), ("gid", stat.st_gid)] {
        if id > MAX_ID {
            append_record(&mut pax, key, id.to_string().as_bytes());
        }
    }
    header.set_uid(stat.st_uid.min(MAX_ID).into());
    header.set_gid(stat.st_gid.min(MAX_ID).into());
    match u64::try_from(stat.st_mtime) {
        Ok(mtime) if mtime <= MAX_SIZE => header.set_mtime(mtime),
        _ => {
            header.set_mtime(0);
            append_record(&mut pax, "mtime", stat.st_mtime.to_string().as_bytes());
        }
    }
    if size > MAX_SIZE {
        append_record(&mut pax, "size", size.to_string().as_bytes());
    }
    header.set_size(size.min(MAX_SIZE));
    header.set_cksum();

    if !pax.is_empty() {
        let mut extended = Header::new_ustar();
        if let Some(ustar) = extended.as_ustar_mut() {
            let name = b"././@PaxHeader";
            ustar.name[..name.len()].copy_from_slice(name);
        }
        extended.set_entry_type(EntryType::XHeader);
        extended.set_mode(0o644);
        extended.set_uid(0);
        extended.set_gid(0);
        extended.set_mtime(0);
        extended.set_size(pax.len() as u64);
        extended.set_cksum();
        archive.extend_from_slice(extended.as_bytes());
        archive.extend_from_slice(&pax);
        append_zeroes(archive, padding(pax.len() as u64));
    }
    archive.extend_from_slice(header.as_bytes());
}

/// Two blocks of zeroes end an archive.
pub(super) fn append_end(archive: &mut Vec<u8>) {
    append_zeroes(archive, 2 * BLOCK_BYTES);
}

pub(super) fn append_zeroes(archive: &mut Vec<u8>, count: usize) {
    archive.resize(archive.len() + count, 0);
}

/// A path as prefix and name, which a reader joins with "/".
fn split(path: &[u8], max_prefix: usize, max_name: usize) -> Option<(&[u8], &[u8])> {
    if path.len() <= max_name {
        return Some((b"", path));
    }
    let first = path.len().checked_sub(max_name + 1)?;
    let slash = path[first..].iter().position(|byte| *byte == b'/')? + first;
    let (prefix, name) = (&path[..slash], &path[slash + 1..]);
    (!name.is_empty() && !prefix.is_empty() && prefix.len() <= max_prefix).then_some((prefix, name))
}

/// "25 path=…\n": the length counts itself.
fn append_record(pax: &mut Vec<u8>, key: &str, value: &[u8]) {
    // The space, "=" and the line's end.
    let rest = 3 + key.len() + value.len();
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    pax.extend_from_slice(format!("{length} {key}=").as_bytes());
    pax.extend_from_slice(value);
    pax.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_counts_its_own_digits() {
        for length in [1, 2, 80, 88, 89, 90, 91, 980, 985, 990, 991, 4095] {
            let mut pax = Vec::new();
            append_record(&mut pax, "path", &vec![b'x'; length]);
            let text = String::from_utf8(pax.clone()).unwrap();
            let (said, _) = text.split_once(' ').unwrap();
            assert_eq!(said.parse::<usize>().unwrap(), pax.len());
        }
    }

    #[test]
    fn a_long_path_is_split_where_it_has_a_slash() {
        let path = [&[b'a'; 90][..], b"/", &[b'b'; 90]].concat();
        assert_eq!(
            split(&path, 155, 100),
            Some((&[b'a'; 90][..], &[b'b'; 90][..]))
        );
        assert_eq!(split(&[b'a'; 101], 155, 100), None);
        let path = [&[b'a'; 156][..], b"/", &[b'b'; 90]].concat();
        assert_eq!(split(&path, 155, 100), None);
        assert_eq!(split(b"/", 155, 100), Some((&b""[..], &b"/"[..])));
    }
}
