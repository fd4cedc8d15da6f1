//! Records on disk: an embedded transactional database and the one thread that
//! writes it.
//!
//! Each commit is an fsync. Changes that arrive while one is under way share
//! the next, so a burst of sandboxes costs few of them.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::mpsc;
use std::thread::JoinHandle;

use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use tokio::sync::oneshot;

use crate::id::{SandboxId, SnapshotId};
use crate::record::{RequestRecord, SandboxRecord, SnapshotRecord};

const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");
const SANDBOXES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("sandboxes");
const REQUESTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("requests");
const SNAPSHOTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("snapshots");

/// Raised when an older daemon could no longer make sense of the tables.
const SCHEMA_VERSION: u64 = 1;
const SCHEMA_VERSION_KEY: &str = "schema_version";
/// The highest `sequence` that a record has had: those of sandboxes that are gone
/// are not given out again.
const LAST_SEQUENCE_KEY: &str = "last_sequence";

/// One write. Those given to [`Store::commit`] together become durable together.
#[derive(Debug)]
pub enum Change {
    PutSandbox(SandboxRecord),
    RemoveSandbox(SandboxId),
    PutRequest(String, RequestRecord),
    RemoveRequest(String),
    PutSnapshot(SnapshotRecord),
    RemoveSnapshot(SnapshotId),
}

/// What the database held when it was opened.
#[derive(Debug, Default)]
pub struct Loaded {
    pub sandboxes: Vec<SandboxRecord>,
    pub requests: Vec<(String, RequestRecord)>,
    pub snapshots: Vec<SnapshotRecord>,
    /// The highest that a sandbox or snapshot has had, also one that is gone.
    pub last_sequence: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(
        "the records in {path} cannot be opened; see whether the disk is full or read-only, or move the file away to begin without them"
    )]
    Database { path: PathBuf, source: redb::Error },
    #[error(
        "the records in {path} were written by a newer soulboxd (schema {found}, this one knows {SCHEMA_VERSION}); run that version"
    )]
    Newer { path: PathBuf, found: u64 },
    #[error(
        "the record {key:?} in {path} does not decode; move the file away to begin without records"
    )]
    Record {
        path: PathBuf,
        key: String,
        source: serde_json::Error,
    },
    #[error("the thread that writes records cannot be started; see the limit on threads")]
    Thread { source: std::io::Error },
}

#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    #[error(
        "a record cannot be written: {0}; see whether the disk of state_dir is full or read-only"
    )]
    Write(String),
    #[error(
        "a record cannot be written: the disk of state_dir is full; delete snapshots or sandboxes and try again"
    )]
    Full,
    #[error("the record store is closed because soulboxd is stopping; try again when it runs")]
    Closed,
}

/// The open database. Dropping it waits for what was committed.
#[derive(Debug)]
pub struct Store {
    writer: Mutex<Option<mpsc::Sender<Job>>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Job {
    changes: Vec<Change>,
    done: oneshot::Sender<Result<(), CommitError>>,
}

// === impl Store ===

impl Store {
    /// Opens or makes the database at `path` and reads all of it.
    pub fn open(path: &Path) -> Result<(Self, Loaded), OpenError> {
        let failed = |source: redb::Error| OpenError::Database {
            path: path.to_owned(),
            source,
        };
        let database = Database::create(path).map_err(|error| failed(error.into()))?;
        let found = prepare(&database).map_err(failed)?;
        if found > SCHEMA_VERSION {
            return Err(OpenError::Newer {
                path: path.to_owned(),
                found,
            });
        }
        let (last_sequence, rows) = read(&database).map_err(failed)?;
        let loaded = Loaded {
            last_sequence,
            ..decode(path, rows)?
        };
        let (writer, jobs) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("store".to_owned())
            .spawn({
                let path = path.to_owned();
                move || write_jobs(&path, database, &jobs)
            })
            .map_err(|source| OpenError::Thread { source })?;
        let store = Self {
            writer: Mutex::new(Some(writer)),
            thread: Some(thread),
        };
        Ok((store, loaded))
    }

