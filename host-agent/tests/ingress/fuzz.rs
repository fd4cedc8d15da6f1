use super::*;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

/// Runs `case` for many inputs on one proxy, which must serve as before.
fn survives<T: std::fmt::Debug>(
    inputs: impl Strategy<Value = T>,
    case: impl AsyncFn(&Edge, &Port, &T),
) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let (edge, port) = runtime.block_on(async {
        let edge = Edge::start().await;
        let port = edge.host.port(80).await;
        (edge, port)
    });
    let ran = TestRunner::new(Config::with_cases(200)).run(&inputs, |input| {
        runtime.block_on(case(&edge, &port, &input));
        Ok(())
    });
    ran.unwrap();
    runtime.block_on(async {
        let serve = async {
            let mut guest = port.accept().await;
            head(&mut guest).await;
            send(&mut guest, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
        };
        let request = format!("GET / HTTP/1.1\r\nHost: {}\r\n\r\n", port.host());
        let ((_, said), ()) = tokio::join!(edge.ask(&request), serve);
        assert_eq!(said, "ok");
        assert!(!edge.served.is_finished());
    });
}

fn garbage() -> impl Strategy<Value = Vec<u8>> {
    let pieces = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..40),
        Just(b"\r\n".to_vec()),
        Just(b"\r\n\r\n".to_vec()),
        Just(b"Transfer-Encoding: chunked\r\n".to_vec()),
        Just(b"Content-Length: 3\r\n".to_vec()),
        Just(b"Connection: upgrade\r\nUpgrade: x\r\n".to_vec()),
        Just(b"ffffffffffffffff\r\n".to_vec()),
    ];
    proptest::collection::vec(pieces, 0..8).prop_map(|pieces| pieces.concat())
}

#[test]
fn no_request_ends_the_proxy() {
    let begin = prop_oneof![
        Just(""),
        Just("GET / HTTP/1.1\r\n"),
        Just("POST x HTTP/1.0\r\n")
    ];
    survives((begin, garbage()), async |edge, _, (begin, garbage)| {
        let mut client = edge.client().await;
        // It may have closed already, or be waiting for more.
        let _ = client.write_all(begin.as_bytes()).await;
        let _ = client.write_all(garbage).await;
        let _ = client.shutdown().await;
        rest(&mut client).await;
    });
}

#[test]
fn no_answer_ends_the_proxy() {
    let begin = prop_oneof![
        Just(""),
        Just("HTTP/1.1 200 OK\r\n"),
        Just("HTTP/1.1 101 X\r\n"),
        Just("HTTP/1.1 100 X\r\n\r\n"),
    ];
    survives((begin, garbage()), async |edge, port, (begin, garbage)| {
        let mut client = edge.client().await;
        let host = port.host();
        send(
            &mut client,
            format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n"),
        )
        .await;
        let mut guest = port.accept().await;
        head(&mut guest).await;
        let _ = guest.write_all(begin.as_bytes()).await;
        let _ = guest.write_all(garbage).await;
        drop(guest);
        let _ = client.shutdown().await;
        rest(&mut client).await;
    });
}
