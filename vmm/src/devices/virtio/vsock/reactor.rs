//! The device's epoll instance, with a timer and a way to wake itself.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};

use super::packet::Key;

/// Descriptors that one wait reports. What is left stays pending in the epoll
/// instance, which stays readable.
const EVENTS_PER_WAIT: usize = 128;

/// Deadlines closer together than this share one expiry of the timer.
const TIMER_SLACK: Duration = Duration::from_millis(20);

/// What a watched descriptor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    Listener,
    Timer,
    Wake,
    Handshake(u32),
    Connection(Key),
}

/// VMADDR_PORT_ANY is never the port of a connection.
pub(super) const NO_PORT: u32 = u32::MAX;
const FIRST_HANDSHAKE: u32 = 16;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Ready {
    pub(super) readable: bool,
    pub(super) writable: bool,
    /// The other side sends no more, or there is an error to read.
    pub(super) ending: bool,
    /// The other side neither sends nor receives any more.
    pub(super) hung_up: bool,
}

#[derive(Debug)]
pub(super) struct Reactor {
    epoll: OwnedFd,
    timer: OwnedFd,
    wake: OwnedFd,
    /// When the timer expires.
    armed: Option<Instant>,
}

// === impl Token ===

impl Token {
    fn encode(self) -> u64 {
        let reserved = |guest_port| {
            Key {
                host_port: NO_PORT,
                guest_port,
            }
            .token()
        };
        match self {
            Self::Listener => reserved(0),
            Self::Timer => reserved(1),
            Self::Wake => reserved(2),
            Self::Handshake(slot) => reserved(FIRST_HANDSHAKE + slot),
            Self::Connection(key) => key.token(),
        }
    }

    fn decode(token: u64) -> Self {
        match Key::from_token(token) {
            Key {
                host_port: NO_PORT,
                guest_port,
            } => match guest_port {
                0 => Self::Listener,
                1 => Self::Timer,
                2 => Self::Wake,
                slot => Self::Handshake(slot.saturating_sub(FIRST_HANDSHAKE)),
            },
            key => Self::Connection(key),
        }
    }
}

// === impl Reactor ===

impl Reactor {
    pub(super) fn new() -> io::Result<Self> {
        let reactor = Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            timer: timerfd_create(
                TimerfdClockId::Monotonic,
                TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
            )?,
            wake: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
            armed: None,
        };
        reactor.add(&reactor.timer, Token::Timer, EventFlags::IN)?;
        reactor.add(&reactor.wake, Token::Wake, EventFlags::IN)?;
        Ok(reactor)
    }

    fn add(&self, fd: impl AsFd, token: Token, flags: EventFlags) -> io::Result<()> {
        Ok(epoll::add(
            &self.epoll,
            fd,
            EventData::new_u64(token.encode()),
            flags,
        )?)
    }

    pub(super) fn watch_listener(&self, listener: impl AsFd) -> io::Result<()> {
        self.add(listener, Token::Listener, EventFlags::IN)
    }

    pub(super) fn unwatch(&self, fd: impl AsFd) {
        // Fails only for what is not watched.
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// Watches a stream, edge-triggered: a stream that cannot be served, for
    /// want of credit or of guest buffers, then costs nothing, hung up or not.
    /// Closing the descriptor ends the watch.
    pub(super) fn watch_stream(&self, stream: impl AsFd, token: Token) -> io::Result<()> {
        self.add(stream, token, stream_flags(false))
    }

    /// Changes what a stream is watched for. What is ready already is reported
    /// anew.
    pub(super) fn rewatch_stream(
        &self,
        stream: impl AsFd,
        token: Token,
        writes: bool,
    ) -> io::Result<()> {
        Ok(epoll::modify(
            &self.epoll,
            stream,
            EventData::new_u64(token.encode()),
            stream_flags(writes),
        )?)
    }

    /// Gives what is ready, without waiting. An expired timer, or a wake, is
    /// reported once.
    pub(super) fn poll(&mut self) -> Vec<(Token, Ready)> {
        const NOTHING: Event = Event {
            flags: EventFlags::empty(),
            data: EventData::new_u64(0),
        };
        let mut events = [NOTHING; EVENTS_PER_WAIT];
        let no_wait = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // Only EINTR can happen, and then the next call sees the same.
        let count = epoll::wait(&self.epoll, &mut events, Some(&no_wait)).unwrap_or(0);
        let ready: Vec<_> = events[..count]
            .iter()
            .map(|event| {
                let (flags, data) = (event.flags, event.data);
                (Token::decode(data.u64()), Ready::from(flags))
            })
            .collect();
        for (token, _) in &ready {
            match token {
                Token::Timer => {
                    self.armed = None;
                    drain(&self.timer);
                }
                Token::Wake => drain(&self.wake),
                _ => {}
            }
        }
        ready
    }

    /// Makes the epoll instance readable once, so that the event loop comes back.
    pub(super) fn wake(&self) {
        // Fails only when the counter is full: then it is readable already.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Has the timer expire at `deadline` or earlier.
    pub(super) fn arm(&mut self, deadline: Instant, now: Instant) {
        let deadline = deadline.max(now + TIMER_SLACK);
        if self.armed.is_none_or(|armed| deadline < armed) {
            self.armed = Some(deadline);
            self.set_timer(deadline - now);
        }
    }

    pub(super) fn disarm(&mut self) {
        if self.armed.take().is_some() {
            self.set_timer(Duration::ZERO);
        }
    }

    /// Zero disarms it.
    fn set_timer(&self, after: Duration) {
        let spec = Itimerspec {
            it_interval: Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: Timespec {
                tv_sec: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: after.subsec_nanos().into(),
            },
        };
        // Cannot fail: the descriptor is a timer and the time is valid.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec);
    }
}

impl AsFd for Reactor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

// === impl Ready ===

impl From<EventFlags> for Ready {
    fn from(flags: EventFlags) -> Self {
        let ending = flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
        Self {
            // An end of stream and an error are found by reading.
            readable: ending || flags.contains(EventFlags::IN),
            writable: flags.intersects(EventFlags::OUT | EventFlags::HUP | EventFlags::ERR),
            ending,
            hung_up: flags.contains(EventFlags::HUP),
        }
    }
}

fn stream_flags(writes: bool) -> EventFlags {
    let reads = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
    if writes {
        reads | EventFlags::OUT
    } else {
        reads
    }
}

/// Empties a timer's or eventfd's counter.
fn drain(fd: &OwnedFd) {
    let _ = rustix::io::read(fd, &mut [0; 8]);
}
