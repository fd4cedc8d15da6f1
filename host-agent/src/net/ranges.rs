//! Which addresses slots have on the host's side.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::config::Network as Config;

/// What is not the internet: this network, private use, shared with a carrier,
/// loopback, link-local and metadata, protocol assignments, benchmarks, multicast
/// and reserved (IANA's special-purpose registry, RFC 6890).
pub(super) const NOT_INTERNET4: [Ipv4Net; 10] = [
    ipv4(0, 0, 8),
    ipv4(10, 0, 8),
    ipv4(100, 64, 10),
    ipv4(127, 0, 8),
    ipv4(169, 254, 16),
    ipv4(172, 16, 12),
    ipv4(192, 0, 24),
    ipv4(192, 168, 16),
    ipv4(198, 18, 15),
    ipv4(224, 0, 3),
];
/// All but global unicast, which is 2000::/3, and in that Teredo and 6to4, whose
/// addresses have IPv4 addresses in them.
pub(super) const NOT_INTERNET6: [Ipv6Net; 5] = [
    ipv6(0, 3),
    ipv6(0x2001, 32),
    ipv6(0x2002, 16),
    ipv6(0x4000, 2),
    ipv6(0x8000, 1),
];

/// The configured ranges, cut into pairs: /31 and /127, the host's end first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ranges {
    pub(crate) ipv4: Ipv4Net,
    pub(crate) ipv6: Ipv6Net,
}

/// The ends of one slot's veth pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ends {
    pub(super) host4: Ipv4Addr,
    pub(super) slot4: Ipv4Addr,
    pub(super) host6: Ipv6Addr,
    pub(super) slot6: Ipv6Addr,
}

/// Whether a guest may reach `address` as a part of the internet.
pub fn is_internet(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => !NOT_INTERNET4.iter().any(|net| net.contains(&address)),
        IpAddr::V6(address) => !NOT_INTERNET6.iter().any(|net| net.contains(&address)),
    }
}

const fn ipv4(first: u8, second: u8, prefix: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(first, second, 0, 0), prefix)
}

const fn ipv6(first: u16, prefix: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(first, 0, 0, 0, 0, 0, 0, 0), prefix)
}

// === impl Ranges ===

impl Ranges {
    pub(crate) fn new(config: &Config) -> Self {
        Self {
            ipv4: config.ipv4_range.trunc(),
            ipv6: config.ipv6_range.trunc(),
        }
    }

    /// How many slots have addresses in both ranges.
    pub(crate) fn slots(self) -> u64 {
        let pairs = |bits: u8| 1_u64 << bits.saturating_sub(1).min(32);
        let ipv4 = 32 - self.ipv4.prefix_len();
        let ipv6 = 128 - self.ipv6.prefix_len();
        match ipv4.min(ipv6) {
            0 => 0,
            bits => pairs(bits),
        }
    }

    /// Of slot `index`, which is less than [`Ranges::slots`].
    pub(super) fn ends(self, index: u32) -> Ends {
        let first4 = u32::from(self.ipv4.network()).wrapping_add(index.wrapping_mul(2));
        let first6 = u128::from(self.ipv6.network()) + u128::from(index) * 2;
        Ends {
            host4: first4.into(),
            slot4: (first4 | 1).into(),
            host6: first6.into(),
            slot6: (first6 | 1).into(),
        }
    }

    /// Whether `net` shares an address with a range. The whole internet, a default
    /// route, does not count.
    pub(super) fn overlap(self, net: IpNet) -> Option<IpNet> {
        if net.prefix_len() == 0 {
            return None;
        }
        let ours = match net {
            IpNet::V4(_) => IpNet::V4(self.ipv4),
            IpNet::V6(_) => IpNet::V6(self.ipv6),
        };
        (ours.contains(&net) || net.contains(&ours)).then_some(ours)
    }

    pub(super) fn contains(self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => self.ipv4.contains(&address),
            IpAddr::V6(address) => self.ipv6.contains(&address),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(ipv4: &str, ipv6: &str) -> Ranges {
        Ranges {
            ipv4: ipv4.parse().unwrap(),
            ipv6: ipv6.parse().unwrap(),
        }
    }

    #[test]
    fn every_slot_has_a_pair_in_both_ranges() {
        let all = ranges("10.213.0.0/16", "fd73::/64");
        assert_eq!(all.slots(), 32768);
        let last = all.ends(32767);
        assert_eq!(last.host4.to_string(), "10.213.255.254");
        assert_eq!(last.slot4.to_string(), "10.213.255.255");
        assert_eq!(last.slot6.to_string(), "fd73::ffff");
        assert_eq!(ranges("10.0.0.0/31", "fd73::/64").slots(), 1);
        assert_eq!(ranges("10.0.0.0/32", "fd73::/64").slots(), 0);
        assert_eq!(ranges("10.0.0.0/8", "fd73::/120").slots(), 128);
    }

    #[test]
    fn a_default_route_overlaps_nothing() {
        let all = ranges("10.213.0.0/16", "fd73::/64");
        let overlaps = |net: &str| all.overlap(net.parse().unwrap()).is_some();
        assert!(overlaps("10.0.0.0/8") && overlaps("10.213.7.0/24") && overlaps("fd73::7/128"));
        assert!(!overlaps("0.0.0.0/0") && !overlaps("::/0") && !overlaps("10.214.0.0/16"));
    }
}
