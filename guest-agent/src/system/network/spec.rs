//! The network that the host gives the guest, checked before anything is done.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use soulbox_proto::guest::v1::{self as proto, InterfaceAddress};

use crate::spec::Violations;

/// A [`proto::Network`] whose every field is known to be sound.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Network {
    pub(super) mac: Mac,
    pub(super) mtu: u32,
    /// One of a family at most.
    pub(super) addresses: Vec<Address>,
    /// One of a family at most, and of one that has an address.
    pub(super) gateways: Vec<IpAddr>,
    pub(super) gateway_mac: Option<Mac>,
    resolvers: Vec<IpAddr>,
}

/// An Ethernet address of one host.
pub(super) type Mac = [u8; 6];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) ip: IpAddr,
    pub(super) prefix_length: u8,
}

/// Of IPv4, and of IPv6 (RFC 8200, section 5).
const MIN_MTU: u32 = 68;
const MIN_MTU_IPV6: u32 = 1280;
const MAX_MTU: u32 = 65_535;
/// resolv.conf(5): MAXNS.
const MAX_RESOLVERS: usize = 3;

// === impl Network ===

impl Network {
    /// Adds what is wrong to `violations`; then what is returned is of no use.
    pub(crate) fn check(network: &proto::Network, violations: &mut Violations) -> Self {
        let mac = mac_of(&network.mac).unwrap_or_else(|problem| {
            violations.add("network.mac", problem);
            Mac::default()
        });
        let gateway_mac = Some(&network.gateway_mac).filter(|mac| !mac.is_empty());
        let gateway_mac = gateway_mac.and_then(|mac| {
            let checked = mac_of(mac);
            checked
                .map_err(|problem| violations.add("network.gateway_mac", problem))
                .ok()
        });
        let addresses = addresses_of(&network.addresses, violations);
        let min_mtu = match addresses.iter().any(|address| address.ip.is_ipv6()) {
            true => MIN_MTU_IPV6,
            false => MIN_MTU,
        };
        if !(min_mtu..=MAX_MTU).contains(&network.mtu) {
            let problem = format!("must be {min_mtu} to {MAX_MTU}: IPv6 needs {MIN_MTU_IPV6}");
            violations.add("network.mtu", problem);
        }
        let gateways = hosts_of("network.gateways", &network.gateways, violations);
        for (index, gateway) in gateways.iter().enumerate() {
            let is_kin = |other: &IpAddr| is_kin(*other, *gateway);
            let is_second = gateways[..index].iter().any(is_kin);
            if is_second || !addresses.iter().any(|own| is_kin(&own.ip)) {
                let problem = "must be the only one of its family, which must have an address";
                violations.add("network.gateways", problem);
            }
        }
        let resolvers = hosts_of("network.resolvers", &network.resolvers, violations);
        if resolvers.len() > MAX_RESOLVERS {
            violations.add("network.resolvers", "must be at most three");
        }
        Self {
            mac,
            mtu: network.mtu,
            addresses,
            gateways,
            gateway_mac,
            resolvers,
        }
    }

    /// What resolv.conf(5) has to hold.
    pub(crate) fn resolv_conf(&self) -> String {
        let mut text = String::new();
        for resolver in &self.resolvers {
            // Writing to a string does not fail.
            let _ = writeln!(text, "nameserver {resolver}");
        }
        text
    }
}

fn mac_of(bytes: &[u8]) -> Result<Mac, &'static str> {
    let mac = Mac::try_from(bytes).ok();
    mac.filter(|mac| mac[0] & 1 == 0 && *mac != Mac::default())
        .ok_or("must be the six bytes of one host's Ethernet address")
}

fn addresses_of(addresses: &[InterfaceAddress], violations: &mut Violations) -> Vec<Address> {
    let mut checked: Vec<Address> = Vec::new();
    for (index, address) in addresses.iter().enumerate() {
        let field = |name| format!("network.addresses[{index}].{name}");
        let Some(ip) = host_of(&address.address).filter(|ip| !ip.is_loopback()) else {
            let problem = "must be the four or sixteen bytes of one host's IP address";
            violations.add(field("address"), problem);
            continue;
        };
        if checked.iter().any(|other| is_kin(other.ip, ip)) {
            violations.add(field("address"), "must be the only one of its family");
        }
        let bits = if ip.is_ipv4() { 32 } else { 128 };
        let length = u8::try_from(address.prefix_length).ok();
        let Some(prefix_length) = length.filter(|length| (1..=bits).contains(length)) else {
            violations.add(field("prefix_length"), format!("must be 1 to {bits}"));
            continue;
        };
        checked.push(Address { ip, prefix_length });
    }
    checked
}

