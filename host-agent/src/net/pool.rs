//! The slots of a host: those that wait, and those that sandboxes have.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::counters::SlotCounters;
use super::denied::Denied;
use super::host::{self, StartError};
use super::mac::Mac;
use super::nft;
use super::policy::{DomainId, Policy, PolicyError, PolicyViolation};
use super::ranges::Ends;
use super::resolver::ResolverSockets;
use super::rules;
use super::slot::{Made, Maker, SlotError};
use crate::config::Network as Config;
use crate::sync::lock;

/// Denied attempts that wait to be taken, of all sandboxes together.
const EVENTS: usize = 1024;
/// How long a sandbox waits for a slot that is being made.
const WAIT: Duration = Duration::from_secs(5);
const ADOPTED_AT_ONCE: usize = 16;

/// All slots of this host. One daemon has it at a time.
pub struct Network {
    pub(super) maker: Arc<Maker>,
    pub(super) ready_wanted: usize,
    slots_max: u32,
    pub(super) pool: Mutex<Pool>,
    /// Something was taken or given back.
    pub(super) changed: Notify,
    /// A slot is ready, or a number is free.
    pub(super) arrived: Notify,
    pub(super) leaving: CancellationToken,
    /// What must be finished though nobody waits for it any more.
    pub(super) tasks: TaskTracker,
    _lock: UnixListener,
}

#[derive(Default)]
pub(super) struct Pool {
    pub(super) ready: VecDeque<(Made, OwnedFd)>,
    pub(super) leased: HashMap<u32, Arc<Lease>>,
    /// Numbers that no slot has, the longest unused first.
    pub(super) free: VecDeque<u32>,
    /// Those that could not be removed.
    pub(super) stuck: Vec<u32>,
}

pub(super) struct Lease {
    pub(super) made: Made,
    /// What the firewall has; locked while it changes.
    policy: tokio::sync::Mutex<Policy>,
}

/// A sandbox's network. Dropping it gives nothing back: [`Network::release`] does.
#[derive(Debug)]
pub struct Slot {
    pub index: u32,
    /// The guest's end. The network is up as long as this is open somewhere.
    pub tap: OwnedFd,
    /// What the guest must use, and what no other slot has had.
    pub mac: Mac,
    /// Where the host reaches the guest's ports.
    pub ipv4: Ipv4Addr,
    pub ipv6: Ipv6Addr,
    pub namespace: PathBuf,
}

/// The slot of a sandbox that an earlier daemon has left running.
#[derive(Debug, Clone)]
pub struct LiveSlot {
    pub index: u32,
    pub mac: Mac,
    pub policy: Policy,
}

pub struct Started {
    pub network: Arc<Network>,
    /// Attempts that were denied.
    pub denied: mpsc::Receiver<Denied>,
    /// Live slots that are no more.
    pub lost: Vec<Lost>,
}

#[derive(Debug)]
pub struct Lost {
    pub index: u32,
    pub error: SlotError,
}

/// What a look into the pool gives.
enum Taken {
    Slot(Slot),
    /// Of a slot that may be made.
    Number(u32),
    /// All are taken, being made, or being removed.
    Later,
    Never(NoSlot),
}

