//! Finding the daemon.

use std::error::Error as _;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use soulbox_proto::host::v1::network_service_client::NetworkServiceClient;
use soulbox_proto::host::v1::node_service_client::NodeServiceClient;
use soulbox_proto::host::v1::sandbox_service_client::SandboxServiceClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use super::error::CliError;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const WINDOW_BYTES: u32 = 1024 * 1024;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Host {
    Unix(PathBuf),
    Tcp(String),
}

// === impl Host ===

impl Host {
    pub(super) fn parse(host: &str) -> Result<Self, CliError> {
        let bad = || CliError::Host {
            host: host.to_owned(),
        };
        if let Some(path) = host.strip_prefix("unix:") {
            // Both unix:/path and unix:///path are common.
            let path = path.strip_prefix("//").unwrap_or(path);
            return if path.starts_with('/') {
                Ok(Self::Unix(path.into()))
            } else {
                Err(bad())
            };
        }
        if host.starts_with("http://") && Endpoint::from_shared(host.to_owned()).is_ok() {
            return Ok(Self::Tcp(host.to_owned()));
        }
        Err(bad())
    }

    pub(super) async fn sandboxes(&self) -> Result<SandboxServiceClient<Channel>, CliError> {
        Ok(SandboxServiceClient::new(self.channel().await?))
    }

    pub(super) async fn node(&self) -> Result<NodeServiceClient<Channel>, CliError> {
        Ok(NodeServiceClient::new(self.channel().await?))
    }

    pub(super) async fn network(&self) -> Result<NetworkServiceClient<Channel>, CliError> {
        Ok(NetworkServiceClient::new(self.channel().await?))
    }

    pub(super) async fn channel(&self) -> Result<Channel, CliError> {
        let connected = match self {
            Self::Unix(path) => {
                let path = path.clone();
                endpoint("http://soulboxd")
                    .connect_with_connector(tower::service_fn(move |_| {
                        let path = path.clone();
                        async move { UnixStream::connect(path).await.map(TokioIo::new) }
                    }))
                    .await
            }
            Self::Tcp(address) => endpoint(address).connect().await,
        };
        connected.map_err(|error| self.connect_error(&error))
    }

    fn connect_error(&self, error: &tonic::transport::Error) -> CliError {
        let host = match self {
            Self::Unix(path) => format!("unix:{}", path.display()),
            Self::Tcp(address) => address.clone(),
        };
        let mut message = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            if let Some(error) = error.downcast_ref::<io::Error>()
                && error.kind() == io::ErrorKind::PermissionDenied
            {
                return CliError::Permission { host };
            }
            message = error.to_string();
            cause = error.source();
        }
        CliError::Connect { host, message }
    }
}

fn endpoint(address: &str) -> Endpoint {
    // Parsed once already, or a constant.
    Endpoint::from_shared(address.to_owned())
        .unwrap_or_else(|_| Endpoint::from_static("http://soulboxd"))
        .connect_timeout(CONNECT_TIMEOUT)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_told_apart() {
        let unix = Host::Unix("/run/s.sock".into());
        assert_eq!(Host::parse("unix:/run/s.sock").unwrap(), unix);
        assert_eq!(Host::parse("unix:///run/s.sock").unwrap(), unix);
        assert!(matches!(
            Host::parse("http://10.0.0.5:7600"),
            Ok(Host::Tcp(_))
        ));
        for bad in [
            "",
            "unix:relative",
            "/run/s.sock",
            "https://x",
            "localhost:1",
            "http://a b",
        ] {
            assert!(Host::parse(bad).is_err(), "{bad}");
        }
    }
}
