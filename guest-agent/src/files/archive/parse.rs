//! Takes a tar stream apart as it comes: ustar with pax or GNU extensions. Everything
//! in it is hostile. What it means to the filesystem is for the [`Receiver`].

use tar::{EntryType, Header};

use super::{BLOCK_BYTES, padding};

/// Of a pax header or a GNU long name.
const MAX_EXTENSION_BYTES: u64 = 256 * 1024;

/// One entry of an archive, as it says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Item {
    pub(super) kind: ItemKind,
    pub(super) path: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) mode: u32,
    pub(super) uid: u64,
    pub(super) gid: u64,
    pub(super) mtime: i64,
    pub(super) size: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum ItemKind {
    #[default]
    File,
    Directory,
    Symlink,
    HardLink,
    /// A device, a pipe, a sparse file …
    Other,
}

pub(super) trait Receiver {
    type Error: From<ParseError>;

    fn begin(&mut self, item: Item) -> Result<(), Self::Error>;
    /// Of a file that began; `size` bytes in all.
    fn data(&mut self, data: &[u8]) -> Result<(), Self::Error>;
    fn end(&mut self) -> Result<(), Self::Error>;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ParseError {
    #[error("is no tar archive, or a damaged one: a header's checksum is wrong")]
    Checksum,
    #[error("is a damaged tar archive: a header has a number that is none")]
    Number,
    #[error("is a damaged tar archive: an extended header is no list of records")]
    Extension,
    #[error("has an extended header that is too large")]
    TooLong,
    #[error("ends in the middle of the archive: send all of it")]
    Truncated,
}

#[derive(Default)]
pub(super) struct Parser {
    state: State,
    /// The block or extension that is being gathered.
    held: Vec<u8>,
    /// For the next entry.
    next: Extensions,
    /// For all that follow.
    global: Extensions,
}

#[derive(Clone, Copy, Default)]
enum State {
    #[default]
    Header,
    Extension {
        kind: ExtensionKind,
        size: usize,
    },
    Body {
        left: u64,
        padding: usize,
    },
    Skip {
        left: u64,
    },
    Ended,
}

#[derive(Clone, Copy)]
enum ExtensionKind {
    Pax,
    PaxGlobal,
    LongName,
    LongLink,
    Unknown,
}

#[derive(Clone, Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<i64>,
    /// GNU's sparse files look like others but for this.
    sparse: bool,
}

// === impl Parser ===

impl Parser {
    pub(super) fn feed<R: Receiver>(
        &mut self,
        mut data: &[u8],
        receiver: &mut R,
    ) -> Result<(), R::Error> {
        while !data.is_empty() {
            match self.state {
                State::Header => {
                    if self.gather(&mut data, BLOCK_BYTES) {
                        let block = std::mem::take(&mut self.held);
                        self.state = self.header(&block, receiver)?;
                        self.held = block;
                        self.held.clear();
                    }
                }
                State::Extension { kind, size } => {
                    if self.gather(&mut data, size + padding(size as u64)) {
                        let mut held = std::mem::take(&mut self.held);
                        held.truncate(size);
                        self.extend(kind, held)?;
                        self.state = State::Header;
                    }
                }
                State::Body { left, padding } => {
                    let now = usize::try_from(left).unwrap_or(usize::MAX).min(data.len());
                    let (body, rest) = data.split_at(now);
                    data = rest;
                    receiver.data(body)?;
                    let left = left - now as u64;
                    self.state = State::Body { left, padding };
                    if left == 0 {
                        receiver.end()?;
                        self.state = skip(padding as u64);
                    }
                }
                State::Skip { left } => {
                    let now = usize::try_from(left).unwrap_or(usize::MAX).min(data.len());
                    data = &data[now..];
                    self.state = skip(left - now as u64);
                }
                // Some pad archives to the size of a tape's record.
                State::Ended => return Ok(()),
            }
        }
        Ok(())
    }

    /// To be called when there is no more.
    pub(super) fn finish(&self) -> Result<(), ParseError> {
        match self.state {
            State::Ended => Ok(()),
            _ => Err(ParseError::Truncated),
        }
    }

    /// Whether `held` has so many bytes now.
    fn gather(&mut self, data: &mut &[u8], wanted: usize) -> bool {
        let missing = wanted - self.held.len();
        let (now, rest) = data.split_at(missing.min(data.len()));
        self.held.extend_from_slice(now);
        *data = rest;
        self.held.len() == wanted
    }

