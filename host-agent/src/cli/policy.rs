//! Policies as people give them: a word or a file, and what flags add to it.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use clap::ValueHint;
use clap::builder::{PathBufValueParser, TypedValueParser as _};
use soulbox_proto::host::v1::create_sandbox_request;

use super::error::CliError;
use crate::net::{DomainPattern, Policy, PolicyError, Rule, parse_address, parse_cidr};
use crate::service::convert::policy_to_proto;

/// The network of a sandbox that is to be made.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub(super) struct NetArgs {
    /// Its network: none, off (may be opened later), internet, or a FILE with a
    /// policy [default: the node's].
    ///
    /// FILE is JSON or TOML with the fields of NetworkPolicy in docs/protocol.md, such
    /// as {"internet": false, "allow_domains": ["*.example.com"]}; `soulbox net show
    /// --output json` has one under "policy".
    #[arg(long, value_name = "none|off|internet|FILE", value_hint = ValueHint::FilePath,
        value_parser = PathBufValueParser::new().map(Net::from))]
    net: Option<Net>,
    #[command(flatten)]
    additions: Additions,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Net {
    None,
    Policy(Base),
}

/// What flags add to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Base {
    Off,
    Internet,
    File(PathBuf),
}

#[derive(Debug, Clone, Default, PartialEq, Eq, clap::Args)]
pub(super) struct Additions {
    /// Allow a range: CIDR[:PORTS][/tcp|/udp], such as 10.1.0.0/16,
    /// 203.0.113.7:443/tcp or [2001:db8::/32]:80,8000-8999; may be repeated.
    #[arg(long, value_name = "RULE", value_parser = rule)]
    allow: Vec<Rule>,
    /// Deny a range, whatever is allowed; may be repeated.
    #[arg(long, value_name = "RULE", value_parser = rule)]
    deny: Vec<Rule>,
    /// Allow a domain: example.com, or *.example.com for all names below it; may be
    /// repeated.
    #[arg(long = "allow-domain", value_name = "NAME")]
    allow_domains: Vec<DomainPattern>,
    /// Resolve names with this server, which the host asks on port 53; may be repeated
    /// [default: the host's resolvers].
    #[arg(long = "dns", value_name = "ADDRESS", value_parser = parse_address)]
    dns_servers: Vec<IpAddr>,
    /// Bytes that it sends in a second, such as 500k or 10M; 0: no limit.
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    send_limit: Option<u64>,
    /// Bytes that it receives in a second.
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    receive_limit: Option<u64>,
}

// === impl NetArgs ===

impl NetArgs {
    /// None: what the node has as its default.
    pub(super) fn request(self) -> Result<Option<create_sandbox_request::Network>, CliError> {
        use create_sandbox_request::Network;
        match self.net {
            Some(Net::Policy(base)) => {
                let policy = self.additions.to(base.policy()?);
                Ok(Some(Network::NetworkPolicy(policy_to_proto(&policy))))
            }
            _ if !self.additions.is_empty() => Err(CliError::NothingToAddTo),
            Some(Net::None) => Ok(Some(Network::NoNetwork(true))),
            None => Ok(None),
        }
    }
}

impl From<PathBuf> for Net {
    fn from(text: PathBuf) -> Self {
        match text.to_str() {
            Some("none") => Self::None,
            _ => Self::Policy(text.into()),
        }
    }
}

// === impl Base ===

impl Base {
    pub(super) fn policy(&self) -> Result<Policy, CliError> {
        match self {
            Self::Off => Ok(Policy {
                internet: false,
                ..Policy::default()
            }),
            Self::Internet => Ok(Policy::default()),
            Self::File(path) => read(path),
        }
    }
}

impl From<PathBuf> for Base {
    fn from(text: PathBuf) -> Self {
        match text.to_str() {
            Some("off") => Self::Off,
            Some("internet") => Self::Internet,
            _ => Self::File(text),
        }
    }
}

// === impl Additions ===

impl Additions {
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// `policy` with these; what it has already is not added again.
    pub(super) fn to(self, mut policy: Policy) -> Policy {
        add(&mut policy.allow, self.allow);
        add(&mut policy.deny, self.deny);
        add(&mut policy.allow_domains, self.allow_domains);
        add(&mut policy.dns_servers, self.dns_servers);
        for (limit, bytes) in [
            (&mut policy.send, self.send_limit),
            (&mut policy.receive, self.receive_limit),
        ] {
            limit.bytes_per_second = bytes.unwrap_or(limit.bytes_per_second);
        }
        policy
    }
}

fn add<T: PartialEq>(list: &mut Vec<T>, more: Vec<T>) {
    for item in more {
        if !list.contains(&item) {
            list.push(item);
        }
    }
}

