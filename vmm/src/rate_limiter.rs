//! Token buckets that limit a device in bytes and in operations, and a timer
//! that says when a blocked device may try again.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::config::{Bucket, RateLimit};

/// A bucket of tokens that fills at a constant rate.
///
/// What it lets through in any window of `t` is at most its capacity (or the
/// one oversized request, see [`TokenBucket::wait_for`]) plus `t` times
/// `capacity / refill_time`.
#[derive(Debug)]
struct TokenBucket {
    /// Tokens of the full bucket.
    capacity: i128,
    refill_time_ns: i128,
    /// What the bucket holds, in tokens times `refill_time_ns`: in this unit the
    /// bucket gains `capacity` in each nanosecond, and nothing is ever rounded.
    /// Negative after an oversized request.
    level: i128,
    updated_at: Instant,
}

/// The limits of one device. A device without limits has none of these.
#[derive(Debug)]
pub struct RateLimiter {
    bytes: Option<TokenBucket>,
    operations: Option<TokenBucket>,
    /// Readable once a caller that was told to wait may try again.
    timer: OwnedFd,
}

// === impl TokenBucket ===

impl TokenBucket {
    fn new(bucket: Bucket, now: Instant) -> Self {
        // 63 bits for each factor keep their product within an i128. Zeros are
        // refused where the configuration is checked; here they would divide.
        let clamp = |value: u64| i128::from(value.clamp(1, i64::MAX as u64));
        let capacity = clamp(bucket.capacity);
        let refill_time_ns = clamp(bucket.refill_time_ms.saturating_mul(1_000_000));
        Self {
            capacity,
            refill_time_ns,
            level: capacity * refill_time_ns,
            updated_at: now,
        }
    }

    fn refill(&mut self, now: Instant) {
        let elapsed_ns = now.saturating_duration_since(self.updated_at).as_nanos();
        let gained = i128::try_from(elapsed_ns)
            .unwrap_or(i128::MAX)
            .saturating_mul(self.capacity);
        let full = self.capacity * self.refill_time_ns;
        self.level = self.level.saturating_add(gained).min(full);
        self.updated_at = self.updated_at.max(now);
    }

    /// How long until `tokens` may be taken, in nanoseconds; 0 means now. More
    /// than the bucket can ever hold may be taken when it is full, or the
    /// request would be stuck for good.
    fn wait_for(&self, tokens: u64) -> u64 {
        let wanted = i128::from(tokens).min(self.capacity) * self.refill_time_ns;
        let missing = (wanted - self.level).max(0);
        let wait_ns = (missing + self.capacity - 1) / self.capacity;
        u64::try_from(wait_ns).unwrap_or(u64::MAX)
    }

    /// Takes the tokens; an oversized request leaves a debt, which the next one
    /// waits for.
    fn take(&mut self, tokens: u64) {
        let cost = i128::from(tokens).saturating_mul(self.refill_time_ns);
        self.level = self.level.saturating_sub(cost);
    }
}

// === impl RateLimiter ===

impl RateLimiter {
    /// A limiter whose buckets are full, or none where nothing is limited.
    pub fn new(limit: RateLimit) -> io::Result<Option<Self>> {
        Self::new_at(limit, Instant::now())
    }

