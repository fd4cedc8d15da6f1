//! TCP connections to the guest's own ports.

use soulbox_proto::guest::v1::connect_request::Message as Asked;
use soulbox_proto::guest::v1::connect_response::Message as Told;
use soulbox_proto::guest::v1::port_service_client::PortServiceClient;
use soulbox_proto::guest::v1::*;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::common::*;

/// A connection as its caller has it.
struct Connection {
    requests: mpsc::Sender<ConnectRequest>,
    responses: Streaming<ConnectResponse>,
}

// === impl Connection ===

impl Connection {
    async fn send(&self, message: Asked) {
        let request = ConnectRequest {
            message: Some(message),
        };
        self.requests.send(request).await.unwrap();
    }

    async fn say(&self, data: impl Into<bytes::Bytes>) {
        self.send(Asked::Data(data.into())).await;
    }

    async fn end(&self) {
        self.send(Asked::End(EndOfData {})).await;
    }

    async fn next(&mut self) -> Result<Option<Told>, Status> {
        let response = tokio::time::timeout(LONG, self.responses.message()).await;
        Ok(response.unwrap()?.map(|response| response.message.unwrap()))
    }

    /// All that the server says until it ends, which is the last there is.
    async fn rest(&mut self) -> Vec<u8> {
        let mut said = Vec::new();
        loop {
            match self.next().await.unwrap().unwrap() {
                Told::Data(data) => said.extend_from_slice(&data),
                Told::End(_) => return said,
                Told::Opened(_) => panic!("opened twice"),
            }
        }
    }
}

async fn begin(guest: &Guest, first: Asked) -> Result<Connection, Status> {
    let (requests, stream) = mpsc::channel(4);
    let request = ConnectRequest {
        message: Some(first),
    };
    requests.send(request).await.unwrap();
    let mut client = PortServiceClient::new(guest.connection().await);
    let responses = client.connect(ReceiverStream::new(stream)).await?;
    Ok(Connection {
        requests,
        responses: responses.into_inner(),
    })
}

async fn open(guest: &Guest, port: u32) -> Result<Connection, Status> {
    let mut connection = begin(guest, Asked::Open(OpenPort { port })).await?;
    let opened = connection.next().await?;
    assert_eq!(opened, Some(Told::Opened(PortOpened {})));
    Ok(connection)
}

/// A server on this address, and one connection to it.
async fn connected(guest: &Guest, address: &str) -> (Connection, TcpStream) {
    let listener = TcpListener::bind((address, 0)).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (connection, server) = tokio::join!(open(guest, port.into()), listener.accept());
    (connection.unwrap(), server.unwrap().0)
}

async fn received(server: &mut TcpStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    let read = tokio::time::timeout(LONG, server.read_exact(&mut bytes)).await;
    read.unwrap().unwrap();
    bytes
}

#[tokio::test]
async fn carries_both_ways_to_each_ways_end() {
    let guest = Guest::start().await;
    for address in ["127.0.0.1", "::1"] {
        let (mut connection, mut server) = connected(&guest, address).await;
        connection.say("question").await;
        assert_eq!(received(&mut server, 8).await, b"question");
        server.write_all(b"early ").await.unwrap();
        assert_eq!(
            connection.next().await.unwrap(),
            Some(Told::Data("early ".into()))
        );
        connection.end().await;
        assert_eq!(server.read(&mut [0; 8]).await.unwrap(), 0);
        server.write_all(b"answer").await.unwrap();
        drop(server);
        assert_eq!(connection.rest().await, b"answer");
        drop(connection.requests);
        let over = tokio::time::timeout(LONG, connection.responses.message()).await;
        assert_eq!(over.unwrap().unwrap(), None);
    }

    // The server may end first.
    let (mut connection, mut server) = connected(&guest, "127.0.0.1").await;
    server.shutdown().await.unwrap();
    assert_eq!(connection.rest().await, b"");
    connection.say("late").await;
    connection.end().await;
    drop(connection.requests);
    let mut said = Vec::new();
    server.read_to_end(&mut said).await.unwrap();
    assert_eq!(said, b"late");
    assert_eq!(connection.responses.message().await.unwrap(), None);
}

