//! A TAP in a network namespace of its own, with the host's side of it. Needs
//! root, as making either does.
#![allow(unsafe_code)]

use std::ffi::{c_char, c_int, c_ulong, c_void};
use std::fs::File;
use std::io;
use std::mem::size_of;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::thread;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// The host's address on the TAP, in a network of 24 bits.
pub const HOST_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);

/// `struct virtio_net_hdr`, without the field that follows in `_v1`.
pub const VNET_HEADER_BYTES: usize = 10;

const INTERFACE: &[u8] = b"tap0";

/// From linux/if_packet.h; not in libc.
const PACKET_IGNORE_OUTGOING: c_int = 23;

/// Longer than any packet with its header.
const PACKET_ROOM_BYTES: usize = 1 << 17;

/// The host's side: everything that comes out of the TAP, and a way in.
#[derive(Debug)]
pub struct TapPeer {
    namespace: OwnedFd,
    /// A packet socket on the interface, with a header of its own before each
    /// packet (PACKET_VNET_HDR).
    wire: OwnedFd,
    /// The guest's side: keeps the interface, whatever becomes of that.
    tap: OwnedFd,
}

// === impl TapPeer ===

impl TapPeer {
    /// Makes a namespace, and in it an interface that is up. The descriptor is
    /// the guest's side.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        Self::with_flags(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR)
    }

    /// The same, opened with other flags of TUNSETIFF.
    pub fn with_flags(flags: c_int) -> io::Result<(Self, OwnedFd)> {
        // A thread, so that nobody else comes into the namespace by mistake.
        let made = thread::scope(|scope| scope.spawn(|| make(flags)).join());
        made.unwrap_or_else(|_| Err(io::Error::other("the thread has panicked")))
    }

    /// Runs `f` in the namespace: sockets that it makes are there, and stay.
    pub fn within<T: Send>(&self, f: impl FnOnce() -> T + Send) -> io::Result<T> {
        let run = || {
            let kind = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(self.namespace.as_fd(), kind)?;
            Ok(f())
        };
        let ran = thread::scope(|scope| scope.spawn(run).join());
        ran.unwrap_or_else(|_| Err(io::Error::other("the thread has panicked")))
    }

    /// Limits what the guest may have on its way through the host, in bytes.
    pub fn set_send_buffer(&self, bytes: c_int) -> io::Result<()> {
        // SAFETY: TUNSETSNDBUF reads an int.
        check(unsafe { libc::ioctl(self.tap.as_raw_fd(), libc::TUNSETSNDBUF, &raw const bytes) })
    }

    /// Sends an Ethernet frame to the guest.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.send_with_header(&[0; VNET_HEADER_BYTES], frame)
    }

    /// Sends a frame as a host that leaves a checksum or segments to others.
    pub fn send_with_header(
        &self,
        header: &[u8; VNET_HEADER_BYTES],
        frame: &[u8],
    ) -> io::Result<()> {
        let packet = [header, frame].concat();
        let sent = rustix::io::write(&self.wire, &packet)?;
        if sent == packet.len() {
            Ok(())
        } else {
            Err(io::ErrorKind::WriteZero.into())
        }
    }

    /// The next frame from the guest with its header; none if none is there.
    pub fn try_receive(&self) -> io::Result<Option<(Vec<u8>, Vec<u8>)>> {
        let mut packet = vec![0; PACKET_ROOM_BYTES];
        let len = match rustix::io::read(&self.wire, &mut packet) {
            Ok(len) => len,
            Err(rustix::io::Errno::AGAIN) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        packet.truncate(len);
        let frame = packet.split_off(VNET_HEADER_BYTES.min(len));
        Ok(Some((packet, frame)))
    }

    /// Waits for the next frame from the guest.
    pub fn receive(&self) -> io::Result<Vec<u8>> {
        super::wait_readable(&self.wire)?;
        self.try_receive()?
            .map(|(_, frame)| frame)
            .ok_or(io::ErrorKind::WouldBlock.into())
    }
}

fn make(flags: c_int) -> io::Result<(TapPeer, OwnedFd)> {
    // SAFETY: only this thread changes its namespace, and it ends soon.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
    let namespace = File::open("/proc/thread-self/ns/net")?;
    // Where there is no IPv6 there is nothing to keep quiet.
    for conf in ["all", "default"] {
        let path = format!("/proc/sys/net/ipv6/conf/{conf}/disable_ipv6");
        let _ = std::fs::write(path, "1");
    }
    let tap: OwnedFd = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?
        .into();
    let mut request = request();
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    ioctl(&tap, libc::TUNSETIFF, &mut request)?;

    let control = socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    request.ifr_ifru.ifru_addr = address(HOST_ADDRESS);
    ioctl(&control, libc::SIOCSIFADDR, &mut request)?;
    request.ifr_ifru.ifru_addr = address(Ipv4Addr::new(255, 255, 255, 0));
    ioctl(&control, libc::SIOCSIFNETMASK, &mut request)?;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    ioctl(&control, libc::SIOCSIFFLAGS, &mut request)?;
    ioctl(&control, libc::SIOCGIFINDEX, &mut request)?;
    // SAFETY: SIOCGIFINDEX has set it.
    let index = unsafe { request.ifr_ifru.ifru_ifindex };

    let everything = c_int::from((libc::ETH_P_ALL as u16).to_be());
    let wire = socket(
        libc::AF_PACKET,
        libc::SOCK_RAW | libc::SOCK_NONBLOCK,
        everything,
    )?;
    set_option(&wire, libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1)?;
    set_option(&wire, libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)?;
    set_option(&wire, libc::SOL_SOCKET, libc::SO_SNDBUF, 4 << 20)?;
    // SAFETY: all-zero bytes are a valid `sockaddr_ll`.
    let mut place: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    place.sll_family = libc::AF_PACKET as u16;
    place.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    place.sll_ifindex = index;
    // SAFETY: the address is of the type and length that are said.
    check(unsafe {
        libc::bind(
            wire.as_raw_fd(),
            (&raw const place).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        )
    })?;
    let namespace = namespace.into();
    let peer = TapPeer {
        namespace,
        wire,
        tap: tap.try_clone()?,
    };
    Ok((peer, tap))
}

fn request() -> libc::ifreq {
    // SAFETY: all-zero bytes are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(INTERFACE) {
        *to = *from as c_char;
    }
    request
}

fn address(address: Ipv4Addr) -> libc::sockaddr {
    let mut socket_address = libc::sockaddr {
        sa_family: libc::AF_INET as u16,
        sa_data: [0; 14],
    };
    // After the port.
    for (to, from) in socket_address.sa_data[2..].iter_mut().zip(address.octets()) {
        *to = from as c_char;
    }
    socket_address
}

fn ioctl(fd: &OwnedFd, number: c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: every number that is passed here takes an `ifreq`.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), number, &raw mut *request) })
}

fn socket(family: c_int, kind: c_int, protocol: c_int) -> io::Result<OwnedFd> {
    // SAFETY: it takes no pointers.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    check(fd)?;
    // SAFETY: the descriptor is new, and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn set_option(fd: &OwnedFd, level: c_int, option: c_int, value: c_int) -> io::Result<()> {
    let pointer: *const c_void = (&raw const value).cast();
    // SAFETY: the value is an int, as is said.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            level,
            option,
            pointer,
            size_of::<c_int>() as u32,
        )
    })
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
