//! The states of a sandbox and the ways between them.
//!
//! ```text
//! pending ─ Start → starting ─ Run → running
//!    │                 │ ↺ Spawned      │
//!    ├─ Fail, ─────────┼────────────────┤ → failed
//!    └─ Stop ──────────┴────────────────┴ → stopping ─ Stopped → stopped
//!                                failed ─ Stop ↗
//!
//! running ─ Pause → pausing ─ Paused → paused ─ Resume → resuming ─ Run → running
//!    │ ↺ Saved      │ ↺ Saved            │ ↖── Settle ─────┘  ↺ Spawned
//!    │              └─ Continue → running└─ RollBack → resuming
//!    └─ RollBack → resuming
//! ```
//!
//! `Fail` is allowed from every state with a machine, `Stop` from every state but `stopped`, also from `stopping`: a
//! daemon that was killed in mid-stop begins it again.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Chains, Failure, MonitorIdentity};
use crate::id::SnapshotId;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Recorded and admitted; nothing of it exists yet.
    Pending,
    /// Files, then a monitor, then a guest are coming to be.
    Starting,
    /// A program has been run in it.
    Running,
    /// Being taken down.
    Stopping,
    /// Nothing is left but the record.
    Stopped,
    /// It ended without being asked to; nothing is left but the record.
    Failed,
    /// It is being saved, to be paused.
    Pausing,
    /// It is saved, and holds no vCPU and no memory.
    Paused,
    /// It is coming back from what was saved of it.
    Resuming,
}

/// A step of a sandbox's life. It is durable before its side effect begins.
#[derive(Debug, Clone, PartialEq)]
pub enum Transition {
    Start,
    /// The monitor's process exists.
    Spawned(MonitorIdentity),
    Run,
    /// A snapshot of it was made: its root disk writes to the next layer.
    Saved {
        disk_chain: Vec<SnapshotId>,
    },
    Pause,
    /// It was not paused, and runs on.
    Continue,
    Paused {
        saved: SnapshotId,
        chains: Chains,
    },
    Resume,
    RollBack {
        to: SnapshotId,
        chains: Chains,
    },
    /// It did not come back; what was saved is still there.
    Settle,
    Stop,
    Stopped,
    Fail(Failure),
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a sandbox that is {from} cannot {transition}; this is a bug in soulboxd, please report it"
)]
pub struct IllegalTransition {
    pub from: State,
    pub transition: &'static str,
}

// === impl State ===

impl State {
    #[cfg(test)]
    pub(crate) const ALL: [Self; 9] = [
        Self::Pending,
        Self::Starting,
        Self::Running,
        Self::Stopping,
        Self::Stopped,
        Self::Failed,
        Self::Pausing,
        Self::Paused,
        Self::Resuming,
    ];

    /// The state to which `transition` leads from this one.
    pub fn after(self, transition: &Transition) -> Result<Self, IllegalTransition> {
        use State::{
            Failed, Paused, Pausing, Pending, Resuming, Running, Starting, Stopped, Stopping,
        };
        match (self, transition) {
            (Pending, Transition::Start) | (Starting, Transition::Spawned(_)) => Ok(Starting),
            (Starting | Resuming, Transition::Run)
            | (Pausing, Transition::Continue)
            | (Running, Transition::Saved { .. }) => Ok(Running),
            (Running, Transition::Pause) | (Pausing, Transition::Saved { .. }) => Ok(Pausing),
            (Pausing, Transition::Paused { .. }) | (Resuming, Transition::Settle) => Ok(Paused),
            (Paused, Transition::Resume)
            | (Running | Paused, Transition::RollBack { .. })
            | (Resuming, Transition::Spawned(_)) => Ok(Resuming),
            (Pending | Starting | Running | Pausing | Resuming, Transition::Fail(_)) => Ok(Failed),
            (
                Pending | Starting | Running | Stopping | Failed | Pausing | Paused | Resuming,
                Transition::Stop,
            ) => Ok(Stopping),
            (Stopping, Transition::Stopped) => Ok(Stopped),
            _ => Err(IllegalTransition {
                from: self,
                transition: transition.name(),
            }),
        }
    }

    /// Whether a sandbox in this state takes vCPUs and memory, and may have a
    /// monitor.
    pub fn holds_resources(self) -> bool {
        !matches!(self, Self::Stopped | Self::Failed | Self::Paused)
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Resuming => "resuming",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

// === impl Transition ===

impl Transition {
    fn name(&self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Spawned(_) => "have its monitor started",
            Self::Run => "run",
            Self::Saved { .. } => "be saved",
            Self::Pause => "begin to pause",
            Self::Continue => "run on",
            Self::Paused { .. } => "be paused",
            Self::Resume => "resume",
            Self::RollBack { .. } => "be rolled back",
            Self::Settle => "be paused again",
            Self::Stop => "begin to stop",
            Self::Stopped => "end its stop",
            Self::Fail(_) => "fail",
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::record::tests::sample;

    fn snapshot() -> SnapshotId {
        "sn-aaaaaaaaaaaaaaaaaaaa".parse().unwrap()
    }

    fn transition() -> impl Strategy<Value = Transition> {
        prop_oneof![
            Just(Transition::Start),
            (1..100_i32).prop_map(|pid| Transition::Spawned(MonitorIdentity {
                pid,
                start_time_ticks: 1,
                boot_id: None,
            })),
            Just(Transition::Run),
            Just(Transition::Pause),
            Just(Transition::Continue),
            Just(Transition::Resume),
            Just(Transition::Settle),
            Just(Transition::Saved {
                disk_chain: vec![snapshot()]
            }),
            Just(Transition::Paused {
                saved: snapshot(),
                chains: Chains::default()
            }),
            Just(Transition::RollBack {
                to: snapshot(),
                chains: Chains::default()
            }),
            Just(Transition::Stop),
            Just(Transition::Stopped),
            Just(Transition::Fail(Failure {
                reason: "TEST".to_owned(),
                message: String::new(),
                console_tail: String::new(),
            })),
        ]
    }

    proptest! {
        /// However transitions come, a record keeps its invariants, and a
        /// refused one leaves it as it was.
        #[test]
        fn records_keep_their_invariants(steps in prop::collection::vec(transition(), 0..40)) {
            let mut record = sample(State::Pending);
            let mut was_stopped = false;
            for step in steps {
                let Ok(next) = record.apply(step.clone()) else { continue };
                prop_assert!(!was_stopped, "nothing follows stopped");
                if next.state == State::Running {
                    prop_assert!(record.state.holds_resources() && record.state != State::Stopping);
                }
                if let Transition::Fail(_) = step {
                    prop_assert!(next.failure.is_some() && !next.state.holds_resources());
                }
                prop_assert!(next.state != State::Failed || next.failure.is_some());
                prop_assert!(next.state.holds_resources() || next.monitor.is_none());
                let saved = matches!(next.state, State::Paused | State::Resuming);
                prop_assert!(!saved || next.saved.is_some(), "nothing to go on from");
                prop_assert!(next.layer >= record.layer, "a layer would be written twice");
                was_stopped = next.state == State::Stopped;
                record = next;
            }
        }

        /// From anywhere but the end, `Stop` then `Stopped` ends it.
        #[test]
        fn every_state_can_be_stopped(index in 0..State::ALL.len()) {
            let state = State::ALL[index];
            let stopped = sample(state).apply(Transition::Stop).and_then(|record| record.apply(Transition::Stopped));
            prop_assert_eq!(stopped.is_ok(), state != State::Stopped);
        }
    }
}
