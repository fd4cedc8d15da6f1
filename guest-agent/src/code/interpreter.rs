//! One interpreter: the process of a runner, its channel and its output.

use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::Path;
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use rustix::io::{Errno, fcntl_dupfd_cloexec};
use soulbox_proto::guest::v1::run_code_response::Event;
use soulbox_proto::guest::v1::{Language, ProcessSpec};
use tokio::io::AsyncWriteExt as _;
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tonic::{Code, Status};

use super::channel::{BrokenChannel, Frame, Reader, Run, SLACK_BYTES};
use super::language::Runner;
use super::output::Output;
use super::request::ContextSpec;
use crate::exec::{Process, Processes, StartError, Stdio};
use crate::spec::Spec;
use crate::status::{excerpt, refused};
use crate::sys::spawn::Stage;
use crate::sys::wait::{Exit, ExitStatus};
use crate::users::Users;

/// How long one has to come up, on a machine that has much else to do.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// How long the kernel has to end one that was killed.
const KILL_PATIENCE: Duration = Duration::from_secs(5);
/// What is kept of what one says that does not come up.
const LAST_WORDS_BYTES: usize = 4096;

/// An interpreter that lives. Dropping it kills it with all that it started.
pub(super) struct Interpreter {
    runner: &'static Runner,
    pub(super) user: String,
    pub(super) cwd: Bytes,
    process: Process,
    reader: Reader,
    writer: OwnedWriteHalf,
    outgoing: Bytes,
    stdout: Output,
    stderr: Output,
    /// The guest that it last ran something in; see [`super::Contexts::reseed`].
    identity: u64,
    exit: Option<ExitStatus>,
}

/// What one does.
#[derive(Debug)]
pub(super) enum Heard {
    /// Stdout or stderr.
    Output(Event),
    Frame(Frame, usize),
    Broken(BrokenChannel),
    /// It has closed its channel: it ends, or has become another program.
    Closed,
    Exited(ExitStatus),
}

/// What to listen to; its end is always heard of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Listen {
    pub(super) output: bool,
    pub(super) frames: bool,
    /// The largest frame.
    pub(super) limit: usize,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum InterpreterError {
    #[error(
        "there is no {program} in the guest: install {install}, or add its folder to PATH in the context's environment"
    )]
    NoProgram {
        program: &'static str,
        install: &'static str,
    },
    #[error("{0}")]
    Lacks(String),
    #[error("{program} did not come up ({how}); it said: {said}")]
    NotUp {
        program: &'static str,
        how: String,
        said: String,
    },
    #[error("its channel could not be made: {0}: stop other programs, or raise fs.file-max")]
    Channel(#[from] std::io::Error),
    /// As a program's.
    #[error("{}", .0.message())]
    Refused(Status),
}

// === impl Interpreter ===

impl Interpreter {
    /// Starts one and waits until it is ready, but not while programs are suspended.
    pub(super) async fn start(
        processes: &Processes,
        spec: &ContextSpec,
        identity: u64,
    ) -> Result<Self, InterpreterError> {
        let runner = spec.runner;
        let program = runner.argv.first().copied().unwrap_or_default();
        processes
            .may_start()
            .await
            .map_err(InterpreterError::Refused)?;
        let (ours, theirs) = StdUnixStream::pair()?;
        // Above the numbers that it and stdio get in the child.
        let theirs = fcntl_dupfd_cloexec(&theirs, 10).map_err(std::io::Error::from)?;
        let (user, cwd) = place_of(spec);
        let process = processes
            .start_with_channel(process_spec(spec)?, theirs)
            .await;
        let mut process = process.map_err(|error| not_started(error, runner))?;
        let Some(Stdio::Pipes { stdout, stderr, .. }) = process.stdio.take() else {
            return Err(std::io::Error::from(Errno::BADF).into());
        };
        ours.set_nonblocking(true)?;
        let (reader, writer) = UnixStream::from_std(ours)?.into_split();
        let mut interpreter = Self {
            runner,
            user,
            cwd,
            process,
            reader: Reader::new(reader),
            writer,
            outgoing: runner.source().into(),
            stdout: Output::new(stdout, Event::Stdout)?,
            stderr: Output::new(stderr, Event::Stderr)?,
            identity,
            exit: None,
        };
        interpreter.come_up(program).await?;
        Ok(interpreter)
    }

    async fn come_up(&mut self, program: &'static str) -> Result<(), InterpreterError> {
        let mut said = Vec::new();
        let mut over = std::pin::pin!(tokio::time::sleep(START_PATIENCE));
        let listen = Listen {
            output: true,
            frames: true,
            limit: SLACK_BYTES,
        };
        let how = loop {
            let heard = tokio::select! {
                heard = self.heard(listen) => heard,
                () = &mut over => break format!("nothing within {} s", START_PATIENCE.as_secs()),
            };
            match heard {
                Heard::Frame(Frame::Ready, _) => return Ok(()),
                // The runner itself says what is missing.
                Heard::Frame(Frame::Error(error), _) => {
                    return Err(InterpreterError::Lacks(error.value));
                }
                Heard::Output(event) => keep(&mut said, &event),
                Heard::Closed => {}
                Heard::Frame(..) => break "it broke its protocol".to_owned(),
                Heard::Broken(error) => break error.to_string(),
                Heard::Exited(status) => {
                    self.drain(&mut |event| keep(&mut said, &event));
                    break match status {
                        ExitStatus::Code(code) => format!("exit code {code}"),
                        ExitStatus::Signal(signal) => format!("signal {signal}"),
                    };
                }
            }
        };
        let said = excerpt(said.trim_ascii());
        Err(InterpreterError::NotUp { program, how, said })
    }

