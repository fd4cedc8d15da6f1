//! The resolver of a slot: it answers a guest's questions from the host's
//! resolvers, and opens the addresses that it tells before it tells them.
//!
//! A question passes `server` (limits), `message` (is it one?), `policy` (may this
//! name be resolved?), `upstream` (who knows?), `select` (what of that answers
//! it, and may be told?), the [`Opener`], and goes back. Guests and the servers
//! asked are both taken for hostile. Nothing is cached here: guests and the
//! host's resolvers do that.
//!
//! What it does not do: DNSSEC (answers are not marked as validated), ANY and zone
//! transfers (REFUSED), SVCB and HTTPS records, which carry addresses of their
//! own (answered as not there: clients then ask for A and AAAA).

mod limit;
mod message;
mod policy;
mod resolv_conf;
mod select;
mod server;
mod upstream;

use std::io;
use std::net::IpAddr;
use std::time::Duration;

pub use policy::{Filter, Others, Policy};
pub use resolv_conf::{host_upstreams, parse as parse_resolv_conf};
pub use server::Resolver;

use super::DomainId;

/// No answer is worth less than this: a guest must be able to use it.
const MIN_TTL: Duration = Duration::from_secs(1);
/// Nor more: an address must not stay open for ever.
const MAX_TTL: Duration = Duration::from_hours(1);
/// How much longer than its TTL an address stays open: caches count in whole
/// seconds, and a guest may connect in an answer's last one.
const OPEN_LONGER: Duration = Duration::from_secs(5);

/// Lets a guest reach addresses.
#[tonic::async_trait]
pub trait Opener: Send + Sync + 'static {
    /// Opens `addresses` as those of `domain` for `lifetime` from now; those that
    /// are open already stay so for at least that long. The guest is told of the
    /// addresses after this has returned, and not at all when it fails.
    async fn open(
        &self,
        domain: DomainId,
        addresses: &[IpAddr],
        lifetime: Duration,
    ) -> io::Result<()>;
}

/// What one guest may use of the host's resolver.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Questions over the rate are not answered.
    pub queries_per_second: u32,
    pub burst: u32,
    /// Questions that wait for an answer; more are not answered.
    pub concurrent: usize,
    pub tcp_connections: usize,
    /// For one server to answer one question.
    pub attempt: Duration,
    /// For all of them together. Guests ask again after five seconds.
    pub total: Duration,
    /// For the next question on a TCP connection.
    pub idle: Duration,
}

// === impl Limits ===

impl Default for Limits {
    fn default() -> Self {
        Self {
            queries_per_second: 100,
            burst: 200,
            concurrent: 64,
            tcp_connections: 16,
            attempt: Duration::from_millis(1500),
            total: Duration::from_millis(4500),
            idle: Duration::from_secs(10),
        }
    }
}
