//! Takes a tar stream apart as it comes: ustar with pax or GNU extensions. Everything in
//! it is hostile. What it means to a filesystem is for the [`Receiver`].

use std::borrow::Cow;

use tar::{EntryType, Header};

use super::{BLOCK_BYTES, Kind, MAX_PATH_BYTES, Member, padding, sum};

/// Of a pax header or a GNU long name: two paths and some numbers.
const MAX_EXTENSION_BYTES: u64 = 256 * 1024;

pub trait Receiver {
    type Error: From<ParseError>;

    /// Of a [`Kind::File`], its `data` and an `end` follow; of others, nothing does.
    fn begin(&mut self, member: Member) -> Result<(), Self::Error>;
    /// A piece; `size` bytes in all.
    fn data(&mut self, data: &[u8]) -> Result<(), Self::Error>;
    fn end(&mut self) -> Result<(), Self::Error>;
}

/// Said of the stream: "what was sent …".
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    #[error("is no tar archive, or a damaged one: a header's checksum is wrong")]
    Checksum,
    #[error("is a damaged tar archive: a header has a number that is none")]
    Number,
    #[error("is a damaged tar archive: an extended header is no list of records")]
    Extension,
    #[error("has an extended header of more than 256 KiB")]
    LongExtension,
    #[error("has a path of more than {MAX_PATH_BYTES} bytes")]
    LongPath,
    #[error("has a name with a NUL byte")]
    Nul,
    #[error("has a sparse file: pack it as a plain one")]
    Sparse,
    #[error("ends in the middle of the archive: it was cut off")]
    Truncated,
}

/// What it holds of a stream is at most an extension.
#[derive(Debug, Default)]
pub struct Parser {
    state: State,
    /// The block or extension that is being gathered.
    held: Vec<u8>,
    /// For the next member.
    next: Records,
    /// For all that follow.
    global: Records,
    /// It has had a pax header.
    is_pax: bool,
}

#[derive(Clone, Copy, Debug, Default)]
enum State {
    #[default]
    Header,
    Extension {
        kind: ExtensionKind,
        size: usize,
        padding: usize,
    },
    Body {
        left: u64,
        padding: u64,
    },
    Skip {
        left: u64,
    },
    Ended,
}

#[derive(Clone, Copy, Debug)]
enum ExtensionKind {
    Pax,
    PaxGlobal,
    LongName,
    LongLink,
    Unknown,
}

/// What extensions say of a member.
#[derive(Debug, Default)]
struct Records {
    path: Option<Vec<u8>>,
    target: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    modified: Option<(i64, u32)>,
    /// GNU's sparse files look like others but for this.
    sparse: bool,
}

// === impl Parser ===

impl Parser {
    /// After an error, it is of no more use.
    pub fn feed<R: Receiver>(&mut self, mut data: &[u8], receiver: &mut R) -> Result<(), R::Error> {
        while !data.is_empty() {
            self.state = match self.state {
                State::Header => {
                    let Some(block) = self.gather(&mut data, BLOCK_BYTES) else {
                        return Ok(());
                    };
                    self.header(&block, receiver)?
                }
                State::Extension {
                    kind,
                    size,
                    padding,
                } => {
                    let Some(extension) = self.gather(&mut data, size + padding) else {
                        return Ok(());
                    };
                    self.extend(kind, &extension[..size])?;
                    State::Header
                }
                State::Body { left, padding } => {
                    let body = take(&mut data, left);
                    receiver.data(body)?;
                    match left - body.len() as u64 {
                        0 => {
                            receiver.end()?;
                            State::skip(padding)
                        }
                        left => State::Body { left, padding },
                    }
                }
                State::Skip { left } => {
                    let skipped = take(&mut data, left);
                    State::skip(left - skipped.len() as u64)
                }
                // Some pad archives to the size of a tape's record.
                State::Ended => return Ok(()),
            };
        }
        Ok(())
    }

    /// Whether that was all of an archive.
    pub fn finish(&self) -> Result<(), ParseError> {
        match self.state {
            State::Ended => Ok(()),
            _ => Err(ParseError::Truncated),
        }
    }

