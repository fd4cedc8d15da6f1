//! Open files, and the streams by which their bytes travel.
//!
//! What a program reads in order is asked for in large parts, and ahead; what it
//! writes in order is one call to the guest. A write is answered when it is on its way; the call is
//! ended, and an error told, by fsync, close, and whatever else asks for the file.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Buf as _, Bytes};
use fuser::Errno;
use soulbox_proto::guest::v1::{
    CommitWrite, OpenWrite, ReadRequest, WriteRequest, WriteResponse, open_write, read_response,
    write_request,
};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;

use super::attributes::{Attributes, Identity};
use super::errno::errno;
use super::tree::Epoch;
use crate::cli::place::{Files, answer, in_time};

/// Chunks that are on their way to the guest, of at most 1 MiB.
const CHUNKS: usize = 4;
/// A file that nobody writes to for so long is closed in the guest.
const IDLE: Duration = Duration::from_secs(1);
/// Reads elsewhere, after which it is not read ahead any more.
const PATIENCE: u32 = 4;
/// What is read ahead at first; twice as much each time, until it is this.
const FIRST_RANGE_BYTES: u64 = 256 << 10;
const LAST_RANGE_BYTES: u64 = 4 << 20;

/// All that is open.
#[derive(Debug, Default)]
pub(super) struct Handles {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    handles: HashMap<u64, Arc<Handle>>,
    files: HashMap<u64, Arc<OpenFile>>,
    /// Listings that are being read.
    directories: HashMap<u64, Arc<super::listing::Reading>>,
}

/// One open(2).
#[derive(Debug)]
pub(super) struct Handle {
    pub(super) file: Arc<OpenFile>,
    pub(super) appends: bool,
    reader: tokio::sync::Mutex<Reader>,
}

/// What all that have opened a file share.
#[derive(Debug)]
pub(super) struct OpenFile {
    pub(super) ino: u64,
    writer: tokio::sync::Mutex<Option<Writer>>,
    state: Mutex<FileState>,
}

#[derive(Debug, Default)]
struct FileState {
    handles: u64,
    /// Of a write that had been answered.
    failed: Option<Errno>,
    /// It has lost its name and is kept under another.
    hidden: bool,
    /// What it gets when nobody writes to it any more: without w for its owner, only
    /// root could open it again.
    last_mode: Option<u32>,
}

#[derive(Debug)]
struct Reader {
    ahead: Option<Ahead>,
    /// What follows it, asked for before it is needed.
    next: Option<Ahead>,
    /// Of the next one.
    range: u64,
    /// Where the read before ended.
    end: u64,
    misses: u32,
    used: Instant,
}

/// A part of the file that is read ahead. It is taken in as it comes: what waited in a
/// call would hold up all others on the same connection.
#[derive(Debug)]
struct Ahead {
    chunks: mpsc::UnboundedReceiver<Result<Bytes, Errno>>,
    position: u64,
    end: u64,
    /// Received, not asked for yet.
    rest: Bytes,
    asked: Epoch,
    _task: AbortOnDropHandle<()>,
}

/// Why no more of a part came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Taken {
    All,
    PartEnded,
    FileEnded,
}

#[derive(Debug)]
struct Writer {
    requests: mpsc::Sender<WriteRequest>,
    reply: JoinHandle<Result<WriteResponse, Status>>,
    position: u64,
    appends: bool,
    used: Instant,
}

/// One read of a file.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) path: Bytes,
    pub(super) identity: Identity,
    pub(super) offset: u64,
    pub(super) size: usize,
    /// When it last changed, as far as is known.
    pub(super) now: Epoch,
    pub(super) unchanged_since: Epoch,
}

// === impl Handles ===

impl Handles {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A handle of the file, and its number.
    pub(super) fn open(&self, ino: u64, appends: bool) -> (u64, Arc<Handle>) {
        let mut table = self.table();
        let file = table.files.entry(ino).or_insert_with(|| {
            Arc::new(OpenFile {
                ino,
                writer: tokio::sync::Mutex::default(),
                state: Mutex::default(),
            })
        });
        let file = Arc::clone(file);
        file.state().handles += 1;
        table.next += 1;
        let number = table.next;
        let handle = Arc::new(Handle {
            file,
            appends,
            reader: tokio::sync::Mutex::default(),
        });
        table.handles.insert(number, Arc::clone(&handle));
        (number, handle)
    }

