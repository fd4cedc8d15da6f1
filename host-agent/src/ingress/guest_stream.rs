//! A guest's port over vsock: PortService/Connect of its agent as a byte stream.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, Bytes};
use soulbox_proto::guest::v1::connect_request::Message as Ask;
use soulbox_proto::guest::v1::connect_response::Message as Told;
use soulbox_proto::guest::v1::port_service_client::PortServiceClient;
use soulbox_proto::guest::v1::{ConnectRequest, ConnectResponse, EndOfData, OpenPort};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio_stream::Stream as _;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::PollSender;
use tonic::body::Body;
use tonic::client::GrpcService;
use tonic::codegen::StdError;
use tonic::{Status, Streaming};
use tonic_types::StatusExt as _;

/// The most that one message to the guest holds.
const CHUNK_BYTES: usize = 64 * 1024;
/// How many messages wait for a guest that takes them slowly.
const WAITING_MESSAGES: usize = 2;

/// A TCP connection inside a guest. Shutting it down ends its direction only;
/// dropping it before both have ended resets the guest's server.
pub struct GuestStream {
    requests: PollSender<ConnectRequest>,
    responses: Streaming<ConnectResponse>,
    /// What has been received and not been read.
    received: Bytes,
    has_ended: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("nothing in the guest listens on port {0}: start the server first")]
    PortClosed(u16),
    #[error("the guest's agent made no connection: {}", .0.message())]
    Agent(Box<Status>),
    #[error("the guest's agent broke its protocol; make the template again with this version's")]
    Protocol,
}

// === impl GuestStream ===

impl GuestStream {
    /// Connects to `port` through `channel`, a connection to the guest's agent that
    /// nothing else uses: a stream that is not read would hold up the others.
    pub async fn open<T>(channel: T, port: u16) -> Result<Self, OpenError>
    where
        T: GrpcService<Body>,
        T::Error: Into<StdError>,
        T::ResponseBody:
            hyper::body::Body<Data = Bytes, Error: Into<StdError> + Send> + Send + 'static,
    {
        let (requests, stream) = mpsc::channel(WAITING_MESSAGES);
        let open = Ask::Open(OpenPort { port: port.into() });
        // There is room, and the other end is here.
        let sent = requests.send(request(open)).await;
        sent.map_err(|_| OpenError::Protocol)?;
        let mut client = PortServiceClient::new(channel);
        let refused = |status| refusal(status, port);
        let responses = client.connect(ReceiverStream::new(stream)).await;
        let mut responses = responses.map_err(refused)?.into_inner();
        let first = responses.message().await.map_err(refused)?;
        match first.and_then(|response| response.message) {
            Some(Told::Opened(_)) => Ok(Self {
                requests: PollSender::new(requests),
                responses,
                received: Bytes::new(),
                has_ended: false,
            }),
            _ => Err(OpenError::Protocol),
        }
    }

    fn poll_request(
        &mut self,
        cx: &mut Context<'_>,
        message: impl FnOnce() -> Ask,
    ) -> Poll<io::Result<()>> {
        let gone = |_| io::Error::from(io::ErrorKind::BrokenPipe);
        ready!(self.requests.poll_reserve(cx)).map_err(gone)?;
        Poll::Ready(self.requests.send_item(request(message())).map_err(gone))
    }
}

impl AsyncRead for GuestStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.received.is_empty() && !self.has_ended {
            match ready!(Pin::new(&mut self.responses).poll_next(cx)) {
                Some(Ok(response)) => match response.message {
                    Some(Told::Data(data)) => self.received = data,
                    Some(Told::End(_)) => self.has_ended = true,
                    Some(Told::Opened(_)) | None => {
                        return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
                    }
                },
                Some(Err(status)) => return Poll::Ready(Err(broken(&status))),
                // The guest is gone; that is no end of what it had to say.
                None => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
            }
        }
        let length = self.received.len().min(buffer.remaining());
        buffer.put_slice(&self.received[..length]);
        self.received.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for GuestStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let chunk = &bytes[..bytes.len().min(CHUNK_BYTES)];
        let data = || Ask::Data(Bytes::copy_from_slice(chunk));
        ready!(self.poll_request(cx, data))?;
        Poll::Ready(Ok(chunk.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // What is queued is sent as soon as the guest takes it.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.requests.is_closed() {
            ready!(self.poll_request(cx, || Ask::End(EndOfData {})))?;
            self.requests.close();
        }
        Poll::Ready(Ok(()))
    }
}

fn request(message: Ask) -> ConnectRequest {
    ConnectRequest {
        message: Some(message),
    }
}

fn refusal(status: Status, port: u16) -> OpenError {
    match reason(&status).as_str() {
        "PORT_CLOSED" => OpenError::PortClosed(port),
        _ => OpenError::Agent(Box::new(status)),
    }
}

fn broken(status: &Status) -> io::Error {
    let kind = match reason(status).as_str() {
        "CONNECTION_RESET" => io::ErrorKind::ConnectionReset,
        _ => io::ErrorKind::ConnectionAborted,
    };
    io::Error::new(kind, status.message().to_owned())
}

fn reason(status: &Status) -> String {
    let info = status.get_details_error_info();
    info.map(|info| info.reason).unwrap_or_default()
}
