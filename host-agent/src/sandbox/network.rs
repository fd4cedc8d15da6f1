//! A sandbox's network: a slot, and the resolver in it, for as long as the sandbox
//! has a machine. Each machine has a slot of its own: one that comes back from a
//! pause has another than before.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use soulbox_proto::guest::v1 as guest;
use soulbox_proto::vmm::v1::{self as proto, reply, request};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use super::actor::Actor;
use super::error::{CreateError, NetworkError, StartError};
use super::pool::Pool;
use super::spec::NetworkSpec;
use crate::config;
use crate::id::SandboxId;
use crate::net::{
    self, Denied, DomainId, GATEWAY4, GATEWAY6, GUEST4, GUEST4_NET, GUEST6, GUEST6_NET, LiveSlot,
    Mac, Network, Policy, SlotCounters, dns,
};
use crate::record::{Lease, SandboxRecord, State};
use crate::status::FieldViolation;
use crate::store::Change;
use crate::sync::lock;

/// Where resolvers listen.
const DNS_PORT: u16 = 53;

/// The networks of this host's sandboxes.
pub(super) struct Networks {
    slots: Arc<Network>,
    /// Whose slots are whose.
    owners: Mutex<HashMap<u32, SandboxId>>,
    /// The host's resolvers.
    upstreams: Vec<SocketAddr>,
}

/// The network of one machine. Dropping it ends the resolver; the slot is given
/// back by [`Actor::detach`], for when the daemon goes the sandbox keeps it.
pub(super) struct Attached {
    lease: Lease,
    /// Until the monitor has it.
    tap: Option<OwnedFd>,
    names: watch::Sender<Arc<dns::Policy>>,
    _resolver: AbortOnDropHandle<()>,
}

/// Opens addresses in one slot.
struct SlotOpener {
    slots: Arc<Network>,
    index: u32,
}

// === impl Networks ===

impl Networks {
    /// Takes over the slots of sandboxes that run. None where networks are turned off.
    pub(super) async fn start(
        config: &config::Network,
        records: &[SandboxRecord],
    ) -> Result<Option<(Self, mpsc::Receiver<Denied>)>, net::StartError> {
        if !config.enabled {
            return Ok(None);
        }
        let is_live = |state| matches!(state, State::Running | State::Pausing);
        let (owners, live): (HashMap<u32, SandboxId>, Vec<LiveSlot>) = records
            .iter()
            .filter(|record| is_live(record.state))
            .filter_map(|record| {
                let Lease { index, mac, .. } = record.slot?;
                let policy = *record.network.clone()?;
                Some(((index, record.id.clone()), LiveSlot { index, mac, policy }))
            })
            .unzip();
        let mut owners = owners;
        let started = Network::start(config, &live).await?;
        for lost in &started.lost {
            if let Some(id) = owners.remove(&lost.index) {
                tracing::error!(sandbox = %id, error = %lost.error, "its network is gone; pause and resume it for another");
            }
        }
        let upstreams = match config.dns_upstream.as_slice() {
            [] => dns::host_upstreams(),
            servers => servers.iter().map(|&server| at_port_53(server)).collect(),
        };
        let networks = Self {
            slots: started.network,
            owners: Mutex::new(owners),
            upstreams,
        };
        Ok(Some((networks, started.denied)))
    }

    fn owner(&self, index: u32) -> Option<SandboxId> {
        lock(&self.owners).get(&index).cloned()
    }

    pub(super) async fn stop(&self) {
        self.slots.stop().await;
    }

    /// Which names a guest may resolve, and where they are asked.
    fn names(&self, policy: &Policy) -> dns::Policy {
        let upstreams = match policy.dns_servers.as_slice() {
            [] => self.upstreams.clone(),
            servers => servers.iter().map(|&server| at_port_53(server)).collect(),
        };
        let judge = policy.clone();
        dns::Policy {
            domains: policy.allow_domains.clone(),
            others: match policy.internet {
                true => dns::Others::Resolve,
                false => dns::Others::Refuse,
            },
            upstreams,
            allowed: Arc::new(move |address| judge.may_be_told(*address)),
        }
    }

