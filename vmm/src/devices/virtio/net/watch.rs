//! What the device waits for, in an epoll instance of its own.
//!
//! All is edge-triggered: a TAP whose packets nobody can take, for want of
//! buffers or of tokens, then costs nothing. Who is told remembers it.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::{self, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};

use super::Tap;
use crate::rate_limiter::RateLimiter;

const TAP: u64 = 0;
const RX_TIMER: u64 = 1;
const TX_TIMER: u64 = 2;
const WAKE: u64 = 3;

#[derive(Debug)]
pub(super) struct Watch {
    epoll: OwnedFd,
    wake: OwnedFd,
}

/// What has happened since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Happened {
    /// The TAP has packets.
    pub(super) readable: bool,
    /// What the receiving side had to wait for is there.
    pub(super) rx: bool,
    /// What the sending side had to wait for is there.
    pub(super) tx: bool,
    /// Both sides are to look for work.
    pub(super) wake: bool,
}

/// Whose timer it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Rx,
    Tx,
}

// === impl Watch ===

impl Watch {
    pub(super) fn new() -> io::Result<Self> {
        let watch = Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            wake: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
        };
        watch.add(&watch.wake, WAKE)?;
        Ok(watch)
    }

    fn add(&self, fd: impl AsFd, what: u64) -> io::Result<()> {
        let flags = EventFlags::IN | EventFlags::ET;
        Ok(epoll::add(
            &self.epoll,
            fd,
            EventData::new_u64(what),
            flags,
        )?)
    }

    pub(super) fn watch_tap(&self, tap: &Tap) -> io::Result<()> {
        self.add(tap, TAP)
    }

    /// Watches a limiter's timer until the limiter is dropped.
    pub(super) fn watch_limiter(&self, limiter: &RateLimiter, side: Side) -> io::Result<()> {
        let what = match side {
            Side::Rx => RX_TIMER,
            Side::Tx => TX_TIMER,
        };
        self.add(limiter, what)
    }

    /// The TAP was full: tells when it can be written. What it is already is
    /// told as well.
    pub(super) fn rewatch_full_tap(&self, tap: &Tap) {
        let flags = EventFlags::IN | EventFlags::OUT | EventFlags::ET;
        // Fails only for what is not watched.
        let _ = epoll::modify(&self.epoll, tap, EventData::new_u64(TAP), flags);
    }

    /// Makes both sides look for work at the event loop's next turn.
    pub(super) fn wake(&self) {
        // Fails only when the counter is full, and then it is readable.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Takes what has happened, which makes the instance unreadable.
    pub(super) fn take(&self) -> Happened {
        let mut events = [MaybeUninit::<Event>::uninit(); 4];
        let now = Timespec::default();
        let mut happened = Happened::default();
        // Cannot fail: nothing is waited for. An interrupted call is repeated by
        // the event loop.
        let Ok((events, _)) = epoll::wait(&self.epoll, &mut events, Some(&now)) else {
            return happened;
        };
        for event in events {
            let flags = event.flags;
            match event.data.u64() {
                TAP => {
                    // An error is told by reading.
                    happened.readable |= flags.intersects(EventFlags::IN | EventFlags::ERR);
                    happened.tx |= flags.contains(EventFlags::OUT);
                }
                RX_TIMER => happened.rx = true,
                TX_TIMER => happened.tx = true,
                _ => happened.wake = true,
            }
        }
        happened
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}