#[derive(Debug, thiserror::Error)]
pub enum NoSlot {
    #[error("no network slot is ready; try again in a moment")]
    NotReady,
    #[error("all {max} network slots are in use; delete a sandbox, or raise network.slots_max")]
    Exhausted { max: u32 },
    #[error("no network slot could be made: {0}")]
    Make(#[source] SlotError),
}

// === impl Pool ===

impl Pool {
    /// Leases `live` slots to the sandboxes that have them; those that cannot be kept
    /// are removed.
    async fn adopt(
        &mut self,
        maker: &Arc<Maker>,
        config: &Config,
        live: &[LiveSlot],
    ) -> Result<Vec<Lost>, StartError> {
        let mut lost = Vec::new();
        for some in live.chunks(ADOPTED_AT_ONCE) {
            let mut adopting = JoinSet::new();
            for slot in some.iter().cloned() {
                let is_ours = slot.index < config.slots_max;
                let maker = Arc::clone(maker);
                adopting.spawn(async move {
                    let adopted = match is_ours {
                        true => maker.adopt(slot.index, slot.mac, &slot.policy).await,
                        false => Err(SlotError::Unknown { slot: slot.index }),
                    };
                    (slot, adopted)
                });
            }
            for (LiveSlot { index, policy, .. }, adopted) in adopting.join_all().await {
                match adopted {
                    Ok(made) => {
                        let policy = tokio::sync::Mutex::new(policy);
                        self.leased.insert(index, Arc::new(Lease { made, policy }));
                    }
                    Err(error) => {
                        let unmade = maker.unmake(index).await;
                        unmade.map_err(|source| StartError::Strays { source })?;
                        lost.push(Lost { index, error });
                    }
                }
            }
        }
        Ok(lost)
    }
}

// === impl Network ===

impl Network {
    /// Takes the host's network over, adopts the slots of `live` sandboxes and
    /// removes all others. Then it keeps slots ready.
    pub async fn start(config: &Config, live: &[LiveSlot]) -> Result<Started, StartError> {
        let held = host::lock()?;
        let (events, denied) = mpsc::channel(EVENTS);
        let maker = Maker::new(config, events).map_err(|source| StartError::Netlink { source })?;
        let maker = Arc::new(maker);
        host::check(&maker).await?;
        let indices: HashSet<u32> = live.iter().map(|slot| slot.index).collect();
        let strays = host::remove_strays(&maker, &indices).await?;
        if strays > 0 {
            tracing::info!(strays, "removed network slots that nobody uses");
        }
        // Before forwarding is on, there is a firewall.
        host::install_rules(&maker).await?;
        host::forward()?;
        let mut pool = Pool::default();
        let lost = pool.adopt(&maker, config, live).await?;
        let free = (0..config.slots_max).filter(|index| !pool.leased.contains_key(index));
        pool.free = free.collect();
        // One is made at once: what the kernel lacks is told now, not at the first sandbox.
        if let Some(index) = pool.free.pop_front() {
            let made = maker.make(index).await;
            pool.ready
                .push_back(made.map_err(|source| StartError::Slot { source })?);
        }
        let network = Arc::new(Self {
            maker,
            ready_wanted: usize::try_from(config.slots_ready).unwrap_or(usize::MAX),
            slots_max: config.slots_max,
            pool: Mutex::new(pool),
            changed: Notify::new(),
            arrived: Notify::new(),
            leaving: CancellationToken::new(),
            tasks: TaskTracker::new(),
            _lock: held,
        });
        network.tasks.spawn(Arc::clone(&network).keep());
        Ok(Started {
            network,
            denied,
            lost,
        })
    }

    /// A slot that waits, with the default policy.
    pub fn take(&self) -> Result<Slot, NoSlot> {
        let mut pool = lock(&self.pool);
        let taken = pool.ready.pop_front();
        self.changed.notify_one();
        match taken {
            Some((made, tap)) => Ok(self.lease(&mut pool, made, tap)),
            None => Err(self.none(&pool)),
        }
    }

    /// A slot that waits, else one made for this caller, else the first that comes
    /// back or is made just now.
    pub async fn take_or_make(self: &Arc<Self>) -> Result<Slot, NoSlot> {
        let waited = tokio::time::timeout(WAIT, async {
            loop {
                // Before looking, so that none arrives unnoticed in between.
                let arrived = self.arrived.notified();
                match self.try_take() {
                    Taken::Slot(slot) => return Ok(slot),
                    Taken::Number(index) => self.make_one(index).await?,
                    Taken::Later => arrived.await,
                    Taken::Never(error) => return Err(error),
                }
            }
        });
        waited.await.unwrap_or(Err(NoSlot::NotReady))
    }

