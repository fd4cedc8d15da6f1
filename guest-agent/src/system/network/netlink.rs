//! Requests to the kernel over netlink(7), without a runtime: the kernel has done
//! what a datagram asks for when it is sent, and only the answers are to be fetched.

use std::io;
use std::ops::Range;

use netlink_packet_core::{
    Emitable, NLM_F_ACK, NLM_F_REQUEST, NetlinkBuffer, NetlinkHeader, Parseable,
};
use netlink_sys::Socket;
use rustix::io::Errno;

/// The kernel makes no larger datagram of a dump (`netlink_recvmsg`), and an answer
/// to anything else that is asked here is far smaller.
const ANSWERS_BYTES: usize = 32 * 1024;

/// Changes that are sent at once. Their answers have to fit into the receive
/// buffer of the socket, where the least datagram counts as some 800 bytes.
const CHANGES_AT_ONCE: usize = 64;

/// The port that the kernel sends from.
const KERNEL: u32 = 0;

/// One socket, with the answers that were read from it last.
pub(super) struct Netlink {
    socket: Socket,
    answers: Vec<u8>,
    /// Of the last request.
    sequence: u32,
}

/// Something that the kernel is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Change {
    /// What of the guest it changes, for messages.
    pub(super) what: &'static str,
    kind: u16,
    flags: u16,
    body: Vec<u8>,
    /// The refusal that says that it is so already.
    forgiven: Option<Errno>,
}

/// A change that the kernel did not make.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) what: &'static str,
    pub(super) source: io::Error,
}

/// What a message from the kernel says of a request.
enum Answer<'a> {
    Item(&'a [u8]),
    Over(io::Result<()>),
}

// === impl Netlink ===

impl Netlink {
    pub(super) fn open(protocol: isize) -> io::Result<Self> {
        let socket = Socket::new(protocol)?;
        // A refusal need not bring the request back.
        socket.set_cap_ack(true)?;
        Ok(Self {
            socket,
            answers: Vec::with_capacity(ANSWERS_BYTES),
            sequence: 0,
        })
    }

    /// Makes the kernel refuse a filter that it does not know, where it would else
    /// dump everything.
    pub(super) fn be_strict(&self) -> io::Result<()> {
        self.socket.set_netlink_get_strict_chk(true)
    }

    /// What the kernel answers to one request: with NLM_F_DUMP among the flags all
    /// that there is. What cannot be read is left out: programs have made it, of a
    /// kind that the library does not know, and it is none that we made.
    pub(super) fn ask<T: Parseable<[u8]>>(
        &mut self,
        kind: u16,
        flags: u16,
        request: &impl Emitable,
    ) -> io::Result<Vec<T>> {
        let question = Change::new("", kind, flags, request);
        let numbers = self.send(&[question])?;
        let mut items = Vec::new();
        let mut result = Ok(());
        self.receive(numbers, |_, answer| match answer {
            Answer::Item(bytes) => items.extend(T::parse(bytes).ok()),
            Answer::Over(status) => result = status,
        })?;
        result.map(|()| items)
    }

    /// Makes all changes in their order. None is left out because another was
    /// refused; the first refusal is the result.
    pub(super) fn carry_out(&mut self, changes: &[Change]) -> Result<(), Refused> {
        let mut refused = None;
        for changes in changes.chunks(CHANGES_AT_ONCE) {
            let lost = |source| Refused {
                what: changes[0].what,
                source,
            };
            let numbers = self.send(changes).map_err(lost)?;
            let received = self.receive(numbers, |index, answer| {
                let change = &changes[index];
                if let Answer::Over(Err(source)) = answer
                    && Errno::from_io_error(&source) != change.forgiven
                {
                    let what = change.what;
                    refused.get_or_insert(Refused { what, source });
                }
            });
            received.map_err(lost)?;
        }
        refused.map_or(Ok(()), Err)
    }

