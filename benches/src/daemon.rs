//! The soulboxd that Linux guests are measured through: one that runs, or one of
//! the bench's own on a folder that goes with it.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::scratch::Scratch;

/// How long it may take to serve.
const START: Duration = Duration::from_secs(60);
/// The folder of its sockets, in its own.
const RUN: &str = "run";

/// Which soulboxd.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Linux guests")]
#[group(id = "soulboxd")]
pub(crate) struct Options {
    /// Measure through the soulboxd that serves this socket
    #[arg(long, value_name = "unix:SOCKET", conflicts_with = "daemon")]
    host: Option<String>,
    /// Start a soulboxd of its own from this folder, with soulbox-vmm in it
    #[arg(long, value_name = "BIN_DIR", requires = "templates")]
    daemon: Option<PathBuf>,
    /// The templates of that soulboxd
    #[arg(long, value_name = "DIR", requires = "daemon")]
    templates: Option<PathBuf>,
}

/// Where the API is. Dropping one's own daemon stops it and its sandboxes.
pub(crate) struct Daemon {
    socket: PathBuf,
    own: Option<Own>,
}

struct Own {
    child: Child,
    /// State, sockets and the log.
    folder: TempDir,
}

// === impl Options ===

impl Options {
    pub(crate) fn names_one(&self) -> bool {
        self.host.is_some() || self.daemon.is_some()
    }

    /// A program beside the soulboxd that is started.
    pub(crate) fn program(&self, name: &str) -> Option<PathBuf> {
        self.daemon.as_ref().map(|bin| bin.join(name))
    }

    pub(crate) fn find(&self, scratch: &Scratch) -> Result<Daemon> {
        match (&self.host, &self.daemon, &self.templates) {
            (Some(host), _, _) => Daemon::at(host),
            (None, Some(bin), Some(templates)) => Daemon::start(bin, templates, scratch.folder()?),
            _ => bail!(
                "Linux guests are run by a soulboxd: name a running one with --host unix:SOCKET, \
                 or have one started with --daemon BIN_DIR --templates DIR"
            ),
        }
    }
}

// === impl Daemon ===

impl Daemon {
    /// One that runs already, at `unix:PATH`.
    pub(crate) fn at(host: &str) -> Result<Self> {
        let path = host.strip_prefix("unix:").unwrap_or_default();
        let socket = PathBuf::from(path.strip_prefix("//").unwrap_or(path));
        ensure!(
            socket.is_absolute(),
            "--host takes unix:/PATH, not {host}: what is measured must be of this machine"
        );
        Ok(Self { socket, own: None })
    }

    /// Starts one that may hand out more than there is: clones share what they have.
    pub(crate) fn start(bin: &Path, templates: &Path, folder: TempDir) -> Result<Self> {
        let bin = std::path::absolute(bin)?;
        let socket = folder.path().join("soulboxd.sock");
        let config = folder.path().join("soulboxd.toml");
        let text = format!(
            "[listen]\nunix_path = {socket:?}\n\
             [paths]\nstate_dir = {state:?}\nrun_dir = {run:?}\ntemplate_dir = {templates:?}\n\
             monitor = {monitor:?}\n\
             [capacity]\nvcpus = 10000\nmemory_mib = 10000000\ndisk_mib = 1000000000\n\
             [timeouts]\nboot_ms = 300000\n\
             [shutdown]\nsandboxes = \"stop\"\n",
            state = folder.path().join("state"),
            run = folder.path().join(RUN),
            templates = std::path::absolute(templates)?,
            monitor = bin.join("soulbox-vmm"),
        );
        std::fs::write(&config, text)?;
        let log = folder.path().join("log");
        let program = bin.join("soulboxd");
        let child = Command::new(&program)
            .arg("--config")
            .arg(&config)
            .stdin(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        let mut daemon = Self {
            socket,
            own: Some(Own { child, folder }),
        };
        daemon.await_socket(&log)?;
        Ok(daemon)
    }

    fn await_socket(&mut self, log: &Path) -> Result<()> {
        let give_up = Instant::now() + START;
        while UnixStream::connect(&self.socket).is_err() {
            let ended = match &mut self.own {
                Some(own) => own.child.try_wait()?.is_some(),
                None => false,
            };
            if ended || Instant::now() > give_up {
                let log = std::fs::read_to_string(log).unwrap_or_default();
                bail!("soulboxd does not serve; its log:\n{log}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Where the sockets of its sandboxes are. Of one that ran already it is not known.
    pub(crate) fn run_dir(&self) -> Option<PathBuf> {
        self.own.as_ref().map(|own| own.folder.path().join(RUN))
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        if let Some(pid) = Pid::from_raw(self.child.id() as i32) {
            // It may have ended by itself; it is reaped below either way.
            let _ = kill_process(pid, Signal::TERM);
        }
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sockets_of_this_machine_are_measured() {
        assert_eq!(
            Daemon::at("unix:/run/s").unwrap().socket(),
            Path::new("/run/s")
        );
        assert_eq!(
            Daemon::at("unix:///run/s").unwrap().socket(),
            Path::new("/run/s")
        );
        for bad in ["", "/run/s", "unix:run/s", "http://10.0.0.5:7600"] {
            assert!(Daemon::at(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_daemon_that_does_not_start_is_told_of() {
        let folder = tempfile::tempdir().unwrap();
        let bin = tempfile::tempdir().unwrap();
        let no_program = Daemon::start(bin.path(), Path::new("/"), folder);
        assert!(no_program.is_err());

        let daemon = bin.path().join("soulboxd");
        std::fs::write(&daemon, "#!/bin/sh\necho cannot >&2\nexit 1\n").unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&daemon, mode).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let error = Daemon::start(bin.path(), Path::new("/"), folder)
            .err()
            .unwrap();
        assert!(error.to_string().contains("cannot"), "{error}");
    }
}
