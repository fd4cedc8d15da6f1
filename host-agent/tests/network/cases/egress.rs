//! What a guest reaches, and what reaches it.

use std::io::ErrorKind;
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use soulbox_host::net::{DomainPattern, Network, Policy, Rule};

use super::{Sandbox, no_internet, rule};
use crate::guest::{Guest, connect, echoes};
use crate::world::{
    HOST, INTERNET, OTHER, PRIVATE, SILENCE, Servers, World, at, config, eventually, inside,
};

pub async fn a_guest_reaches_the_internet_and_nothing_else(_: World) {
    let mut sandbox = Sandbox::start().await;
    for (address, host) in INTERNET.iter().zip(HOST) {
        let (mut stream, seen) = sandbox.guest.connect(at(address, 80)).unwrap();
        assert!(echoes(&mut stream));
        assert_eq!(seen, host, "the internet sees the host");
        let socket = sandbox.guest.udp(at(address, 443));
        socket.send(b"datagram").unwrap();
        assert_eq!(socket.recv(&mut [0; 16]).unwrap(), 8);
    }
    let passed = sandbox.counters().await;
    assert_eq!(passed.connections, 4);
    assert!(passed.connections_open >= 4, "{passed:?}");
    assert!(
        passed.sent.packets >= 8 && passed.received.bytes > 128,
        "{passed:?}"
    );

    // Both are there for whoever may reach them.
    let host_servers = Servers::start(&HOST, &[80]);
    for address in PRIVATE.iter().chain(&HOST) {
        let (_, _) = connect(at(address, 80)).unwrap();
    }
    let heard = host_servers.heard();
    for address in PRIVATE {
        assert_eq!(
            sandbox.guest.refused(at(address, 80)),
            ErrorKind::ConnectionRefused
        );
        let denied = sandbox.denied.recv().await.unwrap();
        assert_eq!(denied.reason, "private");
        assert_eq!(denied.destination, Some(address.parse().unwrap()));
        assert_eq!((denied.protocol, denied.port), (Some(6), Some(80)));
    }
    assert!(sandbox.dropped("private").await >= 4);

    // The host: by its own address nothing answers, by the slot's it is refused.
    let other = sandbox.network.take_or_make().await.unwrap();
    let other_guest = Guest::start("other", &other.tap, other.mac);
    let other_servers = other_guest.serve(80);
    let targets = [other.ipv4.to_string(), other.ipv6.to_string()];
    for address in targets.iter().map(String::as_str).chain(["10.213.0.0"]) {
        assert_eq!(
            sandbox.guest.refused(at(address, 80)),
            ErrorKind::ConnectionRefused
        );
        assert_eq!(sandbox.denied.recv().await.unwrap().reason, "sandbox");
    }
    for address in HOST {
        let socket = sandbox.guest.udp(at(address, 80));
        socket.set_read_timeout(Some(SILENCE)).unwrap();
        socket.send(b"host?").unwrap();
        assert!(socket.recv(&mut [0; 16]).is_err());
    }
    assert_eq!((host_servers.heard(), other_servers.heard()), (heard, 0));
    // Not even when it is allowed in so many words.
    let all = Policy {
        allow: vec![rule("0.0.0.0/0"), rule("::/0")],
        ..Policy::default()
    };
    sandbox.apply(&all).await;
    assert!(sandbox.guest.reaches(at(PRIVATE[0], 80)));
    assert!(sandbox.guest.connect(at(&targets[0], 80)).is_err());
    let socket = sandbox.guest.udp(at(HOST[0], 80));
    socket.set_read_timeout(Some(SILENCE)).unwrap();
    socket.send(b"host?").unwrap();
    assert!(socket.recv(&mut [0; 16]).is_err());
    assert_eq!((host_servers.heard(), other_servers.heard()), (heard, 0));
}

pub async fn the_host_reaches_a_guest_and_nobody_else_does(_: World) {
    let sandbox = Sandbox::start().await;
    // With nothing allowed to the guest itself.
    sandbox.apply(&no_internet()).await;
    let servers = sandbox.guest.serve(8080);
    let addresses = [sandbox.slot.ipv4.to_string(), sandbox.slot.ipv6.to_string()];
    for (address, gateway) in addresses.iter().zip(["172.30.0.1", "fd5b::1"]) {
        let (mut stream, seen) = connect(at(address, 8080)).unwrap();
        assert!(echoes(&mut stream));
        assert_eq!(seen, gateway, "a guest sees its gateway, in every slot");
    }
    assert_eq!(servers.heard(), 2);
    // The internet has a route to the slots here, and is not let in.
    for address in addresses {
        let to = at(&address, 8080);
        let reached = inside("internet", move || {
            std::net::TcpStream::connect_timeout(&to, SILENCE).is_ok()
        });
        assert!(!reached);
    }
    assert_eq!(servers.heard(), 2);
}

