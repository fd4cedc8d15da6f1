//! Takes requests off the ring. Everything here comes from the guest: a chain
//! may loop, point anywhere, run in the wrong direction or hold no status byte.

use std::collections::VecDeque;
use std::ops::Range;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::{BLOCK_BYTES, ID_MAX_BYTES, QUEUE_SIZE, SECTOR_BYTES};
use crate::memory::GuestMemory;

/// Data buffers of one request: a queue's worth of descriptors, less those of
/// the header and the status.
pub(super) const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;

/// The most sectors one discard or write-zeroes takes: 1 GiB, so that punching
/// the hole and marking the bitmap are short.
pub(super) const ZERO_MAX_SECTORS: u32 = 1 << 21;

/// Type, priority, sector (5.2.6).
const HEADER_BYTES: u64 = 16;
/// Sector, number of sectors, flags (5.2.6).
const ZERO_RANGE_BYTES: u64 = 16;

/// A request that is sound: its buffers are in guest memory and its range is on
/// the disk.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) head: u16,
    pub(super) status_at: GuestAddress,
    pub(super) operation: Operation,
    /// The data buffers, as far as they are not used yet.
    pub(super) data: Segments,
}

/// Ranges are in bytes of the disk, none empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read(Range<u64>),
    /// Whole blocks.
    Write(Range<u64>),
    /// Whole blocks.
    Discard(Range<u64>),
    /// Whole blocks.
    WriteZeroes(Range<u64>),
    Flush,
    GetId,
}

/// A request that is answered at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) head: u16,
    /// The status byte's place and value; none where the chain has no place.
    pub(super) status: Option<(GuestAddress, u8)>,
}

/// What requests may ask of a disk.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) size_bytes: u64,
    pub(super) writable: bool,
}

/// Buffers in guest memory, in order.
#[derive(Debug, Default)]
pub(super) struct Segments {
    list: VecDeque<Segment>,
    bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) address: GuestAddress,
    pub(super) len: usize,
}

// === impl Request ===

impl Request {
    /// Reads a chain.
    pub(super) fn parse(
        chain: DescriptorChain<&GuestMemory>,
        memory: &GuestMemory,
        limits: Limits,
    ) -> Result<Self, Refusal> {
        let head = chain.head_index();
        let mut readable = Segments::default();
        let mut writable = Segments::default();
        let mut last = None;
        let mut sound = true;
        let mut complete = false;
        for (count, descriptor) in chain.enumerate() {
            complete = !descriptor.has_next();
            let segment = Segment {
                address: descriptor.addr(),
                len: descriptor.len() as usize,
            };
            // An empty buffer must not be sent, and holds nothing if it is.
            if segment.len == 0 {
                continue;
            }
            sound &= count <= SEGMENTS_MAX as usize + 1
                && memory.check_range(segment.address, segment.len);
            if descriptor.is_write_only() {
                last = Some(segment);
            } else {
                // What the device reads comes before what it writes (2.7.4.2).
                sound &= last.is_none();
            }
            if sound {
                let side = if descriptor.is_write_only() {
                    &mut writable
                } else {
                    &mut readable
                };
                side.push(segment);
            }
        }

        // The status is the last byte that the device may write.
        let status_at = last
            .and_then(|segment| segment.address.0.checked_add(segment.len as u64 - 1))
            .map(GuestAddress)
            .filter(|&address| complete && memory.address_in_range(address));
        let Some(status_at) = status_at else {
            return Err(Refusal { head, status: None });
        };
        let refuse = |code: u32| Refusal {
            head,
            status: Some((status_at, code as u8)),
        };
        if !sound {
            return Err(refuse(VIRTIO_BLK_S_IOERR));
        }
        writable.drop_last_byte();
        let (operation, data) = operation(memory, readable, writable, limits).map_err(refuse)?;
        Ok(Self {
            head,
            status_at,
            operation,
            data,
        })
    }
}