    /// So many bytes, once they are there.
    fn gather<'a>(&mut self, data: &mut &'a [u8], wanted: usize) -> Option<Cow<'a, [u8]>> {
        let now = take(data, (wanted - self.held.len()) as u64);
        if now.len() == wanted {
            return Some(Cow::Borrowed(now));
        }
        self.held.extend_from_slice(now);
        (self.held.len() == wanted).then(|| Cow::Owned(std::mem::take(&mut self.held)))
    }

    fn header<R: Receiver>(&mut self, block: &[u8], receiver: &mut R) -> Result<State, R::Error> {
        if block.iter().all(|byte| *byte == 0) {
            return Ok(State::Ended);
        }
        let header = Header::from_byte_slice(block);
        if header.cksum().ok() != Some(sum(header.as_bytes())) {
            return Err(ParseError::Checksum.into());
        }
        let size = field(&header.as_old().size, || header.entry_size())?;
        let extension = match header.entry_type().as_byte() {
            b'x' => Some(ExtensionKind::Pax),
            b'g' => Some(ExtensionKind::PaxGlobal),
            b'L' => Some(ExtensionKind::LongName),
            b'K' => Some(ExtensionKind::LongLink),
            // Vendors' own, such as Solaris' 'X'; a volume's name.
            b'X' | b'V' => Some(ExtensionKind::Unknown),
            _ => None,
        };
        let Some(kind) = extension else {
            return self.begin(header, size, receiver);
        };
        if size > MAX_EXTENSION_BYTES {
            return Err(ParseError::LongExtension.into());
        }
        // Both are small.
        let (size, padding) = (size as usize, padding(size) as usize);
        Ok(match size {
            0 => State::Header,
            size => State::Extension {
                kind,
                size,
                padding,
            },
        })
    }

    fn begin<R: Receiver>(
        &mut self,
        header: &Header,
        size: u64,
        receiver: &mut R,
    ) -> Result<State, R::Error> {
        let (member, body) = self.member(header, size)?;
        let (is_file, padding) = (member.kind == Kind::File, padding(body));
        receiver.begin(member)?;
        if is_file && body > 0 {
            return Ok(State::Body {
                left: body,
                padding,
            });
        }
        if is_file {
            receiver.end()?;
        }
        let left = body.checked_add(padding);
        Ok(State::skip(left.ok_or(ParseError::Number)?))
    }

    /// With the size of what follows.
    fn member(&mut self, header: &Header, size: u64) -> Result<(Member, u64), ParseError> {
        let fields = header.as_old();
        let next = std::mem::take(&mut self.next);
        let global = &self.global;
        let path = next.path.or_else(|| global.path.clone());
        let path = path.unwrap_or_else(|| header.path_bytes().into_owned());
        let target = next.target.or_else(|| global.target.clone());
        let target = target.or_else(|| header.link_name_bytes().map(Cow::into_owned));
        let target = target.unwrap_or_default();
        if path.len() > MAX_PATH_BYTES || target.len() > MAX_PATH_BYTES {
            return Err(ParseError::LongPath);
        }
        if path.contains(&0) || target.contains(&0) {
            return Err(ParseError::Nul);
        }
        let entry_type = header.entry_type();
        if entry_type == EntryType::GNUSparse || next.sparse || global.sparse {
            return Err(ParseError::Sparse);
        }
        let size = next.size.or(global.size).unwrap_or(size);
        let (kind, body) = match entry_type {
            // From before there were types.
            EntryType::Regular if size == 0 && path.ends_with(b"/") => (Kind::Directory, 0),
            EntryType::Regular | EntryType::Continuous => (Kind::File, size),
            // Whatever size they tell.
            EntryType::Directory => (Kind::Directory, 0),
            EntryType::Symlink => (Kind::Symlink, 0),
            EntryType::Char | EntryType::Block | EntryType::Fifo => {
                (Kind::Other(entry_type.as_byte()), 0)
            }
            // Only pax has the file's data once more; others tell its size and have none.
            EntryType::Link => (Kind::HardLink, if self.is_pax { size } else { 0 }),
            _ => (Kind::Other(entry_type.as_byte()), size),
        };
        let modified = match next.modified.or(global.modified) {
            Some(modified) => modified,
            // GNU's of before the epoch are negative numbers.
            None => {
                let seconds = field(&fields.mtime, || header.mtime())?;
                (seconds.cast_signed(), 0)
            }
        };
        let uid = next.uid.or(global.uid).map(Ok);
        let gid = next.gid.or(global.gid).map(Ok);
        let member = Member {
            kind,
            path,
            target,
            mode: field(&fields.mode, || header.mode())? & 0o7777,
            uid: uid.unwrap_or_else(|| field(&fields.uid, || header.uid()))?,
            gid: gid.unwrap_or_else(|| field(&fields.gid, || header.gid()))?,
            modified,
            size: if kind == Kind::File { size } else { 0 },
        };
        Ok((member, body))
    }

    fn extend(&mut self, kind: ExtensionKind, extension: &[u8]) -> Result<(), ParseError> {
        let upto_nul = || {
            extension
                .split(|byte| *byte == 0)
                .next()
                .map(<[u8]>::to_vec)
        };
        match kind {
            ExtensionKind::Pax => {
                self.is_pax = true;
                self.next.read(extension)?;
            }
            ExtensionKind::PaxGlobal => {
                self.is_pax = true;
                self.global.read(extension)?;
            }
            ExtensionKind::LongName => self.next.path = upto_nul(),
            ExtensionKind::LongLink => self.next.target = upto_nul(),
            ExtensionKind::Unknown => {}
        }
        Ok(())
    }
}

