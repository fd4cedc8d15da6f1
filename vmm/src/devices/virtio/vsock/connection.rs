//! One stream's state machine. It owns no descriptor and does no I/O: packets
//! and facts about the host's end go in, what to tell the guest comes out.

use super::HOST_CID;
use super::credit::{Credit, CreditExceeded};
use super::packet::{Header, Key, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The host asked; the guest has not answered.
    Requested,
    Open,
    /// Over. What is left is to send RST, unless the guest has sent one.
    Dead,
}

/// What a packet from the guest means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Incoming {
    /// Nothing to do but what [`Connection::next_control`] says.
    Noted,
    /// The guest accepted the host's request.
    Accepted,
    /// The payload is in order and within credit.
    Data,
    /// The guest shut down a direction.
    Shutdown,
    /// The guest sent RST.
    Reset,
}

/// Why a connection is reset.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Violation {
    #[error("the packet does not fit the state of its connection")]
    State,
    #[error(transparent)]
    Credit(#[from] CreditExceeded),
}

#[derive(Debug)]
pub(super) struct Connection {
    key: Key,
    guest_cid: u64,
    phase: Phase,
    pub(super) credit: Credit,
    /// REQUEST or RESPONSE, until it is sent.
    opening: Option<Op>,
    /// The guest asked for our credit.
    credit_asked: bool,
    starved: Starved,
    /// Directions each side has shut, as in SHUTDOWN's flags: a bit means that
    /// this side will not receive, or not send, any more.
    guest_shut: u32,
    host_shut: u32,
    /// What of `host_shut` the guest has been told.
    announced_shut: u32,
    /// The guest sent RST: nothing more can be sent to it.
    guest_gone: bool,
}

/// Whether the host has bytes for which the guest gives no credit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Starved {
    No,
    /// A CREDIT_REQUEST is to be sent.
    Ask,
    Asked,
}

// === impl Connection ===

impl Connection {
    /// A connection that a client of the host asks for.
    pub(super) fn from_host(key: Key, guest_cid: u64, buf_alloc_bytes: u32) -> Self {
        Self {
            key,
            guest_cid,
            phase: Phase::Requested,
            credit: Credit::new(buf_alloc_bytes),
            opening: Some(Op::Request),
            credit_asked: false,
            starved: Starved::No,
            guest_shut: 0,
            host_shut: 0,
            announced_shut: 0,
            guest_gone: false,
        }
    }

    /// A connection that the guest asks for and the host has accepted.
    pub(super) fn from_guest(request: &Header, guest_cid: u64, buf_alloc_bytes: u32) -> Self {
        let mut connection = Self::from_host(request.key(), guest_cid, buf_alloc_bytes);
        connection.phase = Phase::Open;
        connection.opening = Some(Op::Response);
        connection
            .credit
            .update_peer(request.buf_alloc, request.fwd_cnt);
        connection
    }

    /// A connection from a snapshot, of which [`Self::is_plainly_open`] was true.
    pub(super) fn restored(key: Key, guest_cid: u64, credit: Credit) -> Self {
        Self {
            phase: Phase::Open,
            credit,
            opening: None,
            ..Self::from_host(key, guest_cid, 0)
        }
    }

    /// Whether its credit is all there is to know of it.
    pub(super) fn is_plainly_open(&self) -> bool {
        self.phase == Phase::Open
            && self.opening.is_none()
            && !self.credit_asked
            && self.starved == Starved::No
            && self.guest_shut == 0
            && self.host_shut == 0
            && !self.guest_gone
    }

    /// Whether the guest has the connection, and would wait for ever if it were
    /// forgotten without RST.
    pub(super) fn guest_knows(&self) -> bool {
        let unsent = self.phase == Phase::Requested && self.opening.is_some();
        !self.guest_gone && !unsent
    }

    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether the guest has shut all directions of `flags`.
    pub(super) fn guest_shut(&self, flags: u32) -> bool {
        self.guest_shut & flags == flags
    }

    /// Whether the host has shut all directions of `flags`.
    pub(super) fn host_shut(&self, flags: u32) -> bool {
        self.host_shut & flags == flags
    }

    pub(super) fn guest_gone(&self) -> bool {
        self.guest_gone
    }

    /// Takes a packet from the guest whose type and addresses are right.
    pub(super) fn receive(&mut self, op: Op, header: &Header) -> Result<Incoming, Violation> {
        if self.phase == Phase::Dead || self.guest_gone {
            // A guest that sent RST has only this left to say.
            return match op {
                Op::Reset => Ok(Incoming::Reset),
                _ => Ok(Incoming::Noted),
            };
        }
        if op == Op::Reset {
            return Ok(Incoming::Reset);
        }

        self.credit.update_peer(header.buf_alloc, header.fwd_cnt);
        if self.credit.sendable_bytes() > 0 {
            self.starved = Starved::No;
        }
        match (self.phase, op) {
            (Phase::Requested, Op::Response) => {
                // The REQUEST has not been sent: the guest guesses.
                if self.opening.is_some() {
                    return Err(Violation::State);
                }
                self.phase = Phase::Open;
                Ok(Incoming::Accepted)
            }
            (Phase::Open, Op::Data) if !self.guest_shut(SHUTDOWN_SEND) => {
                self.credit.note_received(header.len)?;
                Ok(Incoming::Data)
            }
            (Phase::Open, Op::Shutdown) => {
                // "The flags are hints … permanent once sent" (section 5.10.6.5).
                self.guest_shut |= header.flags & SHUTDOWN_BOTH;
                Ok(Incoming::Shutdown)
            }
            (Phase::Open, Op::CreditUpdate) => Ok(Incoming::Noted),
            (Phase::Open, Op::CreditRequest) => {
                self.credit_asked = true;
                Ok(Incoming::Noted)
            }
            _ => Err(Violation::State),
        }
    }

