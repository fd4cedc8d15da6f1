//! What a runner and the programs it starts write to stdout and stderr.

use std::os::fd::OwnedFd;

use bytes::{Bytes, BytesMut};
use rustix::io::ioctl_fionread;
use soulbox_proto::guest::v1::run_code_response::Event;
use tokio::net::unix::pipe;

/// The most that one message holds; what a pipe holds.
const CHUNK_BYTES: usize = 64 * 1024;
/// The most that one look at a pipe takes: it can be made larger than it is.
const MAX_HELD_BYTES: usize = 1024 * 1024;

/// The read end of one of the two.
pub(super) struct Output {
    pipe: Option<pipe::Receiver>,
    event: fn(Bytes) -> Event,
}

// === impl Output ===

impl Output {
    pub(super) fn new(pipe: OwnedFd, event: fn(Bytes) -> Event) -> std::io::Result<Self> {
        Ok(Self {
            pipe: Some(pipe::Receiver::from_owned_fd(pipe)?),
            event,
        })
    }

    /// Waits for more. Once the pipe is closed, for ever.
    pub(super) async fn next(&mut self) -> Event {
        while let Some(pipe) = &self.pipe {
            // No room is kept while nothing comes: most of the time nothing does.
            let mut room = BytesMut::new();
            if pipe.readable().await.is_ok() {
                room.reserve(held(pipe).clamp(1, CHUNK_BYTES));
                match pipe.try_read_buf(&mut room) {
                    Ok(1..) => return (self.event)(room.freeze()),
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
                    Ok(0) | Err(_) => {}
                }
            }
            self.pipe = None;
        }
        std::future::pending().await
    }

    /// What the pipe holds now, and not what is written meanwhile: that may never
    /// end.
    pub(super) fn drain(&mut self, take: &mut impl FnMut(Event)) {
        let Some(pipe) = &self.pipe else { return };
        let mut owed = held(pipe).min(MAX_HELD_BYTES);
        while owed > 0 {
            let mut room = BytesMut::zeroed(owed.min(CHUNK_BYTES));
            // Not through tokio, which would first have to be told that there is
            // something to read.
            let read = rustix::io::read(pipe, &mut room[..]).unwrap_or(0);
            if read == 0 {
                return;
            }
            room.truncate(read);
            owed = owed.saturating_sub(read);
            take((self.event)(room.freeze()));
        }
    }
}

fn held(pipe: &pipe::Receiver) -> usize {
    let held = ioctl_fionread(pipe).unwrap_or(0);
    usize::try_from(held).unwrap_or(usize::MAX)
}
