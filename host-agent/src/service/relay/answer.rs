//! The answer to a call: the agent's bytes as they come, and an end that can be
//! believed.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use hyper::body::Frame;
use tokio::time::Sleep;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tonic::Status;
use tonic::body::Body;

use super::Farewell;
use super::told;
use crate::guest::{Reply, WireError};
use crate::id::SandboxId;
use crate::sandbox::UseError;
use crate::status::status;

/// How long a broken connection to a guest may wait for the news that explains
/// it.
pub(super) const EXPLANATION: Duration = Duration::from_millis(800);

const ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
const ENCODINGS: [&str; 4] = ["identity", "gzip", "deflate", "zstd"];

/// Why the call ends before the agent has ended it. Polled no more once it is ready.
pub(super) type News = Pin<Box<dyn Future<Output = UseError> + Send>>;

pub(super) struct Answer {
    id: SandboxId,
    /// None once it has ended.
    reply: Option<Reply>,
    news: News,
    farewell: Option<Farewell>,
    state: State,
    _call: TaskTrackerToken,
}

enum State {
    Streaming,
    /// The connection broke; the news may say why.
    Explaining(Pin<Box<Sleep>>, Status),
    /// The sandbox goes, if it is to, before the caller learns of the end.
    Leaving(Option<Leaving>, Status),
    Over,
}

type Leaving = Pin<Box<dyn Future<Output = ()> + Send>>;

// === impl Answer ===

impl Answer {
    pub(super) fn to(
        id: SandboxId,
        reply: http::Response<Reply>,
        news: News,
        farewell: Option<Farewell>,
        call: TaskTrackerToken,
    ) -> http::Response<Body> {
        let (head, reply) = reply.into_parts();
        let mut response = http::Response::new(Body::new(Self {
            id,
            reply: Some(reply),
            news,
            farewell,
            state: State::Streaming,
            _call: call,
        }));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        if let Some(encoding) = head.headers.get(&ENCODING)
            && ENCODINGS.iter().any(|known| encoding == known)
        {
            headers.insert(ENCODING, encoding.clone());
        }
        response
    }

    /// Lets the agent go, and the sandbox with it where that was asked for.
    fn end(&mut self, status: Status) {
        self.reply = None;
        let leaving = self
            .farewell
            .take()
            .map(|mut farewell| -> Leaving { Box::pin(async move { farewell.say().await }) });
        self.state = State::Leaving(leaving, status);
    }

    /// What comes next, or None when the state has changed.
    fn poll_streaming(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        use hyper::body::Body as _;

        let Some(reply) = &mut self.reply else {
            return Poll::Ready(None);
        };
        // What the guest has said goes first: a program may end its sandbox.
        match Pin::new(reply).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                Ok(data) => return Poll::Ready(Some(data)),
                Err(frame) => {
                    let trailers = frame.into_trailers().unwrap_or_default();
                    self.end(told::told(&trailers));
                }
            },
            Poll::Ready(Some(Err(broken))) => {
                self.reply = None;
                let patience = Box::pin(tokio::time::sleep(EXPLANATION));
                self.state = State::Explaining(patience, otherwise(&self.id, broken));
            }
            Poll::Ready(None) => self.end(told::told(&HeaderMap::new())),
            Poll::Pending => {
                let error = ready!(self.news.as_mut().poll(cx));
                self.end(status(&error));
            }
        }
        Poll::Ready(None)
    }
}

impl hyper::body::Body for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let answer = &mut *self;
        loop {
            match &mut answer.state {
                State::Streaming => {
                    if let Some(data) = ready!(answer.poll_streaming(cx)) {
                        return Poll::Ready(Some(Ok(Frame::data(data))));
                    }
                }
                State::Explaining(patience, otherwise) => {
                    let status = match answer.news.as_mut().poll(cx) {
                        Poll::Ready(error) => status(&error),
                        Poll::Pending => {
                            ready!(patience.as_mut().poll(cx));
                            std::mem::replace(otherwise, Status::ok(""))
                        }
                    };
                    answer.end(status);
                }
                State::Leaving(leaving, status) => {
                    if let Some(leaving) = leaving {
                        ready!(leaving.as_mut().poll(cx));
                    }
                    let trailers = trailers(status);
                    answer.state = State::Over;
                    return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
                }
                State::Over => return Poll::Ready(None),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.state, State::Over)
    }
}

/// What a call ends with when no news explains why it broke.
pub(super) fn otherwise(id: &SandboxId, broken: WireError) -> Status {
    tracing::debug!(sandbox = %id, error = %broken, "a call broke");
    match broken {
        WireError::Lost(_) => status(&UseError::Lost { id: id.clone() }),
        WireError::Broken(_) => told::failed(broken.to_string()),
    }
}

fn trailers(status: &Status) -> HeaderMap {
    let mut trailers = HeaderMap::with_capacity(3);
    // It is made here, of what fits.
    if let Err(unfit) = status.add_header(&mut trailers) {
        tracing::error!(%unfit, "a status does not fit its header");
    }
    trailers
}
