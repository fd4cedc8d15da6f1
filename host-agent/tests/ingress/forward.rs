use std::net::Ipv4Addr;

use super::*;
use soulbox_host::ingress::{Forward, ForwardError, Forwards};

fn forwards(host: &Arc<Host>, config: &config::Forwards) -> Forwards {
    Forwards::new(Arc::clone(host) as _, config)
}

async fn connect(forward: &Forward) -> TcpStream {
    TcpStream::connect(forward.address).await.unwrap()
}

#[tokio::test]
async fn a_forward_carries_both_ways_to_each_ways_end() {
    let host = Arc::new(Host::default());
    let forwards = forwards(&host, &config::Forwards::default());
    let port = host.port(5432).await;
    let forward = forwards.add(&port.sandbox, 5432, None, 0).await.unwrap();
    assert_eq!(forward.address.ip(), Ipv4Addr::LOCALHOST);
    assert_ne!(forward.address.port(), 0);

    let mut client = connect(&forward).await;
    let mut guest = port.accept().await;
    send(&mut client, "question").await;
    client.shutdown().await.unwrap();
    assert_eq!(rest(&mut guest).await, b"question");
    send(&mut guest, vec![7; 1 << 20]).await;
    drop(guest);
    assert!(rest(&mut client).await == vec![7; 1 << 20]);
}

#[tokio::test]
async fn a_port_is_taken_once() {
    let host = Arc::new(Host::default());
    let forwards = forwards(&host, &config::Forwards::default());
    let sandbox = host.port(80).await.sandbox;
    let forward = forwards.add(&sandbox, 80, None, 0).await.unwrap();
    let taken = forward.address.port();
    match forwards.add(&sandbox, 81, None, taken).await {
        Err(ForwardError::InUse(address)) => assert_eq!(address, forward.address),
        other => panic!("{other:?}"),
    }
    // On another address of the host it is another port.
    let elsewhere = Some(Ipv4Addr::new(127, 0, 0, 2).into());
    forwards.add(&sandbox, 81, elsewhere, taken).await.unwrap();
    assert!(matches!(
        forwards.add(&sandbox, 0, None, 0).await,
        Err(ForwardError::NoPort)
    ));
    // TEST-NET-1 is nobody's.
    let nowhere = Some(Ipv4Addr::new(192, 0, 2, 1).into());
    let refused = forwards.add(&sandbox, 80, nowhere, 0).await;
    assert!(
        matches!(refused, Err(ForwardError::NoSuchAddress(_))),
        "{refused:?}"
    );
    assert_eq!(forwards.list(None).len(), 2);
}

#[tokio::test]
async fn what_is_removed_leaves_nothing() {
    let host = Arc::new(Host::default());
    let forwards = forwards(&host, &config::Forwards::default());
    let (one, two) = (host.port(80).await, host.port(80).await);
    let first = forwards.add(&one.sandbox, 80, None, 0).await.unwrap();
    let second = forwards.add(&one.sandbox, 80, None, 0).await.unwrap();
    let third = forwards.add(&two.sandbox, 80, None, 0).await.unwrap();
    assert_eq!(
        forwards.list(Some(&two.sandbox)),
        std::slice::from_ref(&third)
    );
    let mut clients = Vec::new();
    for (forward, port) in [(&first, &one), (&second, &one), (&third, &two)] {
        clients.push((connect(forward).await, port.accept().await));
    }

    assert_eq!(forwards.remove(first.address).await.unwrap(), first);
    assert!(matches!(
        forwards.remove(first.address).await,
        Err(ForwardError::NotFound(address)) if address == first.address
    ));
    // The port is free again as soon as it is said to be.
    drop(TcpListener::bind(first.address).await.unwrap());
    forwards.remove_sandbox(&one.sandbox).await;
    assert_eq!(forwards.list(None), [third]);
    assert!(TcpStream::connect(second.address).await.is_err());
    let (mut kept, mut kept_guest) = clients.pop().unwrap();
    for (mut client, mut guest) in clients {
        assert_eq!(rest(&mut client).await, b"");
        assert_eq!(rest(&mut guest).await, b"");
    }
    send(&mut kept, "on").await;
    assert_eq!(bytes(&mut kept_guest, 2).await, b"on");
    drop(forwards);
    assert_eq!(rest(&mut kept).await, b"");
}

#[tokio::test]
async fn who_cannot_be_served_is_reset() {
    let host = Arc::new(Host::default());
    let config = config::Forwards {
        connect_timeout_ms: 50,
        ..config::Forwards::default()
    };
    let forwards = forwards(&host, &config);
    let port = host.port(80).await;
    // Nobody listens on 81; 1 takes no connection; 2 is of a paused sandbox.
    for closed in [81, 1, 2] {
        let forward = forwards.add(&port.sandbox, closed, None, 0).await.unwrap();
        let error = within(connect(&forward).await.read_u8()).await.unwrap_err();
        assert_eq!(
            error.kind(),
            std::io::ErrorKind::ConnectionReset,
            "{closed}"
        );
    }
    // A guest's reset is one for the client, not an end.
    let forward = forwards.add(&port.sandbox, 80, None, 0).await.unwrap();
    let mut client = connect(&forward).await;
    let guest = port.accept().await;
    guest.set_zero_linger().unwrap();
    drop(guest);
    let error = within(client.read_u8()).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    // And none of that has cost the forward anything.
    let mut client = connect(&forward).await;
    let mut guest = port.accept().await;
    send(&mut client, "x").await;
    assert_eq!(bytes(&mut guest, 1).await, b"x");
}

#[tokio::test]
async fn connections_over_the_limit_wait() {
    let host = Arc::new(Host::default());
    let config = config::Forwards {
        max_connections: 1,
        ..config::Forwards::default()
    };
    let forwards = forwards(&host, &config);
    let port = host.port(80).await;
    let forward = forwards.add(&port.sandbox, 80, None, 0).await.unwrap();
    let (first, mut second) = (connect(&forward).await, connect(&forward).await);
    send(&mut second, "waits").await;
    let guest = port.accept().await;
    let early = tokio::time::timeout(Duration::from_millis(100), port.listener.accept()).await;
    assert!(early.is_err());
    drop((first, guest));
    assert_eq!(bytes(&mut port.accept().await, 5).await, b"waits");
}