/// What a sound chain asks for, with its data buffers; or the status that says
/// no.
fn operation(
    memory: &GuestMemory,
    mut readable: Segments,
    writable: Segments,
    limits: Limits,
) -> Result<(Operation, Segments), u32> {
    let [a, b, c, d, _, _, _, _, sector @ ..]: [u8; HEADER_BYTES as usize] =
        readable.read(memory).ok_or(VIRTIO_BLK_S_IOERR)?;
    let sector = u64::from_le_bytes(sector);
    match u32::from_le_bytes([a, b, c, d]) {
        VIRTIO_BLK_T_IN => {
            let range = limits.range(sector, writable.bytes, SECTOR_BYTES)?;
            nothing(&readable)?;
            Ok((Operation::Read(range), writable))
        }
        VIRTIO_BLK_T_OUT => {
            let range = limits.range(sector, readable.bytes, BLOCK_BYTES)?;
            nothing(&writable)?;
            if !limits.writable {
                return Err(VIRTIO_BLK_S_IOERR);
            }
            Ok((Operation::Write(range), readable))
        }
        VIRTIO_BLK_T_FLUSH => Ok((Operation::Flush, Segments::default())),
        VIRTIO_BLK_T_GET_ID => {
            nothing(&readable)?;
            if writable.bytes < ID_MAX_BYTES as u64 {
                return Err(VIRTIO_BLK_S_IOERR);
            }
            Ok((Operation::GetId, writable))
        }
        kind @ (VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) if limits.writable => {
            let discard = kind == VIRTIO_BLK_T_DISCARD;
            let [a, b, c, d, e, f, g, h, i, j, k, l, flags @ ..]: [u8; ZERO_RANGE_BYTES as usize] =
                readable.read(memory).ok_or(VIRTIO_BLK_S_IOERR)?;
            nothing(&readable)?;
            nothing(&writable)?;
            // Whether the guest allows deallocation makes no difference: no
            // block of a layer is ever sure of its space. But a discard must not
            // carry the flag (5.2.6.2).
            let known = if discard {
                0
            } else {
                VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
            };
            if u32::from_le_bytes(flags) & !known != 0 {
                return Err(VIRTIO_BLK_S_UNSUPP);
            }
            let sectors = u32::from_le_bytes([i, j, k, l]);
            if sectors > ZERO_MAX_SECTORS {
                return Err(VIRTIO_BLK_S_IOERR);
            }
            let sector = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
            let range = limits.range(sector, u64::from(sectors) * SECTOR_BYTES, BLOCK_BYTES)?;
            let operation = if discard {
                Operation::Discard(range)
            } else {
                Operation::WriteZeroes(range)
            };
            Ok((operation, Segments::default()))
        }
        _ => Err(VIRTIO_BLK_S_UNSUPP),
    }
}

fn nothing(rest: &Segments) -> Result<(), u32> {
    if rest.bytes == 0 {
        Ok(())
    } else {
        Err(VIRTIO_BLK_S_IOERR)
    }
}

// === impl Operation ===

impl Operation {
    /// What the request costs the rate limiter, in bytes.
    pub(super) fn cost_bytes(&self) -> u64 {
        match self {
            Self::Read(range) | Self::Write(range) => range.end - range.start,
            Self::Discard(_) | Self::WriteZeroes(_) | Self::Flush | Self::GetId => 0,
        }
    }

    /// Whether the operation changes the layer.
    pub(super) fn changes(&self) -> Option<&Range<u64>> {
        match self {
            Self::Write(range) | Self::Discard(range) | Self::WriteZeroes(range) => Some(range),
            Self::Read(_) | Self::Flush | Self::GetId => None,
        }
    }
}

// === impl Limits ===

impl Limits {
    /// A range of whole units on the disk.
    fn range(&self, sector: u64, bytes: u64, unit_bytes: u64) -> Result<Range<u64>, u32> {
        let start = sector.checked_mul(SECTOR_BYTES).ok_or(VIRTIO_BLK_S_IOERR)?;
        let end = start.checked_add(bytes).ok_or(VIRTIO_BLK_S_IOERR)?;
        let whole = start.is_multiple_of(unit_bytes) && bytes.is_multiple_of(unit_bytes);
        if bytes == 0 || !whole || end > self.size_bytes {
            return Err(VIRTIO_BLK_S_IOERR);
        }
        Ok(start..end)
    }
}

// === impl Segments ===

impl Segments {
    fn push(&mut self, segment: Segment) {
        self.bytes += segment.len as u64;
        self.list.push_back(segment);
    }

    /// Splits off the first `bytes` bytes, or all if there are fewer.
    pub(super) fn take(&mut self, bytes: u64) -> Vec<Segment> {
        let mut left = bytes.min(self.bytes);
        self.bytes -= left;
        let mut taken = Vec::new();
        while left > 0
            && let Some(first) = self.list.front_mut()
        {
            let len = first.len.min(usize::try_from(left).unwrap_or(usize::MAX));
            taken.push(Segment { len, ..*first });
            left -= len as u64;
            if len == first.len {
                self.list.pop_front();
            } else {
                first.len -= len;
                first.address.0 += len as u64;
            }
        }
        taken
    }

    /// Takes the first `N` bytes out of guest memory.
    fn read<const N: usize>(&mut self, memory: &GuestMemory) -> Option<[u8; N]> {
        if self.bytes < N as u64 {
            return None;
        }
        let mut bytes = [0; N];
        let mut at = 0;
        for segment in self.take(N as u64) {
            memory
                .read_slice(&mut bytes[at..at + segment.len], segment.address)
                .ok()?;
            at += segment.len;
        }
        Some(bytes)
    }

    fn drop_last_byte(&mut self) {
        if let Some(last) = self.list.back_mut() {
            last.len -= 1;
            self.bytes -= 1;
            if last.len == 0 {
                self.list.pop_back();
            }
        }
    }
}
