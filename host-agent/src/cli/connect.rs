//! Finding the daemon.

use std::error::Error as _;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use soulbox_proto::guest::v1::code_service_client::CodeServiceClient;
use soulbox_proto::guest::v1::filesystem_service_client::FilesystemServiceClient;
use soulbox_proto::guest::v1::metrics_service_client::MetricsServiceClient;
use soulbox_proto::guest::v1::process_service_client::ProcessServiceClient;
use soulbox_proto::guest::{DELETE_AFTER_METADATA, SANDBOX_METADATA};
use soulbox_proto::host::v1::network_service_client::NetworkServiceClient;
use soulbox_proto::host::v1::node_service_client::NodeServiceClient;
use soulbox_proto::host::v1::sandbox_service_client::SandboxServiceClient;
use tokio::net::UnixStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

use super::error::CliError;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const WINDOW_BYTES: u32 = 1024 * 1024;
/// The largest that HTTP/2 has: a call that waits for its reader holds up no other.
const CONNECTION_WINDOW_BYTES: u32 = (1 << 31) - 1;
/// Chunks of files and of programs' output are one frame each.
const FRAME_BYTES: u32 = 256 * 1024;
/// One result may be as large as all of a run's: 64 MiB, and its envelope.
const MAX_RESULT_BYTES: usize = 65 * 1024 * 1024;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Host {
    Unix(PathBuf),
    Tcp(String),
}

/// The way to one sandbox's services.
pub(super) type Guest = InterceptedService<Channel, Named>;

/// Names the sandbox that calls are for.
#[derive(Debug, Clone)]
pub(super) struct Named {
    sandbox: MetadataValue<Ascii>,
    delete_after: bool,
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

    pub(super) async fn processes(
        &self,
        id: &str,
    ) -> Result<ProcessServiceClient<Guest>, CliError> {
        Ok(ProcessServiceClient::new(self.guest(id, false).await?))
    }

    /// As [`Self::processes`]; the sandbox is deleted when a call ends.
    pub(super) async fn last_process(
        &self,
        id: &str,
    ) -> Result<ProcessServiceClient<Guest>, CliError> {
        Ok(ProcessServiceClient::new(self.guest(id, true).await?))
    }

    pub(super) async fn files(&self, id: &str) -> Result<FilesystemServiceClient<Guest>, CliError> {
        Ok(FilesystemServiceClient::new(self.guest(id, false).await?))
    }

    pub(super) async fn code(&self, id: &str) -> Result<CodeServiceClient<Guest>, CliError> {
        let client = CodeServiceClient::new(self.guest(id, false).await?);
        Ok(client.max_decoding_message_size(MAX_RESULT_BYTES))
    }

    pub(super) async fn metrics(&self, id: &str) -> Result<MetricsServiceClient<Guest>, CliError> {
        Ok(MetricsServiceClient::new(self.guest(id, false).await?))
    }

    /// What calls to the services of sandbox `id` go through.
    async fn guest(&self, id: &str, delete_after: bool) -> Result<Guest, CliError> {
        let named = Named {
            sandbox: id
                .parse()
                .map_err(|_| CliError::SandboxId { id: id.to_owned() })?,
            delete_after,
        };
        Ok(InterceptedService::new(self.channel().await?, named))
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

// === impl Named ===

impl Interceptor for Named {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let metadata = request.metadata_mut();
        metadata.insert(SANDBOX_METADATA, self.sandbox.clone());
        if self.delete_after {
            metadata.insert(DELETE_AFTER_METADATA, MetadataValue::from_static("true"));
        }
        Ok(request)
    }
}

fn endpoint(address: &str) -> Endpoint {
    // Parsed once already, or a constant.
    Endpoint::from_shared(address.to_owned())
        .unwrap_or_else(|_| Endpoint::from_static("http://soulboxd"))
        .connect_timeout(CONNECT_TIMEOUT)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
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