#[tokio::test]
async fn megabytes_pass_unchanged_both_ways() {
    let guest = Guest::start().await;
    let (mut connection, server) = connected(&guest, "127.0.0.1").await;
    let (mut read, mut write) = server.into_split();
    let echo = tokio::spawn(async move {
        tokio::io::copy(&mut read, &mut write).await.unwrap();
    });
    let data: Vec<u8> = (0..8 << 20).map(|index: u32| (index / 7) as u8).collect();
    let requests = connection.requests.clone();
    let chunks: Vec<Vec<u8>> = data.chunks(1 << 20).map(Into::into).collect();
    let sender = tokio::spawn(async move {
        for chunk in chunks {
            let message = Some(Asked::Data(chunk.into()));
            requests.send(ConnectRequest { message }).await.unwrap();
        }
        let message = Some(Asked::End(EndOfData {}));
        requests.send(ConnectRequest { message }).await.unwrap();
    });
    let said = connection.rest().await;
    sender.await.unwrap();
    echo.await.unwrap();
    assert!(said == data, "{} bytes", said.len());
}

#[tokio::test]
async fn whoever_does_not_read_holds_the_other_up() {
    let guest = Guest::start().await;
    let before_kib = peak_resident_kib(guest.agent_pid());
    // The server reads nothing: what the kernel and a few chunks hold is taken.
    let (connection, server) = connected(&guest, "127.0.0.1").await;
    let mut taken = 0;
    while let Ok(sent) = tokio::time::timeout(
        std::time::Duration::from_millis(500),
        connection.requests.reserve(),
    )
    .await
    {
        let message = Some(Asked::Data(vec![0; 1 << 20].into()));
        sent.unwrap().send(ConnectRequest { message });
        taken += 1;
        assert!(taken < 64, "{taken} MiB were taken");
    }
    drop((connection, server));

    // The caller reads nothing.
    let (connection, mut server) = connected(&guest, "127.0.0.1").await;
    let chunk = vec![0; 1 << 20];
    let mut taken = 0;
    while let Ok(written) =
        tokio::time::timeout(std::time::Duration::from_millis(500), server.write(&chunk)).await
    {
        taken += written.unwrap();
        assert!(taken < 64 << 20, "{taken} bytes were taken");
    }
    drop(connection);
    let grown_kib = peak_resident_kib(guest.agent_pid()) - before_kib;
    assert!(grown_kib < 16 * 1024, "the agent grew by {grown_kib} KiB");
}

#[tokio::test]
async fn a_port_that_nobody_listens_on_is_closed() {
    let guest = Guest::start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let status = open(&guest, port.into()).await.err().unwrap();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert_eq!(reason(&status).0, "PORT_CLOSED");
    assert!(status.message().contains(&port.to_string()));
}

#[tokio::test]
async fn a_malformed_request_names_its_field() {
    let guest = Guest::start().await;
    for port in [0, 65536, u32::MAX] {
        let status = open(&guest, port).await.err().unwrap();
        assert_eq!(fields(&status), ["open.port"]);
    }
    let status = begin(&guest, Asked::Data("x".into())).await.err().unwrap();
    assert_eq!(fields(&status), ["open"]);

    let late_open = Asked::Open(OpenPort { port: 1 });
    for (message, field) in [
        (Some(late_open), "open"),
        (Some(Asked::Data(vec![0; (1 << 20) + 1].into())), "data"),
        (None, "message"),
    ] {
        let (mut connection, mut server) = connected(&guest, "127.0.0.1").await;
        connection
            .requests
            .send(ConnectRequest { message })
            .await
            .unwrap();
        let status = connection.next().await.unwrap_err();
        assert_eq!(fields(&status), [field]);
        // The server does not take that for an end.
        let error = server.read(&mut [0; 1]).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    let (mut connection, _server) = connected(&guest, "127.0.0.1").await;
    connection.end().await;
    connection.say("more").await;
    assert_eq!(fields(&connection.next().await.unwrap_err()), ["data"]);
}

#[tokio::test]
async fn a_reset_reaches_the_other_side() {
    let guest = Guest::start().await;
    let (mut connection, server) = connected(&guest, "127.0.0.1").await;
    server.set_zero_linger().unwrap();
    drop(server);
    let status = connection.next().await.unwrap_err();
    assert_eq!(reason(&status).0, "CONNECTION_RESET");

    let (connection, mut server) = connected(&guest, "127.0.0.1").await;
    connection.say("half").await;
    assert_eq!(received(&mut server, 4).await, b"half");
    drop(connection);
    let read = tokio::time::timeout(LONG, server.read(&mut [0; 1])).await;
    let error = read.unwrap().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_stopping_agent_ends_connections() {
    let mut guest = Guest::start().await;
    let (mut connection, mut server) = connected(&guest, "127.0.0.1").await;
    let pid = rustix::process::Pid::from_raw(guest.agent_pid().cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let status = connection.next().await.unwrap_err();
    assert_eq!(reason(&status).0, "STOPPING");
    assert!(server.read(&mut [0; 1]).await.is_err());
    drop(connection);
    guest.ended().await;
}
