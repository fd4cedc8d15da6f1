use super::*;

#[tokio::test]
async fn a_request_reaches_the_port_that_its_host_names() {
    let edge = Edge::start().await;
    let port = edge.host.port(8080).await;
    let serve = async {
        let mut guest = port.accept().await;
        let request = head(&mut guest).await;
        let said = body(&mut guest, &request).await;
        let answer = format!(
            "HTTP/1.1 201 Created\r\nX-Own: 1\r\nKeep-Alive: timeout=9\r\nContent-Length: {}\r\n\r\n",
            said.len()
        );
        send(&mut guest, answer).await;
        send(&mut guest, &said).await;
        request
    };
    let asked = format!(
        "POST /a/b?c=d HTTP/1.1\r\nHost: {}\r\nX-Forwarded-For: 192.0.2.1\r\n\
         Connection: x-secret, keep-alive\r\nX-Secret: 1\r\nCookie: e=f\r\n\
         Content-Length: 5\r\n\r\nhello",
        port.host()
    );
    let ((answer, said), request) = tokio::join!(edge.ask(&asked), serve);
    assert!(
        request.starts_with("POST /a/b?c=d HTTP/1.1\r\n"),
        "{request}"
    );
    assert_eq!(header(&request, "host"), Some(port.host().as_str()));
    assert_eq!(header(&request, "cookie"), Some("e=f"));
    assert_eq!(header(&request, "x-secret"), None);
    assert_eq!(header(&request, "connection"), Some("close"));
    assert_eq!(
        header(&request, "x-forwarded-for"),
        Some("192.0.2.1, 127.0.0.1")
    );
    assert_eq!(header(&request, "x-forwarded-proto"), Some("http"));
    assert_eq!(
        header(&request, "x-forwarded-host"),
        Some(port.host().as_str())
    );
    assert!(answer.starts_with("HTTP/1.1 201 Created\r\n"), "{answer}");
    assert_eq!(header(&answer, "x-own"), Some("1"));
    assert_eq!(header(&answer, "keep-alive"), None);
    assert_eq!(said, "hello");
}

#[tokio::test]
async fn an_answer_flows_while_it_is_made() {
    let edge = Edge::start().await;
    let port = edge.host.port(80).await;
    let mut client = edge.client().await;
    let request = format!("GET /events HTTP/1.1\r\nHost: {}\r\n\r\n", port.host());
    send(&mut client, request).await;
    let mut guest = port.accept().await;
    head(&mut guest).await;
    // As servers of events do: no length, and the end is the connection's.
    send(
        &mut guest,
        "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n",
    )
    .await;
    let answer = head(&mut client).await;
    assert_eq!(header(&answer, "content-type"), Some("text/event-stream"));
    for event in ["data: 1\n\n", "data: 2\n\n"] {
        send(&mut guest, event).await;
        assert_eq!(chunk(&mut client).await.unwrap(), event.as_bytes());
    }
    drop(guest);
    assert_eq!(chunk(&mut client).await.unwrap(), b"");
}

#[tokio::test]
async fn a_request_flows_while_it_is_made() {
    let edge = Edge::start().await;
    let port = edge.host.port(80).await;
    let mut client = edge.client().await;
    let request = format!(
        "PUT / HTTP/1.1\r\nHost: {}\r\nTransfer-Encoding: chunked\r\n\r\n",
        port.host()
    );
    send(&mut client, request).await;
    let mut guest = port.accept().await;
    let request = head(&mut guest).await;
    assert_eq!(header(&request, "transfer-encoding"), Some("chunked"));
    // The answer begins before the request has ended, and both go on.
    send(
        &mut guest,
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    )
    .await;
    head(&mut client).await;
    for round in 0..3 {
        send(&mut client, format!("1\r\n{round}\r\n")).await;
        let said = chunk(&mut guest).await.unwrap();
        send(&mut guest, format!("1\r\n{round}\r\n")).await;
        assert_eq!(chunk(&mut client).await.unwrap(), said);
    }
    send(&mut client, "0\r\n\r\n").await;
    assert_eq!(chunk(&mut guest).await.unwrap(), b"");
    send(&mut guest, "0\r\n\r\n").await;
    assert_eq!(chunk(&mut client).await.unwrap(), b"");
}

