//! From the program to its log: stdout and stderr, or its terminal.

use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::job::Job;
use super::log::Stream;
use super::stdio;

/// After the program's end, output is over when it pauses this long …
const SILENCE: Duration = Duration::from_millis(200);
/// … or, when something that it left behind never pauses, after this.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What a program speaks through.
pub(super) struct Output {
    stdout: Source,
    stderr: Source,
}

struct Source {
    /// None when it has been closed.
    from: Option<stdio::Output>,
}

// === impl Output ===

impl Output {
    pub(super) fn new(stdout: stdio::Output, stderr: Option<stdio::Output>) -> Self {
        Self {
            stdout: Source { from: Some(stdout) },
            stderr: Source { from: stderr },
        }
    }

    /// Reads both until they are closed, as fast as callers do for whom the program
    /// waits. When both have bytes the choice is random, so neither starves.
    ///
    /// A pipe stays open for as long as anything holds it, such as a server left
    /// in the background. So once the program has `ended`, what the pipes held is
    /// read, and what comes on without a pause, and that is all.
    pub(super) async fn read(&mut self, job: &Job, mut ended: oneshot::Receiver<()>) {
        while self.is_open() {
            let next = async {
                job.may_speak().await;
                self.next(job).await
            };
            tokio::select! {
                _ = next => {}
                _ = &mut ended => break,
            }
        }

        let mut owed = self.stdout.held() + self.stderr.held();
        let over = Instant::now() + LAST_WORDS;
        while self.is_open() && (owed > 0 || Instant::now() < over) {
            job.may_speak().await;
            match tokio::time::timeout(SILENCE, self.next(job)).await {
                Ok(bytes) => owed = owed.saturating_sub(bytes),
                Err(_) => return,
            }
        }
    }

    /// Reads on, for nobody, until both are closed: what a program left behind may
    /// speak on, and would be killed for it where nobody holds the other end. A
    /// terminal is not held: what is left in it hears that it has gone.
    pub(super) async fn drain(mut self) {
        self.stdout.hold_pipe();
        self.stderr.hold_pipe();
        while self.is_open() {
            tokio::select! {
                _ = self.stdout.read(|_| {}) => {}
                _ = self.stderr.read(|_| {}) => {}
            }
        }
    }

    /// How many bytes came; 0 when one of them has been closed.
    async fn next(&mut self, job: &Job) -> usize {
        let Self { stdout, stderr } = self;
        tokio::select! {
            bytes = stdout.read(|bytes| job.say(Stream::Stdout, bytes)) => bytes,
            bytes = stderr.read(|bytes| job.say(Stream::Stderr, bytes)) => bytes,
        }
    }

    fn is_open(&self) -> bool {
        self.stdout.from.is_some() || self.stderr.from.is_some()
    }
}

// === impl Source ===

impl Source {
    /// Hands over what is there; 0 at the end, and after that, never returns.
    async fn read(&mut self, take: impl FnOnce(&[u8])) -> usize {
        let Some(from) = &self.from else {
            return std::future::pending().await;
        };
        let bytes = from.read(take).await;
        if bytes.is_none() {
            self.from = None;
        }
        bytes.unwrap_or(0)
    }

    fn held(&self) -> usize {
        self.from.as_ref().map_or(0, stdio::Output::held)
    }

    fn hold_pipe(&mut self) {
        self.from
            .take_if(|from| matches!(from, stdio::Output::Terminal(_)));
    }
}
