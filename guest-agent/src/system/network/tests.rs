//! Against this machine's kernel, in network namespaces of their own: "guest" and
//! "router", with a veth pair between them. `ip` says what came of it.

use std::fs::File;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::process::Command;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use netlink_packet_core::NLM_F_CREATE;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo, LinkMessage,
};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use netlink_sys::{Socket, SocketAddr as NetlinkAddr};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use soulbox_proto::guest::v1::{self as proto, InterfaceAddress};

use super::netlink::Change;
use super::*;
use crate::spec::Violations;

const GUEST_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x0a];
const CLONE_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x0b];
const ROUTER_MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 0x01];

/// Long for a busy machine; nothing should come near it.
const LONG: Duration = Duration::from_secs(60);
/// Long enough for events that are under way.
const A_WHILE: Duration = Duration::from_millis(200);

/// RTMGRP_LINK, _NEIGH, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR and _IPV6_ROUTE.
const CHANGES: u32 = 0x1 | 0x4 | 0x10 | 0x40 | 0x100 | 0x400;

/// The thread is in the guest's namespace but for what `at_router` does.
struct Wire {
    guest: File,
    router: File,
    nic: Nic,
    _away: Away,
}

/// The thread is in another namespace as long as there is this.
struct Away {
    home: File,
}

// === impl Away ===

impl Away {
    fn go() -> Self {
        Self { home: here() }
    }
}

impl Drop for Away {
    fn drop(&mut self) {
        enter(&self.home);
    }
}

// === impl Wire ===

impl Wire {
    /// With a router that has its addresses; the guest has an interface that is off.
    fn lay() -> Self {
        let away = Away::go();
        let guest = new_namespace();
        let router = new_namespace();
        loopback_up().unwrap();
        enter(&guest);
        loopback_up().unwrap();

        let end = |name: &str| {
            let mut message = LinkMessage::default();
            let name = LinkAttribute::IfName(name.to_owned());
            message.attributes.push(name);
            message
        };
        let mut peer = end("eth0");
        let namespace = LinkAttribute::NetNsFd(router.as_raw_fd());
        peer.attributes.push(namespace);
        let mut link = end("eth0");
        link.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]));
        let add = Change::new("veth", libc::RTM_NEWLINK, NLM_F_CREATE, &link);
        open().unwrap().carry_out(&[add]).unwrap();

        let nic = Nic::find().unwrap();
        let wire = Self {
            guest,
            router,
            nic,
            _away: away,
        };
        wire.at_router(|| {
            let network = proto::Network {
                addresses: vec![v4([10, 9, 0, 1], 30), v6("fd00:9::1", 64)],
                gateways: Vec::new(),
                gateway_mac: Vec::new().into(),
                ..described(ROUTER_MAC)
            };
            Nic::find().unwrap().connect(&checked(&network)).unwrap();
        });
        wire
    }

    /// With a guest that has all it should.
    fn connected() -> Self {
        let wire = Self::lay();
        wire.nic.connect(&network(GUEST_MAC)).unwrap();
        wire.at_router(|| until_local("fd00:9::1"));
        until_local("fd00:9::2");
        wire
    }

    fn at_router<T>(&self, work: impl FnOnce() -> T) -> T {
        enter(&self.router);
        let result = work();
        enter(&self.guest);
        result
    }

    /// Connections of the guest to the router and of the router to the guest's
    /// `listener`, the guest's end first.
    fn pair(&self, listener: &TcpListener, router: SocketAddr) -> [(TcpStream, TcpStream); 2] {
        let there = self.at_router(|| TcpListener::bind(router).unwrap());
        let out = TcpStream::connect(there.local_addr().unwrap()).unwrap();
        let (out_peer, own) = there.accept().unwrap();
        let to = SocketAddr::new(own.ip(), listener.local_addr().unwrap().port());
        let back_peer = self.at_router(|| TcpStream::connect(to).unwrap());
        let (back, _) = listener.accept().unwrap();
        [(out, out_peer), (back, back_peer)]
    }
}

/// The thread's, which goes with the last descriptor to it.
fn new_namespace() -> File {
    // SAFETY: unsafe for CLONE_FILES only, with which two threads could disagree
    // about who owns a descriptor. The thread is the test's own.
    #[allow(unsafe_code)]
    unsafe {
        rustix::thread::unshare_unsafe(UnshareFlags::NEWNET).unwrap();
    }
    here()
}

fn here() -> File {
    File::open("/proc/thread-self/ns/net").unwrap()
}

