//! Reading and writing tar streams (POSIX pax; pax(1), "pax Interchange Format").
//!
//! The header is the tar crate's. Its reader is not: it keeps long names and pax
//! records of any length in memory, and splits records at line ends, which may be in
//! a name.

use std::io::{self, Read, Write};

use tar::{EntryType, Header};

const BLOCK_BYTES: usize = 512;
/// Of the records before one member: two paths and some numbers.
const MAX_RECORDS_BYTES: u64 = 256 * 1024;
pub(super) const MAX_PATH_BYTES: usize = 4096;
/// What an octal field of eleven digits holds.
const MAX_PLAIN_SIZE: u64 = (1 << 33) - 1;
const MAX_PLAIN_ID: u64 = (1 << 21) - 1;
const ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Directory,
    Symlink,
    HardLink,
    /// Devices, pipes and what is unknown.
    Other,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Member {
    pub(super) kind: Kind,
    pub(super) path: Vec<u8>,
    /// Of a link.
    pub(super) target: Vec<u8>,
    pub(super) size: u64,
    pub(super) mode: u32,
    pub(super) uid: u64,
    pub(super) gid: u64,
    /// Since the epoch, and nanoseconds after that.
    pub(super) modified: (i64, u32),
}

#[derive(Debug, thiserror::Error)]
pub(super) enum ArchiveError {
    #[error("the archive cannot be read ({0})")]
    Read(#[from] io::Error),
    #[error("the archive ends in its midst: the transfer was cut off")]
    CutOff,
    #[error("the archive is damaged: {0}")]
    Damaged(&'static str),
}

pub(super) struct Archive<R> {
    reader: R,
    /// Of the member's data.
    left: u64,
    /// After it.
    padding: u64,
}

/// What pax records say of the next member.
#[derive(Debug, Default)]
struct Records {
    path: Option<Vec<u8>>,
    target: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    modified: Option<(i64, u32)>,
}

// === impl Archive ===

impl<R: Read> Archive<R> {
    pub(super) fn new(reader: R) -> Self {
        Self {
            reader,
            left: 0,
            padding: 0,
        }
    }

    /// The next member; the data of the one before is passed over.
    pub(super) fn next(&mut self) -> Result<Option<Member>, ArchiveError> {
        let mut records = Records::default();
        loop {
            self.skip()?;
            let mut block = [0; BLOCK_BYTES];
            self.fill(&mut block)?;
            if block == ZEROS {
                return Ok(None);
            }
            let header = Header::from_byte_slice(&block);
            let sum = sum(&block);
            if header.cksum().ok() != Some(sum) {
                return Err(ArchiveError::Damaged("a checksum is wrong"));
            }
            let size = header.entry_size();
            let size = size.map_err(|_| ArchiveError::Damaged("a size is no number"))?;
            let entry_type = header.entry_type();
            match entry_type {
                EntryType::XHeader => {
                    let text = self.records(size)?;
                    records.read(&text)?;
                }
                EntryType::GNULongName => records.path = Some(self.name(size)?),
                EntryType::GNULongLink => records.target = Some(self.name(size)?),
                EntryType::XGlobalHeader => self.expect(size),
                EntryType::GNUSparse => {
                    return Err(ArchiveError::Damaged("sparse files are not understood"));
                }
                _ => {
                    let member = member(header, size, records)?;
                    self.expect(match member.kind {
                        // Whatever they say, nothing follows.
                        Kind::Symlink | Kind::HardLink | Kind::Directory => 0,
                        Kind::File | Kind::Other => member.size,
                    });
                    return Ok(Some(member));
                }
            }
        }
    }

    /// Some of the member's data; 0 at its end.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Result<usize, ArchiveError> {
        let most = usize::try_from(self.left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let count = self.reader.read(&mut buffer[..most])?;
        if count == 0 {
            return Err(ArchiveError::CutOff);
        }
        self.left -= count as u64;
        Ok(count)
    }

    fn expect(&mut self, size: u64) {
        let block = BLOCK_BYTES as u64;
        self.left = size;
        self.padding = (block - size % block) % block;
    }

    fn skip(&mut self) -> Result<(), ArchiveError> {
        let rest = self.left.saturating_add(std::mem::take(&mut self.padding));
        self.left = 0;
        let skipped = io::copy(&mut (&mut self.reader).take(rest), &mut io::sink())?;
        match skipped == rest {
            true => Ok(()),
            false => Err(ArchiveError::CutOff),
        }
    }

    fn fill(&mut self, block: &mut [u8]) -> Result<(), ArchiveError> {
        self.reader
            .read_exact(block)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => ArchiveError::CutOff,
                _ => error.into(),
            })
    }

