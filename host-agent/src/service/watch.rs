//! `WatchSandboxes`: what there is, then every change, until the watcher goes.

use std::collections::HashMap;

use soulbox_proto::host::v1::watch_sandboxes_response::Kind;
use soulbox_proto::host::v1::{self as proto};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::convert;
use crate::record::SandboxRecord;
use crate::sandbox::{ChangeKind, Subscription, WatchError};
use crate::status::status;

/// What waits for a watcher beside the shared list of changes.
const BUFFER: usize = 16;

pub(super) fn watch(
    subscription: Subscription,
    labels: HashMap<String, String>,
    stopping: CancellationToken,
) -> impl Stream<Item = Result<proto::WatchSandboxesResponse, Status>> + use<> {
    let (changes, stream) = mpsc::channel(BUFFER);
    tokio::spawn(async move {
        // A watcher that goes away ends this at the next send, or at once here.
        let gone = changes.clone();
        tokio::select! {
            () = feed(subscription, &labels, &changes) => {}
            () = gone.closed() => {}
            () = stopping.cancelled() => {
                // Unless the watcher has fallen behind: then it sees the end.
                let _ = changes.try_send(Err(status(&WatchError::Stopping)));
            }
        }
    });
    ReceiverStream::new(stream)
}

type Changes = mpsc::Sender<Result<proto::WatchSandboxesResponse, Status>>;

async fn feed(mut subscription: Subscription, labels: &HashMap<String, String>, changes: &Changes) {
    for record in std::mem::take(&mut subscription.current) {
        if record.matches(labels)
            && changes
                .send(Ok(response(Kind::Current, &record)))
                .await
                .is_err()
        {
            return;
        }
    }
    loop {
        let told = match subscription.changes.recv().await {
            Ok(change) if !change.record.matches(labels) => continue,
            Ok(change) => {
                let (kind, denied) = match &change.kind {
                    ChangeKind::Changed => (Kind::Changed, None),
                    ChangeKind::Deleted => (Kind::Deleted, None),
                    ChangeKind::Denied(denied) => (Kind::Denied, Some(denied.into())),
                };
                Ok(proto::WatchSandboxesResponse {
                    denied,
                    ..response(kind, &change.record)
                })
            }
            Err(RecvError::Lagged(missed)) => Err(status(&WatchError::FellBehind { missed })),
            Err(RecvError::Closed) => return,
        };
        let last = told.is_err();
        if changes.send(told).await.is_err() || last {
            return;
        }
    }
}

fn response(kind: Kind, record: &SandboxRecord) -> proto::WatchSandboxesResponse {
    proto::WatchSandboxesResponse {
        kind: kind.into(),
        sandbox: Some(convert::sandbox(record)),
        denied: None,
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::broadcast;
    use tokio_stream::StreamExt as _;
    use tonic_types::StatusExt as _;

    use super::*;
    use crate::record::State;
    use crate::record::tests::sample;
    use crate::sandbox::Change;

    fn start(
        capacity: usize,
        labels: &[(&str, &str)],
    ) -> (
        broadcast::Sender<Change>,
        impl Stream<Item = Result<proto::WatchSandboxesResponse, Status>> + use<>,
        CancellationToken,
    ) {
        let (sender, changes) = broadcast::channel(capacity);
        let subscription = Subscription {
            current: vec![sample(State::Running)],
            changes,
        };
        let labels = labels
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let stopping = CancellationToken::new();
        let stream = watch(subscription, labels.collect(), stopping.clone());
        (sender, stream, stopping)
    }

    fn change() -> Change {
        Change {
            kind: ChangeKind::Changed,
            record: sample(State::Running),
        }
    }

    #[tokio::test]
    async fn labels_choose_and_deletion_is_told() {
        let (sender, mut stream, stopping) = start(8, &[("team", "a")]);
        let mut other = change();
        other.record.labels.clear();
        sender.send(other).unwrap();
        sender
            .send(Change {
                kind: ChangeKind::Deleted,
                ..change()
            })
            .unwrap();
        assert_eq!(stream.next().await.unwrap().unwrap().kind(), Kind::Current);
        assert_eq!(stream.next().await.unwrap().unwrap().kind(), Kind::Deleted);
        stopping.cancel();
        assert_eq!(
            stream.next().await.unwrap().unwrap_err().code(),
            tonic::Code::Unavailable
        );
        assert!(stream.next().await.is_none());
    }

    #[tokio::test]
    async fn a_watcher_that_falls_behind_is_told_of_its_loss() {
        let (sender, mut stream, _stopping) = start(2, &[]);
        for _ in 0..100 {
            sender.send(change()).unwrap();
        }
        let mut last = None;
        while let Some(told) = stream.next().await {
            last = Some(told);
        }
        let status = last.unwrap().unwrap_err();
        assert_eq!(status.code(), tonic::Code::DataLoss);
        let details = status.get_error_details();
        assert_eq!(details.error_info().unwrap().reason, "WATCHER_FELL_BEHIND");
    }
}