pub async fn lists_are_judged_in_their_order(_: World) {
    let sandbox = Sandbox::start().await;
    let guest = &sandbox.guest;
    let only_https = Policy {
        allow: vec![
            Rule::parse("203.0.113.0/24", "tcp", &["443"]).unwrap(),
            Rule::parse("2001:db8:2::/48", "any", &["1-80"]).unwrap(),
            rule("10.99.0.0/16"),
        ],
        deny: vec![rule(OTHER[0])],
        ..no_internet()
    };
    sandbox.apply(&only_https).await;
    assert!(guest.reaches(at(INTERNET[0], 443)));
    assert!(guest.reaches(at(INTERNET[1], 80)));
    assert!(
        guest.reaches(at(PRIVATE[0], 80)),
        "allowed before it is private"
    );
    for denied in [at(INTERNET[0], 80), at(INTERNET[1], 443), at(OTHER[0], 443)] {
        assert_eq!(
            guest.refused(denied),
            ErrorKind::ConnectionRefused,
            "{denied}"
        );
    }
    let counters = sandbox.counters().await;
    assert!(counters.dropped["internet"].packets >= 2, "{counters:?}");
    assert!(counters.dropped["listed"].packets >= 1, "{counters:?}");
    // Overlapping entries are one range, in any order.
    let overlapping = Policy {
        deny: vec![
            Rule::parse("203.0.113.20/32", "tcp", &["80", "79-81"]).unwrap(),
            Rule::parse("203.0.112.0/20", "tcp", &["81-90", "80"]).unwrap(),
            Rule::parse("203.0.113.0/24", "tcp", &["80-90"]).unwrap(),
        ],
        ..Policy::default()
    };
    sandbox.apply(&overlapping).await;
    assert_eq!(
        guest.refused(at(INTERNET[0], 80)),
        ErrorKind::ConnectionRefused
    );
    assert!(guest.reaches(at(INTERNET[0], 443)) && guest.reaches(at(INTERNET[1], 80)));
}

pub async fn what_is_no_longer_allowed_stops_at_once(_: World) {
    let sandbox = Sandbox::start().await;
    let (mut kept, _) = sandbox.guest.connect(at(INTERNET[0], 80)).unwrap();
    let (mut cut, _) = sandbox.guest.connect(at(OTHER[0], 80)).unwrap();
    let feed = inside("internet", || UdpSocket::bind(at(OTHER[1], 90)).unwrap());
    let subscriber = sandbox.guest.udp(at(OTHER[1], 90));
    subscriber.send(b"subscribe").unwrap();
    let (_, from) = feed.recv_from(&mut [0; 16]).unwrap();
    let policy = Policy {
        deny: vec![rule(OTHER[0]), rule(OTHER[1])],
        ..Policy::default()
    };
    sandbox.apply(&policy).await;
    assert!(!echoes(&mut cut) && echoes(&mut kept));
    // What the other side sends by itself is denied too.
    feed.send_to(b"denied", from).unwrap();
    subscriber.set_read_timeout(Some(SILENCE)).unwrap();
    assert!(subscriber.recv(&mut [0; 16]).is_err());
    sandbox.apply(&Policy::default()).await;
    feed.send_to(b"allowed", from).unwrap();
    assert_eq!(subscriber.recv(&mut [0; 16]).unwrap(), 7);
    assert!(sandbox.guest.reaches(at(OTHER[0], 80)) && echoes(&mut kept));
}