    fn header<R: Receiver>(&mut self, block: &[u8], receiver: &mut R) -> Result<State, R::Error> {
        if block.iter().all(|byte| *byte == 0) {
            return Ok(State::Ended);
        }
        let block: &[u8; BLOCK_BYTES] = block.try_into().map_err(|_| ParseError::Truncated)?;
        let header = Header::from_byte_slice(block);
        check_sum(header)?;
        let size = header.entry_size().map_err(|_| ParseError::Number)?;
        let entry_type = header.entry_type();
        let extension = match entry_type.as_byte() {
            b'x' => Some(ExtensionKind::Pax),
            b'g' => Some(ExtensionKind::PaxGlobal),
            b'L' => Some(ExtensionKind::LongName),
            b'K' => Some(ExtensionKind::LongLink),
            // Vendors' own, such as Solaris' 'X'; a volume's name.
            b'X' | b'V' => Some(ExtensionKind::Unknown),
            _ => None,
        };
        if let Some(kind) = extension {
            if size > MAX_EXTENSION_BYTES {
                return Err(ParseError::TooLong.into());
            }
            return Ok(match usize::try_from(size) {
                Ok(0) | Err(_) => State::Header,
                Ok(size) => State::Extension { kind, size },
            });
        }
        let item = self.item(header, entry_type, size)?;
        let (kind, size) = (item.kind, item.size);
        receiver.begin(item)?;
        if kind == ItemKind::File && size > 0 {
            let padding = padding(size);
            return Ok(State::Body {
                left: size,
                padding,
            });
        }
        if kind == ItemKind::File {
            receiver.end()?;
        }
        // A hard link may have the file's body once more.
        let body = size.checked_add(padding(size) as u64);
        Ok(skip(body.ok_or(ParseError::Number)?))
    }

    fn item(
        &mut self,
        header: &Header,
        entry_type: EntryType,
        size: u64,
    ) -> Result<Item, ParseError> {
        let number = |_| ParseError::Number;
        let next = std::mem::take(&mut self.next);
        let global = &self.global;
        let path = next.path.or_else(|| global.path.clone());
        let path = path.unwrap_or_else(|| header.path_bytes().into_owned());
        let link = next.link.or_else(|| global.link.clone());
        let link = link.or_else(|| header.link_name_bytes().map(|link| link.into_owned()));
        let kind = match entry_type.as_byte() {
            _ if next.sparse => ItemKind::Other,
            // From before there were types.
            0 | b'0' | b'7' if path.ends_with(b"/") => ItemKind::Directory,
            0 | b'0' | b'7' => ItemKind::File,
            b'1' => ItemKind::HardLink,
            b'2' => ItemKind::Symlink,
            b'5' => ItemKind::Directory,
            _ => ItemKind::Other,
        };
        let size = next.size.or(global.size).unwrap_or(size);
        // A directory's size says nothing of what follows.
        let size = if kind == ItemKind::Directory { 0 } else { size };
        let mtime = match next.mtime.or(global.mtime) {
            Some(mtime) => mtime,
            None => i64::try_from(header.mtime().map_err(number)?).unwrap_or(i64::MAX),
        };
        let uid = next.uid.or(global.uid).map_or_else(|| header.uid(), Ok);
        let gid = next.gid.or(global.gid).map_or_else(|| header.gid(), Ok);
        Ok(Item {
            kind,
            path,
            link: link.unwrap_or_default(),
            mode: header.mode().map_err(number)?,
            uid: uid.map_err(number)?,
            gid: gid.map_err(number)?,
            mtime,
            size,
        })
    }

    fn extend(&mut self, kind: ExtensionKind, mut held: Vec<u8>) -> Result<(), ParseError> {
        let upto_nul = held
            .iter()
            .position(|byte| *byte == 0)
            .unwrap_or(held.len());
        match kind {
            ExtensionKind::Pax => self.next.read(&held),
            ExtensionKind::PaxGlobal => self.global.read(&held),
            ExtensionKind::LongName => {
                held.truncate(upto_nul);
                self.next.path = Some(held);
                Ok(())
            }
            ExtensionKind::LongLink => {
                held.truncate(upto_nul);
                self.next.link = Some(held);
                Ok(())
            }
            ExtensionKind::Unknown => Ok(()),
        }
    }
}

fn skip(left: u64) -> State {
    match left {
        0 => State::Header,
        left => State::Skip { left },
    }
}

fn check_sum(header: &Header) -> Result<(), ParseError> {
    let said = header.cksum().map_err(|_| ParseError::Checksum)?;
    // The checksum's own eight bytes count as spaces.
    let bytes = header.as_bytes();
    let sum: u32 = bytes[..148]
        .iter()
        .chain(&bytes[156..])
        .map(|byte| u32::from(*byte))
        .sum();
    if sum + 8 * u32::from(b' ') == said {
        Ok(())
    } else {
        Err(ParseError::Checksum)
    }
}

// === impl Extensions ===

