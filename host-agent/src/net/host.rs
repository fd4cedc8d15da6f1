//! Taking over the host's part: what must be so before there can be slots.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};

use ipnet::IpNet;

use super::nft::NftError;
use super::slot::{Maker, SlotError, link_index};
use super::{LINKS, netns, rules};

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(
        "another soulboxd keeps the network of this host; stop it, or set network.enabled = false here"
    )]
    AnotherDaemon,
    #[error(
        "whether another soulboxd keeps this network cannot be told; see the limit on open files"
    )]
    Lock { source: io::Error },
    #[error(
        "/dev/net/tun cannot be opened; load the module tun, and run soulboxd as root or with CAP_NET_ADMIN"
    )]
    Tun { source: io::Error },
    #[error("{folder} cannot hold network namespaces; soulboxd needs root or CAP_SYS_ADMIN")]
    Folder {
        folder: &'static str,
        source: io::Error,
    },
    #[error("the host's links and routes cannot be read over netlink")]
    Netlink { source: io::Error },
    #[error(
        "{range} overlaps {net}, which this host has {what}; set network.ipv4_range and network.ipv6_range to ranges that it does not use"
    )]
    Overlap {
        range: IpNet,
        net: IpNet,
        what: String,
    },
    #[error(
        "the host has a link called {name}, which the firewall of sandboxes would rule over; rename it: names with {LINKS} at the start are soulboxd's"
    )]
    StrangeLink { name: String },
    #[error("{setting} cannot be set to {value}; set it with sysctl, or run soulboxd as root")]
    Setting {
        setting: String,
        value: &'static str,
        source: io::Error,
    },
    #[error(
        "a thread cannot be started in the host's network namespace; see the limits on processes"
    )]
    Enter { source: io::Error },
    #[error("the host's firewall cannot be set up: {source}")]
    Rules { source: NftError },
    #[error("what an earlier soulboxd has left cannot be removed: {source}")]
    Strays { source: SlotError },
    #[error("no slot can be made: {source}")]
    Slot { source: SlotError },
}

/// Held as long as this daemon keeps the network of the namespace it runs in.
///
/// Abstract addresses belong to a network namespace, and the kernel frees them
/// with their process: exactly as far and as long as this is to hold.
pub(super) fn lock() -> Result<UnixListener, StartError> {
    SocketAddr::from_abstract_name("soulbox-network")
        .and_then(|address| UnixListener::bind_addr(&address))
        .map_err(|source| match source.kind() {
            io::ErrorKind::AddrInUse => StartError::AnotherDaemon,
            _ => StartError::Lock { source },
        })
}

/// What can be found out without changing anything.
pub(super) async fn check(maker: &Maker) -> Result<(), StartError> {
    netns::probe_tap().map_err(|source| StartError::Tun { source })?;
    let netlink = |source| StartError::Netlink { source };
    let links = maker.links.all().await.map_err(netlink)?;
    let mut ours = HashSet::new();
    for link in &links {
        if link.is_veth && link_index(&link.name).is_some() {
            ours.insert(link.index);
        } else if link.name.starts_with(LINKS) {
            return Err(StartError::StrangeLink {
                name: link.name.clone(),
            });
        }
    }
    let name = |index| {
        let link = links.iter().find(|link| Some(link.index) == index);
        link.map_or("a route to".to_owned(), |link| {
            format!("a route to on {}", link.name)
        })
    };
    for (net, link) in maker.links.destinations().await.map_err(netlink)? {
        if link.is_some_and(|link| ours.contains(&link)) {
            continue;
        }
        if let Some(range) = maker.ranges.overlap(net) {
            let what = name(link);
            return Err(StartError::Overlap { range, net, what });
        }
    }
    Ok(())
}

/// Removes every slot but those of `live`, whoever has left it and in whatever state.
pub(super) async fn remove_strays(maker: &Maker, live: &HashSet<u32>) -> Result<usize, StartError> {
    let folder = |source| StartError::Folder {
        folder: netns::FOLDER,
        source,
    };
    netns::prepare_folder().map_err(folder)?;
    let netlink = |source| StartError::Netlink { source };
    let links = maker.links.all().await.map_err(netlink)?;
    let numbers = links.iter().filter_map(|link| link_index(&link.name));
    let mut removed: HashSet<u32> = numbers.filter(|index| !live.contains(index)).collect();
    // All names first, so that the kernel clears the namespaces away together.
    for entry in std::fs::read_dir(netns::FOLDER).map_err(folder)?.flatten() {
        let name = entry.file_name();
        let index = name.to_str().and_then(|name| maker.namespace_index(name));
        let Some(index) = index.filter(|index| !live.contains(index)) else {
            continue;
        };
        let unnamed = maker.unname(index);
        unnamed.map_err(|source| StartError::Strays { source })?;
        removed.insert(index);
    }
    for index in &removed {
        let unmade = maker.unmake(*index).await;
        unmade.map_err(|source| StartError::Strays { source })?;
    }
    Ok(removed.len())
}

/// Turns forwarding on where it is off.
pub(super) fn forward() -> Result<(), StartError> {
    turn_on("/proc/sys/net/ipv4/ip_forward", "1")?;
    let ipv6 = "/proc/sys/net/ipv6/conf/all/forwarding";
    if is(ipv6, "1") {
        return Ok(());
    }
    // A host that forwards no longer takes its default route from a router, unless
    // it is told to: it would lose its network.
    for entry in std::fs::read_dir("/proc/sys/net/ipv6/conf")
        .into_iter()
        .flatten()
        .flatten()
    {
        let setting = entry.path().join("accept_ra");
        let setting = setting.to_string_lossy();
        if is(&setting, "1") {
            turn_on(&setting, "2")?;
        }
    }
    turn_on(ipv6, "1")
}

fn is(setting: &str, value: &str) -> bool {
    std::fs::read_to_string(setting).is_ok_and(|text| text.trim() == value)
}

fn turn_on(setting: &str, value: &'static str) -> Result<(), StartError> {
    if is(setting, value) {
        return Ok(());
    }
    std::fs::write(setting, value).map_err(|source| StartError::Setting {
        setting: setting.to_owned(),
        value,
        source,
    })?;
    tracing::info!(setting, value, "set, because sandboxes need it");
    Ok(())
}

pub(super) async fn install_rules(maker: &Maker) -> Result<(), StartError> {
    let text = rules::host(maker.ranges);
    let set = maker.set_host_rules(text).await;
    set.map_err(|source| StartError::Enter { source })?
        .map_err(|source| StartError::Rules { source })
}

/// Whether a domain may open `address` at all. The rules would deny it anyhow.
pub(super) fn may_open(maker: &Maker, address: IpAddr) -> bool {
    let unicast = !(address.is_unspecified() || address.is_loopback() || address.is_multicast());
    unicast && !maker.ranges.contains(address)
}