    /// The host will not receive, or not send, any more.
    pub(super) fn shut_host(&mut self, flags: u32) {
        self.host_shut |= flags;
    }

    /// The guest sent RST.
    pub(super) fn lose_guest(&mut self) {
        self.guest_gone = true;
    }

    /// Ends the connection, with an RST unless the guest knows.
    pub(super) fn kill(&mut self) {
        if !self.guest_knows() {
            self.guest_gone = true;
        }
        self.phase = Phase::Dead;
    }

    /// Nothing is left to do, not even to send RST.
    pub(super) fn is_finished(&self) -> bool {
        self.phase == Phase::Dead && self.guest_gone
    }

    /// Bytes of the host's stream that may go to the guest now.
    pub(super) fn sendable_bytes(&self) -> u32 {
        let open = self.phase == Phase::Open
            && self.opening.is_none()
            && !self.guest_gone
            && !self.guest_shut(SHUTDOWN_RECEIVE)
            && !self.host_shut(SHUTDOWN_SEND);
        if open {
            self.credit.sendable_bytes()
        } else {
            0
        }
    }

    /// The host has bytes. Asks for credit, once, if the guest gives none.
    pub(super) fn want_credit(&mut self) {
        if self.phase == Phase::Open
            && self.starved == Starved::No
            && self.credit.sendable_bytes() == 0
            && !self.guest_shut(SHUTDOWN_RECEIVE)
        {
            self.starved = Starved::Ask;
        }
    }

    /// Whether [`Self::next_control`] has a packet.
    pub(super) fn has_control(&self) -> bool {
        if self.guest_gone {
            return false;
        }
        match self.phase {
            Phase::Dead => true,
            Phase::Requested => self.opening.is_some(),
            Phase::Open => {
                self.opening.is_some()
                    || self.host_shut != self.announced_shut
                    || self.starved == Starved::Ask
                    || self.credit_update_due()
            }
        }
    }

    fn credit_update_due(&self) -> bool {
        self.credit_asked || (self.credit.update_due() && !self.guest_shut(SHUTDOWN_SEND))
    }

    /// The next packet without payload that the guest must get, as sent.
    /// SHUTDOWN comes after all data: the host's end of stream is only known
    /// when all before it was read into the guest's buffers.
    pub(super) fn next_control(&mut self) -> Option<Header> {
        if !self.has_control() {
            return None;
        }
        if self.phase == Phase::Dead {
            self.guest_gone = true;
            return Some(self.header(Op::Reset, 0));
        }
        if let Some(op) = self.opening.take() {
            return Some(self.header(op, 0));
        }
        if self.host_shut != self.announced_shut {
            self.announced_shut = self.host_shut;
            let mut header = self.header(Op::Shutdown, 0);
            header.flags = self.host_shut;
            return Some(header);
        }
        if self.starved == Starved::Ask {
            self.starved = Starved::Asked;
            return Some(self.header(Op::CreditRequest, 0));
        }
        Some(self.header(Op::CreditUpdate, 0))
    }

    /// The header of a packet with `len` bytes of payload, as sent.
    pub(super) fn data_header(&mut self, len: u32) -> Header {
        self.credit.note_sent(len);
        self.header(Op::Data, len)
    }