    fn try_take(&self) -> Taken {
        let mut pool = lock(&self.pool);
        self.changed.notify_one();
        if let Some((made, tap)) = pool.ready.pop_front() {
            return Taken::Slot(self.lease(&mut pool, made, tap));
        }
        if let Some(index) = pool.free.pop_front() {
            return Taken::Number(index);
        }
        match self.none(&pool) {
            NoSlot::NotReady => Taken::Later,
            error => Taken::Never(error),
        }
    }

    /// Makes a slot, which then waits with the others: should this caller give up on
    /// the way, another has it.
    async fn make_one(self: &Arc<Self>, index: u32) -> Result<(), NoSlot> {
        let network = Arc::clone(self);
        let making = self.tasks.spawn(async move { network.add(index).await });
        match making.await {
            Ok(added) => added.map_err(NoSlot::Make),
            Err(_) => Err(NoSlot::NotReady),
        }
    }

    /// What this node cannot let `policy` have, beyond [`Policy::violations`]: the
    /// host asks the resolvers, and must not ask itself or a sandbox.
    pub async fn violations(&self, policy: &Policy) -> io::Result<Vec<PolicyViolation>> {
        let mut found = Vec::new();
        for (index, server) in policy.dns_servers.iter().enumerate() {
            if self.maker.ranges.contains(*server) || self.maker.links.is_own(*server).await? {
                found.push(PolicyViolation {
                    field: format!("dns_servers[{index}]"),
                    error: PolicyError::DnsServerOfHost(*server),
                });
            }
        }
        Ok(found)
    }

    /// Sets a sandbox's policy, all of it at one moment. What it still allows goes on
    /// undisturbed; what it no longer does stops with the next packet.
    pub async fn apply(&self, index: u32, policy: &Policy) -> Result<(), SlotError> {
        let lease = self.leased(index)?;
        let mut current = lease.policy.lock().await;
        if !current.filters_like(policy) {
            let kept: HashSet<DomainId> = policy
                .allow_domains
                .iter()
                .map(super::DomainPattern::id)
                .collect();
            let before: HashSet<DomainId> = current
                .allow_domains
                .iter()
                .map(super::DomainPattern::id)
                .collect();
            let gone: Vec<DomainId> = before.difference(&kept).copied().collect();
            let text = rules::policy_rules(policy, &gone, self.maker.ranges);
            self.nft(&lease, text).await?;
        }
        *current = policy.clone();
        Ok(())
    }

    /// Lets connections to `addresses` pass for `ttl`, as those of the domain with
    /// that id; of those that are open already, the time starts anew. Answers how
    /// many there are: addresses that no name may stand for are left out, and all
    /// are when the policy does not have the domain any more.
    pub async fn open(
        &self,
        index: u32,
        domain: DomainId,
        addresses: &[IpAddr],
        ttl: Duration,
    ) -> Result<usize, SlotError> {
        let lease = self.leased(index)?;
        // Held, so that the set does not go in the meantime.
        let policy = lease.policy.lock().await;
        let is_allowed = policy
            .allow_domains
            .iter()
            .any(|pattern| pattern.id() == domain);
        let addresses: Vec<IpAddr> = addresses
            .iter()
            .copied()
            .filter(|address| is_allowed && host::may_open(&self.maker, *address))
            .collect();
        if !addresses.is_empty() {
            let text = rules::open(domain, &addresses, ttl);
            self.nft(&lease, text).await?;
        }
        Ok(addresses.len())
    }

