//! Requests that carried an id: a repeated one gets the reply of the first,
//! also while that is not there yet.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;

use crate::id::SandboxId;
use crate::record::{Reply, RequestRecord};
use crate::store::Change;
use crate::sync::lock;
use crate::time::UnixMillis;

/// How long a reply outlives its sandbox: far longer than a caller retries.
const REMEMBER: Duration = Duration::from_secs(10 * 60);

#[derive(Debug, Clone, Default)]
pub(super) struct Requests {
    entries: Arc<Mutex<HashMap<String, Entry>>>,
}

#[derive(Debug)]
struct Entry {
    body: serde_json::Value,
    reply: watch::Sender<Option<Reply>>,
    /// What is stored of it; none while its request has not been admitted.
    record: Option<RequestRecord>,
}

/// What to do with a request.
#[derive(Debug)]
pub(super) enum Claim {
    /// It is the first with this id.
    First(Claimed),
    /// The same was asked before: its reply is here, or will be. The sender
    /// goes without one when that request was refused before it was admitted.
    Repeated(watch::Receiver<Option<Reply>>),
    /// Something else was asked under this id.
    Reused,
}

/// The right to answer a request. Dropped without an admission, it frees the id.
#[derive(Debug)]
pub(super) struct Claimed {
    requests: Requests,
    id: String,
}

// === impl Requests ===

impl Requests {
    pub(super) fn load(stored: impl IntoIterator<Item = (String, RequestRecord)>) -> Self {
        let requests = Self::default();
        {
            let mut entries = lock(&requests.entries);
            for (id, record) in stored {
                let entry = Entry {
                    body: record.body.clone(),
                    reply: watch::Sender::new(record.reply.clone()),
                    record: Some(record),
                };
                entries.insert(id, entry);
            }
        }
        requests
    }

    pub(super) fn claim(&self, id: &str, body: &serde_json::Value) -> Claim {
        let mut entries = lock(&self.entries);
        match entries.get(id) {
            Some(entry) if entry.body == *body => Claim::Repeated(entry.reply.subscribe()),
            Some(_) => Claim::Reused,
            None => {
                let entry = Entry {
                    body: body.clone(),
                    reply: watch::Sender::new(None),
                    record: None,
                };
                entries.insert(id.to_owned(), entry);
                Claim::First(Claimed {
                    requests: self.clone(),
                    id: id.to_owned(),
                })
            }
        }
    }

    /// Sets how long the entry stays, now that its `sandbox` is gone; one without a
    /// reply, or whose reply a retry may better, does not stay. The change is to be
    /// stored with the sandbox's removal.
    pub(super) fn sandbox_gone(&self, id: &str, sandbox: &SandboxId) -> Option<Change> {
        let mut entries = lock(&self.entries);
        let Some(record) = entries.get_mut(id).and_then(|entry| entry.record.as_mut()) else {
            // Nobody has the id now, or somebody who has stored nothing yet.
            return Some(Change::RemoveRequest(id.to_owned()));
        };
        if record.sandbox != *sandbox {
            return None;
        }
        if !record.reply.as_ref().is_some_and(stands) {
            return Some(Change::RemoveRequest(id.to_owned()));
        }
        record.forget_at = Some(UnixMillis::now().plus(REMEMBER));
        Some(Change::PutRequest(id.to_owned(), record.clone()))
    }

    /// Forgets what is due. The changes are to be stored.
    pub(super) fn forget_due(&self) -> Vec<Change> {
        let now = UnixMillis::now();
        let mut forgotten = Vec::new();
        lock(&self.entries).retain(|id, entry| {
            let record = entry.record.as_ref();
            let due = record
                .and_then(|record| record.forget_at)
                .is_some_and(|at| at <= now);
            if due {
                forgotten.push(Change::RemoveRequest(id.clone()));
            }
            !due
        });
        forgotten
    }

    /// Forgets one that no call of this daemon will answer.
    pub(super) fn forget_unanswered(&self, id: &str) {
        let mut entries = lock(&self.entries);
        if entries
            .get(id)
            .is_some_and(|entry| entry.reply.borrow().is_none())
        {
            entries.remove(id);
        }
    }
}

// === impl Claimed ===

impl Claimed {
    /// The request has become a sandbox. The change is to be stored with it.
    pub(super) fn admitted(&self, sandbox: &SandboxId) -> Option<Change> {
        let mut entries = lock(&self.requests.entries);
        let entry = entries.get_mut(&self.id)?;
        let record = RequestRecord {
            body: entry.body.clone(),
            sandbox: sandbox.clone(),
            reply: None,
            forget_at: None,
        };
        entry.record = Some(record.clone());
        Some(Change::PutRequest(self.id.clone(), record))
    }

