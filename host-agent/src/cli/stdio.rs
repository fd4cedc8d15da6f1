//! Standard input and output as bytes.

use std::io::Read as _;

use soulbox_proto::guest::v1::{ProcessInput, StdinEof, process_input};
use soulbox_proto::host::v1::{ExecRequest, exec_request};
use tokio::io::{AsyncWrite, AsyncWriteExt as _};
use tokio::sync::mpsc;

use super::error::CliError;

const CHUNK_BYTES: usize = 64 * 1024;

/// One input message.
pub(super) fn input(input: process_input::Input) -> ExecRequest {
    ExecRequest {
        message: Some(exec_request::Message::Input(ProcessInput {
            input: Some(input),
        })),
    }
}

/// Sends standard input until its end. A thread of its own: a read from a
/// terminal cannot be taken back, and must not keep the program from ending.
pub(super) fn forward_stdin(requests: mpsc::Sender<ExecRequest>) {
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        let mut buffer = vec![0; CHUNK_BYTES];
        loop {
            let message = match stdin.read(&mut buffer) {
                Ok(0) => process_input::Input::StdinEof(StdinEof {}),
                Ok(count) => process_input::Input::Stdin(buffer[..count].to_vec().into()),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    eprintln!(
                        "soulbox: standard input cannot be read ({error}); the program sees its end"
                    );
                    process_input::Input::StdinEof(StdinEof {})
                }
            };
            let last = matches!(message, process_input::Input::StdinEof(_));
            // The call may have ended: then nobody wants the rest.
            if requests.blocking_send(input(message)).is_err() || last {
                return;
            }
        }
    });
}

/// Writes and flushes: what a program prints shows when it prints it.
pub(super) async fn write(
    output: &mut (impl AsyncWrite + Unpin),
    bytes: &[u8],
) -> Result<(), CliError> {
    output.write_all(bytes).await.map_err(CliError::Output)?;
    output.flush().await.map_err(CliError::Output)
}