    fn records(&mut self, size: u64) -> Result<Vec<u8>, ArchiveError> {
        if size > MAX_RECORDS_BYTES {
            return Err(ArchiveError::Damaged(
                "the records of a member are too long",
            ));
        }
        self.expect(size);
        let mut text = vec![0; usize::try_from(size).unwrap_or_default()];
        self.fill(&mut text)?;
        self.left = 0;
        Ok(text)
    }

    fn name(&mut self, size: u64) -> Result<Vec<u8>, ArchiveError> {
        let mut name = self.records(size)?;
        if let Some(end) = name.iter().position(|&byte| byte == 0) {
            name.truncate(end);
        }
        Ok(name)
    }
}

fn member(header: &Header, size: u64, records: Records) -> Result<Member, ArchiveError> {
    let kind = match header.entry_type() {
        EntryType::Regular | EntryType::Continuous => Kind::File,
        EntryType::Directory => Kind::Directory,
        EntryType::Symlink => Kind::Symlink,
        EntryType::Link => Kind::HardLink,
        _ => Kind::Other,
    };
    let path = records
        .path
        .unwrap_or_else(|| header.path_bytes().into_owned());
    // Before POSIX a directory was a file with a slash at its end.
    let kind = match kind {
        Kind::File if path.ends_with(b"/") => Kind::Directory,
        kind => kind,
    };
    let target = records.target.unwrap_or_else(|| {
        let target = header.link_name_bytes();
        target.unwrap_or_default().into_owned()
    });
    if path.len() > MAX_PATH_BYTES || target.len() > MAX_PATH_BYTES {
        return Err(ArchiveError::Damaged("a path is too long"));
    }
    let seconds = header.mtime().unwrap_or_default();
    Ok(Member {
        kind,
        path,
        target,
        size: records.size.unwrap_or(size),
        mode: header.mode().unwrap_or_default() & 0o7777,
        uid: records.uid.or(header.uid().ok()).unwrap_or_default(),
        gid: records.gid.or(header.gid().ok()).unwrap_or_default(),
        modified: records
            .modified
            .unwrap_or((i64::try_from(seconds).unwrap_or_default(), 0)),
    })
}

// === impl Records ===

impl Records {
    /// Each is its length, a space, a key, "=", a value and a line end.
    fn read(&mut self, mut text: &[u8]) -> Result<(), ArchiveError> {
        const DAMAGED: ArchiveError = ArchiveError::Damaged("a pax record is none");
        while !text.is_empty() {
            let space = text
                .iter()
                .take(8)
                .position(|&byte| byte == b' ')
                .ok_or(DAMAGED)?;
            let length = number(&text[..space]).ok_or(DAMAGED)?;
            let length = usize::try_from(length).map_err(|_| DAMAGED)?;
            let record = text.get(space + 1..length).ok_or(DAMAGED)?;
            let record = record.strip_suffix(b"\n").ok_or(DAMAGED)?;
            let equals = record
                .iter()
                .position(|&byte| byte == b'=')
                .ok_or(DAMAGED)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            match key {
                b"path" => self.path = Some(value.to_vec()),
                b"linkpath" => self.target = Some(value.to_vec()),
                b"size" => self.size = Some(number(value).ok_or(DAMAGED)?),
                b"uid" => self.uid = Some(number(value).ok_or(DAMAGED)?),
                b"gid" => self.gid = Some(number(value).ok_or(DAMAGED)?),
                b"mtime" => self.modified = Some(time(value).ok_or(DAMAGED)?),
                _ => {}
            }
            text = &text[length..];
        }
        Ok(())
    }
}

fn number(digits: &[u8]) -> Option<u64> {
    let is_plain = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    is_plain.then(|| std::str::from_utf8(digits).ok()?.parse().ok())?
}

/// "1.5" is a second and a half; "-1.5" as well before the epoch.
fn time(value: &[u8]) -> Option<(i64, u32)> {
    let (is_before, value) = match value.strip_prefix(b"-") {
        Some(value) => (true, value),
        None => (false, value),
    };
    let point = value.iter().position(|&byte| byte == b'.');
    let (whole, fraction) = match point {
        Some(point) => (&value[..point], &value[point + 1..]),
        None => (value, &b""[..]),
    };
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let seconds = i64::try_from(number(whole)?).ok()?;
    let digits = fraction.iter().chain(std::iter::repeat(&b'0')).take(9);
    let nanos = digits.fold(0, |nanos, digit| nanos * 10 + u32::from(digit - b'0'));
    Some(match (is_before, nanos) {
        (false, nanos) => (seconds, nanos),
        (true, 0) => (-seconds, 0),
        (true, nanos) => (-seconds - 1, 1_000_000_000 - nanos),
    })
}