    /// Sends requests in one datagram, and returns their numbers.
    fn send(&mut self, requests: &[Change]) -> io::Result<Range<u32>> {
        let first = self.sequence.wrapping_add(1);
        let mut datagram = Vec::new();
        for request in requests {
            self.sequence = self.sequence.wrapping_add(1);
            request.put(self.sequence, &mut datagram);
        }
        self.socket.send(&datagram, 0)?;
        Ok(first..self.sequence.wrapping_add(1))
    }

    /// Reads until the requests with these numbers are over, and tells what is said
    /// of each, by its place among them.
    fn receive(
        &mut self,
        numbers: Range<u32>,
        mut told: impl FnMut(usize, Answer<'_>),
    ) -> io::Result<()> {
        let mut left = numbers.len();
        while left > 0 {
            self.answers.clear();
            let (length, sender) = self.socket.recv_from(&mut self.answers, libc::MSG_TRUNC)?;
            if sender.port_number() != KERNEL {
                continue;
            }
            if length > self.answers.len() {
                return Err(io::Error::from(Errno::MSGSIZE));
            }
            for message in messages(&self.answers) {
                let (number, answer) = message?;
                if !numbers.contains(&number) {
                    continue;
                }
                left -= usize::from(matches!(answer, Answer::Over(_)));
                told((number - numbers.start) as usize, answer);
            }
        }
        Ok(())
    }
}

// === impl Change ===

impl Change {
    pub(super) fn new(what: &'static str, kind: u16, flags: u16, body: &impl Emitable) -> Self {
        let mut bytes = vec![0; body.buffer_len()];
        body.emit(&mut bytes);
        Self {
            what,
            kind,
            flags: flags | NLM_F_REQUEST | NLM_F_ACK,
            body: bytes,
            forgiven: None,
        }
    }

    /// Takes this refusal for success.
    pub(super) fn forgiving(self, refusal: Errno) -> Self {
        let forgiven = Some(refusal);
        Self { forgiven, ..self }
    }

    fn put(&self, number: u32, datagram: &mut Vec<u8>) {
        let mut header = NetlinkHeader::default();
        let start = datagram.len();
        let body = start + header.buffer_len();
        header.length = u32::try_from(header.buffer_len() + self.body.len()).unwrap_or(u32::MAX);
        header.message_type = self.kind;
        header.flags = self.flags;
        header.sequence_number = number;
        datagram.resize(body, 0);
        header.emit(&mut datagram[start..]);
        datagram.extend_from_slice(&self.body);
        datagram.resize(aligned(datagram.len()), 0);
    }
}

/// The messages of a datagram from the kernel, with the numbers of their requests.
fn messages(mut datagram: &[u8]) -> impl Iterator<Item = io::Result<(u32, Answer<'_>)>> {
    std::iter::from_fn(move || {
        if datagram.is_empty() {
            return None;
        }
        let message = match NetlinkBuffer::new_checked(datagram) {
            Ok(message) => message,
            Err(error) => {
                datagram = &[];
                return Some(Err(io::Error::new(io::ErrorKind::InvalidData, error)));
            }
        };
        let (length, number) = (message.length() as usize, message.sequence_number());
        let payload = &datagram[NetlinkHeader::default().buffer_len()..length];
        let answer = match i32::from(message.message_type()) {
            libc::NLMSG_ERROR | libc::NLMSG_DONE => Answer::Over(status(payload)),
            _ => Answer::Item(payload),
        };
        datagram = datagram.get(aligned(length)..).unwrap_or_default();
        Some(Ok((number, answer)))
    })
}

/// Both the end of a dump and an acknowledgement begin with a negative errno, or 0.
fn status(payload: &[u8]) -> io::Result<()> {
    let code = payload.first_chunk().copied().map_or(0, i32::from_ne_bytes);
    match code {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code.saturating_neg())),
    }
}

/// NLMSG_ALIGN.
fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}
