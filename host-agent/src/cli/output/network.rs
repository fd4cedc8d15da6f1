//! Networks. The JSON of a policy is what a file for `--net` may have in it.

use std::collections::BTreeMap;

use comfy_table::{Table, presets};
use serde_json::{Value, json};
use soulbox_proto::host::v1::{
    DeniedAttempt, Forward, GetNetworkResponse, NetworkLimit, NetworkPolicy, NetworkRule,
    NetworkUsage,
};

use super::super::error::CliError;
use super::{line, table, trim};

type Rows = Vec<(&'static str, String)>;

pub(in super::super) fn network(network: &GetNetworkResponse) -> Value {
    json!({
        "policy": network.policy.as_ref().map(policy),
        "addresses": network.addresses,
        "usage": network.usage.as_ref().map(|usage| json!({
            "sent_bytes": usage.sent_bytes,
            "sent_packets": usage.sent_packets,
            "received_bytes": usage.received_bytes,
            "received_packets": usage.received_packets,
            "connections": usage.connections,
            "connections_open": usage.connections_open,
            "dropped_packets": usage.dropped_packets,
        })),
    })
}

pub(in super::super) fn policy(policy: &NetworkPolicy) -> Value {
    let rules = |rules: &[NetworkRule]| -> Value { rules.iter().map(rule).collect() };
    let limit = |limit: Option<NetworkLimit>| {
        let limit = limit.unwrap_or_default();
        json!({
            "bytes_per_second": limit.bytes_per_second,
            "packets_per_second": limit.packets_per_second,
        })
    };
    json!({
        "internet": policy.internet,
        "allow": rules(&policy.allow),
        "deny": rules(&policy.deny),
        "allow_domains": policy.allow_domains,
        "dns_servers": policy.dns_servers,
        "send": limit(policy.send),
        "receive": limit(policy.receive),
    })
}

fn rule(rule: &NetworkRule) -> Value {
    json!({"cidr": rule.cidr, "protocol": protocol(rule), "ports": rule.ports})
}

pub(in super::super) fn forward(forward: &Forward) -> Value {
    json!({
        "sandbox_id": forward.sandbox_id,
        "port": forward.port,
        "host_address": forward.host_address,
    })
}

pub(super) fn denied(denied: &DeniedAttempt) -> Value {
    json!({
        "reason": denied.reason,
        "protocol": denied.protocol,
        "destination": denied.destination,
    })
}

/// Such as "private tcp 169.254.169.254:80".
pub(super) fn denied_words(denied: &DeniedAttempt) -> String {
    let words = [&denied.reason, &denied.protocol, &denied.destination];
    let words = words.into_iter().filter(|word| !word.is_empty());
    words.map(String::as_str).collect::<Vec<_>>().join(" ")
}

pub(in super::super) fn network_details(
    id: &str,
    network: &GetNetworkResponse,
) -> Result<(), CliError> {
    let Some(policy) = &network.policy else {
        return line(&format!("{id} has no network"));
    };
    let mut rows = policy_rows(policy);
    rows.extend(
        network
            .addresses
            .iter()
            .map(|address| ("address", address.clone())),
    );
    rows.extend(network.usage.iter().flat_map(usage_rows));
    print(rows)
}

pub(in super::super) fn policy_details(policy: &NetworkPolicy) -> Result<(), CliError> {
    print(policy_rows(policy))
}

pub(in super::super) fn forward_table(forwards: &[Forward]) -> Result<(), CliError> {
    let mut table = table(&["HOST ADDRESS", "SANDBOX", "PORT"]);
    for forward in forwards {
        table.add_row([
            forward.host_address.clone(),
            forward.sandbox_id.clone(),
            forward.port.to_string(),
        ]);
    }
    line(&trim(&table))
}

fn print(rows: Rows) -> Result<(), CliError> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    for (name, value) in rows {
        table.add_row([name.to_owned(), value]);
    }
    line(&trim(&table))
}

/// In the order in which they are judged.
fn policy_rows(policy: &NetworkPolicy) -> Rows {
    let mut rows = Vec::new();
    for (name, rules) in [("denied", &policy.deny), ("allowed", &policy.allow)] {
        rows.extend(rules.iter().map(|rule| (name, rule_words(rule))));
    }
    let domains = policy.allow_domains.iter();
    rows.extend(domains.map(|domain| ("allowed", domain.clone())));
    let internet = if policy.internet { "allowed" } else { "denied" };
    rows.push(("internet", internet.to_owned()));
    let resolvers = match policy.dns_servers.as_slice() {
        [] => "the host's".to_owned(),
        servers => servers.join(", "),
    };
    rows.push(("resolvers", resolvers));
    for (name, limit) in [("sends", policy.send), ("receives", policy.receive)] {
        let limit = limit.map(limit_words).filter(|words| !words.is_empty());
        rows.extend(limit.map(|words| (name, format!("at most {words}"))));
    }
    rows
}

fn usage_rows(usage: &NetworkUsage) -> Rows {
    let traffic = |bytes, packets| format!("{} in {packets} packets", size(bytes));
    let connections = format!("{}, {} open", usage.connections, usage.connections_open);
    let mut rows = vec![
        ("sent", traffic(usage.sent_bytes, usage.sent_packets)),
        (
            "received",
            traffic(usage.received_bytes, usage.received_packets),
        ),
        ("connections", connections),
    ];
    let dropped: BTreeMap<_, _> = usage.dropped_packets.iter().collect();
    let dropped = dropped.into_iter().filter(|(_, packets)| **packets > 0);
    rows.extend(dropped.map(|(reason, packets)| ("dropped", format!("{packets} {reason}"))));
    rows
}