    pub(super) fn get(&self, number: u64) -> Option<Arc<Handle>> {
        self.table().handles.get(&number).cloned()
    }

    /// Of this file, if it is open.
    pub(super) fn file(&self, ino: u64) -> Option<Arc<OpenFile>> {
        self.table().files.get(&ino).cloned()
    }

    /// The file, where this was the last of its handles.
    pub(super) fn close(&self, number: u64) -> Option<Arc<OpenFile>> {
        let mut table = self.table();
        let file = Arc::clone(&table.handles.remove(&number)?.file);
        let left = {
            let mut state = file.state();
            state.handles -= 1;
            state.handles
        };
        if left > 0 {
            return None;
        }
        table.files.remove(&file.ino);
        Some(file)
    }

    pub(super) fn files(&self) -> Vec<Arc<OpenFile>> {
        self.table().files.values().cloned().collect()
    }

    /// What nobody reads any more is not kept in memory.
    pub(super) fn drop_idle(&self) {
        let handles: Vec<_> = self.table().handles.values().cloned().collect();
        for handle in handles {
            handle.drop_idle();
        }
    }

    pub(super) fn open_directory(&self, reading: super::listing::Reading) -> u64 {
        let mut table = self.table();
        table.next += 1;
        let number = table.next;
        table.directories.insert(number, Arc::new(reading));
        number
    }

    pub(super) fn directory(&self, number: u64) -> Option<Arc<super::listing::Reading>> {
        self.table().directories.get(&number).cloned()
    }

    pub(super) fn close_directory(&self, number: u64) {
        self.table().directories.remove(&number);
    }
}

// === impl OpenFile ===

impl OpenFile {
    fn state(&self) -> MutexGuard<'_, FileState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_hidden(&self, hidden: bool) {
        self.state().hidden = hidden;
    }

    pub(super) fn is_hidden(&self) -> bool {
        self.state().hidden
    }

    pub(super) fn set_last_mode(&self, mode: Option<u32>) {
        self.state().last_mode = mode;
    }

    pub(super) fn last_mode(&self) -> Option<u32> {
        self.state().last_mode
    }

    /// What went wrong with an earlier write, once.
    pub(super) fn take_failure(&self) -> Result<(), Errno> {
        self.state().failed.take().map_or(Ok(()), Err)
    }

    pub(super) fn set_failure(&self, errno: Errno) {
        self.state().failed = Some(errno);
    }

    /// Sends it on its way. The reply is that of a call that had to end first.
    pub(super) async fn write(
        &self,
        files: &Files,
        path: &Bytes,
        offset: u64,
        data: Bytes,
        appends: bool,
    ) -> Result<Option<WriteResponse>, Errno> {
        let mut writer = self.writer.lock().await;
        let goes_on = writer.as_ref().is_some_and(|writer| {
            !writer.reply.is_finished()
                && writer.appends == appends
                && (appends || writer.position == offset)
        });
        let mut ended = None;
        if !goes_on && let Some(before) = writer.take() {
            ended = Some(before.end().await?);
        }
        let current =
            writer.get_or_insert_with(|| Writer::open(files, path, offset, appends, false));
        let size = data.len() as u64;
        let message = write_request::Message::Data(data);
        if !current.send(message).await {
            // It ended before its time: it says why.
            let reply = match writer.take() {
                Some(writer) => writer.end().await,
                None => return Err(Errno::EIO),
            };
            reply?;
            return Err(Errno::EIO);
        }
        current.position = current.position.saturating_add(size);
        current.used = Instant::now();
        Ok(ended)
    }

    /// Ends the call that writes: what was written is where it should be.
    pub(super) async fn settle(&self) -> Result<Option<WriteResponse>, Errno> {
        let writer = self.writer.lock().await.take();
        match writer {
            Some(writer) => writer.end().await.map(Some),
            None => Ok(None),
        }
    }

    /// None: it is being written, or nobody writes.
    pub(super) async fn settle_idle(&self) -> Option<Result<WriteResponse, Errno>> {
        let mut writer = self.writer.try_lock().ok()?;
        let is_idle = writer.as_ref()?.used.elapsed() > IDLE;
        match is_idle {
            true => Some(writer.take()?.end().await),
            false => None,
        }
    }
}

// === impl Writer ===

