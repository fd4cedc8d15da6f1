//! gRPC calls to a guest's agent as HTTP/2 carries them: bodies are not decoded.
//!
//! Calls that stream have a connection each while they run: bytes that wait in it
//! would hold up those of another. It is kept for the next one when the call has
//! ended with trailers. Idle connections cost no timer, and they go with this.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};

use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use base64::{Engine as _, alphabet};
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
/// The agent's chunks of files are little more than one frame each.
const FRAME_BYTES: u32 = 256 * 1024;
/// What is sent of a call with its head, without asking for room: less than the window
/// that a stream has unless it is told otherwise (RFC 9113, section 6.9.2).
const OPENING_BYTES: usize = 16 * 1024;
/// Of the headers of an answer, or of its trailers: an agent's statuses are smaller.
const MAX_HEADER_BYTES: u32 = 16 * 1024;
/// Connections kept for later calls. The agent holds some 30 KiB for each.
const MAX_IDLE: usize = 4;
const MAX_ERROR_CHARS: usize = 200;
const DETAILS: &str = "grpc-status-details-bin";
/// As tonic reads it.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

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

/// What follows the piece of a body that is to be sent.
enum Next {
    Data(Bytes),
    /// It is not here yet.
    Later,
    End,
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
        let mut response = std::future::poll_fn(|cx| poll_head(&mut response, cx)).await?;
        drop_undecodable(response.headers_mut());
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

/// Removes details of a status that are not base64: tonic panics at them.
pub(crate) fn drop_undecodable(headers: &mut HeaderMap) {
    if let Some(details) = headers.get(DETAILS)
        && BASE64.decode(details).is_err()
    {
        headers.remove(DETAILS);
    }
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
    let mut held = None;
    let mut is_opening = true;
    loop {
        let next = std::future::poll_fn(|cx| {
            // An agent need not read all that is sent to it.
            if stream.poll_reset(cx).is_ready() {
                return Poll::Ready(Err(()));
            }
            poll_next(&mut body, held.is_some(), cx)
        });
        let Ok(next) = next.await else {
            return stream.send_reset(Reason::CANCEL);
        };
        let is_last = matches!(next, Next::End);
        // The answer says when something could not be sent.
        if let Some(data) = held.take() {
            let sent = send_data(&mut stream, data, is_last, is_opening).await;
            if sent.is_none() {
                return;
            }
            is_opening = false;
        } else if is_last {
            let _ = stream.send_data(Bytes::new(), true);
        }
        match next {
            Next::Data(data) => held = Some(data),
            Next::Later => {}
            Next::End => return,
        }
    }
}

/// What follows in a body. One piece is held back until this is known, so that the
/// last can be marked as such: by itself the mark would be a write more, for which
/// the guest would be interrupted.
fn poll_next(body: &mut Body, holds: bool, cx: &mut Context<'_>) -> Poll<Result<Next, ()>> {
    loop {
        return match Pin::new(&mut *body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                Ok(data) => Poll::Ready(Ok(Next::Data(data))),
                // Requests have no trailers in gRPC.
                Err(_) => continue,
            },
            Poll::Ready(Some(Err(_))) => Poll::Ready(Err(())),
            Poll::Ready(None) => Poll::Ready(Ok(Next::End)),
            Poll::Pending if holds => Poll::Ready(Ok(Next::Later)),
            Poll::Pending => Poll::Pending,
        };
    }
}