pub async fn a_change_under_load_loses_no_packet_that_is_allowed(_: World) {
    let sandbox = Sandbox::start().await;
    let over = Arc::new(AtomicBool::new(false));
    let echoed = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
    let streams: Vec<_> = INTERNET
        .iter()
        .enumerate()
        .map(|(number, address)| {
            let socket = sandbox.guest.udp(at(address, 80));
            let (over, echoed) = (Arc::clone(&over), Arc::clone(&echoed));
            std::thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    let sent = echoed[number].load(Ordering::Relaxed).to_be_bytes();
                    let mut back = [0; 8];
                    socket.send(&sent).unwrap();
                    assert_eq!(socket.recv(&mut back).expect("a datagram is lost"), 8);
                    assert_eq!(back, sent);
                    echoed[number].fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let (mut tcp, _) = sandbox.guest.connect(at(INTERNET[0], 443)).unwrap();
    let policies = [
        Policy {
            allow: INTERNET.iter().map(|address| rule(address)).collect(),
            ..no_internet()
        },
        Policy {
            deny: vec![rule(OTHER[0])],
            allow_domains: vec!["example.com".parse().unwrap()],
            ..Policy::default()
        },
        Policy::default(),
    ];
    let mut changes = policies.iter().cycle();
    let is_enough = || {
        echoed
            .iter()
            .all(|count| count.load(Ordering::Relaxed) > 500)
    };
    let is_broken = || streams.iter().any(std::thread::JoinHandle::is_finished);
    for change in 0.. {
        if change > 30 && is_enough() || is_broken() {
            break;
        }
        sandbox.apply(changes.next().unwrap()).await;
        assert!(echoes(&mut tcp));
    }
    over.store(true, Ordering::Relaxed);
    for stream in streams {
        stream.join().unwrap();
    }
}

pub async fn a_domain_opens_what_its_answers_name(_: World) {
    let sandbox = Sandbox::start().await;
    let domains: Vec<DomainPattern> = ["*.example.com", "example.org"]
        .map(|name| name.parse().unwrap())
        .to_vec();
    let policy = Policy {
        allow_domains: domains.clone(),
        ..no_internet()
    };
    sandbox.apply(&policy).await;
    let (one, two) = (domains[0].id(), domains[1].id());
    let open = async |domain, addresses: &[&str], ttl| {
        let addresses: Vec<_> = addresses.iter().map(|text| text.parse().unwrap()).collect();
        let opened = sandbox
            .network
            .open(sandbox.slot.index, domain, &addresses, ttl);
        opened.await.unwrap()
    };
    let long = Duration::from_secs(60);
    assert!(sandbox.guest.connect(at(INTERNET[0], 80)).is_err());
    assert_eq!(open(one, &INTERNET, long).await, 2);
    for address in INTERNET {
        assert!(sandbox.guest.reaches(at(address, 80)));
    }
    assert!(sandbox.guest.connect(at(OTHER[0], 80)).is_err());
    // An answer that names private addresses opens nothing (DNS rebinding).
    open(one, &PRIVATE, long).await;
    for address in PRIVATE {
        assert!(sandbox.guest.connect(at(address, 80)).is_err(), "{address}");
    }
    let none = ["127.0.0.1", "0.0.0.0", "::", "ff02::1", "10.213.0.3"];
    assert_eq!(open(one, &none, long).await, 0);
    // For as long as the answer is valid; what was begun by then goes on.
    assert_eq!(open(two, &[OTHER[0]], Duration::from_millis(700)).await, 1);
    let (mut begun, _) = sandbox.guest.connect(at(OTHER[0], 80)).unwrap();
    eventually("the answer never ends", async || {
        sandbox.guest.connect(at(OTHER[0], 80)).is_err()
    })
    .await;
    assert!(echoes(&mut begun));
    // An address of two domains stays open while one of them is allowed.
    open(two, &INTERNET, long).await;
    let fewer = Policy {
        allow_domains: vec![domains[1].clone()],
        ..no_internet()
    };
    let (mut both, _) = sandbox.guest.connect(at(INTERNET[1], 80)).unwrap();
    sandbox.apply(&fewer).await;
    assert!(echoes(&mut both) && sandbox.guest.reaches(at(INTERNET[1], 80)));
    assert_eq!(
        open(one, &[OTHER[1]], long).await,
        0,
        "no longer in the policy"
    );
    sandbox.apply(&no_internet()).await;
    assert!(!echoes(&mut both) && !echoes(&mut begun));
}

pub async fn one_sandbox_has_so_many_connections(_: World) {
    let mut few = config();
    few.connections_max = 3;
    let network = Network::start(&few, &[]).await.unwrap().network;
    let slot = network.take().unwrap();
    let guest = Guest::start("guest", &slot.tap, slot.mac);
    let mut open: Vec<_> = (0..3)
        .map(|_| guest.connect(at(INTERNET[0], 80)).unwrap())
        .collect();
    assert_eq!(
        guest.refused(at(INTERNET[0], 80)),
        ErrorKind::ConnectionRefused
    );
    assert!(open.iter_mut().all(|(stream, _)| echoes(stream)));
    let counters = network.counters(slot.index).await.unwrap();
    assert!(counters.dropped["crowd"].packets > 0);
}