impl Writer {
    fn open(files: &Files, path: &Bytes, offset: u64, appends: bool, sync: bool) -> Self {
        let (requests, stream) = mpsc::channel(CHUNKS);
        let open = OpenWrite {
            path: files.path(path.clone()),
            how: match appends {
                true => open_write::How::Append,
                false => open_write::How::InPlace,
            }
            .into(),
            offset: if appends { 0 } else { offset },
            sync,
            ..OpenWrite::default()
        };
        // The channel has just been made, so there is room.
        let _ = requests.try_send(message(write_request::Message::Open(open)));
        let mut client = files.client.clone();
        let reply = tokio::spawn(async move {
            let reply = client.write(ReceiverStream::new(stream)).await?;
            Ok(reply.into_inner())
        });
        Self {
            requests,
            reply,
            position: offset,
            appends,
            used: Instant::now(),
        }
    }

    async fn send(&self, said: write_request::Message) -> bool {
        let sent = in_time(async {
            let sent = self.requests.send(message(said)).await;
            sent.map_err(|_| Status::aborted(""))
        });
        sent.await.is_ok()
    }

    async fn end(mut self) -> Result<WriteResponse, Errno> {
        let commit = write_request::Message::Commit(CommitWrite {});
        // One that has ended says why below.
        self.send(commit).await;
        drop(self.requests);
        let reply = in_time(async {
            match (&mut self.reply).await {
                Ok(reply) => reply,
                Err(error) => Err(Status::internal(error.to_string())),
            }
        });
        let reply = reply.await;
        if reply.is_err() {
            self.reply.abort();
        }
        reply.map_err(|status| errno(&status))
    }
}

fn message(message: write_request::Message) -> WriteRequest {
    WriteRequest {
        message: Some(message),
    }
}

/// Opens the file for writing and closes it: whether that is allowed. Synced, it is
/// fsync(2).
pub(super) async fn touch(
    files: &Files,
    path: &Bytes,
    open: OpenWrite,
) -> Result<WriteResponse, Errno> {
    let open = OpenWrite {
        path: files.path(path.clone()),
        ..open
    };
    let messages = [
        message(write_request::Message::Open(open)),
        message(write_request::Message::Commit(CommitWrite {})),
    ];
    let mut client = files.client.clone();
    let reply = answer(client.write(tokio_stream::iter(messages))).await;
    reply.map_err(|status| errno(&status))
}

// === impl Handle ===

impl Handle {
    /// Starts to read from the beginning: whether that is allowed.
    pub(super) async fn start_reading(&self, files: &Files, wanted: &Wanted) -> Result<(), Errno> {
        let mut reader = self.reader.lock().await;
        let mut ahead = Ahead::start(files, wanted, 0, FIRST_RANGE_BYTES);
        ahead.more().await?;
        reader.ahead = Some(ahead);
        Ok(())
    }

    /// Fewer than asked for at the file's end alone.
    pub(super) async fn read(&self, files: &Files, wanted: &Wanted) -> Result<Vec<u8>, Errno> {
        let mut reader = self.reader.lock().await;
        reader.read(files, wanted).await
    }

    fn drop_idle(&self) {
        if let Ok(mut reader) = self.reader.try_lock()
            && reader.used.elapsed() > IDLE
        {
            reader.stop();
        }
    }
}

// === impl Reader ===

impl Default for Reader {
    fn default() -> Self {
        Self {
            ahead: None,
            next: None,
            range: FIRST_RANGE_BYTES,
            end: 0,
            misses: 0,
            used: Instant::now(),
        }
    }
}

impl Reader {
    fn stop(&mut self) {
        self.ahead = None;
        self.next = None;
        self.range = FIRST_RANGE_BYTES;
        self.misses = 0;
    }

    async fn read(&mut self, files: &Files, wanted: &Wanted) -> Result<Vec<u8>, Errno> {
        self.used = Instant::now();
        // What had been read before a change is old.
        let is_old = |ahead: &Ahead| ahead.asked < wanted.unchanged_since;
        if [&self.ahead, &self.next].into_iter().flatten().any(is_old) {
            self.stop();
        }
        let position = self.ahead.as_ref().map_or(self.end, |ahead| ahead.position);
        self.end = wanted.offset.saturating_add(wanted.size as u64);
        if position != wanted.offset {
            self.misses += 1;
            if self.misses > PATIENCE {
                self.stop();
            }
            let mut part = Ahead::start(files, wanted, wanted.offset, wanted.size as u64);
            let mut bytes = Vec::with_capacity(wanted.size);
            part.take(wanted.size, &mut bytes).await?;
            return Ok(bytes);
        }
        let read = self.read_in_order(files, wanted).await;
        if read.is_err() {
            self.stop();
        }
        read
    }