    /// What to store before [`Self::answer`].
    pub(super) fn prepare_answer(&self, reply: &Reply) -> Option<Change> {
        let mut entries = lock(&self.requests.entries);
        let record = entries.get_mut(&self.id)?.record.as_mut()?;
        record.reply = Some(reply.clone());
        if matches!(reply, Reply::Refused(_)) {
            record.forget_at = Some(UnixMillis::now().plus(REMEMBER));
        }
        Some(Change::PutRequest(self.id.clone(), record.clone()))
    }

    /// Wakes whoever repeats the request.
    pub(super) fn answer(self, reply: Reply) {
        let mut entries = lock(&self.requests.entries);
        if let Some(entry) = entries.get(&self.id) {
            let stays = entry.record.is_some() && stands(&reply);
            entry.reply.send_replace(Some(reply));
            if !stays {
                // The reply is only for those who wait now.
                entries.remove(&self.id);
            }
        }
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        let mut entries = lock(&self.requests.entries);
        let unanswered = entries
            .get(&self.id)
            .is_some_and(|entry| entry.reply.borrow().is_none());
        if unanswered {
            entries.remove(&self.id);
        }
    }
}

/// Whether a repeated request is to get `reply`, rather than another try.
fn stands(reply: &Reply) -> bool {
    match reply {
        Reply::Created { .. } => true,
        Reply::Refused(refusal) => !refusal.is_retryable(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::record::State;
    use crate::record::tests::sample;

    fn created() -> Reply {
        Reply::Created {
            record: Box::new(sample(State::Running)),
            stages: Vec::new(),
            restored: false,
        }
    }

    fn first(requests: &Requests) -> Claimed {
        match requests.claim("id", &json!(1)) {
            Claim::First(claimed) => claimed,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_repetition_waits_for_the_first_reply() {
        let requests = Requests::default();
        let claimed = first(&requests);
        let Claim::Repeated(mut waiting) = requests.claim("id", &json!(1)) else {
            panic!("not repeated");
        };
        assert!(matches!(requests.claim("id", &json!(2)), Claim::Reused));
        assert!(matches!(
            requests.claim("other", &json!(2)),
            Claim::First(_)
        ));
        claimed.admitted(&SandboxId::random().unwrap()).unwrap();
        claimed.prepare_answer(&created()).unwrap();
        claimed.answer(created());
        let reply = waiting.wait_for(Option::is_some).await.unwrap().clone();
        assert!(matches!(reply, Some(Reply::Created { .. })));
    }

    #[tokio::test]
    async fn a_request_that_was_not_admitted_frees_its_id() {
        let requests = Requests::default();
        let claimed = first(&requests);
        let Claim::Repeated(mut waiting) = requests.claim("id", &json!(1)) else {
            panic!("not repeated");
        };
        drop(claimed);
        assert!(waiting.wait_for(Option::is_some).await.is_err());
        drop(first(&requests));
    }

    #[test]
    fn an_entry_goes_some_time_after_its_sandbox() {
        let requests = Requests::default();
        let claimed = first(&requests);
        let sandbox = SandboxId::random().unwrap();
        claimed.admitted(&sandbox).unwrap();
        claimed.prepare_answer(&created()).unwrap();
        claimed.answer(created());
        assert!(requests.forget_due().is_empty());
        let other = SandboxId::random().unwrap();
        assert!(requests.sandbox_gone("id", &other).is_none());
        let Some(Change::PutRequest(id, mut record)) = requests.sandbox_gone("id", &sandbox) else {
            panic!("nothing to store");
        };
        assert!(record.forget_at.unwrap() > UnixMillis::now());
        assert!(requests.forget_due().is_empty());
        record.forget_at = Some(UnixMillis(1));
        let reloaded = Requests::load([(id, record)]);
        assert_eq!(reloaded.forget_due().len(), 1);
        drop(first(&reloaded));
    }

    #[tokio::test]
    async fn a_failure_that_a_retry_may_mend_frees_its_id() {
        use crate::sandbox::{CreateError, StartError};

        for (error, frees) in [(StartError::Stopping, true), (StartError::Protocol, false)] {
            let requests = Requests::default();
            let claimed = first(&requests);
            let Claim::Repeated(mut waiting) = requests.claim("id", &json!(1)) else {
                panic!("not repeated");
            };
            let sandbox = SandboxId::random().unwrap();
            claimed.admitted(&sandbox).unwrap();
            let reply = Reply::Refused((&CreateError::from(error)).into());
            claimed.prepare_answer(&reply).unwrap();
            let stored = requests.sandbox_gone("id", &sandbox);
            assert_eq!(matches!(stored, Some(Change::RemoveRequest(_))), frees);
            claimed.answer(reply);
            // Who waited is answered either way.
            assert!(waiting.wait_for(Option::is_some).await.is_ok());
            let again = requests.claim("id", &json!(2));
            assert_eq!(matches!(again, Claim::First(_)), frees, "{again:?}");
        }
    }
}
