//! A daemon of the test's own, on temporary folders.
#![allow(dead_code, unreachable_pub)]

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use soulbox_proto::guest::v1::process_service_client::ProcessServiceClient;
use soulbox_proto::guest::{DELETE_AFTER_METADATA, SANDBOX_METADATA};
use soulbox_proto::host::v1::node_service_client::NodeServiceClient;
use soulbox_proto::host::v1::sandbox_service_client::SandboxServiceClient;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use tonic_types::StatusExt as _;

/// Far longer than anything takes: a test that waits this long has failed.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Folders and a configuration. Dropped last, so that what a daemon left can
/// be looked at.
pub struct Host {
    folder: tempfile::TempDir,
}

/// A running soulboxd; killed when dropped.
pub struct Daemon {
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    socket: PathBuf,
}

/// Calls on one connection: those of `SandboxService`, and those into sandboxes.
#[derive(Clone)]
pub struct Client {
    sandboxes: SandboxServiceClient<Channel>,
    pub channel: Channel,
}

// === impl Host ===

impl Host {
    /// `extra` is more of the configuration, without `[listen]` and `[paths]`.
    pub fn new(extra: &str) -> Self {
        Self::with_paths(&[], extra)
    }

    /// As [`Self::new`], with lines of the section `[paths]`, such as
    /// `("kvm", "/none")`.
    pub fn with_paths(paths: &[(&str, &Path)], extra: &str) -> Self {
        // The nested bench has a disk for this; its /tmp is memory.
        let scratch = std::env::var_os("SOULBOX_SCRATCH").map(PathBuf::from);
        let folder = tempfile::tempdir_in(scratch.unwrap_or_else(std::env::temp_dir)).unwrap();
        let at = |name: &str| folder.path().join(name);
        let mut all = vec![
            ("state_dir", at("state")),
            ("run_dir", at("run")),
            ("template_dir", at("templates")),
        ];
        for (name, path) in paths {
            all.retain(|(other, _)| other != name);
            all.push((name, path.to_path_buf()));
        }
        let mut config = format!("[listen]\nunix_path = {:?}\n[paths]\n", at("d.sock"));
        for (name, path) in all {
            config.push_str(&format!("{name} = {path:?}\n"));
        }
        // One daemon has a host's network at a time, and tests have many.
        if !extra.contains("[network]") {
            config.push_str("[network]\nenabled = false\n");
        }
        config.push_str(extra);
        fs::create_dir(at("templates")).unwrap();
        fs::write(at("soulboxd.toml"), &config).unwrap();
        Self { folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn socket(&self) -> PathBuf {
        self.path("d.sock")
    }

    pub fn soulboxd(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_soulboxd"));
        command.arg("--config").arg(self.path("soulboxd.toml"));
        command
    }

    /// The command line, pointed at this host's daemon.
    pub fn soulbox(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_soulbox"))
            .env("SOULBOX_HOST", format!("unix:{}", self.socket().display()))
            .args(args)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// Starts a daemon and waits until it serves.
    pub fn start(&self) -> Daemon {
        self.start_as(self.soulboxd())
    }

    /// As [`Self::start`], by a program that executes what its arguments say.
    pub fn start_through(&self, mut launcher: Command) -> Daemon {
        let soulboxd = self.soulboxd();
        launcher
            .arg(soulboxd.get_program())
            .args(soulboxd.get_args());
        self.start_as(launcher)
    }

    fn start_as(&self, mut command: Command) -> Daemon {
        let mut child = command
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let lines = BufReader::new(child.stderr.take().unwrap());
        let collected = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                collected.lock().unwrap().push(line);
            }
        });
        let mut daemon = Daemon {
            child,
            log,
            socket: self.socket(),
        };
        daemon.wait_for_log("ready");
        daemon
    }

    /// A template with these files; the manifest says what they should be.
    pub fn template(&self, name: &str, kernel: &[u8]) {
        let folder = self.path("templates").join(name);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("vmlinux"), kernel).unwrap();
        fs::write(folder.join("rootfs.ext4"), [0; 1 << 20]).unwrap();
        let manifest = serde_json::json!({
            "name": name, "description": "for tests", "architecture": "x86_64",
            "kernel": {"file": "vmlinux", "size_bytes": kernel.len(), "sha256": ""},
            "rootfs": {"file": "rootfs.ext4", "size_bytes": 1 << 20, "sha256": "", "filesystem": "ext4"},
            "agent_version": "0.1.0",
        });
        fs::write(folder.join("manifest.json"), manifest.to_string()).unwrap();
    }

    /// Asserts that no sandbox left a file, a socket or a monitor.
    pub fn assert_nothing_left(&self) {
        for folder in ["state/sandboxes", "run/vm", "state/snapshots"] {
            let left: Vec<_> = fs::read_dir(self.path(folder))
                .into_iter()
                .flatten()
                .flatten()
                .map(|entry| entry.path())
                .collect();
            assert!(left.is_empty(), "left over: {left:?}");
        }
        let monitors = self.monitors();
        assert!(monitors.is_empty(), "still running: {monitors:?}");
    }

    /// Processes whose standard output is a log of one of our sandboxes.
    pub fn monitors(&self) -> Vec<i32> {
        self.logging_below("state/sandboxes")
    }

    /// Processes that wait to be a sandbox's monitor.
    pub fn shells(&self) -> Vec<i32> {
        self.logging_below("state/shells")
    }

    fn logging_below(&self, folder: &str) -> Vec<i32> {
        logging_below(&self.path(folder))
    }
}