    fn new_at(limit: RateLimit, now: Instant) -> io::Result<Option<Self>> {
        if limit.bytes.is_none() && limit.operations.is_none() {
            return Ok(None);
        }
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Some(Self {
            bytes: limit.bytes.map(|bucket| TokenBucket::new(bucket, now)),
            operations: limit.operations.map(|bucket| TokenBucket::new(bucket, now)),
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
        }))
    }

    /// Takes what a request costs and returns true; or takes nothing, arms the
    /// timer for when the request can go, and returns false.
    #[must_use]
    pub fn consume(&mut self, bytes: u64, operations: u64) -> bool {
        let admitted = self.admits(bytes, operations);
        if admitted {
            self.charge(bytes, operations);
        }
        admitted
    }

    /// Whether a request may go now, without taking what it costs. If not, arms
    /// the timer for when it can.
    #[must_use]
    pub fn admits(&mut self, bytes: u64, operations: u64) -> bool {
        match self.admits_at(Instant::now(), bytes, operations) {
            Ok(()) => true,
            Err(wait) => {
                self.arm(wait);
                false
            }
        }
    }

    /// Takes what a request has cost, whether it is there or not: what is
    /// missing is a debt, which the next request waits for.
    pub fn charge(&mut self, bytes: u64, operations: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.take(operations);
        }
    }

    fn admits_at(&mut self, now: Instant, bytes: u64, operations: u64) -> Result<(), Duration> {
        let mut wait_ns = 0;
        for (bucket, tokens) in [(&mut self.bytes, bytes), (&mut self.operations, operations)] {
            if let Some(bucket) = bucket {
                bucket.refill(now);
                wait_ns = wait_ns.max(bucket.wait_for(tokens));
            }
        }
        match wait_ns {
            0 => Ok(()),
            _ => Err(Duration::from_nanos(wait_ns)),
        }
    }

    fn arm(&self, wait: Duration) {
        let once = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                tv_sec: wait.as_secs().cast_signed(),
                // A value of zero would disarm the timer.
                tv_nsec: i64::from(wait.subsec_nanos()).max(i64::from(wait.as_secs() == 0)),
            },
        };
        // The descriptor is a timer and the value is in range: this cannot fail.
        let armed = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once);
        debug_assert!(armed.is_ok(), "timerfd_settime refused {once:?}");
    }

    /// Makes the timer unreadable again.
    pub fn acknowledge(&self) {
        // EAGAIN: it was unreadable already.
        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
    }
}

