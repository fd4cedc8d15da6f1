//! Running a program in a sandbox and passing everything through.

use std::os::unix::ffi::OsStringExt as _;

use soulbox_proto::guest::v1::{
    EnvVar, ExecResponse, Exited, ProcessSpec, exec_response, exited, process_input,
};
use soulbox_proto::host::v1::sandbox_service_client::SandboxServiceClient;
use soulbox_proto::host::v1::{ExecRequest, ExecStart, exec_request};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

use super::args::{ExecArgs, ProcessArgs};
use super::connect::Host;
use super::error::CliError;
use super::signals::{SIGINT, Signals};
use super::stdio;

/// As timeout(1) ends.
const TIMED_OUT: u8 = 124;
/// What waits to be sent: input is read as fast as the program takes it.
const INPUT_BUFFER: usize = 2;

pub(super) async fn exec(host: &Host, args: ExecArgs) -> Result<u8, CliError> {
    let process = process(args.process, args.argv)?;
    let mut signals = Signals::install()?;
    let mut client = host.sandboxes().await?;
    let start = ExecStart {
        sandbox_id: args.id,
        process: Some(process),
        delete_sandbox_after: false,
    };
    attach(&mut client, start, &mut signals).await
}

/// What the guest is to start.
pub(super) fn process(
    args: ProcessArgs,
    argv: Vec<std::ffi::OsString>,
) -> Result<ProcessSpec, CliError> {
    let env = args.env.into_iter().map(|variable| {
        let bytes = variable.into_vec();
        match bytes.iter().position(|&byte| byte == b'=') {
            Some(at) if at > 0 => Ok(EnvVar {
                name: bytes[..at].to_vec().into(),
                value: bytes[at + 1..].to_vec().into(),
            }),
            _ => Err(CliError::Env {
                variable: String::from_utf8_lossy(&bytes).into_owned(),
            }),
        }
    });
    Ok(ProcessSpec {
        argv: argv.into_iter().map(|arg| arg.into_vec().into()).collect(),
        env: env.collect::<Result<_, _>>()?,
        cwd: args.cwd.into_vec().into(),
        user: args.user,
        timeout: args.timeout.and_then(|timeout| timeout.try_into().ok()),
        limits: None,
        stdin: args.interactive,
        kill_on_disconnect: true,
        ..ProcessSpec::default()
    })
}

/// Runs it to its end. The first signal goes to the program; a second Ctrl-C
/// ends the call, and with it the program.
pub(super) async fn attach(
    client: &mut SandboxServiceClient<Channel>,
    start: ExecStart,
    signals: &mut Signals,
) -> Result<u8, CliError> {
    let interactive = start.process.as_ref().is_some_and(|process| process.stdin);
    let (requests, stream) = mpsc::channel(INPUT_BUFFER);
    let first = ExecRequest {
        message: Some(exec_request::Message::Start(start)),
    };
    // The channel has just been made, so there is room.
    let _ = requests.try_send(first);
    let mut interrupted = false;
    let call = client.exec(ReceiverStream::new(stream));
    tokio::pin!(call);
    let mut responses = loop {
        tokio::select! {
            response = &mut call => break response?.into_inner(),
            signal = signals.next() => forward(signal, &requests, &mut interrupted)?,
        }
    };
    if interactive {
        stdio::forward_stdin(requests.clone(), stdio::exec_input);
    }
    let exited = {
        // One future for all of it: a signal must not cut a write in two.
        let relayed = relay(&mut responses);
        tokio::pin!(relayed);
        loop {
            tokio::select! {
                exited = &mut relayed => break exited?,
                signal = signals.next() => forward(signal, &requests, &mut interrupted)?,
            }
        }
    };
    // A sandbox that is to go is gone when the call has ended.
    while responses.message().await?.is_some() {}
    Ok(exit_code(&exited))
}

fn forward(
    signal: u32,
    requests: &mpsc::Sender<ExecRequest>,
    interrupted: &mut bool,
) -> Result<(), CliError> {
    if signal == SIGINT && std::mem::replace(interrupted, true) {
        return Err(CliError::Interrupted);
    }
    let message = stdio::input(process_input::Input::Signal(signal));
    // Where there is no room, the program is not reading: a second Ctrl-C is
    // what remains.
    let _ = requests.try_send(message);
    Ok(())
}

async fn relay(responses: &mut Streaming<ExecResponse>) -> Result<Exited, CliError> {
    let mut stdout = tokio::io::stdout();
    let mut stderr = tokio::io::stderr();
    while let Some(response) = responses.message().await? {
        match response.event {
            Some(exec_response::Event::Stdout(bytes)) => stdio::write(&mut stdout, &bytes).await?,
            Some(exec_response::Event::Stderr(bytes)) => stdio::write(&mut stderr, &bytes).await?,
            Some(exec_response::Event::Exited(exited)) => return Ok(exited),
            Some(exec_response::Event::Started(_) | exec_response::Event::Dropped(_)) | None => {}
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
        None => u32::from(super::OWN_FAILURE),
    };
    u8::try_from(code).unwrap_or(super::OWN_FAILURE)
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