    /// Returns when all of `changes` are durable, or none of them is.
    pub async fn commit(&self, changes: Vec<Change>) -> Result<(), CommitError> {
        let (done, outcome) = oneshot::channel();
        {
            let writer = crate::sync::lock(&self.writer);
            let writer = writer.as_ref().ok_or(CommitError::Closed)?;
            writer
                .send(Job { changes, done })
                .map_err(|_| CommitError::Closed)?;
        }
        outcome.await.unwrap_or(Err(CommitError::Closed))
    }
}

#[cfg(test)]
impl Store {
    /// From now on every commit fails.
    pub(crate) fn close(&self) {
        *crate::sync::lock(&self.writer) = None;
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        *crate::sync::lock(&self.writer) = None;
        if let Some(thread) = self.thread.take() {
            // The thread has no panics of its own to hand on.
            let _ = thread.join();
        }
    }
}

/// Makes the tables and returns the schema version that the file has.
fn prepare(database: &Database) -> Result<u64, redb::Error> {
    let transaction = database.begin_write()?;
    let found;
    {
        let mut meta = transaction.open_table(META)?;
        let stored = meta.get(SCHEMA_VERSION_KEY)?.map(|version| version.value());
        found = stored.unwrap_or(SCHEMA_VERSION);
        if stored.is_none() {
            meta.insert(SCHEMA_VERSION_KEY, SCHEMA_VERSION)?;
        }
        transaction.open_table(SANDBOXES)?;
        transaction.open_table(REQUESTS)?;
        transaction.open_table(SNAPSHOTS)?;
    }
    transaction.commit()?;
    Ok(found)
}

type Row = (String, Vec<u8>);

#[derive(Debug)]
struct Rows {
    sandboxes: Vec<Row>,
    requests: Vec<Row>,
    snapshots: Vec<Row>,
}

/// The highest sequence, and all rows.
fn read(database: &Database) -> Result<(u64, Rows), redb::Error> {
    let transaction = database.begin_read()?;
    let meta = transaction.open_table(META)?;
    let last_sequence = meta.get(LAST_SEQUENCE_KEY)?.map(|stored| stored.value());
    let rows = |definition| -> Result<Vec<Row>, redb::Error> {
        let mut rows = Vec::new();
        for row in transaction.open_table(definition)?.iter()? {
            let (key, value): (redb::AccessGuard<'_, &str>, redb::AccessGuard<'_, &[u8]>) = row?;
            rows.push((key.value().to_owned(), value.value().to_vec()));
        }
        Ok(rows)
    };
    let rows = Rows {
        sandboxes: rows(SANDBOXES)?,
        requests: rows(REQUESTS)?,
        snapshots: rows(SNAPSHOTS)?,
    };
    Ok((last_sequence.unwrap_or(0), rows))
}

fn decode(path: &Path, rows: Rows) -> Result<Loaded, OpenError> {
    fn one<T: serde::de::DeserializeOwned>(
        path: &Path,
        (key, value): Row,
    ) -> Result<(String, T), OpenError> {
        match serde_json::from_slice(&value) {
            Ok(record) => Ok((key, record)),
            Err(source) => Err(OpenError::Record {
                path: path.to_owned(),
                key,
                source,
            }),
        }
    }
    let mut loaded = Loaded::default();
    for row in rows.sandboxes {
        loaded.sandboxes.push(one(path, row)?.1);
    }
    for row in rows.requests {
        loaded.requests.push(one(path, row)?);
    }
    for row in rows.snapshots {
        loaded.snapshots.push(one(path, row)?.1);
    }
    loaded
        .sandboxes
        .sort_by_key(|record: &SandboxRecord| record.sequence);
    Ok(loaded)
}

/// Runs until every sender is gone.
fn write_jobs(path: &Path, database: Database, jobs: &mpsc::Receiver<Job>) {
    let mut open = Some(database);
    while let Ok(first) = jobs.recv() {
        let batch: Vec<Job> = std::iter::once(first).chain(jobs.try_iter()).collect();
        let outcome = match &open {
            Some(database) => write(database, batch.iter().flat_map(|job| &job.changes)),
            None => Database::open(path)
                .map_err(|error| WriteError::Database(error.into()))
                .and_then(|database| {
                    let database = open.insert(database);
                    write(database, batch.iter().flat_map(|job| &job.changes))
                }),
        };
        if matches!(outcome, Err(WriteError::Database(_))) {
            // After an error of the disk, redb takes no more writes until it has
            // been opened again.
            open = None;
        }
        for job in batch {
            let told = match &outcome {
                Ok(()) => Ok(()),
                Err(error) if error.is_full_disk() => Err(CommitError::Full),
                Err(error) => Err(CommitError::Write(error.to_string())),
            };
            // A caller that has gone away does not care any more.
            let _ = job.done.send(told);
        }
    }
}

fn write<'a>(
    database: &Database,
    changes: impl Iterator<Item = &'a Change>,
) -> Result<(), WriteError> {
    let transaction = database.begin_write().map_err(redb::Error::from)?;
    {
        let mut sandboxes = transaction
            .open_table(SANDBOXES)
            .map_err(redb::Error::from)?;
        let mut requests = transaction
            .open_table(REQUESTS)
            .map_err(redb::Error::from)?;
        let mut snapshots = transaction
            .open_table(SNAPSHOTS)
            .map_err(redb::Error::from)?;
        let mut last_sequence = 0;
        for change in changes {
            match change {
                Change::PutSandbox(record) => {
                    last_sequence = last_sequence.max(record.sequence);
                    let json = serde_json::to_vec(record)?;
                    sandboxes.insert(record.id.as_str(), json.as_slice())
                }
                Change::RemoveSandbox(id) => sandboxes.remove(id.as_str()),
                Change::PutRequest(id, record) => {
                    let json = serde_json::to_vec(record)?;
                    requests.insert(id.as_str(), json.as_slice())
                }
                Change::RemoveRequest(id) => requests.remove(id.as_str()),
                Change::PutSnapshot(record) => {
                    last_sequence = last_sequence.max(record.sequence);
                    let json = serde_json::to_vec(record)?;
                    snapshots.insert(record.id.as_str(), json.as_slice())
                }
                Change::RemoveSnapshot(id) => snapshots.remove(id.as_str()),
            }
            .map_err(redb::Error::from)?;
        }
        let mut meta = transaction.open_table(META).map_err(redb::Error::from)?;
        let stored = meta
            .get(LAST_SEQUENCE_KEY)
            .map_err(redb::Error::from)?
            .map_or(0, |stored| stored.value());
        if last_sequence > stored {
            meta.insert(LAST_SEQUENCE_KEY, last_sequence)
                .map_err(redb::Error::from)?;
        }
    }
    transaction.commit().map_err(redb::Error::from)?;
    Ok(())
}

