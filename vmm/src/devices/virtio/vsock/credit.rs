//! Credit-based flow control (section 5.10.6.3). All counters are free-running
//! and wrap at 2³²; only their differences mean anything.

use std::num::Wrapping;

use super::{BUF_ALLOC_BYTES, CreditState, SMALL_BUF_ALLOC_BYTES};

/// Both directions of one connection's credit.
#[derive(Debug)]
pub(super) struct Credit {
    /// Bytes of the guest's that we promised to hold.
    buf_alloc_bytes: u32,
    /// Bytes the guest has sent.
    received: Wrapping<u32>,
    /// Of these, the bytes that have left for the host (our `fwd_cnt`).
    forwarded: Wrapping<u32>,
    /// The `fwd_cnt` that the guest was last told.
    announced: Wrapping<u32>,

    /// Bytes of ours that the guest promised to hold.
    peer_buf_alloc_bytes: u32,
    /// Bytes we have sent.
    sent: Wrapping<u32>,
    /// Of these, the bytes that the guest's reader has taken.
    peer_forwarded: Wrapping<u32>,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest sent more than its credit allows")]
pub(super) struct CreditExceeded;

/// Why saved counters cannot be a connection's.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum BadCredit {
    #[error("it promises {0} bytes of room, which no connection does")]
    Room(u32),
    #[error("it holds {0} bytes, more than it has room for")]
    Held(u32),
}

// === impl Credit ===

impl Credit {
    pub(super) fn new(buf_alloc_bytes: u32) -> Self {
        Self {
            buf_alloc_bytes,
            received: Wrapping(0),
            forwarded: Wrapping(0),
            announced: Wrapping(0),
            peer_buf_alloc_bytes: 0,
            sent: Wrapping(0),
            peer_forwarded: Wrapping(0),
        }
    }

    pub(super) fn save(&self) -> CreditState {
        CreditState {
            buf_alloc_bytes: self.buf_alloc_bytes,
            received: self.received.0,
            forwarded: self.forwarded.0,
            announced: self.announced.0,
            peer_buf_alloc_bytes: self.peer_buf_alloc_bytes,
            sent: self.sent.0,
            peer_forwarded: self.peer_forwarded.0,
        }
    }

    /// Counters from a snapshot, which is untrusted. What the guest said needs
    /// no check, and a wrong `announced` costs one update.
    pub(super) fn restore(state: &CreditState) -> Result<Self, BadCredit> {
        let room = state.buf_alloc_bytes;
        if !(SMALL_BUF_ALLOC_BYTES..=BUF_ALLOC_BYTES).contains(&room) {
            return Err(BadCredit::Room(room));
        }
        let credit = Self {
            buf_alloc_bytes: room,
            received: Wrapping(state.received),
            forwarded: Wrapping(state.forwarded),
            announced: Wrapping(state.announced),
            peer_buf_alloc_bytes: state.peer_buf_alloc_bytes,
            sent: Wrapping(state.sent),
            peer_forwarded: Wrapping(state.peer_forwarded),
        };
        match credit.held_bytes() {
            held if held > room => Err(BadCredit::Held(held)),
            _ => Ok(credit),
        }
    }

    /// Takes the credit fields of a packet from the guest.
    pub(super) fn update_peer(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.peer_buf_alloc_bytes = buf_alloc;
        self.peer_forwarded = Wrapping(fwd_cnt);
    }

    /// Bytes we may send. A guest that claims to have read more than was sent,
    /// or that shrinks its buffer below what is in flight, has no room.
    pub(super) fn sendable_bytes(&self) -> u32 {
        let in_flight = (self.sent - self.peer_forwarded).0;
        self.peer_buf_alloc_bytes.saturating_sub(in_flight)
    }

    /// Counts bytes sent to the guest: no more than [`Self::sendable_bytes`].
    pub(super) fn note_sent(&mut self, len: u32) {
        debug_assert!(len <= self.sendable_bytes());
        self.sent += len;
    }

    /// Counts bytes that came from the guest. They are held until
    /// [`Self::note_forwarded`].
    pub(super) fn note_received(&mut self, len: u32) -> Result<(), CreditExceeded> {
        if len > self.buf_alloc_bytes - self.held_bytes() {
            return Err(CreditExceeded);
        }
        self.received += len;
        Ok(())
    }

