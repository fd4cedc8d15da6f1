//! Ports of sandboxes from outside: forwards and the HTTP proxy, over real
//! sockets on loopback. A sandbox here is a name whose ports are ports of this
//! machine.

#![allow(clippy::unwrap_used)]

mod forward;
mod fuzz;
mod proxy;
mod upgrade;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use soulbox_host::id::SandboxId;
use soulbox_host::ingress::{Dial, DialError, Proxy, Stream, config};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Only ever waited for in full by a test that fails.
const LONG: Duration = Duration::from_secs(30);
const DOMAIN: &str = "sandbox.example.com";

/// What leads to the sandboxes' ports.
#[derive(Default)]
struct Host {
    ports: Mutex<HashMap<(SandboxId, u16), SocketAddr>>,
}

/// A port of a sandbox that a test serves.
struct Port {
    sandbox: SandboxId,
    port: u16,
    listener: TcpListener,
}

/// The proxy, and what leads behind it.
struct Edge {
    host: Arc<Host>,
    address: SocketAddr,
    stop: CancellationToken,
    served: JoinHandle<()>,
}

// === impl Host ===

impl Host {
    /// A new sandbox of which one port listens.
    async fn port(&self, port: u16) -> Port {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let sandbox = SandboxId::random().unwrap();
        let address = listener.local_addr().unwrap();
        self.ports
            .lock()
            .unwrap()
            .insert((sandbox.clone(), port), address);
        Port {
            sandbox,
            port,
            listener,
        }
    }
}

#[tonic::async_trait]
impl Dial for Host {
    async fn dial(&self, sandbox: &SandboxId, port: u16) -> Result<Stream, DialError> {
        let address = {
            let ports = self.ports.lock().unwrap();
            if !ports.keys().any(|(known, _)| known == sandbox) {
                return Err(DialError::NotFound(sandbox.clone()));
            }
            ports.get(&(sandbox.clone(), port)).copied()
        };
        let (sandbox, address) = match (port, address) {
            (_, Some(address)) => (sandbox.clone(), address),
            // Ports that mean something to these tests.
            (1, None) => std::future::pending().await,
            (2, None) => {
                return Err(DialError::NotRunning {
                    sandbox: sandbox.clone(),
                    state: "paused".to_owned(),
                });
            }
            (_, None) => {
                return Err(DialError::PortClosed {
                    sandbox: sandbox.clone(),
                    port,
                });
            }
        };
        match TcpStream::connect(address).await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                Err(DialError::PortClosed { sandbox, port })
            }
            Err(source) => Err(DialError::Unreachable {
                sandbox,
                port,
                source,
            }),
        }
    }
}

// === impl Port ===

impl Port {
    fn host(&self) -> String {
        format!("{}-{}.{DOMAIN}", self.port, self.sandbox)
    }

    /// What the proxy dials next.
    async fn accept(&self) -> TcpStream {
        within(self.listener.accept()).await.unwrap().0
    }
}

// === impl Edge ===

impl Edge {
    async fn start() -> Self {
        Self::with(config::Proxy::default()).await
    }

    async fn with(config: config::Proxy) -> Self {
        let host = Arc::new(Host::default());
        let config = config::Proxy {
            domain: DOMAIN.to_owned(),
            ..config
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let dial: Arc<dyn Dial> = Arc::clone(&host) as _;
        let served = tokio::spawn(Proxy::new(dial, &config).serve(listener, stop.clone()));
        Self {
            host,
            address,
            stop,
            served,
        }
    }

    async fn client(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// The answer to one request whose head is `lines`, with its body.
    async fn ask(&self, request: &str) -> (String, String) {
        let mut client = self.client().await;
        send(&mut client, request).await;
        let head = head(&mut client).await;
        let body = body(&mut client, &head).await;
        (head, String::from_utf8(body).unwrap())
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LONG, future)
        .await
        .expect("it never happened")
}

async fn send(stream: &mut TcpStream, text: impl AsRef<[u8]>) {
    within(stream.write_all(text.as_ref())).await.unwrap();
}

/// A message's head, in lower case but for values' own.
async fn head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let byte = within(stream.read_u8()).await;
        head.push(
            byte.unwrap_or_else(|error| {
                panic!("{error} after {:?}", String::from_utf8_lossy(&head))
            }),
        );
    }
    String::from_utf8(head).unwrap()
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().skip(1).find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then_some(value.trim())
    })
}

async fn bytes(stream: &mut TcpStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    within(stream.read_exact(&mut bytes)).await.unwrap();
    bytes
}

/// One chunk of a chunked body; the last is empty.
async fn chunk(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        line.push(within(stream.read_u8()).await?);
    }
    let length = std::str::from_utf8(&line).unwrap().trim();
    let length = usize::from_str_radix(length, 16).unwrap();
    let mut chunk = vec![0; length + 2];
    within(stream.read_exact(&mut chunk)).await?;
    chunk.truncate(length);
    Ok(chunk)
}

async fn body(stream: &mut TcpStream, head: &str) -> Vec<u8> {
    if let Some(length) = header(head, "content-length") {
        return bytes(stream, length.parse().unwrap()).await;
    }
    assert_eq!(header(head, "transfer-encoding"), Some("chunked"), "{head}");
    let mut body = Vec::new();
    loop {
        match chunk(stream).await.unwrap() {
            end if end.is_empty() => return body,
            chunk => body.extend(chunk),
        }
    }
}

/// What is left until the other side closes; a reset counts as that.
async fn rest(stream: &mut TcpStream) -> Vec<u8> {
    let mut rest = Vec::new();
    let _ = within(stream.read_to_end(&mut rest)).await;
    rest
}
