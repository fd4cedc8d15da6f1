//! A token bucket.

use std::time::Duration;

use tokio::time::Instant;

#[derive(Debug)]
pub(super) struct Bucket {
    /// A token's worth of time.
    each: Duration,
    /// What a full bucket is worth.
    full: Duration,
    /// When the bucket was, or would have been, empty.
    empty_at: Instant,
}

// === impl Bucket ===

impl Bucket {
    pub(super) fn new(per_second: u32, burst: u32, now: Instant) -> Self {
        let each = Duration::from_secs(1) / per_second.max(1);
        let full = each * burst.max(1);
        Self {
            each,
            full,
            empty_at: now.checked_sub(full).unwrap_or(now),
        }
    }

    /// Takes a token, if there is one.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let filled = now.saturating_duration_since(self.empty_at).min(self.full);
        if filled < self.each {
            return false;
        }
        // A full bucket fills no further.
        self.empty_at = now - (filled - self.each);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_then_the_rate() {
        let start = Instant::now() + Duration::from_hours(1);
        let mut bucket = Bucket::new(10, 3, start);
        let mut taken = |after_ms| {
            let now = start + Duration::from_millis(after_ms);
            (0..10).filter(|_| bucket.take(now)).count()
        };
        assert_eq!(taken(0), 3);
        assert_eq!(taken(99), 0);
        assert_eq!(taken(100), 1);
        assert_eq!(taken(350), 2);
        assert_eq!(taken(400), 1);
        assert_eq!(taken(3_600_000), 3);
    }
}
