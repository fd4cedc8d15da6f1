//! SystemService: the guest as a whole.

mod health;
mod identity;
mod network;
mod overlay;
mod shutdown;

use std::error::Error;
use std::sync::Arc;

use soulbox_proto::guest::v1::system_service_server::SystemService;
use soulbox_proto::guest::v1::{
    ConfigureRequest, ConfigureResponse, HealthRequest, HealthResponse, ShutdownRequest,
    ShutdownResponse, SuspendRequest, SuspendResponse,
};
use tokio::sync::{Mutex, watch};
use tonic::{Code, Request, Response, Status};

pub(crate) use self::health::boot_time_us;
pub(crate) use self::identity::FILES;
use self::identity::{AssumeError, Identity};
use self::network::Nic;
pub(crate) use self::network::loopback_up;
pub(crate) use self::overlay::lay_over;
pub(crate) use self::shutdown::{power_off, stop_programs};
use crate::code::Contexts;
use crate::exec::{Processes, SuspendError};
use crate::status::refused;

/// Serves SystemService. Clones share everything.
#[derive(Clone)]
pub(crate) struct System {
    processes: Processes,
    code: Contexts,
    /// Told when the guest is to stop.
    stop: watch::Sender<bool>,
    /// Only PID 1 of a guest names it, stops it and turns it off; elsewhere that
    /// would be the machine of whoever runs the tests.
    is_init: bool,
    /// Suspend and Configure hold it while they work: what one of them leaves must
    /// not depend on when the other came.
    configured: Arc<Mutex<Configured>>,
}

#[derive(Debug, Default)]
struct Configured {
    /// Whether Configure has been done.
    once: bool,
    /// Known from the first Configure on, before which no program is meant to run.
    nic: Option<Nic>,
}

// === impl System ===

impl System {
    pub(crate) fn new(
        processes: Processes,
        code: Contexts,
        stop: watch::Sender<bool>,
        is_init: bool,
    ) -> Self {
        Self {
            processes,
            code,
            stop,
            is_init,
            configured: Arc::default(),
        }
    }

    fn must_be_init(&self) -> Result<(), Status> {
        if self.is_init {
            return Ok(());
        }
        let message = "this agent is not PID 1: ask one that runs as the init of a guest";
        Err(refused(Code::FailedPrecondition, "NOT_INIT", message))
    }
}

// === impl Configured ===

impl Configured {
    fn assume(&mut self, identity: &Identity) -> Result<(), AssumeError> {
        let nic = match self.nic {
            Some(nic) => nic,
            None => *self.nic.insert(Nic::find()?),
        };
        identity.assume(!self.once, nic)?;
        self.once = true;
        Ok(())
    }
}

#[tonic::async_trait]
impl SystemService for System {
    async fn configure(
        &self,
        request: Request<ConfigureRequest>,
    ) -> Result<Response<ConfigureResponse>, Status> {
        let identity = Identity::try_from(request.into_inner())?;
        self.must_be_init()?;
        let mut configured = self.configured.lock().await;
        let failed = |message| refused(Code::Internal, "NOT_CONFIGURED", message);
        let assumed = configured.assume(&identity);
        assumed.map_err(|error| failed(told(&error)))?;
        if identity.is_new() {
            self.code.reseed();
        }
        // Not before everything else has been done.
        let resumed = self.processes.resume();
        resumed.map_err(|error| failed(format!("programs could not be let go on: {error}")))?;
        Ok(Response::new(ConfigureResponse {}))
    }

    async fn suspend(
        &self,
        _: Request<SuspendRequest>,
    ) -> Result<Response<SuspendResponse>, Status> {
        self.must_be_init()?;
        let _turn = self.configured.lock().await;
        self.processes.suspend().await.map_err(|error| {
            let code = match error {
                SuspendError::NoCgroups | SuspendError::TimedOut => Code::FailedPrecondition,
                SuspendError::Freeze(_) => Code::Internal,
            };
            refused(code, "NOT_SUSPENDED", told(&error))
        })?;
        Ok(Response::new(SuspendResponse {}))
    }

    async fn health(&self, _: Request<HealthRequest>) -> Result<Response<HealthResponse>, Status> {
        Ok(Response::new(health::measure(self.processes.running())))
    }

    /// Only rings: `main` stops serving, which sends this reply, and then does
    /// the rest in order.
    async fn shutdown(
        &self,
        _: Request<ShutdownRequest>,
    ) -> Result<Response<ShutdownResponse>, Status> {
        self.must_be_init()?;
        self.stop.send_replace(true);
        Ok(Response::new(ShutdownResponse {}))
    }
}

/// An error with its cause, for a message.
fn told(error: &dyn Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