fn enter(namespace: &File) {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
}

fn v4(address: [u8; 4], prefix_length: u32) -> InterfaceAddress {
    InterfaceAddress {
        address: address.to_vec().into(),
        prefix_length,
    }
}

fn v6(address: &str, prefix_length: u32) -> InterfaceAddress {
    let address: std::net::Ipv6Addr = address.parse().unwrap();
    InterfaceAddress {
        address: address.octets().to_vec().into(),
        prefix_length,
    }
}

fn described(mac: [u8; 6]) -> proto::Network {
    let gateways = [v4([10, 9, 0, 1], 30), v6("fd00:9::1", 64)];
    proto::Network {
        mac: mac.to_vec().into(),
        mtu: 1400,
        addresses: vec![v4([10, 9, 0, 2], 30), v6("fd00:9::2", 64)],
        gateways: gateways.map(|gateway| gateway.address).to_vec(),
        gateway_mac: ROUTER_MAC.to_vec().into(),
        resolvers: Vec::new(),
    }
}

fn checked(network: &proto::Network) -> Network {
    let mut violations = Violations::default();
    let checked = Network::check(network, &mut violations);
    violations.into_result().unwrap();
    checked
}

fn network(mac: [u8; 6]) -> Network {
    checked(&described(mac))
}

/// What `ip` says, with its columns one space apart.
fn ip(arguments: &str) -> String {
    let arguments = arguments.split(' ');
    let output = Command::new("ip").args(arguments).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let lines = text.lines().map(|line| {
        let words: Vec<_> = line.split_whitespace().collect();
        words.join(" ")
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn addresses() -> String {
    let line = ip("-br addr show dev eth0");
    line.split(' ').skip(2).collect::<Vec<_>>().join(" ")
}

fn routes() -> String {
    let both = [ip("-4 route show table main"), ip("-6 route show default")];
    // Of links that have just come up.
    both.join("\n").replace(" linkdown", "")
}

fn gateways() -> Vec<String> {
    let mut lines: Vec<_> = ip("neigh show nud permanent")
        .lines()
        .map(str::to_owned)
        .collect();
    lines.sort();
    lines
}

const ADDRESSES: &str = "10.9.0.2/30 fd00:9::2/64 fe80::ff:fe00:a/64";
const ROUTES: &str = "default via 10.9.0.1 dev eth0 proto static onlink\n\
                      10.9.0.0/30 dev eth0 proto kernel scope link src 10.9.0.2\n\
                      default via fd00:9::1 dev eth0 proto static metric 1024 onlink pref medium";
const GATEWAYS: [&str; 2] = [
    "10.9.0.1 dev eth0 lladdr 02:00:00:00:00:01 PERMANENT",
    "fd00:9::1 dev eth0 lladdr 02:00:00:00:00:01 PERMANENT",
];

/// Waits until the kernel takes packets to a new IPv6 address for its own, which is
/// soon after it has given it to the interface.
fn until_local(ip6: &str) {
    let over = Instant::now() + LONG;
    while !ip("-6 route show table local").contains(&format!("local {ip6} ")) {
        assert!(Instant::now() < over, "{ip6} does not become local");
        thread::sleep(Duration::from_millis(1));
    }
}

/// A socket that hears of changes, from now on.
fn listen() -> Socket {
    let mut socket = Socket::new(NETLINK_ROUTE).unwrap();
    socket.bind(&NetlinkAddr::new(0, CHANGES)).unwrap();
    socket.set_non_blocking(true).unwrap();
    socket
}

/// The kinds of the changes that there have been.
fn heard(socket: &Socket) -> Vec<u16> {
    let mut kinds = Vec::new();
    loop {
        let mut buffer = Vec::with_capacity(64 * 1024);
        match socket.recv(&mut buffer, 0) {
            Ok(_) => kinds.push(u16::from_ne_bytes([buffer[4], buffer[5]])),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                return kinds;
            }
        }
    }
}

/// Waits until the link works and nothing more comes of that by itself.
fn settle() {
    let events = listen();
    let over = Instant::now() + LONG;
    let mut quiet = false;
    while !quiet {
        assert!(Instant::now() < over, "the link does not settle");
        thread::sleep(A_WHILE);
        let is_up = ip("-br link show dev eth0").split(' ').nth(1) == Some("UP");
        let is_ready = addresses().contains("fe80:");
        quiet = heard(&events).is_empty() && is_up && is_ready;
    }
}

/// What `connect` would do now.
fn changes(wire: &Wire, network: &Network) -> Vec<&'static str> {
    let mut netlink = open().unwrap();
    let link = Link::read(&mut netlink, wire.nic.index.unwrap()).unwrap();
    let interface = Interface::read(&mut netlink, link, network).unwrap();
    let changes = interface.changes_to(network);
    changes.iter().map(|change| change.what).collect()
}

#[test]
fn a_guest_has_what_the_host_says_and_nothing_is_done_twice() {
    let wire = Wire::connected();
    settle();
    let conf = |name: &str| {
        std::fs::read_to_string(format!("/proc/sys/net/ipv6/conf/eth0/{name}")).unwrap()
    };
    for setting in ["accept_ra", "autoconf", "accept_dad"] {
        assert_eq!(conf(setting), "0\n", "{setting}");
    }
    let link = ip("link show dev eth0");
    assert!(
        link.contains("mtu 1400") && link.contains("02:00:00:00:00:0a"),
        "{link}"
    );
    assert_eq!(addresses(), ADDRESSES);
    assert_eq!(routes(), ROUTES);
    assert_eq!(gateways(), GATEWAYS);

    let events = listen();
    for _ in 0..3 {
        assert_eq!(changes(&wire, &network(GUEST_MAC)), [""; 0]);
        wire.nic.connect(&network(GUEST_MAC)).unwrap();
    }
    thread::sleep(A_WHILE);
    assert_eq!(heard(&events), [0; 0]);
}

#[test]
fn a_clone_changes_its_ethernet_address_and_what_hangs_on_it() {
    let wire = Wire::connected();
    settle();
    let clone = network(CLONE_MAC);
    let expected = [
        "interface's Ethernet address, MTU and state",
        "former addresses",
        "addresses",
        "gateways' Ethernet address",
        "gateways' Ethernet address",
    ];
    assert_eq!(changes(&wire, &clone), expected);
    wire.nic.connect(&clone).unwrap();

    assert!(ip("link show dev eth0").contains("02:00:00:00:00:0b"));
    assert_eq!(addresses(), ADDRESSES.replace("fe00:a/", "fe00:b/"));
    assert_eq!(routes(), ROUTES);
    assert_eq!(gateways(), GATEWAYS);
    assert_eq!(changes(&wire, &clone), [""; 0]);

    // The neighbours are right: nobody is asked for them.
    let there = wire.at_router(|| TcpListener::bind("[::]:0").unwrap());
    let port = there.local_addr().unwrap().port();
    for router in ["10.9.0.1", "fd00:9::1"] {
        TcpStream::connect((router, port)).unwrap();
        there.accept().unwrap();
    }
}

#[test]
fn what_is_not_wanted_goes() {
    let wire = Wire::connected();
    settle();
    // The wanted one becomes the second of its subnet, which goes with the first.
    for command in [
        "addr flush dev eth0",
        "addr add 10.9.0.3/30 dev eth0",
        "addr add 10.9.0.2/30 dev eth0",
        "addr add 192.0.2.1/24 dev eth0",
        "addr add fd00:9::3/64 dev eth0 nodad",
        "addr add fe80::1234/64 dev eth0 nodad",
        "addr add fe80::ff:fe00:c/64 dev eth0 nodad",
        "route replace default via 192.0.2.2 dev eth0 metric 5",
        "-6 route replace default via fe80::1 dev eth0",
        "neigh replace 10.9.0.1 lladdr 02:00:00:00:00:99 dev eth0",
        "link add other type veth peer name another",
        "link set another up",
        "link set other up",
        "addr add 198.51.100.1/24 dev other",
        "route add default dev other metric 50",
    ] {
        ip(command);
    }
    wire.nic.connect(&network(GUEST_MAC)).unwrap();
    let mut left: Vec<_> = addresses().split(' ').map(str::to_owned).collect();
    left.sort();
    let wanted = [
        "10.9.0.2/30",
        "fd00:9::2/64",
        "fe80::1234/64",
        "fe80::ff:fe00:a/64",
    ];
    assert_eq!(left, wanted);
    let left = routes();
    let wanted = ROUTES.lines().chain([
        "default dev other scope link metric 50",
        "198.51.100.0/24 dev other proto kernel scope link src 198.51.100.1",
    ]);
    for route in wanted.clone() {
        assert!(
            left.lines().any(|line| line == route),
            "{route} is not in\n{left}"
        );
    }
    assert_eq!(left.lines().count(), wanted.count(), "{left}");
    assert_eq!(gateways(), GATEWAYS);
    assert_eq!(changes(&wire, &network(GUEST_MAC)), [""; 0]);
}

#[test]
fn a_guest_without_network_is_off_until_it_has_one() {
    let wire = Wire::connected();
    wire.nic.disconnect().unwrap();
    let is_up = || ip("link show dev eth0").contains(",UP");
    assert!(!is_up());
    let events = listen();
    wire.nic.disconnect().unwrap();
    assert_eq!(heard(&events), [0; 0]);

    wire.nic.connect(&network(GUEST_MAC)).unwrap();
    settle();
    assert!(is_up());
    assert_eq!(addresses(), ADDRESSES);
    assert_eq!(routes(), ROUTES);
    assert_eq!(gateways(), GATEWAYS);
}

#[test]
fn the_interface_is_the_first_that_there_was() {
    let wire = Wire::lay();
    for command in [
        "link add name aaa index 900 type bridge",
        "link set eth0 name mine",
        "link set aaa name eth0",
    ] {
        ip(command);
    }
    wire.nic.connect(&network(GUEST_MAC)).unwrap();
    assert!(ip("-br addr show dev mine").contains("10.9.0.2/30"));

    // Gone from here: nothing is turned off, and nothing else gets the addresses.
    wire.at_router(|| ip("link del eth0"));
    wire.nic.disconnect().unwrap();
    let error = wire.nic.connect(&network(GUEST_MAC)).unwrap_err();
    assert!(matches!(error, NetworkError::Look(_)), "{error:?}");
}

#[test]
fn without_an_interface_there_is_no_network() {
    let _away = Away::go();
    new_namespace();
    loopback_up().unwrap();
    let nic = Nic::find().unwrap();
    nic.disconnect().unwrap();
    let error = nic.connect(&network(GUEST_MAC)).unwrap_err();
    assert!(matches!(error, NetworkError::NoInterface), "{error:?}");
}

#[test]
fn a_guest_whose_ipv6_is_off_has_the_rest() {
    let wire = Wire::connected();
    std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
    let clone = network(CLONE_MAC);
    wire.nic.connect(&clone).unwrap();
    assert_eq!(addresses(), "10.9.0.2/30");
    assert_eq!(gateways(), GATEWAYS[..1]);
    assert_eq!(changes(&wire, &clone), [""; 0]);
}

#[test]
fn a_refusal_names_the_step() {
    let wire = Wire::lay();
    let own = proto::Network {
        gateways: vec![v4([10, 9, 0, 2], 30).address],
        ..described(GUEST_MAC)
    };
    let error = wire.nic.connect(&checked(&own)).unwrap_err();
    let NetworkError::Change { what, source } = error else {
        panic!("{error:?}");
    };
    assert_eq!(what, "default routes");
    assert_eq!(source.kind(), ErrorKind::InvalidInput);
    // The next one mends it.
    wire.nic.connect(&network(GUEST_MAC)).unwrap();
    assert_eq!(routes(), ROUTES);
}

/// Waits on a thread of its own, and tells what came of it.
fn wait_for<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> JoinHandle<io::Result<T>> {
    let (tell, told) = std::sync::mpsc::channel();
    let waiting = thread::spawn(move || {
        tell.send(rustix::thread::gettid()).unwrap();
        work()
    });
    let stat = format!("/proc/self/task/{}/stat", told.recv().unwrap());
    // Asleep in the call.
    let over = Instant::now() + LONG;
    while !std::fs::read_to_string(&stat).unwrap().contains(") S ") {
        assert!(Instant::now() < over, "it does not wait");
        thread::sleep(Duration::from_millis(1));
    }
    waiting
}

/// Whether this kernel resets connections; some are built without.
fn resets() -> bool {
    match reset() {
        Ok(()) => true,
        Err(ResetError::Destroy(error)) if error.kind() == ErrorKind::Unsupported => {
            eprintln!("this kernel has no CONFIG_INET_DIAG_DESTROY: nothing more is tested");
            false
        }
        Err(error) => panic!("{error:?}"),
    }
}

fn assert_aborted<T: std::fmt::Debug>(result: io::Result<T>) {
    assert_eq!(result.unwrap_err().kind(), ErrorKind::ConnectionAborted);
}

fn assert_works((mut one, mut other): (TcpStream, TcpStream)) {
    one.write_all(b"x").unwrap();
    let mut byte = [0];
    other.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"x");
}

