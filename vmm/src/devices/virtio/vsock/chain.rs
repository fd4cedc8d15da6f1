//! Splits a descriptor chain into a packet's header and its payload.
//!
//! `virtio_vsock::VsockPacket` takes chains of one or two descriptors. Linux
//! sends more: since 6.7 a MSG_ZEROCOPY sender, and since 6.17 any large write,
//! has one descriptor for each page. Section 2.7.4 forbids a device to assume
//! any framing, so this takes every arrangement.

use std::ops::Range;

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestMemory as _, Permissions, VolatileSlice};

use super::packet::HEADER_LEN;
use crate::memory::GuestMemory;

/// Why a chain holds no packet.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ChainError {
    #[error("a descriptor has the wrong direction for its queue")]
    Direction,
    #[error("a descriptor points outside guest memory")]
    Address,
    #[error("the chain is shorter than a packet header")]
    TooShort,
}

/// Memory of several chains: all headers in one list and all payload in
/// another, so that one system call can move the payload of many packets.
#[derive(Debug, Default)]
pub(super) struct Buffers<'m> {
    headers: Vec<VolatileSlice<'m>>,
    data: Vec<VolatileSlice<'m>>,
    chains: Vec<Chain>,
}

/// One chain's share of [`Buffers`].
#[derive(Clone, Debug)]
pub(super) struct Chain {
    pub(super) head_index: u16,
    pub(super) data_len: usize,
    headers: Range<usize>,
}

// === impl Buffers ===

impl<'m> Buffers<'m> {
    pub(super) fn clear(&mut self) {
        self.headers.clear();
        self.data.clear();
        self.chains.clear();
    }

    /// Adds a chain; `writable` says which way its queue goes. Gives the bytes
    /// of payload that it holds.
    pub(super) fn push(
        &mut self,
        memory: &'m GuestMemory,
        chain: DescriptorChain<&'m GuestMemory>,
        writable: bool,
    ) -> Result<usize, ChainError> {
        let (headers, data) = (self.headers.len(), self.data.len());
        let head_index = chain.head_index();
        match self.split(memory, chain, writable) {
            Ok(data_len) => {
                self.chains.push(Chain {
                    head_index,
                    data_len,
                    headers: headers..self.headers.len(),
                });
                Ok(data_len)
            }
            Err(error) => {
                self.headers.truncate(headers);
                self.data.truncate(data);
                Err(error)
            }
        }
    }

    fn split(
        &mut self,
        memory: &'m GuestMemory,
        chain: DescriptorChain<&'m GuestMemory>,
        writable: bool,
    ) -> Result<usize, ChainError> {
        let access = if writable {
            Permissions::Write
        } else {
            Permissions::Read
        };
        let mut header_missing = HEADER_LEN;
        let mut data_len = 0;
        for descriptor in chain {
            if descriptor.is_write_only() != writable {
                return Err(ChainError::Direction);
            }
            let len = descriptor.len() as usize;
            if len == 0 {
                continue;
            }
            // More than one slice when the buffer crosses memory regions.
            for slice in memory
                .get_slices(descriptor.addr(), len, access)
                .map_err(|_| ChainError::Address)?
            {
                let mut slice = slice.map_err(|_| ChainError::Address)?;
                if header_missing > 0 {
                    let n = slice.len().min(header_missing);
                    let (header, rest) = slice.split_at(n).map_err(|_| ChainError::Address)?;
                    self.headers.push(header);
                    header_missing -= n;
                    slice = rest;
                }
                if !slice.is_empty() {
                    data_len += slice.len();
                    self.data.push(slice);
                }
            }
        }
        match header_missing {
            0 => Ok(data_len),
            _ => Err(ChainError::TooShort),
        }
    }

    /// Forgets the chains after the first `count`, none of which has payload.
    pub(super) fn forget_after(&mut self, count: usize) {
        self.chains.truncate(count);
        let headers = self.chains.last().map_or(0, |chain| chain.headers.end);
        self.headers.truncate(headers);
    }

    pub(super) fn chains(&self) -> &[Chain] {
        &self.chains
    }

    /// The payload of all chains, in order.
    pub(super) fn data(&self) -> &[VolatileSlice<'m>] {
        &self.data
    }

    /// Shortens the payload of all chains together to at most `len` bytes.
    pub(super) fn truncate_data(&mut self, mut len: usize) {
        for (i, slice) in self.data.iter_mut().enumerate() {
            if slice.len() >= len {
                if let Ok(shorter) = slice.subslice(0, len) {
                    *slice = shorter;
                }
                self.data.truncate(i + 1);
                return;
            }
            len -= slice.len();
        }
    }

    pub(super) fn read_header(&self, chain: &Chain) -> [u8; HEADER_LEN] {
        let mut header = [0; HEADER_LEN];
        let mut at = 0;
        for slice in &self.headers[chain.headers.clone()] {
            at += slice.copy_to(&mut header[at..]);
        }
        header
    }

    pub(super) fn write_header(&self, chain: &Chain, header: &[u8; HEADER_LEN]) {
        let mut at = 0;
        for slice in &self.headers[chain.headers.clone()] {
            // `split` cut these slices to the header's length in total, so the
            // whole of each is written.
            at += slice.write(&header[at..], 0).unwrap_or(0);
        }
    }
}
