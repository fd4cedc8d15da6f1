//! The task of one program, from its start to the end of what it says.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use soulbox_proto::guest::v1::{Exited, exited};
use tokio::sync::oneshot;

use super::job::{Job, Options};
use super::output::Output;
use super::process::{Process, Stdio};
use super::stdio::{self, Input, Terminal};
use super::table::Table;
use crate::sys::wait::{Exit, ExitStatus};

/// A started program that nobody looks after yet.
pub(super) struct Task {
    job: Arc<Job>,
    process: Process,
    timeout: Option<Duration>,
    output: Output,
}

// === impl Task ===

impl Task {
    /// When it fails, or the task is never run, the program is killed.
    pub(super) fn new(
        mut process: Process,
        id: u64,
        options: Options,
        timeout: Option<Duration>,
    ) -> io::Result<Self> {
        let (stdin, output) = match process.stdio.take() {
            Some(Stdio::Pipes {
                stdin,
                stdout,
                stderr,
            }) => {
                let stdin = stdin.map(Input::pipe).transpose()?;
                let (stdout, stderr) = (stdio::Output::pipe(stdout)?, stdio::Output::pipe(stderr)?);
                (stdin, Output::new(stdout, Some(stderr)))
            }
            Some(Stdio::Terminal(master)) => {
                let terminal = Arc::new(Terminal::new(master)?);
                let output = stdio::Output::Terminal(Arc::clone(&terminal));
                (Some(Input::Terminal(terminal)), Output::new(output, None))
            }
            None => return Err(io::ErrorKind::NotFound.into()),
        };
        let (about, control) = (process.about.clone(), Arc::clone(&process.control));
        Ok(Self {
            job: Arc::new(Job::new(id, about, control, stdin, options)),
            process,
            timeout,
            output,
        })
    }

    pub(super) fn job(&self) -> &Arc<Job> {
        &self.job
    }

    /// Runs to the end of the program and of what it says, and for as long as
    /// something that it left behind speaks on.
    pub(super) async fn run(self, table: Arc<Table>) {
        let Self {
            job,
            mut process,
            timeout,
            mut output,
        } = self;
        {
            let (tell_ended, ended) = oneshot::channel();
            let mut reading = pin!(output.read(&job, ended));
            let mut deadline = pin!(sleep(timeout));
            let (mut is_reading, mut timed_out) = (true, false);
            let exit = loop {
                tokio::select! {
                    exit = process.wait() => break exit,
                    () = &mut reading, if is_reading => is_reading = false,
                    () = &mut deadline, if !timed_out => {
                        timed_out = true;
                        job.kill();
                    }
                }
            };
            job.ended(exited(exit, process.started.elapsed(), timed_out));
            // Its cgroup is for the next.
            drop(process);
            let _ = tell_ended.send(());
            if is_reading {
                reading.await;
            }
        }
        // Before callers hear of the end, who may then ask what runs.
        table.ended(&job);
        job.over();
        let close = async move { job.close_stdin().await };
        tokio::join!(close, output.drain());
    }
}

async fn sleep(timeout: Option<Duration>) {
    match timeout {
        Some(timeout) => tokio::time::sleep(timeout).await,
        None => std::future::pending().await,
    }
}

fn exited(exit: Exit, wall: Duration, timed_out: bool) -> Exited {
    let status = match exit.status {
        ExitStatus::Code(code) => exited::Status::Code(code),
        ExitStatus::Signal(signal) => exited::Status::Signal(signal),
    };
    Exited {
        status: Some(status),
        timed_out,
        wall_us: micros(wall),
        user_cpu_us: micros(exit.user_cpu),
        system_cpu_us: micros(exit.system_cpu),
        max_resident_bytes: exit.max_resident_bytes,
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
