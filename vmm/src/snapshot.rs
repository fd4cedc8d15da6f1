//! The file `snapshot`: a header outside the codec, then a machine's state.
//!
//! ```text
//!  0  magic "SBXSNAPS"
//!  8  format version       u32
//! 12  architecture         u32, the ELF machine number
//! 16  length of the state  u64, in bytes
//! 24  CRC-64/XZ of the state
//! 32  CRC-64/XZ of the bytes 0–31
//! 40  the state: postcard
//! ```
//!
//! Everything is little-endian. Nothing of the state is decoded before its
//! checksum is right. That finds accidents; what a malicious file can do is up to
//! the checks of whoever takes the decoded state.
//!
//! Evolution: postcard writes no names, so the state of a version never changes.
//! A new version gets structs of its own, and the loader turns older ones into
//! the present ones. The golden snapshots in `vmm/tests/golden` hold it to that.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::machine::state::{MAX_RUNS, MachineState};

pub(crate) mod list;
#[cfg(test)]
pub(crate) mod tests;

const MAGIC: [u8; 8] = *b"SBXSNAPS";
const FORMAT_VERSION: u32 = 2;
/// The oldest that is still read. Version 1 was never released.
const OLDEST_VERSION: u32 = 2;
/// ELF's number of x86-64.
const EM_X86_64: u32 = 62;
const HEADER_BYTES: usize = 40;

/// The longest state: 32 vCPUs of less than 32 KiB each, and the longest map of
/// memory ([`MAX_RUNS`]) at less than 12 bytes a run.
const STATE_MAX_BYTES: u64 = 16 << 20;

/// CRC-64/XZ (ECMA-182, reflected), by carry-less multiplication where the CPU has it:
/// a table's cache misses would take longer than all else of a short state.
pub(crate) fn checksum(bytes: &[u8]) -> u64 {
    let mut digest = crc64fast::Digest::new();
    digest.write(bytes);
    digest.sum64()
}

/// Why a file is no snapshot that this monitor can restore.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error(
        "the snapshot is truncated: {actual} bytes of {expected}; restore it from where it was made"
    )]
    Truncated { actual: u64, expected: u64 },
    #[error(
        "the snapshot has {actual} bytes, but only {expected} are its own; restore it from where it was made"
    )]
    Trailing { actual: u64, expected: u64 },
    #[error("the file is not a snapshot: its magic is {0:02x?}")]
    Magic([u8; 8]),
    #[error(
        "the snapshot has format version {0}, but this monitor knows only up to {FORMAT_VERSION}; upgrade SoulBox"
    )]
    Version(u32),
    #[error(
        "the snapshot has format version {0}, older than this monitor reads, which begins with {OLDEST_VERSION}; make it again"
    )]
    Outdated(u32),
    #[error("the snapshot is of architecture {0} (ELF machine number), not of x86-64")]
    Architecture(u32),
    #[error("the snapshot's {0} is damaged; restore it from where it was made")]
    Checksum(&'static str),
    #[error("the snapshot's state does not decode; restore it from where it was made")]
    Decode(#[source] postcard::Error),
    #[error(
        "memory is in {0} pieces, more than the {MAX_RUNS} that a snapshot can have; keep fewer layers"
    )]
    Fragmented(usize),
    #[error("the snapshot's state does not encode")]
    Encode(#[source] postcard::Error),
    #[error("the snapshot could not be read or written")]
    Io(#[source] io::Error),
}

/// Has what a later [`read`] does for the first time done: asking the CPU what it is
/// for a checksum, which is ten exits where this host is a guest itself.
pub fn warm_up() {
    checksum(&[]);
}

/// Writes a state to an empty file.
pub fn write(file: &File, state: &MachineState) -> Result<(), SnapshotError> {
    // What would be refused when it is read is not written.
    let runs = state.memory.runs.len();
    if runs > MAX_RUNS {
        return Err(SnapshotError::Fragmented(runs));
    }
    let mut bytes = vec![0; HEADER_BYTES];
    bytes = postcard::to_extend(state, bytes).map_err(SnapshotError::Encode)?;
    let (header, body) = bytes.split_at_mut(HEADER_BYTES);
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&EM_X86_64.to_le_bytes());
    header[16..24].copy_from_slice(&(body.len() as u64).to_le_bytes());
    header[24..32].copy_from_slice(&checksum(body).to_le_bytes());
    let of_header = checksum(&header[..32]);
    header[32..].copy_from_slice(&of_header.to_le_bytes());
    file.write_all_at(&bytes, 0).map_err(SnapshotError::Io)
}

/// Reads a state, believing nothing.
pub fn read(file: &File) -> Result<MachineState, SnapshotError> {
    let actual = file.metadata().map_err(SnapshotError::Io)?.len();
    let truncated = |expected| SnapshotError::Truncated { actual, expected };
    if actual < HEADER_BYTES as u64 {
        return Err(truncated(HEADER_BYTES as u64));
    }
    // In one call; of a file that is too long, what there may be.
    let mut bytes = vec![0; actual.min(HEADER_BYTES as u64 + STATE_MAX_BYTES) as usize];
    file.read_exact_at(&mut bytes, 0)
        .map_err(SnapshotError::Io)?;
    let Some((header, body)) = bytes.split_first_chunk() else {
        return Err(truncated(HEADER_BYTES as u64));
    };
    let length = check_header(header)?;
    let expected = HEADER_BYTES as u64 + length;
    if actual < expected {
        return Err(truncated(expected));
    }
    if actual > expected {
        return Err(SnapshotError::Trailing { actual, expected });
    }
    if checksum(body) != u64_at(header, 24) {
        return Err(SnapshotError::Checksum("state"));
    }
    let (state, rest) = postcard::take_from_bytes(body).map_err(SnapshotError::Decode)?;
    match rest {
        [] => Ok(state),
        _ => Err(SnapshotError::Decode(
            postcard::Error::DeserializeBadEncoding,
        )),
    }
}

/// Gives the length of the state.
fn check_header(header: &[u8; HEADER_BYTES]) -> Result<u64, SnapshotError> {
    let mut magic = [0; 8];
    magic.copy_from_slice(&header[..8]);
    if magic != MAGIC {
        return Err(SnapshotError::Magic(magic));
    }
    // The version decides how the rest is to be read, the checksum included.
    let version = u64_at(header, 8) as u32;
    if version > FORMAT_VERSION {
        return Err(SnapshotError::Version(version));
    }
    if version < OLDEST_VERSION {
        return Err(SnapshotError::Outdated(version));
    }
    if checksum(&header[..32]) != u64_at(header, 32) {
        return Err(SnapshotError::Checksum("header"));
    }
    let architecture = (u64_at(header, 8) >> 32) as u32;
    if architecture != EM_X86_64 {
        return Err(SnapshotError::Architecture(architecture));
    }
    let length = u64_at(header, 16);
    if length > STATE_MAX_BYTES {
        return Err(SnapshotError::Checksum("length"));
    }
    Ok(length)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}
