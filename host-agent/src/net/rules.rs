//! The text of the firewall: one table on the host, two in each slot.
//! docs/networking.md shows them as `nft list ruleset` prints them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::mac::Mac;
use super::policy::{DomainId, Policy, Ports, Protocol, Rule};
use super::ranges::{Ends, NOT_INTERNET4, NOT_INTERNET6, Ranges};
use super::{GATEWAY4, GATEWAY6, GUEST4, GUEST4_NET, GUEST6, GUEST6_NET, LINKS, TAP, UPLINK};

pub(super) const TABLE: &str = "soulbox";
/// The NFLOG group of denied packets, in each slot's namespace.
pub(super) const LOG_GROUP: u16 = 1;
/// Addresses that one domain may have opened at once, of each family.
const DOMAIN_ADDRESSES: usize = 4096;

/// Why a packet was dropped; each is a counter, and the prefix of its log.
pub(super) const REASONS: [&str; 6] = [
    "sandbox", "listed", "private", "internet", "protocol", "crowd",
];
/// Those of packets that were no attempt to reach anything allowed or not.
pub(super) const SILENT: [&str; 3] = ["invalid", "inbound", "gateway"];
/// Those of the table at the TAP itself.
pub(super) const AT_TAP: [&str; 3] = ["spoofed", "forged", "flood"];

/// What may be in the tables at once with what: one transaction.
#[derive(Debug, Clone, Copy)]
pub(super) struct SlotRules {
    pub(super) mac: Mac,
    pub(super) ends: Ends,
    pub(super) connections_max: u32,
}

/// The host's table, replaced whole. Chains of type nat see only the first packet
/// of a connection.
pub(super) fn host(ranges: Ranges) -> String {
    let Ranges { ipv4, ipv6 } = ranges;
    format!(
        r#"table inet {TABLE}
delete table inet {TABLE}
table inet {TABLE} {{
	chain prerouting {{
		type filter hook prerouting priority raw; policy accept;
		iifname "{LINKS}*" fib saddr . iif oif missing counter drop
	}}
	chain input {{
		type filter hook input priority filter; policy accept;
		iifname "{LINKS}*" ct direction reply ct state established,related accept
		iifname "{LINKS}*" counter drop
	}}
	chain forward {{
		type filter hook forward priority filter; policy accept;
		iifname "{LINKS}*" oifname "{LINKS}*" counter drop
		oifname "{LINKS}*" ct direction reply ct state established,related accept
		oifname "{LINKS}*" counter drop
	}}
	chain postrouting {{
		type nat hook postrouting priority srcnat; policy accept;
		ip saddr {ipv4} oifname != "{LINKS}*" masquerade
		ip6 saddr {ipv6} oifname != "{LINKS}*" masquerade
	}}
}}
"#
    )
}

/// Removes the host's table, where there is one.
pub(super) fn no_host() -> String {
    format!("table inet {TABLE}\ndelete table inet {TABLE}\n")
}

