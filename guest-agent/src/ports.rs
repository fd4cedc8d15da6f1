//! PortService: carries TCP connections to the guest's own ports, for callers that
//! reach the guest by vsock only.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};

use bytes::BytesMut;
use soulbox_proto::guest::MAX_CHUNK_BYTES;
use soulbox_proto::guest::v1::connect_request::Message as Asked;
use soulbox_proto::guest::v1::connect_response::Message as Told;
use soulbox_proto::guest::v1::port_service_server::PortService;
use soulbox_proto::guest::v1::{ConnectRequest, ConnectResponse, EndOfData, OpenPort, PortOpened};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::spec::Violations;

/// The most that one message to the caller holds.
const CHUNK_BYTES: usize = 64 * 1024;
/// A buffer with less room is replaced rather than read into.
const LEAST_ROOM_BYTES: usize = 4 * 1024;
/// How many messages wait for a caller who reads slowly.
const WAITING_MESSAGES: usize = 2;

/// Serves PortService. Clones share everything.
#[derive(Clone)]
pub(crate) struct Ports {
    /// Told when the guest is to stop.
    stop: watch::Receiver<bool>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("nothing in the guest listens on port {0}: start the server first")]
    Closed(u16),
    #[error("the guest can make no more connections ({0}): close some, or raise its limits")]
    NoRoom(io::Error),
    #[error("the server broke the connection off: look at its log")]
    Reset,
    #[error("the guest is turning off: connect to another")]
    Stopping,
}

type Responses = mpsc::Sender<Result<ConnectResponse, Status>>;

// === impl Ports ===

impl Ports {
    pub(crate) fn new(stop: watch::Receiver<bool>) -> Self {
        Self { stop }
    }
}

#[tonic::async_trait]
impl PortService for Ports {
    type ConnectStream = ReceiverStream<Result<ConnectResponse, Status>>;

    async fn connect(
        &self,
        request: Request<Streaming<ConnectRequest>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?;
        let Some(Asked::Open(open)) = first.and_then(|request| request.message) else {
            return Err(Violations::of("open", "must be the first message of the call").into());
        };
        let server = dial(port(open)?).await?;
        let (responses, stream) = mpsc::channel(WAITING_MESSAGES);
        tokio::spawn(carry(server, requests, responses, self.stop.clone()));
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

fn port(open: OpenPort) -> Result<u16, Violations> {
    match u16::try_from(open.port) {
        Ok(port @ 1..) => Ok(port),
        _ => Err(Violations::of("open.port", "must be 1 to 65535")),
    }
}

/// Connects to this guest's own `port`. A server on ::1 only is found as well.
async fn dial(port: u16) -> Result<TcpStream, ConnectError> {
    let v4 = match TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            TcpStream::connect((Ipv6Addr::LOCALHOST, port)).await
        }
        connected => connected,
    };
    v4.map_err(|error| match error.kind() {
        // The latter where the guest's kernel has no IPv6.
        io::ErrorKind::ConnectionRefused
        | io::ErrorKind::AddrNotAvailable
        | io::ErrorKind::Unsupported => ConnectError::Closed(port),
        _ => ConnectError::NoRoom(error),
    })
}

/// Carries both ways until both have ended. Otherwise the server's end is reset: it
/// must not take a caller's death for the end of what that had to say.
async fn carry(
    mut server: TcpStream,
    requests: Streaming<ConnectRequest>,
    responses: Responses,
    mut stop: watch::Receiver<bool>,
) {
    // What is sent in small pieces is meant to arrive so.
    let _ = server.set_nodelay(true);
    let (read, write) = server.split();
    let both = async {
        tell(&responses, Told::Opened(PortOpened {})).await?;
        tokio::try_join!(feed(requests, write), forward(read, &responses))
    };
    let carried = tokio::select! {
        carried = both => carried.map(drop),
        () = responses.closed() => Err(caller_gone()),
        // The sender lives as long as the agent serves.
        _ = stop.wait_for(|stop| *stop) => Err(ConnectError::Stopping.into()),
    };
    if let Err(status) = carried {
        let _ = server.set_zero_linger();
        drop(server);
        let _ = responses.send(Err(status)).await;
    }
}

/// From the caller to the server, which a slow server holds up: the next message is
/// read when the last one is written.
async fn feed(
    mut requests: Streaming<ConnectRequest>,
    mut server: WriteHalf<'_>,
) -> Result<(), Status> {
    let mut ended = false;
    while let Some(request) = requests.message().await? {
        match request.message {
            Some(Asked::Data(_)) if ended => {
                return Err(Violations::of("data", "must not follow the end").into());
            }
            Some(Asked::Data(data)) if data.len() > MAX_CHUNK_BYTES => {
                let limit = format!("must have at most {MAX_CHUNK_BYTES} bytes: send it in pieces");
                return Err(Violations::of("data", &limit).into());
            }
            Some(Asked::Data(data)) => server.write_all(&data).await.map_err(reset)?,
            Some(Asked::End(_)) => {
                ended = true;
                server.shutdown().await.map_err(reset)?;
            }
            Some(Asked::Open(_)) => {
                let problem = "must be the first message, and only that";
                return Err(Violations::of("open", problem).into());
            }
            None => return Err(Violations::of("message", "must hold data or end").into()),
        }
    }
    if ended { Ok(()) } else { Err(caller_gone()) }
}

/// From the server to the caller, who holds it up by not reading.
async fn forward(mut server: ReadHalf<'_>, responses: &Responses) -> Result<(), Status> {
    let mut buffer = BytesMut::new();
    loop {
        // Small reads share one buffer; a full one is handed on and made anew.
        if buffer.capacity() < LEAST_ROOM_BYTES {
            buffer.reserve(CHUNK_BYTES);
        }
        if server.read_buf(&mut buffer).await.map_err(reset)? == 0 {
            return tell(responses, Told::End(EndOfData {})).await;
        }
        tell(responses, Told::Data(buffer.split().freeze())).await?;
    }
}

async fn tell(responses: &Responses, message: Told) -> Result<(), Status> {
    let response = ConnectResponse {
        message: Some(message),
    };
    let told = responses.send(Ok(response)).await;
    told.map_err(|_| caller_gone())
}

/// Nobody hears it.
fn caller_gone() -> Status {
    Status::cancelled("the caller has gone")
}

fn reset(_: io::Error) -> Status {
    ConnectError::Reset.into()
}