fn sum(block: &[u8; BLOCK_BYTES]) -> u32 {
    let bytes = block.iter().enumerate();
    // The sum's own field counts as spaces.
    bytes
        .map(|(at, &byte)| u32::from(if (148..156).contains(&at) { b' ' } else { byte }))
        .sum()
}

// --- writing

/// The header of a member, with pax records for what it cannot hold. The data, and
/// `pad`, follow.
pub(super) fn write_header(writer: &mut impl Write, member: &Member) -> io::Result<()> {
    let mut records = Vec::new();
    let mut header = Header::new_ustar();
    let entry_type = match member.kind {
        Kind::File => EntryType::Regular,
        Kind::Directory => EntryType::Directory,
        Kind::Symlink => EntryType::Symlink,
        Kind::HardLink => EntryType::Link,
        Kind::Other => return Err(io::ErrorKind::Unsupported.into()),
    };
    header.set_entry_type(entry_type);
    header.set_mode(member.mode);
    let (seconds, nanos) = member.modified;
    match u64::try_from(seconds) {
        Ok(seconds) if seconds <= MAX_PLAIN_SIZE && nanos == 0 => header.set_mtime(seconds),
        _ => {
            header.set_mtime(u64::try_from(seconds).unwrap_or(0).min(MAX_PLAIN_SIZE));
            record(&mut records, "mtime", time_text(seconds, nanos).as_bytes());
        }
    }
    header.set_size(member.size.min(MAX_PLAIN_SIZE));
    if member.size > MAX_PLAIN_SIZE {
        record(&mut records, "size", member.size.to_string().as_bytes());
    }
    header.set_uid(member.uid.min(MAX_PLAIN_ID));
    if member.uid > MAX_PLAIN_ID {
        record(&mut records, "uid", member.uid.to_string().as_bytes());
    }
    header.set_gid(member.gid.min(MAX_PLAIN_ID));
    if member.gid > MAX_PLAIN_ID {
        record(&mut records, "gid", member.gid.to_string().as_bytes());
    }
    if let Some(ustar) = header.as_ustar_mut() {
        if !fits(&mut ustar.name, &member.path) {
            record(&mut records, "path", &member.path);
        }
        if !fits(&mut ustar.linkname, &member.target) {
            record(&mut records, "linkpath", &member.target);
        }
    }
    if !records.is_empty() {
        let mut before = Header::new_ustar();
        before.set_entry_type(EntryType::XHeader);
        before.set_mode(0o644);
        before.set_size(records.len() as u64);
        if let Some(ustar) = before.as_ustar_mut() {
            fits(&mut ustar.name, b"pax");
        }
        before.set_cksum();
        writer.write_all(before.as_bytes())?;
        writer.write_all(&records)?;
        pad(writer, records.len() as u64)?;
    }
    header.set_cksum();
    writer.write_all(header.as_bytes())
}

pub(super) fn pad(writer: &mut impl Write, size: u64) -> io::Result<()> {
    let over = usize::try_from(size % BLOCK_BYTES as u64).unwrap_or_default();
    match over {
        0 => Ok(()),
        over => writer.write_all(&ZEROS[over..]),
    }
}

pub(super) fn write_end(writer: &mut impl Write) -> io::Result<()> {
    writer.write_all(&ZEROS)?;
    writer.write_all(&ZEROS)
}

/// As much as fits.
fn fits(field: &mut [u8; 100], text: &[u8]) -> bool {
    let length = text.len().min(field.len());
    field[..length].copy_from_slice(&text[..length]);
    text.len() <= field.len()
}

fn record(records: &mut Vec<u8>, key: &str, value: &[u8]) {
    // A space, "=" and a line end, and the length's own digits.
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while rest + length.to_string().len() != length {
        length += 1;
    }
    records.extend_from_slice(format!("{length} {key}=").as_bytes());
    records.extend_from_slice(value);
    records.push(b'\n');
}

