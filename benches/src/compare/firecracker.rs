//! Firecracker with a tiny guest, driven through its API socket. Its console is
//! its standard output, where its log may go too.

use std::fs::File;
use std::io::PipeReader;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;
use tempfile::TempDir;

use super::http::Api;
use crate::guest;
use crate::memory::Footprint;

/// How long its socket may take to be there.
const START: Duration = Duration::from_secs(10);

/// One Firecracker process. Dropping it kills and reaps it.
pub(super) struct Firecracker {
    child: Child,
    api: Api,
    console: PipeReader,
    folder: TempDir,
}

/// A full snapshot, with its memory file.
pub(super) struct Snapshot {
    state: PathBuf,
    memory: PathBuf,
}

// === impl Firecracker ===

impl Firecracker {
    /// Starts a process and waits for its API.
    pub(super) fn spawn(program: &Path, folder: TempDir) -> Result<Self> {
        let socket = folder.path().join("api");
        let (console, stdout) = std::io::pipe()?;
        let log = folder.path().join("stderr");
        let mut child = Command::new(program)
            .arg("--api-sock")
            .arg(&socket)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(File::create(&log)?)
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        match connect(&mut child, &socket) {
            Ok(api) => Ok(Self {
                child,
                api,
                console,
                folder,
            }),
            Err(error) => {
                // It may have ended by itself.
                let _ = child.kill();
                let _ = child.wait();
                let log = std::fs::read_to_string(log).unwrap_or_default();
                Err(error.context(format!("{} does not serve: {log}", program.display())))
            }
        }
    }

    /// Boots a guest that dirties nothing, and waits for its first byte.
    pub(super) fn boot(&mut self) -> Result<()> {
        let kernel = self.folder.path().join("kernel");
        std::fs::write(&kernel, guest::image(0))?;
        let machine = json!({"vcpu_count": 1, "mem_size_mib": guest::memory_mib(0)});
        self.api.put("/machine-config", &machine)?;
        let boot = json!({"kernel_image_path": kernel, "boot_args": "console=ttyS0"});
        self.api.put("/boot-source", &boot)?;
        let start = json!({"action_type": "InstanceStart"});
        self.api.put("/actions", &start)?;
        guest::await_byte(&mut self.console, guest::READY, 1)
    }

    /// Snapshots the guest, whose copies are let go; it stays paused.
    pub(super) fn snapshot(&mut self, folder: &Path) -> Result<Snapshot> {
        let snapshot = Snapshot {
            state: folder.join("state"),
            memory: folder.join("memory"),
        };
        self.api.patch("/vm", &json!({"state": "Paused"}))?;
        let create = json!({
            "snapshot_type": "Full",
            "snapshot_path": snapshot.state,
            "mem_file_path": snapshot.memory,
        });
        self.api.put("/snapshot/create", &create)?;
        guest::let_go(&snapshot.memory)?;
        Ok(snapshot)
    }

    /// Restores a copy and waits until it runs.
    pub(super) fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        let load = json!({
            "snapshot_path": snapshot.state,
            "mem_backend": {"backend_type": "File", "backend_path": snapshot.memory},
            "resume_vm": true,
        });
        self.api.put("/snapshot/load", &load)?;
        guest::await_byte(&mut self.console, guest::RESTORED, 1)
    }

    pub(super) fn footprint(&self) -> Result<Footprint> {
        Footprint::of(self.child.id())
    }
}

impl Drop for Firecracker {
    fn drop(&mut self) {
        // It may have ended by itself; then there is only the zombie to reap.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn connect(child: &mut Child, socket: &Path) -> Result<Api> {
    let give_up = Instant::now() + START;
    loop {
        match Api::connect(socket) {
            Ok(api) => return Ok(api),
            Err(error) if Instant::now() > give_up => {
                return Err(error).context("connecting to its API socket");
            }
            Err(_) => {}
        }
        if let Some(status) = child.try_wait()? {
            bail!("it ended with {status}");
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::thread::{self, JoinHandle};

    /// What a Firecracker was asked: method, path and body.
    type Asked = Vec<(String, String, serde_json::Value)>;

    /// Serves a connection as Firecracker would: the guest's bytes come on the
    /// console when it starts and when it is resumed, behind a line of log.
    fn serve(stream: UnixStream, mut console: std::io::PipeWriter) -> Asked {
        let mut asked = Asked::new();
        let mut stream = BufReader::new(stream);
        loop {
            let mut first = String::new();
            if stream.read_line(&mut first).unwrap() == 0 {
                return asked;
            }
            let mut length = 0;
            loop {
                let mut line = String::new();
                stream.read_line(&mut line).unwrap();
                match line.trim_end().split_once(": ") {
                    Some(("Content-Length", value)) => length = value.parse().unwrap(),
                    Some(_) => {}
                    None => break,
                }
            }
            let mut body = vec![0; length];
            stream.read_exact(&mut body).unwrap();
            let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
            let mut words = first.split(' ').map(str::to_owned);
            let (method, path) = (words.next().unwrap(), words.next().unwrap());
            match path.as_str() {
                "/actions" => console.write_all(b"a log line\n\x01").unwrap(),
                "/snapshot/create" => {
                    let memory = body["mem_file_path"].as_str().unwrap();
                    File::create(memory).unwrap().set_len(128 << 20).unwrap();
                }
                "/snapshot/load" => console.write_all(b"a log line\n\x02").unwrap(),
                _ => {}
            }
            let answer = b"HTTP/1.1 204 No Content\r\nServer: Firecracker API\r\n\r\n";
            stream.get_mut().write_all(answer).unwrap();
            asked.push((method, path, body));
        }
    }

    /// A process that does nothing, with a faked API.
    fn fake() -> (Firecracker, JoinHandle<Asked>) {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("api");
        let listener = UnixListener::bind(&socket).unwrap();
        let (console, writer) = std::io::pipe().unwrap();
        let server = thread::spawn(move || serve(listener.accept().unwrap().0, writer));
        let firecracker = Firecracker {
            child: Command::new("sleep").arg("60").spawn().unwrap(),
            api: Api::connect(&socket).unwrap(),
            console,
            folder,
        };
        (firecracker, server)
    }

    fn paths(asked: &Asked) -> Vec<(&str, &str)> {
        asked
            .iter()
            .map(|(method, path, _)| (method.as_str(), path.as_str()))
            .collect()
    }

    #[test]
    fn a_guest_is_booted_snapshotted_and_restored() {
        let kept = tempfile::tempdir().unwrap();
        let (mut parent, server) = fake();
        parent.boot().unwrap();
        let snapshot = parent.snapshot(kept.path()).unwrap();
        assert!(parent.footprint().unwrap().private_kib > 0.0);
        drop(parent);
        let asked = server.join().unwrap();
        let expected = [
            ("PUT", "/machine-config"),
            ("PUT", "/boot-source"),
            ("PUT", "/actions"),
            ("PATCH", "/vm"),
            ("PUT", "/snapshot/create"),
        ];
        assert_eq!(paths(&asked), expected);

        let (mut child, server) = fake();
        child.restore(&snapshot).unwrap();
        drop(child);
        let asked = server.join().unwrap();
        assert_eq!(paths(&asked), [("PUT", "/snapshot/load")]);
        assert_eq!(asked[0].2["resume_vm"], true);
    }

    #[test]
    fn a_program_without_an_api_is_told_of() {
        let folder = tempfile::tempdir().unwrap();
        let error = Firecracker::spawn(Path::new("false"), folder)
            .err()
            .unwrap();
        assert!(format!("{error:#}").contains("it ended with"), "{error:#}");
    }
}
