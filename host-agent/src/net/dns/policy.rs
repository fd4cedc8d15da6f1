//! Which names a guest may resolve, and what an answer opens.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use hickory_proto::rr::Name;

/// Whether a guest may be told of an address.
pub type Filter = Arc<dyn Fn(&IpAddr) -> bool + Send + Sync>;

/// A guest's, while it lasts.
#[derive(Clone)]
pub struct Policy {
    pub rules: Vec<Rule>,
    /// Names that no rule is about.
    pub others: Others,
    /// Asked in this order, starting with the one that answered last. It is the host
    /// that asks: servers of a caller's choice are to be checked first.
    pub upstreams: Vec<SocketAddr>,
    /// Addresses that it refuses are taken out of answers: a name that anybody
    /// owns must not lead to where the guest may not go (DNS rebinding).
    pub allowed: Filter,
}

/// Names that may be resolved, and what their addresses are opened by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    pub id: u32,
    pub pattern: Pattern,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Others {
    /// Their questions are REFUSED.
    Refuse,
    /// Resolved, but their addresses are not opened.
    Resolve,
}

/// "example.com", or "*.example.com" for every name below it, but not itself.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Pattern {
    name: Name,
    below: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no domain: give one such as \"example.com\", or \"*.example.com\" for every name below it"
)]
pub struct PatternError {
    text: String,
}

// === impl Policy ===

impl Policy {
    /// The rules whose addresses `name` opens; none when it may not be resolved.
    pub(super) fn rules_for(&self, name: &Name) -> Option<Vec<u32>> {
        let matching = self.rules.iter().filter(|rule| rule.pattern.matches(name));
        let mut ids: Vec<u32> = matching.map(|rule| rule.id).collect();
        ids.sort_unstable();
        ids.dedup();
        (!ids.is_empty() || self.others == Others::Resolve).then_some(ids)
    }
}

// === impl Pattern ===

impl Pattern {
    fn matches(&self, name: &Name) -> bool {
        if self.below {
            self.name.zone_of(name) && name.iter().len() > self.name.iter().len()
        } else {
            self.name == *name
        }
    }
}

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let error = || PatternError {
            text: text.chars().take(64).collect(),
        };
        let (domain, below) = match text.strip_prefix("*.") {
            Some(domain) => (domain, true),
            None => (text, false),
        };
        // An address is a rule of another kind, and "\." is not worth having.
        if domain.parse::<IpAddr>().is_ok() || domain.contains('\\') {
            return Err(error());
        }
        // Names in other scripts become what is asked for them (IDNA).
        let mut name = Name::from_utf8(domain).map_err(|_| error())?;
        name.set_fqdn(true);
        let is_inner = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        let is_domain = !name.is_root() && name.iter().flatten().all(is_inner);
        is_domain.then_some(Self { name, below }).ok_or_else(error)
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name.to_ascii();
        let star = if self.below { "*." } else { "" };
        write!(f, "{star}{}", name.trim_end_matches('.'))
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Policy")
            .field("rules", &self.rules)
            .field("others", &self.others)
            .field("upstreams", &self.upstreams)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(text: &str) -> Name {
        let mut name = Name::from_ascii(text).unwrap();
        name.set_fqdn(true);
        name
    }

    fn policy(rules: &[(u32, &str)], others: Others) -> Policy {
        let rules = rules.iter().map(|&(id, pattern)| Rule {
            id,
            pattern: pattern.parse().unwrap(),
        });
        Policy {
            rules: rules.collect(),
            others,
            upstreams: Vec::new(),
            allowed: Arc::new(|_| true),
        }
    }

    #[test]
    fn patterns_match_whole_labels_in_any_case() {
        let rules = [
            (1, "example.com"),
            (2, "*.Example.com"),
            (3, "*.b.example.com"),
        ];
        let policy = policy(&rules, Others::Refuse);
        for (asked, ids) in [
            ("example.com", Some(vec![1])),
            ("EXAMPLE.com", Some(vec![1])),
            ("a.example.com", Some(vec![2])),
            ("a.b.example.com", Some(vec![2, 3])),
            ("b.example.com", Some(vec![2])),
            ("*.example.com", Some(vec![2])),
            ("notexample.com", None),
            ("example.com.evil.test", None),
            ("com", None),
            (".", None),
        ] {
            assert_eq!(policy.rules_for(&name(asked)), ids, "{asked}");
        }
    }

    #[test]
    fn other_names_open_nothing() {
        let policy = policy(&[(7, "example.com"), (7, "*.com")], Others::Resolve);
        assert_eq!(policy.rules_for(&name("example.org")), Some(vec![]));
        assert_eq!(policy.rules_for(&name("a.com")), Some(vec![7]));
    }

    #[test]
    fn a_malformed_domain_is_refused() {
        let long = format!("{}.com", "a".repeat(64));
        for bad in [
            "",
            ".",
            "*",
            "*.",
            "a..b",
            ".a",
            "*.*.com",
            "a.*.com",
            "exa mple.com",
            "a/b",
            "a\\.b",
            "a:80",
            "10.0.0.1",
            "::1",
            "https://a",
            &long,
        ] {
            assert!(bad.parse::<Pattern>().is_err(), "{bad}");
        }
        for (good, shown) in [
            ("example.com", "example.com"),
            ("*.example.com.", "*.example.com"),
            ("_dmarc.Example.com", "_dmarc.example.com"),
            ("bücher.example", "xn--bcher-kva.example"),
            ("localhost", "localhost"),
        ] {
            let shown_as = good.parse::<Pattern>().unwrap().to_string();
            assert_eq!(shown_as.to_lowercase(), shown);
        }
    }

    proptest! {
        #[test]
        fn what_is_taken_for_a_pattern_is_shown_as_one(text in "\\PC{0,80}|(\\*\\.)?[a-zA-Z0-9.*_-]{0,40}") {
            if let Ok(pattern) = text.parse::<Pattern>() {
                prop_assert_eq!(pattern.to_string().parse::<Pattern>().unwrap(), pattern);
            }
        }
    }
}
