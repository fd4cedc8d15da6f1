//! SystemService: the guest as a whole.

mod health;
mod identity;
mod shutdown;

use soulbox_proto::guest::v1::system_service_server::SystemService;
use soulbox_proto::guest::v1::{
    ConfigureRequest, ConfigureResponse, HealthRequest, HealthResponse, ShutdownRequest,
    ShutdownResponse,
};
use tokio::sync::watch;
use tonic::{Code, Request, Response, Status};

pub(crate) use self::health::boot_time_us;
use self::identity::Identity;
pub(crate) use self::shutdown::{power_off, stop_programs};
use crate::exec::Processes;
use crate::status::refused;

/// Serves SystemService. Clones share everything.
#[derive(Clone)]
pub(crate) struct System {
    processes: Processes,
    /// Told when the guest is to stop.
    stop: watch::Sender<bool>,
    /// Only PID 1 of a guest names it and turns it off; elsewhere that would be
    /// the machine of whoever runs the tests.
    is_init: bool,
}

// === impl System ===

impl System {
    pub(crate) fn new(processes: Processes, stop: watch::Sender<bool>, is_init: bool) -> Self {
        Self {
            processes,
            stop,
            is_init,
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

#[tonic::async_trait]
impl SystemService for System {
    async fn configure(
        &self,
        request: Request<ConfigureRequest>,
    ) -> Result<Response<ConfigureResponse>, Status> {
        let identity = Identity::try_from(request.into_inner())?;
        self.must_be_init()?;
        identity.assume().map_err(|error| {
            let message = format!("{error}: {}", error.source);
            refused(Code::Internal, "NOT_CONFIGURED", message)
        })?;
        Ok(Response::new(ConfigureResponse {}))
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
