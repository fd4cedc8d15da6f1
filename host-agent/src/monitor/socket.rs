//! `SOCK_SEQPACKET` sockets whose datagrams carry descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use soulbox_proto::vmm::{MAX_MESSAGE_BYTES, MAX_MESSAGE_FDS};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// One message and what travelled beside it.
#[derive(Debug)]
pub struct Datagram {
    pub bytes: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    #[error("the monitor sent a message of more than {MAX_MESSAGE_BYTES} bytes; stop the sandbox")]
    TooLong,
    #[error("the monitor sent more than {MAX_MESSAGE_FDS} descriptors at once; stop the sandbox")]
    TooManyDescriptors,
    #[error("the monitor's control socket cannot be read; stop the sandbox")]
    Socket(#[source] io::Error),
}

/// A connected control socket.
#[derive(Debug)]
pub struct ControlSocket {
    fd: AsyncFd<OwnedFd>,
}

// === impl ControlSocket ===

impl ControlSocket {
    /// A connected pair: our end, and the one that a monitor inherits.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        Ok((Self::new(ours)?, theirs))
    }

    /// Connects to the listener of a monitor that is running.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = seqpacket()?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        Self::new(socket)
    }

    /// A listener at `path`, to be handed to a monitor.
    pub fn listener(path: &Path) -> io::Result<OwnedFd> {
        let socket = seqpacket()?;
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        rustix::net::listen(&socket, 4)?;
        Ok(socket)
    }

    /// Takes over a connected socket.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self {
            fd: crate::descriptors::register(socket, Interest::READABLE | Interest::WRITABLE)?,
        })
    }

    /// Sends one datagram. A monitor that does not read makes this wait.
    pub async fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        if bytes.len() > MAX_MESSAGE_BYTES || fds.len() > MAX_MESSAGE_FDS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        loop {
            let mut ready = self.fd.writable().await?;
            match ready.try_io(|fd| send_now(fd.get_ref(), bytes, fds)) {
                Ok(sent) => return sent,
                Err(_would_block) => {}
            }
        }
    }

    /// The next datagram; none when the monitor has closed its end.
    pub async fn receive(&self) -> Result<Option<Datagram>, ReceiveError> {
        loop {
            let mut ready = self.fd.readable().await.map_err(ReceiveError::Socket)?;
            match ready.try_io(|fd| receive_now(fd.get_ref())) {
                Ok(received) => return received.map_err(ReceiveError::Socket)?.check(),
                Err(_would_block) => {}
            }
        }
    }
}

fn seqpacket() -> io::Result<OwnedFd> {
    Ok(rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

fn send_now(socket: &OwnedFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_MESSAGE_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // A monitor that has died is an error here, and no SIGPIPE.
    rustix::net::sendmsg(
        socket.as_fd(),
        &[IoSlice::new(bytes)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

struct Raw {
    datagram: Datagram,
    flags: ReturnFlags,
}

fn receive_now(socket: &OwnedFd) -> io::Result<Raw> {
    let mut bytes = vec![0; MAX_MESSAGE_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_MESSAGE_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = match rustix::net::recvmsg(
        socket.as_fd(),
        &mut [IoSliceMut::new(&mut bytes)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    ) {
        // A monitor killed with messages unread.
        Err(rustix::io::Errno::CONNRESET) => return Ok(Raw::closed()),
        received => received?,
    };
    bytes.truncate(received.bytes);
    let fds = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    Ok(Raw {
        datagram: Datagram { bytes, fds },
        flags: received.flags,
    })
}

// === impl Raw ===

impl Raw {
    fn closed() -> Self {
        Self {
            datagram: Datagram {
                bytes: Vec::new(),
                fds: Vec::new(),
            },
            flags: ReturnFlags::empty(),
        }
    }

    /// An empty datagram is the end: no message encodes to nothing, and on this
    /// kind of socket the two look the same.
    fn check(self) -> Result<Option<Datagram>, ReceiveError> {
        if self.flags.contains(ReturnFlags::TRUNC) {
            return Err(ReceiveError::TooLong);
        }
        // Alignment may leave room for one or two more than asked for.
        let too_many = self.datagram.fds.len() > MAX_MESSAGE_FDS;
        if too_many || self.flags.contains(ReturnFlags::CTRUNC) {
            return Err(ReceiveError::TooManyDescriptors);
        }
        Ok((!self.datagram.bytes.is_empty()).then_some(self.datagram))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(fd: OwnedFd) -> ControlSocket {
        ControlSocket::new(fd).unwrap()
    }

    #[tokio::test]
    async fn descriptors_travel_and_are_closed_on_exec() {
        let (ours, theirs) = ControlSocket::pair().unwrap();
        let theirs = peer(theirs);
        let file = std::fs::File::open("/proc/self/cmdline").unwrap();
        ours.send(b"hello", &[file.as_fd(), file.as_fd()])
            .await
            .unwrap();
        let datagram = theirs.receive().await.unwrap().unwrap();
        assert_eq!(datagram.bytes, b"hello");
        assert_eq!(datagram.fds.len(), 2);
        let flags = rustix::io::fcntl_getfd(&datagram.fds[0]).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }

    #[tokio::test]
    async fn a_closed_peer_is_the_end() {
        let (ours, theirs) = ControlSocket::pair().unwrap();
        drop(theirs);
        assert!(ours.receive().await.unwrap().is_none());
        assert!(ours.send(b"x", &[]).await.is_err());
    }

    #[tokio::test]
    async fn a_message_over_the_limit_is_an_error() {
        let (ours, theirs) = ControlSocket::pair().unwrap();
        rustix::net::send(&theirs, &vec![1; MAX_MESSAGE_BYTES + 1], SendFlags::empty()).unwrap();
        assert!(matches!(ours.receive().await, Err(ReceiveError::TooLong)));
        assert!(
            ours.send(&vec![1; MAX_MESSAGE_BYTES + 1], &[])
                .await
                .is_err()
        );
    }

    #[tokio::test]
    async fn too_many_descriptors_are_an_error() {
        let (ours, theirs) = ControlSocket::pair().unwrap();
        let fds = vec![theirs.as_fd(); MAX_MESSAGE_FDS + 1];
        let mut space =
            [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_MESSAGE_FDS + 1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        rustix::net::sendmsg(
            &theirs,
            &[IoSlice::new(b"x")],
            &mut ancillary,
            SendFlags::empty(),
        )
        .unwrap();
        assert!(matches!(
            ours.receive().await,
            Err(ReceiveError::TooManyDescriptors)
        ));
    }
}
