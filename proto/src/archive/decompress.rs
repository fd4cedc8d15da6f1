//! Streams that were compressed with zstd. They are no more trusted than what is in them.

use std::io;

use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation as _, OutBuffer};

/// How far back a stream may refer, as a power of two: what is kept of it. zstd's own
/// levels up to 19 need no more.
const WINDOW_LOG: u32 = 23;
const PLAIN_BYTES: usize = 128 * 1024;

pub struct Decompressor {
    decoder: Decoder<'static>,
    plain: Vec<u8>,
}

#[derive(Debug, thiserror::Error)]
#[error("is no sound zstd stream ({0})")]
pub struct DecompressError(#[from] io::Error);

// === impl Decompressor ===

impl Decompressor {
    pub fn new() -> Result<Self, DecompressError> {
        let mut decoder = Decoder::new()?;
        decoder.set_parameter(DParameter::WindowLogMax(WINDOW_LOG))?;
        Ok(Self {
            decoder,
            plain: vec![0; PLAIN_BYTES],
        })
    }

    /// Gives `take` what the next piece of the stream holds.
    pub fn feed<E: From<DecompressError>>(
        &mut self,
        data: &[u8],
        mut take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut input = InBuffer::around(data);
        loop {
            let mut output = OutBuffer::around(&mut self.plain[..]);
            let ran = self.decoder.run(&mut input, &mut output);
            ran.map_err(DecompressError)?;
            let plain = output.as_slice();
            let is_full = plain.len() == PLAIN_BYTES;
            take(plain)?;
            // More may be waiting inside where there was no room for it.
            if input.pos() == data.len() && !is_full {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decompress(stream: &[u8], piece: usize) -> Result<Vec<u8>, DecompressError> {
        let mut decompressor = Decompressor::new()?;
        let mut plain = Vec::new();
        for piece in stream.chunks(piece) {
            decompressor.feed(piece, |data| {
                plain.extend_from_slice(data);
                Ok::<_, DecompressError>(())
            })?;
        }
        Ok(plain)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_was_compressed_comes_out(
            some in prop::collection::vec(any::<u8>(), 1..300),
            times in 0..3000_usize,
            piece in 1..5000_usize,
        ) {
            let data = some.repeat(times);
            let stream = zstd::bulk::compress(&data, 1).unwrap();
            prop_assert!(decompress(&stream, piece).unwrap() == data);
        }

        #[test]
        fn any_bytes_come_out_or_are_refused(
            mut bytes in prop::collection::vec(any::<u8>(), 0..600),
            is_stream in any::<bool>(),
        ) {
            if is_stream {
                bytes.splice(..0, *b"\x28\xb5\x2f\xfd");
            }
            let _ = decompress(&bytes, 100);
        }
    }

    #[test]
    fn a_stream_that_refers_far_back_is_refused() {
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(WINDOW_LOG + 1).unwrap();
        io::copy(&mut io::Read::take(io::repeat(7), 1 << 25), &mut encoder).unwrap();
        let stream = encoder.finish().unwrap();
        assert!(decompress(&stream, stream.len()).is_err());
    }
}
