//! A guest: a network stack of its own at the other end of a TAP.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags};
use soulbox_host::net::Mac;

use crate::world::{PATIENCE, Servers, inside, sh};

/// Before each frame on a TAP with IFF_VNET_HDR: `virtio_net_hdr`, all zeros.
pub const HEADER_BYTES: usize = 10;

pub struct Guest {
    name: String,
    tap: OwnedFd,
    stop: Option<OwnedFd>,
    pump: Option<JoinHandle<()>>,
}

// === impl Guest ===

impl Guest {
    /// One that behaves, with the addresses that all have.
    pub fn start(name: &str, tap: &OwnedFd, mac: Mac) -> Self {
        sh(&format!("ip netns add {name}"));
        let inner = inside(name, || open_tap("eth0"));
        sh(&format!(
            "ip -n {name} link set lo up
            ip -n {name} link set eth0 address {mac}
            ip -n {name} addr add 172.30.0.2/30 dev eth0
            ip -n {name} addr add fd5b::2/64 dev eth0 nodad
            ip -n {name} link set eth0 up
            ip -n {name} route add default via 172.30.0.1
            ip -n {name} route add default via fd5b::1"
        ));
        let (stopped, stop) = rustix::pipe::pipe().unwrap();
        let outer = tap.try_clone().unwrap();
        let pump = std::thread::spawn(move || pump(&outer, &inner, &stopped));
        Self {
            name: name.to_owned(),
            tap: tap.try_clone().unwrap(),
            stop: Some(stop),
            pump: Some(pump),
        }
    }

    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        inside(&self.name, work)
    }

    /// A connection to an echo server, and the address that it saw.
    pub fn connect(&self, to: SocketAddr) -> io::Result<(TcpStream, String)> {
        self.run(move || connect(to))
    }

    pub fn reaches(&self, to: SocketAddr) -> bool {
        self.connect(to)
            .is_ok_and(|(mut stream, _)| echoes(&mut stream))
    }

    /// Why a connection fails.
    #[track_caller]
    pub fn refused(&self, to: SocketAddr) -> io::ErrorKind {
        match self.connect(to) {
            Ok(_) => panic!("{to} is reached"),
            Err(error) => error.kind(),
        }
    }

    /// A datagram socket that sends to `to`.
    pub fn udp(&self, to: SocketAddr) -> UdpSocket {
        self.run(move || {
            let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(any).unwrap();
            socket.connect(to).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket
        })
    }

    pub fn serve(&self, port: u16) -> std::sync::Arc<Servers> {
        self.run(move || Servers::start(&["172.30.0.2", "fd5b::2"], &[port]))
    }

    /// Sends a frame of any content past the guest's own stack.
    pub fn inject(&self, frame: &[u8]) {
        inject(&self.tap, frame);
    }
}

pub fn inject(tap: &OwnedFd, frame: &[u8]) {
    let mut bytes = vec![0; HEADER_BYTES];
    bytes.extend(frame);
    rustix::io::write(tap, &bytes).unwrap();
}

impl Drop for Guest {
    fn drop(&mut self) {
        drop(self.stop.take());
        let _ = self.pump.take().map(JoinHandle::join);
        sh(&format!("ip netns del {}", self.name));
    }
}

pub fn connect(to: SocketAddr) -> io::Result<(TcpStream, String)> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut hello = [0; 64];
    stream.read_exact(&mut hello)?;
    Ok((stream, String::from_utf8_lossy(&hello).trim().to_owned()))
}

pub fn echoes(stream: &mut TcpStream) -> bool {
    let mut back = [0; 4];
    stream.write_all(b"ping").is_ok() && stream.read_exact(&mut back).is_ok() && &back == b"ping"
}

/// Carries frames between two TAPs until `stopped` is closed, or one of them ends.
fn pump(outer: &OwnedFd, inner: &OwnedFd, stopped: &OwnedFd) {
    let mut buffer = vec![0; 70_000];
    loop {
        let mut fds = [
            PollFd::new(outer, PollFlags::IN),
            PollFd::new(inner, PollFlags::IN),
            PollFd::new(stopped, PollFlags::IN),
        ];
        rustix::event::poll(&mut fds, None).unwrap();
        let is_ready = fds.map(|fd| !fd.revents().is_empty());
        if is_ready[2] {
            return;
        }
        for (from, to, is_ready) in [(outer, inner, is_ready[0]), (inner, outer, is_ready[1])] {
            if is_ready {
                let Ok(length) = rustix::io::read(from.as_fd(), &mut buffer[..]) else {
                    return;
                };
                // Down, or its queue is full: lost, as on any wire.
                let _ = rustix::io::write(to.as_fd(), &buffer[..length]);
            }
        }
    }
}

fn open_tap(name: &str) -> OwnedFd {
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    // SAFETY: an `ifreq` is numbers and arrays of them.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = i16::try_from(flags).unwrap();
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which outlives the call.
    let made = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(made, 0, "{}", io::Error::last_os_error());
    file.into()
}
