//! From a caller to the program: stdin, its end, signals, the terminal's size.

use bytes::{Buf as _, Bytes};
use soulbox_proto::guest::MAX_CHUNK_BYTES;
use soulbox_proto::guest::v1::{
    AttachRequest, ExecRequest, ProcessInput, TerminalSize, attach_request, exec_request,
    process_input,
};
use tonic::{Status, Streaming};

use super::job::{Job, Turn};
use crate::spec::{Violations, check_signal, check_size};

/// A request of a call that has a program.
pub(super) trait CallRequest: Send + 'static {
    /// The end of the requests is the end of stdin.
    const CLOSES_STDIN: bool;

    fn input(self) -> Result<Option<ProcessInput>, Violations>;
}

enum Input {
    /// In its turn.
    Stdin(Piece),
    Signal(i32),
    Resize(TerminalSize),
    HangUp,
}

enum Piece {
    Bytes(Bytes),
    Eof,
}

/// Feeds the program until the caller has nothing more to say.
///
/// While a chunk waits for the program, one more message is read and no further
/// ones, which makes the transport hold the caller back. So a signal overtakes
/// the chunk that waits, but not a second one behind it. A caller of Exec that ends
/// its side ends stdin; of several callers, one cannot do that to the others by
/// leaving. A terminal's input has no end but ^D. What a program does not read, or
/// closed, is dropped.
///
/// An error is a message that breaks the protocol, or a caller who went away.
pub(super) async fn feed<R: CallRequest>(
    mut requests: Streaming<R>,
    job: &Job,
) -> Result<(), Status> {
    let mut turn = None;
    let mut waiting = None;
    let mut next = None;
    let mut talking = true;
    loop {
        if waiting.is_none() {
            turn = None;
            waiting = next.take();
        }
        if waiting.is_none() && !talking {
            return Ok(());
        }
        tokio::select! {
            request = requests.message(), if talking && next.is_none() => match request? {
                None => {
                    talking = false;
                    next = (R::CLOSES_STDIN && !job.has_terminal()).then_some(Piece::Eof);
                }
                Some(request) => match check(request, job)? {
                    Input::Stdin(piece) => next = Some(piece),
                    Input::Signal(signal) => {
                        job.signal(signal);
                    }
                    Input::Resize(size) => job.resize(size),
                    Input::HangUp => job.hang_up(),
                },
            },
            () = write(job, &mut turn, &mut waiting) => {}
        }
    }
}

/// Does what `waiting` says, in turn with other callers, and takes it away. What has
/// been done when this is cancelled is not done again.
async fn write(job: &Job, turn: &mut Option<Turn>, waiting: &mut Option<Piece>) {
    let Some(piece) = waiting else {
        return std::future::pending().await;
    };
    let stdin = match turn {
        Some(turn) => turn,
        None => turn.insert(job.turn().await),
    };
    match piece {
        Piece::Eof => **stdin = None,
        Piece::Bytes(bytes) => {
            while let (Some(input), false) = (&**stdin, bytes.is_empty()) {
                match input.write(bytes).await {
                    Ok(written) => bytes.advance(written),
                    // EPIPE: the program has closed its stdin.
                    Err(_) => **stdin = None,
                }
            }
        }
    }
    *waiting = None;
}

fn check(request: impl CallRequest, job: &Job) -> Result<Input, Violations> {
    use process_input::Input as Asked;

    match request.input()?.and_then(|input| input.input) {
        Some(Asked::Stdin(_)) if !job.has_stdin => Err(Violations::of(
            "input.stdin",
            "the program has none: set stdin in its start",
        )),
        Some(Asked::Stdin(chunk)) if chunk.len() > MAX_CHUNK_BYTES => {
            let limit = format!("must have at most {MAX_CHUNK_BYTES} bytes: send it in pieces");
            Err(Violations::of("input.stdin", &limit))
        }
        Some(Asked::Stdin(chunk)) => Ok(Input::Stdin(Piece::Bytes(chunk))),
        Some(Asked::StdinEof(_)) if job.has_terminal() => Ok(Input::HangUp),
        Some(Asked::StdinEof(_)) => Ok(Input::Stdin(Piece::Eof)),
        Some(Asked::Signal(number)) => check_signal(number).map(Input::Signal),
        Some(Asked::Resize(_)) if !job.has_terminal() => Err(Violations::of(
            "input.resize",
            "the program has no terminal: set one in its start",
        )),
        Some(Asked::Resize(size)) => {
            let mut violations = Violations::default();
            check_size("input.resize", size, &mut violations);
            violations.into_result()?;
            Ok(Input::Resize(size))
        }
        None => Err(Violations::of(
            "input",
            "must hold stdin, stdin_eof, signal or resize",
        )),
    }
}

// === impl CallRequest ===

impl CallRequest for ExecRequest {
    const CLOSES_STDIN: bool = true;

    fn input(self) -> Result<Option<ProcessInput>, Violations> {
        match self.message {
            Some(exec_request::Message::Input(input)) => Ok(Some(input)),
            Some(exec_request::Message::Start(_)) => Err(only_first("start")),
            None => Ok(None),
        }
    }
}

impl CallRequest for AttachRequest {
    const CLOSES_STDIN: bool = false;

    fn input(self) -> Result<Option<ProcessInput>, Violations> {
        match self.message {
            Some(attach_request::Message::Input(input)) => Ok(Some(input)),
            Some(attach_request::Message::Attach(_)) => Err(only_first("attach")),
            None => Ok(None),
        }
    }
}

fn only_first(field: &str) -> Violations {
    Violations::of(field, "must be the first message, and only that")
}
