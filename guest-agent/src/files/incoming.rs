//! What a caller sends in pieces: gathered into batches while the one before is
//! worked on, so that a change of threads serves many small messages.

use bytes::Bytes;
use soulbox_proto::guest::MAX_CHUNK_BYTES;
use tonic::{Status, Streaming};

use super::error::FileError;
use super::jobs::Jobs;
use crate::spec::Violations;

/// A batch ends when it has so many bytes or messages.
const BATCH_BYTES: usize = 1024 * 1024;
const BATCH_PIECES: usize = 1024;

/// One message after the first.
pub(super) enum Piece {
    Data(Bytes),
    /// The caller has said that this is all.
    Commit,
}

/// What takes the pieces in. When it is dropped before `finish`, it undoes what a
/// caller must not find; that may block.
pub(super) trait Sink: Send + Sized + 'static {
    type Reply: Send + 'static;

    fn put(&mut self, data: Bytes) -> Result<(), FileError>;
    fn finish(self) -> Result<Self::Reply, FileError>;
}

#[derive(Default)]
struct Batch {
    data: Vec<Bytes>,
    bytes: usize,
    /// Nothing comes after it.
    last: bool,
}

/// A sink between two batches. Where the call ends there, the sink is dropped on a
/// thread that may block.
struct Parked<S: Send + 'static>(Option<S>);

/// Feeds the sink that `open` makes, and returns its reply.
pub(super) async fn feed<M, S: Sink>(
    jobs: &Jobs,
    mut requests: Streaming<M>,
    open: impl FnOnce() -> Result<S, FileError> + Send + 'static,
    piece: fn(M) -> Result<Piece, Violations>,
    ends_by_itself: bool,
) -> Result<S::Reply, Status> {
    // What has come along with the first message is taken in the job that opens, so
    // that a small file takes one.
    let mut batch = Batch::default();
    batch.gather(&mut requests, piece, ends_by_itself).await?;
    let mut next = Batch::default();
    let mut open = Some(open);
    let mut sink = Parked(None);
    let mut long = None;
    loop {
        let last = batch.last;
        let (taken, opening) = (sink.0.take(), open.take());
        let work = move || {
            let mut sink = match (taken, opening) {
                (Some(sink), _) => sink,
                (None, Some(open)) => open()?,
                (None, None) => return Ok((Parked(None), None)),
            };
            for data in batch.data {
                sink.put(data)?;
            }
            if last {
                return Ok((Parked(None), Some(sink.finish()?)));
            }
            Ok((Parked(Some(sink)), None))
        };
        if last {
            let (_, reply) = jobs.run(work).await?;
            return reply.ok_or_else(|| crate::status::internal("the work has no end"));
        }
        long.get_or_insert_with(|| jobs.long_call());
        // An error of either ends both.
        let waiting = async {
            next.wait(&mut requests, piece, ends_by_itself).await?;
            next.gather(&mut requests, piece, ends_by_itself).await
        };
        let ((parked, _), ()) = tokio::try_join!(jobs.run(work), waiting)?;
        sink = parked;
        batch = std::mem::take(&mut next);
    }
}

// === impl Batch ===

impl Batch {
    /// Waits for one message.
    async fn wait<M>(
        &mut self,
        requests: &mut Streaming<M>,
        piece: fn(M) -> Result<Piece, Violations>,
        ends_by_itself: bool,
    ) -> Result<(), Status> {
        let message = requests.message().await?;
        self.add(message, piece, ends_by_itself)
    }

    /// Takes what has arrived, and waits for nothing.
    async fn gather<M>(
        &mut self,
        requests: &mut Streaming<M>,
        piece: fn(M) -> Result<Piece, Violations>,
        ends_by_itself: bool,
    ) -> Result<(), Status> {
        while !self.last && self.bytes < BATCH_BYTES && self.data.len() < BATCH_PIECES {
            let message = tokio::select! {
                biased;
                message = requests.message() => message?,
                () = std::future::ready(()) => break,
            };
            self.add(message, piece, ends_by_itself)?;
        }
        Ok(())
    }

    fn add<M>(
        &mut self,
        message: Option<M>,
        piece: fn(M) -> Result<Piece, Violations>,
        ends_by_itself: bool,
    ) -> Result<(), Status> {
        match message.map(piece).transpose()? {
            Some(Piece::Data(data)) if data.len() > MAX_CHUNK_BYTES => {
                let limit = format!("must have at most {MAX_CHUNK_BYTES} bytes: send it in pieces");
                return Err(Violations::of("data", &limit).into());
            }
            Some(Piece::Data(data)) => {
                self.bytes += data.len();
                self.data.push(data);
            }
            Some(Piece::Commit) => self.last = true,
            None if ends_by_itself => self.last = true,
            None => {
                let problem = "is missing: send it when all has been sent";
                return Err(Violations::of("commit", problem).into());
            }
        }
        Ok(())
    }
}

// === impl Parked ===

impl<S: Send + 'static> Drop for Parked<S> {
    fn drop(&mut self) {
        let Some(sink) = self.0.take() else { return };
        // Outside a runtime the process is about to end.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn_blocking(move || drop(sink));
        }
    }
}
