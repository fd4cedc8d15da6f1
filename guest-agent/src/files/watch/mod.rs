//! Watch: what changes below a directory, by inotify(7).
//!
//! `watches` knows which directory a watch is of, `watcher` makes the protocol's events
//! of the kernel's; this is the call. It waits without a timer, but while a file is
//! being written or half a rename has been told.

mod watcher;
mod watches;

use std::time::Instant;

use soulbox_proto::guest::v1::{WatchReady, WatchResponse, watch_response};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use self::watcher::Watcher;
use super::jobs::{Jobs, Responses};
use super::place::Place;
use crate::status::internal;
use crate::sys::readiness::readable;

/// How many responses wait for a caller who reads slowly. Those after them wait in the
/// kernel, which counts and drops them when they are too many.
const WAITING: usize = 64;

/// Returns when nothing is missed any more.
pub(super) async fn watch(
    jobs: &Jobs,
    place: Place,
    recursive: bool,
) -> Result<Responses<WatchResponse>, Status> {
    let open = move |place: &Place, view: &_| Watcher::open(place, view, recursive);
    let watcher = jobs.at(place, open).await?;
    let events = readable(watcher.inotify())
        .map_err(|error| internal(format!("the watch cannot be waited for: {error}")))?;
    let (responses, stream) = mpsc::channel(WAITING);
    let ready = WatchReady {
        directories: watcher.directories(),
    };
    let ready = response(watch_response::Message::Ready(ready));
    // There is room for the first.
    let _ = responses.try_send(Ok(ready));
    let jobs = jobs.clone();
    tokio::spawn(async move { tell(jobs, watcher, events, responses).await });
    Ok(ReceiverStream::new(stream))
}

async fn tell<F: std::os::fd::AsRawFd>(
    jobs: Jobs,
    mut watcher: Watcher,
    events: AsyncFd<F>,
    responses: mpsc::Sender<Result<WatchResponse, Status>>,
) {
    loop {
        let deadline = watcher.deadline();
        tokio::select! {
            ready = events.readable(), if !watcher.has_more() => match ready {
                // Before they are read: one that comes meanwhile makes it ready again.
                Ok(mut ready) => ready.clear_ready(),
                Err(_) => break,
            },
            () = sleep_until(deadline) => {}
            () = std::future::ready(()), if watcher.has_more() => {}
            () = responses.closed() => break,
        }
        let turn = jobs.run(move || {
            let told = watcher.turn();
            Ok((watcher, told))
        });
        let told = match turn.await {
            Ok((back, told)) => {
                watcher = back;
                told
            }
            Err(status) => {
                let _ = responses.send(Err(status)).await;
                return;
            }
        };
        for told in told {
            let told = told.map(response).map_err(Status::from);
            let is_last = told.is_err();
            if responses.send(told).await.is_err() || is_last {
                break;
            }
        }
        if watcher.is_over() {
            break;
        }
    }
    drop(events);
    // The kernel takes its time to forget many watches.
    let close = move || {
        drop(watcher);
        Ok(())
    };
    let _ = jobs.run(close).await;
}

fn response(message: watch_response::Message) -> WatchResponse {
    WatchResponse {
        message: Some(message),
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}
