//! gRPC calls to a guest's agent as HTTP/2 carries them: bodies are not decoded.
//!
//! Calls that stream have a connection each while they run: bytes that wait in it
//! would hold up those of another. It is kept for the next one when the call has
//! ended with trailers. Idle connections cost no timer, and they go with this.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{Reason, RecvStream, SendStream};
use http::header::HeaderMap;
use http::uri::{Authority, PathAndQuery, Scheme, Uri};
use http::{Method, Request, Response, Version};
use hyper::body::{Body as _, Frame};
use tokio::task::AbortHandle;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service};

use super::connect::Dialler;
use crate::sync::lock;
use crate::text::printable;

/// What a caller who does not read leaves here: some of the agent's chunks.
const STREAM_WINDOW_BYTES: u32 = 1024 * 1024;
/// The largest that HTTP/2 has: on a connection with several calls, one that nobody
/// reads must not hold up the others.
const CONNECTION_WINDOW_BYTES: u32 = (1 << 31) - 1;
/// The agent's chunks of 64 KiB are one frame each.
const FRAME_BYTES: u32 = 256 * 1024;
/// Of the headers of an answer, or of its trailers: an agent's statuses are smaller.
const MAX_HEADER_BYTES: u32 = 16 * 1024;
/// Connections kept for later calls. The agent holds some 30 KiB for each.
const MAX_IDLE: usize = 4;
const MAX_ERROR_CHARS: usize = 200;

/// How a call goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Beside others: for calls that say little both ways.
    Shared,
    /// On a connection that no other call has meanwhile.
    Own,
}

/// Why a call got no answer, or not all of it.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// Perhaps because the guest is gone.
    #[error("the connection to the agent broke ({0})")]
    Lost(String),
    #[error("the agent broke the call off ({0}); build the template again with this version's")]
    Broken(String),
}

/// All connections to one agent.
#[derive(Debug)]
pub(super) struct Wire {
    dialler: Dialler,
    shared: tokio::sync::Mutex<Option<Sender>>,
    idle: Mutex<Vec<Sender>>,
}

type Sender = SendRequest<Bytes>;

/// What tonic's clients call through.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    wire: Arc<Wire>,
    way: Way,
}

/// The body of an answer. Dropped before its end, it resets the call.
#[derive(Debug)]
pub struct Reply {
    stream: RecvStream,
    is_over: bool,
    lease: Option<Lease>,
    /// What the caller still sends.
    _sending: Option<Sending>,
}

/// A connection that a call has for itself.
#[derive(Debug)]
struct Lease {
    sender: Sender,
    home: Arc<Wire>,
}

/// A task that ends with this.
#[derive(Debug)]
struct Sending(AbortHandle);

// === impl Wire ===

impl Wire {
    pub(super) fn new(dialler: Dialler) -> Arc<Self> {
        Arc::new(Self {
            dialler,
            shared: tokio::sync::Mutex::default(),
            idle: Mutex::default(),
        })
    }

    pub(super) fn caller(self: &Arc<Self>, way: Way) -> Caller {
        Caller {
            wire: Arc::clone(self),
            way,
        }
    }

    /// Sends a call and waits for the head of its answer. Of `request` the path, the
    /// headers and the body count.
    pub(super) async fn call(
        self: &Arc<Self>,
        way: Way,
        request: Request<Body>,
    ) -> Result<Response<Reply>, WireError> {
        let (mut sender, lease) = match way {
            Way::Shared => (self.shared().await?, None),
            Way::Own => {
                let sender = self.own().await?;
                let home = Arc::clone(self);
                let lease = Lease {
                    sender: sender.clone(),
                    home,
                };
                (sender, Some(lease))
            }
        };
        let (head, body) = for_agent(request);
        let is_empty = body.is_end_stream();
        let (mut response, stream) = sender.send_request(head, is_empty)?;
        drop(sender);
        let sending = if is_empty {
            None
        } else {
            send(body, stream).await
        };
        let response = std::future::poll_fn(|cx| poll_head(&mut response, cx)).await?;
        let reply = |stream: RecvStream| {
            let mut reply = Reply {
                is_over: stream.is_end_stream(),
                stream,
                lease,
                _sending: sending,
            };
            if reply.is_over {
                reply.give_back();
            }
            reply
        };
        Ok(response.map(reply))
    }

    async fn shared(&self) -> Result<Sender, WireError> {
        let mut shared = self.shared.lock().await;
        if let Some(sender) = &*shared
            && let Ok(sender) = sender.clone().ready().await
        {
            return Ok(sender);
        }
        let sender = self.dial().await?;
        Ok(shared.insert(sender).clone())
    }

    async fn own(&self) -> Result<Sender, WireError> {
        while let Some(idle) = self.take_idle() {
            // It has an error when its connection is over.
            if let Ok(sender) = idle.ready().await {
                return Ok(sender);
            }
        }
        self.dial().await
    }

    fn take_idle(&self) -> Option<Sender> {
        lock(&self.idle).pop()
    }

    async fn dial(&self) -> Result<Sender, WireError> {
        let stream = self.dialler.connect().await;
        let stream = stream.map_err(|error: io::Error| WireError::Lost(error.to_string()))?;
        let (sender, connection) = h2::client::Builder::new()
            .enable_push(false)
            .initial_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES)
            .max_header_list_size(MAX_HEADER_BYTES)
            .handshake(stream)
            .await?;
        // Ends when the last that could use it is gone.
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                let error = printable(&error.to_string(), MAX_ERROR_CHARS);
                tracing::debug!(error, "a connection to an agent ended");
            }
        });
        Ok(sender)
    }
}