/// A slot's tables with `policy`, replacing what is there.
pub(super) fn slot(slot: &SlotRules, policy: &Policy, ranges: Ranges) -> String {
    let Ends {
        host4,
        slot4,
        host6,
        slot6,
    } = slot.ends;
    let mut text = String::with_capacity(8192);
    let _ = write!(
        text,
        r#"table inet {TABLE}
delete table inet {TABLE}
table netdev {TABLE}
delete table netdev {TABLE}
table inet {TABLE} {{
{counters}	counter sent {{ }}
	counter received {{ }}
	counter connections {{ }}
	chain forward {{
		type filter hook forward priority filter; policy drop;
		iifname "{TAP}" counter name sent
		ct state invalid counter name invalid drop
		ct status dnat goto pass
		iifname "{UPLINK}" ct state related goto pass
		iifname "{TAP}" ct direction original goto egress
		iifname "{UPLINK}" ct direction reply goto replies
		counter name inbound drop
	}}
	chain pass {{
		ct state new ct count over {crowd} goto deny_crowd
		oifname "{TAP}" counter name received
		accept
	}}
	chain refuse {{
		ct direction reply drop
		meta l4proto tcp reject with tcp reset
		reject with icmpx admin-prohibited
	}}
{denials}	chain egress {{
	}}
	chain replies {{
	}}
	chain input {{
		type filter hook input priority filter; policy drop;
		iifname "{TAP}" ip daddr {GATEWAY4} meta l4proto {{ tcp, udp }} th dport 53 accept
		iifname "{TAP}" ip6 daddr {GATEWAY6} meta l4proto {{ tcp, udp }} th dport 53 accept
		iifname "{TAP}" icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} accept
		iifname "{TAP}" icmp type echo-request limit rate 10/second accept
		iifname "{TAP}" icmpv6 type echo-request limit rate 10/second accept
		counter name gateway
		iifname "{TAP}" meta l4proto tcp reject with tcp reset
	}}
	chain output {{
		type filter hook output priority filter; policy drop;
		oifname "{TAP}" accept
	}}
	chain prerouting {{
		type nat hook prerouting priority dstnat; policy accept;
		iifname "{UPLINK}" ip saddr {host4} ip daddr {slot4} meta l4proto {{ tcp, udp }} dnat ip to {GUEST4}
		iifname "{UPLINK}" ip6 saddr {host6} ip6 daddr {slot6} meta l4proto {{ tcp, udp }} dnat ip6 to {GUEST6}
	}}
	chain postrouting {{
		type nat hook postrouting priority srcnat; policy accept;
		oifname "{UPLINK}" counter name connections
		oifname "{UPLINK}" ip saddr {GUEST4} snat ip to {slot4}
		oifname "{UPLINK}" ip6 saddr {GUEST6} snat ip6 to {slot6}
		oifname "{TAP}" ct status dnat masquerade
	}}
}}
"#,
        counters = counters(REASONS.iter().chain(&SILENT)),
        crowd = slot.connections_max,
        denials = denials(),
    );
    at_tap(slot.mac, &mut text);
    text.push_str(&policy_rules(policy, &[], ranges));
    text
}

/// What a guest may put on the wire at all. It sees each frame first.
fn at_tap(mac: Mac, text: &mut String) {
    let _ = write!(
        text,
        r#"table netdev {TABLE} {{
{counters}	chain ingress {{
		type filter hook ingress device "{TAP}" priority filter; policy drop;
		ether saddr != {mac} goto spoofing
		ether type vmap {{ ip : goto ipv4, ip6 : goto ipv6, arp : goto arp_in }}
		counter name forged
	}}
	chain spoofing {{
		counter name spoofed
		limit rate 5/second burst 10 packets log prefix "spoofed" group {LOG_GROUP} snaplen 128
		drop
	}}
	chain arp_in {{
		arp saddr ether != {mac} goto spoofing
		arp saddr ip != {{ {GUEST4}, 0.0.0.0 }} goto spoofing
		arp operation != request counter name forged drop
		arp daddr ip != {GATEWAY4} drop
		limit rate 20/second burst 20 packets accept
		counter name flood drop
	}}
	chain ipv4 {{
		ip saddr != {GUEST4} goto spoofing
		udp sport 67 counter name forged drop
		accept
	}}
	chain ipv6 {{
		icmpv6 type {{ nd-neighbor-solicit, nd-neighbor-advert }} goto neighbours
		icmpv6 type {{ nd-router-advert, nd-redirect }} counter name forged drop
		icmpv6 type {{ nd-router-solicit, mld-listener-report, mld-listener-done, mld2-listener-report }} drop
		ip6 saddr != {GUEST6} goto spoofing
		udp sport 547 counter name forged drop
		accept
	}}
	chain neighbours {{
		ip6 saddr != {{ {GUEST6}, {link_local}, :: }} goto spoofing
		limit rate 20/second burst 20 packets accept
		counter name flood drop
	}}
}}
"#,
        counters = counters(AT_TAP.iter()),
        link_local = mac.link_local(),
    );
}

fn counters<'a>(names: impl Iterator<Item = &'a &'a str>) -> String {
    names.fold(String::new(), |mut text, name| {
        let _ = writeln!(text, "\tcounter {name} {{ }}");
        text
    })
}

fn denials() -> String {
    REASONS.iter().fold(String::new(), |mut text, reason| {
        let _ = write!(
            text,
            r#"	chain deny_{reason} {{
		counter name {reason}
		limit rate 5/second burst 10 packets log prefix "{reason}" group {LOG_GROUP} snaplen 128
		goto refuse
	}}
"#
        );
        text
    })
}

