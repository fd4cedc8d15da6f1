//! What a sandbox may reach. Parsed and checked whole before a rule is made of it.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// More rules than that are surely a mistake, and each transaction carries all.
pub const MAX_RULES: usize = 1024;
pub const MAX_PORT_RANGES: usize = 64;
pub const MAX_DOMAINS: usize = 256;
pub const MAX_DNS_SERVERS: usize = 8;
/// Of a domain's name, by RFC 1035 section 2.3.4.
const MAX_NAME_BYTES: usize = 253;
const MAX_LABEL_BYTES: usize = 63;

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
#[serde(default, deny_unknown_fields)]
pub struct Policy {
    pub internet: bool,
    pub allow: Vec<Rule>,
    pub deny: Vec<Rule>,
    pub allow_domains: Vec<DomainPattern>,
    /// Whom the slot's resolver asks. Empty: the host's resolvers.
    pub dns_servers: Vec<IpAddr>,
    /// What the guest sends. The monitor holds it to this, not the firewall.
    pub send: RateLimit,
    /// What the guest receives; likewise.
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

/// `example.com` for that name alone, `*.example.com` for all names below it.
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
    #[error("{0} is not an address that a resolver can have; give a unicast address")]
    DnsServer(IpAddr),
    #[error("{count} {what} are too many; give at most {most}")]
    TooMany {
        what: &'static str,
        count: usize,
        most: usize,
    },
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
    /// What the types of its fields do not already rule out.
    pub fn validate(&self) -> Result<(), PolicyError> {
        let at_most = |what, count, most| {
            (count <= most)
                .then_some(())
                .ok_or(PolicyError::TooMany { what, count, most })
        };
        at_most("allow rules", self.allow.len(), MAX_RULES)?;
        at_most("deny rules", self.deny.len(), MAX_RULES)?;
        at_most("domains", self.allow_domains.len(), MAX_DOMAINS)?;
        at_most("DNS servers", self.dns_servers.len(), MAX_DNS_SERVERS)?;
        for rule in self.allow.iter().chain(&self.deny) {
            at_most("port ranges of a rule", rule.ports.len(), MAX_PORT_RANGES)?;
        }
        let unusable = |address: &&IpAddr| address.is_unspecified() || address.is_multicast();
        match self.dns_servers.iter().find(unusable) {
            Some(server) => Err(PolicyError::DnsServer(*server)),
            None => Ok(()),
        }
    }

    /// Whether an answer of the resolver may have this address: a name that anybody
    /// owns must not lead to where the guest may not go.
    pub fn may_be_told(&self, address: IpAddr) -> bool {
        let all_of = |rule: &Rule| rule.protocol == Protocol::Any && rule.ports.is_empty();
        let denied = self.deny.iter().filter(|rule| all_of(rule));
        let mut allowed = self.allow.iter();
        let is_in = |rule: &Rule| rule.cidr.contains(&address);
        !denied.into_iter().any(is_in) && (rules::is_internet(address) || allowed.any(is_in))
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
}

/// Reads a range. Bits after the prefix are taken as meant: `10.1.2.3/8` is `10.0.0.0/8`.
pub fn parse_cidr(text: &str) -> Result<IpNet, PolicyError> {
    text.parse::<IpNet>()
        .or_else(|_| text.parse::<IpAddr>().map(IpNet::from))
        .map(|net| net.trunc())
        .map_err(|_| PolicyError::Cidr(text.to_owned()))
}

// === impl Protocol ===

impl FromStr for Protocol {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Self, PolicyError> {
        match text {
            "any" | "" => Ok(Self::Any),
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            _ => Err(PolicyError::Protocol(text.to_owned())),
        }
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
            .ok_or_else(|| PolicyError::Ports(text.to_owned()))
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
    /// Whether `name` (in any case, with or without a dot at the end) is meant.
    pub fn matches(&self, name: &str) -> bool {
        let name = name.strip_suffix('.').unwrap_or(name).as_bytes();
        let own = self.name.as_bytes();
        let Some(before) = name.len().checked_sub(own.len()) else {
            return false;
        };
        if !name[before..].eq_ignore_ascii_case(own) {
            return false;
        }
        match self.below {
            true => before > 1 && name[before - 1] == b'.',
            false => before == 0,
        }
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
        let name = name.strip_suffix('.').unwrap_or(name);
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
            return Err(PolicyError::Domain(text.to_owned()));
        }
        Ok(Self {
            name: name.to_ascii_lowercase(),
            below,
        })
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
            "a..b",
            "*.*.com",
            "-a.com",
            "a-.com",
            "a b.com",
            "10.0.0.1",
            "a/b",
            "exämple.com",
            "a;b.com",
            "}",
            &long,
            &format!("{}.com", "a.".repeat(126)),
        ] {
            assert!(domain.parse::<DomainPattern>().is_err(), "{domain}");
        }
    }

    #[test]
    fn patterns_match_what_they_say() {
        let matches =
            |pattern: &str, name: &str| pattern.parse::<DomainPattern>().unwrap().matches(name);
        assert!(matches("Example.com", "eXample.COM."));
        assert!(!matches("example.com", "www.example.com"));
        assert!(matches("*.example.com", "a.b.example.com"));
        for other in [
            "example.com",
            ".example.com",
            "badexample.com",
            "example.com.evil.org",
            "",
        ] {
            assert!(!matches("*.example.com", other), "{other}");
        }
    }

    #[test]
    fn a_policy_is_read_whole_or_not_at_all() {
        let text = r#"{ "internet": false, "deny": [], "allow": [{ "cidr": "10.0.0.0/8",
            "protocol": "tcp", "ports": ["443", "8000-8999"] }], "allow_domains": ["*.example.com"] }"#;
        let policy: Policy = serde_json::from_str(text).unwrap();
        policy.validate().unwrap();
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
            r#"{ "internets": true }"#,
            r#"{ "allow": [{ "cidr": "10.0.0.0/40" }] }"#,
            r#"{ "allow_domains": ["a b"] }"#,
            r#"{ "dns_servers": ["dns.example.com"] }"#,
        ] {
            assert!(serde_json::from_str::<Policy>(wrong).is_err(), "{wrong}");
        }
        let too_many = Policy {
            allow_domains: vec!["a.com".parse().unwrap(); MAX_DOMAINS + 1],
            ..Policy::default()
        };
        assert!(matches!(
            too_many.validate(),
            Err(PolicyError::TooMany { count: 257, .. })
        ));
    }

    proptest! {
        #[test]
        fn whatever_parses_is_harmless_as_text(text in "\\PC{0,40}") {
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
