//! The HTTP proxy: `<port>-<sandbox>.<domain>` is a port of a guest.
//!
//! HTTP/1.1 on both sides, bodies as streams, and whatever a connection is upgraded
//! to. Each request has a connection of its own into the guest. TLS, HTTP/2 and
//! authentication are for what stands in front.

mod answer;
mod exchange;
mod headers;
mod host;

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::exchange::Client;
pub(super) use self::host::is_domain;
pub use self::host::{HostError, Target};
use super::{Dial, config};
use crate::sync::lock;

/// Of a request's or an answer's head, and of what is read ahead of a body.
const MAX_HEAD_BYTES: usize = 64 * 1024;
const MAX_HEADERS: usize = 128;
/// How long to wait when the process is out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

pub struct Proxy {
    shared: Arc<Shared>,
    header_timeout: Duration,
    connections: Arc<Semaphore>,
}

/// What every connection needs.
struct Shared {
    dial: Arc<dyn Dial>,
    domain: String,
    connect_timeout: Duration,
}

// === impl Proxy ===

impl Proxy {
    pub fn new(dial: Arc<dyn Dial>, config: &config::Proxy) -> Self {
        Self {
            shared: Arc::new(Shared {
                dial,
                domain: config.domain.clone(),
                connect_timeout: config.connect_timeout(),
            }),
            header_timeout: config.header_timeout(),
            connections: Arc::new(Semaphore::new(config.max_connections)),
        }
    }

    /// Serves until `stop`, then until the requests that run are answered; tunnels
    /// end at once. Dropping the future cuts everything off.
    pub async fn serve(self, listener: TcpListener, stop: CancellationToken) {
        let mut running = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = self.accept(&listener) => accepted,
                Some(_) = running.join_next() => continue,
                () = stop.cancelled() => break,
            };
            match accepted {
                Ok((stream, client, permit)) => {
                    running.spawn(self.connection(stream, client, permit, stop.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "the proxy cannot accept connections");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        drop(listener);
        while running.join_next().await.is_some() {}
    }

    /// Connections over the limit wait in the kernel.
    async fn accept(
        &self,
        listener: &TcpListener,
    ) -> io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
        let permit = Arc::clone(&self.connections).acquire_owned().await;
        let permit = permit.map_err(io::Error::other)?;
        let (stream, client) = listener.accept().await?;
        Ok((stream, client, permit))
    }

    fn connection(
        &self,
        stream: TcpStream,
        address: SocketAddr,
        permit: OwnedSemaphorePermit,
        stop: CancellationToken,
    ) -> impl Future<Output = ()> + Send + 'static {
        let client = Arc::new(Client {
            shared: Arc::clone(&self.shared),
            address: address.ip(),
            tunnel: Mutex::default(),
        });
        let header_timeout = self.header_timeout;
        async move {
            // Answers come in chunks as the guest makes them.
            let _ = stream.set_nodelay(true);
            let service = service_fn(|request| {
                let client = Arc::clone(&client);
                async move { Ok::<_, Infallible>(client.answer(request).await) }
            });
            let mut connection = pin!(
                http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(header_timeout)
                    .max_headers(MAX_HEADERS)
                    .max_buf_size(MAX_HEAD_BYTES)
                    .serve_connection(TokioIo::new(stream), service)
                    .with_upgrades()
            );
            let served = tokio::select! {
                served = &mut connection => served,
                () = stop.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            // A connection that broke, or whose request was none, was answered
            // as far as it could be.
            let tunnel = lock(&client.tunnel).take();
            if let (Ok(()), Some(tunnel)) = (served, tunnel) {
                tokio::select! {
                    () = tunnel.run() => {}
                    () = stop.cancelled() => {}
                }
            }
            drop(permit);
        }
    }
}