fn read(path: &Path) -> Result<Policy, CliError> {
    let text = std::fs::read_to_string(path).map_err(|source| CliError::PolicyUnreadable {
        path: path.to_owned(),
        source,
    })?;
    parse(&text).map_err(|message| CliError::PolicyInvalid {
        path: path.to_owned(),
        message,
    })
}

/// As JSON or TOML. An error says which field it is about, and where that is.
fn parse(text: &str) -> Result<Policy, String> {
    // TOML never begins like that.
    if text.trim_start().starts_with('{') {
        let mut json = serde_json::Deserializer::from_str(text);
        let policy = serde_path_to_error::deserialize(&mut json).map_err(located)?;
        json.end().map_err(|error| error.to_string())?;
        return Ok(policy);
    }
    let toml =
        toml::Deserializer::parse(text).map_err(|error| error.to_string().trim_end().to_owned())?;
    serde_path_to_error::deserialize(toml).map_err(located)
}

fn located<E: std::fmt::Display>(error: serde_path_to_error::Error<E>) -> String {
    let field = error.path().to_string();
    let said = error.into_inner().to_string();
    match field.as_str() {
        // Of the whole.
        "." => said.trim_end().to_owned(),
        field => format!("{field}: {}", said.trim_end()),
    }
}

fn rule(text: &str) -> Result<Rule, PolicyError> {
    let (range, protocol) = ["tcp", "udp"]
        .into_iter()
        .find_map(|protocol| {
            let range = text.strip_suffix(protocol)?.strip_suffix('/')?;
            Some((range, protocol))
        })
        .unwrap_or((text, "any"));
    let bracketed = range.strip_prefix('[');
    let (cidr, ports) = match bracketed.and_then(|range| range.split_once("]:")) {
        Some((cidr, ports)) => (cidr, Some(ports)),
        // The colons of an address are no ports.
        None if parse_cidr(range).is_ok() => (range, None),
        None => match range.rsplit_once(':') {
            Some((cidr, ports)) => (cidr, Some(ports)),
            None => (range, None),
        },
    };
    let ports: Vec<&str> = ports.iter().flat_map(|ports| ports.split(',')).collect();
    Rule::parse(cidr, protocol, &ports)
}

