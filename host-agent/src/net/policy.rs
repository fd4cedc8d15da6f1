//! What a sandbox may reach. Parsed and checked whole before a rule is made of it.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use hickory_proto::rr::Name;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::ranges::is_internet;

/// More rules than that are surely a mistake, and each transaction carries all.
pub const MAX_RULES: usize = 1024;
pub const MAX_PORT_RANGES: usize = 64;
pub const MAX_DOMAINS: usize = 256;
pub const MAX_DNS_SERVERS: usize = 8;
/// Of a domain's name, by RFC 1035 section 2.3.4.
const MAX_NAME_BYTES: usize = 253;
const MAX_LABEL_BYTES: usize = 63;
/// Of what was given, as much as an error repeats.
const MAX_SHOWN_CHARS: usize = 64;
const DNS_PORT: u16 = 53;

/// The network of one sandbox. Judged in this order, first match first:
///
/// 1. other sandboxes and the host itself: denied, whatever the lists say
/// 2. `deny`
/// 3. `allow`
/// 4. private, link-local, metadata and other ranges that are not the internet: denied
/// 5. `allow_domains`
/// 6. `internet`
///
/// With `internet` everything that nothing denies is allowed; `allow` and
/// `allow_domains` then only matter for ranges of step 4 and for what stays open
/// when `internet` is turned off.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Has no default where a policy is written down: nobody is to guess it.
    pub internet: bool,
    #[serde(default)]
    pub allow: Vec<Rule>,
    #[serde(default)]
    pub deny: Vec<Rule>,
    #[serde(default)]
    pub allow_domains: Vec<DomainPattern>,
    /// Whom the slot's resolver asks, on port 53. Empty: the host's resolvers. It is
    /// the host that asks, so that none may be what a guest may not reach: private
    /// ones only where `allow` has them, the host itself and its links never.
    #[serde(default)]
    pub dns_servers: Vec<IpAddr>,
    /// What the guest sends. The monitor holds it to this, not the firewall.
    #[serde(default)]
    pub send: RateLimit,
    /// What the guest receives; likewise.
    #[serde(default)]
    pub receive: RateLimit,
}

/// Zero: no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RateLimit {
    pub bytes_per_second: u64,
    pub packets_per_second: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    #[serde(deserialize_with = "cidr")]
    pub cidr: IpNet,
    #[serde(default)]
    pub protocol: Protocol,
    /// Empty: all ports, and what has none.
    #[serde(default)]
    pub ports: Vec<Ports>,
}

#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    #[default]
    Any,
    Tcp,
    Udp,
}

/// Ports from the first to the last, written `443` or `8000-8999`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Ports {
    first: u16,
    last: u16,
}

/// `example.com` for that name alone, `*.example.com` for all names below it. A name
/// in another script stands for what is asked for it (IDNA).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DomainPattern {
    /// Lower case, without the dot at the end.
    name: String,
    below: bool,
}

/// Names a [`DomainPattern`] in the kernel: its set of addresses, and the mark of
/// connections that it let through. It is computed from the pattern, so that it
/// is the same after a restart of the daemon and in the next policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DomainId(pub(super) u32);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    #[error(
        "{0:?} is not an address range; give one such as \"203.0.113.0/24\" or \"2001:db8::/32\""
    )]
    Cidr(String),
    #[error("{0:?} is not a port; give a number from 1 to 65535, or a range such as \"8000-8999\"")]
    Ports(String),
    #[error("{0:?} is not a protocol; give \"any\", \"tcp\" or \"udp\"")]
    Protocol(String),
    #[error(
        "{0:?} is not a domain; give a name such as \"example.com\", or \"*.example.com\" for all names below it"
    )]
    Domain(String),
    #[error("{0:?} is not an address; give one such as \"9.9.9.9\" or \"2620:fe::fe\"")]
    Address(String),
    #[error(
        "{0} is not an address that the host may ask; give a unicast address that is neither loopback nor link-local"
    )]
    DnsServer(IpAddr),
    #[error(
        "{0} is private, and the host asks it for the sandbox; put it into `allow` too, or give a public one"
    )]
    PrivateDnsServer(IpAddr),
    #[error(
        "{0} is of this host or of a sandbox on it; give another, or none for the host's own resolvers"
    )]
    DnsServerOfHost(IpAddr),
    #[error("{count} {what} are too many; give at most {most}")]
    TooMany {
        what: &'static str,
        count: usize,
        most: usize,
    },
}