#[tokio::test]
async fn a_large_body_arrives_as_it_was() {
    let edge = Edge::start().await;
    let port = edge.host.port(80).await;
    let data: Vec<u8> = (0..8 << 20).map(|index: u32| (index / 7) as u8).collect();
    let serve = async {
        let mut guest = port.accept().await;
        let request = head(&mut guest).await;
        let data = body(&mut guest, &request).await;
        send(
            &mut guest,
            format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", data.len()),
        )
        .await;
        send(&mut guest, data).await;
    };
    let ask = async {
        let mut client = edge.client().await;
        let (length, host) = (data.len(), port.host());
        send(
            &mut client,
            format!("POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n\r\n"),
        )
        .await;
        send(&mut client, &data).await;
        let answer = head(&mut client).await;
        body(&mut client, &answer).await
    };
    let (said, ()) = tokio::join!(ask, serve);
    assert!(said == data, "{} bytes", said.len());
}

#[tokio::test]
async fn a_client_that_does_not_read_holds_the_guest_back() {
    let edge = Edge::start().await;
    let port = edge.host.port(80).await;
    let mut client = edge.client().await;
    send(
        &mut client,
        format!("GET / HTTP/1.1\r\nHost: {}\r\n\r\n", port.host()),
    )
    .await;
    let mut guest = port.accept().await;
    head(&mut guest).await;
    send(
        &mut guest,
        "HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n",
    )
    .await;
    // What the kernel's buffers and the proxy's hold, of a gigabyte.
    let chunk = vec![0; 1 << 20];
    let mut written = 0;
    while let Ok(taken) =
        tokio::time::timeout(Duration::from_millis(500), guest.write(&chunk)).await
    {
        written += taken.unwrap();
        assert!(written < 100 << 20);
    }
    drop(client);
    while guest.write(&chunk).await.is_ok() {}
}

#[tokio::test]
async fn one_connection_reaches_two_sandboxes() {
    let edge = Edge::start().await;
    let (one, two) = (edge.host.port(80).await, edge.host.port(80).await);
    let mut client = edge.client().await;
    for port in [&one, &two, &one] {
        send(
            &mut client,
            format!("GET / HTTP/1.1\r\nHost: {}\r\n\r\n", port.host()),
        )
        .await;
        let mut guest = port.accept().await;
        let request = head(&mut guest).await;
        assert_eq!(header(&request, "host"), Some(port.host().as_str()));
        let name = &port.sandbox;
        send(
            &mut guest,
            format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{name}",
                SandboxId::LEN
            ),
        )
        .await;
        let answer = head(&mut client).await;
        assert_eq!(body(&mut client, &answer).await, name.as_str().as_bytes());
    }
}

#[tokio::test]
async fn what_is_not_there_is_told_as_json() {
    let edge = Edge::with(config::Proxy {
        connect_timeout_ms: 50,
        ..config::Proxy::default()
    })
    .await;
    let there = edge.host.port(80).await.sandbox;
    let gone = SandboxId::random().unwrap();
    for (sandbox, port, status, reason) in [
        (&gone, 80, "502 Bad Gateway", "SANDBOX_NOT_FOUND"),
        (&there, 2, "502 Bad Gateway", "SANDBOX_NOT_RUNNING"),
        (&there, 81, "502 Bad Gateway", "PORT_CLOSED"),
        // Its listener is gone.
        (&there, 80, "502 Bad Gateway", "PORT_CLOSED"),
        (&there, 1, "504 Gateway Timeout", "PORT_TIMED_OUT"),
    ] {
        let request = format!("GET / HTTP/1.1\r\nHost: {port}-{sandbox}.{DOMAIN}\r\n\r\n");
        let (answer, said) = edge.ask(&request).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status}\r\n")),
            "{answer}"
        );
        assert_eq!(header(&answer, "content-type"), Some("application/json"));
        let said: serde_json::Value = serde_json::from_str(&said).unwrap();
        assert_eq!(said["sandbox"], sandbox.as_str());
        assert_eq!(said["port"], port);
        assert_eq!(said["reason"], reason);
        assert!(said["message"].as_str().unwrap().contains(sandbox.as_str()));
    }
}