/// At most so many bytes.
fn take<'a>(data: &mut &'a [u8], most: u64) -> &'a [u8] {
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    let (taken, rest) = data.split_at(most.min(data.len()));
    *data = rest;
    taken
}

/// A header's number. One that is blank is none: some leave out what they do not know.
fn field<T: Default>(
    bytes: &[u8],
    read: impl FnOnce() -> std::io::Result<T>,
) -> Result<T, ParseError> {
    if bytes.iter().all(|byte| matches!(byte, 0 | b' ')) {
        return Ok(T::default());
    }
    read().map_err(|_| ParseError::Number)
}

// === impl State ===

impl State {
    fn skip(left: u64) -> Self {
        match left {
            0 => Self::Header,
            left => Self::Skip { left },
        }
    }
}

// === impl Records ===

impl Records {
    /// Each is its length, a space, a key, "=", a value and a line end.
    fn read(&mut self, mut records: &[u8]) -> Result<(), ParseError> {
        let wrong = ParseError::Extension;
        while !records.is_empty() {
            let mut digits = records.iter().take(8);
            let space = digits.position(|byte| *byte == b' ').ok_or(wrong)?;
            let length = number(&records[..space]).ok_or(wrong)?;
            let length = usize::try_from(length).map_err(|_| wrong)?;
            let record = records.get(space + 1..length).ok_or(wrong)?;
            let record = record.strip_suffix(b"\n").ok_or(wrong)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or(wrong)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            let number = || number(value).ok_or(ParseError::Number);
            match key {
                b"path" => self.path = Some(value.to_vec()),
                b"linkpath" => self.target = Some(value.to_vec()),
                b"size" => self.size = Some(number()?),
                b"uid" => self.uid = Some(number()?),
                b"gid" => self.gid = Some(number()?),
                b"mtime" => self.modified = Some(time(value).ok_or(ParseError::Number)?),
                key if key.starts_with(b"GNU.sparse.") => self.sparse = true,
                _ => {}
            }
            records = &records[length..];
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
    let point = value.iter().position(|byte| *byte == b'.');
    let (whole, fraction) = match point {
        Some(point) => (&value[..point], &value[point + 1..]),
        None => (value, &b""[..]),
    };
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let seconds = number(whole)?;
    let digits = fraction.iter().chain(std::iter::repeat(&b'0')).take(9);
    let nanos = digits.fold(0, |nanos, digit| nanos * 10 + u32::from(digit - b'0'));
    if !is_before {
        return Some((i64::try_from(seconds).ok()?, nanos));
    }
    let seconds = 0_i64.checked_sub_unsigned(seconds)?;
    match nanos {
        0 => Some((seconds, 0)),
        nanos => Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos)),
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::super::{append_end, append_header, append_padding};
    use super::*;

    type Members = Vec<(Member, Vec<u8>)>;

    #[derive(Default)]
    struct Seen {
        members: Members,
        is_open: bool,
    }

    impl Receiver for Seen {
        type Error = ParseError;

        fn begin(&mut self, member: Member) -> Result<(), ParseError> {
            assert!(!self.is_open);
            assert!(member.path.len() <= MAX_PATH_BYTES && member.target.len() <= MAX_PATH_BYTES);
            assert!(member.mode <= 0o7777 && member.modified.1 < 1_000_000_000);
            self.is_open = member.kind == Kind::File;
            self.members.push((member, Vec::new()));
            Ok(())
        }

        fn data(&mut self, data: &[u8]) -> Result<(), ParseError> {
            assert!(self.is_open);
            let (_, body) = self.members.last_mut().unwrap();
            body.extend_from_slice(data);
            Ok(())
        }

        fn end(&mut self) -> Result<(), ParseError> {
            let (member, body) = self.members.last().unwrap();
            assert_eq!(member.size, body.len() as u64);
            self.is_open = false;
            Ok(())
        }
    }

    fn parse(archive: &[u8], piece: usize) -> Result<Members, ParseError> {
        let (mut parser, mut seen) = (Parser::default(), Seen::default());
        for piece in archive.chunks(piece) {
            parser.feed(piece, &mut seen)?;
            assert!(parser.held.len() as u64 <= MAX_EXTENSION_BYTES + BLOCK_BYTES as u64);
        }
        parser.finish().map(|()| seen.members)
    }

    fn write(members: &[(Member, Vec<u8>)]) -> Vec<u8> {
        let mut archive = Vec::new();
        for (member, body) in members {
            append_header(&mut archive, member);
            archive.extend_from_slice(body);
            append_padding(&mut archive, member.size);
        }
        append_end(&mut archive);
        archive
    }

    fn any_path() -> impl Strategy<Value = Vec<u8>> {
        let byte = prop_oneof![1 => Just(b'/'), 9 => 1_u8..=255];
        let path = (vec(byte, 1..130), 1..64_usize).prop_map(|(part, times)| {
            let mut path = part.repeat(times);
            path.truncate(MAX_PATH_BYTES);
            path
        });
        path.prop_filter("a directory", |path| !path.ends_with(b"/"))
    }

    prop_compose! {
        fn any_member()(
            kind in prop_oneof![
                3 => Just(Kind::File), 1 => Just(Kind::Directory), 1 => Just(Kind::Symlink),
                1 => Just(Kind::HardLink), 1 => Just(Kind::Other(b'3')),
            ],
            path in any_path(),
            target in any_path(),
            (first, length) in (any::<u8>(), 0..2000_usize),
            mode in 0..0o10000_u32,
            ids in any::<[u64; 2]>(),
            small_ids in any::<bool>(),
            seconds in prop_oneof![any::<i64>(), -10..10_i64, 0..1_i64 << 34],
            nanos in prop_oneof![Just(0), 0..1_000_000_000_u32],
        ) -> (Member, Vec<u8>) {
            let length = if kind == Kind::File { length } else { 0 };
            let body: Vec<_> = (first..=u8::MAX).cycle().take(length).collect();
            let is_link = matches!(kind, Kind::Symlink | Kind::HardLink);
            let [uid, gid] = ids.map(|id| if small_ids { id & 0xffff } else { id });
            let member = Member {
                kind,
                path,
                target: if is_link { target } else { Vec::new() },
                mode,
                uid,
                gid,
                modified: (seconds, nanos),
                size: body.len() as u64,
            };
            (member, body)
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            members in vec(any_member(), 0..6),
            piece in 1..3000_usize,
            cut in any::<prop::sample::Index>(),
        ) {
            let archive = write(&members);
            prop_assert_eq!(parse(&archive, piece).unwrap(), members);
            // The end is two blocks, of which the first says it; any part before is too little.
            let cut = cut.index(archive.len() - 2 * BLOCK_BYTES + 1);
            prop_assert_eq!(parse(&archive[..cut], piece), Err(ParseError::Truncated));
        }

        #[test]
        fn nothing_hurts_it(blocks in vec(any_block(), 0..8), piece in 1..2000_usize) {
            let _ = parse(&blocks.concat(), piece);
        }

        #[test]
        fn no_damage_hurts_it(
            members in vec(any_member(), 1..4),
            hits in vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
            piece in 1..2000_usize,
        ) {
            let mut archive = write(&members);
            for (at, byte) in hits {
                let at = at.index(archive.len());
                archive[at] = byte;
            }
            let _ = parse(&archive, piece);
        }

        #[test]
        fn any_extension_is_records_or_nothing(
            bytes in vec(
                prop_oneof![b'0'..=b'9', Just(b' '), Just(b'='), Just(b'\n'), Just(b'p')],
                0..60,
            ),
            others in vec(any::<u8>(), 0..600),
        ) {
            let _ = Records::default().read(&bytes);
            let _ = Records::default().read(&others);
        }
    }

    /// Blocks that are headers but for some bytes, with a right sum.
    fn any_block() -> impl Strategy<Value = Vec<u8>> {
        let types = prop::sample::select(b"0125xgLKSXV3467\0".to_vec());
        let header = (types, any::<u64>(), vec((0..512_usize, any::<u8>()), 0..6));
        prop_oneof![
            header.prop_map(|(entry_type, size, changes)| {
                let mut header = Header::new_gnu();
                header.set_entry_type(EntryType::new(entry_type));
                header.set_size(size >> (size % 60));
                header.set_mode(0o644);
                header.set_uid(0);
                header.set_gid(0);
                for (at, byte) in changes {
                    header.as_mut_bytes()[at] = byte;
                }
                header.set_cksum();
                header.as_bytes().to_vec()
            }),
            Just(extension(b'x', b"31 path=../../../../etc/passwd\n")),
            vec(any::<u8>(), 512),
        ]
    }

    fn header(entry_type: u8, name: &[u8], size: u64) -> Vec<u8> {
        let mut header = Header::new_ustar();
        header.as_ustar_mut().unwrap().name[..name.len()].copy_from_slice(name);
        header.set_entry_type(EntryType::new(entry_type));
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(size);
        header.set_cksum();
        header.as_bytes().to_vec()
    }

    fn extension(entry_type: u8, text: &[u8]) -> Vec<u8> {
        let mut archive = header(entry_type, b"extension", text.len() as u64);
        archive.extend_from_slice(text);
        append_padding(&mut archive, text.len() as u64);
        archive
    }

    fn kinds(archive: &[u8]) -> Result<Vec<(Kind, String)>, ParseError> {
        let mut archive = archive.to_vec();
        append_end(&mut archive);
        let members = parse(&archive, 700)?.into_iter();
        let told =
            |(member, _): (Member, _)| (member.kind, String::from_utf8(member.path).unwrap());
        Ok(members.map(told).collect())
    }

    #[test]
    fn what_gnu_tar_writes_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let long = "long-".repeat(40);
        std::fs::write(folder.path().join(&long), "data").unwrap();
        std::os::unix::fs::symlink("x".repeat(200), folder.path().join("link")).unwrap();
        std::fs::write(folder.path().join("old"), "old").unwrap();
        let old = std::fs::File::open(folder.path().join("old")).unwrap();
        let before = std::time::Duration::from_millis(1_500);
        old.set_modified(std::time::UNIX_EPOCH - before).unwrap();
        for format in ["gnu", "pax", "ustar", "v7"] {
            let is_old = matches!(format, "ustar" | "v7");
            let mut tar = Command::new("tar");
            tar.arg(format!("--format={format}"));
            if is_old {
                // They have room for neither long names nor times before the epoch.
                tar.args(["--exclude=long-*", "--exclude=link", "--exclude=old"]);
            }
            let output = tar.arg("-cC").arg(folder.path()).arg(".").output().unwrap();
            assert!(output.status.success(), "{format}");
            let members = parse(&output.stdout, 999).unwrap();
            assert_eq!(members[0].0.kind, Kind::Directory);
            if is_old {
                continue;
            }
            let of = |path: &str| {
                let mut all = members.iter();
                let found = all.find(|(member, _)| member.path == path.as_bytes());
                found.unwrap_or_else(|| panic!("{format}: no {path}"))
            };
            assert_eq!(of(&format!("./{long}")).1, b"data");
            let (link, _) = of("./link");
            assert_eq!(
                (link.kind, &link.target[..]),
                (Kind::Symlink, &[b'x'; 200][..])
            );
            // GNU's own format has no fraction.
            let nanos = if format == "pax" { 500_000_000 } else { 0 };
            assert_eq!(of("./old").0.modified, (-2, nanos), "{format}");
        }
    }