/// "500k", "10M" or "1G", by the thousand; "/s" may follow.
fn bytes(text: &str) -> Result<u64, String> {
    let mend = || format!("{text:?} is no rate; give bytes a second, such as 500k, 10M or 1G");
    let number = text.strip_suffix("/s").unwrap_or(text);
    let units = [("k", 1000), ("M", 1_000_000), ("G", 1_000_000_000)];
    let (number, unit) = units
        .into_iter()
        .find_map(|(name, unit)| Some((number.strip_suffix(name)?, unit)))
        .unwrap_or((number, 1));
    // Parsing would take a sign.
    let digits = number.bytes().all(|byte| byte.is_ascii_digit());
    let number: Option<u64> = number.parse().ok().filter(|_| digits);
    number
        .and_then(|number| number.checked_mul(unit))
        .ok_or_else(mend)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        net: NetArgs,
    }

    fn request(args: &[&str]) -> Result<Option<create_sandbox_request::Network>, CliError> {
        let args = ["soulbox"].iter().chain(args);
        Command::try_parse_from(args).unwrap().net.request()
    }

    fn policy(args: &[&str]) -> Policy {
        match request(args).unwrap() {
            Some(create_sandbox_request::Network::NetworkPolicy(policy)) => {
                crate::service::convert::policy_from_proto(&policy, "").unwrap()
            }
            other => panic!("{args:?}: {other:?}"),
        }
    }

    #[test]
    fn words_are_networks() {
        assert_eq!(request(&[]).unwrap(), None);
        let none = create_sandbox_request::Network::NoNetwork(true);
        assert_eq!(request(&["--net", "none"]).unwrap(), Some(none));
        assert_eq!(policy(&["--net", "internet"]), Policy::default());
        assert!(!policy(&["--net", "off"]).internet);
    }

    #[test]
    fn flags_add_to_what_was_said() {
        let policy = policy(&[
            "--net",
            "off",
            "--allow",
            "10.1.0.0/16:443/tcp",
            "--allow",
            "10.1.0.0/16:443/tcp",
            "--deny",
            "10.1.2.3",
            "--allow-domain",
            "*.Example.com",
            "--dns",
            "9.9.9.9",
            "--send-limit",
            "10M",
        ]);
        let expected = Policy {
            internet: false,
            allow: vec![Rule::parse("10.1.0.0/16", "tcp", &["443"]).unwrap()],
            deny: vec![Rule::parse("10.1.2.3", "any", &[]).unwrap()],
            allow_domains: vec!["*.example.com".parse().unwrap()],
            dns_servers: vec!["9.9.9.9".parse().unwrap()],
            send: crate::net::RateLimit {
                bytes_per_second: 10_000_000,
                packets_per_second: 0,
            },
            ..Policy::default()
        };
        assert_eq!(policy, expected);
        let lifted = Additions {
            send_limit: Some(0),
            ..Additions::default()
        };
        assert_eq!(lifted.to(policy).send, crate::net::RateLimit::default());
    }

    #[test]
    fn flags_need_something_to_add_to() {
        for args in [
            &["--allow", "10.0.0.0/8"][..],
            &["--net", "none", "--dns", "9.9.9.9"],
        ] {
            let refused = request(args);
            assert!(matches!(refused, Err(CliError::NothingToAddTo)), "{args:?}");
        }
    }

    #[test]
    fn rules_have_ports_and_protocols() {
        for (text, cidr, protocol, ports) in [
            ("10.1.0.0/16", "10.1.0.0/16", "any", &[][..]),
            ("10.1.2.3", "10.1.2.3/32", "any", &[]),
            ("10.1.2.3/udp", "10.1.2.3/32", "udp", &[]),
            ("10.1.2.3:53/udp", "10.1.2.3/32", "udp", &["53"]),
            (
                "0.0.0.0/0:80,8000-8999",
                "0.0.0.0/0",
                "any",
                &["80", "8000-8999"],
            ),
            ("2001:db8::/32", "2001:db8::/32", "any", &[]),
            ("2001:db8::1/tcp", "2001:db8::1/128", "tcp", &[]),
            ("[2001:db8::/32]:443/tcp", "2001:db8::/32", "tcp", &["443"]),
        ] {
            let expected = Rule::parse(cidr, protocol, ports).unwrap();
            assert_eq!(rule(text), Ok(expected), "{text}");
        }
        for bad in [
            "",
            "example.com",
            "10.0.0.0/8:",
            "10.0.0.0/8:http",
            "10.0.0.0/8:80,",
            "10.0.0.0/8/icmp",
            "[2001:db8::/32]443",
            "/tcp",
            ":80",
        ] {
            assert!(rule(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn rates_have_units() {
        assert_eq!(bytes("0"), Ok(0));
        assert_eq!(bytes("1500"), Ok(1500));
        assert_eq!(bytes("500k"), Ok(500_000));
        assert_eq!(bytes("10M/s"), Ok(10_000_000));
        for bad in [
            "",
            "M",
            "/s",
            "-1",
            "+1",
            "1.5M",
            "1m",
            "1MM",
            "99999999999999999999",
            "99999999999G",
        ] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn files_are_json_or_toml() {
        let json = r#" {"internet": false, "allow": [{"cidr": "10.0.0.7", "ports": ["53"]}]}"#;
        let toml = "internet = false\n[[allow]]\ncidr = '10.0.0.7/32'\nports = ['53']\n";
        let expected = Policy {
            internet: false,
            allow: vec![Rule::parse("10.0.0.7", "", &["53"]).unwrap()],
            ..Policy::default()
        };
        assert_eq!(parse(json), Ok(expected.clone()));
        assert_eq!(parse(toml), Ok(expected));
    }

    #[test]
    fn the_documentation_shows_a_policy() {
        let documented = include_str!("../../../docs/protocol.md");
        let (_, from) = documented.split_once("```\n{\"internet\"").unwrap();
        let (policy, _) = from.split_once("```").unwrap();
        let policy = parse(&format!("{{\"internet\"{policy}")).unwrap();
        assert_eq!(policy.violations(), []);
        assert_eq!(policy.allow_domains.len(), 2);
    }

    #[test]
    fn a_wrong_field_is_named() {
        for (text, said) in [
            (
                r#"{"internet": true, "deny": [{"cidr": "::/0"}, {"cidr": "::/129"}]}"#,
                "deny[1].cidr: ",
            ),
            (
                "internet = true\n[[deny]]\ncidr = '::/129'",
                "deny[0].cidr: ",
            ),
            (
                "internet = true\n[[deny]]\ncidr = '::/0'\nports = ['1', '0']",
                "deny[0].ports[1]: ",
            ),
            (
                r#"{"internet": true, "allow_domains": ["a b"]}"#,
                "allow_domains[0]: ",
            ),
            ("internet = 1", "internet: "),
            ("", "internet"),
            ("{}", "internet"),
            ("internet = true\ndenny = []", "denny"),
            (r#"{"internet": true} x"#, "trailing"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
    }
}
