//! Grows the root filesystem to its disk, so that a sandbox can have a larger
//! disk than its template was made with.

use std::fs::{self, File};
use std::io;
use std::os::linux::fs::MetadataExt as _;
use std::os::unix::fs::FileExt as _;

use rustix::fs::{major, minor};

use crate::sys::disk::ext4_resize;

const SECTOR_BYTES: u64 = 512;

// The superblock as Documentation/filesystems/ext4/super.rst has it.
const SUPERBLOCK_OFFSET: u64 = 1024;
const SUPERBLOCK_BYTES: usize = 1024;
const BLOCKS_LOW: usize = 0x4;
const LOG_BLOCK_SIZE: usize = 0x18;
const MAGIC: usize = 0x38;
const FEATURES_INCOMPATIBLE: usize = 0x60;
const BLOCKS_HIGH: usize = 0x150;
const EXT4_MAGIC: u16 = 0xef53;
const FEATURE_64BIT: u32 = 0x80;

#[derive(Debug, PartialEq, Eq)]
struct Superblock {
    blocks: u64,
    block_bytes: u64,
}

/// Grows `/` where it is ext4 on a disk that has room for at least one block
/// more. Does nothing otherwise, which costs two small reads.
pub(super) fn grow_root() -> io::Result<()> {
    let device = fs::metadata("/")?.st_dev();
    let (major, minor) = (major(device), minor(device));
    // Block devices have major numbers; a virtual filesystem has 0.
    if major == 0 {
        return Ok(());
    }
    let device = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}"))?;
    let sectors = fs::read_to_string(device.join("size"))?;
    let sectors: u64 = sectors.trim().parse().map_err(io::Error::other)?;
    let Some(name) = device.file_name() else {
        return Ok(());
    };

    let mut bytes = [0; SUPERBLOCK_BYTES];
    File::open(std::path::Path::new("/dev").join(name))?
        .read_exact_at(&mut bytes, SUPERBLOCK_OFFSET)?;
    let Some(superblock) = Superblock::parse(&bytes) else {
        return Ok(());
    };

    let blocks = sectors * SECTOR_BYTES / superblock.block_bytes;
    if blocks > superblock.blocks {
        ext4_resize(&File::open("/")?, blocks)?;
    }
    Ok(())
}

// === impl Superblock ===

impl Superblock {
    fn parse(bytes: &[u8; SUPERBLOCK_BYTES]) -> Option<Self> {
        let u32_at = |offset: usize| {
            let field = bytes.get(offset..offset + 4)?;
            Some(u32::from_le_bytes(field.try_into().ok()?))
        };
        let magic = bytes.get(MAGIC..MAGIC + 2)?;
        if magic != EXT4_MAGIC.to_le_bytes() {
            return None;
        }
        let block_bytes = 1024_u64.checked_shl(u32_at(LOG_BLOCK_SIZE)?)?;
        let is_64bit = u32_at(FEATURES_INCOMPATIBLE)? & FEATURE_64BIT != 0;
        let high = if is_64bit { u32_at(BLOCKS_HIGH)? } else { 0 };
        let blocks = (u64::from(high) << 32) | u64::from(u32_at(BLOCKS_LOW)?);
        // 64 KiB is the largest block; a nonsense shift must not divide by zero.
        (1024..=65_536).contains(&block_bytes).then_some(Self {
            blocks,
            block_bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn superblock(log_block_size: u32, features: u32) -> [u8; SUPERBLOCK_BYTES] {
        let mut bytes = [0; SUPERBLOCK_BYTES];
        let mut put = |offset: usize, field: &[u8]| {
            bytes[offset..offset + field.len()].copy_from_slice(field);
        };
        put(BLOCKS_LOW, &7_u32.to_le_bytes());
        put(BLOCKS_HIGH, &1_u32.to_le_bytes());
        put(LOG_BLOCK_SIZE, &log_block_size.to_le_bytes());
        put(FEATURES_INCOMPATIBLE, &features.to_le_bytes());
        put(MAGIC, &EXT4_MAGIC.to_le_bytes());
        bytes
    }

    #[test]
    fn reads_the_size() {
        let expected = Superblock {
            blocks: 7,
            block_bytes: 4096,
        };
        assert_eq!(Superblock::parse(&superblock(2, 0)), Some(expected));
        let large = Superblock {
            blocks: (1 << 32) + 7,
            block_bytes: 1024,
        };
        assert_eq!(
            Superblock::parse(&superblock(0, FEATURE_64BIT)),
            Some(large)
        );
    }

    #[test]
    fn refuses_what_is_not_ext4() {
        assert_eq!(Superblock::parse(&[0; SUPERBLOCK_BYTES]), None);
        assert_eq!(Superblock::parse(&superblock(7, 0)), None);
        assert_eq!(Superblock::parse(&superblock(u32::MAX, 0)), None);
    }
}