    #[test]
    fn times_before_the_epoch_keep_their_fraction() {
        for (text, expected) in [
            (&b"-1.5"[..], Some((-2, 500_000_000))),
            (b"-0.000000001", Some((-1, 999_999_999))),
            (b"1.5", Some((1, 500_000_000))),
            (b"1.9999999999", Some((1, 999_999_999))),
            (b"7", Some((7, 0))),
            (b"", None),
            (b".5", None),
            (b"-", None),
            (b"+1", None),
            (b"1.x", None),
            (b"1e3", None),
            (b"-9223372036854775808", Some((i64::MIN, 0))),
            (b"-9223372036854775808.5", None),
            (b"9223372036854775808", None),
            (b"99999999999999999999", None),
        ] {
            assert_eq!(time(text), expected, "{text:?}");
        }
    }

    #[test]
    fn extensions_as_long_as_they_like_are_not_held() {
        for entry_type in *b"xgLKXV" {
            let endless = header(entry_type, b"endless", MAX_EXTENSION_BYTES + 1);
            assert_eq!(kinds(&endless), Err(ParseError::LongExtension));
        }
    }

    #[test]
    fn names_that_no_file_has_are_refused() {
        let long = vec![b'x'; MAX_PATH_BYTES + 1];
        for entry_type in *b"LK" {
            let archive = [extension(entry_type, &long), header(b'2', b"link", 0)].concat();
            assert_eq!(kinds(&archive), Err(ParseError::LongPath));
        }
        for text in [&b"12 path=a\0b\n"[..], b"16 linkpath=a\0b\n"] {
            let archive = [extension(b'x', text), header(b'2', b"link", 0)].concat();
            assert_eq!(kinds(&archive), Err(ParseError::Nul));
        }
    }

