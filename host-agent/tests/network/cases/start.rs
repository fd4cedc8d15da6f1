//! Hosts that do not fit, and what is said about it.

use rustix::thread::{CapabilitySet, CapabilitySets};
use soulbox_host::net::{Network, NftError, Policy, PolicyError, PolicyViolation, StartError};

use super::Sandbox;
use crate::world::{HOST, INTERNET, PRIVATE, World, config, sh, state};

async fn refused(config: &soulbox_host::config::Network) -> StartError {
    match Network::start(config, &[]).await {
        Ok(_) => panic!("it starts"),
        Err(error) => error,
    }
}

pub async fn what_is_wrong_with_the_host_is_said(_: World) {
    let before = state();
    for (route, mend) in [
        ("10.213.7.0/24", "network.ipv4_range"),
        ("10.0.0.0/8", "10.213.0.0/16"),
        ("fd73:6f75:6c62:6f78::/80", "network.ipv6_range"),
        ("blackhole 10.213.0.0/17", "10.213.0.0/17"),
        ("10.213.1.1 table 77", "10.213.1.1"),
    ] {
        let via = if route.starts_with("blackhole") {
            ""
        } else {
            "dev wan"
        };
        sh(&format!("ip route add {route} {via}"));
        let error = refused(&config()).await;
        assert!(matches!(error, StartError::Overlap { .. }), "{error}");
        assert!(error.to_string().contains(mend), "{error}");
        sh(&format!("ip route del {route} {via}"));
    }
    sh("ip addr add 10.213.255.1/32 dev lo");
    let error = refused(&config()).await;
    assert!(matches!(error, StartError::Overlap { .. }), "{error}");
    sh("ip addr del 10.213.255.1/32 dev lo; ip link add sbridge type veth");
    let error = refused(&config()).await;
    assert!(error.to_string().contains("sbridge"), "{error}");
    sh("ip link del sbridge");
    assert_eq!(state(), before, "nothing was made");

    let started = Network::start(&config(), &[]).await.unwrap();
    let error = refused(&config()).await;
    assert!(matches!(error, StartError::AnotherDaemon), "{error}");
    started.network.stop().await;
    assert_eq!(state(), before);
}

pub async fn nftables_that_is_absent_or_refuses_is_said(_: World) {
    let before = state();
    let mut absent = config();
    absent.nft = "/nonexistent/nft".into();
    let error = refused(&absent).await;
    let StartError::Rules {
        source: NftError::Missing { .. },
    } = &error
    else {
        panic!("{error}");
    };
    assert!(error.to_string().contains("install nftables"), "{error}");
    // Root without CAP_NET_ADMIN, for itself and for what it starts.
    let error = std::thread::spawn(|| {
        let net_admin = CapabilitySet::NET_ADMIN;
        rustix::thread::remove_capability_from_bounding_set(net_admin).unwrap();
        let CapabilitySets {
            effective,
            permitted,
            inheritable,
        } = rustix::thread::capabilities(None).unwrap();
        let sets = CapabilitySets {
            effective: effective - net_admin,
            permitted: permitted - net_admin,
            inheritable: inheritable - net_admin,
        };
        rustix::thread::set_capabilities(None, sets).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async { refused(&config()).await })
    })
    .join()
    .unwrap();
    let StartError::Rules {
        source: NftError::Permission { .. },
    } = &error
    else {
        panic!("{error}");
    };
    assert!(error.to_string().contains("CAP_NET_ADMIN"), "{error}");
    assert_eq!(state(), before, "nothing was made");
}

pub async fn the_resolver_has_its_sockets(_: World) {
    let sandbox = Sandbox::start().await;
    let sockets = sandbox
        .network
        .bind_resolver(sandbox.slot.index)
        .await
        .unwrap();
    sandbox.apply(&super::no_internet()).await;
    for (socket, gateway) in sockets.udp.into_iter().zip(["172.30.0.1", "fd5b::1"]) {
        let guest = sandbox.guest.udp(crate::world::at(gateway, 53));
        guest.send(b"question").unwrap();
        let socket = tokio::net::UdpSocket::from_std(socket).unwrap();
        let mut buffer = [0; 16];
        let (length, from) = socket.recv_from(&mut buffer).await.unwrap();
        assert_eq!(&buffer[..length], b"question");
        socket.send_to(b"answer", from).await.unwrap();
        assert_eq!(guest.recv(&mut buffer).unwrap(), 6);
    }
    for (socket, gateway) in sockets.tcp.into_iter().zip(["172.30.0.1", "fd5b::1"]) {
        let to = crate::world::at(gateway, 53);
        let stream = sandbox.guest.run(move || {
            std::net::TcpStream::connect_timeout(&to, crate::world::PATIENCE).unwrap()
        });
        let socket = tokio::net::TcpListener::from_std(socket).unwrap();
        let (_, from) = socket.accept().await.unwrap();
        assert_eq!(from, stream.local_addr().unwrap());
    }
    // No other port of the gateway.
    sandbox.guest.refused(crate::world::at("172.30.0.1", 54));
    assert!(sandbox.dropped("gateway").await >= 1);
}

pub async fn neither_the_host_nor_a_sandbox_is_asked_for_names(_: World) {
    sh("ip addr add 198.51.100.7/24 dev wan; ip route add local 10.50.0.0/16 dev lo");
    let sandbox = Sandbox::start().await;
    let refused = [
        // Also a second address of a link, and what is local by a route alone.
        HOST[0],
        HOST[1],
        "198.51.100.7",
        "198.51.100.255",
        "10.50.1.2",
        &sandbox.slot.ipv4.to_string(),
        &sandbox.slot.ipv6.to_string(),
        "10.213.200.1",
    ];
    let fine = ["198.51.100.1", INTERNET[0], INTERNET[1], PRIVATE[0]];
    for (servers, is_refused) in [(&refused[..], true), (&fine, false)] {
        for server in servers {
            let policy = Policy {
                dns_servers: vec![INTERNET[0].parse().unwrap(), server.parse().unwrap()],
                ..Policy::default()
            };
            let found = sandbox.network.violations(&policy).await.unwrap();
            let expected = is_refused.then(|| PolicyViolation {
                field: "dns_servers[1]".to_owned(),
                error: PolicyError::DnsServerOfHost(server.parse().unwrap()),
            });
            assert_eq!(found, Vec::from_iter(expected), "{server}");
        }
    }
    // Where no way leads out, nobody is asked, and nothing fails.
    sh("ip route del default; ip -6 route del default");
    let policy = Policy {
        dns_servers: INTERNET.map(|server| server.parse().unwrap()).to_vec(),
        ..Policy::default()
    };
    assert_eq!(sandbox.network.violations(&policy).await.unwrap(), []);
}
