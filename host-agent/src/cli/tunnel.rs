//! `soulbox connect`: standard input and output as one end of a TCP connection.

use std::io::IsTerminal as _;

use soulbox_proto::host::v1::{
    ConnectEnd, ConnectOpen, ConnectRequest, connect_request, connect_response,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::connect::Host;
use super::error::CliError;
use super::stdio;

/// What waits to be sent: input is read as fast as the sandbox takes it.
const INPUT_BUFFER: usize = 2;

/// Ends when both sides have said that they say no more. A person who has heard the
/// other side's end has nothing to add.
pub(super) async fn connect(host: &Host, sandbox_id: String, port: u16) -> Result<u8, CliError> {
    let (requests, stream) = mpsc::channel(INPUT_BUFFER);
    let open = connect_request::Message::Open(ConnectOpen {
        sandbox_id,
        port: port.into(),
    });
    // The channel has just been made, so there is room.
    let _ = requests.try_send(request(open));
    let mut client = host.network().await?;
    let call = client.connect(ReceiverStream::new(stream)).await?;
    let mut responses = call.into_inner();
    let ours = std::io::stdin().is_terminal().then(|| requests.clone());
    let mut input = Some(requests);
    let mut stdout = tokio::io::stdout();
    let mut has_ended = false;
    while let Some(response) = responses.message().await? {
        match response.message {
            Some(connect_response::Message::Opened(_)) => {
                if let Some(requests) = input.take() {
                    stdio::forward_stdin(requests, said);
                }
            }
            Some(connect_response::Message::Data(bytes)) => {
                stdio::write(&mut stdout, &bytes).await?;
            }
            Some(connect_response::Message::End(_)) => {
                has_ended = true;
                stdio::close_stdout()?;
                if let Some(requests) = &ours {
                    // The call may be over: then it needs no end.
                    let _ = requests.send(said(None)).await;
                }
            }
            None => {}
        }
    }
    match has_ended {
        true => Ok(0),
        false => Err(CliError::NoEnd),
    }
}

/// A chunk of input, or its end.
fn said(chunk: Option<Vec<u8>>) -> ConnectRequest {
    request(match chunk {
        Some(bytes) => connect_request::Message::Data(bytes),
        None => connect_request::Message::End(ConnectEnd {}),
    })
}

fn request(message: connect_request::Message) -> ConnectRequest {
    ConnectRequest {
        message: Some(message),
    }
}
