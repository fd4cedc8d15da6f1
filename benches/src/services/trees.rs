//! Many small files there and back, beside tar at both ends of a raw stream.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use soulbox_proto::guest::v1::{
    DownloadRequest, FilePath, OpenUpload, UploadRequest, download_response, upload_request,
};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio_stream::StreamExt as _;
use tokio_util::io::ReaderStream;

use super::command_line::CommandLine;
use super::raw::{pack_command, unpack_command};
use super::{Guest, aside};
use crate::agent::Agent;
use crate::report::{Promise, Report, Row, ms, progress};
use crate::scratch::Scratch;

const FOLDERS: usize = 100;
const FILES: usize = 10_000;
const FILE_BYTES: usize = 1024;
const CHUNK_BYTES: usize = 256 * 1024;
const RUNS: u32 = 3;
/// Of this host.
const TMPFS: &str = "/dev/shm";
/// Of tar's rate.
const SHARE: f64 = 0.5;

/// One direction, in milliseconds.
#[derive(Default)]
struct Times {
    raw: Vec<f64>,
    call: Vec<f64>,
    copy: Vec<f64>,
}

pub(super) async fn measure(
    guest: &mut Guest,
    scratch: &Scratch,
    runs: u32,
    report: &mut Report,
) -> Result<()> {
    let runs = runs.min(RUNS);
    // Or the disk here would be most of what is measured.
    let folder = tempfile::tempdir_in(TMPFS).or_else(|_| scratch.folder())?;
    let tree = folder.path().join("tree");
    make_tree(&tree).with_context(|| format!("writing to {}", tree.display()))?;
    if guest.command_line.is_none() {
        let what = "soulbox cp: there is no such program, see --soulbox";
        report.left_out.push(what.to_owned());
    }
    let (mut up, mut down) = (Times::default(), Times::default());
    // As with streams.
    round(guest, &tree, folder.path(), &mut up, &mut down).await?;
    (up, down) = (Times::default(), Times::default());
    let bar = progress(u64::from(runs))?;
    for _ in 0..runs {
        round(guest, &tree, folder.path(), &mut up, &mut down).await?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    up.report("into the guest", "Upload", report);
    down.report("out of the guest", "Download", report);
    Ok(())
}

async fn round(
    guest: &mut Guest,
    tree: &Path,
    scratch: &Path,
    up: &mut Times,
    down: &mut Times,
) -> Result<()> {
    let there = |name| format!("{}/{name}", guest.folders.memory);
    let (raw_tree, call_tree, copy_tree) = (there("tar"), there("call"), there("copy"));
    let Guest {
        agent,
        raw,
        command_line,
        ..
    } = guest;
    if let Some(raw) = raw {
        let (raw, from, to) = (Arc::clone(raw), tree.to_owned(), raw_tree.clone());
        up.raw
            .push(ms(aside(move || raw.unpack(&from, &to)).await?));
    }
    up.call.push(ms(upload(agent, tree, &call_tree).await?));
    if let Some(cli) = command_line {
        let there = cli.place(&copy_tree);
        up.copy.push(ms(copy(cli, tree, &there).await?));
    }

    let here = scratch.join("here");
    if let Some(raw) = raw {
        std::fs::create_dir(&here)?;
        let (raw, from, to) = (Arc::clone(raw), raw_tree.clone(), here.clone());
        down.raw
            .push(ms(aside(move || raw.pack(&from, &to)).await?));
        take_away(&here)?;
    }
    std::fs::create_dir(&here)?;
    down.call
        .push(ms(download(agent, &call_tree, &here).await?));
    take_away(&here)?;
    if let Some(cli) = command_line {
        let there = cli.place(&copy_tree);
        down.copy.push(ms(copy(cli, &there, &here).await?));
        take_away(&here)?;
    }
    agent
        .run(&["rm", "-rf", &raw_tree, &call_tree, &copy_tree])
        .await?;
    Ok(())
}

fn make_tree(folder: &Path) -> std::io::Result<()> {
    for number in 0..FILES {
        let inner = folder.join((number % FOLDERS).to_string());
        if number < FOLDERS {
            std::fs::create_dir_all(&inner)?;
        }
        let bytes = vec![number as u8; FILE_BYTES];
        std::fs::write(inner.join(format!("file-{number}")), bytes)?;
    }
    Ok(())
}

/// An error unless all of it has come.
fn take_away(folder: &Path) -> Result<()> {
    let (files, bytes) = count(folder)?;
    ensure!(
        (files, bytes) == (FILES, (FILES * FILE_BYTES) as u64),
        "{files} files of {FILES} came back, with {bytes} bytes"
    );
    std::fs::remove_dir_all(folder)?;
    Ok(())
}

/// Regular files below a folder, and their bytes.
fn count(folder: &Path) -> std::io::Result<(usize, u64)> {
    let (mut files, mut bytes) = (0, 0);
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let found = entry.metadata()?;
        let (more, more_bytes) = match found.is_dir() {
            true => count(&entry.path())?,
            false => (usize::from(found.is_file()), found.len()),
        };
        files += more;
        bytes += more_bytes;
    }
    Ok((files, bytes))
}

