//! Ports of the host that lead to ports of guests.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::{Dial, config, dial_within};
use crate::accept::accept;
use crate::id::SandboxId;
use crate::sync::lock;

/// Every forward of this host.
///
/// Nothing here knows when a sandbox goes: whoever ends one calls
/// [`Self::remove_sandbox`], after which it must not [`Self::add`] for it.
pub struct Forwards {
    dial: Arc<dyn Dial>,
    bind_address: IpAddr,
    max_connections: usize,
    connect_timeout: Duration,
    forwards: Mutex<BTreeMap<SocketAddr, Listening>>,
}

/// A port of the host that leads to a port of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forward {
    /// Where it listens.
    pub address: SocketAddr,
    pub sandbox: SandboxId,
    /// Inside the sandbox.
    pub port: u16,
}

#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    #[error("a port is missing: give the sandbox's port, 1 to 65535")]
    NoPort,
    #[error("{0} is taken: choose another port, or 0 for any that is free")]
    InUse(SocketAddr),
    #[error("{0} may not be listened on by this daemon: choose a port from 1024 on")]
    Forbidden(SocketAddr),
    #[error("{0} is no address of this host: leave the address out, or choose one of the host's")]
    NoSuchAddress(SocketAddr),
    #[error("{address} cannot be listened on: try again, or choose another port")]
    Listen {
        address: SocketAddr,
        source: io::Error,
    },
    #[error("nothing is forwarded from {0}: list the forwards to see what is")]
    NotFound(SocketAddr),
}

/// A forward and the task that serves it, which owns all its connections.
struct Listening {
    forward: Forward,
    task: JoinHandle<()>,
}

// === impl Forwards ===

impl Forwards {
    pub fn new(dial: Arc<dyn Dial>, config: &config::Forwards) -> Self {
        Self {
            dial,
            bind_address: config.bind_address,
            max_connections: config.max_connections,
            connect_timeout: config.connect_timeout(),
            forwards: Mutex::default(),
        }
    }

    /// Leads `host_port` (0: one that is free) of `bind_address`, or of the
    /// configured address, to the sandbox's `port`. Nothing need listen there yet.
    pub async fn add(
        &self,
        sandbox: &SandboxId,
        port: u16,
        bind_address: Option<IpAddr>,
        host_port: u16,
    ) -> Result<Forward, ForwardError> {
        if port == 0 {
            return Err(ForwardError::NoPort);
        }
        let asked = SocketAddr::new(bind_address.unwrap_or(self.bind_address), host_port);
        let listen = async {
            let listener = TcpListener::bind(asked).await?;
            let address = listener.local_addr()?;
            io::Result::Ok((listener, address))
        };
        let (listener, address) = listen.await.map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => ForwardError::InUse(asked),
            io::ErrorKind::PermissionDenied => ForwardError::Forbidden(asked),
            io::ErrorKind::AddrNotAvailable => ForwardError::NoSuchAddress(asked),
            _ => ForwardError::Listen {
                address: asked,
                source,
            },
        })?;
        let forward = Forward {
            address,
            sandbox: sandbox.clone(),
            port,
        };
        let route = Route {
            dial: Arc::clone(&self.dial),
            forward: forward.clone(),
            connect_timeout: self.connect_timeout,
        };
        let listening = Listening {
            forward: forward.clone(),
            task: tokio::spawn(route.serve(listener, self.max_connections)),
        };
        lock(&self.forwards).insert(address, listening);
        Ok(forward)
    }

    /// Those of one sandbox, or all, in the order of their addresses.
    pub fn list(&self, sandbox: Option<&SandboxId>) -> Vec<Forward> {
        let forwards = lock(&self.forwards);
        let of_sandbox = forwards
            .values()
            .map(|listening| &listening.forward)
            .filter(|forward| sandbox.is_none_or(|sandbox| forward.sandbox == *sandbox));
        of_sandbox.cloned().collect()
    }

    /// Returns when the port is free and its connections are closed.
    pub async fn remove(&self, address: SocketAddr) -> Result<Forward, ForwardError> {
        let removed = lock(&self.forwards).remove(&address);
        let mut listening = removed.ok_or(ForwardError::NotFound(address))?;
        let forward = listening.forward.clone();
        listening.close().await;
        Ok(forward)
    }

    /// Removes whatever leads to `sandbox`.
    pub async fn remove_sandbox(&self, sandbox: &SandboxId) {
        let removed: Vec<Listening> = lock(&self.forwards)
            .extract_if(.., |_, listening| listening.forward.sandbox == *sandbox)
            .map(|(_, listening)| listening)
            .collect();
        for mut listening in removed {
            listening.close().await;
        }
    }
}

// === impl Listening ===

impl Listening {
    async fn close(&mut self) {
        self.task.abort();
        // It ends as cancelled, and with it go the listener and the connections.
        let _ = (&mut self.task).await;
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Where a forward's connections go.
struct Route {
    dial: Arc<dyn Dial>,
    forward: Forward,
    connect_timeout: Duration,
}

// === impl Route ===

impl Route {
    async fn serve(self, listener: TcpListener, max_connections: usize) {
        let who = format!("the forward {}", self.forward.address);
        let route = Arc::new(self);
        let serve = move |stream| {
            let route = Arc::clone(&route);
            async move { route.connection(stream).await }
        };
        accept(listener, who, max_connections, serve).await;
    }

    async fn connection(&self, mut client: TcpStream) {
        let Forward { sandbox, port, .. } = &self.forward;
        let carried = async {
            // A client that vanished is noticed, so that its place becomes free.
            rustix::net::sockopt::set_socket_keepalive(&client, true)?;
            client.set_nodelay(true)?;
            let mut guest = dial_within(&*self.dial, sandbox, *port, self.connect_timeout)
                .await
                .map_err(io::Error::other)?;
            copy_bidirectional(&mut client, &mut guest).await
        };
        if let Err(error) = carried.await {
            tracing::debug!(address = %self.forward.address, %sandbox, port, %error, "a forwarded connection failed");
            // The client must not take it for an ordinary end: it gets a reset.
            let _ = client.set_zero_linger();
        }
    }
}
