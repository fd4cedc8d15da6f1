//! What a program has said, as far as it is kept: the last bytes of both its
//! streams, in the order in which they were read.
//!
//! Memory is taken when something is said, and is bounded whatever the program does:
//! by bytes, and by blocks, because one that speaks byte by byte on two streams in
//! turn would make a block of each.

use std::collections::VecDeque;

use bytes::{Buf as _, Bytes};

/// How far a program may run ahead of a caller for whom it waits; what four full
/// pipes hold.
const AHEAD_BYTES: u64 = 256 * 1024;
const AHEAD_BLOCKS: usize = 1024;
/// Small pieces are joined up to this length.
const JOIN_BYTES: usize = 4096;
/// A block for each so many bytes of the limit, and some.
const BYTES_A_BLOCK: u64 = 256;
const LEAST_BLOCKS: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stream {
    Stdout,
    Stderr,
}

#[derive(Debug)]
pub(super) struct Log {
    blocks: VecDeque<Block>,
    /// Of the first byte that is kept, counted from the first that was said.
    start: u64,
    /// One behind the last byte.
    end: u64,
    limit_bytes: u64,
}

#[derive(Debug)]
struct Block {
    start: u64,
    stream: Stream,
    /// Never empty.
    bytes: Bytes,
}

// === impl Log ===

impl Log {
    pub(super) fn new(limit_bytes: u32) -> Self {
        Self {
            blocks: VecDeque::new(),
            start: 0,
            end: 0,
            limit_bytes: limit_bytes.into(),
        }
    }

    pub(super) fn start(&self) -> u64 {
        self.start
    }

    pub(super) fn end(&self) -> u64 {
        self.end
    }

    pub(super) fn kept_bytes(&self) -> u64 {
        self.end - self.start
    }

    /// Adds what was said; see [`Self::trim`].
    pub(super) fn push(&mut self, stream: Stream, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        match self.blocks.back_mut() {
            Some(last) if last.stream == stream && last.bytes.len() + bytes.len() <= JOIN_BYTES => {
                last.bytes = [&last.bytes[..], bytes].concat().into();
            }
            _ => self.blocks.push_back(Block {
                start: self.end,
                stream,
                bytes: Bytes::copy_from_slice(bytes),
            }),
        }
        self.end += bytes.len() as u64;
    }

    /// The next piece at `offset`, which must be within what is kept, or None at
    /// the end.
    pub(super) fn read(&self, offset: u64) -> Option<(Stream, Bytes)> {
        debug_assert!((self.start..=self.end).contains(&offset));
        let index = self.blocks.partition_point(|block| block.end() <= offset);
        let block = self.blocks.get(index)?;
        let read = usize::try_from(offset.saturating_sub(block.start)).ok()?;
        Some((block.stream, block.bytes.slice(read..)))
    }

    /// Drops what is beyond the limits, but nothing from `unread` on.
    pub(super) fn trim(&mut self, unread: u64) {
        let fits = self.end.saturating_sub(self.limit_bytes).min(unread);
        let most_blocks = most_blocks(self.limit_bytes);
        loop {
            let too_many = self.blocks.len() > most_blocks;
            let Some(first) = self.blocks.front_mut() else {
                break;
            };
            if first.end() <= fits || too_many && first.end() <= unread {
                self.blocks.pop_front();
                continue;
            }
            if let Some(over) = fits.checked_sub(first.start) {
                first.bytes.advance(usize::try_from(over).unwrap_or(0));
                first.start = fits;
            }
            break;
        }
        self.start = self.blocks.front().map_or(self.end, |first| first.start);
    }

    /// Keeps no more than this from now on; see [`Self::trim`].
    pub(super) fn limit(&mut self, bytes: u64) {
        self.limit_bytes = self.limit_bytes.min(bytes);
    }

    /// Whether the program has to wait for whoever has still to read from `unread`.
    pub(super) fn is_full(&self, unread: u64) -> bool {
        self.end - unread >= AHEAD_BYTES
            || self.blocks.len() >= most_blocks(self.limit_bytes) + AHEAD_BLOCKS
    }
}

// === impl Block ===

impl Block {
    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }
}

