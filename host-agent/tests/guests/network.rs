//! Networks of real guests: what they reach, and how they are reached.
//!
//! The daemon runs in a network namespace of the test's own, behind which another
//! one plays the internet. Nothing goes further.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{CONFIG, create, eventually, real_host, sh, succeed};
use crate::support::{Daemon, Host};

/// Of the internet, of a private network behind it, and of the host's end.
const SERVER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const SERVER6: &str = "2001:db8:1::1";
const PRIVATE: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 1);
const HOST: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
const HOST6: &str = "2001:db8:1::2";
const PROXY_PORT: u16 = 18080;

/// How long the template's snapshot may take where everything is emulated.
const TEMPLATE: Duration = Duration::from_secs(300);

const HOST_SPACE: &str = "sbt-host";
const INTERNET: &str = "sbt-inet";

/// Two namespaces, a daemon in one and servers in the other.
struct World {
    host: Host,
    daemon: Option<Daemon>,
}

// === impl World ===

impl World {
    fn new() -> Result<Self> {
        let link =
            format!("link add up0 netns {HOST_SPACE} type veth peer name eth0 netns {INTERNET}");
        for line in [
            format!("netns add {HOST_SPACE}"),
            format!("netns add {INTERNET}"),
            link,
            format!("-n {HOST_SPACE} link set lo up"),
            format!("-n {HOST_SPACE} address add {HOST}/24 dev up0"),
            format!("-n {HOST_SPACE} address add {HOST6}/64 dev up0 nodad"),
            format!("-n {HOST_SPACE} link set up0 up"),
            format!("-n {HOST_SPACE} route add default via {SERVER}"),
            format!("-n {HOST_SPACE} route add default via {SERVER6}"),
            format!("-n {INTERNET} link set lo up"),
            format!("-n {INTERNET} address add {SERVER}/24 dev eth0"),
            format!("-n {INTERNET} address add {SERVER6}/64 dev eth0 nodad"),
            format!("-n {INTERNET} address add {PRIVATE}/32 dev lo"),
            format!("-n {INTERNET} link set eth0 up"),
        ] {
            let done = Command::new("ip").args(line.split(' ')).output()?;
            ensure!(done.status.success(), "ip {line}: {done:?}");
        }
        inside(INTERNET, serve_internet)??;
        let config = format!(
            "{CONFIG}[templates]\nwarm_up = []\n[network]\nslots_ready = 4\n\
             dns_upstream = [\"{SERVER}\"]\n\
             [proxy]\nlisten = \"127.0.0.1:{PROXY_PORT}\"\ndomain = \"sb.test\"\n"
        );
        let host = real_host(&config);
        let daemon = start(&host);
        let begun = std::time::Instant::now();
        while !daemon
            .log()
            .iter()
            .any(|line| line.contains("start from a snapshot"))
        {
            ensure!(
                begun.elapsed() < TEMPLATE,
                "no template snapshot: {:#?}",
                daemon.log()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(Self {
            host,
            daemon: Some(daemon),
        })
    }

    /// Kills the daemon and starts another.
    fn replace_daemon(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill();
        }
        self.daemon = Some(start(&self.host));
    }

    /// What a program in the guest gets from a web server, or the error's name.
    fn fetch(&self, id: &str, url: &str) -> Result<String> {
        let script = format!(
            "import urllib.request as u\n\
             try: print(u.urlopen('{url}', timeout=10).read().decode())\n\
             except Exception as e: print(type(getattr(e, 'reason', e)).__name__)\n"
        );
        self.python(id, &script)
    }

    fn python(&self, id: &str, script: &str) -> Result<String> {
        let output = self
            .host
            .soulbox(&["exec", id, "--", "python3", "-c", script]);
        Ok(succeed(output)?.trim().to_owned())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.terminate();
        }
        for name in [HOST_SPACE, INTERNET] {
            let _ = Command::new("ip").args(["netns", "delete", name]).output();
        }
    }
}