#[derive(Debug, thiserror::Error)]
enum WriteError {
    #[error(transparent)]
    Database(#[from] redb::Error),
    #[error(transparent)]
    Encode(#[from] serde_json::Error),
}

// === impl WriteError ===

impl WriteError {
    fn is_full_disk(&self) -> bool {
        use std::io::ErrorKind;

        matches!(
            self,
            Self::Database(redb::Error::Io(error))
                if matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::sample;
    use crate::record::{Failure, State};

    #[tokio::test]
    async fn records_survive_reopening() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.redb");
        let mut kept = sample(State::Failed);
        kept.failure = Some(Failure {
            reason: "GUEST_PANIC".to_owned(),
            message: "The guest's kernel panicked.".to_owned(),
            console_tail: "\u{fffd} Kernel panic".to_owned(),
        });
        let mut gone = sample(State::Running);
        gone.sequence = 9;
        let request = RequestRecord {
            body: serde_json::json!({"template": "base"}),
            sandbox: kept.id.clone(),
            reply: None,
            forget_at: None,
        };
        {
            let (store, loaded) = Store::open(&path).unwrap();
            assert!(loaded.sandboxes.is_empty() && loaded.requests.is_empty());
            store
                .commit(vec![
                    Change::PutSandbox(kept.clone()),
                    Change::PutSandbox(gone.clone()),
                    Change::PutRequest("r".to_owned(), request.clone()),
                ])
                .await
                .unwrap();
            store
                .commit(vec![Change::RemoveSandbox(gone.id)])
                .await
                .unwrap();
        }
        let (_store, loaded) = Store::open(&path).unwrap();
        assert_eq!(loaded.sandboxes, [kept]);
        // No later sandbox gets the number of one that is gone.
        assert_eq!(loaded.last_sequence, 9);
        assert_eq!(loaded.requests, [("r".to_owned(), request)]);
    }

    #[tokio::test]
    async fn concurrent_commits_all_become_durable() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.redb");
        {
            let (store, _) = Store::open(&path).unwrap();
            let store = std::sync::Arc::new(store);
            let writes: Vec<_> = (0..64)
                .map(|_| {
                    let store = std::sync::Arc::clone(&store);
                    tokio::spawn(async move {
                        store
                            .commit(vec![Change::PutSandbox(sample(State::Pending))])
                            .await
                    })
                })
                .collect();
            for write in writes {
                write.await.unwrap().unwrap();
            }
        }
        assert_eq!(Store::open(&path).unwrap().1.sandboxes.len(), 64);
    }

    #[test]
    fn a_newer_schema_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.redb");
        drop(Store::open(&path).unwrap());
        {
            let database = Database::create(&path).unwrap();
            let transaction = database.begin_write().unwrap();
            transaction
                .open_table(META)
                .unwrap()
                .insert(SCHEMA_VERSION_KEY, SCHEMA_VERSION + 1)
                .unwrap();
            transaction.commit().unwrap();
        }
        assert!(matches!(
            Store::open(&path),
            Err(OpenError::Newer { found: 2, .. })
        ));
    }

    #[test]
    fn a_file_that_is_no_database_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.redb");
        std::fs::write(&path, b"not a database".repeat(100)).unwrap();
        assert!(matches!(
            Store::open(&path),
            Err(OpenError::Database { .. })
        ));
    }
}