/// A field of a policy, such as `allow[2].cidr`, and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyViolation {
    pub field: String,
    pub error: PolicyError,
}

// === impl Policy ===

impl Default for Policy {
    fn default() -> Self {
        Self {
            internet: true,
            allow: Vec::new(),
            deny: Vec::new(),
            allow_domains: Vec::new(),
            dns_servers: Vec::new(),
            send: RateLimit::default(),
            receive: RateLimit::default(),
        }
    }
}

impl Policy {
    /// What the types of its fields do not already rule out, all of it. What a node
    /// knows beyond that, [`super::Network::violations`] tells.
    pub fn violations(&self) -> Vec<PolicyViolation> {
        let mut found = Vec::new();
        let mut at_most = |field: String, what, count, most| {
            if count > most {
                let error = PolicyError::TooMany { what, count, most };
                found.push(PolicyViolation { field, error });
            }
        };
        for (field, rules) in [("allow", &self.allow), ("deny", &self.deny)] {
            at_most(field.to_owned(), "rules", rules.len(), MAX_RULES);
            for (index, rule) in rules.iter().enumerate() {
                let field = format!("{field}[{index}].ports");
                at_most(field, "port ranges", rule.ports.len(), MAX_PORT_RANGES);
            }
        }
        let (domains, servers) = (self.allow_domains.len(), self.dns_servers.len());
        at_most("allow_domains".to_owned(), "domains", domains, MAX_DOMAINS);
        at_most(
            "dns_servers".to_owned(),
            "servers",
            servers,
            MAX_DNS_SERVERS,
        );
        for (index, server) in self.dns_servers.iter().enumerate() {
            if let Some(error) = self.refused_server(*server) {
                let field = format!("dns_servers[{index}]");
                found.push(PolicyViolation { field, error });
            }
        }
        found
    }

    fn refused_server(&self, server: IpAddr) -> Option<PolicyError> {
        let is_link_local = match server {
            IpAddr::V4(address) => address.is_link_local() || address.is_broadcast(),
            IpAddr::V6(address) => {
                address.is_unicast_link_local() || address.to_ipv4_mapped().is_some()
            }
        };
        let is_unusable = server.is_unspecified() || server.is_multicast() || server.is_loopback();
        if is_link_local || is_unusable {
            return Some(PolicyError::DnsServer(server));
        }
        let is_allowed = || self.allow.iter().any(|rule| rule.allows(server, DNS_PORT));
        let is_private = !is_internet(server) && !is_allowed();
        is_private.then_some(PolicyError::PrivateDnsServer(server))
    }

    /// Whether an answer of the resolver may have this address: a name that anybody
    /// owns must not lead to where the guest may not go.
    pub fn may_be_told(&self, address: IpAddr) -> bool {
        let all_of = |rule: &Rule| rule.protocol == Protocol::Any && rule.ports.is_empty();
        let denied = self.deny.iter().filter(|rule| all_of(rule));
        let mut allowed = self.allow.iter();
        let is_in = |rule: &Rule| rule.cidr.contains(&address);
        !denied.into_iter().any(is_in) && (is_internet(address) || allowed.any(is_in))
    }

    /// Whether the firewall would be the same with `other`.
    pub(super) fn filters_like(&self, other: &Self) -> bool {
        (self.internet, &self.allow, &self.deny, &self.allow_domains)
            == (
                other.internet,
                &other.allow,
                &other.deny,
                &other.allow_domains,
            )
    }
}

// === impl Rule ===

impl Rule {
    /// All of `cidr`, such as `10.1.0.0/16`; an address alone is a range of one.
    pub fn parse(cidr: &str, protocol: &str, ports: &[&str]) -> Result<Self, PolicyError> {
        Ok(Self {
            cidr: parse_cidr(cidr)?,
            protocol: protocol.parse()?,
            ports: ports
                .iter()
                .map(|text| text.parse())
                .collect::<Result<_, _>>()?,
        })
    }

