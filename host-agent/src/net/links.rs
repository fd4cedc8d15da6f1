//! Links, addresses, routes and neighbours, over rtnetlink.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd as _, AsRawFd as _};

use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo, LinkMessage,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use rtnetlink::packet_route::neighbour::NeighbourState;
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder};
use tokio::task::JoinHandle;
use tokio_stream::StreamExt as _;

use super::mac::Mac;
use super::netns::Namespace;

/// A netlink socket, in the namespace of the thread that opened it.
pub(super) struct Links {
    handle: Handle,
    connection: JoinHandle<()>,
}

/// A link of this namespace.
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) is_veth: bool,
}

// === impl Links ===

impl Links {
    pub(super) fn open() -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        Ok(Self {
            handle,
            connection: tokio::spawn(connection),
        })
    }

    pub(super) async fn all(&self) -> io::Result<Vec<Link>> {
        let mut found = Vec::new();
        let mut links = self.handle.link().get().execute();
        while let Some(link) = links.next().await {
            found.push(Link::from(link.map_err(failed)?));
        }
        Ok(found)
    }

    /// The number of the link `name`, where there is one.
    pub(super) async fn find(&self, name: &str) -> io::Result<Option<u32>> {
        let mut links = self
            .handle
            .link()
            .get()
            .match_name(name.to_owned())
            .execute();
        match links.next().await {
            Some(Ok(link)) => Ok(Some(link.header.index)),
            None => Ok(None),
            Some(Err(error)) => match failed(error) {
                error if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
                error => Err(error),
            },
        }
    }

    /// The number of the link `name`, which must be there.
    pub(super) async fn index(&self, name: &str) -> io::Result<u32> {
        let missing = || io::Error::new(io::ErrorKind::NotFound, format!("no link {name}"));
        self.find(name).await?.ok_or_else(missing)
    }

    /// A pair, one end here, the other in the namespace `theirs`. Both go with
    /// either.
    pub(super) async fn add_veth(
        &self,
        (name, mac): (&str, Mac),
        (peer, peer_mac): (&str, Mac),
        theirs: &Namespace,
        mtu: u32,
    ) -> io::Result<()> {
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(peer)
            .address(peer_mac.bytes().to_vec())
            .mtu(mtu)
            .setns_by_fd(theirs.as_fd().as_raw_fd())
            .build();
        let message = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
            .name(name)
            .address(mac.bytes().to_vec())
            .mtu(mtu)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .build();
        let added = self.handle.link().add(message).execute().await;
        added.map_err(failed)
    }

    pub(super) async fn up(&self, index: u32) -> io::Result<()> {
        let message = LinkMessageBuilder::<LinkUnspec>::new()
            .index(index)
            .up()
            .build();
        self.change(message).await
    }

    pub(super) async fn set_mac_and_mtu(&self, index: u32, mac: Mac, mtu: u32) -> io::Result<()> {
        let message = LinkMessageBuilder::<LinkUnspec>::new()
            .index(index)
            .address(mac.bytes().to_vec())
            .mtu(mtu)
            .build();
        self.change(message).await
    }

    async fn change(&self, message: LinkMessage) -> io::Result<()> {
        let changed = self.handle.link().set(message).execute().await;
        changed.map_err(failed)
    }

    pub(super) async fn delete(&self, index: u32) -> io::Result<()> {
        match self
            .handle
            .link()
            .del(index)
            .execute()
            .await
            .map_err(failed)
        {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            deleted => deleted,
        }
    }

    /// Usable at once: nobody else is on the link, so nobody is asked.
    pub(super) async fn add_address(
        &self,
        link: u32,
        address: impl Into<IpAddr>,
        prefix: u8,
    ) -> io::Result<()> {
        let mut request = self.handle.address().add(link, address.into(), prefix);
        let message = request.message_mut();
        message.header.flags |= AddressHeaderFlags::Nodad;
        message
            .attributes
            .push(AddressAttribute::Flags(AddressFlags::Nodad));
        request.replace().execute().await.map_err(failed)
    }

    /// Never asked for and never forgotten. It does not count among those that
    /// the host's neighbour table has room for (`gc_thresh3`), which is one for all
    /// namespaces and smaller than the number of slots.
    pub(super) async fn add_neighbour(
        &self,
        link: u32,
        address: impl Into<IpAddr>,
        mac: Mac,
    ) -> io::Result<()> {
        let request = self.handle.neighbours().add(link, address.into());
        let request = request
            .link_layer_address(&mac.bytes())
            .state(NeighbourState::Permanent)
            .replace();
        request.execute().await.map_err(failed)
    }

    pub(super) async fn add_default_routes(
        &self,
        link: u32,
        ipv4: Ipv4Addr,
        ipv6: Ipv6Addr,
    ) -> io::Result<()> {
        let routes = [
            RouteMessageBuilder::<Ipv4Addr>::new()
                .output_interface(link)
                .gateway(ipv4)
                .build(),
            RouteMessageBuilder::<Ipv6Addr>::new()
                .output_interface(link)
                .gateway(ipv6)
                .build(),
        ];
        for route in routes {
            let added = self.handle.route().add(route).replace().execute().await;
            added.map_err(failed)?;
        }
        Ok(())
    }

    /// All destinations of all routing tables, addresses of this host among them,
    /// and the link that each leads to.
    pub(super) async fn destinations(&self) -> io::Result<Vec<(IpNet, Option<u32>)>> {
        let mut found = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            let mut routes = self.handle.route().get(message).execute();
            while let Some(route) = routes.next().await {
                found.extend(destination(&route.map_err(failed)?));
            }
        }
        Ok(found)
    }

    /// Whether what the host sends to `address` goes to the host itself.
    pub(super) async fn is_own(&self, address: IpAddr) -> io::Result<bool> {
        let message = match address {
            IpAddr::V4(address) => RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(address, 32)
                .build(),
            IpAddr::V6(address) => RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(address, 128)
                .build(),
        };
        match self.handle.route().get(message).execute().next().await {
            Some(Ok(route)) => Ok(matches!(
                route.header.kind,
                RouteType::Local | RouteType::Broadcast | RouteType::Anycast | RouteType::Multicast
            )),
            None => Ok(false),
            // No way there, as on a host without IPv6.
            Some(Err(error)) => match failed(error) {
                error if error.raw_os_error() == Some(libc::ENETUNREACH) => Ok(false),
                error => Err(error),
            },
        }
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

// === impl Link ===

impl From<LinkMessage> for Link {
    fn from(message: LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            is_veth: false,
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::LinkInfo(infos) => {
                    link.is_veth = infos.contains(&LinkInfo::Kind(InfoKind::Veth));
                }
                _ => {}
            }
        }
        link
    }
}

fn destination(route: &RouteMessage) -> Option<(IpNet, Option<u32>)> {
    let mut address = None;
    let mut link = None;
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(to)) => address = Some(IpAddr::V4(*to)),
            RouteAttribute::Destination(RouteAddress::Inet6(to)) => address = Some(IpAddr::V6(*to)),
            RouteAttribute::Oif(index) => link = Some(*index),
            _ => {}
        }
    }
    let net = IpNet::new(address?, route.header.destination_prefix_length).ok()?;
    Some((net, link))
}

/// The kernel's answer as the error that it is.
fn failed(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}
