//! What a guest wrote and its host reader has not taken yet.

use std::collections::VecDeque;
use std::io::IoSlice;

use vm_memory::VolatileSlice;

/// A queue of bytes. It owns no memory while it is empty. The credit that the
/// guest was given bounds it.
#[derive(Debug, Default)]
pub(super) struct Buffer {
    bytes: VecDeque<u8>,
}

// === impl Buffer ===

impl Buffer {
    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Appends all of `slices` but their first `skip` bytes.
    pub(super) fn push(&mut self, slices: &[VolatileSlice<'_>], mut skip: usize) {
        for slice in slices {
            let skipped = skip.min(slice.len());
            skip -= skipped;
            if let Ok(rest) = slice.offset(skipped) {
                self.push_slice(&rest);
            }
        }
    }

    fn push_slice(&mut self, slice: &VolatileSlice<'_>) {
        let old_len = self.bytes.len();
        self.bytes.resize(old_len + slice.len(), 0);
        let (front, back) = self.bytes.as_mut_slices();
        let front_len = front.len();
        // The new bytes begin in `front` and may go on in `back`.
        let in_front = front_len.saturating_sub(old_len).min(slice.len());
        if in_front > 0 {
            slice.copy_to(&mut front[old_len..]);
        }
        if let Ok(rest) = slice.offset(in_front)
            && !rest.is_empty()
        {
            rest.copy_to(&mut back[old_len.saturating_sub(front_len)..]);
        }
    }

    /// What there is, oldest first.
    pub(super) fn as_io_slices(&self) -> [IoSlice<'_>; 2] {
        let (front, back) = self.bytes.as_slices();
        [IoSlice::new(front), IoSlice::new(back)]
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = u8> {
        self.bytes.iter().copied()
    }

    /// Forgets the oldest `len` bytes.
    pub(super) fn consume(&mut self, len: usize) {
        self.bytes.drain(..len);
        if self.bytes.is_empty() {
            self.bytes = VecDeque::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bytes_come_out_as_they_went_in(
            steps in prop::collection::vec((0..300usize, 0..100usize, 0..300usize), 1..60),
        ) {
            let mut buffer = Buffer::default();
            let mut model = Vec::new();
            let mut next = 0u8;
            for (len, skip, take) in steps {
                let mut source: Vec<u8> = (0..len).map(|_| { next = next.wrapping_add(1); next }).collect();
                let (a, b) = source.split_at_mut(len / 3);
                model.extend(a.iter().chain(b.iter()).skip(skip));
                buffer.push(&[VolatileSlice::from(a), VolatileSlice::from(b)], skip);
                let [x, y] = buffer.as_io_slices();
                prop_assert_eq!([&x[..], &y[..]].concat(), model.clone());
                let take = take.min(model.len());
                buffer.consume(take);
                model.drain(..take);
                prop_assert_eq!(buffer.len(), model.len());
                prop_assert!(!buffer.is_empty() || buffer.bytes.capacity() == 0);
            }
        }
    }
}
