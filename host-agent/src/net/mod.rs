//! The network of sandboxes: slots, made ahead of need, and their firewall.
//!
//! A slot is a network namespace with a TAP on the guest's side, a veth pair to
//! the host on the other, and nftables rules between. Every guest sees the same
//! addresses inside, so that a snapshot fits each slot. What a guest may reach is
//! decided in its slot; the host's own table only keeps slots apart from each
//! other and from the host. docs/networking.md shows it all.

mod counters;
mod denied;
pub mod dns;
mod host;
mod keeper;
mod links;
mod mac;
mod netns;
mod nft;
mod policy;
mod pool;
mod ranges;
mod resolver;
mod rules;
mod slot;

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};

pub use counters::{SlotCounters, Traffic};
pub use denied::Denied;
pub use host::StartError;
pub use mac::{Mac, MacError};
pub use nft::NftError;
pub use policy::{
    DomainId, DomainPattern, MAX_DNS_SERVERS, MAX_DOMAINS, MAX_PORT_RANGES, MAX_RULES, Policy,
    PolicyError, PolicyViolation, Ports, Protocol, RateLimit, Rule, parse_address, parse_cidr,
};
pub use pool::{LiveSlot, Lost, Network, NoSlot, Slot, Started};
pub use ranges::is_internet;
pub use resolver::ResolverSockets;
pub use slot::SlotError;

pub(crate) use ranges::Ranges;

/// What a guest has, in every slot.
pub const GUEST4: Ipv4Addr = Ipv4Addr::new(172, 30, 0, 2);
pub const GUEST6: Ipv6Addr = Ipv6Addr::new(0xfd5b, 0, 0, 0, 0, 0, 0, 2);
/// Its gateway and its resolver, whose Ethernet address is [`Mac::GATEWAY`].
pub const GATEWAY4: Ipv4Addr = Ipv4Addr::new(172, 30, 0, 1);
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd5b, 0, 0, 0, 0, 0, 0, 1);
pub const GUEST4_NET: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(172, 30, 0, 0), 30);
pub const GUEST6_NET: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfd5b, 0, 0, 0, 0, 0, 0, 0), 64);
/// In bytes, of every link.
pub const MTU: u32 = 1500;

/// The links of a slot, in its namespace.
const TAP: &str = "tap0";
const UPLINK: &str = "uplink";
/// What the host's ends are called, before the number of their slot.
const LINKS: &str = "sb";
