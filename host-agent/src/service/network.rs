//! `soulbox.host.v1.NetworkService`.

use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;

use soulbox_proto::host::v1 as proto;
use soulbox_proto::host::v1::network_service_server::NetworkService;
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};

use super::connect;
use super::convert;
use super::sandboxes::{invalid, parse_id};
use crate::id::SandboxId;
use crate::ingress::{Dial as _, Forwards};
use crate::record::State;
use crate::sandbox::{ChangeKind, CreateError, Pool, Ports};
use crate::status::status;

#[derive(Clone)]
pub struct NetworkApi {
    pool: Arc<Pool>,
    ports: Ports,
    forwards: Arc<Forwards>,
    calls: TaskTracker,
    /// Ends the streams that would never end by themselves.
    stopping: CancellationToken,
}

// === impl NetworkApi ===

impl NetworkApi {
    pub fn new(
        pool: Arc<Pool>,
        forwards: Arc<Forwards>,
        calls: TaskTracker,
        stopping: CancellationToken,
    ) -> Self {
        Self {
            ports: Ports::new(Arc::clone(&pool)),
            pool,
            forwards,
            calls,
            stopping,
        }
    }

    /// Removes the forwards of sandboxes that do not run any more.
    pub async fn keep_forwards(pool: Arc<Pool>, forwards: Arc<Forwards>) {
        use tokio::sync::broadcast::error::RecvError;
        let mut changes = pool.subscribe().changes;
        loop {
            match changes.recv().await {
                Ok(change) => {
                    let runs = change.record.state == State::Running;
                    if change.kind == ChangeKind::Deleted || !runs {
                        forwards.remove_sandbox(&change.record.id).await;
                    }
                }
                // Whichever was missed: those that do not run have none.
                Err(RecvError::Lagged(_)) => {
                    for forward in forwards.list(None) {
                        if !is_running(&pool, &forward.sandbox) {
                            forwards.remove_sandbox(&forward.sandbox).await;
                        }
                    }
                }
                Err(RecvError::Closed) => return,
            }
        }
    }
}

fn is_running(pool: &Pool, id: &SandboxId) -> bool {
    pool.view(id)
        .is_ok_and(|view| view.borrow().record.state == State::Running)
}

fn port(port: u32) -> Result<u16, Status> {
    u16::try_from(port)
        .ok()
        .filter(|port| *port > 0)
        .ok_or_else(|| invalid("port", format!("is {port}; give 1 to 65535")))
}

#[tonic::async_trait]
impl NetworkService for NetworkApi {
    type ConnectStream = Pin<Box<dyn Stream<Item = Result<proto::ConnectResponse, Status>> + Send>>;

    async fn get_network(
        &self,
        request: Request<proto::GetNetworkRequest>,
    ) -> Result<Response<proto::GetNetworkResponse>, Status> {
        let id = parse_id(&request.get_ref().sandbox_id)?;
        let view = self.pool.view(&id).map_err(|error| status(&error))?;
        let record = view.borrow().record.clone();
        let lease = record.slot.filter(|_| record.state == State::Running);
        let usage = match lease {
            Some(lease) => {
                let counters = self.pool.network_counters(lease).await;
                let counters = counters.map_err(|error| status(&error))?;
                Some((&counters).into())
            }
            None => None,
        };
        Ok(Response::new(proto::GetNetworkResponse {
            policy: record.network.as_deref().map(convert::policy_to_proto),
            addresses: convert::addresses(&record),
            usage,
        }))
    }

    async fn set_network(
        &self,
        request: Request<proto::SetNetworkRequest>,
    ) -> Result<Response<proto::SetNetworkResponse>, Status> {
        let _call = self.calls.token();
        let request = request.into_inner();
        let id = parse_id(&request.sandbox_id)?;
        let policy = request.policy.unwrap_or_default();
        let policy = convert::policy_from_proto(&policy, "policy")
            .map_err(|violations| status(&CreateError::Invalid(violations)))?;
        let set = self.pool.set_network(&id, policy).await;
        let set = set.map_err(|error| status(&error))?;
        Ok(Response::new(proto::SetNetworkResponse {
            policy: Some(convert::policy_to_proto(&set)),
        }))
    }

    async fn forward_port(
        &self,
        request: Request<proto::ForwardPortRequest>,
    ) -> Result<Response<proto::ForwardPortResponse>, Status> {
        let request = request.into_inner();
        let id = parse_id(&request.sandbox_id)?;
        let port = port(request.port)?;
        let host_port = u16::try_from(request.host_port)
            .map_err(|_| invalid("host_port", "is no port; give 0 to 65535".to_owned()))?;
        let bind_address = match request.bind_address.as_str() {
            "" => None,
            text => Some(text.parse::<IpAddr>().map_err(|_| {
                invalid(
                    "bind_address",
                    "is no IP address; give one of this host".to_owned(),
                )
            })?),
        };
        let view = self.pool.view(&id).map_err(|error| status(&error))?;
        let not_running = || {
            let state = view.borrow().record.state;
            let id = id.clone();
            status(&crate::sandbox::UseError::NotRunning { id, state })
        };
        if !is_running(&self.pool, &id) {
            return Err(not_running());
        }
        let forward = self.forwards.add(&id, port, bind_address, host_port).await;
        let forward = forward.map_err(|error| status(&error))?;
        // It may have ended meanwhile, when there was nothing to remove yet.
        if !is_running(&self.pool, &id) {
            self.forwards.remove_sandbox(&id).await;
            return Err(not_running());
        }
        Ok(Response::new(proto::ForwardPortResponse {
            forward: Some((&forward).into()),
        }))
    }

    async fn list_forwards(
        &self,
        request: Request<proto::ListForwardsRequest>,
    ) -> Result<Response<proto::ListForwardsResponse>, Status> {
        let of = match request.get_ref().sandbox_id.as_str() {
            "" => None,
            id => Some(parse_id(id)?),
        };
        let forwards = self.forwards.list(of.as_ref());
        Ok(Response::new(proto::ListForwardsResponse {
            forwards: forwards.iter().map(Into::into).collect(),
        }))
    }

    async fn remove_forward(
        &self,
        request: Request<proto::RemoveForwardRequest>,
    ) -> Result<Response<proto::RemoveForwardResponse>, Status> {
        let address: SocketAddr = request.get_ref().host_address.parse().map_err(|_| {
            let mend = "is no address with a port; give one that ListForwards shows";
            invalid("host_address", mend.to_owned())
        })?;
        match self.forwards.remove(address).await {
            Ok(_) | Err(crate::ingress::ForwardError::NotFound(_)) => {}
            Err(error) => return Err(status(&error)),
        }
        Ok(Response::new(proto::RemoveForwardResponse {}))
    }

    async fn connect(
        &self,
        request: Request<Streaming<proto::ConnectRequest>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let call = self.calls.token();
        let mut requests = request.into_inner();
        let open = connect::opening(&mut requests).await?;
        let id = parse_id(&open.sandbox_id)?;
        let port = port(open.port)?;
        let dialled = self.ports.dial(&id, port).await;
        let stream = dialled.map_err(|error| status(&error))?;
        let responses = connect::carry(requests, stream, self.stopping.clone(), call);
        Ok(Response::new(Box::pin(responses)))
    }
}
