//! The gRPC server and its end.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use soulbox_proto::FILE_DESCRIPTOR_SET;
use soulbox_proto::guest::MAX_REQUEST_BYTES;
use soulbox_proto::guest::v1::code_service_server::{
    CodeServiceServer, SERVICE_NAME as CODE_SERVICE,
};
use soulbox_proto::guest::v1::filesystem_service_server::{
    FilesystemServiceServer, SERVICE_NAME as FILESYSTEM_SERVICE,
};
use soulbox_proto::guest::v1::metrics_service_server::{
    MetricsServiceServer, SERVICE_NAME as METRICS_SERVICE,
};
use soulbox_proto::guest::v1::process_service_server::{
    ProcessServiceServer, SERVICE_NAME as PROCESS_SERVICE,
};
use soulbox_proto::host::v1::network_service_server::{
    NetworkServiceServer, SERVICE_NAME as NETWORK_SERVICE,
};
use soulbox_proto::host::v1::node_service_server::{
    NodeServiceServer, SERVICE_NAME as NODE_SERVICE,
};
use soulbox_proto::host::v1::sandbox_service_server::{
    SERVICE_NAME as SANDBOX_SERVICE, SandboxServiceServer,
};
use tokio::task::JoinSet;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::listen::{Listeners, SocketFile};
use crate::ingress::{Forwards, Proxy};
use crate::sandbox::{Pool, Ports};
use crate::service::{NetworkApi, NodeApi, Relay, SandboxApi};

/// Dead callers are noticed, so that what they run is ended.
const KEEPALIVE: Duration = Duration::from_secs(20);
/// What a call may send before it is read. The window of its connection is the
/// largest that HTTP/2 has: calls that nobody reads must not hold up the others.
const STREAM_WINDOW_BYTES: u32 = 1024 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = (1 << 31) - 1;
/// Chunks of files and of programs' input are one frame each.
const FRAME_BYTES: u32 = 256 * 1024;
/// How long a closed server may take to send its last frames.
const LAST_FRAMES: Duration = Duration::from_millis(500);

/// The servers, while they run.
pub(super) struct Services {
    servers: JoinSet<Result<(), tonic::transport::Error>>,
    /// The proxy, and what keeps forwards.
    edge: JoinSet<()>,
    health: HealthReporter,
    calls: TaskTracker,
    /// Ends calls without an end of their own.
    stopping: CancellationToken,
    /// Ends all calls into guests.
    ending: CancellationToken,
    /// Ends the servers.
    closing: CancellationToken,
    _unix_socket: SocketFile,
}

// === impl Services ===

impl Services {
    pub(super) async fn start(pool: &Arc<Pool>, listeners: Listeners) -> anyhow::Result<Self> {
        let calls = TaskTracker::new();
        let stopping = CancellationToken::new();
        let ending = CancellationToken::new();
        let closing = CancellationToken::new();
        let relay = Relay::new(
            Arc::clone(pool),
            calls.clone(),
            stopping.clone(),
            ending.clone(),
        );
        let sandboxes = SandboxServiceServer::new(SandboxApi::new(
            Arc::clone(pool),
            calls.clone(),
            stopping.clone(),
        ))
        .max_decoding_message_size(MAX_REQUEST_BYTES);
        let node = NodeServiceServer::new(NodeApi::new(Arc::clone(pool)));
        let ports = Arc::new(Ports::new(Arc::clone(pool)));
        let forwards = Forwards::new(ports.clone(), &pool.config().forwards);
        let forwards = Arc::new(forwards);
        let network = NetworkServiceServer::new(NetworkApi::new(
            Arc::clone(pool),
            Arc::clone(&forwards),
            calls.clone(),
            stopping.clone(),
        ));
        let (health, health_server) = tonic_health::server::health_reporter();
        health
            .set_serving::<SandboxServiceServer<SandboxApi>>()
            .await;
        health.set_serving::<NodeServiceServer<NodeApi>>().await;
        health
            .set_serving::<NetworkServiceServer<NetworkApi>>()
            .await;

        let mut routes = Routes::builder();
        routes
            .add_service(sandboxes)
            .add_service(node)
            .add_service(network)
            .add_service(relay.service::<ProcessServiceServer<()>>())
            .add_service(relay.service::<FilesystemServiceServer<()>>())
            .add_service(relay.service::<CodeServiceServer<()>>())
            .add_service(relay.service::<MetricsServiceServer<()>>())
            .add_service(health_server)
            .add_service(reflection().build_v1().context("reflection")?)
            .add_service(reflection().build_v1alpha().context("reflection")?);
        let routes = routes.routes();

        let mut servers = JoinSet::new();
        let unix = UnixListenerStream::new(listeners.unix);
        servers.spawn(
            server()
                .add_routes(routes.clone())
                .serve_with_incoming_shutdown(unix, closing.clone().cancelled_owned()),
        );
        if let Some(tcp) = listeners.tcp {
            servers.spawn(server().add_routes(routes).serve_with_incoming_shutdown(
                TcpListenerStream::new(tcp),
                closing.clone().cancelled_owned(),
            ));
        }
        let mut edge = JoinSet::new();
        edge.spawn(NetworkApi::keep_forwards(Arc::clone(pool), forwards));
        if let Some(listener) = listeners.proxy {
            let proxy = Proxy::new(ports, &pool.config().proxy);
            edge.spawn(proxy.serve(listener, stopping.clone()));
        }
        Ok(Self {
            servers,
            edge,
            health,
            calls,
            stopping,
            ending,
            closing,
            _unix_socket: listeners.unix_socket,
        })
    }

    /// Waits for the calls that are running. Meanwhile callers are still
    /// answered, so that they learn that this node is going.
    pub(super) async fn drain(&self, limit: Duration) {
        // The empty name stands for the whole server.
        for service in [SANDBOX_SERVICE, NODE_SERVICE, NETWORK_SERVICE, ""] {
            self.health
                .set_service_status(service, ServingStatus::NotServing)
                .await;
        }
        self.stopping.cancel();
        self.calls.close();
        if tokio::time::timeout(limit, self.calls.wait())
            .await
            .is_err()
        {
            tracing::warn!(
                calls = self.calls.len(),
                "the drain's time is over; calls are cut off"
            );
            self.ending.cancel();
            // What goes with its call goes while there is somebody to delete it.
            let _ = tokio::time::timeout(LAST_FRAMES, self.calls.wait()).await;
        }
    }

    /// Ends the servers and removes the socket.
    pub(super) async fn close(mut self) {
        self.edge.shutdown().await;
        self.ending.cancel();
        self.closing.cancel();
        let ended = async {
            while let Some(server) = self.servers.join_next().await {
                if let Ok(Err(error)) = server {
                    tracing::warn!(%error, "a server ended with an error");
                }
            }
        };
        if tokio::time::timeout(LAST_FRAMES, ended).await.is_err() {
            self.servers.shutdown().await;
        }
    }
}

fn server() -> Server {
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
}

/// Lists what is served: a guest has services that are for this daemon alone.
fn reflection() -> tonic_reflection::server::Builder<'static> {
    let builder = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET);
    [
        SANDBOX_SERVICE,
        NODE_SERVICE,
        NETWORK_SERVICE,
        PROCESS_SERVICE,
        FILESYSTEM_SERVICE,
        CODE_SERVICE,
        METRICS_SERVICE,
        "grpc.health.v1.Health",
    ]
    .into_iter()
    .fold(
        builder,
        tonic_reflection::server::Builder::with_service_name,
    )
}
