//! An agent, what it serves, and mounts of that.

use std::ffi::OsStr;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// A long time for a machine that is busy; nothing should come near it.
pub const LONG: Duration = Duration::from_secs(60);
pub const SANDBOX: &str = "sb-aaaaaaaaaaaaaaaaaaaa";

/// An agent as a process of this machine, and folders of the "guest" and the "host".
pub struct World {
    folder: tempfile::TempDir,
    agent: Option<Child>,
}

/// A `soulbox mount` that runs.
pub struct Mounted {
    child: Option<Child>,
    directory: PathBuf,
}

// === impl World ===

impl World {
    pub fn start() -> Self {
        let mut world = Self::without_agent();
        world.start_agent();
        world
    }

    pub fn without_agent() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("guest")).unwrap();
        std::fs::create_dir(folder.path().join("host")).unwrap();
        Self {
            folder,
            agent: None,
        }
    }

    pub fn start_agent(&mut self) {
        let socket = self.socket();
        let _ = std::fs::remove_file(&socket);
        let agent = Command::new(std::env::current_exe().unwrap())
            .arg("--serve-unix")
            .arg(&socket)
            .spawn();
        self.agent = Some(agent.unwrap());
        until(|| std::os::unix::net::UnixStream::connect(&socket).is_ok());
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    pub fn signal_agent(&self, signal: Signal) {
        let agent = self.agent.as_ref().unwrap().id().cast_signed();
        kill_process(Pid::from_raw(agent).unwrap(), signal).unwrap();
    }

    pub fn kill_agent(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.kill();
            let _ = agent.wait();
        }
    }

    /// What the sandbox has.
    pub fn guest(&self) -> PathBuf {
        self.folder.path().join("guest")
    }

    /// What this host has.
    pub fn host(&self) -> PathBuf {
        self.folder.path().join("host")
    }

    /// The same, as an argument.
    pub fn place(&self, path: &str) -> String {
        format!("{SANDBOX}:{}/{path}", self.guest().display())
    }

    pub fn soulbox(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_soulbox"));
        command.arg(format!("--host=unix:{}", self.socket().display()));
        command
    }

    /// Runs `soulbox cp` to its end.
    pub fn copy<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Output {
        let mut command = self.soulbox();
        command.args(["cp", "--user", "root"]).args(arguments);
        command.stdin(Stdio::null()).output().unwrap()
    }

    pub fn copy_well<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) {
        let output = self.copy(arguments);
        assert!(output.status.success(), "{output:?}");
    }

    pub fn mount(&self) -> Mounted {
        self.mount_as("root", &[])
    }

    /// On a directory of its own.
    pub fn mount_as(&self, user: &str, more: &[&str]) -> Mounted {
        let directory = tempfile::tempdir_in(self.folder.path()).unwrap().keep();
        self.mount_on(&directory, user, more)
    }

    pub fn mount_on(&self, directory: &Path, user: &str, more: &[&str]) -> Mounted {
        let mut command = self.soulbox();
        command.args(["mount", "--user", user]).args(more);
        let child = command
            .arg(self.place(""))
            .arg(directory)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut mounted = Mounted {
            child: Some(child),
            directory: directory.to_owned(),
        };
        mounted.wait_ready();
        mounted
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.kill_agent();
    }
}

// === impl Mounted ===

impl Mounted {
    fn wait_ready(&mut self) {
        let child = self.child.as_mut().unwrap();
        let stderr = child.stderr.as_mut().unwrap();
        let mut said = Vec::new();
        let mut byte = [0];
        while !said.ends_with(b"unmounts it\n") {
            match stderr.read(&mut byte).unwrap() {
                0 => panic!("not mounted: {}", String::from_utf8_lossy(&said)),
                _ => said.push(byte[0]),
            }
        }
    }

    pub fn path(&self) -> &Path {
        &self.directory
    }

    pub fn join(&self, path: impl AsRef<Path>) -> PathBuf {
        self.directory.join(path)
    }

    pub fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().unwrap().id().cast_signed();
        kill_process(Pid::from_raw(child).unwrap(), signal).unwrap();
    }

    /// How it ended, and what it said until then.
    pub fn ended(&mut self) -> (ExitStatus, String) {
        let mut child = self.child.take().unwrap();
        let status = wait(&mut child);
        let mut said = String::new();
        child.stderr.unwrap().read_to_string(&mut said).unwrap();
        (status, said)
    }

    pub fn is_mounted(&self) -> bool {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let path = format!(" {} ", self.directory.display());
        mounts.lines().any(|line| line.contains(&path))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = kill_process(Pid::from_child(&child), Signal::TERM);
            let over = Instant::now() + Duration::from_secs(20);
            while child.try_wait().unwrap().is_none() {
                if Instant::now() > over {
                    let _ = child.kill();
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        let flags = rustix::mount::UnmountFlags::DETACH;
        let _ = rustix::mount::unmount(&self.directory, flags);
    }
}

pub fn wait(child: &mut Child) -> ExitStatus {
    let over = Instant::now() + LONG;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(Instant::now() < over, "it does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Waits for something that needs a moment.
pub fn until(mut condition: impl FnMut() -> bool) {
    let over = Instant::now() + LONG;
    while !condition() {
        assert!(Instant::now() < over, "it never happened");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Runs a shell script there, which must succeed.
pub fn sh(directory: &Path, script: &str) -> String {
    let output = Command::new("bash")
        .args(["-euo", "pipefail", "-c", script])
        .current_dir(directory)
        .env("HOME", directory)
        .env("GIT_CONFIG_COUNT", "2")
        .env("GIT_CONFIG_KEY_0", "user.name")
        .env("GIT_CONFIG_VALUE_0", "Somebody")
        .env("GIT_CONFIG_KEY_1", "user.email")
        .env("GIT_CONFIG_VALUE_1", "somebody@example.com")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{script}\n{said}");
    String::from_utf8(output.stdout).unwrap()
}

/// All that is in a tree: its names, and of each what a copy must keep.
pub fn snapshot(root: &Path) -> Vec<(PathBuf, String)> {
    let mut left = vec![root.to_owned()];
    let mut all = Vec::new();
    while let Some(directory) = left.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let found = path.symlink_metadata().unwrap();
            let content = if found.is_symlink() {
                format!("{:?}", std::fs::read_link(&path).unwrap())
            } else if found.is_file() {
                let data = std::fs::read(&path).unwrap();
                format!("{} {:?}", data.len(), crc(&data))
            } else {
                left.push(path.clone());
                String::new()
            };
            let mode = if found.is_symlink() { 0 } else { found.mode() };
            let times = (found.mtime(), found.mtime_nsec());
            let relative = path.strip_prefix(root).unwrap().to_owned();
            all.push((relative, format!("{mode:o} {times:?} {content}")));
        }
    }
    all.sort();
    all
}

fn crc(data: &[u8]) -> u64 {
    use std::hash::{DefaultHasher, Hasher as _};
    let mut hasher = DefaultHasher::new();
    hasher.write(data);
    hasher.finish()
}

/// Bytes that no compression makes smaller, the same each time.
pub fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// A small filesystem in memory.
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    pub fn on(directory: &Path, size: &str) -> Self {
        std::fs::create_dir_all(directory).unwrap();
        let data = std::ffi::CString::new(format!("size={size}")).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("small", directory, "tmpfs", flags, data.as_c_str()).unwrap();
        Self(directory.to_owned())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let flags = rustix::mount::UnmountFlags::DETACH;
        let _ = rustix::mount::unmount(&self.0, flags);
    }
}
