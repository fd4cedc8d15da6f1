//! From the caller to the program: stdin, its end, and signals.

use bytes::{Buf as _, Bytes};
use soulbox_proto::guest::MAX_CHUNK_BYTES;
use soulbox_proto::guest::v1::{ExecRequest, exec_request, process_input};
use tokio::io::AsyncWriteExt as _;
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tonic::{Status, Streaming};

use crate::spec::{Violations, check_signal};

enum Input {
    Stdin(Bytes),
    Eof,
    Signal(i32),
}

/// Feeds the program until the caller has nothing more to say.
///
/// While a chunk waits for the program, one more message is read and no further
/// ones, which makes the transport hold the caller back. So a signal overtakes
/// the chunk that waits, but not a second one behind it. A caller that ends its
/// side ends stdin. What a program does not read, or closed, is dropped.
///
/// An error is a message that breaks the protocol, or a caller who went away.
pub(super) async fn feed(
    mut requests: Streaming<ExecRequest>,
    mut stdin: Option<pipe::Sender>,
    signals: mpsc::Sender<i32>,
) -> Result<(), Status> {
    let has_stdin = stdin.is_some();
    let mut waiting = Bytes::new();
    let mut next = None;
    let mut talking = true;
    while talking || next.is_some() || !waiting.is_empty() {
        if waiting.is_empty() {
            match next.take() {
                Some(Input::Stdin(chunk)) => waiting = chunk,
                Some(Input::Eof) => stdin = None,
                Some(Input::Signal(_)) | None => {}
            }
        }
        if stdin.is_none() {
            waiting.clear();
        }
        tokio::select! {
            request = requests.message(), if talking && next.is_none() => match request? {
                None => {
                    talking = false;
                    next = Some(Input::Eof);
                }
                Some(request) => match check(request, has_stdin)? {
                    // Only fails when the session has ended.
                    Input::Signal(signal) => drop(signals.send(signal).await),
                    input => next = Some(input),
                },
            },
            written = write(stdin.as_mut(), &waiting), if !waiting.is_empty() => match written {
                Ok(bytes) => waiting.advance(bytes),
                // EPIPE: the program has closed its stdin.
                Err(_) => stdin = None,
            },
            else => {}
        }
    }
    Ok(())
}

async fn write(stdin: Option<&mut pipe::Sender>, chunk: &[u8]) -> std::io::Result<usize> {
    match stdin {
        Some(stdin) => stdin.write(chunk).await,
        None => Ok(chunk.len()),
    }
}

fn check(request: ExecRequest, has_stdin: bool) -> Result<Input, Violations> {
    let input = match request.message {
        Some(exec_request::Message::Input(input)) => input.input,
        Some(exec_request::Message::Start(_)) => {
            return Err(Violations::of(
                "start",
                "must be the first message, and only that",
            ));
        }
        None => None,
    };
    match input {
        Some(process_input::Input::Stdin(_)) if !has_stdin => Err(Violations::of(
            "input.stdin",
            "the program has none: set stdin in its start",
        )),
        Some(process_input::Input::Stdin(chunk)) if chunk.len() > MAX_CHUNK_BYTES => {
            let limit = format!("must have at most {MAX_CHUNK_BYTES} bytes: send it in pieces");
            Err(Violations::of("input.stdin", &limit))
        }
        Some(process_input::Input::Stdin(chunk)) => Ok(Input::Stdin(chunk)),
        Some(process_input::Input::StdinEof(_)) => Ok(Input::Eof),
        Some(process_input::Input::Signal(number)) => check_signal(number).map(Input::Signal),
        Some(process_input::Input::Resize(_)) => Err(Violations::of(
            "input.resize",
            "the program has no terminal",
        )),
        None => Err(Violations::of(
            "input",
            "must hold stdin, stdin_eof or signal",
        )),
    }
}
