//! Wall-clock times as records keep them, and a stopwatch for stages.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use prost_types::Timestamp;
use serde::{Deserialize, Serialize};

/// Milliseconds since the Unix epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UnixMillis(pub u64);

// === impl UnixMillis ===

impl UnixMillis {
    pub fn now() -> Self {
        let since_epoch = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Self(millis(since_epoch))
    }

    pub fn plus(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(millis(duration)))
    }

    /// How long until this time; zero when it is past.
    pub fn from_now(self) -> Duration {
        Duration::from_millis(self.0.saturating_sub(Self::now().0))
    }
}

impl From<UnixMillis> for Timestamp {
    fn from(time: UnixMillis) -> Self {
        Self {
            seconds: i64::try_from(time.0 / 1000).unwrap_or(i64::MAX),
            nanos: i32::try_from(time.0 % 1000 * 1_000_000).unwrap_or(0),
        }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// One named stretch of time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    pub name: String,
    pub duration_us: u64,
}

/// Cuts the time since it was started into stages.
#[derive(Debug)]
pub struct Stopwatch {
    started: Instant,
    lap: Instant,
    stages: Vec<Stage>,
}

// === impl Stopwatch ===

impl Stopwatch {
    pub fn start() -> Self {
        let now = Instant::now();
        Self {
            started: now,
            lap: now,
            stages: Vec::new(),
        }
    }

    /// Ends the stage that began at the last lap.
    pub fn lap(&mut self, name: &str) {
        let now = Instant::now();
        self.push(name, now - self.lap);
        self.lap = now;
    }

    /// Begins the next stage now: what has passed was measured by somebody else.
    pub fn skip(&mut self) {
        self.lap = Instant::now();
    }

    pub fn add(&mut self, stage: Stage) {
        self.stages.push(stage);
    }

    /// Adds a stage that somebody else measured inside the current one.
    pub fn push(&mut self, name: &str, duration: Duration) {
        self.stages.push(Stage {
            name: name.to_owned(),
            duration_us: u64::try_from(duration.as_micros()).unwrap_or(u64::MAX),
        });
    }

    /// All stages, then their total.
    pub fn finish(mut self) -> Vec<Stage> {
        self.push("total", self.started.elapsed());
        self.stages
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_keep_their_order_and_end_in_the_total() {
        let mut watch = Stopwatch::start();
        watch.lap("first");
        watch.push("second.inner", Duration::from_micros(7));
        watch.lap("second");
        let stages = watch.finish();
        let names: Vec<&str> = stages.iter().map(|stage| stage.name.as_str()).collect();
        assert_eq!(names, ["first", "second.inner", "second", "total"]);
        assert_eq!(stages[1].duration_us, 7);
    }

    #[test]
    fn a_timestamp_keeps_milliseconds() {
        let stamp = Timestamp::from(UnixMillis(1_234_567));
        assert_eq!((stamp.seconds, stamp.nanos), (1234, 567_000_000));
    }
}