fn start(host: &Host) -> Daemon {
    let mut inside = Command::new("nsenter");
    inside.arg(format!("--net=/run/netns/{HOST_SPACE}"));
    host.start_through(inside)
}

/// Does it on a thread in a namespace. Sockets stay where they were made.
fn inside<T: Send>(name: &str, work: impl FnOnce() -> T + Send) -> Result<T> {
    let space = File::open(format!("/run/netns/{name}"))?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            move_into_link_name_space(
                std::os::fd::AsFd::as_fd(&space),
                Some(LinkNameSpaceType::Network),
            )?;
            Ok(work())
        });
        thread.join().expect("the thread ends")
    })
}

/// A web server and a resolver, which says of every name that it is the server,
/// but of `private.test` that it is behind.
fn serve_internet() -> Result<()> {
    // Of IPv4 too.
    let web = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 80))?;
    std::thread::spawn(move || {
        for client in web.incoming().flatten() {
            std::thread::spawn(move || answer(client));
        }
    });
    let names = UdpSocket::bind((SERVER, 53))?;
    std::thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((length, client)) = names.recv_from(&mut query) {
            let _ = names.send_to(&resolve(&query[..length]), client);
        }
    });
    Ok(())
}

/// Holds what asks for `/hold` open.
fn answer(mut client: TcpStream) {
    let mut request = [0; 1024];
    let length = client.read(&mut request).unwrap_or(0);
    if request[..length].starts_with(b"GET /hold") {
        let _ = client.write_all(b"held");
        let _ = client.read(&mut request);
        return;
    }
    let _ = client.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 8\r\n\r\ninternet");
}

fn resolve(query: &[u8]) -> Vec<u8> {
    let address = match query.windows(7).any(|part| part == b"private") {
        true => PRIVATE,
        false => SERVER,
    };
    // The question ends four bytes after its name, which ends with a zero.
    let end = query[12..].iter().position(|byte| *byte == 0).unwrap_or(0) + 12 + 5;
    let is_a = query[end - 3] == 1;
    let mut answer = query[..end].to_vec();
    answer[2..4].copy_from_slice(&[0x81, 0x80]);
    answer[6..12].copy_from_slice(&[0, u8::from(is_a), 0, 0, 0, 0]);
    if is_a {
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend(address.octets());
    }
    answer
}