fn path(path: &str) -> Option<FilePath> {
    Some(FilePath {
        path: Bytes::copy_from_slice(path.as_bytes()),
        ..Default::default()
    })
}

/// What tar packs here, to the reply.
async fn upload(agent: &mut Agent, from: &Path, to: &str) -> Result<Duration> {
    let start = Instant::now();
    let mut tar = Command::from(pack_command(from))
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("running tar")?;
    let packed = tar.stdout.take().context("tar without a pipe")?;
    let open = upload_request::Message::Open(OpenUpload {
        path: path(to),
        ..Default::default()
    });
    // A pipe does not fail; and what tar did not pack is missed below.
    let chunks = ReaderStream::with_capacity(packed, CHUNK_BYTES)
        .map_while(Result::ok)
        .map(upload_request::Message::Data);
    let requests = tokio_stream::once(open)
        .chain(chunks)
        .map(|message| UploadRequest {
            message: Some(message),
        });
    let uploaded = agent.files.upload(requests).await;
    let took = start.elapsed();
    let uploaded = uploaded.context("Upload")?.into_inner().file_bytes;
    ensure!(tar.wait().await?.success(), "tar failed here");
    ensure!(
        uploaded == (FILES * FILE_BYTES) as u64,
        "{uploaded} bytes of files were uploaded"
    );
    Ok(took)
}

/// Until tar has unpacked it here.
async fn download(agent: &mut Agent, from: &str, to: &Path) -> Result<Duration> {
    let start = Instant::now();
    let mut tar = Command::from(unpack_command(to))
        .stdin(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("running tar")?;
    let mut packed = tar.stdin.take().context("tar without a pipe")?;
    let request = DownloadRequest {
        path: path(from),
        ..Default::default()
    };
    let responses = agent.files.download(request).await.context("Download")?;
    let mut responses = responses.into_inner();
    while let Some(response) = responses.message().await.context("Download")? {
        if let Some(download_response::Message::Data(data)) = response.message {
            packed.write_all(&data).await.context("tar failed here")?;
        }
    }
    drop(packed);
    ensure!(tar.wait().await?.success(), "tar failed here");
    Ok(start.elapsed())
}

/// A process of its own, as a person would start it.
async fn copy(
    cli: &CommandLine,
    from: impl AsRef<std::ffi::OsStr>,
    to: impl AsRef<std::ffi::OsStr>,
) -> Result<Duration> {
    let start = Instant::now();
    let status = Command::from(cli.command("cp"))
        .arg("--quiet")
        .args([from.as_ref(), to.as_ref()])
        .status()
        .await
        .context("running soulbox cp")?;
    ensure!(status.success(), "soulbox cp failed: {status}");
    Ok(start.elapsed())
}

// === impl Times ===

impl Times {
    fn report(self, direction: &str, call: &str, report: &mut Report) {
        let row = |name, samples| Row::new(name, "ms", samples);
        let mut rows = vec![row(format!("{call} of {FILES} files"), self.call)];
        if !self.copy.is_empty() {
            let name = format!("soulbox cp of {FILES} files {direction}");
            rows.push(row(name, self.copy));
        }
        if self.raw.is_empty() {
            report.rows.extend(rows);
            return;
        }
        let raw = row(format!("floor: {FILES} files {direction}, tar"), self.raw);
        let mut rows: Vec<Row> = rows.into_iter().map(|row| row.beside(&raw)).collect();
        for row in &rows {
            report.promises.push(Promise::at_least(
                format!("{}, p50 × tar's rate", row.name),
                raw.times(row),
                SHARE,
            ));
        }
        rows.insert(0, raw);
        report.rows.extend(rows);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_whole_or_refused() {
        let folder = tempfile::tempdir().unwrap();
        let tree = folder.path().join("tree");
        make_tree(&tree).unwrap();
        assert_eq!(std::fs::read_dir(&tree).unwrap().count(), FOLDERS);
        std::fs::remove_file(tree.join("7/file-7")).unwrap();
        assert!(take_away(&tree).is_err());
        std::fs::write(tree.join("file-7"), vec![0; FILE_BYTES]).unwrap();
        take_away(&tree).unwrap();
        assert!(!tree.exists());
    }
}