    /// Whether it is about `port` of `address`, by TCP, UDP or either.
    fn allows(&self, address: IpAddr, port: u16) -> bool {
        let mut ports = self.ports.iter();
        self.cidr.contains(&address)
            && (self.ports.is_empty()
                || ports.any(|ports| (ports.first..=ports.last).contains(&port)))
    }
}

/// Reads a range. Bits after the prefix are taken as meant: `10.1.2.3/8` is `10.0.0.0/8`.
pub fn parse_cidr(text: &str) -> Result<IpNet, PolicyError> {
    text.parse::<IpNet>()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .map(|net| net.trunc())
        .map_err(|_| PolicyError::Cidr(shown(text)))
}

/// Reads an address of a resolver.
pub fn parse_address(text: &str) -> Result<IpAddr, PolicyError> {
    text.parse().map_err(|_| PolicyError::Address(shown(text)))
}

fn cidr<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<IpNet, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse_cidr(&text).map_err(serde::de::Error::custom)
}

// === impl Protocol ===

impl FromStr for Protocol {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        match text {
            "any" | "" => Ok(Self::Any),
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            _ => Err(PolicyError::Protocol(shown(text))),
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Any => "any",
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

// === impl Ports ===

impl Ports {
    pub fn new(first: u16, last: u16) -> Result<Self, PolicyError> {
        if first == 0 || first > last {
            return Err(PolicyError::Ports(format!("{first}-{last}")));
        }
        Ok(Self { first, last })
    }

    pub fn first(self) -> u16 {
        self.first
    }

    pub fn last(self) -> u16 {
        self.last
    }

    /// These, and all that follow up to `last`.
    pub(super) fn up_to(self, last: u16) -> Self {
        Self {
            first: self.first,
            last: self.last.max(last),
        }
    }
}

impl FromStr for Ports {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let number = |part: &str| {
            // `u16::from_str` would take a sign.
            let digits = part.bytes().all(|byte| byte.is_ascii_digit());
            part.parse().ok().filter(|_| digits)
        };
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        number(first)
            .zip(number(last))
            .and_then(|(first, last)| Self::new(first, last).ok())
            .ok_or_else(|| PolicyError::Ports(shown(text)))
    }
}

impl TryFrom<String> for Ports {
    type Error = PolicyError;

    fn try_from(text: String) -> Result<Self, PolicyError> {
        text.parse()
    }
}

impl From<Ports> for String {
    fn from(ports: Ports) -> Self {
        ports.to_string()
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.first == self.last {
            true => write!(f, "{}", self.first),
            false => write!(f, "{}-{}", self.first, self.last),
        }
    }
}

// === impl DomainPattern ===

impl DomainPattern {
    /// Whether `name` is meant, in any case. Labels are compared, not text: a label may
    /// have a dot in it.
    pub(super) fn matches(&self, name: &Name) -> bool {
        let mut labels = name.iter().rev();
        let mut own = self.name.rsplit('.');
        own.all(|own| {
            labels
                .next()
                .is_some_and(|label| label.eq_ignore_ascii_case(own.as_bytes()))
        }) && labels.next().is_some() == self.below
    }

    pub fn id(&self) -> DomainId {
        let digest = Sha256::digest(self.to_string());
        let id = u32::from_be_bytes([digest[0], digest[1], digest[2], digest[3]]);
        // A mark of 0 is a connection without one.
        DomainId(id.max(1))
    }
}

impl FromStr for DomainPattern {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        let (name, below) = match text.strip_prefix("*.") {
            Some(name) => (name, true),
            None => (text, false),
        };
        let error = || PolicyError::Domain(shown(text));
        let name = name.strip_suffix('.').unwrap_or(name);
        let name = match name.is_ascii() {
            true => name.to_owned(),
            // What follows tells whether it is a name.
            false => Name::from_utf8(name).map_err(|_| error())?.to_ascii(),
        };
        let name = name.to_ascii_lowercase();
        let label = |label: &str| {
            let inner = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
            (1..=MAX_LABEL_BYTES).contains(&label.len())
                && label.bytes().all(inner)
                && !label.starts_with('-')
                && !label.ends_with('-')
        };
        // An address is not a name: it belongs into `allow`.
        let number = name
            .rsplit('.')
            .next()
            .is_some_and(|last| last.parse::<u64>().is_ok());
        if name.len() > MAX_NAME_BYTES || number || !name.split('.').all(label) {
            return Err(error());
        }
        Ok(Self { name, below })
    }
}

