//! ProcessService: runs programs.
//!
//! `spec` checks what was asked, `program` turns it into what execve(2) takes,
//! `process` starts and kills it, `session` is the call from its start to
//! `exited`, `input` and `output` are the two directions of that call.

mod cgroup;
mod input;
mod output;
mod process;
mod program;
mod session;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use soulbox_proto::guest::v1::process_service_server::ProcessService;
use soulbox_proto::guest::v1::{ExecRequest, ExecResponse, exec_request};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

pub(crate) use self::cgroup::Cgroups;
pub(crate) use self::process::{Process, StartError};
use self::session::Session;
use crate::reaper::Reaper;
use crate::spec::{Spec, Violations};
use crate::status::{internal, refused};

/// How many messages wait for a caller who reads slowly: with chunks of 64 KiB,
/// a quarter of a megabyte for each running program.
const OUTPUT_MESSAGES: usize = 4;

/// Serves ProcessService. Clones share everything.
#[derive(Clone)]
pub(crate) struct Processes {
    reaper: Reaper,
    cgroups: Option<Arc<Cgroups>>,
    running: Arc<AtomicU32>,
    suspended: watch::Sender<bool>,
    /// Told when the guest is to stop.
    stop: watch::Receiver<bool>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum SuspendError {
    #[error("programs have no cgroups here to stop them by: mount cgroup2 on /sys/fs/cgroup")]
    NoCgroups,
    #[error("programs could not be stopped")]
    Freeze(#[source] io::Error),
    #[error(
        "a program did not stop in time, and all go on: one waits for a device, or for a \
         filesystem that another program serves; end it, or try again"
    )]
    TimedOut,
}

/// Counts a program as running while it lives.
struct Running(Arc<AtomicU32>);

// === impl Processes ===

impl Processes {
    /// Without `cgroups`, a kill reaches a program's process group only.
    pub(crate) fn new(
        reaper: Reaper,
        cgroups: Option<Cgroups>,
        stop: watch::Receiver<bool>,
    ) -> Self {
        Self {
            reaper,
            cgroups: cgroups.map(Arc::new),
            running: Arc::default(),
            suspended: watch::Sender::new(false),
            stop,
        }
    }

    /// Stops every program, and starts none, until [`Self::resume`]. When it fails,
    /// they are as they were, but that those of an earlier call go on.
    pub(crate) async fn suspend(&self) -> Result<(), SuspendError> {
        let cgroups = self.cgroups.as_ref().ok_or(SuspendError::NoCgroups)?;
        // First, so that no thread is left waiting for a child that cannot run. A
        // start that is under way meanwhile has its child stopped with the others.
        self.suspended.send_replace(true);
        cgroups.freeze().await.map_err(|error| {
            // Where this fails, too, they wait for the next Configure.
            let _ = self.resume();
            match error.kind() {
                io::ErrorKind::TimedOut => SuspendError::TimedOut,
                _ => SuspendError::Freeze(error),
            }
        })
    }

    /// Lets programs go on. Does nothing where they run.
    pub(crate) fn resume(&self) -> io::Result<()> {
        if let Some(cgroups) = self.cgroups.as_ref().filter(|_| self.is_suspended()) {
            cgroups.thaw()?;
            self.suspended.send_replace(false);
        }
        Ok(())
    }

    pub(crate) fn is_suspended(&self) -> bool {
        *self.suspended.borrow()
    }

    /// Waits until programs may be started.
    pub(crate) async fn may_start(&self) -> Result<(), Status> {
        let (mut suspended, mut stop) = (self.suspended.subscribe(), self.stop.clone());
        let stopping = "the guest is turning off: run it in another";
        tokio::select! {
            biased;
            // `self` has the sender.
            _ = suspended.wait_for(|suspended| !suspended) => Ok(()),
            _ = stop.wait_for(|stop| *stop) => {
                Err(refused(Code::Unavailable, "STOPPING", stopping))
            }
        }
    }

    /// Starts a program for another service of the agent, with `channel` as its
    /// descriptor 3. Not before [`Self::may_start`].
    pub(crate) async fn start(&self, spec: Spec, channel: OwnedFd) -> Result<Process, StartError> {
        let (reaper, cgroups) = (self.reaper.clone(), self.cgroups.clone());
        let start = move || Process::start(spec, Some(channel), reaper, cgroups);
        let started = tokio::task::spawn_blocking(start).await;
        started.unwrap_or_else(|error| Err(StartError::Pipes(error.into())))
    }

    pub(crate) fn running(&self) -> u32 {
        self.running.load(Ordering::Relaxed)
    }
}

#[tonic::async_trait]
impl ProcessService for Processes {
    type ExecStream = ReceiverStream<Result<ExecResponse, Status>>;

    async fn exec(
        &self,
        request: Request<Streaming<ExecRequest>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests
            .message()
            .await?
            .and_then(|request| request.message);
        let Some(exec_request::Message::Start(spec)) = first else {
            return Err(Violations::of("start", "must be the first message of the call").into());
        };
        let spec = Spec::try_from(spec)?;
        let timeout = spec.timeout;
        self.may_start().await?;

        // On a thread of its own: while the program is opened the caller waits,
        // and a filesystem that a stuck program serves may make that long. If the
        // call ends meanwhile, the process is dropped with the result, and dies.
        let (reaper, cgroups) = (self.reaper.clone(), self.cgroups.clone());
        let start = move || Process::start(spec, None, reaper, cgroups);
        let process = tokio::task::spawn_blocking(start)
            .await
            .map_err(|error| internal(format!("the start did not finish: {error}")))??;

        let (responses, stream) = mpsc::channel(OUTPUT_MESSAGES);
        let session = Session::new(process, timeout, responses)?;
        let running = Running::new(&self.running);
        tokio::spawn(async move {
            session.run(requests).await;
            drop(running);
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    type AttachStream = ReceiverStream<Result<ExecResponse, Status>>;

    async fn attach(
        &self,
        _: Request<Streaming<soulbox_proto::guest::v1::AttachRequest>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn list_processes(
        &self,
        _: Request<soulbox_proto::guest::v1::ListProcessesRequest>,
    ) -> Result<Response<soulbox_proto::guest::v1::ListProcessesResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn signal_process(
        &self,
        _: Request<soulbox_proto::guest::v1::SignalProcessRequest>,
    ) -> Result<Response<soulbox_proto::guest::v1::SignalProcessResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

// === impl Running ===

impl Running {
    fn new(count: &Arc<AtomicU32>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn without_cgroups_nothing_can_be_stopped() {
        let (_stop, stopped) = watch::channel(false);
        let processes = Processes::new(Reaper::default(), None, stopped);
        let refused = processes.suspend().await;
        assert!(matches!(refused, Err(SuspendError::NoCgroups)));
        assert!(!processes.is_suspended());
        processes.resume().unwrap();
        processes.may_start().await.unwrap();
    }

    #[tokio::test]
    async fn a_start_that_waits_is_refused_when_the_guest_stops() {
        let (stop, stopped) = watch::channel(false);
        let processes = Processes::new(Reaper::default(), None, stopped);
        processes.suspended.send_replace(true);
        stop.send_replace(true);
        let refused = processes.may_start().await.unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable);
    }
}
