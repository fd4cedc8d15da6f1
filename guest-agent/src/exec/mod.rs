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

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use soulbox_proto::guest::v1::process_service_server::ProcessService;
use soulbox_proto::guest::v1::{ExecRequest, ExecResponse, exec_request};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

pub(crate) use self::cgroup::Cgroups;
use self::process::Process;
pub(crate) use self::process::StartError;
use self::session::Session;
use crate::reaper::Reaper;
use crate::spec::{Spec, Violations};
use crate::status::internal;

/// How many messages wait for a caller who reads slowly: with chunks of 64 KiB,
/// a quarter of a megabyte for each running program.
const OUTPUT_MESSAGES: usize = 4;

/// Serves ProcessService. Clones share everything.
#[derive(Clone)]
pub(crate) struct Processes {
    reaper: Reaper,
    cgroups: Option<Arc<Cgroups>>,
    running: Arc<AtomicU32>,
}

/// Counts a program as running while it lives.
struct Running(Arc<AtomicU32>);

// === impl Processes ===

impl Processes {
    /// Without `cgroups`, a kill reaches a program's process group only.
    pub(crate) fn new(reaper: Reaper, cgroups: Option<Cgroups>) -> Self {
        Self {
            reaper,
            cgroups: cgroups.map(Arc::new),
            running: Arc::default(),
        }
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

        // On a thread of its own: while the program is opened the caller waits,
        // and a filesystem that a stuck program serves may make that long. If the
        // call ends meanwhile, the process is dropped with the result, and dies.
        let (reaper, cgroups) = (self.reaper.clone(), self.cgroups.clone());
        let start = move || Process::start(spec, reaper, cgroups);
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
