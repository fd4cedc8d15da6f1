//! Which names a guest may resolve, and what an answer opens.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use hickory_proto::rr::Name;

use crate::net::{DomainId, DomainPattern};

/// Whether a guest may be told of an address.
pub type Filter = Arc<dyn Fn(&IpAddr) -> bool + Send + Sync>;

/// A guest's, while it lasts.
#[derive(Clone)]
pub struct Policy {
    /// Names that may be resolved, and whose addresses are opened.
    pub domains: Vec<DomainPattern>,
    /// Names that are none of those.
    pub others: Others,
    /// Asked in this order, starting with the one that answered last. It is the host
    /// that asks: servers of a caller's choice are to be checked first.
    pub upstreams: Vec<SocketAddr>,
    /// Addresses that it refuses are taken out of answers: a name that anybody
    /// owns must not lead to where the guest may not go (DNS rebinding).
    pub allowed: Filter,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Others {
    /// Their questions are REFUSED.
    Refuse,
    /// Resolved, but their addresses are not opened.
    Resolve,
}

// === impl Policy ===

impl Policy {
    /// The domains that `name` is one of; none when it may not be resolved.
    pub(super) fn domains_of(&self, name: &Name) -> Option<Vec<DomainId>> {
        let matching = self.domains.iter().filter(|domain| domain.matches(name));
        let mut ids: Vec<DomainId> = matching.map(DomainPattern::id).collect();
        ids.sort_unstable();
        ids.dedup();
        (!ids.is_empty() || self.others == Others::Resolve).then_some(ids)
    }
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Policy")
            .field("domains", &self.domains)
            .field("others", &self.others)
            .field("upstreams", &self.upstreams)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::from_ascii(text).unwrap()
    }

    fn id(pattern: &str) -> DomainId {
        pattern.parse::<DomainPattern>().unwrap().id()
    }

    fn policy(domains: &[&str], others: Others) -> Policy {
        Policy {
            domains: domains.iter().map(|text| text.parse().unwrap()).collect(),
            others,
            upstreams: Vec::new(),
            allowed: Arc::new(|_| true),
        }
    }

    #[test]
    fn a_name_may_be_of_several_domains_or_of_none() {
        let domains = ["example.com", "*.Example.com", "*.b.example.com"];
        let policy = policy(&domains, Others::Refuse);
        let mut both = vec![id("*.example.com"), id("*.b.example.com")];
        both.sort_unstable();
        for (asked, ids) in [
            ("EXAMPLE.com", Some(vec![id("example.com")])),
            ("a.example.com.", Some(vec![id("*.example.com")])),
            ("a.b.example.com", Some(both)),
            ("example.org", None),
            (".", None),
        ] {
            assert_eq!(policy.domains_of(&name(asked)), ids, "{asked}");
        }
    }

    #[test]
    fn other_names_open_nothing() {
        // Twice the same, which is opened once.
        let policy = policy(&["*.com", "*.COM"], Others::Resolve);
        assert_eq!(policy.domains_of(&name("example.org")), Some(vec![]));
        assert_eq!(policy.domains_of(&name("a.com")), Some(vec![id("*.com")]));
    }
}
