//! What the interface has been given, and what of that has to change.

use std::io;
use std::net::IpAddr;

use netlink_packet_core::NLM_F_DUMP;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteType,
};
use rustix::io::Errno;

use super::link::Link;
use super::netlink::{Change, Netlink};
use super::spec::{Address, Network, is_of_a_mac, link_local};

/// The prefix of every link-local address that the kernel makes.
const LINK_LOCAL_PREFIX_LENGTH: u8 = 64;

/// The link, and what it has been given.
#[derive(Debug)]
pub(super) struct Interface {
    link: Link,
    addresses: Vec<Address>,
    default_routes: Vec<RouteMessage>,
    /// Those that need not be asked for.
    neighbours: Vec<(IpAddr, Vec<u8>)>,
}

// === impl Interface ===

impl Interface {
    /// All that [`Self::changes_to`] has to know.
    pub(super) fn read(netlink: &mut Netlink, link: Link, wanted: &Network) -> io::Result<Self> {
        let mut request = AddressMessage::default();
        request.header.index = link.index;
        let addresses = netlink.ask(libc::RTM_GETADDR, NLM_F_DUMP, &request)?;

        let mut default_routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            if family == AddressFamily::Inet || link.has_ipv6() {
                let mut request = RouteMessage::default();
                request.header.address_family = family;
                request.attributes.push(RouteAttribute::Oif(link.index));
                let routes = netlink.ask(libc::RTM_GETROUTE, NLM_F_DUMP, &request)?;
                default_routes.extend(routes.into_iter().filter(is_default));
            }
        }

        let mut neighbours = Vec::new();
        if wanted.gateway_mac.is_some() {
            let mut request = NeighbourMessage::default();
            let of_link = NeighbourAttribute::IfIndex(link.index);
            request.attributes.push(of_link);
            neighbours = netlink.ask(libc::RTM_GETNEIGH, NLM_F_DUMP, &request)?;
        }
        Ok(Self {
            addresses: addresses.iter().filter_map(address_of).collect(),
            default_routes,
            neighbours: neighbours.iter().filter_map(permanent).collect(),
            link,
        })
    }

    /// What makes of this what is wanted, in an order in which nothing undoes what
    /// was before it: with its Ethernet address a link loses all neighbours, with
    /// its last IPv4 address its routes, and with the first one of a subnet the
    /// others of that subnet.
    pub(super) fn changes_to(&self, wanted: &Network) -> Vec<Change> {
        let link = &self.link;
        let possible = |ip: &IpAddr| ip.is_ipv4() || link.has_ipv6();
        let own = Address {
            ip: link_local(wanted.mac).into(),
            prefix_length: LINK_LOCAL_PREFIX_LENGTH,
        };
        let mut addresses = wanted.addresses.clone();
        addresses.retain(|address| possible(&address.ip));
        let is_kept = |address: &&Address| {
            addresses.contains(address) || **address == own || is_of_nobody(address.ip)
        };
        let (kept, stale): (Vec<&Address>, Vec<&Address>) =
            self.addresses.iter().partition(is_kept);
        let loses_ipv4 = stale.iter().any(|address| address.ip.is_ipv4());
        // The kernel makes one when the link comes up, but no other when the
        // Ethernet address changes.
        if stale.iter().any(|address| is_link_local(address.ip)) {
            addresses.push(own);
        }
        let is_lost = |ip: IpAddr| loses_ipv4 && ip.is_ipv4();

        let mut changes = Vec::new();
        changes.extend(link.change_to(wanted));
        changes.extend(stale.iter().map(|address| link.remove_address(address)));
        addresses.retain(|address| is_lost(address.ip) || !kept.contains(&address));
        changes.extend(addresses.iter().map(|address| link.add_address(address)));

        let mut gateways = wanted.gateways.clone();
        gateways.retain(possible);
        let is_stale =
            |route: &&RouteMessage| !gateway(route).is_some_and(|ip| gateways.contains(&ip));
        let stale = self.default_routes.iter().filter(is_stale);
        changes.extend(stale.map(remove_route));
        for ip in gateways {
            let is_there = self
                .default_routes
                .iter()
                .any(|route| gateway(route) == Some(ip));
            if is_lost(ip) || !is_there {
                changes.push(link.add_default_route(ip));
            }
            let Some(mac) = wanted.gateway_mac else {
                continue;
            };
            let is_there = self
                .neighbours
                .iter()
                .any(|known| *known == (ip, mac.to_vec()));
            if link.mac != wanted.mac || !is_there {
                changes.push(link.add_neighbour(ip, mac));
            }
        }
        changes
    }
}

fn remove_route(route: &RouteMessage) -> Change {
    let mut message = route.clone();
    message.header.flags = RouteFlags::empty();
    message.attributes.retain(|attribute| {
        use RouteAttribute::{Gateway, Oif, Priority, Via};
        matches!(attribute, Gateway(_) | Oif(_) | Priority(_) | Via(_))
    });
    let change = Change::new("former default routes", libc::RTM_DELROUTE, 0, &message);
    change.forgiving(Errno::SRCH)
}

/// An address of this guest: of IPv4 the local one, which another may face.
fn address_of(message: &AddressMessage) -> Option<Address> {
    let attributes = || message.attributes.iter();
    let local = attributes().find_map(|attribute| match attribute {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    let address = attributes().find_map(|attribute| match attribute {
        AddressAttribute::Address(ip) => Some(*ip),
        _ => None,
    });
    Some(Address {
        ip: local.or(address)?,
        prefix_length: message.header.prefix_len,
    })
}

fn is_default(route: &RouteMessage) -> bool {
    let header = &route.header;
    let is_multipath = |attribute: &_| matches!(attribute, RouteAttribute::MultiPath(_));
    header.destination_prefix_length == 0
        && header.table == RouteHeader::RT_TABLE_MAIN
        && header.kind == RouteType::Unicast
        && !route.attributes.iter().any(is_multipath)
}

fn gateway(route: &RouteMessage) -> Option<IpAddr> {
    route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Gateway(RouteAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
            RouteAttribute::Gateway(RouteAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
            _ => None,
        })
}

fn permanent(message: &NeighbourMessage) -> Option<(IpAddr, Vec<u8>)> {
    let (mut ip, mut mac) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(of)) => ip = Some((*of).into()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(of)) => ip = Some((*of).into()),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = Some(bytes.clone()),
            _ => {}
        }
    }
    (message.header.state == NeighbourState::Permanent).then_some((ip?, mac?))
}

fn is_link_local(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

/// Link-local, and says nothing of the interface that had it before.
fn is_of_nobody(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local() && !is_of_a_mac(ip))
}
