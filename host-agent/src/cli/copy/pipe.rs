//! Between calls, which are async, and files and archives, which are not.

use std::io::{self, Write};

use bytes::{Bytes, BytesMut};
use tokio::sync::mpsc;

/// Of one message.
pub(super) const CHUNK_BYTES: usize = 512 * 1024;
/// On their way, in each direction.
const CHUNKS: usize = 4;

/// A file whose bytes go into a call.
pub(super) struct ChunkWriter<T> {
    messages: mpsc::Sender<T>,
    wrap: fn(Bytes) -> T,
    chunk: BytesMut,
}

pub(super) fn channel<T>() -> (mpsc::Sender<T>, mpsc::Receiver<T>) {
    mpsc::channel(CHUNKS)
}

// === impl ChunkWriter ===

impl<T> ChunkWriter<T> {
    pub(super) fn new(messages: mpsc::Sender<T>, wrap: fn(Bytes) -> T) -> Self {
        Self {
            messages,
            wrap,
            chunk: BytesMut::with_capacity(CHUNK_BYTES),
        }
    }

    fn send(&mut self) -> io::Result<()> {
        let chunk = std::mem::replace(&mut self.chunk, BytesMut::with_capacity(CHUNK_BYTES));
        let message = (self.wrap)(chunk.freeze());
        let sent = self.messages.blocking_send(message);
        sent.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl<T> Write for ChunkWriter<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.chunk.len() == CHUNK_BYTES {
            self.send()?;
        }
        let count = bytes.len().min(CHUNK_BYTES - self.chunk.len());
        self.chunk.extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    /// What is left goes, too.
    fn flush(&mut self) -> io::Result<()> {
        match self.chunk.is_empty() {
            true => Ok(()),
            false => self.send(),
        }
    }
}