    pub async fn counters(&self, index: u32) -> Result<SlotCounters, SlotError> {
        let lease = self.leased(index)?;
        let read = self.maker.nft(&lease.made.namespace, |program| {
            let listing = nft::query(&program, &["list", "counters"])?;
            Ok((
                listing,
                std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count"),
            ))
        });
        let inside = |source| SlotError::Inside {
            slot: index,
            source,
        };
        let (listing, open) = read
            .await
            .map_err(inside)?
            .map_err(|source| SlotError::Rules {
                slot: index,
                source,
            })?;
        let open = open.map_err(inside)?;
        SlotCounters::parse(&listing, &open).map_err(inside)
    }

    /// Sockets on which the guest of a slot asks its resolver.
    pub async fn bind_resolver(&self, index: u32) -> Result<ResolverSockets, SlotError> {
        let lease = self.leased(index)?;
        let bound = lease.made.namespace.run(ResolverSockets::bind).await;
        bound.map_err(|source| SlotError::Inside {
            slot: index,
            source,
        })
    }

    /// Takes a slot back. It is gone when this returns, and with it all that its
    /// guest has left; its number is made anew. The monitor that has the TAP should
    /// be gone by then: a TAP that is still open has no way out any more.
    pub async fn release(self: &Arc<Self>, index: u32) -> Result<(), SlotError> {
        let lease = lock(&self.pool).leased.remove(&index);
        let lease = lease.ok_or(SlotError::Unknown { slot: index })?;
        // Not to be interrupted: a slot in no list would be lost.
        let network = Arc::clone(self);
        let removed = self.tasks.spawn(async move {
            drop(lease);
            network.unmake(index).await
        });
        removed.await.unwrap_or(Ok(()))
    }

    /// Removes the slots that wait. Those that sandboxes have stay as they are.
    pub async fn stop(&self) {
        self.leaving.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        let (ready, is_used) = {
            let mut pool = lock(&self.pool);
            (std::mem::take(&mut pool.ready), !pool.leased.is_empty())
        };
        let indices: Vec<u32> = ready.iter().map(|(made, _)| made.index).collect();
        drop(ready);
        // All of them first, so that the kernel clears them away together.
        for index in &indices {
            let _ = self.maker.unname(*index);
        }
        for index in indices {
            if let Err(error) = self.maker.unmake(index).await {
                tracing::warn!(index, %error, "a network slot stays until the next start");
            }
        }
        if !is_used {
            let removed = self.maker.set_host_rules(rules::no_host()).await;
            if !matches!(removed, Ok(Ok(()))) {
                tracing::warn!("the firewall's table stays; the next start replaces it");
            }
        }
    }

    /// How many wait.
    pub fn ready(&self) -> usize {
        lock(&self.pool).ready.len()
    }

    fn lease(&self, pool: &mut Pool, made: Made, tap: OwnedFd) -> Slot {
        let index = made.index;
        let Ends { slot4, slot6, .. } = self.maker.ranges.ends(index);
        let slot = Slot {
            index,
            tap,
            mac: made.mac,
            ipv4: slot4,
            ipv6: slot6,
            namespace: self.maker.path(index),
        };
        let policy = tokio::sync::Mutex::new(Policy::default());
        pool.leased.insert(index, Arc::new(Lease { made, policy }));
        slot
    }

    fn leased(&self, index: u32) -> Result<Arc<Lease>, SlotError> {
        let lease = lock(&self.pool).leased.get(&index).cloned();
        lease.ok_or(SlotError::Unknown { slot: index })
    }

    fn none(&self, pool: &Pool) -> NoSlot {
        match pool.leased.len() >= usize::try_from(self.slots_max).unwrap_or(usize::MAX) {
            true => NoSlot::Exhausted {
                max: self.slots_max,
            },
            false => NoSlot::NotReady,
        }
    }

    async fn nft(&self, lease: &Lease, text: String) -> Result<(), SlotError> {
        let slot = lease.made.index;
        self.maker
            .nft(&lease.made.namespace, move |program| {
                nft::apply(&program, &text)
            })
            .await
            .map_err(|source| SlotError::Inside { slot, source })?
            .map_err(|source| SlotError::Rules { slot, source })
    }
}
