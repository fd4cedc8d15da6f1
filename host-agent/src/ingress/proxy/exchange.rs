//! One request to a guest, and its answer.

use std::net::IpAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{Method, Request, Response, StatusCode, Uri, Version};
use http_body_util::{Either, Full};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::client::conn::http1;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::copy_bidirectional;
use tokio_util::task::AbortOnDropHandle;

use super::answer::Refusal;
use super::host::{HostError, Target, parse};
use super::{MAX_HEAD_BYTES, MAX_HEADERS, Shared, headers};
use crate::ingress::dial_within;
use crate::sync::lock;

/// A guest's body, or the proxy's own.
pub(super) type Answer = Response<Either<Relayed, Full<Bytes>>>;

/// The body of a guest's answer. Dropping it, as happens when the client goes
/// away, ends the connection to the guest, whatever that was doing.
pub(super) struct Relayed {
    body: Incoming,
    /// None where a tunnel has it.
    _connection: Option<AbortOnDropHandle<()>>,
}

/// A client's connection that has changed its protocol, and the guest's.
pub(super) struct Tunnel {
    client: OnUpgrade,
    guest: OnUpgrade,
    _connection: Option<AbortOnDropHandle<()>>,
}

/// One client's connection.
pub(super) struct Client {
    pub(super) shared: Arc<Shared>,
    pub(super) address: IpAddr,
    /// Where the connection goes on once HTTP is over.
    pub(super) tunnel: Mutex<Option<Tunnel>>,
}

// === impl Client ===

impl Client {
    pub(super) async fn answer(&self, request: Request<Incoming>) -> Answer {
        let mut target = None;
        match self.exchange(request, &mut target).await {
            Ok(answer) => answer.map(Either::Left),
            Err(refusal) => {
                tracing::debug!(client = %self.address, ?target, %refusal, "a proxied request failed");
                refusal.answer(target.as_ref()).map(Either::Right)
            }
        }
    }

    async fn exchange(
        &self,
        mut request: Request<Incoming>,
        target: &mut Option<Target>,
    ) -> Result<Response<Relayed>, Refusal> {
        if request.method() == Method::CONNECT {
            return Err(Refusal::Connect);
        }
        let host = host(&request)?;
        let Target { sandbox, port } = target.insert(parse(host.as_bytes(), &self.shared.domain)?);
        let (sandbox, port) = (sandbox.clone(), *port);

        let upgrade = headers::upgrade(request.headers());
        let client = upgrade.is_some().then(|| hyper::upgrade::on(&mut request));
        self.rewrite(&mut request, host, upgrade);

        let shared = &self.shared;
        let stream = dial_within(&*shared.dial, &sandbox, port, shared.connect_timeout).await?;
        let (mut sender, connection) = http1::Builder::new()
            .max_headers(MAX_HEADERS)
            .max_buf_size(MAX_HEAD_BYTES)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|_| Refusal::ConnectionLost(port))?;
        let connection = AbortOnDropHandle::new(tokio::spawn(async move {
            // Its errors reach whoever waits for the answer or reads the body.
            let _ = connection.with_upgrades().await;
        }));
        let mut response = sender.send_request(request).await.map_err(|error| {
            if error.is_parse() {
                Refusal::BadResponse(port)
            } else {
                Refusal::ConnectionLost(port)
            }
        })?;

        let (mut connection, mut protocol) = (Some(connection), None);
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            // A guest that changes unasked would talk past everyone.
            let client = client.ok_or(Refusal::BadResponse(port))?;
            protocol = headers::upgrade(response.headers());
            let tunnel = Tunnel {
                client,
                guest: hyper::upgrade::on(&mut response),
                _connection: connection.take(),
            };
            *lock(&self.tunnel) = Some(tunnel);
        }
        headers::next_hop(response.headers_mut(), protocol);
        Ok(response.map(|body| Relayed {
            body,
            _connection: connection,
        }))
    }

    /// Makes the client's request one of the proxy's own. The guest sees the Host
    /// that the client named.
    fn rewrite(
        &self,
        request: &mut Request<Incoming>,
        host: HeaderValue,
        upgrade: Option<HeaderValue>,
    ) {
        let path = request.uri().path_and_query().cloned();
        *request.uri_mut() = path.map_or_else(|| Uri::from_static("/"), Uri::from);
        *request.version_mut() = Version::HTTP_11;
        let keeps = upgrade.is_some();
        let headers = request.headers_mut();
        headers::next_hop(headers, upgrade);
        headers::forwarded(headers, self.address, &host);
        headers.insert(header::HOST, host);
        if !keeps {
            // A connection into a guest costs little, and one for each request
            // has no leftovers of another client's.
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
    }
}

// === impl Tunnel ===

impl Tunnel {
    /// Carries bytes both ways until both have ended, or either fails.
    pub(super) async fn run(self) {
        let Ok((client, guest)) = tokio::try_join!(self.client, self.guest) else {
            return;
        };
        let (mut client, mut guest) = (TokioIo::new(client), TokioIo::new(guest));
        // An error is how most of these end: one side is gone.
        let _ = copy_bidirectional(&mut client, &mut guest).await;
    }
}

// === impl Relayed ===

impl Body for Relayed {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The host that a request is for. An absolute URI says it before any header does
/// (RFC 9112, section 3.2.2).
fn host(request: &Request<Incoming>) -> Result<HeaderValue, HostError> {
    let mut named = request.headers().get_all(header::HOST).iter();
    let (first, second) = (named.next(), named.next());
    if second.is_some() {
        return Err(HostError::Missing);
    }
    match request.uri().authority() {
        Some(authority) => {
            HeaderValue::from_str(authority.as_str()).map_err(|_| HostError::Missing)
        }
        None => first.cloned().ok_or(HostError::Missing),
    }
}
