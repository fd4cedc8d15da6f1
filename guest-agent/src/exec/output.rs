//! From the program to the caller: stdout and stderr.

use std::time::Duration;

use bytes::BytesMut;
use rustix::io::ioctl_fionread;
use soulbox_proto::guest::v1::exec_response::Event;
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::session::{Responses, send};

/// The most that one message holds; what a pipe holds.
const CHUNK_BYTES: usize = 64 * 1024;
/// A buffer with less room is replaced rather than read into.
const LEAST_ROOM_BYTES: usize = 4 * 1024;
/// After the program's end, output is over when it pauses this long …
const SILENCE: Duration = Duration::from_millis(200);
/// … or, when something that it left behind never pauses, after this.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// The read ends of both pipes and where their bytes go.
pub(super) struct Output {
    stdout: Source,
    stderr: Source,
    responses: Responses,
}

struct Source {
    pipe: Option<pipe::Receiver>,
    buffer: BytesMut,
    event: fn(bytes::Bytes) -> Event,
}

// === impl Output ===

impl Output {
    pub(super) fn new(
        stdout: pipe::Receiver,
        stderr: pipe::Receiver,
        responses: Responses,
    ) -> Self {
        Self {
            stdout: Source::new(stdout, Event::Stdout),
            stderr: Source::new(stderr, Event::Stderr),
            responses,
        }
    }

    /// Forwards both until they are closed. Each message waits until the caller
    /// takes it, so a slow one holds the program back. When both have bytes the
    /// choice is random, so neither starves.
    ///
    /// A pipe stays open for as long as anything holds it, such as a server left
    /// in the background. So once the program has `ended`, what the pipes held is
    /// forwarded, and what comes on without a pause, and that is all.
    pub(super) async fn forward(mut self, mut ended: oneshot::Receiver<()>) {
        while self.is_open() {
            let event = tokio::select! {
                event = self.stdout.read() => event,
                event = self.stderr.read() => event,
                _ = &mut ended => break,
            };
            if self.emit(event).await.is_err() {
                return;
            }
        }

        let mut owed = self.stdout.held() + self.stderr.held();
        let over = Instant::now() + LAST_WORDS;
        while self.is_open() && (owed > 0 || Instant::now() < over) {
            let event = tokio::select! {
                event = self.stdout.read() => event,
                event = self.stderr.read() => event,
                () = tokio::time::sleep(SILENCE) => return,
            };
            if let Some(Event::Stdout(bytes) | Event::Stderr(bytes)) = &event {
                owed = owed.saturating_sub(bytes.len());
            }
            if self.emit(event).await.is_err() {
                return;
            }
        }
    }

    fn is_open(&self) -> bool {
        self.stdout.pipe.is_some() || self.stderr.pipe.is_some()
    }

    async fn emit(&self, event: Option<Event>) -> Result<(), ()> {
        match event {
            Some(event) => send(&self.responses, event).await,
            None => Ok(()),
        }
    }
}

// === impl Source ===

impl Source {
    fn new(pipe: pipe::Receiver, event: fn(bytes::Bytes) -> Event) -> Self {
        Self {
            pipe: Some(pipe),
            buffer: BytesMut::new(),
            event,
        }
    }

    /// Reads what is there, or None at the end; after that, never returns.
    async fn read(&mut self) -> Option<Event> {
        let Some(pipe) = &mut self.pipe else {
            return std::future::pending().await;
        };
        // Small reads share one buffer; a full one is handed on and made anew, or
        // used again where the caller is done with it.
        if self.buffer.capacity() < LEAST_ROOM_BYTES {
            self.buffer.reserve(CHUNK_BYTES);
        }
        match pipe.read_buf(&mut self.buffer).await {
            Ok(1..) => Some((self.event)(self.buffer.split().freeze())),
            Ok(0) | Err(_) => {
                self.pipe = None;
                None
            }
        }
    }

    fn held(&self) -> usize {
        let held = self
            .pipe
            .as_ref()
            .and_then(|pipe| ioctl_fionread(pipe).ok());
        held.and_then(|bytes| usize::try_from(bytes).ok())
            .unwrap_or(0)
    }
}