/// Exchanges a slot's policy. Only rules change, and all in one transaction:
/// connections and what domains have opened stay, so that what is still allowed
/// flows on.
///
/// Base chains and their drop policy are left alone. Replacing those would leave
/// a moment in which the old chain is empty and drops.
pub(super) fn policy_rules(policy: &Policy, gone: &[DomainId], ranges: Ranges) -> String {
    let mut text = String::new();
    for domain in &policy.allow_domains {
        for (family, kind) in [(4, "ipv4_addr"), (6, "ipv6_addr")] {
            let _ = writeln!(
                text,
                "add set inet {TABLE} {} {{ type {kind}; flags timeout; size {DOMAIN_ADDRESSES}; }}",
                set_name(domain.id(), family)
            );
        }
    }
    direction(policy, ranges, "egress", "daddr", "dport", &mut text);
    direction(policy, ranges, "replies", "saddr", "sport", &mut text);
    for domain in gone {
        for family in [4, 6] {
            let _ = writeln!(
                text,
                "delete set inet {TABLE} {}",
                set_name(*domain, family)
            );
        }
    }
    text
}

/// Packets of a connection are judged in both directions, by where the guest
/// reaches: else a stream of UDP from outside would flow on after a denial.
fn direction(
    policy: &Policy,
    ranges: Ranges,
    chain: &str,
    address: &str,
    port: &str,
    text: &mut String,
) {
    let Ranges { ipv4, ipv6 } = ranges;
    let _ = writeln!(text, "flush chain inet {TABLE} {chain}");
    let mut rule = |rule: &str| {
        let _ = writeln!(text, "add rule inet {TABLE} {chain} {rule}");
    };
    rule(&format!(
        "ip {address} {{ {ipv4}, {GUEST4_NET} }} goto deny_sandbox"
    ));
    rule(&format!(
        "ip6 {address} {{ {ipv6}, {GUEST6_NET} }} goto deny_sandbox"
    ));
    rule("meta l4proto != { tcp, udp, icmp, icmpv6 } goto deny_protocol");
    for (rules, verdict) in [(&policy.deny, "deny_listed"), (&policy.allow, "pass")] {
        for matched in grouped(rules, address, port) {
            rule(&format!("{matched} goto {verdict}"));
        }
    }
    rule(&format!(
        "ip {address} {{ {} }} goto deny_private",
        join(&NOT_INTERNET4)
    ));
    rule(&format!(
        "ip6 {address} {{ {} }} goto deny_private",
        join(&NOT_INTERNET6)
    ));
    if !policy.allow_domains.is_empty() {
        // What a domain has let through goes on when its answer is no longer valid.
        let marks: Vec<String> = policy
            .allow_domains
            .iter()
            .map(|domain| format!("{:#010x}", domain.id().0))
            .collect();
        rule(&format!("ct mark {{ {} }} goto pass", marks.join(", ")));
    }
    for domain in &policy.allow_domains {
        let id = domain.id();
        for (family, ip) in [(4, "ip"), (6, "ip6")] {
            rule(&format!(
                "{ip} {address} @{} ct mark set {:#010x} goto pass",
                set_name(id, family),
                id.0
            ));
        }
    }
    rule(match policy.internet {
        true => "goto pass",
        false => "goto deny_internet",
    });
}

