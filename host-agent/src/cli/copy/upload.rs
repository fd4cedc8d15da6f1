//! Into a sandbox: one file, which goes on where it stopped, or a tree.

use std::fs::{File, Metadata};
use std::io::{self, Read, Seek as _, SeekFrom, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};
use prost_types::Timestamp;
use soulbox_proto::guest::v1::{
    CommitWrite, Compression, Entry, FileKind, MoveRequest, OpenUpload, OpenWrite, RemoveRequest,
    SetAttributesRequest, StatRequest, UploadRequest, WriteRequest, WriteResponse, open_write,
    upload_request, write_request,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic_types::StatusExt as _;

use super::error::CopyError;
use super::pack::{PackError, Packed, pack};
use super::part::{self, Source};
use super::pipe::{CHUNK_BYTES, ChunkWriter, channel};
use super::progress::Progress;
use super::{Copied, Plan, last_part};
use crate::cli::error::CliError;
use crate::cli::place::{Place, answer};

const TRIES: usize = 3;
/// From so many bytes on it is written under a name by which it can go on.
const LARGE_BYTES: u64 = 8 << 20;
/// Fast, and about as small as gzip makes it.
const ZSTD_LEVEL: i32 = 1;

pub(super) async fn upload(
    plan: &Plan,
    source: Option<PathBuf>,
    place: &Place,
) -> Result<Copied, CliError> {
    let target = Bytes::from(place.path.clone());
    let there = stat(plan, &target).await?;
    let Some(source) = source else {
        return from_stdin(plan, place, there).await;
    };
    let found = std::fs::metadata(&source).map_err(|error| CopyError::read(&source, error))?;
    let name = last_part(source.as_os_str().as_bytes()).map(|name| name.as_bytes().to_vec());
    let inner = |name: &[u8]| Bytes::from([&target[..], b"/", name].concat());
    let kind = there.as_ref().map(Entry::kind);
    match kind {
        _ if !found.is_dir() && !found.is_file() => Err(CopyError::Kind {
            path: source.display().to_string(),
        }
        .into()),
        Some(FileKind::Directory) if found.is_dir() => {
            let target = name.map_or(target.clone(), |name| inner(&name));
            tree(plan, source, target).await
        }
        Some(FileKind::Directory) => {
            let name = name.ok_or_else(|| CopyError::NoName {
                path: source.display().to_string(),
            })?;
            let target = inner(&name);
            let there = stat(plan, &target).await?;
            file(plan, &source, target, there).await
        }
        Some(_) if found.is_dir() => Err(CopyError::DirectoryOntoFile {
            path: place.to_string(),
        }
        .into()),
        None if found.is_dir() => tree(plan, source, target).await,
        None if place.path.ends_with(b"/") => Err(CopyError::NoDirectory {
            path: place.to_string(),
        }
        .into()),
        _ => file(plan, &source, target, there).await,
    }
}

/// None: it is not there.
async fn stat(plan: &Plan, path: &Bytes) -> Result<Option<Entry>, CliError> {
    let request = StatRequest {
        path: plan.files.path(path.clone()),
        follow: true,
    };
    match answer(plan.files.client.clone().stat(request)).await {
        Ok(said) => Ok(said.entry),
        Err(status) if reason(&status) == "FILE_NOT_FOUND" => Ok(None),
        Err(status) => Err(status.into()),
    }
}

fn reason(status: &Status) -> String {
    status
        .get_details_error_info()
        .map(|info| info.reason)
        .unwrap_or_default()
}

// --- a file

async fn file(
    plan: &Plan,
    source: &Path,
    target: Bytes,
    there: Option<Entry>,
) -> Result<Copied, CliError> {
    let shown = source.display().to_string();
    if there.is_some_and(|there| there.kind() != FileKind::Regular) {
        let path = String::from_utf8_lossy(&target).into_owned();
        return Err(CopyError::Kind { path }.into());
    }
    for attempt in 0..TRIES {
        let opened = File::open(source).and_then(|file| Ok((file.metadata()?, file)));
        let (found, file) = opened.map_err(|error| CopyError::read(source, error))?;
        let progress = Progress::new(&shown, Some(found.size()), plan.quiet);
        let anew = plan.anew || attempt > 0;
        let sent = match found.size() < LARGE_BYTES {
            true => send_small(plan, source, file, &found, &target, &progress).await,
            false => send_large(plan, source, file, &found, &target, anew, &progress).await,
        };
        progress.end();
        match sent? {
            Some(copied) => return Ok(copied),
            None => continue,
        }
    }
    Err(CopyError::Changed { path: shown }.into())
}

/// None: the file changed meanwhile.
async fn send_small(
    plan: &Plan,
    source: &Path,
    file: File,
    found: &Metadata,
    target: &Bytes,
    progress: &Progress,
) -> Result<Option<Copied>, CliError> {
    let open = OpenWrite {
        path: plan.files.path(target.clone()),
        how: open_write::How::Replace.into(),
        mode: Some(mode(plan, found)),
        ..OpenWrite::default()
    };
    let check = Check::new(source, found);
    let Some(said) = send(plan, open, file, Some(check), progress).await? else {
        return Ok(None);
    };
    dress(plan, target, found).await?;
    Ok(Some(Copied {
        entries: 1,
        bytes: said.written_bytes,
        ..Copied::default()
    }))
}

/// Under a name beside the target's, by which a later copy goes on.
async fn send_large(
    plan: &Plan,
    source: &Path,
    mut file: File,
    found: &Metadata,
    target: &Bytes,
    anew: bool,
    progress: &Progress,
) -> Result<Option<Copied>, CliError> {
    let slash = target.iter().rposition(|&byte| byte == b'/');
    let (above, name) = target.split_at(slash.map_or(0, |slash| slash + 1));
    let part_name = part::name(name, &source_of(found));
    let part = Bytes::from([above, &part_name].concat());
    let there = stat(plan, &part).await?;
    let length = match &there {
        Some(there) if !anew && there.size_bytes <= found.size() => there.size_bytes,
        _ => 0,
    };
    progress.at(length);
    file.seek(SeekFrom::Start(length))
        .map_err(|error| CopyError::read(source, error))?;
    let open = OpenWrite {
        path: plan.files.path(part.clone()),
        how: open_write::How::InPlace.into(),
        offset: length,
        truncate: true,
        mode: Some(0o600),
        // Another copy may be at it.
        expected_size_bytes: there.map(|there| there.size_bytes),
        ..OpenWrite::default()
    };
    let check = Check::new(source, found);
    let sent = send(plan, open, file, Some(check), progress).await;
    let is_whole = match &sent {
        Ok(Some(said)) => {
            let size = said.entry.as_ref().map(|entry| entry.size_bytes);
            size == Some(found.size())
        }
        Ok(None) => false,
        // A disk that is full needs the room.
        Err(CliError::Call(status)) if reason(status) == "DISK_FULL" => false,
        Err(_) => true,
    };
    if !is_whole {
        remove(plan, part.clone()).await;
    }
    if sent?.is_none() || !is_whole {
        return Ok(None);
    }
    dress(plan, &part, found).await?;
    let request = MoveRequest {
        from: plan.files.path(part),
        to: plan.files.path(target.clone()),
        replace: true,
        exchange: false,
    };
    answer(plan.files.client.clone().r#move(request)).await?;
    Ok(Some(Copied {
        entries: 1,
        bytes: found.size(),
        resumed_bytes: length,
        ..Copied::default()
    }))
}

async fn from_stdin(plan: &Plan, place: &Place, there: Option<Entry>) -> Result<Copied, CliError> {
    if there.is_some_and(|there| there.kind() == FileKind::Directory) {
        return Err(CopyError::DirectoryToStdio {
            path: place.to_string(),
        }
        .into());
    }
    let open = OpenWrite {
        path: plan.files.path(place.path.clone()),
        how: open_write::How::Replace.into(),
        ..OpenWrite::default()
    };
    let progress = Progress::new("-", None, plan.quiet);
    let said = send(plan, open, io::stdin(), None, &progress).await?;
    progress.end();
    Ok(Copied {
        entries: 1,
        bytes: said.map(|said| said.written_bytes).unwrap_or_default(),
        ..Copied::default()
    })
}

/// That a file is what it was.
struct Check {
    path: PathBuf,
    was: Source,
}

// === impl Check ===

impl Check {
    fn new(path: &Path, found: &Metadata) -> Self {
        Self {
            path: path.to_owned(),
            was: source_of(found),
        }
    }

    fn holds(&self) -> bool {
        std::fs::metadata(&self.path).is_ok_and(|now| source_of(&now) == self.was)
    }
}

/// None: the file changed meanwhile, and nothing of it took effect but in a part.
async fn send(
    plan: &Plan,
    open: OpenWrite,
    reader: impl Read + Send + 'static,
    check: Option<Check>,
    progress: &Progress,
) -> Result<Option<WriteResponse>, CliError> {
    let (messages, stream) = channel();
    let mut client = plan.files.client.clone();
    let call = async move { client.write(ReceiverStream::new(stream)).await };
    let feeding = {
        let progress = progress.clone();
        tokio::task::spawn_blocking(move || feed(reader, open, check, &messages, &progress))
    };
    let said = call.await;
    let fed = match feeding.is_finished() || said.is_ok() {
        true => feeding.await.map_err(|_| CopyError::Thread)?,
        // It may wait for standard input; the call says what went wrong.
        false => Ok(true),
    };
    if !fed? {
        return Ok(None);
    }
    Ok(Some(said?.into_inner()))
}

/// False: the file is not what it was.
fn feed(
    mut reader: impl Read,
    open: OpenWrite,
    check: Option<Check>,
    messages: &mpsc::Sender<WriteRequest>,
    progress: &Progress,
) -> Result<bool, CopyError> {
    let send = |message| {
        let message = WriteRequest {
            message: Some(message),
        };
        messages.blocking_send(message).is_ok()
    };
    if !send(write_request::Message::Open(open)) {
        return Ok(true);
    }
    loop {
        let mut chunk = BytesMut::zeroed(CHUNK_BYTES);
        let count = match reader.read(&mut chunk) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            read => read.map_err(|error| CopyError::read(shown(check.as_ref()), error))?,
        };
        if count == 0 {
            break;
        }
        chunk.truncate(count);
        // The call has ended, and says why.
        if !send(write_request::Message::Data(chunk.freeze())) {
            return Ok(true);
        }
        progress.bytes(count);
    }
    if check.is_some_and(|check| !check.holds()) {
        return Ok(false);
    }
    send(write_request::Message::Commit(CommitWrite {}));
    Ok(true)
}

fn shown(check: Option<&Check>) -> PathBuf {
    match check {
        Some(check) => check.path.clone(),
        None => "standard input".into(),
    }
}

/// Mode and times, and with `--archive` the owner.
async fn dress(plan: &Plan, path: &Bytes, found: &Metadata) -> Result<(), CliError> {
    let request = SetAttributesRequest {
        path: plan.files.path(path.clone()),
        mode: Some(mode(plan, found)),
        uid: plan.archive.then(|| found.uid()),
        gid: plan.archive.then(|| found.gid()),
        modify_time: Some(Timestamp {
            seconds: found.mtime(),
            nanos: i32::try_from(found.mtime_nsec()).unwrap_or_default(),
        }),
        ..SetAttributesRequest::default()
    };
    answer(plan.files.client.clone().set_attributes(request)).await?;
    Ok(())
}

fn mode(plan: &Plan, found: &Metadata) -> u32 {
    found.mode() & if plan.archive { 0o7777 } else { 0o1777 }
}

async fn remove(plan: &Plan, path: Bytes) {
    let request = RemoveRequest {
        path: plan.files.path(path),
        recursive: false,
        missing_ok: true,
    };
    // What went wrong before is what is told.
    let _ = answer(plan.files.client.clone().remove(request)).await;
}

fn source_of(found: &Metadata) -> Source {
    Source {
        size: found.size(),
        modified: (found.mtime(), found.mtime_nsec()),
        inode: found.ino(),
        device: found.dev(),
    }
}

// --- a tree

async fn tree(plan: &Plan, source: PathBuf, target: Bytes) -> Result<Copied, CliError> {
    let compression = plan.compression();
    let open = OpenUpload {
        path: plan.files.path(target),
        compression: compression.into(),
        keep_owners: plan.archive,
    };
    let (messages, stream) = channel();
    let first = UploadRequest {
        message: Some(upload_request::Message::Open(open)),
    };
    // The channel has just been made, so there is room.
    let _ = messages.try_send(first);
    let progress = Progress::new(&source.display().to_string(), None, plan.quiet);
    let packing = {
        let progress = progress.clone();
        tokio::task::spawn_blocking(move || pack_chunks(&source, compression, messages, &progress))
    };
    let mut client = plan.files.client.clone();
    let said = client.upload(ReceiverStream::new(stream)).await;
    let packed = packing.await.map_err(|_| CopyError::Thread)?;
    progress.end();
    let packed = match (said, packed) {
        // Why nobody took more.
        (Err(status), Ok(_) | Err(PackError::Send(_))) => return Err(status.into()),
        (_, Err(error)) => return Err(CopyError::from(error).into()),
        (Ok(_), Ok(packed)) => packed,
    };
    for path in &packed.changed {
        eprintln!(
            "soulbox: {} changed while it was copied; copy it again",
            path.display()
        );
    }
    Ok(Copied {
        entries: packed.entries,
        bytes: packed.file_bytes,
        left_out: packed.left_out,
        changed: packed.changed.len() as u64,
        ..Copied::default()
    })
}

fn pack_chunks(
    source: &Path,
    compression: Compression,
    messages: mpsc::Sender<UploadRequest>,
    progress: &Progress,
) -> Result<Packed, PackError> {
    let writer = ChunkWriter::new(messages, |data| UploadRequest {
        message: Some(upload_request::Message::Data(data)),
    });
    let (packed, mut writer) = match compression {
        Compression::Unspecified => pack(source, writer, progress)?,
        Compression::Zstd => {
            let encoder = zstd::stream::write::Encoder::new(writer, ZSTD_LEVEL);
            let (packed, encoder) = pack(source, encoder.map_err(PackError::Send)?, progress)?;
            (packed, encoder.finish().map_err(PackError::Send)?)
        }
    };
    writer.flush().map_err(PackError::Send)?;
    Ok(packed)
}
