//! `[proxy]` and `[forwards]` of the daemon's configuration.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use serde::Deserialize;

use super::proxy::is_domain;
use crate::config::Violation;

/// A minute: whoever waits longer has given up.
const MAX_CONNECT_MS: u64 = 60_000;
/// Each is two descriptors.
const MAX_CONNECTIONS: usize = 65_536;

/// The HTTP proxy.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Proxy {
    /// "IP:PORT", or empty for no proxy.
    pub listen: String,
    /// `<port>-<sandbox>` of it is a guest's port.
    pub domain: String,
    pub max_connections: usize,
    /// For a connection into the guest.
    pub connect_timeout_ms: u64,
    /// For a request's head, and for the pause between requests.
    pub header_timeout_ms: u64,
}

/// Ports of the host that lead to ports of guests.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Forwards {
    /// Where forwards listen that do not say.
    pub bind_address: IpAddr,
    /// Of each forward; more wait in its backlog.
    pub max_connections: usize,
    pub connect_timeout_ms: u64,
}

// === impl Proxy ===

impl Proxy {
    /// Where to listen; none when the proxy is off, or [`Self::violations`] would
    /// say that the address is bad.
    pub fn address(&self) -> Option<SocketAddr> {
        self.listen.parse().ok()
    }

    pub fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.connect_timeout_ms)
    }

    pub fn header_timeout(&self) -> Duration {
        Duration::from_millis(self.header_timeout_ms)
    }

    /// Every rule that a value breaks.
    pub fn violations(&self) -> Vec<Violation> {
        let mut found = Vec::new();
        if !self.listen.is_empty() && self.address().is_none() {
            found.push(Violation {
                field: "proxy.listen",
                mend: format!(
                    "is {:?}; give IP:PORT, such as \"127.0.0.1:8080\", or \"\" for none",
                    self.listen
                ),
            });
        }
        let is_off = self.listen.is_empty() && self.domain.is_empty();
        if !is_off && !is_domain(&self.domain) {
            found.push(Violation {
                field: "proxy.domain",
                mend: format!(
                    "is {:?}; give a domain in lower case whose subdomains lead here, such as \"sandbox.example.com\"",
                    self.domain
                ),
            });
        }
        connections("proxy.max_connections", self.max_connections, &mut found);
        for (field, value) in [
            ("proxy.connect_timeout_ms", self.connect_timeout_ms),
            ("proxy.header_timeout_ms", self.header_timeout_ms),
        ] {
            milliseconds(field, value, &mut found);
        }
        found
    }
}

// === impl Forwards ===

impl Forwards {
    pub fn connect_timeout(&self) -> Duration {
        Duration::from_millis(self.connect_timeout_ms)
    }

    /// Every rule that a value breaks.
    pub fn violations(&self) -> Vec<Violation> {
        let mut found = Vec::new();
        connections("forwards.max_connections", self.max_connections, &mut found);
        milliseconds(
            "forwards.connect_timeout_ms",
            self.connect_timeout_ms,
            &mut found,
        );
        found
    }
}

fn connections(field: &'static str, value: usize, found: &mut Vec<Violation>) {
    if !(1..=MAX_CONNECTIONS).contains(&value) {
        found.push(Violation {
            field,
            mend: format!("is {value}; give 1 to {MAX_CONNECTIONS}"),
        });
    }
}

fn milliseconds(field: &'static str, value: u64, found: &mut Vec<Violation>) {
    if !(1..=MAX_CONNECT_MS).contains(&value) {
        found.push(Violation {
            field,
            mend: format!("is {value}; give 1 to {MAX_CONNECT_MS} milliseconds"),
        });
    }
}

// === impl Default ===

impl Default for Proxy {
    fn default() -> Self {
        Self {
            listen: String::new(),
            domain: String::new(),
            max_connections: 4096,
            connect_timeout_ms: 5_000,
            header_timeout_ms: 30_000,
        }
    }
}

impl Default for Forwards {
    fn default() -> Self {
        Self {
            bind_address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            max_connections: 256,
            connect_timeout_ms: 5_000,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxy(text: &str) -> Vec<&'static str> {
        let config: Proxy = toml::from_str(text).unwrap();
        let violations = config.violations();
        violations.iter().map(|violation| violation.field).collect()
    }

    #[test]
    fn the_defaults_are_valid_and_off() {
        assert_eq!(proxy(""), [] as [&str; 0]);
        assert_eq!(Proxy::default().address(), None);
        assert_eq!(Forwards::default().violations(), []);
        let on = "listen = \"[::1]:80\"\ndomain = \"sandbox.example.com\"";
        assert_eq!(proxy(on), [] as [&str; 0]);
    }

    #[test]
    fn every_bad_value_is_named() {
        for (text, field) in [
            (
                "listen = \"localhost:80\"\ndomain = \"a.b\"",
                "proxy.listen",
            ),
            ("listen = \"127.0.0.1:80\"", "proxy.domain"),
            ("domain = \"*.example.com\"", "proxy.domain"),
            ("domain = \"Example.com\"", "proxy.domain"),
            ("max_connections = 0", "proxy.max_connections"),
            ("connect_timeout_ms = 0", "proxy.connect_timeout_ms"),
            ("header_timeout_ms = 60001", "proxy.header_timeout_ms"),
        ] {
            assert_eq!(proxy(text), [field], "{text}");
        }
        for (text, field) in [
            ("max_connections = 65537", "forwards.max_connections"),
            ("connect_timeout_ms = 0", "forwards.connect_timeout_ms"),
        ] {
            let config: Forwards = toml::from_str(text).unwrap();
            assert_eq!(config.violations()[0].field, field);
        }
        assert!(toml::from_str::<Forwards>("bind = \"::1\"").is_err());
        assert!(toml::from_str::<Proxy>("listening = \"\"").is_err());
    }
}