    /// Every packet carries the credit fields (section 5.10.6.3).
    fn header(&mut self, op: Op, len: u32) -> Header {
        let (buf_alloc, fwd_cnt) = self.credit.announce();
        self.credit_asked = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: self.key.host_port,
            dst_port: self.key.guest_port,
            len,
            kind: TYPE_STREAM,
            op: op as u16,
            flags: 0,
            buf_alloc,
            fwd_cnt,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Key = Key {
        host_port: 52,
        guest_port: 1024,
    };

    fn packet(op: Op) -> Header {
        Header {
            src_cid: 3,
            dst_cid: HOST_CID,
            src_port: KEY.guest_port,
            dst_port: KEY.host_port,
            kind: TYPE_STREAM,
            op: op as u16,
            buf_alloc: 1000,
            ..Header::default()
        }
    }

    fn take(connection: &mut Connection, op: Op) -> Result<Incoming, Violation> {
        connection.receive(op, &packet(op))
    }

    fn ops(connection: &mut Connection) -> Vec<Op> {
        std::iter::from_fn(|| connection.next_control())
            .map(|header| Op::from_wire(header.op).unwrap())
            .collect()
    }

    fn open() -> Connection {
        let mut connection = Connection::from_guest(&packet(Op::Request), 3, 4096);
        assert_eq!(ops(&mut connection), [Op::Response]);
        connection
    }

    #[test]
    fn host_request_opens_on_response() {
        let mut connection = Connection::from_host(KEY, 3, 4096);
        assert_eq!(take(&mut connection, Op::Response), Err(Violation::State));
        assert_eq!(ops(&mut connection), [Op::Request]);
        assert_eq!(connection.sendable_bytes(), 0);
        assert_eq!(take(&mut connection, Op::Data), Err(Violation::State));
        assert_eq!(take(&mut connection, Op::Response), Ok(Incoming::Accepted));
        assert_eq!(connection.sendable_bytes(), 1000);
        assert_eq!(take(&mut connection, Op::Response), Err(Violation::State));
    }

    #[test]
    fn no_data_goes_before_the_response() {
        let mut connection = Connection::from_guest(&packet(Op::Request), 3, 4096);
        assert_eq!(connection.sendable_bytes(), 0);
        assert_eq!(ops(&mut connection), [Op::Response]);
        assert_eq!(connection.sendable_bytes(), 1000);
    }

    #[test]
    fn request_that_was_never_sent_dies_silently() {
        let mut connection = Connection::from_host(KEY, 3, 4096);
        connection.kill();
        assert!(connection.is_finished());
        assert!(!connection.has_control());
    }

    #[test]
    fn dead_connection_sends_one_reset() {
        let mut connection = open();
        connection.kill();
        assert!(!connection.is_finished());
        assert_eq!(take(&mut connection, Op::Data), Ok(Incoming::Noted));
        assert_eq!(ops(&mut connection), [Op::Reset]);
        assert!(connection.is_finished());
    }

    #[test]
    fn only_plainly_open_connections_are_saved() {
        let mut connection = Connection::from_guest(&packet(Op::Request), 3, 4096);
        assert!(!connection.is_plainly_open() && connection.guest_knows());
        assert_eq!(ops(&mut connection), [Op::Response]);
        assert!(connection.is_plainly_open());

        let changes: [fn(&mut Connection); 5] = [
            |connection| connection.shut_host(SHUTDOWN_SEND),
            |connection| connection.kill(),
            |connection| connection.lose_guest(),
            |connection| {
                take(connection, Op::CreditRequest).unwrap();
            },
            |connection| {
                connection.data_header(1000);
                connection.want_credit();
            },
        ];
        for change in changes {
            let mut connection = open();
            change(&mut connection);
            assert!(!connection.is_plainly_open());
            assert_eq!(connection.guest_knows(), !connection.guest_gone());
        }

        let mut connection = Connection::from_host(KEY, 3, 4096);
        assert!(!connection.is_plainly_open() && !connection.guest_knows());
        assert_eq!(ops(&mut connection), [Op::Request]);
        assert!(!connection.is_plainly_open() && connection.guest_knows());
    }

    #[test]
    fn shutdown_is_told_once_per_direction() {
        let mut connection = open();
        connection.shut_host(SHUTDOWN_SEND);
        let header = connection.next_control().unwrap();
        assert_eq!((header.op, header.flags), (4, SHUTDOWN_SEND));
        connection.shut_host(SHUTDOWN_SEND);
        assert!(!connection.has_control());
        connection.shut_host(SHUTDOWN_RECEIVE);
        let header = connection.next_control().unwrap();
        assert_eq!((header.op, header.flags), (4, SHUTDOWN_BOTH));
        assert_eq!(connection.sendable_bytes(), 0);
    }

    #[test]
    fn data_after_the_guests_shutdown_is_a_violation() {
        let mut connection = open();
        let mut shutdown = packet(Op::Shutdown);
        shutdown.flags = SHUTDOWN_SEND | 0xff00;
        assert_eq!(
            connection.receive(Op::Shutdown, &shutdown),
            Ok(Incoming::Shutdown)
        );
        assert_eq!(connection.sendable_bytes(), 1000);
        assert_eq!(take(&mut connection, Op::Data), Err(Violation::State));
    }

    #[test]
    fn credit_is_asked_for_once() {
        let mut connection = open();
        connection.data_header(1000);
        connection.want_credit();
        connection.want_credit();
        assert_eq!(ops(&mut connection), [Op::CreditRequest]);
        connection.want_credit();
        assert!(!connection.has_control());
        let mut update = packet(Op::CreditUpdate);
        update.fwd_cnt = 1000;
        connection.receive(Op::CreditUpdate, &update).unwrap();
        assert_eq!(connection.sendable_bytes(), 1000);
        assert_eq!(
            take(&mut connection, Op::CreditRequest),
            Ok(Incoming::Noted)
        );
        assert_eq!(ops(&mut connection), [Op::CreditUpdate]);
    }

    #[test]
    fn overrun_is_a_violation() {
        let mut connection = open();
        let mut data = packet(Op::Data);
        data.len = 4097;
        assert_eq!(
            connection.receive(Op::Data, &data),
            Err(Violation::Credit(CreditExceeded))
        );
    }
}
