//! The namespaces of a test: its host and its internet.

use std::future::Future;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd as _;
use std::pin::Pin;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};
use soulbox_host::config::Network as Config;

pub type Case = fn(World) -> Pin<Box<dyn Future<Output = ()>>>;

/// Of the host, on its only way out.
pub const HOST: [&str; 2] = ["198.51.100.2", "2001:db8:1::2"];
/// On the internet, where everything is echoed on every port of [`PORTS`].
pub const INTERNET: [&str; 2] = ["203.0.113.10", "2001:db8:2::10"];
pub const OTHER: [&str; 2] = ["203.0.113.20", "2001:db8:2::20"];
/// Reached by the same way, but not the internet.
pub const PRIVATE: [&str; 4] = ["10.99.0.1", "169.254.169.254", "192.168.7.7", "fd99::1"];
pub const PORTS: [u16; 2] = [80, 443];
/// For an answer that should come.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// For one that should not.
pub const SILENCE: Duration = Duration::from_millis(300);

pub struct World {
    pub internet: Arc<Servers>,
}

/// TCP and UDP servers that send back what they get.
pub struct Servers {
    /// Datagrams and connections that have come.
    pub heard: AtomicUsize,
}

/// Runs `case` on a thread in new namespaces, which go with it.
pub fn run(case: Case) {
    let thread = std::thread::spawn(move || {
        enter();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let internet = internet();
        runtime.block_on(case(World { internet }));
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// A host with nothing on it but loopback and a link to the internet.
fn enter() {
    // SAFETY: no descriptor table is unshared, which is what the call is unsafe for.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET | UnshareFlags::NEWNS).unwrap() };
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).unwrap();
    rustix::mount::mount("tmpfs", "/run", "tmpfs", MountFlags::empty(), None).unwrap();
    let mut setup = "ip link set lo up
        ip netns add internet
        ip link add wan type veth peer name lan netns internet
        ip addr add 198.51.100.2/24 dev wan
        ip addr add 2001:db8:1::2/64 dev wan nodad
        ip link set wan up
        ip -n internet link set lo up
        ip -n internet addr add 198.51.100.1/24 dev lan
        ip -n internet addr add 2001:db8:1::1/64 dev lan nodad
        ip -n internet link set lan up
        ip route add default via 198.51.100.1
        ip route add default via 2001:db8:1::1
        ip -n internet route add 10.213.0.0/16 via 198.51.100.2
        ip -n internet route add fd73:6f75:6c62:6f78::/64 via 2001:db8:1::2
        "
    .to_owned();
    for address in INTERNET.iter().chain(&OTHER).chain(&PRIVATE) {
        let flag = if address.contains(':') { "nodad" } else { "" };
        setup += &format!("ip -n internet addr add {address} dev lo {flag}\n");
    }
    sh(&setup);
}

fn internet() -> Arc<Servers> {
    let addresses = [&INTERNET[..], &OTHER, &PRIVATE].concat();
    inside("internet", move || Servers::start(&addresses, &PORTS))
}

/// What the commands print; all must succeed.
#[track_caller]
pub fn sh(commands: &str) -> String {
    let output = Command::new("sh")
        .args(["-ec", commands])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{commands}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// Runs `work` on a thread in the namespace `name`.
pub fn inside<T: Send + 'static>(name: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let file = std::fs::File::open(format!("/run/netns/{name}")).unwrap();
    std::thread::spawn(move || {
        let kind = Some(LinkNameSpaceType::Network);
        rustix::thread::move_into_link_name_space(file.as_fd(), kind).unwrap();
        work()
    })
    .join()
    .unwrap()
}

pub fn config() -> Config {
    Config {
        slots_ready: 1,
        slots_max: 8,
        ..Config::default()
    }
}

pub async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !is_so().await {
        assert!(began.elapsed() < PATIENCE, "{what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse::<IpAddr>().unwrap(), port)
}

/// All that the host has of slots, each thing a line.
pub fn state() -> String {
    sh("ls /run/netns
        ip -o link | cut -d: -f2
        ip route show table all | sed '/ wan/d; / lo/d'
        ip -6 route show table all | sed '/ wan/d; / lo/d'
        ip neigh | sed '/ wan/d'
        nft list ruleset")
}

// === impl Servers ===

impl Servers {
    /// In the calling thread's namespace.
    pub fn start(addresses: &[&str], ports: &[u16]) -> Arc<Self> {
        let servers = Arc::new(Self {
            heard: AtomicUsize::new(0),
        });
        let places = addresses
            .iter()
            .flat_map(|address| ports.iter().map(|port| at(address, *port)));
        for place in places {
            let tcp = TcpListener::bind(place).unwrap();
            let udp = UdpSocket::bind(place).unwrap();
            let heard = Arc::clone(&servers);
            // They end with the process; its tests are over soon.
            std::thread::spawn(move || {
                for stream in tcp.incoming() {
                    heard.heard.fetch_add(1, Ordering::Relaxed);
                    std::thread::spawn(move || echo(stream.unwrap()));
                }
            });
            let heard = Arc::clone(&servers);
            std::thread::spawn(move || {
                let mut buffer = [0; 2048];
                while let Ok((length, from)) = udp.recv_from(&mut buffer) {
                    heard.heard.fetch_add(1, Ordering::Relaxed);
                    // Refused when the guest is gone.
                    let _ = udp.send_to(&buffer[..length], from);
                }
            });
        }
        servers
    }

    pub fn heard(&self) -> usize {
        self.heard.load(Ordering::Relaxed)
    }
}

/// First says whom it talks to, then repeats what it hears.
fn echo(mut stream: TcpStream) {
    let mut hello = stream
        .peer_addr()
        .unwrap()
        .ip()
        .to_canonical()
        .to_string()
        .into_bytes();
    hello.resize(64, b' ');
    if stream.write_all(&hello).is_err() {
        return;
    }
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}
