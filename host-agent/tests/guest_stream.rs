//! Ports of a guest over vsock: this host's side against the real agent, which
//! runs as a thread of this process and takes this machine for its guest.

#![allow(clippy::unwrap_used)]

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use soulbox_guest::options::{Options, Wanted};
use soulbox_host::guest::Guest;
use soulbox_host::id::SandboxId;
use soulbox_host::ingress::{
    Dial, DialError, Forwards, GuestStream, OpenError, Proxy, Stream, config,
};
use soulbox_proto::guest::v1::connect_response::Message as Told;
use soulbox_proto::guest::v1::port_service_server::{PortService, PortServiceServer};
use soulbox_proto::guest::v1::{ConnectRequest, ConnectResponse, EndOfData, PortOpened};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::{Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

/// Only ever waited for in full by a test that fails.
const LONG: Duration = Duration::from_secs(30);

/// A guest behind a monitor's vsock socket.
struct Vsock {
    guest: Guest,
    _folder: tempfile::TempDir,
    /// Dropping it is the end of the monitor.
    monitor: AbortOnDropHandle<()>,
}

// === impl Vsock ===

impl Vsock {
    /// Leads `CONNECT` to the agent as a monitor does.
    async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let agent = agent().await;
        let monitor = tokio::spawn(async move {
            let mut running = tokio::task::JoinSet::new();
            loop {
                let (mut host, _) = listener.accept().await.unwrap();
                running.spawn(async move {
                    let mut asked = [0; 13];
                    host.read_exact(&mut asked).await.unwrap();
                    assert_eq!(&asked, b"CONNECT 1024\n");
                    host.write_all(b"OK 1\n").await.unwrap();
                    let mut guest = UnixStream::connect(agent).await.unwrap();
                    let _ = copy_bidirectional(&mut host, &mut guest).await;
                });
            }
        });
        Self {
            guest: Guest::new(&path),
            _folder: folder,
            monitor: AbortOnDropHandle::new(monitor),
        }
    }

    /// A connection to a server in the guest, and the server's end.
    async fn connected(&self) -> (GuestStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (stream, server) = tokio::join!(self.guest.connect(port), listener.accept());
        (stream.unwrap(), server.unwrap().0)
    }
}

/// The agent's socket. There is one agent, as long as this process lives.
async fn agent() -> &'static Path {
    static SOCKET: OnceLock<PathBuf> = OnceLock::new();
    let socket = SOCKET.get_or_init(|| {
        // It outlives every test; what is left goes with the build's other files.
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))
            .unwrap()
            .keep();
        let socket = folder.join("agent.sock");
        let args = ["--serve-unix".into(), socket.clone().into_os_string()];
        let Ok(Wanted::Run(options)) = Options::parse(args, std::process::id()) else {
            panic!("the agent has other options now");
        };
        std::thread::spawn(|| soulbox_guest::run(options).unwrap());
        socket
    });
    within(async {
        while UnixStream::connect(socket).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    socket
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LONG, future)
        .await
        .expect("it never happened")
}

#[tokio::test]
async fn carries_both_ways_to_each_ways_end() {
    let vsock = Vsock::start().await;
    let (mut stream, mut server) = vsock.connected().await;
    stream.write_all(b"question").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut said = Vec::new();
    within(server.read_to_end(&mut said)).await.unwrap();
    assert_eq!(said, b"question");
    server.write_all(b"answer").await.unwrap();
    drop(server);
    let mut said = Vec::new();
    within(stream.read_to_end(&mut said)).await.unwrap();
    assert_eq!(said, b"answer");
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0);
    assert_eq!(
        stream.write(b"x").await.unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
}

#[tokio::test]
async fn megabytes_pass_unchanged_both_ways() {
    let vsock = Vsock::start().await;
    let (stream, server) = vsock.connected().await;
    let data: Vec<u8> = (0..8 << 20).map(|index: u32| (index / 7) as u8).collect();
    let (mut read, mut write) = tokio::io::split(stream);
    let (mut server_read, mut server_write) = server.into_split();
    let said = within(async {
        let mut said = Vec::new();
        let send = async {
            write.write_all(&data).await.unwrap();
            write.shutdown().await.unwrap();
        };
        let echo = async {
            tokio::io::copy(&mut server_read, &mut server_write)
                .await
                .unwrap();
            server_write.shutdown().await.unwrap();
        };
        let (_, _, read) = tokio::join!(send, echo, read.read_to_end(&mut said));
        read.unwrap();
        said
    })
    .await;
    assert!(said == data, "{} bytes", said.len());
}

#[tokio::test]
async fn whoever_does_not_read_holds_the_other_up() {
    let vsock = Vsock::start().await;
    let (mut stream, mut server) = vsock.connected().await;
    let chunk = vec![0; 1 << 20];
    let pause = Duration::from_millis(500);
    let mut written = 0;
    while let Ok(taken) = tokio::time::timeout(pause, stream.write(&chunk)).await {
        written += taken.unwrap();
        assert!(written < 64 << 20);
    }
    let mut written = 0;
    while let Ok(taken) = tokio::time::timeout(pause, server.write(&chunk)).await {
        written += taken.unwrap();
        assert!(written < 64 << 20);
    }
}