/// As `--allow` takes it, but that brackets are only where they must be.
fn rule_words(rule: &NetworkRule) -> String {
    let mut words = match (rule.ports.is_empty(), rule.cidr.contains(':')) {
        (true, _) => rule.cidr.clone(),
        (false, true) => format!("[{}]:{}", rule.cidr, rule.ports.join(",")),
        (false, false) => format!("{}:{}", rule.cidr, rule.ports.join(",")),
    };
    match protocol(rule) {
        "any" => {}
        protocol => {
            words.push('/');
            words.push_str(protocol);
        }
    }
    words
}

fn protocol(rule: &NetworkRule) -> &str {
    match rule.protocol.as_str() {
        "" => "any",
        protocol => protocol,
    }
}

fn limit_words(limit: NetworkLimit) -> String {
    let limits = [
        (limit.bytes_per_second, "bytes/s"),
        (limit.packets_per_second, "packets/s"),
    ];
    let limits = limits.into_iter().filter(|(count, _)| *count > 0);
    let words = limits.map(|(count, unit)| format!("{} {unit}", thousands(count)));
    words.collect::<Vec<_>>().join(", ")
}

/// As flags take it, and exact: 10M, but 1500.
fn thousands(count: u64) -> String {
    for (unit, name) in [(1_000_000_000, "G"), (1_000_000, "M"), (1000, "k")] {
        if count.is_multiple_of(unit) {
            return format!("{}{name}", count / unit);
        }
    }
    count.to_string()
}

fn size(bytes: u64) -> String {
    let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
    match units.into_iter().find(|(shift, _)| bytes >> shift > 0) {
        Some((shift, unit)) => format!("{:.1} {unit}", bytes as f64 / f64::from(1 << shift)),
        None => format!("{bytes} bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::{Policy, RateLimit, Rule};
    use crate::service::convert::policy_to_proto;

    fn sample() -> Policy {
        Policy {
            internet: false,
            allow: vec![
                Rule::parse("10.1.0.0/16", "tcp", &["443", "8000-8999"]).unwrap(),
                Rule::parse("2001:db8::/32", "any", &["53"]).unwrap(),
            ],
            deny: vec![Rule::parse("10.1.2.3", "any", &[]).unwrap()],
            allow_domains: vec!["*.example.com".parse().unwrap()],
            dns_servers: vec!["9.9.9.9".parse().unwrap()],
            send: RateLimit {
                bytes_per_second: 10_000_000,
                packets_per_second: 1500,
            },
            receive: RateLimit::default(),
        }
    }

    #[test]
    fn a_policy_that_is_shown_can_be_set_again() {
        for given in [sample(), Policy::default()] {
            let shown = policy(&policy_to_proto(&given));
            assert_eq!(serde_json::from_value::<Policy>(shown).unwrap(), given);
        }
        // Also when the daemon leaves out what it may.
        let terse = NetworkRule {
            cidr: "::/0".to_owned(),
            ..NetworkRule::default()
        };
        assert_eq!(rule(&terse)["protocol"], "any");
    }

    #[test]
    fn people_read_words() {
        assert_eq!(
            policy_rows(&policy_to_proto(&sample())),
            [
                ("denied", "10.1.2.3/32".to_owned()),
                ("allowed", "10.1.0.0/16:443,8000-8999/tcp".to_owned()),
                ("allowed", "[2001:db8::/32]:53".to_owned()),
                ("allowed", "*.example.com".to_owned()),
                ("internet", "denied".to_owned()),
                ("resolvers", "9.9.9.9".to_owned()),
                ("sends", "at most 10M bytes/s, 1500 packets/s".to_owned()),
            ]
        );
        assert_eq!(
            policy_rows(&policy_to_proto(&Policy::default())),
            [
                ("internet", "allowed".to_owned()),
                ("resolvers", "the host's".to_owned()),
            ]
        );
    }

    #[test]
    fn drops_are_told_by_their_reasons() {
        let rows = usage_rows(&NetworkUsage {
            sent_bytes: 3 << 19,
            sent_packets: 7,
            received_bytes: 1023,
            connections: 3,
            connections_open: 1,
            dropped_packets: [("private", 2), ("listed", 0), ("crowd", 1)]
                .map(|(reason, packets)| (reason.to_owned(), packets))
                .into(),
            ..NetworkUsage::default()
        });
        assert_eq!(
            rows,
            [
                ("sent", "1.5 MiB in 7 packets".to_owned()),
                ("received", "1023 bytes in 0 packets".to_owned()),
                ("connections", "3, 1 open".to_owned()),
                ("dropped", "1 crowd".to_owned()),
                ("dropped", "2 private".to_owned()),
            ]
        );
    }

    #[test]
    fn a_denied_attempt_is_one_line() {
        let mut attempt = DeniedAttempt {
            reason: "private".to_owned(),
            protocol: "tcp".to_owned(),
            destination: "169.254.169.254:80".to_owned(),
        };
        assert_eq!(denied_words(&attempt), "private tcp 169.254.169.254:80");
        assert_eq!(denied(&attempt)["destination"], "169.254.169.254:80");
        attempt.protocol.clear();
        attempt.destination.clear();
        assert_eq!(denied_words(&attempt), "private");
    }
}
