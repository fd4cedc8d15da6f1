//! From a sandbox: one file, which goes on where it stopped, or a tree.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Seek as _, SeekFrom, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use prost_types::Timestamp;
use soulbox_proto::archive::{Decompressor, Parser};
use soulbox_proto::guest::v1::{
    Compression, DownloadRequest, Entry, FileKind, ReadRequest, ReadResponse, StatRequest,
    download_response, read_response,
};
use tokio::sync::mpsc;
use tonic::Streaming;

use super::error::CopyError;
use super::part::{Part, Source};
use super::pipe::channel;
use super::progress::Progress;
use super::unpack::{Keep, UnpackError, Unpacked, Unpacker};
use super::{Copied, Plan, last_part};
use crate::cli::error::CliError;
use crate::cli::place::{Place, answer, in_time};
use crate::cli::stdio;

/// How often a file is begun anew that changes while it is copied.
const TRIES: usize = 3;

pub(super) async fn download(
    plan: &Plan,
    place: &Place,
    target: Option<PathBuf>,
) -> Result<Copied, CliError> {
    let path = Bytes::from(place.path.clone());
    let entry = stat(plan, &path).await?;
    let shown = place.to_string();
    match (entry.kind(), target) {
        (FileKind::Regular, None) => to_stdout(plan, &path).await,
        (FileKind::Regular, Some(target)) => {
            let target = file_target(target, &place.path, &shown)?;
            file(plan, &path, &shown, entry, &target).await
        }
        (FileKind::Directory, None) => Err(CopyError::DirectoryToStdio { path: shown }.into()),
        (FileKind::Directory, Some(target)) => {
            let target = tree_target(target, &place.path)?;
            tree(plan, path, &shown, target).await
        }
        _ => Err(CopyError::Kind { path: shown }.into()),
    }
}

async fn stat(plan: &Plan, path: &Bytes) -> Result<Entry, CliError> {
    let request = StatRequest {
        path: plan.files.path(path.clone()),
        follow: true,
    };
    let said = answer(plan.files.client.clone().stat(request)).await?;
    said.entry.ok_or_else(nonsense)
}

fn nonsense() -> CliError {
    CliError::Nonsense {
        message: "no entry of a file".to_owned(),
    }
}

// --- where to

/// The file itself, or one of the source's name in a directory.
fn file_target(target: PathBuf, source: &[u8], shown: &str) -> Result<PathBuf, CopyError> {
    let wants_directory = target.as_os_str().as_bytes().ends_with(b"/");
    match std::fs::metadata(&target) {
        Ok(found) if found.is_dir() => {
            let name = last_part(source).ok_or_else(|| CopyError::NoName {
                path: shown.to_owned(),
            })?;
            Ok(target.join(name))
        }
        Ok(_) if !wants_directory => Ok(target.canonicalize().unwrap_or(target)),
        Err(error) if error.kind() == io::ErrorKind::NotFound && !wants_directory => Ok(target),
        _ => Err(CopyError::NoDirectory {
            path: target.display().to_string(),
        }),
    }
}

