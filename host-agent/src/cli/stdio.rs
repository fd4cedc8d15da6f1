//! Standard input and output as bytes.

use std::io::Read as _;

use soulbox_proto::guest::v1::{ProcessInput, StdinEof, process_input};
use tokio::io::{AsyncWrite, AsyncWriteExt as _};
use tokio::sync::mpsc;

use super::error::CliError;

const CHUNK_BYTES: usize = 64 * 1024;

/// Sends a program its standard input and its end, as what `request` makes of that.
pub(super) fn forward_input<T: Send + 'static>(
    requests: mpsc::Sender<T>,
    request: fn(ProcessInput) -> T,
) {
    forward_stdin(requests, move |chunk| {
        let input = match chunk {
            Some(bytes) => process_input::Input::Stdin(bytes.into()),
            None => process_input::Input::StdinEof(StdinEof {}),
        };
        request(ProcessInput { input: Some(input) })
    });
}

/// Sends standard input as what `message` makes of a chunk, or of the end. A thread
/// of its own: a read from a terminal cannot be taken back, and must not keep the
/// program from ending.
pub(super) fn forward_stdin<T: Send + 'static>(
    requests: mpsc::Sender<T>,
    message: impl Fn(Option<Vec<u8>>) -> T + Send + 'static,
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