/// One match for all rules with the same protocol and ports, so that a long list
/// of ranges costs a packet one look-up.
fn grouped(rules: &[Rule], address: &str, port: &str) -> Vec<String> {
    type Nets = (Vec<Ipv4Net>, Vec<Ipv6Net>);
    let mut groups: BTreeMap<(Protocol, Vec<Ports>), Nets> = BTreeMap::new();
    for rule in rules {
        let group = groups
            .entry((rule.protocol, merged(&rule.ports)))
            .or_default();
        match rule.cidr {
            IpNet::V4(net) => group.0.push(net.trunc()),
            IpNet::V6(net) => group.1.push(net.trunc()),
        }
    }
    let mut matches = Vec::new();
    for ((protocol, ports), (ipv4, ipv6)) in groups {
        let protocol = match protocol {
            Protocol::Tcp => " meta l4proto tcp",
            Protocol::Udp => " meta l4proto udp",
            Protocol::Any if ports.is_empty() => "",
            Protocol::Any => " meta l4proto { tcp, udp }",
        };
        let ports = match ports.is_empty() {
            true => String::new(),
            false => format!(" th {port} {{ {} }}", join(&ports)),
        };
        let ipv4 = Ipv4Net::aggregate(&ipv4);
        let ipv6 = Ipv6Net::aggregate(&ipv6);
        if !ipv4.is_empty() {
            matches.push(format!(
                "ip {address} {{ {} }}{protocol}{ports}",
                join(&ipv4)
            ));
        }
        if !ipv6.is_empty() {
            matches.push(format!(
                "ip6 {address} {{ {} }}{protocol}{ports}",
                join(&ipv6)
            ));
        }
    }
    matches
}

/// Sorted and without overlaps, which a set may not have.
fn merged(ports: &[Ports]) -> Vec<Ports> {
    let mut sorted = ports.to_vec();
    sorted.sort_unstable();
    let mut merged: Vec<Ports> = Vec::new();
    for next in sorted {
        match merged.last_mut() {
            Some(last) if u32::from(next.first()) <= u32::from(last.last()) + 1 => {
                *last = last.up_to(next.last());
            }
            _ => merged.push(next),
        }
    }
    merged
}

/// Opens `addresses` to a domain's connections for `ttl`, anew where they are open.
pub(super) fn open(domain: DomainId, addresses: &[IpAddr], ttl: Duration) -> String {
    let mut text = String::new();
    // The kernel takes no zero, which would be for ever.
    let ttl_ms = ttl.as_millis().max(1);
    for address in addresses {
        let set = set_name(domain, if address.is_ipv4() { 4 } else { 6 });
        // Added and deleted first, because adding alone does not lengthen its time.
        let _ = write!(
            text,
            "add element inet {TABLE} {set} {{ {address} timeout 1s }}\n\
             delete element inet {TABLE} {set} {{ {address} }}\n\
             add element inet {TABLE} {set} {{ {address} timeout {ttl_ms}ms }}\n"
        );
    }
    text
}

fn set_name(domain: DomainId, family: u8) -> String {
    format!("domain_{:08x}_{family}", domain.0)
}

fn join<T: ToString>(items: &[T]) -> String {
    let texts: Vec<String> = items.iter().map(ToString::to_string).collect();
    texts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(cidr: &str, protocol: &str, ports: &[&str]) -> Rule {
        Rule::parse(cidr, protocol, ports).unwrap()
    }

    #[test]
    fn rules_with_the_same_ports_are_one_match_without_overlaps() {
        let rules = [
            rule("10.0.0.0/8", "tcp", &["443", "80-90", "85-100", "101"]),
            rule("10.1.0.0/16", "tcp", &["80-101", "443"]),
            rule("2001:db8::/32", "any", &[]),
            rule("192.0.2.7", "any", &["53"]),
        ];
        assert_eq!(
            grouped(&rules, "daddr", "dport"),
            [
                "ip6 daddr { 2001:db8::/32 }",
                "ip daddr { 192.0.2.7/32 } meta l4proto { tcp, udp } th dport { 53 }",
                "ip daddr { 10.0.0.0/8 } meta l4proto tcp th dport { 80-101, 443 }",
            ]
        );
    }

    #[test]
    fn the_documentation_shows_these_rules() {
        let documented = include_str!("../../../docs/networking.md");
        let ranges = Ranges::new(&crate::config::Network::default());
        let rules = SlotRules {
            mac: "02:00:00:00:00:01".parse().unwrap(),
            ends: ranges.ends(0),
            connections_max: 8192,
        };
        for text in [host(ranges), slot(&rules, &Policy::default(), ranges)] {
            assert!(
                documented.contains(&text),
                "docs/networking.md has other rules than:\n{text}"
            );
        }
    }

    #[test]
    fn ports_up_to_the_last_merge() {
        let ports = ["65535", "1-65534"].map(|text| text.parse().unwrap());
        assert_eq!(merged(&ports), ["1-65535".parse().unwrap()]);
    }
}
