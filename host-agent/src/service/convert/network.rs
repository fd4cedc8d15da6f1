//! A sandbox's network as the protocol has it. A caller's policy is read here, and
//! every field that is wrong is named.

use soulbox_proto::host::v1 as proto;

use crate::ingress::Forward;
use crate::net::{
    Denied, DomainPattern, MAX_DNS_SERVERS, MAX_DOMAINS, MAX_PORT_RANGES, MAX_RULES, Policy,
    PolicyError, RateLimit, Rule, SlotCounters, Traffic, parse_address, parse_cidr,
};
use crate::status::FieldViolation;

/// More are not named: an answer's header has little room.
const MAX_VIOLATIONS: usize = 8;

/// The policy that `policy` says. `prefix` names it in the request, as in
/// `network_policy.allow[2].cidr`; it may be empty.
pub(crate) fn policy_from_proto(
    policy: &proto::NetworkPolicy,
    prefix: &str,
) -> Result<Policy, Vec<FieldViolation>> {
    let mut reader = Reader {
        prefix,
        found: Vec::new(),
    };
    let domain = |text: &String| text.parse::<DomainPattern>();
    let server = |text: &String| parse_address(text);
    let read = Policy {
        internet: policy.internet,
        allow: reader.rules("allow", &policy.allow),
        deny: reader.rules("deny", &policy.deny),
        allow_domains: reader.list(
            "allow_domains",
            ("domains", MAX_DOMAINS),
            &policy.allow_domains,
            domain,
        ),
        dns_servers: reader.list(
            "dns_servers",
            ("servers", MAX_DNS_SERVERS),
            &policy.dns_servers,
            server,
        ),
        send: limit(policy.send),
        receive: limit(policy.receive),
    };
    if reader.found.is_empty() {
        for violation in read.violations() {
            reader.add(&violation.field, &violation.error);
        }
    }
    if reader.found.is_empty() {
        return Ok(read);
    }
    reader.found.truncate(MAX_VIOLATIONS);
    Err(reader.found)
}

pub(crate) fn policy_to_proto(policy: &Policy) -> proto::NetworkPolicy {
    proto::NetworkPolicy {
        internet: policy.internet,
        allow: policy.allow.iter().map(rule).collect(),
        deny: policy.deny.iter().map(rule).collect(),
        allow_domains: policy
            .allow_domains
            .iter()
            .map(ToString::to_string)
            .collect(),
        dns_servers: policy.dns_servers.iter().map(ToString::to_string).collect(),
        send: some_limit(policy.send),
        receive: some_limit(policy.receive),
    }
}

fn rule(rule: &Rule) -> proto::NetworkRule {
    proto::NetworkRule {
        cidr: rule.cidr.to_string(),
        protocol: rule.protocol.to_string(),
        ports: rule.ports.iter().map(ToString::to_string).collect(),
    }
}

fn limit(limit: Option<proto::NetworkLimit>) -> RateLimit {
    let limit = limit.unwrap_or_default();
    RateLimit {
        bytes_per_second: limit.bytes_per_second,
        packets_per_second: limit.packets_per_second,
    }
}

fn some_limit(limit: RateLimit) -> Option<proto::NetworkLimit> {
    (limit != RateLimit::default()).then_some(proto::NetworkLimit {
        bytes_per_second: limit.bytes_per_second,
        packets_per_second: limit.packets_per_second,
    })
}

/// Collects what is wrong while it reads.
struct Reader<'a> {
    prefix: &'a str,
    found: Vec<FieldViolation>,
}

// === impl Reader ===