#[tokio::test]
async fn a_bad_host_is_a_bad_request() {
    let edge = Edge::start().await;
    let port = edge.host.port(80).await;
    let host = port.host();
    for request in [
        "GET / HTTP/1.1\r\nHost: example.com\r\n\r\n".to_owned(),
        format!("GET / HTTP/1.1\r\nHost: x{host}\r\n\r\n"),
        format!("GET / HTTP/1.1\r\nHost: {host}\r\nHost: {host}\r\n\r\n"),
        format!("GET http://example.com/ HTTP/1.1\r\nHost: {host}\r\n\r\n"),
        "GET / HTTP/1.0\r\n\r\n".to_owned(),
    ] {
        let (answer, said) = edge.ask(&request).await;
        assert!(
            answer.contains(" 400 Bad Request\r\n"),
            "{request}: {answer}"
        );
        assert!(said.contains("\"HOST_INVALID\""), "{said}");
    }
    let (answer, _) = edge
        .ask(&format!(
            "CONNECT {host}:80 HTTP/1.1\r\nHost: {host}\r\n\r\n"
        ))
        .await;
    assert!(answer.contains(" 405 "), "{answer}");
    // The URI's authority is the host, whatever the header says.
    let mut client = edge.client().await;
    send(
        &mut client,
        format!("GET http://{host}/x HTTP/1.1\r\nHost: other\r\n\r\n"),
    )
    .await;
    let request = head(&mut port.accept().await).await;
    assert!(request.starts_with("GET /x HTTP/1.1\r\n"), "{request}");
    assert_eq!(header(&request, "host"), Some(host.as_str()));
}

#[tokio::test]
async fn a_head_without_end_is_refused() {
    let edge = Edge::start().await;
    let mut client = edge.client().await;
    let line = format!("X-Long: {}\r\n", "x".repeat(8000));
    send(&mut client, "GET / HTTP/1.1\r\n").await;
    for _ in 0..100 {
        // It may close before it has all.
        if client.write_all(line.as_bytes()).await.is_err() {
            break;
        }
    }
    let said = rest(&mut client).await;
    assert!(
        said.is_empty() || said.starts_with(b"HTTP/1.1 431 "),
        "{said:?}"
    );

    let mut client = edge.client().await;
    let lines: String = (0..200).map(|index| format!("X-{index}: 1\r\n")).collect();
    send(&mut client, format!("GET / HTTP/1.1\r\n{lines}\r\n")).await;
    let said = rest(&mut client).await;
    assert!(said.starts_with(b"HTTP/1.1 431 "), "{said:?}");
}