fn hosts_of(field: &str, hosts: &[bytes::Bytes], violations: &mut Violations) -> Vec<IpAddr> {
    let mut checked = Vec::new();
    for (index, host) in hosts.iter().enumerate() {
        match host_of(host) {
            Some(host) => checked.push(host),
            None => violations.add(
                format!("{field}[{index}]"),
                "must be the four or sixteen bytes of one host's IP address",
            ),
        }
    }
    checked
}

/// An address that one host can have.
fn host_of(bytes: &[u8]) -> Option<IpAddr> {
    let ip = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        16 => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?),
        _ => return None,
    };
    let is_everyone = ip == Ipv4Addr::BROADCAST;
    let is_mapped = ip.to_canonical() != ip;
    (!ip.is_unspecified() && !ip.is_multicast() && !is_everyone && !is_mapped).then_some(ip)
}

fn is_kin(one: IpAddr, other: IpAddr) -> bool {
    one.is_ipv4() == other.is_ipv4()
}

/// The link-local address of an interface with this Ethernet address (RFC 4291,
/// appendix A).
pub(super) fn link_local(mac: Mac) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    let mut bytes = [0; 16];
    bytes[..2].copy_from_slice(&[0xfe, 0x80]);
    bytes[8..].copy_from_slice(&[a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
    Ipv6Addr::from(bytes)
}

/// Whether a link-local address comes from the Ethernet address of some interface.
pub(super) fn is_of_a_mac(ip: Ipv6Addr) -> bool {
    let bytes = ip.octets();
    bytes[..8] == [0xfe, 0x80, 0, 0, 0, 0, 0, 0] && bytes[11..13] == [0xff, 0xfe]
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;

    fn sound() -> proto::Network {
        proto::Network {
            mac: vec![2, 0, 0, 0, 0, 1].into(),
            mtu: 1500,
            addresses: vec![
                InterfaceAddress {
                    address: vec![172, 30, 0, 2].into(),
                    prefix_length: 30,
                },
                InterfaceAddress {
                    address: bytes_of("fd5b::2"),
                    prefix_length: 64,
                },
            ],
            gateways: vec![vec![172, 30, 0, 1].into(), bytes_of("fd5b::1")],
            gateway_mac: vec![2, 0, 0, 0, 0, 2].into(),
            resolvers: vec![vec![172, 30, 0, 1].into(), bytes_of("fd5b::1")],
        }
    }

    fn bytes_of(ip: &str) -> Bytes {
        let ip: Ipv6Addr = ip.parse().unwrap();
        ip.octets().to_vec().into()
    }

    /// The fields that are wrong after `spoil`.
    fn fields(spoil: impl FnOnce(&mut proto::Network)) -> Vec<String> {
        let mut network = sound();
        spoil(&mut network);
        let mut violations = Violations::default();
        Network::check(&network, &mut violations);
        let fields = violations.0.into_iter().map(|violation| violation.field);
        fields.collect()
    }

    #[test]
    fn what_is_sound_passes() {
        assert_eq!(fields(|_| ()), [""; 0]);
        assert_eq!(fields(|network| network.gateway_mac.clear()), [""; 0]);
        assert_eq!(fields(|network| network.gateways.clear()), [""; 0]);
        assert_eq!(fields(|network| network.mtu = 1280), [""; 0]);
        let ipv4 = fields(|network| {
            network.addresses.pop();
            network.gateways.pop();
            network.mtu = 68;
        });
        assert_eq!(ipv4, [""; 0]);
        let nothing = fields(|network| {
            network.addresses.clear();
            network.gateways.clear();
            network.resolvers.clear();
        });
        assert_eq!(nothing, [""; 0]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for mac in [
            &[2, 0, 0, 0, 0][..],
            &[0; 6],
            &[1, 0, 0x5e, 0, 0, 1],
            &[0xff; 6],
            &[2; 7],
        ] {
            let mac = Bytes::copy_from_slice(mac);
            assert_eq!(fields(|network| network.mac = mac.clone()), ["network.mac"]);
            let of_gateway = fields(|network| network.gateway_mac = mac);
            assert_eq!(of_gateway, ["network.gateway_mac"]);
        }
        for mtu in [0, 67, 1279, 65_536, u32::MAX] {
            assert_eq!(
                fields(|network| network.mtu = mtu),
                ["network.mtu"],
                "{mtu}"
            );
        }
        let hosts = [
            &[10, 0, 0][..],
            &[],
            &[0; 4],
            &[224, 0, 0, 1],
            &[255; 4],
            &[0; 16],
            &[0; 17],
        ];
        for host in hosts.map(Bytes::copy_from_slice) {
            let address = fields(|network| {
                network.gateways.pop();
                network.addresses[1].address = host.clone();
            });
            assert_eq!(address, ["network.addresses[1].address"], "{host:?}");
            let gateway = fields(|network| network.gateways[1] = host.clone());
            assert_eq!(gateway, ["network.gateways[1]"], "{host:?}");
            let resolver = fields(|network| network.resolvers[1] = host.clone());
            assert_eq!(resolver, ["network.resolvers[1]"], "{host:?}");
        }
        for (index, length) in [(0, 0), (0, 33), (1, 129), (1, 200), (1, u32::MAX)] {
            let length = fields(|network| {
                network.gateways.clear();
                network.addresses[index].prefix_length = length;
            });
            assert_eq!(
                length,
                [format!("network.addresses[{index}].prefix_length")]
            );
        }
        let loopback = fields(|network| {
            network.gateways.clear();
            network.addresses[1].address = bytes_of("::1");
        });
        assert_eq!(loopback, ["network.addresses[1].address"]);
    }

    #[test]
    fn there_is_one_of_a_family() {
        let third = fields(|network| {
            let mut address = network.addresses[0].clone();
            address.address = vec![10, 0, 0, 1].into();
            network.addresses.push(address);
        });
        assert_eq!(third, ["network.addresses[2].address"]);
        let second = fields(|network| network.gateways.push(vec![10, 0, 0, 1].into()));
        assert_eq!(second, ["network.gateways"]);
        let without_address = fields(|network| drop(network.addresses.pop()));
        assert_eq!(without_address, ["network.gateways"]);
        let resolvers = fields(|network| network.resolvers = vec![bytes_of("fd5b::1"); 4]);
        assert_eq!(resolvers, ["network.resolvers"]);
    }

    #[test]
    fn resolvers_are_lines() {
        let mut violations = Violations::default();
        let network = Network::check(&sound(), &mut violations);
        let text = "nameserver 172.30.0.1\nnameserver fd5b::1\n";
        assert_eq!(network.resolv_conf(), text);
    }

    #[test]
    fn a_link_local_address_tells_the_ethernet_address() {
        let own = link_local([0x02, 0x53, 0x42, 0, 0, 1]);
        assert_eq!(own.to_string(), "fe80::53:42ff:fe00:1");
        assert!(is_of_a_mac(own));
        for other in ["fe80::1", "fd5b::53:42ff:fe00:1", "fe80:1::53:42ff:fe00:1"] {
            assert!(!is_of_a_mac(other.parse().unwrap()), "{other}");
        }
    }

    fn any_host() -> impl Strategy<Value = Bytes> {
        let length = prop_oneof![Just(4), Just(16), 0..20_usize];
        let byte = prop_oneof![Just(0), Just(0xff), any::<u8>()];
        length
            .prop_flat_map(move |length| prop::collection::vec(byte.clone(), length))
            .prop_map(Bytes::from)
    }

    prop_compose! {
        fn any_network()(
            mac in prop::collection::vec(any::<u8>(), 5..8),
            mtu in prop_oneof![Just(1500), any::<u32>()],
            addresses in prop::collection::vec((any_host(), 0..140_u32), 0..4),
            gateways in prop::collection::vec(any_host(), 0..4),
            gateway_mac in prop::collection::vec(any::<u8>(), 0..8),
            resolvers in prop::collection::vec(any_host(), 0..5),
        ) -> proto::Network {
            let addresses = addresses.into_iter().map(|(address, prefix_length)| {
                InterfaceAddress { address, prefix_length }
            });
            proto::Network {
                mac: mac.into(),
                mtu,
                addresses: addresses.collect(),
                gateways,
                gateway_mac: gateway_mac.into(),
                resolvers,
            }
        }
    }

    proptest! {
        #[test]
        fn what_passes_is_whole_and_what_fails_says_where(network in any_network()) {
            let mut violations = Violations::default();
            let checked = Network::check(&network, &mut violations);
            if violations.0.is_empty() {
                prop_assert_eq!(&checked.mac[..], &network.mac[..]);
                prop_assert_eq!(checked.addresses.len(), network.addresses.len());
                prop_assert_eq!(checked.gateways.len(), network.gateways.len());
                prop_assert_eq!(checked.gateway_mac.is_none(), network.gateway_mac.is_empty());
                prop_assert_eq!(checked.resolv_conf().lines().count(), network.resolvers.len());
                prop_assert!(checked.addresses.len() <= 2 && checked.resolvers.len() <= 3);
            }
            for violation in violations.0 {
                prop_assert!(violation.field.starts_with("network."));
                prop_assert!(!violation.description.is_empty());
            }
        }
    }
}