    async fn read_in_order(&mut self, files: &Files, wanted: &Wanted) -> Result<Vec<u8>, Errno> {
        let mut bytes = Vec::with_capacity(wanted.size);
        let mut at = wanted.offset;
        while bytes.len() < wanted.size {
            let range = self.range.max(wanted.size as u64);
            let ahead = match (&mut self.ahead, self.next.take()) {
                (Some(ahead), next) => {
                    self.next = next;
                    ahead
                }
                (none, Some(next)) if next.position == at => none.insert(next),
                (none, _) => none.insert(Ahead::start(files, wanted, at, range)),
            };
            let taken = ahead.take(wanted.size, &mut bytes).await?;
            at = ahead.position;
            let left = ahead.end.saturating_sub(at);
            if self.next.is_none() && left <= range / 2 && taken != Taken::FileEnded {
                self.range = (self.range * 2).min(LAST_RANGE_BYTES);
                self.next = Some(Ahead::start(files, wanted, ahead.end, self.range));
            }
            match taken {
                Taken::All => {}
                Taken::PartEnded => self.ahead = None,
                Taken::FileEnded => {
                    self.stop();
                    break;
                }
            }
        }
        Ok(bytes)
    }
}

// === impl Ahead ===

impl Ahead {
    fn start(files: &Files, wanted: &Wanted, offset: u64, length: u64) -> Self {
        let (sender, chunks) = mpsc::unbounded_channel();
        let request = ReadRequest {
            path: files.path(wanted.path.clone()),
            offset,
            length,
        };
        let call = receive(files.clone(), request, wanted.identity, sender);
        Self {
            chunks,
            position: offset,
            end: offset.saturating_add(length),
            rest: Bytes::new(),
            asked: wanted.now,
            _task: AbortOnDropHandle::new(tokio::spawn(call)),
        }
    }

    /// False: there is no more.
    async fn more(&mut self) -> Result<bool, Errno> {
        match self.chunks.recv().await {
            Some(chunk) => {
                self.rest = chunk?;
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// Until there are so many bytes.
    async fn take(&mut self, size: usize, bytes: &mut Vec<u8>) -> Result<Taken, Errno> {
        while bytes.len() < size {
            if self.rest.is_empty() {
                if self.position == self.end {
                    return Ok(Taken::PartEnded);
                }
                if !self.more().await? {
                    return Ok(Taken::FileEnded);
                }
                continue;
            }
            let part = self.rest.len().min(size - bytes.len());
            bytes.extend_from_slice(&self.rest[..part]);
            self.rest.advance(part);
            self.position += part as u64;
        }
        Ok(Taken::All)
    }
}

/// Takes in what a call says: nothing first, when reading is allowed; then the bytes.
async fn receive(
    files: Files,
    request: ReadRequest,
    identity: Identity,
    chunks: mpsc::UnboundedSender<Result<Bytes, Errno>>,
) {
    let received = async {
        let told = |status: Status| errno(&status);
        let mut left = request.length;
        let mut client = files.client.clone();
        let mut responses = answer(client.read(request)).await.map_err(told)?;
        let first = in_time(responses.message()).await.map_err(told)?;
        let Some(read_response::Message::Entry(entry)) = first.and_then(|first| first.message)
        else {
            return Err(Errno::EIO);
        };
        let attributes = Attributes::try_from(Some(entry)).map_err(|_| Errno::EIO)?;
        if attributes.identity != identity {
            // Another file has its name now.
            return Err(Errno::ESTALE);
        }
        // Who does not want it any more ends this task.
        let _ = chunks.send(Ok(Bytes::new()));
        while let Some(next) = in_time(responses.message()).await.map_err(told)? {
            let Some(read_response::Message::Data(mut data)) = next.message else {
                return Err(Errno::EIO);
            };
            // Nothing could go on for ever, and more was not asked for.
            if data.is_empty() || left == 0 {
                return Err(Errno::EIO);
            }
            data.truncate(usize::try_from(left).unwrap_or(usize::MAX));
            left -= data.len() as u64;
            let _ = chunks.send(Ok(data));
        }
        Ok(())
    };
    if let Err(error) = received.await {
        let _ = chunks.send(Err(error));
    }
}