#[test]
fn connections_to_others_end_and_those_inside_go_on() {
    let wire = Wire::connected();
    let listener = TcpListener::bind("[::]:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let inside: Vec<_> = ["127.0.0.1", "::1", "10.9.0.2", "fd00:9::2"]
        .iter()
        .map(|ip| {
            let end = TcpStream::connect((*ip, port)).unwrap();
            (end, listener.accept().unwrap().0)
        })
        .collect();
    let outside: Vec<_> = ["10.9.0.1:0", "[fd00:9::1]:0"]
        .iter()
        .flat_map(|router| wire.pair(&listener, router.parse().unwrap()))
        .collect();
    let readers: Vec<_> = outside
        .iter()
        .map(|(end, _)| {
            let mut end = end.try_clone().unwrap();
            wait_for(move || end.read(&mut [0]))
        })
        .collect();
    // Nobody answers there.
    let caller = wait_for(|| TcpStream::connect((Ipv4Addr::new(192, 0, 2, 1), 9)));
    // Waits for `accept`.
    let mut pending = wire.at_router(|| TcpStream::connect(("10.9.0.2", port)).unwrap());

    if !resets() {
        return;
    }
    for reader in readers {
        assert_aborted(reader.join().unwrap());
    }
    assert_aborted(caller.join().unwrap());
    for (mut end, mut peer) in outside {
        assert!(end.write_all(b"x").is_err());
        assert_eq!(
            peer.read(&mut [0]).unwrap_err().kind(),
            ErrorKind::ConnectionReset
        );
    }
    let refused = pending.read(&mut [0]).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionReset);
    let (mut dead, _) = listener.accept().unwrap();
    assert_aborted(dead.read(&mut [0]));

    inside.into_iter().for_each(assert_works);
    for router in ["10.9.0.1:0", "[fd00:9::1]:0"] {
        let pairs = wire.pair(&listener, router.parse().unwrap());
        pairs.into_iter().for_each(assert_works);
    }
}

