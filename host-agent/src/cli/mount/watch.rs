//! Keeps watch in the guest over all that is mounted, for as long as the sandbox is
//! there. While nobody watches, nothing is kept.

use std::sync::Arc;
use std::time::{Duration, Instant};

use soulbox_proto::guest::v1::{WatchEvent, WatchRequest, watch_event, watch_response};
use tokio::sync::watch;
use tonic::{Code, Status};

use super::errno::reason;
use super::guest::Guest;
use super::tree::Stale;
use crate::cli::place::answer;

/// A daemon that restarts is back by then; its sandboxes run on meanwhile.
const LOST: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// What is known of the watch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum State {
    Starting,
    Watching,
    /// The guest cannot: its words.
    Refused(String),
}

#[derive(Debug, PartialEq, Eq)]
enum End {
    /// The sandbox is not there any more, or does not run.
    Gone,
    /// The way to it broke.
    Lost,
    /// It does not watch.
    Refused,
}

/// Returns when the sandbox is gone, with what was said last.
pub(super) async fn keep(guest: Arc<Guest>, state: watch::Sender<State>) -> Status {
    let mut lost_since: Option<Instant> = None;
    let mut pause = FIRST_PAUSE;
    loop {
        let status = once(&guest, &state).await;
        if guest.tree().is_watched() {
            let stale = guest.tree().unwatched();
            guest.invalidations.send(stale).await;
            lost_since = None;
            pause = FIRST_PAUSE;
        }
        match judge(&status) {
            End::Gone => return status,
            End::Lost => {
                let since = *lost_since.get_or_insert_with(Instant::now);
                if since.elapsed() > LOST {
                    return status;
                }
                pause = pause.min(Duration::from_secs(1));
            }
            End::Refused => lost_since = None,
        }
        state.send_replace(State::Refused(status.message().to_owned()));
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// One watch, to its end.
async fn once(guest: &Guest, state: &watch::Sender<State>) -> Status {
    let request = WatchRequest {
        path: guest.watched.path(guest.base.clone()),
        recursive: true,
    };
    let mut client = guest.watched.client.clone();
    let mut events = match answer(client.watch(request)).await {
        Ok(events) => events,
        Err(status) => return status,
    };
    loop {
        let message = match events.message().await {
            Ok(Some(response)) => response.message,
            Ok(None) => return Status::unknown("the watch ended without a word"),
            Err(status) => return status,
        };
        let stale = match message {
            Some(watch_response::Message::Ready(_)) => guest.tree().watched(),
            Some(watch_response::Message::Event(event)) => stale_by(guest, &event),
            Some(watch_response::Message::Overflow(_)) => guest.tree().overflowed(),
            None => continue,
        };
        guest.invalidations.send(stale).await;
        if guest.tree().is_watched() {
            state.send_if_modified(|state| {
                std::mem::replace(state, State::Watching) != State::Watching
            });
        }
    }
}

fn stale_by(guest: &Guest, event: &WatchEvent) -> Vec<Stale> {
    use watch_event::Kind;
    let kind = event.kind();
    // Names below a directory that is elsewhere now, or gone, lead to others.
    let whole_tree = !matches!(kind, Kind::Written | Kind::Attributes);
    let mut tree = guest.tree();
    let mut stale = tree.changed(&event.path, whole_tree);
    if kind == Kind::Renamed {
        stale.extend(tree.changed(&event.from, whole_tree));
    }
    stale
}

fn judge(status: &Status) -> End {
    match (reason(status).as_deref(), status.code()) {
        // An agent from before there was a watch.
        (None, Code::Unimplemented) => End::Refused,
        (Some("DRAINING" | "SANDBOX_BUSY"), _) | (None, _) => End::Lost,
        (Some(_), Code::Unavailable) => End::Gone,
        (Some(reason), _) if reason.starts_with("SANDBOX_") => End::Gone,
        (Some("INVALID_REQUEST"), _) => End::Gone,
        (Some(_), _) => End::Refused,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use soulbox_proto::ERROR_DOMAIN;
    use tonic_types::{ErrorDetails, StatusExt as _};

    use super::*;

    #[test]
    fn only_a_sandbox_that_is_gone_ends_a_mount_at_once() {
        let said = |code, reason: &str| {
            let details = ErrorDetails::with_error_info(reason, ERROR_DOMAIN, HashMap::new());
            judge(&Status::with_error_details(code, "", details))
        };
        assert_eq!(said(Code::Unavailable, "SANDBOX_PAUSED"), End::Gone);
        assert_eq!(said(Code::Unavailable, "GUEST_PANIC"), End::Gone);
        assert_eq!(said(Code::NotFound, "SANDBOX_NOT_FOUND"), End::Gone);
        assert_eq!(said(Code::Unavailable, "DRAINING"), End::Lost);
        assert_eq!(
            said(Code::ResourceExhausted, "OUT_OF_RESOURCES"),
            End::Refused
        );
        assert_eq!(said(Code::NotFound, "FILE_NOT_FOUND"), End::Refused);
        assert_eq!(judge(&Status::unavailable("broken pipe")), End::Lost);
        assert_eq!(judge(&Status::unimplemented("")), End::Refused);
    }
}
