//! `soulbox port`: ports of the host that lead to ports of sandboxes.

use std::net::IpAddr;
use std::str::FromStr;

use soulbox_proto::host::v1::{ForwardPortRequest, ListForwardsRequest, RemoveForwardRequest};

use super::args::{Output, PortArgs};
use super::connect::Host;
use super::deletions::Deletions;
use super::error::CliError;
use super::output;

/// `[HOST_IP:][HOST_PORT:]PORT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mapping {
    /// None: the node's default.
    host_address: Option<IpAddr>,
    /// 0: any that is free.
    host_port: u16,
    port: u16,
}

pub(super) async fn port(host: &Host, format: Output, args: PortArgs) -> Result<u8, CliError> {
    match args {
        PortArgs { remove, .. } if !remove.is_empty() => rm(host, remove).await,
        PortArgs {
            id: Some(id),
            mapping: Some(mapping),
            ..
        } => add(host, format, id, mapping).await,
        PortArgs { id, .. } => ls(host, format, id.unwrap_or_default()).await,
    }
}

async fn add(
    host: &Host,
    format: Output,
    sandbox_id: String,
    mapping: Mapping,
) -> Result<u8, CliError> {
    let address = mapping.host_address;
    let request = ForwardPortRequest {
        sandbox_id,
        port: mapping.port.into(),
        host_port: mapping.host_port.into(),
        bind_address: address.map_or_else(String::new, |address| address.to_string()),
    };
    let reply = host.network().await?.forward_port(request).await?;
    let forward = reply.into_inner().forward.unwrap_or_default();
    match format {
        Output::Table => output::line(&forward.host_address)?,
        Output::Json => output::json(&output::forward(&forward))?,
    }
    Ok(0)
}

async fn ls(host: &Host, format: Output, sandbox_id: String) -> Result<u8, CliError> {
    let request = ListForwardsRequest { sandbox_id };
    let reply = host.network().await?.list_forwards(request).await?;
    let forwards = reply.into_inner().forwards;
    match format {
        Output::Table => output::forward_table(&forwards)?,
        Output::Json => output::json(&forwards.iter().map(output::forward).collect())?,
    }
    Ok(0)
}

async fn rm(host: &Host, addresses: Vec<String>) -> Result<u8, CliError> {
    let mut client = host.network().await?;
    let mut deletions = Deletions::of("forwards");
    for host_address in addresses {
        let request = RemoveForwardRequest {
            host_address: host_address.clone(),
        };
        let removed = client.remove_forward(request).await;
        deletions.tell(&host_address, removed)?;
    }
    deletions.end()
}

// === impl Mapping ===

impl FromStr for Mapping {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
        let (host_address, host_port) =
            side_of_host(host).ok_or("give [HOST_IP:][HOST_PORT:]PORT")?;
        match number(port) {
            Some(port) if port > 0 => Ok(Self {
                host_address,
                host_port,
                port,
            }),
            _ => Err("give a port from 1 to 65535".to_owned()),
        }
    }
}

/// `HOST_IP:HOST_PORT`, or one of them, or nothing. IPv6 has brackets, so that its
/// colons are its own.
fn side_of_host(text: &str) -> Option<(Option<IpAddr>, u16)> {
    if let Some(port) = number(text) {
        return Some((None, port));
    }
    let (address, port) = match text.strip_prefix('[') {
        Some(text) => {
            let (address, rest) = text.split_once(']')?;
            let port = match rest {
                "" => rest,
                rest => rest.strip_prefix(':')?,
            };
            (IpAddr::V6(address.parse().ok()?), port)
        }
        None => {
            let (address, port) = text.split_once(':').unwrap_or((text, ""));
            (IpAddr::V4(address.parse().ok()?), port)
        }
    };
    Some((Some(address), number(port)?))
}

/// 0 for nothing; no sign.
fn number(text: &str) -> Option<u16> {
    match text {
        "" => Some(0),
        text if text.bytes().all(|byte| byte.is_ascii_digit()) => text.parse().ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_may_name_the_hosts_side() {
        for (text, host_address, host_port) in [
            ("8080", None, 0),
            (":8080", None, 0),
            ("9000:8080", None, 9000),
            ("127.0.0.1:8080", Some("127.0.0.1"), 0),
            ("127.0.0.1::8080", Some("127.0.0.1"), 0),
            ("0.0.0.0:9000:8080", Some("0.0.0.0"), 9000),
            ("[::1]:8080", Some("::1"), 0),
            ("[::1]:9000:8080", Some("::1"), 9000),
        ] {
            let expected = Mapping {
                host_address: host_address.map(|address| address.parse().unwrap()),
                host_port,
                port: 8080,
            };
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_mapping_is_refused() {
        for text in [
            "",
            "0",
            "http",
            "65536",
            "+80",
            "80:",
            "x:80",
            "65536:80",
            "localhost:9000:80",
            "::1:80",
            "[::1:80",
            "[::1]9000:80",
            "[127.0.0.1]:80",
            "1:2:3",
            "127.0.0.1:1:2:3",
        ] {
            assert!(text.parse::<Mapping>().is_err(), "{text}");
        }
    }
}