fn time_text(seconds: i64, nanos: u32) -> String {
    match (seconds, nanos) {
        (seconds, 0) => seconds.to_string(),
        (0.., nanos) => format!("{seconds}.{nanos:09}"),
        (seconds, nanos) => {
            let (whole, rest) = (-(seconds + 1), 1_000_000_000 - nanos);
            format!("-{whole}.{rest:09}")
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn paths() -> impl Strategy<Value = Vec<u8>> {
        vec(1..=255_u8, 1..600).prop_filter("a directory", |path| !path.ends_with(b"/"))
    }

    prop_compose! {
        fn members()(
            kind in prop_oneof![Just(Kind::File), Just(Kind::Directory), Just(Kind::Symlink)],
            path in paths(),
            target in paths(),
            data in vec(any::<u8>(), 0..2000),
            mode in 0..0o10000_u32,
            ids in any::<[u32; 2]>(),
            seconds in -1_000_000_000_000..1_000_000_000_000_i64,
            nanos in prop_oneof![Just(0), 0..1_000_000_000_u32],
        ) -> (Member, Vec<u8>) {
            let data = if kind == Kind::File { data } else { Vec::new() };
            let member = Member {
                kind,
                path,
                target: if kind == Kind::Symlink { target } else { Vec::new() },
                size: data.len() as u64,
                mode,
                uid: ids[0].into(),
                gid: ids[1].into(),
                modified: (seconds, nanos),
            };
            (member, data)
        }
    }

    fn write(members: &[(Member, Vec<u8>)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (member, data) in members {
            write_header(&mut bytes, member).unwrap();
            bytes.extend_from_slice(data);
            pad(&mut bytes, member.size).unwrap();
        }
        write_end(&mut bytes).unwrap();
        bytes
    }

    fn read(bytes: &[u8]) -> Result<Vec<(Member, Vec<u8>)>, ArchiveError> {
        let mut archive = Archive::new(bytes);
        let mut members = Vec::new();
        while let Some(member) = archive.next()? {
            let mut data = Vec::new();
            let mut buffer = [0; 700];
            loop {
                match archive.read(&mut buffer)? {
                    0 => break,
                    count => data.extend_from_slice(&buffer[..count]),
                }
            }
            members.push((member, data));
        }
        Ok(members)
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(members in vec(members(), 0..8)) {
            prop_assert_eq!(read(&write(&members)).unwrap(), members);
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in vec(any::<u8>(), 0..4096)) {
            let _ = read(&bytes);
        }

        #[test]
        fn any_damage_is_read_or_refused(
            members in vec(members(), 1..4),
            hits in vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        ) {
            let mut bytes = write(&members);
            for (at, byte) in hits {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            let _ = read(&bytes);
        }

        #[test]
        fn what_is_cut_off_is_told(members in vec(members(), 1..4), cut in any::<prop::sample::Index>()) {
            let bytes = write(&members);
            // The end is two blocks, of which the first says it.
            let cut = cut.index(bytes.len() - 2 * BLOCK_BYTES);
            prop_assert!(matches!(read(&bytes[..cut]), Err(ArchiveError::CutOff)));
        }

        #[test]
        fn any_records_are_read_or_refused(text in vec(any::<u8>(), 0..600)) {
            let _ = Records::default().read(&text);
        }
    }

    #[test]
    fn what_gnu_tar_writes_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let long = "long-".repeat(40);
        std::fs::write(folder.path().join(&long), "data").unwrap();
        std::os::unix::fs::symlink("x".repeat(200), folder.path().join("link")).unwrap();
        for format in ["gnu", "pax", "ustar"] {
            let mut tar = std::process::Command::new("tar");
            tar.arg(format!("--format={format}"))
                .arg("-cC")
                .arg(folder.path());
            // ustar has room for neither.
            let names = match format {
                "ustar" => vec!["."],
                _ => vec![".", "./link"],
            };
            let exclude = ["--exclude=long-*", "--exclude=link"];
            let output = match format {
                "ustar" => tar.args(exclude).args(names).output(),
                _ => tar.args(names).output(),
            };
            let output = output.unwrap();
            assert!(output.status.success(), "{format}");
            let members = read(&output.stdout).unwrap();
            assert_eq!(members[0].0.kind, Kind::Directory);
            if format != "ustar" {
                let of = |kind| {
                    let found = members.iter().find(|(member, _)| member.kind == kind);
                    found.unwrap_or_else(|| panic!("{format}: no {kind:?}"))
                };
                assert_eq!(of(Kind::File).0.path, format!("./{long}").into_bytes());
                assert_eq!(of(Kind::File).1, b"data");
                assert_eq!(of(Kind::Symlink).0.target, "x".repeat(200).into_bytes());
            }
        }
    }

    #[test]
    fn times_before_the_epoch_keep_their_fraction() {
        assert_eq!(time(b"-1.5"), Some((-2, 500_000_000)));
        assert_eq!(time_text(-2, 500_000_000), "-1.500000000");
        assert_eq!(time(b"1.5"), Some((1, 500_000_000)));
        assert_eq!(time(b"7"), Some((7, 0)));
        for bad in [
            &b""[..],
            b".5",
            b"-",
            b"1.x",
            b"1e3",
            b"99999999999999999999",
        ] {
            assert_eq!(time(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn records_as_long_as_they_like_are_not_kept() {
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::XHeader);
        header.set_size(MAX_RECORDS_BYTES + 1);
        header.set_cksum();
        let endless = header.as_bytes().chain(io::repeat(b'x'));
        let refused = Archive::new(endless).next().unwrap_err();
        assert!(matches!(refused, ArchiveError::Damaged(_)), "{refused}");
    }
}
