//! One Exec call, from `started` to `exited`.

use std::io;
use std::pin::pin;
use std::time::Duration;

use soulbox_proto::guest::v1::{ExecRequest, ExecResponse, Exited, Started, exec_response, exited};
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot};
use tonic::{Status, Streaming};

use super::input;
use super::output::Output;
use super::process::Process;
use crate::status::internal;
use crate::sys::wait::{Exit, ExitStatus};

/// What the caller reads. When the caller goes away it closes.
pub(super) type Responses = mpsc::Sender<Result<ExecResponse, Status>>;

/// A started program and whoever called for it.
pub(super) struct Session {
    process: Process,
    timeout: Option<Duration>,
    responses: Responses,
    stdin: Option<pipe::Sender>,
    output: Output,
}

// === impl Session ===

impl Session {
    pub(super) fn new(
        mut process: Process,
        timeout: Option<Duration>,
        responses: Responses,
    ) -> Result<Self, Status> {
        let pipes = process
            .pipes
            .take()
            .ok_or_else(|| internal("the pipes are gone"))?;
        let watch = || -> io::Result<_> {
            let stdin = pipes.stdin.map(pipe::Sender::from_owned_fd).transpose()?;
            let stdout = pipe::Receiver::from_owned_fd(pipes.stdout)?;
            let stderr = pipe::Receiver::from_owned_fd(pipes.stderr)?;
            Ok((stdin, Output::new(stdout, stderr, responses.clone())))
        };
        let (stdin, output) =
            watch().map_err(|error| internal(format!("the pipes cannot be watched: {error}")))?;
        Ok(Self {
            process,
            timeout,
            responses,
            stdin,
            output,
        })
    }

    /// Runs to the end of the program or of the call. Returning drops the
    /// process, which kills it unless it has ended.
    pub(super) async fn run(self, requests: Streaming<ExecRequest>) {
        let Self {
            mut process,
            timeout,
            responses,
            stdin,
            output,
        } = self;
        let pid = process.pid.cast_unsigned();
        if send(
            &responses,
            exec_response::Event::Started(Started { pid, id: 0 }),
        )
        .await
        .is_err()
        {
            return;
        }

        let (tell_ended, ended) = oneshot::channel();
        let mut output = pin!(output.forward(ended));
        let (signals, mut signalled) = mpsc::channel(1);
        let mut input = pin!(input::feed(requests, stdin, signals));
        let mut deadline = pin!(sleep(timeout));
        let (mut output_open, mut input_open, mut timed_out) = (true, true, false);

        let exit = loop {
            tokio::select! {
                exit = process.wait() => break exit,
                () = &mut output, if output_open => output_open = false,
                fed = &mut input, if input_open => {
                    input_open = false;
                    if let Err(status) = fed {
                        process.kill();
                        let _ = responses.send(Err(status)).await;
                        return;
                    }
                }
                Some(signal) = signalled.recv() => process.signal(signal),
                () = &mut deadline, if !timed_out => {
                    timed_out = true;
                    process.kill();
                }
                () = responses.closed() => return,
            }
        };
        let wall = process.started.elapsed();

        let _ = tell_ended.send(());
        if output_open {
            tokio::select! {
                () = &mut output => {}
                () = responses.closed() => return,
            }
        }
        let _ = send(&responses, exited(exit, wall, timed_out)).await;
    }
}

/// Fails when the caller has gone.
pub(super) async fn send(responses: &Responses, event: exec_response::Event) -> Result<(), ()> {
    responses
        .send(Ok(ExecResponse { event: Some(event) }))
        .await
        .map_err(drop)
}

async fn sleep(timeout: Option<Duration>) {
    match timeout {
        Some(timeout) => tokio::time::sleep(timeout).await,
        None => std::future::pending().await,
    }
}

fn exited(exit: Exit, wall: Duration, timed_out: bool) -> exec_response::Event {
    let status = match exit.status {
        ExitStatus::Code(code) => exited::Status::Code(code),
        ExitStatus::Signal(signal) => exited::Status::Signal(signal),
    };
    exec_response::Event::Exited(Exited {
        status: Some(status),
        timed_out,
        wall_us: micros(wall),
        user_cpu_us: micros(exit.user_cpu),
        system_cpu_us: micros(exit.system_cpu),
        max_resident_bytes: exit.max_resident_bytes,
    })
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