impl AsFd for RateLimiter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rustix::event::{PollFd, PollFlags, poll};

    fn bytes(capacity: u64, refill_time_ms: u64) -> RateLimit {
        RateLimit {
            bytes: Some(Bucket {
                capacity,
                refill_time_ms,
            }),
            operations: None,
        }
    }

    fn limiter(limit: RateLimit, now: Instant) -> RateLimiter {
        RateLimiter::new_at(limit, now).unwrap().unwrap()
    }

    impl RateLimiter {
        fn consume_at(
            &mut self,
            now: Instant,
            bytes: u64,
            operations: u64,
        ) -> Result<(), Duration> {
            self.admits_at(now, bytes, operations)?;
            self.charge(bytes, operations);
            Ok(())
        }
    }

    #[test]
    fn nothing_limited_is_no_limiter() {
        assert!(RateLimiter::new(RateLimit::default()).unwrap().is_none());
    }

    #[test]
    fn a_blocked_request_goes_exactly_when_told() {
        let start = Instant::now();
        let mut limiter = limiter(bytes(1000, 1000), start);
        assert_eq!(limiter.consume_at(start, 1000, 1), Ok(()));
        let wait = limiter.consume_at(start, 250, 1).unwrap_err();
        assert_eq!(wait, Duration::from_millis(250));
        let almost = start + wait - Duration::from_nanos(1);
        assert!(limiter.consume_at(almost, 250, 1).is_err());
        assert_eq!(limiter.consume_at(start + wait, 250, 1), Ok(()));
    }

    #[test]
    fn an_oversized_request_waits_for_a_full_bucket_and_leaves_a_debt() {
        let start = Instant::now();
        let mut limiter = limiter(bytes(1000, 1000), start);
        assert_eq!(limiter.consume_at(start, 1, 1), Ok(()));
        let wait = limiter.consume_at(start, 5000, 1).unwrap_err();
        assert_eq!(wait, Duration::from_millis(1));
        assert_eq!(limiter.consume_at(start + wait, 5000, 1), Ok(()));
        let debt = limiter.consume_at(start + wait, 1000, 1).unwrap_err();
        assert_eq!(debt, Duration::from_secs(5));
    }

    #[test]
    fn what_is_charged_afterwards_is_waited_for() {
        let start = Instant::now();
        let mut limiter = limiter(bytes(1000, 1000), start);
        assert_eq!(limiter.admits_at(start, 1, 1), Ok(()));
        assert_eq!(
            limiter.admits_at(start, 1000, 1),
            Ok(()),
            "nothing is taken"
        );
        limiter.charge(1500, 1);
        let wait = limiter.admits_at(start, 1, 1).unwrap_err();
        assert_eq!(wait, Duration::from_millis(501));
        assert_eq!(limiter.admits_at(start + wait, 1, 1), Ok(()));
    }

    #[test]
    fn one_empty_bucket_leaves_the_other_untouched() {
        let start = Instant::now();
        let bucket = |capacity| {
            Some(Bucket {
                capacity,
                refill_time_ms: 1000,
            })
        };
        let limit = RateLimit {
            bytes: bucket(1000),
            operations: bucket(1),
        };
        let mut limiter = limiter(limit, start);
        assert_eq!(limiter.consume_at(start, 0, 1), Ok(()));
        assert!(limiter.consume_at(start, 1000, 1).is_err());
        assert_eq!(limiter.consume_at(start, 1000, 0), Ok(()));
    }

    #[test]
    fn the_timer_fires_for_a_blocked_request() {
        let mut limiter = RateLimiter::new(bytes(1000, 10)).unwrap().unwrap();
        assert!(limiter.consume(1000, 1));
        while limiter.consume(1000, 1) {}
        let mut fds = [PollFd::new(&limiter, PollFlags::IN)];
        assert_eq!(poll(&mut fds, None).unwrap(), 1);
        limiter.acknowledge();
        let mut fds = [PollFd::new(&limiter, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&Timespec::default())).unwrap(), 0);
    }

    proptest! {
        /// Over any window, no more passes than a full bucket (or one oversized
        /// request) and what has flowed in since.
        #[test]
        fn never_exceeds_capacity_and_rate(
            capacity in 1..10_000u64,
            refill_time_ms in 1..5_000u64,
            steps in prop::collection::vec((0..2_000_000_000u64, 0..20_000u64), 1..64),
        ) {
            let start = Instant::now();
            let mut limiter = limiter(bytes(capacity, refill_time_ms), start);
            let mut now = start;
            let mut passed: Vec<(Instant, u64)> = Vec::new();
            for (pause_ns, tokens) in steps {
                now += Duration::from_nanos(pause_ns);
                if limiter.consume_at(now, tokens, 1).is_ok() {
                    passed.push((now, tokens));
                }
            }
            for (first, &(from, _)) in passed.iter().enumerate() {
                let mut sum = 0u128;
                for &(to, tokens) in &passed[first..] {
                    // A debt is paid by the requests after it, so the last
                    // request of a window counts for a bucket at most.
                    let bound = u128::from(capacity)
                        + (to - from).as_nanos() * u128::from(capacity)
                            / (u128::from(refill_time_ms) * 1_000_000);
                    let counted = sum + u128::from(tokens.min(capacity));
                    prop_assert!(counted <= bound, "{counted} > {bound}");
                    sum += u128::from(tokens);
                }
            }
        }

        /// Whatever the sizes, who waits as long as told goes through.
        #[test]
        fn never_stuck(
            capacity in any::<u64>(),
            refill_time_ms in any::<u64>(),
            requests in prop::collection::vec(any::<u32>(), 1..16),
        ) {
            let mut now = Instant::now();
            let mut limiter = limiter(bytes(capacity, refill_time_ms), now);
            for tokens in requests {
                if let Err(wait) = limiter.consume_at(now, u64::from(tokens), 1) {
                    // An Instant ends at some point; a wait of centuries is one
                    // that the configuration asked for.
                    let Some(later) = now.checked_add(wait) else { return Ok(()) };
                    now = later;
                    prop_assert_eq!(limiter.consume_at(now, u64::from(tokens), 1), Ok(()));
                }
            }
        }
    }
}
