//! The link: what the kernel says of it, and the changes to it.

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage,
};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, Inet6DevConf, LinkAttribute, LinkExtentMask, LinkFlags,
    LinkLayerType, LinkMessage,
};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rustix::io::Errno;

use super::netlink::{Change, Netlink};
use super::spec::{Address, Mac, Network};

/// A network interface.
#[derive(Debug, Clone)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) is_up: bool,
    pub(super) mac: Vec<u8>,
    mtu: u32,
    /// None: the kernel has no IPv6, or not for this link.
    pub(super) ipv6: Option<Inet6DevConf>,
}

// === impl Link ===

impl Link {
    /// The first Ethernet interface.
    pub(super) fn find(netlink: &mut Netlink) -> io::Result<Option<Self>> {
        let links: Vec<LinkMessage> = netlink.ask(libc::RTM_GETLINK, NLM_F_DUMP, &request(0))?;
        let links = links.into_iter().filter(is_ethernet).map(Self::from);
        Ok(links.min_by_key(|link| link.index))
    }

    pub(super) fn read(netlink: &mut Netlink, index: u32) -> io::Result<Self> {
        let links: Vec<LinkMessage> = netlink.ask(libc::RTM_GETLINK, 0, &request(index))?;
        let link = links.into_iter().next().map(Self::from);
        link.ok_or_else(|| Errno::NODEV.into())
    }

    pub(super) fn turn_on_loopback() -> Change {
        let mut message = LinkMessage::default();
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        message.attributes = vec![LinkAttribute::IfName("lo".to_owned())];
        Change::new("loopback interface", libc::RTM_SETLINK, 0, &message)
    }

    pub(super) fn turn_off(&self) -> Change {
        let mut message = LinkMessage::default();
        message.header.index = self.index;
        message.header.change_mask = LinkFlags::Up;
        Change::new("network interface", libc::RTM_SETLINK, 0, &message)
    }

    /// Neither its kernel nor a program has turned it off.
    pub(super) fn has_ipv6(&self) -> bool {
        self.ipv6.is_some_and(|settings| settings.disable_ipv6 == 0)
    }

    pub(super) fn change_to(&self, wanted: &Network) -> Option<Change> {
        let mut message = LinkMessage::default();
        message.header.index = self.index;
        if self.mac != wanted.mac {
            let mac = LinkAttribute::Address(wanted.mac.to_vec());
            message.attributes.push(mac);
        }
        if self.mtu != wanted.mtu {
            message.attributes.push(LinkAttribute::Mtu(wanted.mtu));
        }
        if !self.is_up {
            message.header.flags = LinkFlags::Up;
            message.header.change_mask = LinkFlags::Up;
        }
        let is_so = message.attributes.is_empty() && self.is_up;
        let what = "interface's Ethernet address, MTU and state";
        (!is_so).then(|| Change::new(what, libc::RTM_SETLINK, 0, &message))
    }

    /// Usable at once: nobody else is on the link, so nobody is asked whether it has
    /// the same one.
    pub(super) fn add_address(&self, address: &Address) -> Change {
        let mut message = self.address(address);
        if address.ip.is_ipv6() {
            message.header.flags = AddressHeaderFlags::Nodad;
            let flags = AddressAttribute::Flags(AddressFlags::Nodad);
            message.attributes.push(flags);
        }
        let flags = NLM_F_CREATE | NLM_F_REPLACE;
        Change::new("addresses", libc::RTM_NEWADDR, flags, &message)
    }

    pub(super) fn remove_address(&self, address: &Address) -> Change {
        let message = self.address(address);
        let change = Change::new("former addresses", libc::RTM_DELADDR, 0, &message);
        change.forgiving(Errno::ADDRNOTAVAIL)
    }

    fn address(&self, address: &Address) -> AddressMessage {
        let mut message = AddressMessage::default();
        message.header.family = family(address.ip);
        message.header.prefix_len = address.prefix_length;
        message.header.index = self.index;
        message.attributes = vec![
            AddressAttribute::Local(address.ip),
            AddressAttribute::Address(address.ip),
        ];
        message
    }

    /// After those of other interfaces that are as good: a program has chosen them.
    pub(super) fn add_default_route(&self, gateway: IpAddr) -> Change {
        let mut message = RouteMessage::default();
        message.header.address_family = family(gateway);
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Static;
        message.header.scope = RouteScope::Universe;
        message.header.kind = RouteType::Unicast;
        message.header.flags = RouteFlags::Onlink;
        message.attributes = vec![
            RouteAttribute::Oif(self.index),
            RouteAttribute::Gateway(gateway.into()),
        ];
        let flags = NLM_F_CREATE | NLM_F_APPEND;
        let change = Change::new("default routes", libc::RTM_NEWROUTE, flags, &message);
        change.forgiving(Errno::EXIST)
    }

    pub(super) fn add_neighbour(&self, ip: IpAddr, mac: Mac) -> Change {
        let mut message = NeighbourMessage::default();
        message.header.family = family(ip);
        message.header.ifindex = self.index;
        message.header.state = NeighbourState::Permanent;
        message.attributes = vec![
            NeighbourAttribute::Destination(ip.into()),
            NeighbourAttribute::LinkLayerAddress(mac.to_vec()),
        ];
        let flags = NLM_F_CREATE | NLM_F_REPLACE;
        Change::new(
            "gateways' Ethernet address",
            libc::RTM_NEWNEIGH,
            flags,
            &message,
        )
    }
}

impl From<LinkMessage> for Link {
    fn from(message: LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            is_up: message.header.flags.contains(LinkFlags::Up),
            mac: Vec::new(),
            mtu: 0,
            ipv6: None,
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Address(mac) => link.mac = mac,
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::AfSpecUnspec(families) => link.ipv6 = ipv6_settings(families),
                _ => {}
            }
        }
        link
    }
}

/// For one link or, with the number 0, all.
fn request(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = vec![LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])];
    message
}

fn is_ethernet(message: &LinkMessage) -> bool {
    let is_loopback = message.header.flags.contains(LinkFlags::Loopback);
    message.header.link_layer_type == LinkLayerType::Ether && !is_loopback
}

fn ipv6_settings(families: Vec<AfSpecUnspec>) -> Option<Inet6DevConf> {
    families.into_iter().find_map(|family| match family {
        AfSpecUnspec::Inet6(attributes) => attributes.into_iter().find_map(|attribute| {
            let AfSpecInet6::DevConf(settings) = attribute else {
                return None;
            };
            Some(settings)
        }),
        _ => None,
    })
}

fn family(ip: IpAddr) -> AddressFamily {
    match ip {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}
