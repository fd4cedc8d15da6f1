//! Where the guest's serial console goes: a ring of its last bytes, and a
//! descriptor of the client's if it gave one.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use soulbox_proto::vmm::CONSOLE_TAIL_BYTES;

/// A handle to the console: the UART writes to one clone, the main thread asks
/// another for the tail.
#[derive(Clone, Debug)]
pub struct Console {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    tail: VecDeque<u8>,
    client: Option<OwnedFd>,
    written_bytes: u64,
    dropped_bytes: u64,
}

// === impl Console ===

impl Console {
    /// Makes `client` non-blocking: a client that does not read must not stop
    /// the guest.
    pub fn new(client: Option<OwnedFd>) -> io::Result<Self> {
        if let Some(fd) = &client {
            fcntl_setfl(fd, fcntl_getfl(fd)? | OFlags::NONBLOCK)?;
        }
        Ok(Self {
            inner: Arc::new(Mutex::new(Inner {
                tail: VecDeque::new(),
                client,
                written_bytes: 0,
                dropped_bytes: 0,
            })),
        })
    }

    /// The last bytes the guest wrote, at most [`CONSOLE_TAIL_BYTES`].
    pub fn tail(&self) -> Vec<u8> {
        self.lock().tail.iter().copied().collect()
    }

    /// Bytes the guest wrote, and of these how many the client did not take.
    pub fn counts(&self) -> (u64, u64) {
        let inner = self.lock();
        (inner.written_bytes, inner.dropped_bytes)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl io::Write for Console {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let inner = &mut *self.lock();
        let keep = &data[data.len().saturating_sub(CONSOLE_TAIL_BYTES)..];
        let excess = (inner.tail.len() + keep.len()).saturating_sub(CONSOLE_TAIL_BYTES);
        inner.tail.drain(..excess);
        inner.tail.extend(keep);
        inner.written_bytes += data.len() as u64;

        if let Some(fd) = &inner.client {
            match rustix::io::write(fd, data) {
                Ok(n) => inner.dropped_bytes += (data.len() - n) as u64,
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {
                    inner.dropped_bytes += data.len() as u64;
                }
                // The client is gone; the ring goes on.
                Err(_) => inner.client = None,
            }
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn keeps_only_the_tail() {
        let mut console = Console::new(None).unwrap();
        console.write_all(&[b'a'; CONSOLE_TAIL_BYTES]).unwrap();
        console.write_all(b"end").unwrap();
        let tail = console.tail();
        assert_eq!(tail.len(), CONSOLE_TAIL_BYTES);
        assert!(tail.ends_with(b"aend"));
        console.write_all(&[b'b'; CONSOLE_TAIL_BYTES * 2]).unwrap();
        assert_eq!(console.tail(), [b'b'; CONSOLE_TAIL_BYTES]);
    }

    #[test]
    fn a_client_that_does_not_read_costs_it_its_bytes_only() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut console = Console::new(Some(writer.into())).unwrap();
        for _ in 0..64 {
            console.write_all(&[b'x'; 4096]).unwrap();
        }
        let (written, dropped) = console.counts();
        assert_eq!(written, 64 * 4096);
        assert!(dropped > 0 && dropped < written);
        let mut taken = vec![0; (written - dropped) as usize];
        reader.read_exact(&mut taken).unwrap();
        drop(reader);
        console.write_all(b"nobody reads").unwrap();
        assert!(console.tail().ends_with(b"nobody reads"));
    }
}