    #[test]
    fn sparse_files_are_refused() {
        assert_eq!(kinds(&header(b'S', b"sparse", 0)), Err(ParseError::Sparse));
        let text = b"22 GNU.sparse.major=1\n";
        for entry_type in *b"xg" {
            let archive = [extension(entry_type, text), header(b'0', b"sparse", 0)].concat();
            assert_eq!(kinds(&archive), Err(ParseError::Sparse));
        }
    }

    #[test]
    fn what_comes_before_members_is_for_the_next_or_for_all() {
        let archive = [
            // As git writes it.
            extension(
                b'g',
                b"12 uid=1234\n52 comment=0123456789012345678901234567890123456789\n",
            ),
            extension(b'x', b"9 uid=77\n"),
            header(b'0', b"one", 0),
            extension(b'V', b"a volume"),
            header(b'0', b"two", 0),
        ];
        let mut archive = archive.concat();
        append_end(&mut archive);
        let members = parse(&archive, 512).unwrap();
        let uids: Vec<_> = members.iter().map(|(member, _)| member.uid).collect();
        assert_eq!(uids, [77, 1234]);
    }

    #[test]
    fn a_number_may_be_left_out_but_not_wrong() {
        let with = |field: &[u8; 12], is_mtime: bool| {
            let mut header = Header::new_ustar();
            let old = header.as_old_mut();
            old.name[0] = b'a';
            *(if is_mtime {
                &mut old.mtime
            } else {
                &mut old.size
            }) = *field;
            header.set_cksum();
            kinds(header.as_bytes())
        };
        for is_mtime in [true, false] {
            for blank in [&[0; 12], &[b' '; 12]] {
                assert_eq!(
                    with(blank, is_mtime),
                    Ok(vec![(Kind::File, "a".to_owned())])
                );
            }
            for wrong in [b"00000000009\0", b"-0000000001\0", b"0000 000001\0"] {
                assert_eq!(with(wrong, is_mtime), Err(ParseError::Number));
            }
        }
    }

