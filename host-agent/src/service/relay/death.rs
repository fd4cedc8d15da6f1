//! Whether a sandbox can be called, and what ends a call that it has taken.

use std::sync::Arc;

use tokio::sync::watch;

use crate::id::SandboxId;
use crate::record::{MonitorIdentity, State};
use crate::sandbox::{Live, UseError, View};

/// What a call can go to.
pub(super) fn usable(view: &View) -> Result<Arc<Live>, UseError> {
    if let Some(error) = ended(view) {
        return Err(match error {
            UseError::Died { id, failure } => UseError::Failed { id, failure },
            UseError::Deleted { id } => UseError::NotFound(id.to_string()),
            UseError::Interrupted { id, state } => UseError::NotRunning { id, state },
            other => other,
        });
    }
    match &view.live {
        Some(live) => Ok(Arc::clone(live)),
        None => Err(UseError::NotRunning {
            id: view.record.id.clone(),
            state: view.record.state,
        }),
    }
}

/// Waits until the sandbox is no longer one that runs, or runs again in another
/// machine than that of `monitor`, and says why.
pub(super) async fn death(
    id: &SandboxId,
    monitor: MonitorIdentity,
    view: &mut watch::Receiver<View>,
) -> UseError {
    let deleted = || UseError::Deleted { id: id.clone() };
    let ended = |view: &View| {
        let restored = view
            .live
            .as_ref()
            .is_some_and(|live| live.monitor() != monitor);
        ended(view).or_else(|| {
            restored.then(|| UseError::Interrupted {
                id: id.clone(),
                state: State::Resuming,
            })
        })
    };
    match view.wait_for(|view| ended(view).is_some()).await {
        Ok(view) => ended(&view).unwrap_or_else(deleted),
        Err(_) => deleted(),
    }
}

/// How a sandbox has ended. One that is stopping may still let its programs
/// speak their last.
fn ended(view: &View) -> Option<UseError> {
    let id = view.record.id.clone();
    match (&view.record.failure, view.record.state) {
        (Some(failure), State::Failed) => Some(UseError::Died {
            id,
            failure: failure.clone(),
        }),
        (_, State::Stopped) => Some(UseError::Deleted { id }),
        (_, state @ (State::Pausing | State::Paused | State::Resuming)) => {
            Some(UseError::Interrupted { id, state })
        }
        _ if view.deleted => Some(UseError::Deleted { id }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;
    use crate::record::Failure;
    use crate::record::tests::sample;
    use crate::status::status;

    fn view(state: State) -> View {
        let mut record = sample(state);
        record.failure =
            (state == State::Failed).then(|| Failure::new("GUEST_PANIC", "It panicked."));
        View {
            record,
            live: None,
            deleted: false,
        }
    }

    #[tokio::test]
    async fn a_death_ends_the_wait_with_its_reason() {
        let running = view(State::Running);
        let id = running.record.id.clone();
        let (sender, mut receiver) = watch::channel(running);
        let monitor = MonitorIdentity {
            pid: 1,
            start_time_ticks: 1,
            boot_id: None,
        };
        let waiting = tokio::spawn(async move { death(&id, monitor, &mut receiver).await });
        sender.send_replace(view(State::Stopping));
        sender.send_replace(view(State::Failed));
        let error = waiting.await.unwrap();
        assert!(
            matches!(&error, UseError::Died { failure, .. } if failure.reason == "GUEST_PANIC")
        );
        assert_eq!(status(&error).code(), Code::Unavailable);
    }

    #[test]
    fn only_a_running_sandbox_is_usable() {
        let error = |state| usable(&view(state)).unwrap_err();
        assert!(matches!(
            error(State::Starting),
            UseError::NotRunning { .. }
        ));
        assert!(
            error(State::Stopping)
                .to_string()
                .ends_with("make another one")
        );
        assert!(matches!(error(State::Failed), UseError::Failed { .. }));
        assert!(matches!(error(State::Stopped), UseError::NotFound(_)));
    }
}