impl Reader<'_> {
    fn rules(&mut self, field: &str, rules: &[proto::NetworkRule]) -> Vec<Rule> {
        if self.are_too_many(field, ("rules", MAX_RULES), rules.len()) {
            return Vec::new();
        }
        let mut read = Vec::with_capacity(rules.len());
        for (index, rule) in rules.iter().enumerate() {
            let field = |name: &str| format!("{field}[{index}].{name}");
            let cidr = self.read(&field("cidr"), parse_cidr(&rule.cidr));
            let protocol = self.read(&field("protocol"), rule.protocol.parse());
            let most = ("port ranges", MAX_PORT_RANGES);
            let ports = self.list(&field("ports"), most, &rule.ports, |text| text.parse());
            if let Some((cidr, protocol)) = cidr.zip(protocol) {
                read.push(Rule {
                    cidr,
                    protocol,
                    ports,
                });
            }
        }
        read
    }

    /// What a list has, unless it has more than it may: then nothing of it is read.
    fn list<T, U>(
        &mut self,
        field: &str,
        most: (&'static str, usize),
        items: &[T],
        parse: impl Fn(&T) -> Result<U, PolicyError>,
    ) -> Vec<U> {
        if self.are_too_many(field, most, items.len()) {
            return Vec::new();
        }
        let items = items.iter().enumerate();
        items
            .filter_map(|(index, item)| self.read(&format!("{field}[{index}]"), parse(item)))
            .collect()
    }

    fn are_too_many(
        &mut self,
        field: &str,
        (what, most): (&'static str, usize),
        count: usize,
    ) -> bool {
        if count > most {
            self.add(field, &PolicyError::TooMany { what, count, most });
        }
        count > most
    }

    fn read<T>(&mut self, field: &str, parsed: Result<T, PolicyError>) -> Option<T> {
        parsed.map_err(|error| self.add(field, &error)).ok()
    }

    fn add(&mut self, field: &str, error: &PolicyError) {
        let dot = if self.prefix.is_empty() { "" } else { "." };
        self.found.push(FieldViolation {
            field: format!("{}{dot}{field}", self.prefix),
            description: error.to_string(),
        });
    }
}

// === impl From ===

impl From<&SlotCounters> for proto::NetworkUsage {
    fn from(counters: &SlotCounters) -> Self {
        let dropped = counters.dropped.iter();
        Self {
            sent_bytes: counters.sent.bytes,
            sent_packets: counters.sent.packets,
            received_bytes: counters.received.bytes,
            received_packets: counters.received.packets,
            connections: counters.connections,
            connections_open: counters.connections_open,
            dropped_packets: dropped
                .filter(|(_, Traffic { packets, .. })| *packets > 0)
                .map(|(reason, Traffic { packets, .. })| ((*reason).to_owned(), *packets))
                .collect(),
        }
    }
}

impl From<&Denied> for proto::DeniedAttempt {
    fn from(denied: &Denied) -> Self {
        let protocol = match denied.protocol {
            Some(6) => "tcp".to_owned(),
            Some(17) => "udp".to_owned(),
            Some(number) => number.to_string(),
            None => String::new(),
        };
        let destination = match (denied.destination, denied.port) {
            (Some(address), Some(port)) => std::net::SocketAddr::new(address, port).to_string(),
            (Some(address), None) => address.to_string(),
            (None, _) => String::new(),
        };
        Self {
            reason: denied.reason.to_owned(),
            protocol,
            destination,
        }
    }
}

impl From<&Forward> for proto::Forward {
    fn from(forward: &Forward) -> Self {
        Self {
            sandbox_id: forward.sandbox.to_string(),
            port: forward.port.into(),
            host_address: forward.address.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn network_rule(cidr: &str, protocol: &str, ports: &[&str]) -> proto::NetworkRule {
        proto::NetworkRule {
            cidr: cidr.to_owned(),
            protocol: protocol.to_owned(),
            ports: ports.iter().map(|text| (*text).to_owned()).collect(),
        }
    }

    fn texts(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    fn fields(policy: &proto::NetworkPolicy) -> Vec<String> {
        let violations = policy_from_proto(policy, "network_policy").unwrap_err();
        let fields = violations.into_iter().map(|violation| violation.field);
        fields.collect()
    }

    #[test]
    fn each_bad_field_is_named() {
        let policy = proto::NetworkPolicy {
            allow: vec![
                network_rule("10.0.0.0/8", "", &[]),
                network_rule("10.0.0.0/33", "icmp", &["1", "0"]),
            ],
            deny: vec![network_rule("example.com", "tcp", &[])],
            allow_domains: texts(&["example.com", "a b"]),
            dns_servers: texts(&["127.0.0.1", "dns.example.com"]),
            ..proto::NetworkPolicy::default()
        };
        assert_eq!(
            fields(&policy),
            [
                "network_policy.allow[1].cidr",
                "network_policy.allow[1].protocol",
                "network_policy.allow[1].ports[1]",
                "network_policy.deny[0].cidr",
                "network_policy.allow_domains[1]",
                "network_policy.dns_servers[1]",
            ]
        );
        // What can only be judged with the rest of the policy comes when that is right.
        let policy = proto::NetworkPolicy {
            allow: vec![network_rule("10.0.0.0/8", "", &["53"])],
            dns_servers: texts(&["10.0.0.53", "192.168.0.1", "127.0.0.1"]),
            ..proto::NetworkPolicy::default()
        };
        let expected = [
            "network_policy.dns_servers[1]",
            "network_policy.dns_servers[2]",
        ];
        assert_eq!(fields(&policy), expected);
    }

    #[test]
    fn long_lists_are_counted_and_not_read() {
        let policy = proto::NetworkPolicy {
            allow: vec![network_rule("", "", &[]); MAX_RULES + 1],
            deny: vec![proto::NetworkRule {
                ports: vec![String::new(); MAX_PORT_RANGES + 1],
                ..network_rule("::/0", "", &[])
            }],
            allow_domains: vec![String::new(); MAX_DOMAINS + 1],
            dns_servers: vec![String::new(); MAX_DNS_SERVERS + 1],
            ..proto::NetworkPolicy::default()
        };
        let violations = policy_from_proto(&policy, "").unwrap_err();
        let fields: Vec<&str> = violations
            .iter()
            .map(|found| found.field.as_str())
            .collect();
        assert_eq!(
            fields,
            ["allow", "deny[0].ports", "allow_domains", "dns_servers"]
        );
        assert!(
            violations[0]
                .description
                .contains("1025 rules are too many")
        );
        let many = proto::NetworkPolicy {
            allow: vec![network_rule("", "", &[]); MAX_RULES],
            ..proto::NetworkPolicy::default()
        };
        assert_eq!(
            policy_from_proto(&many, "").unwrap_err().len(),
            MAX_VIOLATIONS
        );
    }

    #[test]
    fn what_was_left_out_is_off() {
        let policy = policy_from_proto(&proto::NetworkPolicy::default(), "").unwrap();
        let off = Policy {
            internet: false,
            ..Policy::default()
        };
        assert_eq!(policy, off);
    }

    #[test]
    fn a_denied_attempt_says_what_it_knows() {
        let denied = |destination: Option<&str>, protocol, port| {
            let attempt = proto::DeniedAttempt::from(&Denied {
                slot: 1,
                reason: "private",
                destination: destination.map(|address| address.parse().unwrap()),
                protocol,
                port,
            });
            [attempt.reason, attempt.protocol, attempt.destination]
        };
        assert_eq!(
            denied(Some("169.254.169.254"), Some(6), Some(80)),
            ["private", "tcp", "169.254.169.254:80"]
        );
        assert_eq!(
            denied(Some("fd00::1"), Some(17), Some(53)),
            ["private", "udp", "[fd00::1]:53"]
        );
        assert_eq!(
            denied(Some("fd00::1"), Some(58), None),
            ["private", "58", "fd00::1"]
        );
        assert_eq!(denied(None, None, None), ["private", "", ""]);
    }

    #[test]
    fn only_what_was_dropped_is_counted() {
        let traffic = |packets| Traffic { packets, bytes: 9 };
        let usage = proto::NetworkUsage::from(&SlotCounters {
            sent: traffic(3),
            dropped: [("private", traffic(2)), ("listed", traffic(0))].into(),
            ..SlotCounters::default()
        });
        assert_eq!((usage.sent_packets, usage.sent_bytes), (3, 9));
        let dropped: Vec<_> = usage.dropped_packets.into_iter().collect();
        assert_eq!(dropped, [("private".to_owned(), 2)]);
    }

    /// Text that is often, but not always, what a field wants.
    fn text(usual: &'static str) -> impl Strategy<Value = String> {
        prop_oneof![4 => usual, 1 => "\\PC{0,20}"]
    }

    fn rules() -> impl Strategy<Value = Vec<proto::NetworkRule>> {
        let cidr =
            "1?[0-9]{1,2}\\.[0-9]{1,2}\\.0\\.[0-9](/[12]?[0-9])?|fd[0-9]{2}::[0-9](/[0-9]{1,2})?";
        let ports = vec(text("[1-9][0-9]{0,3}|[1-9][0-9]-[1-9][0-9]{2}"), 0..3);
        let rule =
            (text(cidr), text("(tcp|udp|any)?"), ports).prop_map(|(cidr, protocol, ports)| {
                proto::NetworkRule {
                    cidr,
                    protocol,
                    ports,
                }
            });
        vec(rule, 0..4)
    }

    fn any_limit() -> impl Strategy<Value = Option<proto::NetworkLimit>> {
        proptest::option::of(
            any::<(u64, u64)>().prop_map(|(bytes, packets)| proto::NetworkLimit {
                bytes_per_second: bytes,
                packets_per_second: packets,
            }),
        )
    }

    proptest! {
        #[test]
        fn what_is_accepted_comes_back_the_same(
            internet in any::<bool>(),
            (allow, deny) in (rules(), rules()),
            allow_domains in vec(text("(\\*\\.)?[a-zäA-Z]{1,3}\\.[a-z]{2}\\.?"), 0..3),
            dns_servers in vec(text("9\\.9\\.9\\.[0-9]|10\\.0\\.0\\.1|2620:fe::[0-9]"), 0..3),
            (send, receive) in (any_limit(), any_limit()),
        ) {
            let given = proto::NetworkPolicy {
                internet, allow, deny, allow_domains, dns_servers, send, receive,
            };
            match policy_from_proto(&given, "network_policy") {
                Ok(policy) => {
                    prop_assert_eq!(policy.violations(), []);
                    let shown = policy_to_proto(&policy);
                    prop_assert_eq!(policy_from_proto(&shown, "").unwrap(), policy);
                }
                Err(violations) => {
                    prop_assert!((1..=MAX_VIOLATIONS).contains(&violations.len()));
                    for violation in violations {
                        prop_assert!(violation.field.starts_with("network_policy."));
                        prop_assert!(violation.description.len() < 500);
                    }
                }
            }
        }
    }
}
