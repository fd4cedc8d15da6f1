//! One large file there and back, beside as many bytes without a file and without the
//! agent.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use soulbox_proto::guest::v1::{
    CommitWrite, FilePath, OpenWrite, ReadRequest, WriteRequest, open_write, read_response,
    write_request,
};

use super::{Guest, aside};
use crate::agent::Agent;
use crate::report::{Promise, Report, Row, progress};

const SIZE_MIB: u64 = 64;
const SIZE_BYTES: u64 = SIZE_MIB << 20;
/// Of one message, as the command line sends them.
const CHUNK_BYTES: usize = 256 * 1024;
const RUNS: u32 = 10;
/// Of the raw stream's rate.
const SHARE: f64 = 0.8;

/// One direction, in MiB/s.
#[derive(Default)]
struct Rates {
    raw: Vec<f64>,
    /// By the guest itself: the file without the stream.
    file: Vec<f64>,
    memory: Vec<f64>,
    disk: Vec<f64>,
}

pub(super) async fn measure(guest: &mut Guest, runs: u32, report: &mut Report) -> Result<()> {
    let runs = runs.min(RUNS);
    let (mut put, mut got) = (Rates::default(), Rates::default());
    // Memory that the guest touches for the first time is the host's to find.
    round(guest, &mut put, &mut got).await?;
    (put, got) = (Rates::default(), Rates::default());
    let bar = progress(u64::from(runs))?;
    for _ in 0..runs {
        round(guest, &mut put, &mut got).await?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    put.report("to the guest", "into", "Write", report);
    got.report("from the guest", "out of", "Read", report);
    Ok(())
}

async fn round(guest: &mut Guest, put: &mut Rates, got: &mut Rates) -> Result<()> {
    let Guest {
        agent,
        raw,
        folders,
        ..
    } = guest;
    let memory = format!("{}/stream", folders.memory);
    let disk = format!("{}/stream", folders.disk);
    if let Some(raw) = raw {
        let raw = Arc::clone(raw);
        let file = format!("{}/file", folders.memory);
        let took = aside(move || {
            let put_took = raw.put(SIZE_BYTES)?;
            let got_took = raw.get(SIZE_BYTES)?;
            let filled = raw.fill(&file, SIZE_BYTES)?;
            Ok([put_took, filled, got_took, raw.drain(&file)?])
        });
        let [put_took, filled, got_took, drained] = took.await?;
        put.raw.push(rate(put_took));
        put.file.push(rate(filled));
        got.raw.push(rate(got_took));
        got.file.push(rate(drained));
    }
    put.memory.push(rate(write(agent, &memory).await?));
    put.disk.push(rate(write(agent, &disk).await?));
    // Or what follows would share the guest with its writing back.
    agent.run(&["sync"]).await?;
    got.memory.push(rate(read(agent, &memory).await?));
    got.disk.push(rate(read(agent, &disk).await?));
    agent.run(&["rm", &memory, &disk]).await?;
    Ok(())
}

fn rate(took: Duration) -> f64 {
    SIZE_MIB as f64 / took.as_secs_f64()
}

fn path(path: &str) -> Option<FilePath> {
    Some(FilePath {
        path: Bytes::copy_from_slice(path.as_bytes()),
        ..Default::default()
    })
}

/// Until the file is there under its name.
async fn write(agent: &mut Agent, file: &str) -> Result<Duration> {
    let open = OpenWrite {
        path: path(file),
        how: open_write::How::Create.into(),
        ..Default::default()
    };
    let chunk = Bytes::from(vec![0x5a; CHUNK_BYTES]);
    let chunks = (0..SIZE_BYTES / CHUNK_BYTES as u64)
        .map(move |_| write_request::Message::Data(chunk.clone()));
    let messages = std::iter::once(write_request::Message::Open(open))
        .chain(chunks)
        .chain([write_request::Message::Commit(CommitWrite {})]);
    let requests = messages.map(|message| WriteRequest {
        message: Some(message),
    });
    let start = Instant::now();
    let written = agent.files.write(tokio_stream::iter(requests)).await;
    let took = start.elapsed();
    let written = written.context("Write")?.into_inner().written_bytes;
    ensure!(
        written == SIZE_BYTES,
        "{written} bytes of {SIZE_BYTES} were written"
    );
    Ok(took)
}

async fn read(agent: &mut Agent, file: &str) -> Result<Duration> {
    let request = ReadRequest {
        path: path(file),
        ..Default::default()
    };
    let start = Instant::now();
    let responses = agent.files.read(request).await.context("Read")?;
    let mut responses = responses.into_inner();
    let mut read = 0;
    while let Some(response) = responses.message().await.context("Read")? {
        if let Some(read_response::Message::Data(data)) = response.message {
            read += data.len() as u64;
        }
    }
    let took = start.elapsed();
    ensure!(read == SIZE_BYTES, "{read} bytes of {SIZE_BYTES} were read");
    Ok(took)
}

// === impl Rates ===

impl Rates {
    fn report(self, direction: &str, verb: &str, call: &str, report: &mut Report) {
        let row = |name: String, samples| Row::new(name, "MiB/s", samples);
        let memory = row(format!("{call} of {SIZE_MIB} MiB, tmpfs"), self.memory);
        let disk = row(format!("{call} of {SIZE_MIB} MiB, root disk"), self.disk);
        if self.raw.is_empty() {
            report.rows.extend([memory, disk]);
            return;
        }
        let raw = row(
            format!("floor: {SIZE_MIB} MiB {direction}, no file"),
            self.raw,
        );
        let file = row(
            format!("floor: {SIZE_MIB} MiB {verb} a file of tmpfs by the guest itself"),
            self.file,
        );
        report.promises.push(Promise::at_least(
            format!("{call} of {SIZE_MIB} MiB on tmpfs, p50 × the raw stream's rate"),
            memory.times(&raw),
            SHARE,
        ));
        let (memory, disk) = (memory.beside(&raw), disk.beside(&raw));
        report.rows.extend([raw, file, memory, disk]);
    }
}