fn most_blocks(limit_bytes: u64) -> usize {
    LEAST_BLOCKS + usize::try_from(limit_bytes / BYTES_A_BLOCK).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(log: &Log) -> Vec<u8> {
        let (mut offset, mut read) = (log.start(), Vec::new());
        while let Some((_, bytes)) = log.read(offset) {
            offset += bytes.len() as u64;
            read.extend_from_slice(&bytes);
        }
        read
    }

    #[test]
    fn keeps_the_last_bytes_and_tells_streams_apart() {
        let mut log = Log::new(6);
        log.push(Stream::Stdout, b"one ");
        log.push(Stream::Stdout, b"two ");
        log.push(Stream::Stderr, b"bad");
        log.trim(log.end());
        assert_eq!((log.start(), log.end()), (5, 11));
        assert_eq!(
            log.read(5),
            Some((Stream::Stdout, Bytes::from_static(b"wo ")))
        );
        assert_eq!(
            log.read(9),
            Some((Stream::Stderr, Bytes::from_static(b"ad")))
        );
        assert_eq!(log.read(11), None);
    }

    #[test]
    fn a_program_that_speaks_byte_by_byte_takes_little() {
        let mut log = Log::new(1 << 20);
        for _ in 0..1 << 20 {
            log.push(Stream::Stdout, b"o");
            log.push(Stream::Stderr, b"e");
            log.trim(log.end());
        }
        assert!(log.blocks.len() <= most_blocks(1 << 20));
        let mut log = Log::new(1 << 16);
        for _ in 0..1 << 17 {
            log.push(Stream::Stdout, b"o");
            log.trim(log.end());
        }
        assert_eq!(log.kept_bytes(), 1 << 16);
    }

    #[test]
    fn waits_for_a_reader_in_bytes_and_in_blocks() {
        let mut log = Log::new(0);
        while !log.is_full(0) {
            log.push(Stream::Stdout, &[0; 65_536]);
            log.trim(0);
        }
        assert_eq!(log.end(), AHEAD_BYTES);
        log.trim(log.end());
        assert!(!log.is_full(log.end()) && log.kept_bytes() == 0);

        let mut log = Log::new(0);
        while !log.is_full(0) {
            log.push(Stream::Stdout, b"o");
            log.push(Stream::Stderr, b"e");
            log.trim(0);
        }
        assert!(log.end() < 2000);
        log.trim(log.end());
        assert!(!log.is_full(log.end()));
    }

    proptest! {
        // Against a plain vector: one reader that nothing may be taken from, and
        // one that is told what it missed.
        #[test]
        fn is_what_was_said(
            limit in 0_u32..5000,
            steps in prop::collection::vec((any::<bool>(), 0_usize..3000, 0_u64..4000), 0..60),
        ) {
            let (mut log, mut said) = (Log::new(limit), Vec::<u8>::new());
            let (mut unread, mut loose) = (0_u64, 0_u64);
            for (is_stdout, length, read) in steps {
                let stream = if is_stdout { Stream::Stdout } else { Stream::Stderr };
                let bytes: Vec<u8> = (0..length).map(|index| (said.len() + index) as u8).collect();
                log.push(stream, &bytes);
                said.extend(&bytes);
                log.trim(unread);
                prop_assert_eq!(log.end(), said.len() as u64);
                prop_assert!(log.start() <= unread);

                for (cursor, most) in [(&mut unread, read), (&mut loose, read / 2)] {
                    *cursor = (*cursor).max(log.start());
                    let until = (*cursor + most).min(log.end());
                    while *cursor < until {
                        let (_, bytes) = log.read(*cursor).unwrap();
                        let from = *cursor as usize;
                        prop_assert_eq!(&bytes[..], &said[from..from + bytes.len()]);
                        *cursor += bytes.len() as u64;
                    }
                }
                log.trim(unread);
                let kept = all(&log);
                prop_assert_eq!(&kept[..], &said[log.start() as usize..]);
                prop_assert!(log.kept_bytes() <= u64::from(limit).max(log.end() - unread));
            }
            log.trim(log.end());
            prop_assert!(log.kept_bytes() <= u64::from(limit));
        }
    }
}
