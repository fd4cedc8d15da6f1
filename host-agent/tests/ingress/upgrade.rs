use super::*;

use futures_util::{SinkExt as _, StreamExt as _};
use tokio_tungstenite::tungstenite::Message;

#[tokio::test]
async fn a_websocket_talks_both_ways() {
    let edge = Edge::start().await;
    let port = edge.host.port(3000).await;
    let serve = async {
        let guest = port.accept().await;
        let mut socket = tokio_tungstenite::accept_async(guest).await.unwrap();
        loop {
            match socket.next().await.unwrap().unwrap() {
                Message::Close(_) => break,
                message => socket.send(message).await.unwrap(),
            }
        }
        // The answer to the close goes out.
        while socket.next().await.is_some() {}
    };
    let ask = async {
        let stream = edge.client().await;
        let url = format!("ws://{}/socket", port.host());
        let (mut socket, answer) = tokio_tungstenite::client_async(url, stream).await.unwrap();
        assert_eq!(answer.status(), 101);
        for size in [1, 1000, 1 << 20] {
            let message = Message::binary(vec![7; size]);
            socket.send(message.clone()).await.unwrap();
            assert!(socket.next().await.unwrap().unwrap() == message);
        }
        socket.close(None).await.unwrap();
        while socket.next().await.is_some() {}
    };
    within(async { tokio::join!(ask, serve) }).await;
}

/// A client and a guest whose connection has become something else.
async fn upgraded(edge: &Edge, port: &Port) -> (TcpStream, TcpStream) {
    let mut client = edge.client().await;
    let request = format!(
        "GET / HTTP/1.1\r\nHost: {}\r\nConnection: Upgrade\r\nUpgrade: echo/1\r\n\r\nearly",
        port.host()
    );
    send(&mut client, request).await;
    let mut guest = port.accept().await;
    let request = head(&mut guest).await;
    assert_eq!(header(&request, "upgrade"), Some("echo/1"));
    assert_eq!(header(&request, "connection"), Some("upgrade"));
    // Both say something in one breath with their heads.
    let answer =
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo/1\r\n\r\nfirst";
    send(&mut guest, answer).await;
    let answer = head(&mut client).await;
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    assert_eq!(header(&answer, "upgrade"), Some("echo/1"));
    assert_eq!(header(&answer, "connection"), Some("upgrade"));
    assert_eq!(bytes(&mut client, 5).await, b"first");
    assert_eq!(bytes(&mut guest, 5).await, b"early");
    (client, guest)
}

#[tokio::test]
async fn any_upgrade_is_carried_to_its_end() {
    let edge = Edge::start().await;
    let port = edge.host.port(80).await;
    let (mut client, mut guest) = upgraded(&edge, &port).await;
    send(&mut client, "question").await;
    client.shutdown().await.unwrap();
    assert_eq!(rest(&mut guest).await, b"question");
    send(&mut guest, "answer").await;
    drop(guest);
    assert_eq!(rest(&mut client).await, b"answer");
}

#[tokio::test]
async fn an_upgrade_that_the_guest_declines_is_an_answer() {
    let edge = Edge::start().await;
    let port = edge.host.port(80).await;
    let serve = async {
        let mut guest = port.accept().await;
        head(&mut guest).await;
        send(&mut guest, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno").await;
    };
    let request = format!(
        "GET / HTTP/1.1\r\nHost: {}\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
        port.host()
    );
    let ((answer, said), ()) = tokio::join!(edge.ask(&request), serve);
    assert!(answer.contains(" 200 OK"), "{answer}");
    assert_eq!(said, "no");
}

#[tokio::test]
async fn a_tunnel_counts_as_a_connection_and_ends_with_the_proxy() {
    let edge = Edge::with(config::Proxy {
        max_connections: 1,
        ..config::Proxy::default()
    })
    .await;
    let port = edge.host.port(80).await;
    let (mut client, mut guest) = upgraded(&edge, &port).await;
    let mut second = edge.client().await;
    send(&mut second, "GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
    let early = tokio::time::timeout(Duration::from_millis(100), second.read_u8()).await;
    assert!(early.is_err());

    edge.stop.cancel();
    assert_eq!(rest(&mut client).await, b"");
    assert_eq!(rest(&mut guest).await, b"");
    within(edge.served).await.unwrap();
}