/// None: the agent takes no more.
async fn send_data(
    stream: &mut SendStream<Bytes>,
    mut data: Bytes,
    is_last: bool,
    is_opening: bool,
) -> Option<()> {
    // h2 gives no room to a stream that its connection has not opened yet; who waited
    // for some would send this by itself, after the head of the call.
    if data.is_empty() || (is_opening && data.len() <= OPENING_BYTES) {
        return stream.send_data(data, is_last).ok();
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

    fn poll_trailers(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<HeaderMap>, WireError>> {
        let mut trailers = ready!(self.stream.poll_trailers(cx))?;
        self.is_over = true;
        self.give_back();
        if let Some(trailers) = &mut trailers {
            drop_undecodable(trailers);
        }
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

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;

    use http_body_util::BodyExt as _;
    use proptest::prelude::*;

    use super::*;

    // Length, type, flags, stream; RFC 9113, section 4.1.
    const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    const HEADERS: u8 = 1;
    const CONTINUATION: u8 = 9;
    const DATA: u8 = 0;
    const END_STREAM: u8 = 1;
    const END_HEADERS: u8 = 4;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let mut frame = vec![length[1], length[2], length[3], kind, flags, 0, 0, 0, 1];
        frame.extend_from_slice(payload);
        frame
    }

    /// The end of a call to an agent that says `first`, then `again` until nobody
    /// hears it.
    async fn call_to(first: Vec<u8>, again: Vec<u8>) -> Result<Bytes, WireError> {
        let (host, mut guest) = UnixStream::pair().unwrap();
        let none = std::path::Path::new("/none");
        let wire = Wire::new(Dialler::new(none, vec![host.into()]));
        let talking = std::thread::spawn(move || {
            // The call is there when it is answered.
            let mut heard = [0; 64];
            guest.read_exact(&mut heard).unwrap();
            guest.write_all(&SETTINGS).unwrap();
            let mut said = guest.write_all(&first);
            while said.is_ok() && !again.is_empty() {
                said = guest.write_all(&again);
            }
        });
        let mut request = Request::new(Body::empty());
        *request.uri_mut() = "/a.B/C".parse().unwrap();
        let ended = async {
            let answer = wire.call(Way::Own, request).await?;
            Ok(answer.into_body().collect().await?.to_bytes())
        };
        let ended = ended.await;
        drop(wire);
        // It hears that its connection is over.
        tokio::task::spawn_blocking(move || talking.join().unwrap())
            .await
            .unwrap();
        ended
    }

    fn status_200() -> Vec<u8> {
        // RFC 7541, appendix A: index 8.
        frame(HEADERS, END_HEADERS, &[0x88])
    }

    #[tokio::test]
    async fn a_small_call_is_two_frames_of_one_write() {
        const TEN: &[u8] = b"0123456789";
        let (host, mut guest) = UnixStream::pair().unwrap();
        let none = std::path::Path::new("/none");
        let wire = Wire::new(Dialler::new(none, vec![host.into()]));
        // That it is over is only told when it is asked for more.
        let pieces = tokio_stream::iter([Ok::<_, Status>(Frame::data(Bytes::from_static(TEN)))]);
        let mut request = Request::new(Body::new(http_body_util::StreamBody::new(pieces)));
        *request.uri_mut() = "/a.B/C".parse().unwrap();
        let listening = tokio::task::spawn_blocking(move || {
            let mut buffer = [0; 4096];
            // The connection's own words come with the call or before it.
            loop {
                let read = guest.read(&mut buffer).unwrap();
                assert_ne!(read, 0, "it ended");
                if buffer[..read].ends_with(TEN) {
                    break buffer[..read].to_vec();
                }
            }
        });
        tokio::select! {
            _ = wire.call(Way::Own, request) => {}
            heard = listening => {
                let heard = heard.unwrap();
                let data = frame(DATA, END_STREAM, TEN);
                assert!(heard.ends_with(&data) && heard.len() > data.len(), "{heard:?}");
            }
        }
    }

    #[tokio::test]
    async fn endless_headers_end_the_call() {
        let endless = frame(CONTINUATION, 0, &[b'x'; 16_000]);
        for begin in [
            frame(HEADERS, 0, &[0x88]),
            [status_200(), frame(HEADERS, 1, b"")].concat(),
        ] {
            let ended = call_to(begin, endless.clone()).await;
            assert!(matches!(ended, Err(WireError::Broken(_))), "{ended:?}");
        }
    }

    #[tokio::test]
    async fn interim_responses_end_the_call() {
        // ":status" and a literal that is not indexed.
        let interim = frame(HEADERS, END_HEADERS, &[0x08, 3, b'1', b'0', b'3']);
        let ended = call_to(interim.clone(), interim).await;
        assert!(matches!(ended, Err(WireError::Broken(_))), "{ended:?}");
    }

    #[tokio::test]
    async fn more_than_the_window_ends_the_call() {
        let (host, mut guest) = UnixStream::pair().unwrap();
        let wire = Wire::new(Dialler::new(
            std::path::Path::new("/none"),
            vec![host.into()],
        ));
        let talking = std::thread::spawn(move || {
            guest.read_exact(&mut [0; 64]).unwrap();
            guest.write_all(&SETTINGS).unwrap();
            guest.write_all(&status_200()).unwrap();
            let data = frame(DATA, 0, &[0; 100_000]);
            while guest.write_all(&data).is_ok() {}
        });
        let answer = wire
            .call(Way::Own, Request::new(Body::empty()))
            .await
            .unwrap();
        // Nobody reads it meanwhile.
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        let ended = answer.into_body().collect().await;
        assert!(matches!(ended, Err(WireError::Broken(_))));
        drop(wire);
        tokio::task::spawn_blocking(move || talking.join().unwrap())
            .await
            .unwrap();
    }

    #[tokio::test]
    async fn an_end_in_the_middle_is_a_loss() {
        for said in [
            Vec::new(),
            status_200(),
            [status_200(), frame(DATA, 0, b"half")].concat(),
        ] {
            let ended = call_to(said, Vec::new()).await;
            assert!(matches!(ended, Err(WireError::Lost(_))), "{ended:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn nonsense_ends_the_call(
            said in proptest::collection::vec(any::<u8>(), 0..400),
            frames in proptest::collection::vec((0_u8..10, any::<u8>(), proptest::collection::vec(any::<u8>(), 0..60)), 0..8),
        ) {
            let frames = frames.into_iter().flat_map(|(kind, flags, payload)| frame(kind, flags, &payload));
            let said = frames.chain(said).collect();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            // How it ends is the agent's affair; that it does is ours.
            let _ = runtime.block_on(call_to(said, Vec::new()));
        }
    }
}
