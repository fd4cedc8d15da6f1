//! Download and Upload: trees as tar streams (POSIX pax), made and unpacked a piece at
//! a time, so that no thread waits for a caller.
//!
//! The `tar` crate knows the header; it reads and writes archives only where it may
//! block, and it finds files by their paths.

mod download;
mod format;
mod parse;
mod unpack;
mod upload;

pub(super) use self::download::Download;
pub(super) use self::upload::{Upload, check, piece};

/// What archives are made of.
const BLOCK_BYTES: usize = 512;

/// How many bytes follow so many of a file, up to the next block.
fn padding(bytes: u64) -> usize {
    let over = bytes % BLOCK_BYTES as u64;
    // Less than a block.
    (BLOCK_BYTES - over as usize) % BLOCK_BYTES
}