    /// Counts bytes that went on to the host, or were dropped because the host
    /// reads no more.
    pub(super) fn note_forwarded(&mut self, len: u32) {
        debug_assert!(len <= self.held_bytes());
        self.forwarded += len;
    }

    /// Bytes received and not yet forwarded.
    pub(super) fn held_bytes(&self) -> u32 {
        (self.received - self.forwarded).0
    }

    /// Whether the guest should be told of room it does not know of. At a
    /// quarter of the buffer: a guest with no credit left always gets there as
    /// the buffer drains, and a busy one costs four updates for each bufferful.
    pub(super) fn update_due(&self) -> bool {
        (self.forwarded - self.announced).0 >= self.buf_alloc_bytes / 4
    }

    /// The credit fields of a packet to the guest: `(buf_alloc, fwd_cnt)`.
    pub(super) fn announce(&mut self) -> (u32, u32) {
        self.announced = self.forwarded;
        (self.buf_alloc_bytes, self.forwarded.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn counters_wrap() {
        let mut credit = Credit::new(1000);
        for _ in 0..3 {
            // Past 2³² in steps that the buffer can hold.
            credit.received = Wrapping(u32::MAX - 10);
            credit.forwarded = credit.received;
            credit.announced = credit.received;
            credit.note_received(1000).unwrap();
            assert_eq!(credit.note_received(1), Err(CreditExceeded));
            credit.note_forwarded(249);
            assert!(!credit.update_due());
            credit.note_forwarded(1);
            assert!(credit.update_due());
            assert_eq!(credit.announce(), (1000, 239));
            assert!(!credit.update_due());
            assert_eq!(credit.held_bytes(), 750);
        }

        credit.sent = Wrapping(5);
        credit.update_peer(100, u32::MAX - 4);
        assert_eq!(credit.sendable_bytes(), 90);
    }

    #[test]
    fn guest_that_lies_about_its_room_gets_nothing() {
        let mut credit = Credit::new(1000);
        credit.update_peer(u32::MAX, 0);
        credit.note_sent(500);
        credit.update_peer(u32::MAX, 501);
        assert_eq!(credit.sendable_bytes(), 0);
        credit.update_peer(100, 0);
        assert_eq!(credit.sendable_bytes(), 0);
        credit.update_peer(100, 450);
        assert_eq!(credit.sendable_bytes(), 50);
    }

    #[test]
    fn saved_counters_are_checked() {
        let mut credit = Credit::new(BUF_ALLOC_BYTES);
        credit.received = Wrapping(10);
        credit.forwarded = Wrapping(u32::MAX - 9);
        credit.update_peer(7, 8);
        let state = credit.save();
        assert_eq!(Credit::restore(&state).unwrap().save(), state);
        assert_eq!(Credit::restore(&state).unwrap().held_bytes(), 20);

        for room in [0, SMALL_BUF_ALLOC_BYTES - 1, BUF_ALLOC_BYTES + 1] {
            let bad = CreditState {
                buf_alloc_bytes: room,
                ..state
            };
            assert_eq!(Credit::restore(&bad).unwrap_err(), BadCredit::Room(room));
        }
        let bad = CreditState {
            received: state.forwarded.wrapping_sub(1),
            ..state
        };
        assert_eq!(
            Credit::restore(&bad).unwrap_err(),
            BadCredit::Held(u32::MAX)
        );
    }

    proptest! {
        /// Whatever the guest says, we hold no more than we promised and send
        /// no more than it promised.
        #[test]
        fn credit_is_never_exceeded(
            steps in prop::collection::vec((0..4u8, any::<u32>(), any::<u32>()), 1..200),
        ) {
            let mut credit = Credit::new(4096);
            for (step, a, b) in steps {
                match step {
                    0 => credit.update_peer(a, b),
                    1 => {
                        let held = credit.held_bytes();
                        let fits = a <= 4096 - held;
                        prop_assert_eq!(credit.note_received(a).is_ok(), fits);
                    }
                    2 => {
                        let n = a % (credit.held_bytes() + 1);
                        credit.note_forwarded(n);
                    }
                    _ => {
                        let n = a.min(credit.sendable_bytes());
                        credit.note_sent(n);
                    }
                }
                prop_assert!(credit.held_bytes() <= 4096);
                prop_assert!(credit.sendable_bytes() <= credit.peer_buf_alloc_bytes);
            }
        }
    }
}