    /// Only some are followed by as much as they say.
    #[test]
    fn sizes_of_what_is_no_file_mislead_nobody() {
        let pax = extension(b'x', b"9 uid=77\n");
        let body = vec![b'x'; 512];
        let file = header(b'0', b"file", 0);
        let of = |name: &str, kind| (kind, name.to_owned());
        let last = of("file", Kind::File);
        for (flag, kind) in [
            (b'1', Kind::HardLink),
            (b'2', Kind::Symlink),
            (b'3', Kind::Other(b'3')),
            (b'5', Kind::Directory),
            (b'6', Kind::Other(b'6')),
        ] {
            let archive = [&header(flag, b"it", 300)[..], &file].concat();
            let expected = vec![of("it", kind), last.clone()];
            assert_eq!(kinds(&archive), Ok(expected), "{flag}");
        }
        let archive = [&pax[..], &header(b'1', b"it", 300), &body, &file].concat();
        let expected = vec![of("it", Kind::HardLink), last.clone()];
        assert_eq!(kinds(&archive), Ok(expected));
        let archive = [&header(b'Z', b"it", 300)[..], &body, &file].concat();
        let expected = vec![of("it", Kind::Other(b'Z')), last.clone()];
        assert_eq!(kinds(&archive), Ok(expected));
        let old = header(0, b"old/", 0);
        assert_eq!(kinds(&old), Ok(vec![of("old/", Kind::Directory)]));
    }
}
