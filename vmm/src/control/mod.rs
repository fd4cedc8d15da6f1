//! The control socket: one datagram is one message (proto/soulbox/vmm/v1).

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use prost::Message as _;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use soulbox_proto::vmm::v1::{self, from_monitor::Message, reply::Result as ReplyResult};
use soulbox_proto::vmm::{MAX_MESSAGE_BYTES, MAX_MESSAGE_FDS};

/// How long a client may leave its socket full before it counts as gone.
const SEND_PATIENCE: Duration = Duration::from_secs(1);

/// A connection to a client.
#[derive(Debug)]
pub struct ControlSocket {
    socket: OwnedFd,
}

/// What a client's socket held.
#[derive(Debug)]
pub enum Received {
    Request(Box<Incoming>),
    /// Nothing, for now.
    Nothing,
    /// The client is gone.
    End,
}

/// Whether to wait for a request that has not come yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    Yes,
    No,
}

/// A request and the descriptors that came beside it.
#[derive(Debug)]
pub struct Incoming {
    pub request: v1::Request,
    pub fds: Vec<OwnedFd>,
}

#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    #[error("the control socket could not be read")]
    Io(#[source] Errno),
    #[error("the message is larger than 64 KiB or carries more than 64 descriptors; split it")]
    TooLarge,
    #[error("the message is not a soulbox.vmm.v1.Request")]
    Decode(#[source] prost::DecodeError),
}

#[derive(Debug, thiserror::Error)]
pub enum SendError {
    #[error("the client does not read its control socket")]
    Full,
    #[error("the control socket could not be written")]
    Io(#[source] Errno),
}

// === impl ControlSocket ===

impl ControlSocket {
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Takes the next request.
    pub fn receive(&self, wait: Wait) -> Result<Received, ReceiveError> {
        let flags = match wait {
            Wait::Yes => RecvFlags::CMSG_CLOEXEC,
            Wait::No => RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
        };
        let mut bytes = vec![0u8; MAX_MESSAGE_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_MESSAGE_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            let mut buffers = [IoSliceMut::new(&mut bytes)];
            match recvmsg(&self.socket, &mut buffers, &mut ancillary, flags) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Received::Nothing),
                Err(Errno::CONNRESET) => return Ok(Received::End),
                other => break other.map_err(ReceiveError::Io)?,
            }
        };
        // Owned from here on, so that whatever is refused is closed.
        let fds: Vec<OwnedFd> = ancillary
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                _ => None,
            })
            .flatten()
            .collect();
        // An empty Request has no operation and is never sent: this is the end.
        if received.bytes == 0 {
            return Ok(Received::End);
        }
        if received
            .flags
            .intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
        {
            return Err(ReceiveError::TooLarge);
        }
        let request =
            v1::Request::decode(&bytes[..received.bytes]).map_err(ReceiveError::Decode)?;
        Ok(Received::Request(Box::new(Incoming { request, fds })))
    }

    pub fn reply(&self, id: u64, result: ReplyResult) -> Result<(), SendError> {
        let reply = v1::Reply {
            id,
            result: Some(result),
        };
        self.send_patiently(Message::Reply(reply), SEND_PATIENCE)
    }

    /// Replies with descriptors.
    pub fn reply_with_fds(
        &self,
        id: u64,
        result: ReplyResult,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), SendError> {
        let reply = v1::Reply {
            id,
            result: Some(result),
        };
        self.send(&encode(Message::Reply(reply)), fds)
    }

    /// Refuses a request.
    pub fn refuse(
        &self,
        id: u64,
        code: v1::error::Code,
        message: impl Into<String>,
    ) -> Result<(), SendError> {
        let error = v1::Error {
            code: code.into(),
            message: message.into(),
        };
        self.reply(id, ReplyResult::Error(error))
    }

    /// Sends an event that the client must have.
    pub fn event(&self, event: v1::event::Event) -> Result<(), SendError> {
        let event = v1::Event { event: Some(event) };
        self.send_patiently(Message::Event(event), SEND_PATIENCE)
    }

    /// Sends an event with a descriptor, if it can be sent at once: a guest may
    /// cause as many of these as it likes, and must not stop the event loop.
    pub fn event_with_fd(
        &self,
        event: v1::event::Event,
        fd: BorrowedFd<'_>,
    ) -> Result<(), SendError> {
        let message = Message::Event(v1::Event { event: Some(event) });
        self.send(&encode(message), &[fd])
    }

    fn send_patiently(&self, message: Message, patience: Duration) -> Result<(), SendError> {
        let bytes = encode(message);
        match self.send(&bytes, &[]) {
            Err(SendError::Full) => {
                let mut socket = [PollFd::new(&self.socket, PollFlags::OUT)];
                let timeout = Timespec {
                    tv_sec: patience.as_secs() as i64,
                    tv_nsec: i64::from(patience.subsec_nanos()),
                };
                // Whatever poll says, the second try has the last word.
                let _ = poll(&mut socket, Some(&timeout));
                self.send(&bytes, &[])
            }
            sent => sent,
        }
    }

    fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), SendError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_MESSAGE_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(fds));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        loop {
            match sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut ancillary, flags) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Err(SendError::Full),
                Err(errno) => return Err(SendError::Io(errno)),
            }
        }
    }
}

impl AsFd for ControlSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn encode(message: Message) -> Vec<u8> {
    v1::FromMonitor {
        message: Some(message),
    }
    .encode_to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, send, socketpair};

    fn pair() -> (OwnedFd, ControlSocket) {
        let flags = SocketFlags::CLOEXEC;
        let (client, monitor) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        (client, ControlSocket::new(monitor))
    }

    #[test]
    fn a_request_comes_with_its_descriptors() {
        let (client, control) = pair();
        let request = v1::Request {
            id: 7,
            op: Some(v1::request::Op::GetMetrics(v1::GetMetrics {})),
        };
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = [client.as_fd(), client.as_fd()];
        ancillary.push(SendAncillaryMessage::ScmRights(&fds));
        let bytes = request.encode_to_vec();
        sendmsg(
            &client,
            &[IoSlice::new(&bytes)],
            &mut ancillary,
            SendFlags::empty(),
        )
        .unwrap();
        let Received::Request(incoming) = control.receive(Wait::No).unwrap() else {
            panic!("no request");
        };
        assert_eq!((incoming.request.id, incoming.fds.len()), (7, 2));
        assert!(matches!(control.receive(Wait::No), Ok(Received::Nothing)));
    }

    #[test]
    fn hostile_datagrams_are_refused() {
        let (client, control) = pair();
        send(&client, &[0xff; 16], SendFlags::empty()).unwrap();
        assert!(matches!(
            control.receive(Wait::No),
            Err(ReceiveError::Decode(_))
        ));
        send(
            &client,
            &vec![8u8; MAX_MESSAGE_BYTES + 1],
            SendFlags::empty(),
        )
        .unwrap();
        assert!(matches!(
            control.receive(Wait::No),
            Err(ReceiveError::TooLarge)
        ));
        drop(client);
        assert!(matches!(control.receive(Wait::Yes), Ok(Received::End)));
    }

    #[test]
    fn a_client_that_does_not_read_is_given_up() {
        let (_client, control) = pair();
        let event = || {
            v1::event::Event::GuestPanic(v1::GuestPanic {
                console_tail: vec![0; 4096],
            })
        };
        let result = (0..10_000).try_for_each(|_| control.event_with_fd(event(), control.as_fd()));
        assert!(matches!(result, Err(SendError::Full)));
    }
}
