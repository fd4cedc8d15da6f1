//! The network that the host gives the guest, in the agent's own namespace: what
//! programs see of it, and when.

use soulbox_proto::guest::v1::exec_response::Event;
use soulbox_proto::guest::v1::*;

use crate::common::*;

/// Makes the guest's interface, and at its other end the namespace "router", which
/// echoes what it gets on TCP port 7.
const ROUTER: &str = r#"
ip netns add router
ip link add eth0 type veth peer name eth0 netns router
ip netns exec router sh -euc '
    ip link set lo up
    ip link set eth0 address 02:00:00:00:00:01 up
    ip addr add 10.9.0.1/30 dev eth0
    exec setsid perl -MIO::Socket::INET -e "
        \$server = IO::Socket::INET->new(LocalPort => 7, Listen => 9, ReuseAddr => 1) or die;
        print qq(ready\n);
        close STDOUT;
        while (\$client = \$server->accept) { fork or do { print \$client \$_ while <\$client>; exit } }
    " 2>/dev/null &
' | head -n1
"#;

/// Says what has come back, and then, where it waits for more, why nothing does.
fn client(waits: bool) -> String {
    let script = r#"
        $| = 1;
        $router = IO::Socket::INET->new(PeerAddr => "10.9.0.1:7") or die $!;
        $router->autoflush(1);
        print $router "hello\n";
        print scalar <$router>;
        exit unless WAITS;
        sysread($router, $_, 1) // print "$!\n";
    "#;
    let script = script.replace("WAITS", if waits { "1" } else { "0" });
    format!("exec perl -MIO::Socket::INET -e '{script}'")
}

fn network(last_of_mac: u8) -> Network {
    Network {
        mac: vec![2, 0, 0, 0, 0, last_of_mac].into(),
        mtu: 1500,
        addresses: vec![InterfaceAddress {
            address: vec![10, 9, 0, 2].into(),
            prefix_length: 30,
        }],
        gateways: vec![vec![10, 9, 0, 1].into()],
        gateway_mac: vec![2, 0, 0, 0, 0, 1].into(),
        resolvers: vec![vec![10, 9, 0, 1].into()],
    }
}

fn with_network(network: Network) -> ConfigureRequest {
    ConfigureRequest {
        network: Some(network),
        ..ConfigureRequest::default()
    }
}

#[tokio::test]
async fn a_clone_has_its_own_interface_and_none_of_its_parents_connections() {
    let guest = Guest::start_as_init().await;
    let made = guest.sh(ROUTER).await;
    assert_eq!(made.text(), "ready\n", "{made:?}");
    let mut system = guest.system();
    system.configure(with_network(network(0x0a))).await.unwrap();
    let seen =
        "cat /etc/resolv.conf; cat /sys/class/net/eth0/address; ip -br -4 addr show dev eth0";
    let text = guest.sh(seen).await;
    let mut lines = text.text().lines();
    assert_eq!(lines.next(), Some("nameserver 10.9.0.1"));
    assert_eq!(lines.next(), Some("02:00:00:00:00:0a"));
    assert!(lines.next().unwrap().ends_with("10.9.0.2/30 "), "{text:?}");

    let mut waiting = guest.exec(sh(&client(true))).await.unwrap();
    assert_eq!(waiting.event().await, Event::Stdout("hello\n".into()));
    system.suspend(SuspendRequest {}).await.unwrap();
    let clone = ConfigureRequest {
        new_identity: true,
        reset_connections: true,
        ..with_network(network(0x0b))
    };
    system.configure(clone).await.unwrap();
    // Asleep in a call that would not end else.
    let ended = waiting.finish().await.unwrap();
    assert_eq!(ended.text(), "Software caused connection abort\n");
    let address = guest.sh("cat /sys/class/net/eth0/address").await;
    assert_eq!(address.text(), "02:00:00:00:00:0b\n");
    // The router of a real clone knows no other guest.
    guest
        .sh("ip netns exec router ip neigh flush dev eth0")
        .await;
    assert_eq!(guest.sh(&client(false)).await.text(), "hello\n");
}

#[tokio::test]
async fn a_guest_without_network_keeps_its_files() {
    let guest = Guest::start_as_init().await;
    guest
        .sh("ip link add eth0 type veth peer name other; echo mine >/etc/resolv.conf")
        .await;
    let mut system = guest.system();
    system.configure(ConfigureRequest::default()).await.unwrap();
    let seen = guest
        .sh("cat /etc/resolv.conf; cat /sys/class/net/eth0/flags")
        .await;
    assert_eq!(seen.text(), "mine\n0x1002\n");

    system.configure(with_network(network(0x0a))).await.unwrap();
    system.configure(ConfigureRequest::default()).await.unwrap();
    let seen = guest
        .sh("cat /etc/resolv.conf; cat /sys/class/net/eth0/flags")
        .await;
    assert_eq!(seen.text(), "nameserver 10.9.0.1\n0x1002\n");
}

#[tokio::test]
async fn what_cannot_be_is_refused_and_nothing_goes_on() {
    let guest = Guest::start_as_init().await;
    let mut system = guest.system();
    system.configure(ConfigureRequest::default()).await.unwrap();
    system.suspend(SuspendRequest {}).await.unwrap();

    let missing = system
        .configure(with_network(network(0x0a)))
        .await
        .unwrap_err();
    assert_eq!(reason(&missing).0, "NOT_CONFIGURED");
    assert!(
        missing.message().contains("network interface"),
        "{missing:?}"
    );
    let wrong = Network {
        mac: vec![2, 0, 0, 0, 0].into(),
        mtu: 0,
        ..network(0x0a)
    };
    let wrong = system.configure(with_network(wrong)).await.unwrap_err();
    assert_eq!(fields(&wrong), ["network.mac", "network.mtu"]);
    assert_eq!(guest.cgroup_event("frozen"), Some(true));
}