/// A directory of the source's name in the target; or the target itself where that
/// is not there, or the source is what is in a directory ("DIR/.").
fn tree_target(target: PathBuf, source: &[u8]) -> Result<PathBuf, CopyError> {
    match std::fs::metadata(&target) {
        Ok(found) if found.is_dir() => Ok(match last_part(source) {
            Some(name) => target.join(name),
            None => target,
        }),
        Ok(_) => Err(CopyError::DirectoryOntoFile {
            path: target.display().to_string(),
        }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(target),
        Err(error) => Err(CopyError::write(target, error)),
    }
}

// --- a file

async fn file(
    plan: &Plan,
    path: &Bytes,
    shown: &str,
    mut entry: Entry,
    target: &Path,
) -> Result<Copied, CliError> {
    let is_special = std::fs::metadata(target).is_ok_and(|found| !found.is_file());
    if is_special {
        // Into the device or the pipe, not in its place.
        let opened = OpenOptions::new().write(true).open(target);
        let file = opened.map_err(|error| CopyError::write(target, error))?;
        return into(plan, path, shown, file, target).await;
    }
    let progress = Progress::new(shown, Some(entry.size_bytes), plan.quiet);
    for attempt in 0..TRIES {
        let anew = attempt > 0 || plan.anew;
        let source = source_of(&entry);
        let opened = Part::open(target, &source, anew);
        let mut part = opened.map_err(|error| CopyError::write(target, error))?;
        let began = part.length;
        progress.at(began);
        let fetched = fetch(plan, path, &entry, target, &mut part, &progress).await;
        if let Err(CliError::Copy(CopyError::Full { .. })) = &fetched {
            part.discard();
        }
        let is_whole = fetched?;
        let now = stat(plan, path).await?;
        if is_whole && source_of(&now) == source {
            dress(plan, &part.file, &entry).map_err(|error| CopyError::write(target, error))?;
            let bytes = part.length;
            let moved = part.become_target(target);
            moved.map_err(|error| CopyError::write(target, error))?;
            progress.end();
            return Ok(Copied {
                entries: 1,
                bytes,
                resumed_bytes: began,
                ..Copied::default()
            });
        }
        // It is of a state that is gone.
        part.discard();
        entry = now;
    }
    progress.end();
    Err(CopyError::Changed {
        path: shown.to_owned(),
    }
    .into())
}

/// The rest of the part. False: it is of another file now.
async fn fetch(
    plan: &Plan,
    path: &Bytes,
    entry: &Entry,
    target: &Path,
    part: &mut Part,
    progress: &Progress,
) -> Result<bool, CliError> {
    let (first, mut responses) = read(plan, path, part.length).await?;
    if source_of(&first) != source_of(entry) {
        return Ok(false);
    }
    let failed = |error| CopyError::write(target, error);
    part.file
        .seek(SeekFrom::Start(part.length))
        .map_err(failed)?;
    // What tells no size, as /proc does, is read to its end.
    let expected = match entry.size_bytes {
        0 => None,
        size => Some(size),
    };
    while let Some(data) = next(&mut responses).await? {
        if expected.is_some_and(|size| part.length + data.len() as u64 > size) {
            return Ok(false);
        }
        part.file.write_all(&data).map_err(failed)?;
        part.length += data.len() as u64;
        progress.bytes(data.len());
    }
    Ok(expected.is_none_or(|size| part.length == size))
}

async fn read(
    plan: &Plan,
    path: &Bytes,
    offset: u64,
) -> Result<(Entry, Streaming<ReadResponse>), CliError> {
    let request = ReadRequest {
        path: plan.files.path(path.clone()),
        offset,
        length: 0,
    };
    let mut responses = answer(plan.files.client.clone().read(request)).await?;
    let first = in_time(responses.message()).await?;
    match first.and_then(|first| first.message) {
        Some(read_response::Message::Entry(entry)) => Ok((entry, responses)),
        _ => Err(nonsense()),
    }
}

async fn next(responses: &mut Streaming<ReadResponse>) -> Result<Option<Bytes>, CliError> {
    let Some(response) = in_time(responses.message()).await? else {
        return Ok(None);
    };
    match response.message {
        Some(read_response::Message::Data(data)) => Ok(Some(data)),
        _ => Err(nonsense()),
    }
}

/// Mode and times; nobody's owner but with `--archive`.
fn dress(plan: &Plan, file: &File, entry: &Entry) -> io::Result<()> {
    if plan.archive {
        std::os::unix::fs::fchown(file, Some(entry.uid), Some(entry.gid))?;
    }
    let bits = if plan.archive { 0o7777 } else { 0o1777 };
    file.set_permissions(Permissions::from_mode(entry.mode & bits))?;
    match entry.modify_time.and_then(system_time) {
        Some(modified) => file.set_modified(modified),
        None => Ok(()),
    }
}

fn system_time(time: Timestamp) -> Option<SystemTime> {
    let nanos = Duration::from_nanos(u64::try_from(time.nanos).ok()?);
    let whole = Duration::from_secs(time.seconds.unsigned_abs());
    let second = match time.seconds {
        0.. => UNIX_EPOCH.checked_add(whole),
        _ => UNIX_EPOCH.checked_sub(whole),
    };
    second?.checked_add(nanos)
}

fn source_of(entry: &Entry) -> Source {
    let modified = entry.modify_time.unwrap_or_default();
    Source {
        size: entry.size_bytes,
        modified: (modified.seconds, modified.nanos.into()),
        inode: entry.inode,
        device: entry.device,
    }
}

async fn into(
    plan: &Plan,
    path: &Bytes,
    shown: &str,
    mut file: File,
    target: &Path,
) -> Result<Copied, CliError> {
    let (entry, mut responses) = read(plan, path, 0).await?;
    let progress = Progress::new(shown, Some(entry.size_bytes), plan.quiet);
    let mut copied = Copied {
        entries: 1,
        ..Copied::default()
    };
    while let Some(data) = next(&mut responses).await? {
        file.write_all(&data)
            .map_err(|error| CopyError::write(target, error))?;
        copied.bytes += data.len() as u64;
        progress.bytes(data.len());
    }
    progress.end();
    Ok(copied)
}

async fn to_stdout(plan: &Plan, path: &Bytes) -> Result<Copied, CliError> {
    let (_, mut responses) = read(plan, path, 0).await?;
    let mut stdout = tokio::io::stdout();
    let mut copied = Copied {
        entries: 1,
        ..Copied::default()
    };
    while let Some(data) = next(&mut responses).await? {
        stdio::write(&mut stdout, &data).await?;
        copied.bytes += data.len() as u64;
    }
    Ok(copied)
}

// --- a tree

async fn tree(plan: &Plan, path: Bytes, shown: &str, target: PathBuf) -> Result<Copied, CliError> {
    let request = DownloadRequest {
        path: plan.files.path(path),
        compression: plan.compression().into(),
    };
    let mut responses = answer(plan.files.client.clone().download(request)).await?;
    let first = in_time(responses.message()).await?;
    let Some(download_response::Message::Begin(begin)) = first.and_then(|first| first.message)
    else {
        return Err(nonsense());
    };
    let compression = begin.compression();
    let progress = Progress::new(shown, None, plan.quiet);
    let (chunks, queue) = channel();
    let keep = Keep {
        owners: plan.archive,
    };
    let unpacking = {
        let progress = progress.clone();
        tokio::task::spawn_blocking(move || {
            unpack_chunks(queue, compression, &target, keep, &progress)
        })
    };
    let fed = async {
        while let Some(response) = in_time(responses.message()).await? {
            let Some(download_response::Message::Data(data)) = response.message else {
                return Err(nonsense());
            };
            progress.bytes(data.len());
            // It has failed, and says why below; or it has seen the archive's end.
            if chunks.send(data).await.is_err() {
                break;
            }
        }
        drop(chunks);
        Ok(())
    };
    let fed = fed.await;
    let unpacked = unpacking.await.map_err(|_| CopyError::Thread)?;
    progress.end();
    // Where the call broke off, the archive did, too: the call knows why.
    fed?;
    let unpacked = unpacked.map_err(CopyError::from)?;
    Ok(Copied {
        entries: unpacked.entries,
        bytes: unpacked.file_bytes,
        left_out: unpacked.left_out,
        ..Copied::default()
    })
}

/// On a thread of its own, so that more arrives while files are written.
fn unpack_chunks(
    mut queue: mpsc::Receiver<Bytes>,
    compression: Compression,
    target: &Path,
    keep: Keep,
    progress: &Progress,
) -> Result<Unpacked, UnpackError> {
    let mut decompressor = match compression {
        Compression::Unspecified => None,
        Compression::Zstd => Some(Decompressor::new()?),
    };
    let mut unpacker = Unpacker::new(target, keep, progress)?;
    let mut parser = Parser::default();
    // Nothing that comes after the archive's end is of interest.
    while parser.finish().is_err()
        && let Some(chunk) = queue.blocking_recv()
    {
        match &mut decompressor {
            None => parser.feed(&chunk, &mut unpacker)?,
            Some(decompressor) => {
                decompressor.feed(&chunk, |plain| parser.feed(plain, &mut unpacker))?;
            }
        }
    }
    parser.finish()?;
    unpacker.finish()
}
