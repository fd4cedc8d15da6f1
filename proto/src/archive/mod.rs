//! The tar streams of Upload and Download (POSIX pax; pax(1), "pax Interchange Format"),
//! read and written a piece at a time, so that no thread waits for the other end.
//!
//! The header is the tar crate's. Its reader and its writer are not: they may block, find
//! files by their paths, and keep long names and records of any length in memory.

mod decompress;
mod parse;
mod path;
mod write;

pub use self::decompress::{DecompressError, Decompressor};
pub use self::parse::{ParseError, Parser, Receiver};
pub use self::path::{make_plain, split};
pub use self::write::{append_end, append_header, append_padding};

/// What archives are made of.
pub const BLOCK_BYTES: usize = 512;
/// Of a member's path, and of a link's target.
pub const MAX_PATH_BYTES: usize = 4096;

/// One entry of an archive, as it says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Member {
    pub kind: Kind,
    /// That of a directory may end with "/".
    pub path: Vec<u8>,
    /// Of a link.
    pub target: Vec<u8>,
    /// The permissions: the lowest twelve bits of st_mode.
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    /// Seconds since the epoch, and nanoseconds after that.
    pub modified: (i64, u32),
    /// Bytes of a file.
    pub size: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    #[default]
    File,
    Directory,
    Symlink,
    HardLink,
    /// A device, a pipe …: its type flag.
    Other(u8),
}

/// How many bytes follow so many of a file, up to the next block.
fn padding(bytes: u64) -> u64 {
    let block = BLOCK_BYTES as u64;
    (block - bytes % block) % block
}

/// What the checksum of a header must be. Its own eight bytes count as spaces.
fn sum(header: &[u8; BLOCK_BYTES]) -> u32 {
    // It cannot overflow; said so, many bytes are added at once.
    let add = |sum: u32, byte: &u8| sum.wrapping_add((*byte).into());
    let sum = header[..148].iter().fold(8 * u32::from(b' '), add);
    header[156..].iter().fold(sum, add)
}
