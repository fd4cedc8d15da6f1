//! What a proxy changes about the head of a message: RFC 9110, section 7.6.

use std::net::IpAddr;

use http::header::{self, HeaderMap, HeaderName, HeaderValue};

/// About one connection, not about the message.
const HOP_BY_HOP: [HeaderName; 6] = [
    header::CONNECTION,
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("keep-alive"),
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");

/// The protocol that `headers` ask to change to, or have changed to.
pub(super) fn upgrade(headers: &HeaderMap) -> Option<HeaderValue> {
    let asks = connection_options(headers).any(|option| option.eq_ignore_ascii_case("upgrade"));
    asks.then(|| headers.get(header::UPGRADE).cloned())
        .flatten()
}

/// Removes what was meant for this hop, and for `upgrade` says it anew.
pub(super) fn next_hop(headers: &mut HeaderMap, upgrade: Option<HeaderValue>) {
    let named: Vec<HeaderName> = connection_options(headers)
        .filter_map(|option| option.parse().ok())
        .collect();
    // Whoever names these has something else in mind than a hop.
    let end_to_end = [header::HOST, header::CONTENT_LENGTH];
    for name in named.iter().filter(|name| !end_to_end.contains(name)) {
        headers.remove(name);
    }
    for name in &HOP_BY_HOP {
        headers.remove(name);
    }
    if let Some(protocol) = upgrade {
        headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(header::UPGRADE, protocol);
    }
}

/// Says who asked, and for what. What a proxy in front of this one has said about
/// protocol and host stands: it is the one that ended TLS.
pub(super) fn forwarded(headers: &mut HeaderMap, client: IpAddr, host: &HeaderValue) {
    let client = client.to_canonical();
    let before = headers.get_all(&FORWARDED_FOR).iter();
    let mut chain: Vec<u8> = before
        .flat_map(|value| [value.as_bytes(), b", "].concat())
        .collect();
    chain.extend_from_slice(client.to_string().as_bytes());
    if let Ok(chain) = HeaderValue::from_bytes(&chain) {
        headers.insert(FORWARDED_FOR, chain);
    }
    if !headers.contains_key(&FORWARDED_PROTO) {
        headers.insert(FORWARDED_PROTO, HeaderValue::from_static("http"));
    }
    if !headers.contains_key(&FORWARDED_HOST) {
        headers.insert(FORWARDED_HOST, host.clone());
    }
}

fn connection_options(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        lines
            .iter()
            .map(|(name, value)| {
                (
                    HeaderName::from_static(name),
                    HeaderValue::from_static(value),
                )
            })
            .collect()
    }

    #[test]
    fn what_is_about_the_hop_ends_here() {
        let mut message = headers(&[
            ("host", "h"),
            ("connection", "x-private, Host"),
            ("connection", "close"),
            ("x-private", "1"),
            ("keep-alive", "timeout=5"),
            ("te", "gzip"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "h2c"),
            ("cookie", "a=b"),
        ]);
        assert_eq!(upgrade(&message), None);
        next_hop(&mut message, None);
        assert_eq!(message, headers(&[("host", "h"), ("cookie", "a=b")]));
    }

    #[test]
    fn an_upgrade_is_asked_for_anew() {
        let asked = [("connection", "keep-alive, Upgrade"), ("upgrade", "chat")];
        let mut message = headers(&asked);
        let protocol = upgrade(&message);
        next_hop(&mut message, protocol);
        let told = [("connection", "upgrade"), ("upgrade", "chat")];
        assert_eq!(message, headers(&told));
    }

    #[test]
    fn the_chain_of_clients_grows_and_the_rest_stands() {
        let host = HeaderValue::from_static("80-sb.example.com");
        let mut message = headers(&[("x-forwarded-for", "a"), ("x-forwarded-for", "b")]);
        forwarded(&mut message, "::ffff:10.0.0.1".parse().unwrap(), &host);
        assert_eq!(message["x-forwarded-for"], "a, b, 10.0.0.1");
        assert_eq!(message["x-forwarded-proto"], "http");
        assert_eq!(message["x-forwarded-host"], host);

        let mut message = headers(&[
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "outer"),
        ]);
        forwarded(&mut message, "::1".parse().unwrap(), &host);
        assert_eq!(message["x-forwarded-for"], "::1");
        assert_eq!(message["x-forwarded-proto"], "https");
        assert_eq!(message["x-forwarded-host"], "outer");
    }
}
