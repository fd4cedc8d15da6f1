//! One program of a sandbox and this program's standard streams, joined.

use soulbox_proto::guest::v1::{
    ExecResponse, Exited, ProcessInput, exec_response, exited, process_input,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status, Streaming};

use super::error::CliError;
use super::signals::{SIGINT, SIGWINCH, Signals};
use super::terminal::{self, RawMode};
use super::{OWN_FAILURE, stdio};

/// As timeout(1) ends.
pub(super) const TIMED_OUT: u8 = 124;
/// What waits to be sent: input is read as fast as the program takes it.
const INPUT_BUFFER: usize = 2;

/// What goes to the program. `T` is the request of the call that it is in.
pub(super) struct Session<T> {
    requests: mpsc::Sender<T>,
    input: fn(ProcessInput) -> T,
    /// It takes standard input.
    pub(super) is_interactive: bool,
    /// It has a terminal.
    pub(super) has_terminal: bool,
    /// A signal goes to the program; else it ends the call.
    pub(super) passes_signals: bool,
    /// The program does not know yet how large its terminal is.
    pub(super) is_resized: bool,
    is_interrupted: bool,
}

// === impl Session ===

impl<T: Send + 'static> Session<T> {
    /// With the call's first request. Further ones are what `input` makes of input.
    pub(super) fn new(first: T, input: fn(ProcessInput) -> T) -> (Self, ReceiverStream<T>) {
        let (requests, stream) = mpsc::channel(INPUT_BUFFER);
        // The channel has just been made, so there is room.
        let _ = requests.try_send(first);
        let session = Self {
            requests,
            input,
            is_interactive: false,
            has_terminal: false,
            passes_signals: true,
            is_resized: false,
            is_interrupted: false,
        };
        (session, ReceiverStream::new(stream))
    }

    /// Drives `call` to the program's end and gives its exit code. The first signal
    /// goes to the program; a second Ctrl-C ends the call.
    pub(super) async fn run(
        mut self,
        call: impl Future<Output = Result<Response<Streaming<ExecResponse>>, Status>>,
        signals: &mut Signals,
    ) -> Result<u8, CliError> {
        if self.has_terminal {
            signals.watch_terminal()?;
        }
        tokio::pin!(call);
        let mut responses = loop {
            tokio::select! {
                response = &mut call => break response?.into_inner(),
                signal = signals.next() => self.forward(signal)?,
            }
        };
        // Keys become the program's once there is one.
        let is_raw = self.has_terminal && self.is_interactive && terminal::has_keys();
        let raw_mode = is_raw.then(RawMode::enter).transpose()?;
        if self.is_interactive {
            stdio::forward_input(self.requests.clone(), self.input);
        }
        let exited = {
            // One future for all of it: a signal must not cut a write in two.
            let relayed = relay(&mut responses);
            tokio::pin!(relayed);
            loop {
                let requests = self.requests.clone();
                tokio::select! {
                    exited = &mut relayed => break exited?,
                    signal = signals.next() => self.forward(signal)?,
                    // A size must not get lost, so it waits for room.
                    Ok(room) = requests.reserve_owned(), if self.is_resized => {
                        self.is_resized = false;
                        let input = Some(process_input::Input::Resize(terminal::size()));
                        room.send((self.input)(ProcessInput { input }));
                    }
                }
            }
        };
        drop(raw_mode);
        // A sandbox that is to go is gone when the call has ended.
        while responses.message().await?.is_some() {}
        Ok(exit_code(&exited))
    }

    fn forward(&mut self, signal: u32) -> Result<(), CliError> {
        match signal {
            SIGWINCH => self.is_resized = true,
            _ if !self.passes_signals => return Err(CliError::Interrupted),
            SIGINT if std::mem::replace(&mut self.is_interrupted, true) => {
                return Err(CliError::Interrupted);
            }
            signal => {
                let input = Some(process_input::Input::Signal(signal));
                // Where there is no room, the program is not reading: a second Ctrl-C
                // is what remains.
                let _ = self.requests.try_send((self.input)(ProcessInput { input }));
            }
        }
        Ok(())
    }
}

async fn relay(responses: &mut Streaming<ExecResponse>) -> Result<Exited, CliError> {
    let mut stdout = tokio::io::stdout();
    let mut stderr = tokio::io::stderr();
    while let Some(response) = responses.message().await? {
        match response.event {
            Some(exec_response::Event::Stdout(bytes)) => stdio::write(&mut stdout, &bytes).await?,
            Some(exec_response::Event::Stderr(bytes)) => stdio::write(&mut stderr, &bytes).await?,
            Some(exec_response::Event::Exited(exited)) => return Ok(exited),
            Some(exec_response::Event::Dropped(dropped)) => {
                let told = format!(
                    "soulbox: {} bytes of output are missing here: they were no longer kept\r\n",
                    dropped.bytes
                );
                stdio::write(&mut stderr, told.as_bytes()).await?;
            }
            Some(exec_response::Event::Started(_)) | None => {}
        }
    }
    Err(CliError::NoExit)
}

/// The exit code that a shell would give.
fn exit_code(exited: &Exited) -> u8 {
    if exited.timed_out {
        eprintln!("soulbox: the program was killed because its --timeout was over");
        return TIMED_OUT;
    }
    let code = match exited.status {
        Some(exited::Status::Code(code)) => code,
        Some(exited::Status::Signal(signal)) => 128 + signal.min(127),
        None => u32::from(OWN_FAILURE),
    };
    u8::try_from(code).unwrap_or(OWN_FAILURE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_a_shells() {
        let exited = |status, timed_out| Exited {
            status: Some(status),
            timed_out,
            ..Exited::default()
        };
        assert_eq!(exit_code(&exited(exited::Status::Code(42), false)), 42);
        assert_eq!(exit_code(&exited(exited::Status::Signal(9), false)), 137);
        assert_eq!(exit_code(&exited(exited::Status::Signal(9), true)), 124);
        assert_eq!(exit_code(&Exited::default()), 125);
    }
}
