//! `Exec`: the caller's stream and the guest's, joined.
//!
//! Nothing is buffered here but one message each way: a caller that does not
//! read stops the guest's program through the windows of HTTP/2.

use std::sync::Arc;
use std::time::Duration;

use soulbox_proto::guest::MAX_REQUEST_BYTES;
use soulbox_proto::guest::v1::{self as guest, ExecResponse};
use soulbox_proto::host::v1::{ExecRequest, ExecStart, exec_request};
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tonic::{Code, Status, Streaming};

use super::agent::told;
use super::sandboxes::invalid;
use crate::guest::Guest;
use crate::id::SandboxId;
use crate::record::{MonitorIdentity, State};
use crate::sandbox::{Live, Pool, UseError, View};
use crate::status::status;

/// How long a broken connection to a guest may wait for the news that explains
/// it.
const EXPLANATION: Duration = Duration::from_millis(800);

type Responses = mpsc::Sender<Result<ExecResponse, Status>>;

/// Starts the program and returns what it will say.
pub(super) async fn exec(
    pool: Arc<Pool>,
    mut requests: Streaming<ExecRequest>,
    call: TaskTrackerToken,
) -> Result<impl Stream<Item = Result<ExecResponse, Status>> + use<>, Status> {
    let first = requests.message().await;
    let first = first.map_err(|status| unreadable("start", status))?;
    let start = match first.and_then(|request| request.message) {
        Some(exec_request::Message::Start(start)) => start,
        Some(exec_request::Message::Input(_)) | None => {
            return Err(invalid("start", "is missing; send it first".to_owned()));
        }
    };
    let ExecStart {
        sandbox_id,
        process,
        delete_sandbox_after,
    } = start;
    let id: SandboxId = sandbox_id
        .parse()
        .map_err(|_| invalid("start.sandbox_id", "is not a sandbox id".to_owned()))?;
    let after = delete_sandbox_after.then(|| (Arc::clone(&pool), id.clone()));
    let (responses, stream) = mpsc::channel(1);
    let Some(process) = process else {
        finish(after).await;
        return Err(invalid(
            "start.process",
            "is missing; say what to run".to_owned(),
        ));
    };
    tokio::spawn(async move {
        let _call = call;
        let proxied = tokio::select! {
            proxied = proxy(&pool, &id, process, delete_sandbox_after, requests, &responses) => proxied,
            // The caller is gone: dropping the guest's streams kills the program.
            () = responses.closed() => Ok(()),
        };
        // The caller learns of the end when the sandbox is gone, if it asked
        // for that.
        finish(after).await;
        if let Err(status) = proxied {
            // A caller that is gone needs no status.
            let _ = responses.send(Err(status)).await;
        }
    });
    Ok(ReceiverStream::new(stream))
}

async fn finish(after: Option<(Arc<Pool>, SandboxId)>) {
    if let Some((pool, id)) = after
        // Its program is over, and its disk goes with it: nothing is left that a
        // clean stop would save.
        && let Err(error) = pool.delete(&id, true).await
    {
        tracing::error!(sandbox = %id, %error, "not deleted after its program");
    }
}

async fn proxy(
    pool: &Pool,
    id: &SandboxId,
    process: guest::ProcessSpec,
    delete_sandbox_after: bool,
    requests: Streaming<ExecRequest>,
    responses: &Responses,
) -> Result<(), Status> {
    let mut view = pool.view(id).map_err(|error| status(&error))?;
    let live = usable(&view.borrow()).map_err(|error| status(&error))?;
    if delete_sandbox_after {
        // Before anything runs: this daemon may not live to delete it.
        let recorded = pool.go_with_exec(id).await;
        recorded.map_err(|error| status(&error))?;
    }
    let (refused, refusal) = mpsc::channel(1);
    let input = input(process, requests, refused);
    let ended = {
        let relayed = relay(live.guest.clone(), input, refusal, responses);
        tokio::select! {
            // What the guest has said goes first: a program may end its sandbox.
            biased;
            relayed = relayed => relayed,
            error = death(id, live.monitor(), &mut view) => return Err(status(&error)),
        }
    };
    match ended {
        Ok(()) => Ok(()),
        Err(Broken::Caller(status)) => Err(status),
        Err(Broken::Guest(said)) if is_connection_loss(&said) => {
            tracing::debug!(sandbox = %id, status = %said, "the connection to the agent broke");
            let explained =
                tokio::time::timeout(EXPLANATION, death(id, live.monitor(), &mut view)).await;
            Err(status(
                &explained.unwrap_or_else(|_| UseError::Lost { id: id.clone() }),
            ))
        }
        Err(Broken::Guest(said)) => Err(told(&said)),
    }
}

/// Whose status ends a call before the program.
enum Broken {
    /// It is for the caller as it is.
    Caller(Status),
    /// From the guest's agent, or about the connection to it.
    Guest(Status),
}

async fn relay(
    guest: Guest,
    input: impl Stream<Item = guest::ExecRequest> + Send + 'static,
    mut refusal: mpsc::Receiver<Status>,
    responses: &Responses,
) -> Result<(), Broken> {
    let mut events = guest.exec(input).await.map_err(Broken::Guest)?;
    loop {
        let event = tokio::select! {
            event = events.message() => event.map_err(Broken::Guest)?,
            Some(status) = refusal.recv() => return Err(Broken::Caller(status)),
        };
        let Some(event) = event else { return Ok(()) };
        if responses.send(Ok(event)).await.is_err() {
            return Ok(());
        }
    }
}

/// The caller's messages as the guest takes them. A message that is none ends
/// the input, and its status goes to `refused`.
fn input(
    process: guest::ProcessSpec,
    requests: Streaming<ExecRequest>,
    refused: mpsc::Sender<Status>,
) -> impl Stream<Item = guest::ExecRequest> + Send + 'static {
    use tokio_stream::StreamExt as _;

    let start = guest::ExecRequest {
        message: Some(guest::exec_request::Message::Start(process)),
    };
    // The sender lives as long as the input: its end is no refusal.
    let rest = requests.map_while(move |request| {
        let status = match request {
            Ok(ExecRequest {
                message: Some(exec_request::Message::Input(input)),
            }) => {
                return Some(guest::ExecRequest {
                    message: Some(guest::exec_request::Message::Input(input)),
                });
            }
            Ok(_) => invalid(
                "input",
                "is missing; after start, send only input".to_owned(),
            ),
            Err(status) => unreadable("input", status),
        };
        // One refusal is enough.
        let _ = refused.try_send(status);
        None
    });
    tokio_stream::once(start).chain(rest)
}

/// A request that could not be read: it is too large, or the caller has gone.
fn unreadable(field: &str, status: Status) -> Status {
    match status.code() {
        Code::OutOfRange => invalid(
            field,
            format!("has more than {MAX_REQUEST_BYTES} bytes; pass data through stdin or a file"),
        ),
        _ => status,
    }
}

fn usable(view: &View) -> Result<Arc<Live>, UseError> {
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
async fn death(
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

/// Whether a status is one that this end made because the connection broke.
/// What an agent says carries details.
fn is_connection_loss(status: &Status) -> bool {
    status.details().is_empty()
        && matches!(
            status.code(),
            Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled
        )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Failure;
    use crate::record::tests::sample;

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

    #[test]
    fn what_an_agent_says_is_no_connection_loss() {
        assert!(is_connection_loss(&Status::unavailable(
            "tcp connect error"
        )));
        assert!(!is_connection_loss(&Status::not_found("")));
        assert!(!is_connection_loss(&invalid("argv", String::new())));
    }
}