impl Extensions {
    /// Records of "length key=value\n".
    fn read(&mut self, mut records: &[u8]) -> Result<(), ParseError> {
        let wrong = ParseError::Extension;
        while !records.is_empty() {
            let space = records
                .iter()
                .take(20)
                .position(|byte| *byte == b' ')
                .ok_or(wrong)?;
            let length: usize = number(&records[..space]).ok_or(wrong)?;
            let record = records.get(space + 1..length).ok_or(wrong)?;
            records = &records[length..];
            let record = record.strip_suffix(b"\n").ok_or(wrong)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or(wrong)?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            match key {
                b"path" => self.path = Some(value.to_vec()),
                b"linkpath" => self.link = Some(value.to_vec()),
                b"size" => self.size = Some(number(value).ok_or(ParseError::Number)?),
                b"uid" => self.uid = Some(number(value).ok_or(ParseError::Number)?),
                b"gid" => self.gid = Some(number(value).ok_or(ParseError::Number)?),
                b"mtime" => {
                    let seconds = value.split(|byte| *byte == b'.').next().unwrap_or_default();
                    self.mtime = Some(number(seconds).ok_or(ParseError::Number)?);
                }
                key if key.starts_with(b"GNU.sparse.") => self.sparse = true,
                _ => {}
            }
        }
        Ok(())
    }
}

fn number<T: std::str::FromStr>(digits: &[u8]) -> Option<T> {
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::format::{append_end, append_header, append_zeroes};
    use super::*;

    #[derive(Default)]
    struct Seen {
        items: Vec<(Item, Vec<u8>)>,
        open: bool,
    }

    impl Receiver for Seen {
        type Error = ParseError;

        fn begin(&mut self, item: Item) -> Result<(), ParseError> {
            assert!(!self.open);
            self.open = item.kind == ItemKind::File;
            self.items.push((item, Vec::new()));
            Ok(())
        }

        fn data(&mut self, data: &[u8]) -> Result<(), ParseError> {
            assert!(self.open);
            let (_, body) = self.items.last_mut().unwrap();
            body.extend_from_slice(data);
            Ok(())
        }

        fn end(&mut self) -> Result<(), ParseError> {
            let (item, body) = self.items.last().unwrap();
            assert_eq!(item.size, body.len() as u64);
            self.open = false;
            Ok(())
        }
    }

    fn parse(archive: &[u8], piece: usize) -> Result<Seen, ParseError> {
        let (mut parser, mut seen) = (Parser::default(), Seen::default());
        for piece in archive.chunks(piece.max(1)) {
            parser.feed(piece, &mut seen)?;
        }
        parser.finish().map(|()| seen)
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            files in prop::collection::vec(
                (prop::collection::vec(prop_oneof![Just(b'/'), 1_u8..=255], 1..400),
                 prop::collection::vec(any::<u8>(), 0..1500)),
                0..6),
            piece in 1..3000_usize,
        ) {
            let stat = rustix::fs::stat("/").unwrap();
            let mut archive = Vec::new();
            for (path, body) in &files {
                append_header(&mut archive, EntryType::Regular, &stat, path, b"", body.len() as u64);
                archive.extend_from_slice(body);
                append_zeroes(&mut archive, padding(body.len() as u64));
            }
            append_end(&mut archive);
            let seen = parse(&archive, piece).unwrap();
            prop_assert_eq!(seen.items.len(), files.len());
            for ((item, read), (path, body)) in seen.items.iter().zip(&files) {
                prop_assert_eq!(&item.path, path);
                if !path.ends_with(b"/") {
                    prop_assert_eq!(read, body);
                }
                prop_assert_eq!(item.mode, stat.st_mode & 0o7777);
            }
            // Any part of it is too little.
            let part = &archive[..archive.len() - 2 * BLOCK_BYTES];
            prop_assert_eq!(parse(part, piece).err(), Some(ParseError::Truncated));
        }

        #[test]
        fn nothing_hurts_it(
            blocks in prop::collection::vec(any_block(), 0..8),
            piece in 1..2000_usize,
        ) {
            let _ = parse(&blocks.concat(), piece);
        }

        #[test]
        fn any_extension_is_records_or_nothing(bytes in prop::collection::vec(
            prop_oneof![b'0'..=b'9', Just(b' '), Just(b'='), Just(b'\n'), Just(b'p')], 0..60)
        ) {
            let _ = Extensions::default().read(&bytes);
        }
    }

    /// Blocks that are headers but for some bytes, with a right sum.
    fn any_block() -> impl Strategy<Value = Vec<u8>> {
        let types = prop::sample::select(b"0125xgLKSXV3467\0".to_vec());
        let header = (
            types,
            any::<u64>(),
            prop::collection::vec((0..512_usize, any::<u8>()), 0..6),
        );
        prop_oneof![
            header.prop_map(|(entry_type, size, changes)| {
                let mut header = Header::new_gnu();
                header.set_entry_type(EntryType::new(entry_type));
                header.set_size(size >> (size % 60));
                for (at, byte) in changes {
                    header.as_mut_bytes()[at] = byte;
                }
                header.set_cksum();
                header.as_bytes().to_vec()
            }),
            Just(
                b"30 path=../../../../etc/passwd\n"
                    .iter()
                    .copied()
                    .chain([0; 481])
                    .collect()
            ),
            prop::collection::vec(any::<u8>(), 512),
        ]
    }
}