    pub(super) fn pid(&self) -> u32 {
        self.process.control.pid.cast_unsigned()
    }

    /// Gives it something to run; what it did before must have finished.
    pub(super) fn run(&mut self, mut run: Run<'_>, identity: u64) {
        run.reseed = self.identity != identity;
        self.identity = identity;
        self.outgoing = run.encode(self.runner.language);
        // Mostly all of it goes at once, without a turn of the event loop.
        if let Ok(written) = self.writer.try_write(&self.outgoing) {
            self.outgoing.advance(written);
        }
    }

    /// Waits for what it does next. Nothing is lost when this is dropped.
    pub(super) async fn heard(&mut self, listen: Listen) -> Heard {
        loop {
            tokio::select! {
                frame = self.reader.next(listen.limit), if listen.frames => {
                    return match frame {
                        Ok(Some((frame, length))) => Heard::Frame(frame, length),
                        Ok(None) => Heard::Closed,
                        Err(error) => Heard::Broken(error),
                    };
                }
                event = self.stdout.next(), if listen.output => return Heard::Output(event),
                event = self.stderr.next(), if listen.output => return Heard::Output(event),
                written = self.writer.write(&self.outgoing), if !self.outgoing.is_empty() => {
                    match written {
                        Ok(bytes) => self.outgoing.advance(bytes),
                        // It reads no more; that it has closed its end is heard.
                        Err(_) => self.outgoing.clear(),
                    }
                }
                exit = self.process.wait() => {
                    let Exit { status, .. } = exit;
                    self.exit = Some(status);
                    return Heard::Exited(status);
                }
            }
        }
    }

    /// A frame that is there already.
    pub(super) fn try_frame(&mut self, limit: usize) -> Option<(Frame, usize)> {
        self.reader.try_next(limit).ok().flatten()
    }

    /// The output that is there already.
    pub(super) fn drain(&mut self, take: &mut impl FnMut(Event)) {
        self.stdout.drain(take);
        self.stderr.drain(take);
    }

    pub(super) fn interrupt(&self) {
        self.process.control.signal(libc::SIGINT);
    }

    /// Node takes SIGINT for itself while it runs a piece until its first `await`, and
    /// forgets one that comes just then; Bash waits for a program that it was about to
    /// start when it came. Python has it raise an exception, and should do so once.
    pub(super) fn misses_interrupts(&self) -> bool {
        self.runner.language != Language::Python
    }

    /// Kills it with all that it started.
    pub(super) fn kill(&self) {
        self.process.control.kill();
    }

    /// Kills it, also what it left behind where it has ended, and waits for its end.
    pub(super) async fn end(mut self) {
        self.kill();
        if self.exit.is_none() {
            let _ = tokio::time::timeout(KILL_PATIENCE, self.process.wait()).await;
        }
    }
}

// === impl InterpreterError ===

impl From<InterpreterError> for Status {
    fn from(error: InterpreterError) -> Self {
        let message = error.to_string();
        match error {
            InterpreterError::NoProgram { .. } | InterpreterError::Lacks(_) => {
                refused(Code::FailedPrecondition, "INTERPRETER_NOT_FOUND", message)
            }
            InterpreterError::NotUp { .. } => {
                refused(Code::FailedPrecondition, "INTERPRETER_FAILED", message)
            }
            InterpreterError::Channel(_) => {
                refused(Code::ResourceExhausted, "OUT_OF_RESOURCES", message)
            }
            InterpreterError::Refused(status) => status,
        }
    }
}

/// What runs it, as a program that anybody could ask for.
fn process_spec(context: &ContextSpec) -> Result<Spec, InterpreterError> {
    let argv = context.runner.argv.iter();
    let spec = ProcessSpec {
        argv: argv
            .map(|word| Bytes::from_static(word.as_bytes()))
            .collect(),
        env: context.env.clone(),
        cwd: context.cwd.clone(),
        user: context.user.clone(),
        ..ProcessSpec::default()
    };
    Spec::try_from(spec).map_err(|violations| InterpreterError::Refused(violations.into()))
}

/// Whose it is and where it starts, by name. A user who is not there is refused by
/// the start.
fn place_of(context: &ContextSpec) -> (String, Bytes) {
    let Ok(user) = Users::read(Path::new("/etc")).find(&context.user) else {
        return Default::default();
    };
    let cwd = if context.cwd.is_empty() {
        user.home.into()
    } else {
        context.cwd.clone()
    };
    (user.name, cwd)
}

fn not_started(error: StartError, runner: &'static Runner) -> InterpreterError {
    match &error {
        StartError::Spawn { error: cause, .. }
            if cause.stage == Stage::Execute && cause.errno == Errno::NOENT =>
        {
            InterpreterError::NoProgram {
                program: runner.argv.first().copied().unwrap_or_default(),
                install: runner.install,
            }
        }
        _ => InterpreterError::Refused(error.into()),
    }
}

fn keep(said: &mut Vec<u8>, event: &Event) {
    if let Event::Stdout(bytes) | Event::Stderr(bytes) = event {
        let room = LAST_WORDS_BYTES.saturating_sub(said.len());
        said.extend_from_slice(bytes.get(..room).unwrap_or(bytes));
    }
}
