//! What a caller reads: `started`, what the program says, `exited`.
//!
//! It is read from the log when the transport has room for it, and not before. When
//! the caller goes away, the transport drops this.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use soulbox_proto::guest::v1::exec_response::Event;
use soulbox_proto::guest::v1::{ExecResponse, Started};
use tokio::task::AbortHandle;
use tokio_stream::Stream;
use tonic::{Status, Streaming};

use super::input::{CallRequest, feed};
use super::job::Job;

/// One Exec or Attach call.
pub(crate) struct Call {
    job: Arc<Job>,
    key: u64,
    stage: Stage,
    feeding: AbortHandle,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Begin,
    Events,
    End,
}

// === impl Call ===

impl Call {
    /// The call of Exec, for which the program waits.
    pub(super) fn of_exec<R: CallRequest>(job: &Arc<Job>, requests: Streaming<R>) -> Self {
        Self::new(job, job.join(true, false), requests)
    }

    pub(super) fn of_attach<R: CallRequest>(
        job: &Arc<Job>,
        requests: Streaming<R>,
        only_new: bool,
    ) -> Self {
        Self::new(job, job.join(false, only_new), requests)
    }

    fn new<R: CallRequest>(job: &Arc<Job>, key: u64, requests: Streaming<R>) -> Self {
        let fed = Arc::clone(job);
        // A task of its own: input must not wait for a caller to read.
        let feeding = tokio::spawn(async move {
            if let Err(status) = feed(requests, &fed).await {
                fed.refuse(key, status);
            }
        });
        Self {
            job: Arc::clone(job),
            key,
            stage: Stage::Begin,
            feeding: feeding.abort_handle(),
        }
    }
}

impl Stream for Call {
    type Item = Result<ExecResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let event = match self.stage {
            Stage::Begin => {
                self.stage = Stage::Events;
                Ok(Event::Started(Started {
                    pid: self.job.pid.cast_unsigned(),
                    id: self.job.id,
                }))
            }
            Stage::Events => ready!(self.job.poll_event(self.key, context)),
            Stage::End => return Poll::Ready(None),
        };
        if matches!(event, Ok(Event::Exited(_)) | Err(_)) {
            self.stage = Stage::End;
        }
        Poll::Ready(Some(event.map(|event| ExecResponse { event: Some(event) })))
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.feeding.abort();
        self.job.leave(self.key);
    }
}
