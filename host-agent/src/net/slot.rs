//! Making, checking and removing one slot.
//!
//! What there is, is what the kernel has: a namespace with our prefix in its name,
//! a link `sb<N>`, and what goes with them. Nothing else keeps book, so a daemon
//! that is killed at any step leaves nothing that the next one would not find.

use std::ffi::OsString;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::denied::{Denied, Listener};
use super::links::Links;
use super::mac::Mac;
use super::netns::{self, Namespace};
use super::nft::{self, NftError};
use super::policy::Policy;
use super::ranges::{Ends, Ranges};
use super::rules::{self, SlotRules};
use super::{GATEWAY4, GATEWAY6, GUEST4, GUEST4_NET, GUEST6, GUEST6_NET, LINKS, MTU, TAP, UPLINK};
use crate::config::Network as Config;

/// How long the kernel may take to clear away a namespace that nobody has.
const CLEARING: Duration = Duration::from_millis(500);
const LOOK: Duration = Duration::from_millis(5);

#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    #[error(
        "the namespace {} cannot be made or entered; soulboxd needs root, or CAP_SYS_ADMIN and CAP_NET_ADMIN",
        .path.display()
    )]
    Namespace { path: PathBuf, source: io::Error },
    #[error(
        "the TAP or the settings of slot {slot} cannot be made; see that the host has /dev/net/tun and IPv6"
    )]
    Inside { slot: u32, source: io::Error },
    #[error(
        "the links of slot {slot} cannot be set up; see that the kernel has veth, and that no other program uses links called {LINKS}<number>"
    )]
    Links { slot: u32, source: io::Error },
    #[error("slot {slot} has no firewall: {source}")]
    Rules { slot: u32, source: NftError },
    #[error(
        "the log of denied packets of slot {slot} cannot be heard; see that the kernel has nfnetlink_log"
    )]
    Log { slot: u32, source: io::Error },
    #[error("slot {slot} has no TAP any more: its monitor is gone; start its sandbox again")]
    NoTap { slot: u32 },
    #[error("slot {slot} is not in use")]
    Unknown { slot: u32 },
}

/// What all slots have in common.
pub(super) struct Maker {
    pub(super) ranges: Ranges,
    pub(super) links: Links,
    host: Namespace,
    nft: OsString,
    prefix: String,
    connections_max: u32,
    events: mpsc::Sender<Denied>,
}

/// A slot as long as it is used, or waits to be.
pub(super) struct Made {
    pub(super) index: u32,
    pub(super) mac: Mac,
    pub(super) namespace: Namespace,
    log: JoinHandle<()>,
}

/// Tells a step to whoever traces; the tests kill the process there.
pub(super) fn step(name: &'static str) {
    tracing::trace!(target: "soulbox_host::net::step", name);
}

// === impl Maker ===

impl Maker {
    pub(super) fn new(config: &Config, events: mpsc::Sender<Denied>) -> io::Result<Self> {
        Ok(Self {
            ranges: Ranges::new(config),
            links: Links::open()?,
            host: Namespace::own()?,
            nft: config.nft.clone().into_os_string(),
            prefix: config.namespace_prefix.clone(),
            connections_max: config.connections_max,
            events,
        })
    }

    pub(super) fn path(&self, index: u32) -> PathBuf {
        Path::new(netns::FOLDER).join(format!("{}{index}", self.prefix))
    }

    /// The number of the slot whose namespace is called `name`.
    pub(super) fn namespace_index(&self, name: &str) -> Option<u32> {
        number(name.strip_prefix(&self.prefix)?)
    }

    /// A slot with the default policy, or nothing of it.
    pub(super) async fn make(&self, index: u32) -> Result<(Made, OwnedFd), SlotError> {
        let made = self.try_make(index).await;
        if made.is_err() {
            // The error says more than what removing half a slot could.
            let _ = self.unmake(index).await;
        }
        made
    }

