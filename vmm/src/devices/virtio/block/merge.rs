//! Copying several layers into one.
//!
//! The guest stands still meanwhile, so the kernel does the copying: where the
//! file system can share blocks between files, nothing is copied at all.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, copy_file_range, seek};
use rustix::io::Errno;

use super::FreezeError;
use super::disk::WINDOW_BYTES;
use super::frozen::{FrozenLayer, newest};
use super::layer::Layer;

/// What is read at a time where the kernel cannot copy, in bytes.
const BUFFER_BYTES: usize = 256 << 10;

/// Copies the newest of each block that any of the layers has into an empty
/// layer, with its bitmap. All are of a disk of `size_bytes`.
pub(super) fn merge<'a>(
    newest_first: impl Iterator<Item = &'a FrozenLayer> + Clone,
    size_bytes: u64,
    into: &mut Layer,
) -> Result<(), FreezeError> {
    // Past the end of a layer that someone has cut, there would seem to be holes.
    for layer in newest_first.clone() {
        layer.check_length()?;
    }
    let mut start = 0;
    while start < size_bytes {
        let end = size_bytes.min(start + WINDOW_BYTES);
        let (source, end) = newest(newest_first.clone(), start, end);
        if let Some(layer) = source {
            // Layers of one disk have a block at the same place.
            let bytes = layer.file_offset(start)..layer.file_offset(end);
            copy_sparse(layer.file(), into.file(), bytes).map_err(FreezeError::Io)?;
            into.written(start..end);
        }
        start = end;
    }
    into.write_bitmap().map_err(FreezeError::Io)
}

/// Copies what is not a hole to the same place of another file, which has holes
/// there.
fn copy_sparse(from: &File, to: &File, bytes: Range<u64>) -> io::Result<()> {
    let mut at = bytes.start;
    while at < bytes.end {
        let data = match seek(from, SeekFrom::Data(at)) {
            Ok(data) if data < bytes.end => data,
            Ok(_) | Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        at = seek(from, SeekFrom::Hole(data))?.min(bytes.end);
        copy(from, to, data..at)?;
    }
    Ok(())
}

fn copy(from: &File, to: &File, bytes: Range<u64>) -> io::Result<()> {
    let (mut read_at, mut write_at) = (bytes.start, bytes.start);
    while read_at < bytes.end {
        let len = usize::try_from(bytes.end - read_at).unwrap_or(usize::MAX);
        match copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), len) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::INTR) => {}
            // Of two file systems, or of one that does not know how.
            Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => {
                return copy_through_memory(from, to, read_at..bytes.end);
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

fn copy_through_memory(from: &File, to: &File, bytes: Range<u64>) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut at = bytes.start;
    while at < bytes.end {
        let left = usize::try_from(bytes.end - at).unwrap_or(usize::MAX);
        let part = &mut buffer[..left.min(BUFFER_BYTES)];
        from.read_exact_at(part, at)?;
        to.write_all_at(part, at)?;
        at += part.len() as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn source() -> (File, Vec<u8>) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 << 20).unwrap();
        let data: Vec<u8> = (0..700_000u32).map(|at| (at / 1000) as u8 | 1).collect();
        file.write_all_at(&data, 1 << 20).unwrap();
        let mut all = vec![0; 4 << 20];
        all[1 << 20..][..data.len()].copy_from_slice(&data);
        (file, all)
    }

    fn check(copy: impl Fn(&File, &File, Range<u64>) -> io::Result<()>) -> File {
        let (from, all) = source();
        let to = tempfile::tempfile().unwrap();
        to.set_len(4 << 20).unwrap();
        // From within data to within a hole, and the rest not.
        let range = (1 << 20) + 4096..3 << 20;
        copy(&from, &to, range.clone()).unwrap();
        let mut copied = vec![0xff; 4 << 20];
        to.read_exact_at(&mut copied, 0).unwrap();
        let mut expected = vec![0; 4 << 20];
        let range = range.start as usize..range.end as usize;
        expected[range.clone()].copy_from_slice(&all[range]);
        assert!(copied == expected);
        to
    }

    #[test]
    fn holes_stay_holes() {
        let to = check(copy_sparse);
        assert!(to.metadata().unwrap().blocks() * 512 < 1 << 20);
    }

    #[test]
    fn memory_serves_where_the_kernel_cannot_copy() {
        check(copy_through_memory);
    }

    #[test]
    fn a_source_that_ends_is_an_error() {
        let (from, _) = source();
        let to = tempfile::tempfile().unwrap();
        for copy in [copy, copy_through_memory] {
            let error = copy(&from, &to, 3 << 20..5 << 20).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
    }
}