#[tokio::test]
async fn a_client_that_drips_its_head_is_dropped() {
    let edge = Edge::with(config::Proxy {
        header_timeout_ms: 100,
        max_connections: 1,
        ..config::Proxy::default()
    })
    .await;
    for begun in ["", "GET / HT", "GET / HTTP/1.1\r\nX: "] {
        let mut client = edge.client().await;
        send(&mut client, begun).await;
        rest(&mut client).await;
    }
    // Nor does an idle connection keep its place.
    let mut idle = edge.client().await;
    send(&mut idle, "GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
    head(&mut idle).await;
    let (answer, _) = edge.ask("GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(answer.contains(" 400 "), "{answer}");
}

#[tokio::test]
async fn a_guest_that_dies_is_told_or_seen() {
    let edge = Edge::start().await;
    let port = edge.host.port(80).await;
    let request = format!("GET / HTTP/1.1\r\nHost: {}\r\n\r\n", port.host());
    for (before, reason) in [
        ("", "CONNECTION_LOST"),
        ("HTTP/1.1 200 OK\r\nX: ", "CONNECTION_LOST"),
        ("SSH-2.0-OpenSSH\r\n", "RESPONSE_INVALID"),
        (
            "HTTP/1.1 101 Switching Protocols\r\n\r\n",
            "RESPONSE_INVALID",
        ),
    ] {
        let serve = async {
            let mut guest = port.accept().await;
            head(&mut guest).await;
            send(&mut guest, before).await;
        };
        let ((answer, said), ()) = tokio::join!(edge.ask(&request), serve);
        assert!(answer.contains(" 502 "), "{before}: {answer}");
        assert!(said.contains(reason), "{before}: {said}");
    }

    // In the middle of a body there is nothing to say but by ending too.
    for framing in ["Content-Length: 10", "Transfer-Encoding: chunked"] {
        let mut client = edge.client().await;
        send(&mut client, &request).await;
        let mut guest = port.accept().await;
        head(&mut guest).await;
        send(
            &mut guest,
            format!("HTTP/1.1 200 OK\r\n{framing}\r\n\r\n3\r\nabc\r\n"),
        )
        .await;
        drop(guest);
        head(&mut client).await;
        let said = rest(&mut client).await;
        assert!(said.len() < 10 && !said.ends_with(b"0\r\n\r\n"), "{said:?}");
    }
}

#[tokio::test]
async fn a_client_that_goes_away_ends_the_guests_work() {
    let edge = Edge::start().await;
    let port = edge.host.port(80).await;
    for answer in ["", "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc"] {
        let mut client = edge.client().await;
        send(
            &mut client,
            format!("GET / HTTP/1.1\r\nHost: {}\r\n\r\n", port.host()),
        )
        .await;
        let mut guest = port.accept().await;
        head(&mut guest).await;
        send(&mut guest, answer).await;
        if !answer.is_empty() {
            head(&mut client).await;
        }
        drop(client);
        assert_eq!(rest(&mut guest).await, b"");
    }
}

#[tokio::test]
async fn connections_over_the_limit_wait() {
    let edge = Edge::with(config::Proxy {
        max_connections: 1,
        ..config::Proxy::default()
    })
    .await;
    let port = edge.host.port(80).await;
    let request = format!("GET / HTTP/1.1\r\nHost: {}\r\n\r\n", port.host());
    let (mut first, mut second) = (edge.client().await, edge.client().await);
    send(&mut first, &request).await;
    send(&mut second, &request).await;
    let _guest = port.accept().await;
    let early = tokio::time::timeout(Duration::from_millis(100), port.listener.accept()).await;
    assert!(early.is_err());
    drop(first);
    port.accept().await;
}

#[tokio::test]
async fn a_stopping_proxy_answers_what_it_has_begun() {
    let edge = Edge::start().await;
    let port = edge.host.port(80).await;
    let mut idle = edge.client().await;
    send(&mut idle, "GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
    let answer = head(&mut idle).await;
    body(&mut idle, &answer).await;
    let mut silent = edge.client().await;
    let mut client = edge.client().await;
    send(
        &mut client,
        format!("GET / HTTP/1.1\r\nHost: {}\r\n\r\n", port.host()),
    )
    .await;
    let mut guest = port.accept().await;
    head(&mut guest).await;

    edge.stop.cancel();
    assert_eq!(rest(&mut idle).await, b"");
    assert_eq!(rest(&mut silent).await, b"");
    assert!(TcpStream::connect(edge.address).await.is_err());
    assert!(!edge.served.is_finished());
    send(&mut guest, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
    let answer = head(&mut client).await;
    assert_eq!(body(&mut client, &answer).await, b"ok");
    within(edge.served).await.unwrap();
}
