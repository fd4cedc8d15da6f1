//! What the proxy says itself: JSON, for people and for programs.

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use http::{Response, StatusCode};
use http_body_util::Full;
use serde::Serialize;

use super::host::{HostError, Target};
use crate::ingress::DialError;
use crate::status::Explain as _;

/// Why a request did not reach a guest, or its answer did not come back.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error(transparent)]
    Host(#[from] HostError),
    #[error("this proxy makes no tunnels by CONNECT: use the port's own host name")]
    Connect,
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("the server on port {0} closed the connection before it answered: look at its log")]
    ConnectionLost(u16),
    #[error("the server on port {0} does not speak HTTP/1.1: use the port's forward instead")]
    BadResponse(u16),
}

#[derive(Serialize)]
struct Said<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    sandbox: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
    reason: &'a str,
    message: String,
}

// === impl Refusal ===

impl Refusal {
    fn status(&self) -> StatusCode {
        match self {
            Self::Host(_) => StatusCode::BAD_REQUEST,
            Self::Connect => StatusCode::METHOD_NOT_ALLOWED,
            Self::Dial(DialError::TimedOut { .. }) => StatusCode::GATEWAY_TIMEOUT,
            Self::Dial(_) | Self::ConnectionLost(_) | Self::BadResponse(_) => {
                StatusCode::BAD_GATEWAY
            }
        }
    }

    /// Stable, in capitals: what programs compare.
    fn reason(&self) -> &str {
        match self {
            Self::Host(_) => "HOST_INVALID",
            Self::Connect => "METHOD_INVALID",
            Self::Dial(error) => error.reason(),
            Self::ConnectionLost(_) => "CONNECTION_LOST",
            Self::BadResponse(_) => "RESPONSE_INVALID",
        }
    }

    pub(super) fn answer(&self, target: Option<&Target>) -> Response<Full<Bytes>> {
        let said = Said {
            sandbox: target.map(|target| target.sandbox.as_str()),
            port: target.map(|target| target.port),
            reason: self.reason(),
            message: self.to_string(),
        };
        // Strings and numbers: nothing that JSON cannot say.
        let mut json = serde_json::to_vec(&said).unwrap_or_default();
        json.push(b'\n');
        let mut answer = Response::new(Full::from(json));
        *answer.status_mut() = self.status();
        let headers = answer.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        answer
    }
}