impl TryFrom<String> for DomainPattern {
    type Error = PolicyError;

    fn try_from(text: String) -> Result<Self, PolicyError> {
        text.parse()
    }
}

impl From<DomainPattern> for String {
    fn from(pattern: DomainPattern) -> Self {
        pattern.to_string()
    }
}

impl fmt::Display for DomainPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prefix = if self.below { "*." } else { "" };
        write!(f, "{prefix}{}", self.name)
    }
}

fn shown(text: &str) -> String {
    crate::text::printable(text, MAX_SHOWN_CHARS)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn malformed_input_is_refused_with_the_mend() {
        for cidr in [
            "",
            "10.0.0.0/33",
            "10.0.0/8",
            "::/129",
            "example.com",
            "10.0.0.0/8 ",
        ] {
            let error = Rule::parse(cidr, "any", &[]).unwrap_err();
            assert!(matches!(error, PolicyError::Cidr(_)), "{cidr}");
            assert!(error.to_string().contains("203.0.113.0/24"), "{error}");
        }
        for ports in [
            "0", "65536", "+1", "-1", "2-1", "1-", "1-2-3", "http", "", " 1",
        ] {
            let error = Rule::parse("::/0", "tcp", &[ports]).unwrap_err();
            assert_eq!(error, PolicyError::Ports(ports.to_owned()));
        }
        let error = Rule::parse("::/0", "icmp", &[]).unwrap_err();
        assert_eq!(error, PolicyError::Protocol("icmp".to_owned()));
        let long = "a".repeat(64);
        for domain in [
            "",
            ".",
            "*",
            "*.",
            ".a",
            "a..b",
            "*.*.com",
            "a.*.com",
            "-a.com",
            "a-.com",
            "a b.com",
            "10.0.0.1",
            "::1",
            "a/b",
            "a\\.b",
            "ä\\.b",
            "a:80",
            "https://a",
            "a;b.com",
            "}",
            &long,
            &format!("ä{long}"),
            &format!("{}.com", "a.".repeat(126)),
        ] {
            assert!(domain.parse::<DomainPattern>().is_err(), "{domain}");
        }
    }

    #[test]
    fn errors_repeat_little_of_what_was_given() {
        let error = parse_cidr(&"\x1b7".repeat(10_000)).unwrap_err().to_string();
        assert!(error.len() < 300 && !error.contains('\x1b'), "{error}");
    }

    #[test]
    fn domains_are_shown_as_they_are_asked_for() {
        for (given, shown) in [
            ("example.com", "example.com"),
            ("*.example.com.", "*.example.com"),
            ("_dmarc.Example.com", "_dmarc.example.com"),
            ("Bücher.example", "xn--bcher-kva.example"),
            ("localhost", "localhost"),
        ] {
            let pattern: DomainPattern = given.parse().unwrap();
            assert_eq!(pattern.to_string(), shown);
        }
    }

    #[test]
    fn patterns_match_whole_labels_in_any_case() {
        let matches = |pattern: &str, name: &str| {
            let pattern: DomainPattern = pattern.parse().unwrap();
            pattern.matches(&Name::from_ascii(name).unwrap())
        };
        assert!(matches("Example.com", "eXample.COM."));
        assert!(!matches("example.com", "www.example.com"));
        assert!(matches("*.example.com", "a.b.example.com"));
        assert!(matches("*.example.com", "*.Example.com"));
        for other in [
            "example.com",
            "badexample.com",
            "example.com.evil.org",
            // One label, "a.example", below "com".
            "a\\.example.com",
            "com",
            ".",
        ] {
            assert!(!matches("*.example.com", other), "{other}");
        }
    }

    #[test]
    fn the_host_asks_only_whom_the_guest_may_reach() {
        let refused = |server: &str, allow: &[Rule]| {
            let policy = Policy {
                allow: allow.to_vec(),
                dns_servers: vec!["9.9.9.9".parse().unwrap(), server.parse().unwrap()],
                ..Policy::default()
            };
            let mut found = policy.violations();
            assert!(
                found
                    .iter()
                    .all(|violation| violation.field == "dns_servers[1]")
            );
            found.pop().map(|violation| violation.error)
        };
        let all = ["0.0.0.0/0", "::/0"].map(|net| Rule::parse(net, "any", &[]).unwrap());
        for never in [
            "0.0.0.0",
            "127.0.0.53",
            "169.254.169.254",
            "224.0.0.251",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:9.9.9.9",
            "fe80::1",
            "ff02::fb",
        ] {
            let error = PolicyError::DnsServer(never.parse().unwrap());
            assert_eq!(refused(never, &all), Some(error));
        }
        for private in ["10.0.0.53", "192.168.1.1", "100.64.0.1", "fd00::53"] {
            let error = PolicyError::PrivateDnsServer(private.parse().unwrap());
            assert_eq!(refused(private, &[]), Some(error.clone()));
            assert_eq!(refused(private, &all), None);
            let other_port = Rule::parse(private, "udp", &["54-60", "1-52"]).unwrap();
            assert_eq!(refused(private, &[other_port]), Some(error));
            let port = Rule::parse(private, "udp", &["80", "50-60"]).unwrap();
            assert_eq!(refused(private, &[port]), None);
        }
        assert_eq!(refused("2620:fe::fe", &[]), None);
    }

    #[test]
    fn a_policy_is_read_whole_or_not_at_all() {
        let text = r#"{ "internet": false, "deny": [], "allow": [{ "cidr": "10.0.0.0/8",
            "protocol": "tcp", "ports": ["443", "8000-8999"] }], "allow_domains": ["*.example.com"] }"#;
        let policy: Policy = serde_json::from_str(text).unwrap();
        assert_eq!(policy.violations(), []);
        assert_eq!(
            policy.allow[0].ports,
            [
                Ports::new(443, 443).unwrap(),
                Ports::new(8000, 8999).unwrap()
            ]
        );
        let back: Policy = serde_json::from_str(&serde_json::to_string(&policy).unwrap()).unwrap();
        assert_eq!(back, policy);
        for wrong in [
            "{}",
            r#"{ "internet": true, "internets": true }"#,
            r#"{ "internet": true, "allow": [{ "cidr": "10.0.0.0/40" }] }"#,
            r#"{ "internet": true, "allow_domains": ["a b"] }"#,
            r#"{ "internet": true, "dns_servers": ["dns.example.com"] }"#,
        ] {
            assert!(serde_json::from_str::<Policy>(wrong).is_err(), "{wrong}");
        }
        let ports = vec![Ports::new(1, 2).unwrap(); MAX_PORT_RANGES + 1];
        let rule = Rule::parse("10.0.0.0/8", "any", &[]).unwrap();
        let mut deny = vec![rule; MAX_RULES + 1];
        deny[7].ports = ports;
        let too_much = Policy {
            deny,
            allow_domains: vec!["a.com".parse().unwrap(); MAX_DOMAINS + 1],
            dns_servers: vec!["9.9.9.9".parse().unwrap(); MAX_DNS_SERVERS + 1],
            ..Policy::default()
        };
        let found = too_much.violations();
        let fields: Vec<&str> = found.iter().map(|found| found.field.as_str()).collect();
        assert_eq!(
            fields,
            ["deny", "deny[7].ports", "allow_domains", "dns_servers"]
        );
    }

    proptest! {
        #[test]
        fn whatever_parses_is_harmless_as_text(text in "\\PC{0,40}|(\\*\\.)?[a-zA-Z0-9äß.*_-]{0,40}") {
            if let Ok(pattern) = text.parse::<DomainPattern>() {
                let harmless = |byte: u8| byte.is_ascii_alphanumeric() || b"*.-_".contains(&byte);
                prop_assert!(pattern.to_string().bytes().all(harmless));
                prop_assert_eq!(pattern.to_string().parse::<DomainPattern>().unwrap(), pattern);
            }
            if let Ok(ports) = text.parse::<Ports>() {
                prop_assert!(ports.first() <= ports.last() && ports.first() > 0);
                prop_assert_eq!(ports.to_string().parse::<Ports>().unwrap(), ports);
            }
        }
    }
}