    async fn try_make(&self, index: u32) -> Result<(Made, OwnedFd), SlotError> {
        let path = self.path(index);
        let at = |source| SlotError::Namespace {
            path: path.clone(),
            source,
        };
        let inside = |source| SlotError::Inside {
            slot: index,
            source,
        };
        let mac = Mac::random().map_err(inside)?;
        let namespace = Namespace::create(path.clone()).await.map_err(at)?;
        step("namespace");
        let prepared = namespace.run(|| {
            settings()?;
            let tap = netns::open_tap(TAP)?;
            Ok((tap, Links::open()?))
        });
        let (tap, links) = prepared.await.map_err(inside)?;
        step("tap");
        let linked = async {
            self.link(&links, index).await?;
            set_up_tap(&links, mac).await
        };
        linked.await.map_err(|source| SlotError::Links {
            slot: index,
            source,
        })?;
        step("links");
        let made = self
            .guard(index, mac, namespace, &Policy::default())
            .await?;
        step("ready");
        Ok((made, tap))
    }

    /// A slot whose monitor has lived on without a daemon. What an operator has
    /// removed in the meantime is put back.
    pub(super) async fn adopt(
        &self,
        index: u32,
        mac: Mac,
        policy: &Policy,
    ) -> Result<Made, SlotError> {
        let path = self.path(index);
        let entered = |source| SlotError::Namespace {
            path: path.clone(),
            source,
        };
        let linked = |source| SlotError::Links {
            slot: index,
            source,
        };
        let namespace = Namespace::open(&path).map_err(entered)?;
        let links = namespace.run(Links::open).await.map_err(entered)?;
        if links.find(TAP).await.map_err(linked)?.is_none() {
            return Err(SlotError::NoTap { slot: index });
        }
        let uplink = links.find(UPLINK).await.map_err(linked)?;
        let host_end = self.links.find(&link_name(index)).await.map_err(linked)?;
        if uplink.is_none() || host_end.is_none() {
            tracing::warn!(
                slot = index,
                "a live sandbox's link was gone; making it again"
            );
            self.link(&links, index).await.map_err(linked)?;
        }
        let refused = |source| SlotError::Rules {
            slot: index,
            source,
        };
        let tables = self.nft(&namespace, |nft| nft::query(&nft, &["list", "tables"]));
        let tables = tables.await.map_err(entered)?.map_err(refused)?;
        if tables.matches(&format!("\"{}\"", rules::TABLE)).count() == 2 {
            let text = rules::policy_rules(policy, &[], self.ranges);
            let set = self.nft(&namespace, move |nft| nft::apply(&nft, &text));
            set.await.map_err(entered)?.map_err(refused)?;
            return self.listen(index, mac, namespace).await;
        }
        tracing::warn!(
            slot = index,
            "a live sandbox's firewall was gone; making it again"
        );
        self.guard(index, mac, namespace, policy).await
    }

    /// Removes all of a slot that there is, whatever it is.
    ///
    /// Without a name and without a descriptor into it a namespace is cleared away
    /// by the kernel, which takes all that have gone meanwhile at once: deleting
    /// links by name waits for RCU once for each.
    pub(super) async fn unmake(&self, index: u32) -> Result<(), SlotError> {
        self.unname(index)?;
        step("unnamed");
        let gone = self.wait_for_link_to_go(index).await;
        gone.map_err(|source| SlotError::Links {
            slot: index,
            source,
        })?;
        step("unlinked");
        Ok(())
    }

    /// The first half of [`Maker::unmake`].
    pub(super) fn unname(&self, index: u32) -> Result<(), SlotError> {
        let path = self.path(index);
        netns::unname(&path).map_err(|source| SlotError::Namespace { path, source })
    }