#[test]
fn connected_udp_sockets_end_and_others_go_on() {
    let wire = Wire::connected();
    let bind = |address: &str| UdpSocket::bind((address, 0)).unwrap();
    let pairs = [("10.9.0.2", "10.9.0.1"), ("fd00:9::2", "fd00:9::1")];
    let mut readers = Vec::new();
    let mut open = Vec::new();
    for (own, router) in pairs {
        let there = wire.at_router(|| bind(router));
        let connected = bind(own);
        connected.connect(there.local_addr().unwrap()).unwrap();
        readers.push(wait_for(move || connected.recv(&mut [0])));
        open.push((bind(own), there));
    }
    let (inside, server) = (bind("127.0.0.1"), bind("127.0.0.1"));
    inside.connect(server.local_addr().unwrap()).unwrap();

    if !resets() {
        return;
    }
    for reader in readers {
        assert_aborted(reader.join().unwrap());
    }
    for (open, there) in open {
        there.send_to(b"x", open.local_addr().unwrap()).unwrap();
        assert_eq!(open.recv(&mut [0]).unwrap(), 1);
    }
    server.send_to(b"x", inside.local_addr().unwrap()).unwrap();
    assert_eq!(inside.recv(&mut [0]).unwrap(), 1);
}

#[test]
fn no_state_and_no_number_of_connections_is_too_much() {
    let wire = Wire::connected();
    let there = wire.at_router(|| TcpListener::bind("10.9.0.1:0").unwrap());
    let pair = || {
        let end = TcpStream::connect(there.local_addr().unwrap()).unwrap();
        (end, there.accept().unwrap().0)
    };
    // More than are reset at once.
    let many: Vec<_> = (0..150).map(|_| pair()).collect();
    // FIN_WAIT2, CLOSE_WAIT, and TIME_WAIT.
    let (ours, theirs, both) = (pair(), pair(), pair());
    ours.0.shutdown(Shutdown::Write).unwrap();
    theirs.1.shutdown(Shutdown::Write).unwrap();
    both.0.shutdown(Shutdown::Write).unwrap();
    drop(both);

    let left = || {
        let mut netlink = Netlink::open(NETLINK_SOCK_DIAG).unwrap();
        connections::resets(&mut netlink).unwrap().len()
    };
    assert_eq!(left(), 153);
    if !resets() {
        return;
    }
    assert_eq!(left(), 0);
    for (mut end, _) in many {
        assert_aborted(end.read(&mut [0]));
    }
}