/// The call as it is sent. What else HTTP knows of it is the caller's connection's.
fn for_agent(request: Request<Body>) -> (Request<()>, Body) {
    let (from, body) = request.into_parts();
    let path = from.uri.path_and_query().cloned();
    let mut parts = http::uri::Parts::default();
    parts.scheme = Some(Scheme::HTTP);
    // Only fills HTTP's authority.
    parts.authority = Some(Authority::from_static("guest"));
    parts.path_and_query = Some(path.unwrap_or_else(|| PathAndQuery::from_static("/")));
    let mut head = Request::new(());
    *head.method_mut() = Method::POST;
    *head.version_mut() = Version::HTTP_2;
    // All three are there, which is all that could be wrong.
    *head.uri_mut() = Uri::from_parts(parts).unwrap_or_default();
    *head.headers_mut() = from.headers;
    (head, body)
}

fn poll_head(
    response: &mut ResponseFuture,
    cx: &mut Context<'_>,
) -> Poll<Result<Response<RecvStream>, WireError>> {
    // They would be kept, however many there are, until somebody reads them.
    if let Poll::Ready(Some(interim)) = response.poll_informational(cx) {
        interim?;
        let why = "an interim response, which gRPC does not have".to_owned();
        return Poll::Ready(Err(WireError::Broken(why)));
    }
    Pin::new(response).poll(cx).map_err(WireError::from)
}

/// Sends `body`. Most are here already, whole; what is not gets a task, so that it
/// goes on when nobody reads the answer.
async fn send(body: Body, stream: SendStream<Bytes>) -> Option<Sending> {
    let mut sending = Box::pin(pass(body, stream));
    let sent = std::future::poll_fn(|cx| Poll::Ready(sending.as_mut().poll(cx))).await;
    match sent {
        Poll::Ready(()) => None,
        Poll::Pending => Some(Sending(tokio::spawn(sending).abort_handle())),
    }
}

async fn pass(mut body: Body, mut stream: SendStream<Bytes>) {
    loop {
        let frame = std::future::poll_fn(|cx| {
            // An agent need not read all that is sent to it.
            if stream.poll_reset(cx).is_ready() {
                return Poll::Ready(Err(()));
            }
            Pin::new(&mut body)
                .poll_frame(cx)
                .map(|frame| frame.transpose().map_err(|_| ()))
        });
        let data = match frame.await {
            Ok(Some(frame)) => match frame.into_data() {
                Ok(data) => data,
                // Requests have no trailers in gRPC.
                Err(_) => continue,
            },
            Ok(None) => {
                // The answer says when it could not be sent.
                let _ = stream.send_data(Bytes::new(), true);
                return;
            }
            Err(()) => return stream.send_reset(Reason::CANCEL),
        };
        let is_last = body.is_end_stream();
        if send_data(&mut stream, data, is_last).await.is_none() || is_last {
            return;
        }
    }
}

/// None: the agent takes no more.
async fn send_data(stream: &mut SendStream<Bytes>, mut data: Bytes, is_last: bool) -> Option<()> {
    if data.is_empty() && is_last {
        return stream.send_data(data, true).ok();
    }
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        let room = std::future::poll_fn(|cx| stream.poll_capacity(cx)).await;
        let part = data.split_to(room?.ok()?.min(data.len()));
        let ends = is_last && data.is_empty();
        stream.send_data(part, ends).ok()?;
    }
    Some(())
}

// === impl Reply ===

impl Reply {
    fn give_back(&mut self) {
        if let Some(Lease { sender, home }) = self.lease.take() {
            let mut idle = lock(&home.idle);
            if idle.len() < MAX_IDLE {
                idle.push(sender);
            }
        }
    }

    fn poll_trailers(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<HeaderMap>, WireError>> {
        let trailers = ready!(self.stream.poll_trailers(cx))?;
        self.is_over = true;
        self.give_back();
        Poll::Ready(Ok(trailers))
    }
}

impl hyper::body::Body for Reply {
    type Data = Bytes;
    type Error = WireError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, WireError>>> {
        if self.is_over {
            return Poll::Ready(None);
        }
        let frame = match ready!(self.stream.poll_data(cx)) {
            Some(Ok(data)) => {
                // Whoever reads it makes room for as much.
                let _ = self.stream.flow_control().release_capacity(data.len());
                Some(Ok(Frame::data(data)))
            }
            Some(Err(error)) => Some(Err(error.into())),
            None => ready!(self.poll_trailers(cx))
                .map(|trailers| trailers.map(Frame::trailers))
                .transpose(),
        };
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.is_over
    }
}

// === impl Sending ===

impl Drop for Sending {
    fn drop(&mut self) {
        self.0.abort();
    }
}

// === impl Caller ===

impl Service<Request<Body>> for Caller {
    type Response = Response<Body>;
    type Error = Status;
    type Future = BoxFuture<Self::Response, Status>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        use http_body_util::BodyExt as _;

        let Self { wire, way } = self.clone();
        Box::pin(async move {
            let response = wire.call(way, request).await?;
            Ok(response.map(|reply| Body::new(reply.map_err(Status::from))))
        })
    }
}

// === impl WireError ===

impl From<h2::Error> for WireError {
    fn from(error: h2::Error) -> Self {
        // It may quote the agent.
        let said = printable(&error.to_string(), MAX_ERROR_CHARS);
        if error.is_io() || (error.is_go_away() && error.is_remote()) {
            Self::Lost(said)
        } else {
            Self::Broken(said)
        }
    }
}

impl From<WireError> for Status {
    fn from(error: WireError) -> Self {
        Self::unavailable(error.to_string())
    }
}