impl Drop for Host {
    /// A test that fails leaves no process.
    fn drop(&mut self) {
        kill_logging_below(&self.path("state"));
    }
}

/// Processes whose standard output is a file below `folder`.
fn logging_below(folder: &Path) -> Vec<i32> {
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| {
            fs::read_link(format!("/proc/{pid}/fd/1")).is_ok_and(|log| log.starts_with(folder))
        })
        .collect()
}

pub fn kill_logging_below(folder: &Path) {
    for pid in logging_below(folder) {
        if let Some(pid) = rustix::process::Pid::from_raw(pid) {
            // It may just have ended.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

// === impl Client ===

impl Client {
    pub fn processes(&self) -> ProcessServiceClient<Channel> {
        ProcessServiceClient::new(self.channel.clone())
    }
}

impl std::ops::Deref for Client {
    type Target = SandboxServiceClient<Channel>;

    fn deref(&self) -> &Self::Target {
        &self.sandboxes
    }
}

impl std::ops::DerefMut for Client {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.sandboxes
    }
}

/// `message` as a call to sandbox `id`.
pub fn to<T>(id: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let id = id.parse().unwrap();
    request.metadata_mut().insert(SANDBOX_METADATA, id);
    request
}

/// As [`to`], and the sandbox goes with the call.
pub fn last_to<T>(id: &str, message: T) -> Request<T> {
    let mut request = to(id, message);
    let yes = "true".parse().unwrap();
    request.metadata_mut().insert(DELETE_AFTER_METADATA, yes);
    request
}

// === impl Daemon ===

impl Daemon {
    pub fn pid(&self) -> i32 {
        self.child.id().try_into().unwrap()
    }

    pub async fn channel(&self) -> Channel {
        let socket = self.socket.clone();
        Endpoint::from_static("http://test")
            .connect_with_connector(tower::service_fn(move |_| {
                let socket = socket.clone();
                async move { UnixStream::connect(socket).await.map(TokioIo::new) }
            }))
            .await
            .unwrap()
    }

    pub async fn sandboxes(&self) -> Client {
        let channel = self.channel().await;
        Client {
            sandboxes: SandboxServiceClient::new(channel.clone()),
            channel,
        }
    }

    pub async fn node(&self) -> NodeServiceClient<Channel> {
        NodeServiceClient::new(self.channel().await)
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.pid()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "soulboxd does not end: {:#?}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// SIGTERM, and a clean end.
    pub fn terminate(&mut self) {
        self.signal(rustix::process::Signal::TERM);
        let status = self.wait();
        assert!(status.success(), "{status}: {:#?}", self.log());
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.wait();
    }

    pub fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// Waits for a line of the log that holds `text`, and returns it.
    pub fn wait_for_log(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(line) = self.log().into_iter().find(|line| line.contains(text)) {
                return line;
            }
            let ended = self.child.try_wait().unwrap();
            assert!(
                ended.is_none() && Instant::now() < deadline,
                "no {text:?} from soulboxd ({ended:?}): {:#?}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The stable reason in a status.
pub fn reason(status: &Status) -> String {
    let details = status.get_error_details();
    let info = details.error_info().expect("no ErrorInfo");
    assert_eq!(info.domain, "soulbox");
    info.reason.clone()
}

/// The fields that a status names, in order.
pub fn fields(status: &Status) -> Vec<String> {
    let details = status.get_error_details();
    let violations = details
        .bad_request()
        .map(|bad| bad.field_violations.clone());
    violations
        .unwrap_or_default()
        .into_iter()
        .map(|violation| violation.field)
        .collect()
}

/// The start of an ELF file for `machine`, with one segment that ends at
/// `end_address`.
pub fn elf(machine: u16, end_address: u64) -> Vec<u8> {
    let mut image = vec![0; 64 + 56];
    image[..6].copy_from_slice(b"\x7fELF\x02\x01");
    image[18..20].copy_from_slice(&machine.to_le_bytes());
    image[32] = 64;
    image[54] = 56;
    image[56] = 1;
    image[64] = 1;
    image[64 + 40..64 + 48].copy_from_slice(&end_address.to_le_bytes());
    image
}

pub const X86_64: u16 = 62;
pub const AARCH64: u16 = 183;