#[tokio::test]
async fn ends_that_are_none_are_errors() {
    let vsock = Vsock::start().await;
    let (mut stream, server) = vsock.connected().await;
    server.set_zero_linger().unwrap();
    drop(server);
    let error = within(stream.read(&mut [0; 1])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);

    let (mut stream, mut server) = vsock.connected().await;
    stream.write_all(b"half").await.unwrap();
    within(server.read_exact(&mut [0; 4])).await.unwrap();
    drop(stream);
    let error = within(server.read(&mut [0; 1])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let closed = listener.local_addr().unwrap().port();
    drop(listener);
    let refused = vsock.guest.connect(closed).await;
    assert!(matches!(refused, Err(OpenError::PortClosed(port)) if port == closed));

    let (mut stream, mut server) = vsock.connected().await;
    drop(vsock.monitor);
    assert!(within(stream.read(&mut [0; 1])).await.is_err());
    assert!(within(server.read(&mut [0; 1])).await.is_err());
    assert!(matches!(
        vsock.guest.connect(1).await,
        Err(OpenError::Agent(_))
    ));
}

/// Every sandbox is the one guest, without a network.
#[tonic::async_trait]
impl Dial for Vsock {
    async fn dial(&self, sandbox: &SandboxId, port: u16) -> Result<Stream, DialError> {
        match self.guest.connect(port).await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(_) => Err(DialError::PortClosed {
                sandbox: sandbox.clone(),
                port,
            }),
        }
    }
}

#[tokio::test]
async fn the_proxy_and_forwards_need_no_network() {
    let dial: Arc<dyn Dial> = Arc::new(Vsock::start().await);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let sandbox = SandboxId::random().unwrap();
    let edge = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = edge.local_addr().unwrap();
    let config = config::Proxy {
        domain: "sandbox.test".to_owned(),
        ..config::Proxy::default()
    };
    let stop = CancellationToken::new();
    let proxy = Proxy::new(Arc::clone(&dial), &config).serve(edge, stop.clone());
    let _proxy = AbortOnDropHandle::new(tokio::spawn(proxy));
    let forwards = Forwards::new(dial, &config::Forwards::default());
    let forward = forwards.add(&sandbox, port, None, 0).await.unwrap();

    for address in [address, forward.address] {
        let mut client = TcpStream::connect(address).await.unwrap();
        let request = format!(
            "GET / HTTP/1.1\r\nHost: {port}-{sandbox}.sandbox.test\r\nConnection: close\r\n\r\n"
        );
        client.write_all(request.as_bytes()).await.unwrap();
        let (mut server, _) = within(listener.accept()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(within(server.read_u8()).await.unwrap());
        }
        assert!(head.starts_with(b"GET / HTTP/1.1\r\n"));
        let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
        server.write_all(answer).await.unwrap();
        drop(server);
        let mut said = Vec::new();
        within(client.read_to_end(&mut said)).await.unwrap();
        assert!(said.starts_with(b"HTTP/1.1 200 OK\r\n") && said.ends_with(b"\r\n\r\nok"));
    }
}

/// An agent that says what a test wants it to say.
struct Liar(Vec<Result<Option<Told>, ()>>);

#[tonic::async_trait]
impl PortService for Liar {
    type ConnectStream = tokio_stream::Iter<std::vec::IntoIter<Result<ConnectResponse, Status>>>;

    async fn connect(
        &self,
        _: Request<Streaming<ConnectRequest>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let said = self.0.iter().cloned().map(|said| match said {
            Ok(message) => Ok(ConnectResponse { message }),
            Err(()) => Err(Status::internal("something")),
        });
        Ok(Response::new(tokio_stream::iter(said.collect::<Vec<_>>())))
    }
}

/// What a stream from an agent that says this ends with.
async fn end_of(
    said: Vec<Result<Option<Told>, ()>>,
) -> Result<Result<Vec<u8>, ErrorKind>, OpenError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("agent.sock");
    let listener = UnixListenerStream::new(UnixListener::bind(&path).unwrap());
    let server = Server::builder().add_service(PortServiceServer::new(Liar(said)));
    let _server = AbortOnDropHandle::new(tokio::spawn(server.serve_with_incoming(listener)));
    let endpoint = Endpoint::from_shared(format!("unix://{}", path.display())).unwrap();
    let mut stream = within(GuestStream::open(endpoint.connect_lazy(), 80)).await?;
    let mut received = Vec::new();
    let read = within(stream.read_to_end(&mut received)).await;
    Ok(read.map(|_| received).map_err(|error| error.kind()))
}

#[tokio::test]
async fn an_agent_that_breaks_the_protocol_is_not_believed() {
    let opened = || Ok(Some(Told::Opened(PortOpened {})));
    let data = || Ok(Some(Told::Data("data".into())));
    let end = || Ok(Some(Told::End(EndOfData {})));
    for said in [vec![], vec![data()], vec![end()], vec![Ok(None)]] {
        assert!(matches!(end_of(said).await, Err(OpenError::Protocol)));
    }
    assert!(matches!(
        end_of(vec![Err(())]).await,
        Err(OpenError::Agent(_))
    ));
    for (said, end) in [
        (vec![opened(), data(), end()], Ok(b"data".to_vec())),
        (
            vec![opened(), data(), data()],
            Err(ErrorKind::UnexpectedEof),
        ),
        (vec![opened(), opened(), end()], Err(ErrorKind::InvalidData)),
        (vec![opened(), Ok(None), end()], Err(ErrorKind::InvalidData)),
        (
            vec![opened(), data(), Err(())],
            Err(ErrorKind::ConnectionAborted),
        ),
    ] {
        assert_eq!(
            end_of(said).await.unwrap_or_else(|error| panic!("{error}")),
            end
        );
    }
}
