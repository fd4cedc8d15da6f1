//! The gRPC server: what is served, and how a request finds its service.

use std::convert::Infallible;
use std::task::{Context, Poll};

use soulbox_proto::guest::MAX_REQUEST_BYTES;
use soulbox_proto::guest::v1::filesystem_service_server::{
    FilesystemServiceServer, SERVICE_NAME as FILESYSTEM,
};
use soulbox_proto::guest::v1::port_service_server::{PortServiceServer, SERVICE_NAME as PORT};
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
use crate::files::Files;
use crate::ports::Ports;
use crate::system::System;

/// What a call may send before it is read. The window of its connection is the
/// largest that HTTP/2 has: calls that nobody reads must not hold up the others.
const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = (1 << 31) - 1;

/// Every service of the agent. Routes by name itself: a router for three names
/// would bring a web framework into every snapshot.
#[derive(Clone)]
pub(crate) struct Services {
    process: ProcessServiceServer<Processes>,
    system: SystemServiceServer<System>,
    ports: PortServiceServer<Ports>,
    files: FilesystemServiceServer<Files>,
}

// === impl Services ===

impl Services {
    pub(crate) fn new(processes: Processes, system: System, ports: Ports) -> Self {
        let process = ProcessServiceServer::new(processes);
        Self {
            process: process.max_decoding_message_size(MAX_REQUEST_BYTES),
            system: SystemServiceServer::new(system),
            ports: PortServiceServer::new(ports),
            files: FilesystemServiceServer::new(Files::new()),
        }
    }

    /// Serves until `stop`, and then until the calls that run are answered.
    ///
    /// A connection that says nothing is kept for ever and costs no timer: those
    /// that the host opens ahead of need are in a snapshot, and begin when they are
    /// used. They are not silent, though: the server's SETTINGS go out when a
    /// connection is accepted, so they are among what a restored one has to deliver.
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
            Some(PORT) => self.ports.call(request),
            Some(FILESYSTEM) => self.files.call(request),
            _ => Box::pin(async {
                let status =
                    Status::unimplemented("this agent has no such service: use one of its age");
                Ok(status.into_http())
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::UnixStream;
    use tokio::sync::watch;
    use tokio_stream::StreamExt as _;

    use super::*;
    use crate::reaper::Reaper;

    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    // Length, type, flags, stream, and the payload; RFC 9113, section 4.1.
    const SETTINGS: [u8; 9] = [0, 0, 0, 4, 0, 0, 0, 0, 0];
    const PING: [u8; 17] = [0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
    const PING_ACK: [u8; 9] = [0, 0, 8, 6, 1, 0, 0, 0, 0];
    const GO_AWAY: u8 = 7;

    async fn frame(stream: &mut UnixStream) -> [u8; 9] {
        let mut header = [0; 9];
        stream.read_exact(&mut header).await.unwrap();
        let length = u32::from_be_bytes([0, header[0], header[1], header[2]]);
        let mut payload = vec![0; length as usize];
        stream.read_exact(&mut payload).await.unwrap();
        header
    }

    // The clock of a paused runtime jumps to the next timer whenever nothing else
    // is to be done, so that a timer of the server's would have run out.
    #[tokio::test(start_paused = true)]
    async fn a_spare_connection_waits_for_ever() {
        let (stop, stopped) = watch::channel(false);
        let processes = Processes::new(Reaper::default(), None, stopped.clone());
        let system = System::new(processes.clone(), stop, false);
        let (mut spare, accepted) = UnixStream::pair().unwrap();
        let connections =
            tokio_stream::once(Ok::<_, std::io::Error>(accepted)).chain(tokio_stream::pending());
        let services = Services::new(processes, system, Ports::new(stopped));
        tokio::spawn(services.serve(connections, std::future::pending()));

        // Sent before anything is asked: the restored host's end must get it.
        assert_eq!(frame(&mut spare).await[3], SETTINGS[3]);
        tokio::time::sleep(Duration::from_hours(24 * 365)).await;
        for part in [PREFACE, &SETTINGS, &PING] {
            spare.write_all(part).await.unwrap();
        }
        loop {
            match frame(&mut spare).await {
                PING_ACK => break,
                other => assert_ne!(other[3], GO_AWAY),
            }
        }
    }
}