    /// Serves the resolver of a slot. The sockets are made off the path of a create:
    /// a guest that asks within its first millisecond asks again.
    fn resolve(
        &self,
        index: u32,
        names: watch::Receiver<Arc<dns::Policy>>,
    ) -> AbortOnDropHandle<()> {
        let slots = Arc::clone(&self.slots);
        let resolving = async move {
            let sockets = match slots.bind_resolver(index).await {
                Ok(sockets) => sockets,
                Err(error) => {
                    tracing::error!(slot = index, %error, "a sandbox has no resolver");
                    return;
                }
            };
            let mut serving = JoinSet::new();
            for (udp, tcp) in sockets.udp.into_iter().zip(sockets.tcp) {
                let opener = Arc::new(SlotOpener {
                    slots: Arc::clone(&slots),
                    index,
                });
                let resolver = dns::Resolver::new(names.clone(), opener, dns::Limits::default());
                let sockets = tokio::net::UdpSocket::from_std(udp)
                    .and_then(|udp| Ok((udp, tokio::net::TcpListener::from_std(tcp)?)));
                match sockets {
                    Ok((udp, tcp)) => {
                        serving.spawn(resolver.serve(udp, tcp));
                    }
                    Err(error) => {
                        tracing::error!(slot = index, %error, "a sandbox has no resolver");
                    }
                }
            }
            while serving.join_next().await.is_some() {}
        };
        AbortOnDropHandle::new(tokio::spawn(resolving))
    }

    fn attached(&self, lease: Lease, tap: Option<OwnedFd>, policy: &Policy) -> Attached {
        let names = watch::Sender::new(Arc::new(self.names(policy)));
        Attached {
            lease,
            tap,
            _resolver: self.resolve(lease.index, names.subscribe()),
            names,
        }
    }
}

impl std::fmt::Debug for Networks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Networks")
            .field("owners", &self.owners)
            .finish_non_exhaustive()
    }
}

// === impl SlotOpener ===

#[tonic::async_trait]
impl dns::Opener for SlotOpener {
    async fn open(
        &self,
        domain: DomainId,
        addresses: &[IpAddr],
        lifetime: Duration,
    ) -> io::Result<()> {
        let opened = self.slots.open(self.index, domain, addresses, lifetime);
        opened.await.map(drop).map_err(io::Error::other)
    }
}

// === impl Pool ===

impl Pool {
    /// What a new sandbox may reach.
    pub(super) fn network_of(&self, spec: NetworkSpec) -> Result<Option<Box<Policy>>, CreateError> {
        match (spec, &self.networks) {
            (NetworkSpec::None, _) | (NetworkSpec::Default, None) => Ok(None),
            (NetworkSpec::Default, Some(_)) => Ok(Some(Box::default())),
            (NetworkSpec::Policy(policy), Some(_)) => Ok(Some(policy)),
            (NetworkSpec::Policy(_), None) => Err(CreateError::Network(NetworkError::Off)),
        }
    }

    /// What of a policy this host cannot let a sandbox have.
    pub(super) async fn check_policy(
        &self,
        policy: &Policy,
        prefix: &str,
    ) -> Result<(), Vec<FieldViolation>> {
        let Some(networks) = &self.networks else {
            return Ok(());
        };
        let found = match networks.slots.violations(policy).await {
            Ok(found) => found,
            Err(error) => {
                return Err(vec![FieldViolation {
                    field: format!("{prefix}.dns_servers"),
                    description: format!("could not be checked ({error}); try again"),
                }]);
            }
        };
        let named = found.into_iter().map(|violation| FieldViolation {
            field: format!("{prefix}.{}", violation.field),
            description: violation.error.to_string(),
        });
        match named.collect::<Vec<_>>() {
            none if none.is_empty() => Ok(()),
            found => Err(found),
        }
    }

