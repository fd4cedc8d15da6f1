//! The host's own resolvers.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

const PATH: &str = "/etc/resolv.conf";
const PORT: u16 = 53;
/// resolv.conf(5): MAXNS.
const MAX_SERVERS: usize = 3;

/// Those of /etc/resolv.conf, or this machine where it names none.
pub fn host_upstreams() -> Vec<SocketAddr> {
    let servers = parse(&std::fs::read_to_string(PATH).unwrap_or_default());
    if servers.is_empty() {
        vec![SocketAddr::new(Ipv4Addr::LOCALHOST.into(), PORT)]
    } else {
        servers
    }
}

/// The `nameserver` lines of a resolv.conf(5). Addresses with a scope ("fe80::1%eth0")
/// are left out.
pub fn parse(text: &str) -> Vec<SocketAddr> {
    let addresses = text.lines().filter_map(|line| {
        let mut words = line.split_ascii_whitespace();
        (words.next()? == "nameserver").then_some(())?;
        words.next()?.parse::<IpAddr>().ok()
    });
    let servers = addresses.map(|address| SocketAddr::new(address, PORT));
    servers.take(MAX_SERVERS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nameservers_are_found() {
        let text = "# nameserver 192.0.2.9\nsearch example.com\nnameserver 192.0.2.1\n\
                    nameserver\t2001:db8::1 # second\nnameserver fe80::1%eth0\nnameserver\n\
                    nameserver 192.0.2.2\nnameserver 192.0.2.3\noptions edns0";
        let found: Vec<String> = parse(text).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["192.0.2.1:53", "[2001:db8::1]:53", "192.0.2.2:53"]);
        assert!(parse("").is_empty());
    }
}
