//! Memory layers packed with zstd.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

/// Memory is mostly zeros and repetition: higher levels cost much and gain little.
const LEVEL: i32 = 3;
/// What is all zeros becomes a hole again in pieces of this size.
const PIECE_BYTES: usize = 64 * 1024;

/// Writes `from`, packed, to `to`, which must not exist.
pub(super) fn compress(from: &Path, to: &Path) -> io::Result<()> {
    let mut plain = File::open(from)?;
    let mut encoder = zstd::Encoder::new(create(to)?, LEVEL)?;
    encoder.include_checksum(true)?;
    io::copy(&mut plain, &mut encoder)?;
    let mut packed = encoder.finish()?;
    packed.flush()
}

/// Writes `from`, unpacked and with holes, to `to`, and makes it durable.
pub(super) fn unpack(from: &Path, to: &Path) -> io::Result<()> {
    match std::fs::remove_file(to) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut decoder = zstd::Decoder::new(File::open(from)?)?;
    let plain = create(to)?;
    let (mut piece, zeros) = (vec![0; PIECE_BYTES], vec![0; PIECE_BYTES]);
    let mut offset = 0;
    loop {
        let filled = fill(&mut decoder, &mut piece)?;
        if filled == 0 {
            break;
        }
        if piece[..filled] != zeros[..filled] {
            plain.write_all_at(&piece[..filled], offset)?;
        }
        offset += filled as u64;
    }
    plain.set_len(offset)?;
    plain.sync_all()
}

fn fill(from: &mut impl io::Read, piece: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < piece.len() {
        match from.read(&mut piece[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
}
