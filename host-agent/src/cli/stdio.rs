//! Standard input and output as bytes.

use std::io::Read as _;

use soulbox_proto::guest::v1::{ProcessInput, StdinEof, process_input};
use soulbox_proto::host::v1::{ExecRequest, exec_request};
use tokio::io::{AsyncWrite, AsyncWriteExt as _};
use tokio::sync::mpsc;

use super::error::CliError;

const CHUNK_BYTES: usize = 64 * 1024;

/// Of a program's standard input, or its end.
pub(super) fn exec_input(chunk: Option<Vec<u8>>) -> ExecRequest {
    input(match chunk {
        Some(bytes) => process_input::Input::Stdin(bytes.into()),
        None => process_input::Input::StdinEof(StdinEof {}),
    })
}

/// One input message.
pub(super) fn input(input: process_input::Input) -> ExecRequest {
    ExecRequest {
        message: Some(exec_request::Message::Input(ProcessInput {
            input: Some(input),
        })),
    }
}

/// Sends standard input as what `message` makes of a chunk, or of the end. A thread
/// of its own: a read from a terminal cannot be taken back, and must not keep the
/// program from ending.
pub(super) fn forward_stdin<T: Send + 'static>(
    requests: mpsc::Sender<T>,
    message: fn(Option<Vec<u8>>) -> T,
) {
    std::thread::spawn(move || {
        let mut stdin = std::io::stdin().lock();
        let mut buffer = vec![0; CHUNK_BYTES];
        loop {
            let chunk = match stdin.read(&mut buffer) {
                Ok(0) => None,
                Ok(count) => Some(buffer[..count].to_vec()),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    eprintln!(
                        "soulbox: standard input cannot be read ({error}); the sandbox sees its end"
                    );
                    None
                }
            };
            let last = chunk.is_none();
            // The call may have ended: then nobody wants the rest.
            if requests.blocking_send(message(chunk)).is_err() || last {
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

/// Lets whoever reads standard output see its end, though this program goes on.
pub(super) fn close_stdout() -> Result<(), CliError> {
    let nowhere = std::fs::OpenOptions::new().write(true).open("/dev/null");
    nowhere
        .and_then(|nowhere| Ok(rustix::stdio::dup2_stdout(nowhere)?))
        .map_err(CliError::Output)
}
