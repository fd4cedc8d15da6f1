//! Work on files blocks, so it is done on other threads than the agent's own: a
//! bounded number of jobs, none of which waits for a caller.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::error::FileError;
use super::place::{Place, View};
use crate::status::internal;
use crate::sys::process::give_memory_back;

/// How many run at once; others wait. Each may hold a chunk.
const MAX_RUNNING: usize = 32;
/// How many responses wait for a caller who reads slowly.
const WAITING: usize = 4;
/// How soon what a long call has left in the allocator is given back: the caller's last
/// messages are gone then.
const TIDY_AFTER: Duration = Duration::from_millis(200);

#[derive(Clone)]
pub(super) struct Jobs {
    running: Arc<Semaphore>,
    tidies: Arc<AtomicBool>,
}

/// A call through which much may pass.
pub(super) struct LongCall(Jobs);

/// What a stream of responses is made from, a response at a time.
pub(super) trait Source: Send + 'static {
    type Item: Send + 'static;

    /// `gone` says whether the caller has left, for work that is long. Called with
    /// the agent's own rights.
    fn next(&mut self, gone: &dyn Fn() -> bool) -> Result<Option<Self::Item>, FileError>;
}

pub(super) type Responses<T> = ReceiverStream<Result<T, Status>>;

// === impl Jobs ===

impl Jobs {
    pub(super) fn new() -> Self {
        Self {
            running: Arc::new(Semaphore::new(MAX_RUNNING)),
            tidies: Arc::default(),
        }
    }

    pub(super) fn long_call(&self) -> LongCall {
        LongCall(self.clone())
    }

    /// Runs the work on a thread that may block. It runs to its end even when nobody
    /// waits for it any longer.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, FileError> + Send + 'static,
    ) -> Result<T, Status> {
        let permit = Arc::clone(&self.running).acquire_owned().await;
        let done = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work()
        });
        let done = done
            .await
            .map_err(|error| internal(format!("the work did not finish: {error}")))?;
        Ok(done?)
    }

    /// The same, with the rights of the place's user.
    pub(super) async fn at<T: Send + 'static>(
        &self,
        place: Place,
        work: impl FnOnce(&Place, &View) -> Result<T, FileError> + Send + 'static,
    ) -> Result<T, Status> {
        self.run(move || place.visit(|view| work(&place, view)))
            .await
    }

    /// Streams what the source that `open` makes has.
    pub(super) async fn stream<S: Source>(
        &self,
        place: Place,
        open: impl FnOnce(&Place, &View) -> Result<S, FileError> + Send + 'static,
    ) -> Result<Responses<S::Item>, Status> {
        let (responses, stream) = mpsc::channel(WAITING);
        let first = responses.clone();
        // What is small is told in the same job: one change of threads in all.
        let opened = self
            .run(move || {
                let source = place.visit(|view| open(&place, view))?;
                Ok(fill(source, &first))
            })
            .await?;
        if opened.is_some() {
            let jobs = self.clone();
            tokio::spawn(async move { jobs.go_on(opened, responses).await });
        }
        Ok(ReceiverStream::new(stream))
    }

    /// Has the source fill the channel whenever half of it is free: no thread waits
    /// for the caller, and each change of threads serves several responses.
    async fn go_on<S: Source>(
        self,
        mut left: Option<S>,
        responses: mpsc::Sender<Result<S::Item, Status>>,
    ) {
        let _long = self.long_call();
        while let Some(source) = left.take() {
            match responses.reserve_many(WAITING / 2).await {
                Ok(room) => drop(room),
                Err(_) => {
                    // Closing what it has open may take a while.
                    let close = move || {
                        drop(source);
                        Ok(())
                    };
                    let _ = self.run(close).await;
                    return;
                }
            }
            let to = responses.clone();
            match self.run(move || Ok(fill(source, &to))).await {
                Ok(source) => left = source,
                Err(status) => {
                    let _ = responses.send(Err(status)).await;
                }
            }
        }
    }
}

// === impl LongCall ===

impl Drop for LongCall {
    fn drop(&mut self) {
        let Self(jobs) = self;
        // Outside a runtime the process is about to end.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        if jobs.tidies.swap(true, Ordering::Relaxed) {
            return;
        }
        let jobs = jobs.clone();
        runtime.spawn(async move {
            tokio::time::sleep(TIDY_AFTER).await;
            jobs.tidies.store(false, Ordering::Relaxed);
            give_memory_back();
        });
    }
}

/// Returns the source when there is no more room, None when it is over.
fn fill<S: Source>(mut source: S, responses: &mpsc::Sender<Result<S::Item, Status>>) -> Option<S> {
    loop {
        match responses.try_reserve() {
            Ok(room) => match source.next(&|| responses.is_closed()) {
                Ok(Some(item)) => room.send(Ok(item)),
                Ok(None) => return None,
                Err(error) => {
                    room.send(Err(error.into()));
                    return None;
                }
            },
            // Where the caller has gone, `reserve_many` says so.
            Err(_) => return Some(source),
        }
    }
}
