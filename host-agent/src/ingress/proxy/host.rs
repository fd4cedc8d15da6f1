//! `<port>-<sandbox>.<domain>`: which port of which sandbox a host name means.

use crate::id::SandboxId;

/// RFC 1035, section 2.3.4, less the label in front of the domain and its dot.
const MAX_DOMAIN_BYTES: usize = 253 - (5 + 1 + SandboxId::LEN) - 1;
const MAX_LABEL_BYTES: usize = 63;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub sandbox: SandboxId,
    pub port: u16,
}

/// Why a request's host names no port of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    #[error("the request names no host, or several: send one Host header")]
    Missing,
    #[error("the host is not below {domain}: use <port>-<sandbox>.{domain}")]
    Domain { domain: String },
    #[error("the host has no port in front: use <port>-<sandbox>.{domain}, port 1 to 65535")]
    Port { domain: String },
    #[error(
        "the host names no sandbox: use <port>-<sandbox>.{domain}, with an id as `soulbox ls` prints it"
    )]
    Sandbox { domain: String },
}

/// Reads `host`, which may carry a port of the proxy's and any letter case.
pub(super) fn parse(host: &[u8], domain: &str) -> Result<Target, HostError> {
    let elsewhere = || HostError::Domain {
        domain: domain.to_owned(),
    };
    let host = str::from_utf8(host).map_err(|_| elsewhere())?;
    let name = match host.rsplit_once(':') {
        Some((name, port)) if is_number(port) || port.is_empty() => name,
        Some(_) => return Err(elsewhere()),
        None => host,
    };
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    let label = name
        .strip_suffix(domain)
        .and_then(|label| label.strip_suffix('.'))
        .ok_or_else(elsewhere)?;
    let (port, sandbox) = label.split_once('-').unwrap_or((label, ""));
    // `parse` alone would take "+80".
    let port = Some(port)
        .filter(|port| is_number(port) && !port.starts_with('0'))
        .and_then(|port| port.parse().ok())
        .ok_or_else(|| HostError::Port {
            domain: domain.to_owned(),
        })?;
    let sandbox = sandbox.parse().map_err(|_| HostError::Sandbox {
        domain: domain.to_owned(),
    })?;
    Ok(Target { sandbox, port })
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Whether `domain` can stand behind `<port>-<sandbox>.`.
pub(in crate::ingress) fn is_domain(domain: &str) -> bool {
    domain.len() <= MAX_DOMAIN_BYTES
        && domain.split('.').all(|label| {
            let is_inner = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-');
            (1..=MAX_LABEL_BYTES).contains(&label.len())
                && label.bytes().all(is_inner)
                && !label.starts_with('-')
                && !label.ends_with('-')
        })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DOMAIN: &str = "sandbox.example.com";
    const ID: &str = "sb-abcdefghijklmnopqrst";

    fn read(host: &str) -> Result<Target, HostError> {
        parse(host.as_bytes(), DOMAIN)
    }

    #[test]
    fn a_host_names_a_port_and_a_sandbox() {
        let target = Target {
            sandbox: ID.parse().unwrap(),
            port: 8080,
        };
        for host in [
            format!("8080-{ID}.{DOMAIN}"),
            format!("8080-{ID}.{DOMAIN}."),
            format!("8080-{ID}.{DOMAIN}:443"),
            format!("8080-{ID}.{DOMAIN}:"),
            format!("8080-{ID}.{DOMAIN}").to_ascii_uppercase(),
        ] {
            assert_eq!(read(&host).as_ref(), Ok(&target), "{host}");
        }
    }

    #[test]
    fn a_bad_host_is_told_what_is_bad_about_it() {
        let domain = || DOMAIN.to_owned();
        for host in ["", "localhost", DOMAIN, "127.0.0.1:80", "[::1]:80"] {
            assert_eq!(read(host), Err(HostError::Domain { domain: domain() }));
        }
        for host in [
            format!("8080-{ID}.example.com"),
            format!("8080-{ID}{DOMAIN}"),
            format!("8080-{ID}.{DOMAIN}:x"),
            format!("8080-{ID}.{DOMAIN}.evil.test"),
        ] {
            assert_eq!(read(&host), Err(HostError::Domain { domain: domain() }));
        }
        for port in ["", "0", "+80", "080", "65536", "http", "99999999999999"] {
            let host = format!("{port}-{ID}.{DOMAIN}");
            assert_eq!(read(&host), Err(HostError::Port { domain: domain() }));
        }
        for sandbox in ["", "sb-", "sn-abcdefghijklmnopqrst", "x.sb-a"] {
            let host = format!("80-{sandbox}.{DOMAIN}");
            assert_eq!(read(&host), Err(HostError::Sandbox { domain: domain() }));
        }
        let host = format!("80-a.{ID}.{DOMAIN}");
        assert_eq!(read(&host), Err(HostError::Sandbox { domain: domain() }));
    }

    #[test]
    fn a_domain_leaves_room_for_its_subdomains() {
        for good in ["localhost", "a.b", "x-1.example.com"] {
            assert!(is_domain(good), "{good}");
        }
        let long = ["a".repeat(60).as_str(); 4].join(".");
        for bad in ["", ".", "a..b", ".a", "a.", "-a", "a-", "A", "a_b", &long] {
            assert!(!is_domain(bad), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_host_is_too_strange(host in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&host, DOMAIN);
        }

        #[test]
        fn what_is_read_is_what_was_written(
            port in 1_u16..,
            id in "[a-z2-7]{20}",
            suffix in "\\.?(:[0-9]{0,5})?",
        ) {
            let target = read(&format!("{port}-sb-{id}.{DOMAIN}{suffix}")).unwrap();
            prop_assert_eq!(target.port, port);
            prop_assert_eq!(target.sandbox.as_str(), format!("sb-{id}"));
        }

        // Whatever is accepted is the name again, but for case and the suffix.
        #[test]
        fn nothing_else_is_accepted(host in "[0-9+]{0,6}-?(sb-)?[a-zA-Z2-7.]{18,22}\\.sandbox\\.example\\.com[.:0-9]{0,3}") {
            if let Ok(Target { sandbox, port }) = read(&host) {
                let name = format!("{port}-{sandbox}.{DOMAIN}");
                prop_assert!(host.to_ascii_lowercase().starts_with(&name));
            }
        }
    }
}