    /// Tells whoever watches what guests are denied, until the pool is left.
    pub(super) async fn tell_denied(self: Arc<Self>, mut denied: mpsc::Receiver<Denied>) {
        let leaving = self.leaving.clone();
        while let Some(Some(denied)) = leaving.run_until_cancelled(denied.recv()).await {
            let networks = self.networks.as_ref();
            if let Some(id) = networks.and_then(|networks| networks.owner(denied.slot)) {
                self.registry.tell_denied(&id, denied);
            }
        }
    }

    /// What went through a sandbox's slot.
    pub async fn network_counters(&self, lease: Lease) -> Result<SlotCounters, NetworkError> {
        let networks = self.networks.as_ref().ok_or(NetworkError::Off)?;
        Ok(networks.slots.counters(lease.index).await?)
    }
}

// === impl Actor ===

impl Actor {
    /// Takes a slot for the machine that is about to be made, if it is to have a
    /// network, and tells whether it is. On an error, or when this is dropped, what
    /// there is of it is in `self`.
    pub(super) async fn attach(&mut self) -> Result<bool, StartError> {
        let Some(policy) = self.record.network.clone() else {
            return Ok(false);
        };
        let pool = Arc::clone(&self.pool);
        let networks = pool.networks.as_ref().ok_or(NetworkError::Off)?;
        let slot = networks
            .slots
            .take_or_make()
            .await
            .map_err(NetworkError::from)?;
        let lease = Lease {
            index: slot.index,
            mac: slot.mac,
            ipv4: slot.ipv4,
            ipv6: slot.ipv6,
        };
        lock(&networks.owners).insert(lease.index, self.record.id.clone());
        self.record.slot = Some(lease);
        self.network = Some(networks.attached(lease, Some(slot.tap), &policy));
        // Before its guest can send a packet.
        let applied = networks.slots.apply(lease.index, &policy).await;
        applied.map_err(NetworkError::from)?;
        Ok(true)
    }

    /// Takes up the slot that a sandbox has kept while no daemon ran.
    pub(super) fn attach_again(&mut self) {
        let (Some(lease), Some(policy)) = (self.record.slot, &self.record.network) else {
            return;
        };
        match &self.pool.networks {
            Some(networks) if networks.owner(lease.index).as_ref() == Some(&self.record.id) => {
                self.network = Some(networks.attached(lease, None, policy));
            }
            _ => self.record.slot = None,
        }
    }

    /// Gives the slot back; its machine is gone. What is returned is ready when
    /// nothing of the slot is left.
    pub(super) fn detach(&mut self) -> impl Future<Output = ()> + use<> {
        self.record.slot = None;
        let attached = self.network.take();
        let pool = Arc::clone(&self.pool);
        async move {
            let (Some(attached), Some(networks)) = (attached, &pool.networks) else {
                return;
            };
            let index = attached.lease.index;
            lock(&networks.owners).remove(&index);
            drop(attached);
            if let Err(error) = networks.slots.release(index).await {
                tracing::error!(slot = index, %error, "a sandbox's slot is left over until the next start");
            }
        }
    }

    /// The network device of its machine.
    pub(super) fn net_device<'fd>(
        &'fd self,
        attach: &mut impl FnMut(BorrowedFd<'fd>) -> u32,
    ) -> proto::Net {
        let tap = self
            .network
            .as_ref()
            .and_then(|network| network.tap.as_ref());
        let policy = self.record.network.as_deref();
        let limit = |limit: fn(&Policy) -> net::RateLimit| policy.map(limit).map(buckets);
        proto::Net {
            mac: self.mac().bytes().to_vec(),
            tap_fd: tap.map(|tap| attach(tap.as_fd())),
            mtu: net::MTU,
            rx: limit(|policy| policy.receive),
            tx: limit(|policy| policy.send),
        }
    }

    /// The monitor has the TAP: a slot's network goes with its last descriptor.
    pub(super) fn hand_over_tap(&mut self) {
        if let Some(network) = &mut self.network {
            network.tap = None;
        }
    }

