//! Headers as they are written: ustar, and before it a pax header for what does not fit.

use std::io::Write as _;

use tar::{EntryType, Header, UstarHeader};

use super::{BLOCK_BYTES, Kind, Member, padding, sum};

/// What fits a ustar header's octal digits: eleven of a size or a time, seven of an id.
const MAX_SIZE: u64 = (1 << 33) - 1;
const MAX_ID: u64 = (1 << 21) - 1;
const MAX_NANOS: u32 = 999_999_999;

/// Appends what comes before a member's data.
pub fn append_header(archive: &mut Vec<u8>, member: &Member) {
    let entry_type = match member.kind {
        Kind::File => EntryType::Regular,
        Kind::Directory => EntryType::Directory,
        Kind::Symlink => EntryType::Symlink,
        Kind::HardLink => EntryType::Link,
        Kind::Other(flag) => EntryType::new(flag),
    };
    let mut records = Vec::new();
    let header = header(entry_type, |ustar| {
        match split(&member.path, ustar.prefix.len(), ustar.name.len()) {
            Some((prefix, name)) => {
                ustar.prefix[..prefix.len()].copy_from_slice(prefix);
                ustar.name[..name.len()].copy_from_slice(name);
            }
            None => {
                copy_part(&mut ustar.name, &member.path);
                append_record(&mut records, "path", &member.path);
            }
        }
        copy_part(&mut ustar.linkname, &member.target);
        if member.target.len() > ustar.linkname.len() {
            append_record(&mut records, "linkpath", &member.target);
        }
        octal(&mut ustar.mode, (member.mode & 0o7777).into());
        for (key, field, id) in [
            ("uid", &mut ustar.uid, member.uid),
            ("gid", &mut ustar.gid, member.gid),
        ] {
            octal(field, id.min(MAX_ID));
            if id > MAX_ID {
                append_record(&mut records, key, id.to_string().as_bytes());
            }
        }
        let (seconds, nanos) = member.modified;
        // Of before the epoch, none, to a reader that knows no records.
        let plain_seconds = u64::try_from(seconds).unwrap_or(0).min(MAX_SIZE);
        octal(&mut ustar.mtime, plain_seconds);
        if nanos != 0 || i64::try_from(plain_seconds) != Ok(seconds) {
            append_record(&mut records, "mtime", time(seconds, nanos).as_bytes());
        }
        octal(&mut ustar.size, member.size.min(MAX_SIZE));
        if member.size > MAX_SIZE {
            append_record(&mut records, "size", member.size.to_string().as_bytes());
        }
    });
    if !records.is_empty() {
        append_records(archive, &records);
    }
    archive.extend_from_slice(header.as_bytes());
}

/// Fills the last block of so many bytes of a file.
pub fn append_padding(archive: &mut Vec<u8>, size: u64) {
    // Less than a block.
    append_zeroes(archive, padding(size) as usize);
}

/// Two blocks of zeroes end an archive.
pub fn append_end(archive: &mut Vec<u8>) {
    append_zeroes(archive, 2 * BLOCK_BYTES);
}

fn append_zeroes(archive: &mut Vec<u8>, count: usize) {
    archive.resize(archive.len() + count, 0);
}

fn append_records(archive: &mut Vec<u8>, records: &[u8]) {
    let header = header(EntryType::XHeader, |ustar| {
        copy_part(&mut ustar.name, b"././@PaxHeader");
        octal(&mut ustar.mode, 0o644);
        octal(&mut ustar.uid, 0);
        octal(&mut ustar.gid, 0);
        octal(&mut ustar.mtime, 0);
        octal(&mut ustar.size, records.len() as u64);
    });
    archive.extend_from_slice(header.as_bytes());
    archive.extend_from_slice(records);
    append_padding(archive, records.len() as u64);
}

fn header(entry_type: EntryType, fill: impl FnOnce(&mut UstarHeader)) -> Header {
    let mut header = Header::new_ustar();
    header.set_entry_type(entry_type);
    if let Some(ustar) = header.as_ustar_mut() {
        fill(ustar);
    }
    let sum = sum(header.as_bytes());
    octal(&mut header.as_old_mut().cksum, sum.into());
    header
}

/// Digits and a NUL. The tar crate's own allocates for each field, which is felt where
/// files are small.
fn octal(field: &mut [u8], mut number: u64) {
    let digits = field.len() - 1;
    for digit in field[..digits].iter_mut().rev() {
        *digit = b'0' + (number & 7) as u8;
        number >>= 3;
    }
}

/// As much as fits.
fn copy_part(field: &mut [u8; 100], text: &[u8]) {
    let length = text.len().min(field.len());
    field[..length].copy_from_slice(&text[..length]);
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
fn append_record(records: &mut Vec<u8>, key: &str, value: &[u8]) {
    // The space, "=" and the line's end.
    let rest = 3 + key.len() + value.len();
    let digits = |length: usize| length.ilog10() as usize + 1;
    let length = rest + digits(rest);
    // With its own digits it may have one more.
    let length = rest + digits(length);
    records.reserve(length);
    // A vector takes all.
    let _ = write!(records, "{length} {key}=");
    records.extend_from_slice(value);
    records.push(b'\n');
}

/// Before the epoch, the fraction counts back from it as the seconds do.
fn time(seconds: i64, nanos: u32) -> String {
    match (seconds, nanos.min(MAX_NANOS)) {
        (seconds, 0) => seconds.to_string(),
        (0.., nanos) => format!("{seconds}.{nanos:09}"),
        (_, nanos) => format!("-{}.{:09}", -(seconds + 1), MAX_NANOS + 1 - nanos),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_counts_its_own_digits() {
        for length in [1, 2, 80, 88, 89, 90, 91, 980, 985, 990, 991, 4095] {
            let mut records = Vec::new();
            append_record(&mut records, "path", &vec![b'x'; length]);
            let text = String::from_utf8(records.clone()).unwrap();
            let (said, _) = text.split_once(' ').unwrap();
            assert_eq!(said.parse::<usize>().unwrap(), records.len());
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

    #[test]
    fn times_have_the_fraction_that_they_need() {
        for (time_of, text) in [
            ((7, 0), "7"),
            ((1, 500_000_000), "1.500000000"),
            ((0, 5), "0.000000005"),
            ((-2, 500_000_000), "-1.500000000"),
            ((-1, 999_999_999), "-0.000000001"),
            ((-7, 0), "-7"),
            // No time has that many.
            ((1, u32::MAX), "1.999999999"),
            ((i64::MIN, 1), "-9223372036854775807.999999999"),
        ] {
            assert_eq!(time(time_of.0, time_of.1), text);
        }
    }

    #[test]
    fn what_fits_a_header_has_no_other() {
        let mut archive = Vec::new();
        let member = Member {
            path: b"a/b".to_vec(),
            modified: (1_000_000_000, 0),
            ..Member::default()
        };
        append_header(&mut archive, &member);
        assert_eq!(archive.len(), BLOCK_BYTES);
        archive.clear();
        let member = Member {
            modified: (1_000_000_000, 1),
            ..member
        };
        append_header(&mut archive, &member);
        assert_eq!(archive.len(), 3 * BLOCK_BYTES);
    }
}
