//! The sockets of one slot.

use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::limit::Bucket;
use super::message::{Query, Rejected};
use super::select::{Selected, select};
use super::upstream::{Upstreams, framed};
use super::{Limits, MIN_TTL, OPEN_LONGER, Opener, Policy};
use crate::accept::accept;
use crate::net::DomainId;
use crate::sync::lock;

/// More than a question ever has.
const MAX_QUERY_BYTES: usize = 4096;
/// How long to wait when a socket fails, as it does without descriptors.
const ERROR_PAUSE: Duration = Duration::from_millis(100);

/// Answers one guest.
pub struct Resolver {
    shared: Arc<Shared>,
}

struct Shared {
    policy: watch::Receiver<Arc<Policy>>,
    opener: Arc<dyn Opener>,
    limits: Limits,
    bucket: Mutex<Bucket>,
    places: Arc<Semaphore>,
    upstreams: Upstreams,
}

// === impl Resolver ===

impl Resolver {
    /// A policy that is sent holds from then on, also for questions that wait for
    /// their answer.
    pub fn new(
        policy: watch::Receiver<Arc<Policy>>,
        opener: Arc<dyn Opener>,
        limits: Limits,
    ) -> Self {
        let bucket = Bucket::new(limits.queries_per_second, limits.burst, Instant::now());
        Self {
            shared: Arc::new(Shared {
                policy,
                opener,
                bucket: Mutex::new(bucket),
                places: Arc::new(Semaphore::new(limits.concurrent)),
                limits,
                upstreams: Upstreams::default(),
            }),
        }
    }

    /// Serves until the future is dropped, and with it all that was begun. The
    /// sockets are the slot's, bound to the address that guests ask; servers are
    /// asked from the namespace of the caller.
    pub async fn serve(self, udp: UdpSocket, tcp: TcpListener) {
        let datagrams = Arc::clone(&self.shared).datagrams(Arc::new(udp));
        tokio::join!(datagrams, self.shared.connections(tcp));
    }
}

// === impl Shared ===

impl Shared {
    async fn datagrams(self: Arc<Self>, socket: Arc<UdpSocket>) {
        let mut buffer = vec![0; MAX_QUERY_BYTES];
        let mut running = JoinSet::new();
        loop {
            let received = tokio::select! {
                received = socket.recv_from(&mut buffer) => received,
                Some(_) = running.join_next() => continue,
            };
            let (length, client) = match received {
                Ok(received) => received,
                Err(error) => {
                    tracing::warn!(%error, "a slot's resolver cannot receive");
                    tokio::time::sleep(ERROR_PAUSE).await;
                    continue;
                }
            };
            let Some(place) = self.admit() else { continue };
            let bytes = buffer[..length].to_vec();
            let (shared, socket) = (Arc::clone(&self), Arc::clone(&socket));
            running.spawn(async move {
                if let Some(answer) = shared.answer(&bytes, true).await {
                    // A guest that is gone asks no more.
                    let _ = socket.send_to(&answer, client).await;
                }
                drop(place);
            });
        }
    }

    async fn connections(self: Arc<Self>, listener: TcpListener) -> Infallible {
        let limit = self.limits.tcp_connections;
        accept(listener, "a slot's resolver", limit, move |stream| {
            let shared = Arc::clone(&self);
            async move {
                // However it ends, it is over.
                let _ = shared.connection(stream).await;
            }
        })
        .await
    }

    /// One question after the other, until one is late, too long or too many.
    async fn connection(&self, mut stream: TcpStream) -> io::Result<()> {
        loop {
            let read = async {
                let length = usize::from(stream.read_u16().await?);
                if length > MAX_QUERY_BYTES {
                    return Err(io::ErrorKind::InvalidData.into());
                }
                let mut bytes = vec![0; length];
                stream.read_exact(&mut bytes).await?;
                io::Result::Ok(bytes)
            };
            let bytes = tokio::time::timeout(self.limits.idle, read).await??;
            let _place = self.admit().ok_or(io::ErrorKind::WouldBlock)?;
            let Some(answer) = self.answer(&bytes, false).await else {
                return Ok(());
            };
            let answer = framed(&answer)?;
            tokio::time::timeout(self.limits.idle, stream.write_all(&answer)).await??;
        }
    }

    /// A place for a question, if the guest has not asked too many.
    fn admit(&self) -> Option<OwnedSemaphorePermit> {
        let place = Arc::clone(&self.places).try_acquire_owned().ok()?;
        lock(&self.bucket).take(Instant::now()).then_some(place)
    }

    async fn answer(&self, bytes: &[u8], is_datagram: bool) -> Option<Vec<u8>> {
        let query = match Query::read(bytes) {
            Ok(query) => query,
            Err(Rejected(answer)) => return answer,
        };
        let (selected, domains) = match self.look_up(&query).await {
            Ok(found) => found,
            Err(code) => return query.failed(code),
        };
        let Some(answer) = query.answer(&selected) else {
            return query.failed(ResponseCode::ServFail);
        };
        // Nothing is opened for an answer that is not told.
        if is_datagram && answer.len() > query.datagram_bytes() {
            return query.truncated();
        }
        match self.open(&domains, &selected).await {
            Ok(()) => Some(answer),
            Err(error) => {
                tracing::warn!(%error, name = %query.question.name(), "addresses could not be opened");
                query.failed(ResponseCode::ServFail)
            }
        }
    }

    /// What the guest may be told, and the domains that open it; or what it hears
    /// instead.
    async fn look_up(&self, query: &Query) -> Result<(Selected, Vec<DomainId>), ResponseCode> {
        let name = query.question.name();
        let policy = self.policy();
        policy.domains_of(name).ok_or(ResponseCode::Refused)?;
        if matches!(
            query.question.query_type(),
            RecordType::SVCB | RecordType::HTTPS
        ) {
            return Ok((nothing(), Vec::new()));
        }
        let asked = self
            .upstreams
            .ask(&query.question, &policy.upstreams, &self.limits);
        let message = asked.await.map_err(|error| {
            tracing::debug!(%error, %name, "a guest's question has no answer");
            ResponseCode::ServFail
        })?;
        // It may have changed in the meantime.
        let policy = self.policy();
        let domains = policy.domains_of(name).ok_or(ResponseCode::Refused)?;
        let selected = select(&query.question, &message, |address| {
            (policy.allowed)(address)
        });
        Ok((selected, domains))
    }

    async fn open(&self, domains: &[DomainId], selected: &Selected) -> io::Result<()> {
        if selected.addresses.is_empty() {
            return Ok(());
        }
        for &domain in domains {
            let lifetime = selected.ttl + OPEN_LONGER;
            self.opener
                .open(domain, &selected.addresses, lifetime)
                .await?;
        }
        Ok(())
    }

    fn policy(&self) -> Arc<Policy> {
        Arc::clone(&self.policy.borrow())
    }
}

/// The answer that there is no such record.
fn nothing() -> Selected {
    Selected {
        code: ResponseCode::NoError,
        records: Vec::new(),
        authority: None,
        addresses: Vec::new(),
        ttl: MIN_TTL,
    }
}