    /// What its guest is told. A template's machine, which has no slot, is told what
    /// all of them are, so that its copies find their interface set up.
    pub(super) fn guest_network(&self) -> Option<guest::Network> {
        if self.network.is_none() && self.is_listed {
            return None;
        }
        let address = |address: IpAddr, prefix_length: u8| guest::InterfaceAddress {
            address: octets(address),
            prefix_length: prefix_length.into(),
        };
        let gateways = [GATEWAY4.into(), GATEWAY6.into()].map(octets);
        Some(guest::Network {
            mac: Bytes::copy_from_slice(&self.mac().bytes()),
            mtu: net::MTU,
            addresses: vec![
                address(GUEST4.into(), GUEST4_NET.prefix_len()),
                address(GUEST6.into(), GUEST6_NET.prefix_len()),
            ],
            gateways: gateways.to_vec(),
            gateway_mac: Bytes::copy_from_slice(&Mac::GATEWAY.bytes()),
            resolvers: gateways.to_vec(),
        })
    }

    fn mac(&self) -> Mac {
        match &self.network {
            Some(network) => network.lease.mac,
            None => Mac::UNUSED,
        }
    }

    /// Replaces the policy of a sandbox that runs or is paused.
    pub(super) async fn set_policy(&mut self, policy: Box<Policy>) -> Result<Policy, NetworkError> {
        if self.record.network.is_none() {
            return Err(NetworkError::None(self.record.id.clone()));
        }
        let before = self.record.network.replace(policy.clone());
        let put = |record: &SandboxRecord| vec![Change::PutSandbox(record.clone())];
        if let Err(error) = self.pool.store.commit(put(&self.record)).await {
            self.record.network = before;
            return Err(NetworkError::Store(error));
        }
        if let Err(error) = self.enforce(&policy).await {
            // The firewall may have it already, where the monitor refused.
            if let Some(before) = &before
                && let Err(error) = self.enforce(before).await
            {
                tracing::error!(sandbox = %self.record.id, %error, "parts of a policy that failed stay; set another");
            }
            self.record.network = before;
            if let Err(error) = self.pool.store.commit(put(&self.record)).await {
                tracing::error!(sandbox = %self.record.id, %error, "that its policy stays is not on disk");
            }
            return Err(error);
        }
        self.publish();
        Ok(*policy)
    }

    async fn enforce(&self, policy: &Policy) -> Result<(), NetworkError> {
        let (Some(attached), Some(networks)) = (&self.network, &self.pool.networks) else {
            return Ok(());
        };
        networks.slots.apply(attached.lease.index, policy).await?;
        let _ = attached.names.send(Arc::new(networks.names(policy)));
        self.limit(policy).await
    }

    /// Has the monitor keep to the policy's limits, where the sandbox has a network.
    pub(super) async fn limit(&self, policy: &Policy) -> Result<(), NetworkError> {
        let (Some(_), Some(machine)) = (&self.network, &self.machine) else {
            return Ok(());
        };
        let set = request::Op::SetNet(proto::SetNet {
            rx: Some(buckets(policy.receive)),
            tx: Some(buckets(policy.send)),
            link_up: None,
        });
        match machine.control.request(set, &[]).await {
            Ok(reply::Result::NetSet(_)) => Ok(()),
            Ok(_) => Err(NetworkError::Monitor(
                "it answered with something else".to_owned(),
            )),
            Err(error) => Err(NetworkError::Monitor(error.to_string())),
        }
    }
}

/// A second's worth of tokens, which fill up in a second; zero is no limit.
fn buckets(limit: net::RateLimit) -> proto::RateLimit {
    let bucket = |capacity: u64| {
        (capacity > 0).then_some(proto::TokenBucket {
            capacity,
            refill_time_ms: 1000,
        })
    };
    proto::RateLimit {
        bytes: bucket(limit.bytes_per_second),
        operations: bucket(limit.packets_per_second),
    }
}

fn at_port_53(server: IpAddr) -> SocketAddr {
    (server, DNS_PORT).into()
}

fn octets(address: IpAddr) -> Bytes {
    match address {
        IpAddr::V4(address) => Bytes::copy_from_slice(&address.octets()),
        IpAddr::V6(address) => Bytes::copy_from_slice(&address.octets()),
    }
}
