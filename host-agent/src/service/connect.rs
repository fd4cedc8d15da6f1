//! One Connect call: a byte stream in messages, both ways at their own pace.

use soulbox_proto::host::v1 as proto;
use soulbox_proto::host::v1::connect_request::Message as Ask;
use soulbox_proto::host::v1::connect_response::Message as Told;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio_stream::Stream as Messages;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tonic::{Status, Streaming};

use super::sandboxes::invalid;
use crate::ingress::Stream;

/// The most that one message holds.
const CHUNK_BYTES: usize = 64 * 1024;
/// How many messages wait for a caller who reads slowly.
const WAITING_MESSAGES: usize = 2;

/// The first message of a call.
pub(super) async fn opening(
    requests: &mut Streaming<proto::ConnectRequest>,
) -> Result<proto::ConnectOpen, Status> {
    match requests.message().await?.and_then(|first| first.message) {
        Some(Ask::Open(open)) => Ok(open),
        _ => Err(invalid("open", "is missing; send it first".to_owned())),
    }
}

/// Carries until both directions have ended, one has failed, the caller is gone,
/// or the daemon goes.
pub(super) fn carry(
    requests: Streaming<proto::ConnectRequest>,
    stream: Stream,
    stopping: CancellationToken,
    call: TaskTrackerToken,
) -> impl Messages<Item = Result<proto::ConnectResponse, Status>> + use<> {
    let (responses, waiting) = mpsc::channel(WAITING_MESSAGES);
    let (reader, writer) = tokio::io::split(stream);
    tokio::spawn(async move {
        let _call = call;
        let carried =
            async { tokio::try_join!(to_guest(requests, writer), from_guest(reader, &responses)) };
        let failed = tokio::select! {
            carried = carried => carried.err(),
            () = responses.closed() => None,
            () = stopping.cancelled() => Some(Status::unavailable("soulboxd is stopping; connect again when it runs")),
        };
        if let Some(status) = failed {
            let _ = responses.send(Err(status)).await;
        }
    });
    ReceiverStream::new(waiting)
}

async fn to_guest(
    mut requests: Streaming<proto::ConnectRequest>,
    mut writer: WriteHalf<Stream>,
) -> Result<(), Status> {
    while let Some(request) = requests.message().await? {
        match request.message {
            Some(Ask::Data(bytes)) => writer.write_all(&bytes).await.map_err(lost)?,
            Some(Ask::End(_)) => return writer.shutdown().await.map_err(lost),
            Some(Ask::Open(_)) | None => {
                return Err(invalid("message", "is neither data nor end".to_owned()));
            }
        }
    }
    // Without an end it is not whole: dropping both halves resets it.
    Err(Status::cancelled("the caller ended without `end`"))
}

async fn from_guest(
    mut reader: ReadHalf<Stream>,
    responses: &mpsc::Sender<Result<proto::ConnectResponse, Status>>,
) -> Result<(), Status> {
    let tell = |message| {
        let response = proto::ConnectResponse {
            message: Some(message),
        };
        // Nobody reads when the caller is gone, which ends the call.
        async { responses.send(Ok(response)).await.map_err(|_| gone()) }
    };
    tell(Told::Opened(proto::ConnectOpened {})).await?;
    let mut bytes = vec![0; CHUNK_BYTES];
    loop {
        match reader.read(&mut bytes).await.map_err(lost)? {
            0 => return tell(Told::End(proto::ConnectEnd {})).await,
            count => tell(Told::Data(bytes[..count].to_vec())).await?,
        }
    }
}

fn gone() -> Status {
    Status::cancelled("the caller is gone")
}

fn lost(error: std::io::Error) -> Status {
    Status::unavailable(format!(
        "the connection to the sandbox broke ({error}); connect again"
    ))
}
