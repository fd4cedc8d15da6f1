//! The gRPC server: what is served, and how a request finds its service.

use std::convert::Infallible;
use std::task::{Context, Poll};

use soulbox_proto::guest::MAX_REQUEST_BYTES;
use soulbox_proto::guest::v1::process_service_server::{
    ProcessServiceServer, SERVICE_NAME as PROCESS,
};
use soulbox_proto::guest::v1::system_service_server::{
    SERVICE_NAME as SYSTEM, SystemServiceServer,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_stream::Stream;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service};
use tonic::transport::server::{Connected, Server};

use crate::exec::Processes;
use crate::system::System;

/// What a call may send before it is read. The window of its connection is the
/// largest that HTTP/2 has: calls that nobody reads must not hold up the others.
const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = (1 << 31) - 1;

/// Every service of the agent. Routes by name itself: a router for two names
/// would bring a web framework into every snapshot.
#[derive(Clone)]
pub(crate) struct Services {
    process: ProcessServiceServer<Processes>,
    system: SystemServiceServer<System>,
}

// === impl Services ===

impl Services {
    pub(crate) fn new(processes: Processes, system: System) -> Self {
        let process = ProcessServiceServer::new(processes);
        Self {
            process: process.max_decoding_message_size(MAX_REQUEST_BYTES),
            system: SystemServiceServer::new(system),
        }
    }

    /// Serves until `stop`, and then until the calls that run are answered.
    pub(crate) async fn serve<C>(
        self,
        connections: impl Stream<Item = std::io::Result<C>>,
        stop: impl Future<Output = ()>,
    ) -> Result<(), tonic::transport::Error>
    where
        C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
    {
        Server::builder()
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .serve_with_incoming_shutdown(self, connections, stop)
            .await
    }
}

impl Service<http::Request<Body>> for Services {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        // "/package.Service/Method"
        match request.uri().path().split('/').nth(1) {
            Some(PROCESS) => self.process.call(request),
            Some(SYSTEM) => self.system.call(request),
            _ => Box::pin(async {
                let status =
                    Status::unimplemented("this agent has no such service: use one of its age");
                Ok(status.into_http())
            }),
        }
    }
}