/// What the proxy answers for a host name, seen from the daemon's host.
fn through_proxy(host: &str) -> Result<String> {
    inside(HOST_SPACE, || {
        let mut proxy = TcpStream::connect((Ipv4Addr::LOCALHOST, PROXY_PORT))?;
        proxy.set_read_timeout(Some(Duration::from_secs(60)))?;
        write!(
            proxy,
            "GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        )?;
        let mut answer = String::new();
        proxy.read_to_string(&mut answer)?;
        Ok(answer)
    })?
}

/// In one world, which takes long to make.
pub(crate) fn sandboxes_have_networks() -> Result<()> {
    let mut world = World::new()?;
    a_guest_reaches_what_its_policy_allows(&world).context("policy")?;
    a_guests_ports_are_reached(&world).context("ports")?;
    children_have_networks_of_their_own(&world).context("children")?;
    a_network_outlives_its_daemon(&mut world).context("another daemon")
}

fn a_guest_reaches_what_its_policy_allows(world: &World) -> Result<()> {
    let host = &world.host;
    let id = create(host, &[])?;
    assert_eq!(world.fetch(&id, &format!("http://{SERVER}/"))?, "internet");
    assert_eq!(world.fetch(&id, "http://web.test/")?, "internet");
    assert_eq!(
        world.fetch(&id, &format!("http://[{SERVER6}]/"))?,
        "internet"
    );
    // A name for a private address, that address, a cloud's metadata: refused at once.
    for url in [
        "http://private.test/".to_owned(),
        format!("http://{PRIVATE}/"),
        "http://169.254.169.254/".to_owned(),
        "http://[fd99::1]/".to_owned(),
    ] {
        let got = world.fetch(&id, &url)?;
        ensure!(got != "internet", "{url}: {got}");
        ensure!(!got.contains("imeout"), "{url}: {got}");
    }
    // The host says nothing.
    let got = world.fetch(&id, &format!("http://{HOST}:{PROXY_PORT}/"))?;
    ensure!(got.contains("Error"), "the host: {got}");
    let shown = succeed(host.soulbox(&["net", "show", &id, "--output", "json"]))?;
    ensure!(
        shown.contains("\"private\""),
        "no denied attempt in {shown}"
    );

    succeed(host.soulbox(&["net", "set", &id, "off"]))?;
    let got = world.fetch(&id, &format!("http://{SERVER}/"))?;
    ensure!(got != "internet", "with the internet off: {got}");
    succeed(host.soulbox(&["net", "set", &id, "off", "--allow-domain", "web.test"]))?;
    assert_eq!(world.fetch(&id, "http://web.test/")?, "internet");
    let got = world.fetch(&id, "http://other.test/")?;
    ensure!(got != "internet", "a name that is not allowed: {got}");
    succeed(host.soulbox(&["net", "set", &id, "internet"]))?;
    assert_eq!(world.fetch(&id, "http://other.test/")?, "internet");

    let none = create(host, &["--net", "none"])?;
    let got = world.fetch(&none, &format!("http://{SERVER}/"))?;
    ensure!(got != "internet", "without a network: {got}");
    succeed(host.soulbox(&["rm", "--force", &id, &none]))?;
    Ok(())
}

fn a_guests_ports_are_reached(world: &World) -> Result<()> {
    let host = &world.host;
    for options in [&[][..], &["--net", "none"]] {
        let id = create(host, options)?;
        let serve = "mkdir -p /tmp/w && cd /tmp/w && echo from-the-guest > index.html && \
                     (setsid python3 -m http.server 8000 >/dev/null 2>&1 &)";
        succeed(sh(host, &id, serve))?;
        let name = format!("8000-{id}.sb.test");
        eventually("the proxy reaches the guest", || {
            Ok(through_proxy(&name)?.contains("from-the-guest"))
        })?;
        let closed = through_proxy(&format!("9-{id}.sb.test"))?;
        ensure!(
            closed.starts_with("HTTP/1.1 502") && closed.contains("PORT_CLOSED"),
            "{closed}"
        );

        let forward = succeed(host.soulbox(&["port", &id, "8000"]))?;
        let address: SocketAddr = forward.trim().parse().with_context(|| forward.clone())?;
        let got = inside(HOST_SPACE, || -> Result<String> {
            let mut stream = TcpStream::connect(address)?;
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            let mut got = String::new();
            stream.read_to_string(&mut got)?;
            Ok(got)
        })??;
        ensure!(got.contains("from-the-guest"), "{got}");
        succeed(host.soulbox(&["rm", "--force", &id]))?;
        let refused = inside(HOST_SPACE, || TcpStream::connect(address))?;
        ensure!(refused.is_err(), "the forward is still there");
        let gone = through_proxy(&name)?;
        ensure!(gone.contains("SANDBOX_NOT_FOUND"), "{gone}");
    }
    Ok(())
}

fn children_have_networks_of_their_own(world: &World) -> Result<()> {
    let host = &world.host;
    let parent = create(host, &[])?;
    hold(host, &parent)?;
    let forked = succeed(host.soulbox(&["fork", "--count", "2", &parent]))?;
    let children: Vec<&str> = forked.lines().collect();
    let mac = |id: &str| succeed(sh(host, id, "cat /sys/class/net/eth0/address"));
    let macs = [mac(&parent)?, mac(children[0])?, mac(children[1])?];
    ensure!(
        macs[0] != macs[1] && macs[1] != macs[2] && macs[0] != macs[2],
        "{macs:?}"
    );
    for child in &children {
        eventually("what the parent had connected is reset", || {
            Ok(sh(host, child, "test -s /tmp/ended").status.success())
        })?;
        let ended = succeed(sh(host, child, "cat /tmp/ended"))?;
        ensure!(ended.contains("Error"), "{ended}");
        assert_eq!(world.fetch(child, "http://web.test/")?, "internet");
    }
    // The parent's goes on.
    still_held(host, &parent)?;
    // Back from a pause it has another slot, and reaches what it did.
    succeed(host.soulbox(&["pause", &parent]))?;
    succeed(host.soulbox(&["resume", &parent]))?;
    assert_eq!(world.fetch(&parent, "http://web.test/")?, "internet");
    succeed(host.soulbox(&["rm", "--force", "--all"]))?;
    Ok(())
}

/// Has a program in the guest hold a connection, and say in a file how it ends.
fn hold(host: &Host, id: &str) -> Result<()> {
    let hold = format!(
        "import socket\n\
         s = socket.create_connection(('{SERVER}', 80))\n\
         s.sendall(b'GET /hold HTTP/1.0\\r\\n\\r\\n')\n\
         s.recv(4)\n\
         open('/tmp/held', 'w').close()\n\
         try: said = s.recv(1)\n\
         except OSError as e: said = e\n\
         open('/tmp/ended', 'w').write(repr(said))\n"
    );
    let start = format!("(setsid python3 -c \"{hold}\" >/tmp/log 2>&1 &)");
    succeed(sh(host, id, &start))?;
    eventually("it is connected", || {
        Ok(sh(host, id, "test -e /tmp/held").status.success())
    })
}

fn still_held(host: &Host, id: &str) -> Result<()> {
    let ended = sh(host, id, "test -s /tmp/ended").status.success();
    ensure!(!ended, "what {id} held has ended");
    Ok(())
}

/// What the kernel has of a sandbox's network is there while no daemon is, and the
/// next one takes it up.
fn a_network_outlives_its_daemon(world: &mut World) -> Result<()> {
    let id = create(&world.host, &[])?;
    let strict = create(&world.host, &["--net", "none"])?;
    let serve = "mkdir -p /tmp/w && cd /tmp/w && echo from-the-guest > index.html && \
                 (setsid python3 -m http.server 8000 >/dev/null 2>&1 &)";
    succeed(sh(&world.host, &id, serve))?;
    hold(&world.host, &id)?;
    let set = ["net", "set", &id, "internet", "--deny", "203.0.113.0/24:81"];
    succeed(world.host.soulbox(&set))?;
    let addresses = |world: &World| -> Result<serde_json::Value> {
        let shown = succeed(world.host.soulbox(&["get", &id, "--output", "json"]))?;
        let shown: serde_json::Value = serde_json::from_str(&shown)?;
        Ok(shown["addresses"].clone())
    };
    let before = addresses(world)?;
    ensure!(before[0].is_string(), "no address in {before}");

    world.replace_daemon();
    assert_eq!(addresses(world)?, before);
    assert_eq!(world.fetch(&id, "http://web.test/")?, "internet");
    let shown = succeed(
        world
            .host
            .soulbox(&["net", "show", &id, "--output", "json"]),
    )?;
    ensure!(shown.contains("203.0.113.0/24"), "{shown}");
    let got = world.fetch(&id, "http://169.254.169.254/")?;
    ensure!(got != "internet" && !got.contains("imeout"), "{got}");
    still_held(&world.host, &id)?;
    let name = format!("8000-{id}.sb.test");
    eventually("the proxy reaches the guest", || {
        Ok(through_proxy(&name)?.contains("from-the-guest"))
    })?;
    // Its policy is changed by the new daemon.
    succeed(world.host.soulbox(&["net", "set", &id, "off"]))?;
    let got = world.fetch(&id, &format!("http://{SERVER}/"))?;
    ensure!(got != "internet", "with the internet off: {got}");
    let got = world.fetch(&strict, &format!("http://{SERVER}/"))?;
    ensure!(got != "internet", "without a network: {got}");
    succeed(world.host.soulbox(&["rm", "--force", "--all"]))?;
    Ok(())
}