    async fn wait_for_link_to_go(&self, index: u32) -> io::Result<()> {
        let name = link_name(index);
        let began = Instant::now();
        while let Some(link) = self.links.find(&name).await? {
            if began.elapsed() > CLEARING {
                // Somebody still has the TAP. Without the link it leads nowhere.
                return self.links.delete(link).await;
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// Runs `work` with nft's name in `namespace`.
    pub(super) async fn nft<T, F>(&self, namespace: &Namespace, work: F) -> io::Result<T>
    where
        F: FnOnce(OsString) -> T + Send + 'static,
        T: Send + 'static,
    {
        let nft = self.nft.clone();
        namespace.run(move || Ok(work(nft))).await
    }

    /// The host's table, or no table.
    pub(super) async fn set_host_rules(&self, text: String) -> io::Result<Result<(), NftError>> {
        self.nft(&self.host, move |nft| nft::apply(&nft, &text))
            .await
    }

    /// Replaces all rules of a slot, and hears what they deny.
    async fn guard(
        &self,
        index: u32,
        mac: Mac,
        namespace: Namespace,
        policy: &Policy,
    ) -> Result<Made, SlotError> {
        let slot = SlotRules {
            mac,
            ends: self.ranges.ends(index),
            connections_max: self.connections_max,
        };
        let text = rules::slot(&slot, policy, self.ranges);
        let path = self.path(index);
        self.nft(&namespace, move |nft| nft::apply(&nft, &text))
            .await
            .map_err(|source| SlotError::Namespace { path, source })?
            .map_err(|source| SlotError::Rules {
                slot: index,
                source,
            })?;
        step("rules");
        self.listen(index, mac, namespace).await
    }

    async fn listen(&self, index: u32, mac: Mac, namespace: Namespace) -> Result<Made, SlotError> {
        let listener = namespace.run(Listener::open).await;
        let listener = listener.map_err(|source| SlotError::Log {
            slot: index,
            source,
        })?;
        let log = tokio::spawn(listener.listen(index, self.events.clone()));
        Ok(Made {
            index,
            mac,
            namespace,
            log,
        })
    }

    /// The way from the slot, whose namespace `links` is in, to the host.
    async fn link(&self, links: &Links, index: u32) -> io::Result<()> {
        let name = link_name(index);
        let Ends {
            host4,
            slot4,
            host6,
            slot6,
        } = self.ranges.ends(index);
        let (ours, theirs) = ((UPLINK, Mac::UPLINK), (name.as_str(), Mac::HOST));
        links.add_veth(ours, theirs, &self.host, MTU).await?;
        step("veth");
        // No address of its own making on the host: nobody would use it.
        let link_local = format!("/proc/sys/net/ipv6/conf/{name}/addr_gen_mode");
        std::fs::write(link_local, "1")?;
        let host = self.links.index(&name).await?;
        connect(
            &self.links,
            host,
            (host4, host6),
            (slot4, slot6),
            Mac::UPLINK,
        )
        .await?;
        step("host_end");
        let slot = links.index(UPLINK).await?;
        connect(links, slot, (slot4, slot6), (host4, host6), Mac::HOST).await?;
        links.add_default_routes(slot, host4, host6).await
    }
}

// === impl Made ===

impl Drop for Made {
    fn drop(&mut self) {
        self.log.abort();
    }
}

pub(super) fn link_name(index: u32) -> String {
    format!("{LINKS}{index}")
}

/// The number of the slot whose link on the host is called `name`.
pub(super) fn link_index(name: &str) -> Option<u32> {
    number(name.strip_prefix(LINKS)?)
}

/// As we write it: no sign, no zeros before it.
fn number(text: &str) -> Option<u32> {
    let number: u32 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

/// In the calling thread's namespace, before it has links, which take the defaults.
fn settings() -> io::Result<()> {
    for (name, value) in [
        ("ipv4/ip_forward", "1"),
        ("ipv6/conf/all/disable_ipv6", "0"),
        ("ipv6/conf/default/disable_ipv6", "0"),
        ("ipv6/conf/all/forwarding", "1"),
        ("ipv6/conf/default/addr_gen_mode", "1"),
        ("ipv6/conf/default/accept_ra", "0"),
        ("ipv4/conf/all/send_redirects", "0"),
        ("ipv4/conf/default/send_redirects", "0"),
    ] {
        std::fs::write(format!("/proc/sys/net/{name}"), value)?;
    }
    Ok(())
}

/// One end of the pair: its addresses, and the other end as its only neighbour.
async fn connect(
    links: &Links,
    link: u32,
    own: (Ipv4Addr, Ipv6Addr),
    other: (Ipv4Addr, Ipv6Addr),
    other_mac: Mac,
) -> io::Result<()> {
    links.add_address(link, own.0, 31).await?;
    links.add_address(link, own.1, 127).await?;
    links.up(link).await?;
    links.add_neighbour(link, other.0, other_mac).await?;
    links.add_neighbour(link, other.1, other_mac).await
}

async fn set_up_tap(links: &Links, guest: Mac) -> io::Result<()> {
    let tap = links.index(TAP).await?;
    links.set_mac_and_mtu(tap, Mac::GATEWAY, MTU).await?;
    links
        .add_address(tap, GATEWAY4, GUEST4_NET.prefix_len())
        .await?;
    links
        .add_address(tap, GATEWAY6, GUEST6_NET.prefix_len())
        .await?;
    links.up(tap).await?;
    links.add_neighbour(tap, GUEST4, guest).await?;
    links.add_neighbour(tap, GUEST6, guest).await
}
