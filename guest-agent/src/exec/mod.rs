//! ProcessService: runs programs.
//!
//! `spec` checks what was asked, `program` turns it into what execve(2) takes,
//! `process` starts and kills it, `task` follows it to its end. What it says goes
//! through `output` to the `log` of its `job`, from where each `call` reads; `input`
//! is the other direction. The `table` knows every job.

mod call;
mod cgroup;
mod input;
mod job;
mod log;
mod output;
mod process;
mod program;
mod stdio;
mod table;
mod task;

use std::io;
use std::sync::Arc;

use soulbox_proto::guest::v1::process_service_server::ProcessService;
use soulbox_proto::guest::v1::{
    AttachProcess, AttachRequest, ExecRequest, ListProcessesRequest, ListProcessesResponse,
    SignalProcessRequest, SignalProcessResponse, attach_request, exec_request,
};
use tokio::sync::watch;
use tonic::{Code, Request, Response, Status, Streaming};

use self::call::Call;
pub(crate) use self::cgroup::{Cgroups, Limits};
use self::job::{Job, Options};
use self::process::Process;
pub(crate) use self::process::StartError;
use self::table::Table;
use self::task::Task;
use crate::reaper::Reaper;
use crate::signals::parse_signal;
use crate::spec::{Spec, Violations};
use crate::status::{internal, refused};

/// Serves ProcessService. Clones share everything.
#[derive(Clone)]
pub(crate) struct Processes {
    reaper: Reaper,
    cgroups: Option<Arc<Cgroups>>,
    table: Arc<Table>,
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
            table: Arc::default(),
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
    async fn may_start(&self) -> Result<(), Status> {
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

    pub(crate) fn running(&self) -> u32 {
        self.table.running()
    }

    /// Starts a program, and has a task follow it.
    async fn start(&self, spec: Spec) -> Result<Arc<Job>, Status> {
        self.may_start().await?;
        let timeout = spec.timeout;
        let options = Options {
            has_stdin: spec.stdin || spec.terminal.is_some(),
            kill_on_disconnect: spec.kill_on_disconnect,
            tag: spec.tag.clone(),
            keep_output_bytes: spec.keep_output_bytes,
        };
        let (reaper, cgroups) = (self.reaper.clone(), self.cgroups.clone());
        let start = move || Process::start(&spec, reaper, cgroups);
        let process = tokio::task::spawn_blocking(start)
            .await
            .map_err(|error| internal(format!("the start did not finish: {error}")))??;
        let failed = |error| internal(format!("the program cannot be followed: {error}"));
        let id = self.table.fresh_id().map_err(failed)?;
        let task = Task::new(process, id, options, timeout).map_err(failed)?;
        let job = Arc::clone(task.job());
        self.table.insert(Arc::clone(&job));
        tokio::spawn(task.run(Arc::clone(&self.table)));
        Ok(job)
    }

    fn find(&self, id: u64) -> Result<Arc<Job>, Status> {
        self.table.find(id).ok_or_else(|| {
            let message = format!(
                "there is no program {id}, or it ended some time ago: ListProcesses tells \
                 those that are known"
            );
            refused(Code::NotFound, "PROCESS_NOT_FOUND", message)
        })
    }
}

#[tonic::async_trait]
impl ProcessService for Processes {
    type ExecStream = Call;

    async fn exec(
        &self,
        request: Request<Streaming<ExecRequest>>,
    ) -> Result<Response<Call>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?;
        let Some(exec_request::Message::Start(spec)) = first.and_then(|request| request.message)
        else {
            return Err(Violations::of("start", "must be the first message of the call").into());
        };
        let job = self.start(Spec::try_from(spec)?).await?;
        Ok(Response::new(Call::of_exec(&job, requests)))
    }

    type AttachStream = Call;

    async fn attach(
        &self,
        request: Request<Streaming<AttachRequest>>,
    ) -> Result<Response<Call>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?;
        let Some(attach_request::Message::Attach(attach)) =
            first.and_then(|request| request.message)
        else {
            return Err(Violations::of("attach", "must be the first message of the call").into());
        };
        let AttachProcess {
            id,
            skip_kept_output,
        } = attach;
        let job = self.find(id)?;
        let call = Call::of_attach(&job, requests, skip_kept_output);
        Ok(Response::new(call))
    }

    async fn list_processes(
        &self,
        _: Request<ListProcessesRequest>,
    ) -> Result<Response<ListProcessesResponse>, Status> {
        let processes = self.table.list();
        Ok(Response::new(ListProcessesResponse { processes }))
    }

    async fn signal_process(
        &self,
        request: Request<SignalProcessRequest>,
    ) -> Result<Response<SignalProcessResponse>, Status> {
        let SignalProcessRequest {
            id,
            signal,
            whole_tree,
        } = request.into_inner();
        let signal = parse_signal(&signal).ok_or_else(|| {
            Violations::of("signal", "must be a signal such as TERM, SIGTERM or 15")
        })?;
        let job = self.find(id)?;
        let sent = match (signal, whole_tree) {
            (libc::SIGKILL, _) => job.kill(),
            (signal, true) => job.signal_tree(signal),
            (signal, false) => job.signal(signal),
        };
        Ok(Response::new(SignalProcessResponse { sent }))
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
