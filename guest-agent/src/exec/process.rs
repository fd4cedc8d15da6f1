//! One process from its start to its end.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::fchown;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::cgroup::{Cgroup, Cgroups};
use super::program::{Program, StringTooLong};
use crate::reaper::{Child, Reaper};
use crate::spec::Spec;
use crate::sys::spawn::{Command, SpawnError, spawn};
use crate::sys::wait::Exit;
use crate::users::{Identity, NoSuchUser, Users};

/// A running program and our ends of its pipes. It is killed when dropped before
/// its end was told.
pub(crate) struct Process {
    pub(crate) pid: i32,
    pub(crate) pipes: Option<Pipes>,
    pub(crate) started: Instant,
    exit: Option<tokio::sync::oneshot::Receiver<Exit>>,
    reaper: Reaper,
    cgroup: Option<Cgroup>,
}

pub(crate) struct Pipes {
    /// None where the program's stdin is /dev/null.
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: OwnedFd,
    pub(crate) stderr: OwnedFd,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error(transparent)]
    NoSuchUser(#[from] NoSuchUser),
    #[error(transparent)]
    StringTooLong(#[from] StringTooLong),
    #[error("no pipes could be made for the program: stop others, or raise fs.file-max")]
    Pipes(#[source] io::Error),
    #[error("no cgroup could be made for the program: stop others, or look at /sys/fs/cgroup")]
    Cgroup(#[source] io::Error),
    #[error("{error}")]
    Spawn {
        error: SpawnError,
        name: Vec<u8>,
        cwd: Vec<u8>,
        user: String,
    },
}

// === impl Process ===

impl Process {
    /// Starts the program, with `channel` as its descriptor 3. Blocks: see [`spawn`].
    pub(crate) fn start(
        spec: Spec,
        channel: Option<OwnedFd>,
        reaper: Reaper,
        cgroups: Option<Arc<Cgroups>>,
    ) -> Result<Self, StartError> {
        let identity = Users::read(Path::new("/etc")).find(&spec.user)?;
        let program = Program::new(&spec, &identity)?;
        let (theirs, ours) = pipes(spec.stdin, &identity).map_err(StartError::Pipes)?;
        let cgroup = cgroups.map(|cgroups| cgroups.make()).transpose();
        let cgroup = cgroup.map_err(StartError::Cgroup)?;

        let command = Command {
            candidates: &program.candidates,
            argv: &program.argv,
            env: &program.env,
            cwd: &program.cwd,
            cwd_may_fail: program.cwd_is_home,
            uid: identity.uid,
            gid: identity.gid,
            groups: &identity.groups,
            limits: &spec.limits,
            stdio: theirs.each_ref().map(OwnedFd::as_fd),
            channel: channel.as_ref().map(OwnedFd::as_fd),
            cgroup: cgroup.as_ref().map(Cgroup::folder),
        };
        let started = Instant::now();
        let Child { pid, exit } =
            reaper
                .start(|pid| spawn(&command, pid))
                .map_err(|error| StartError::Spawn {
                    error,
                    name: spec
                        .argv
                        .first()
                        .map(|name| name.as_bytes().to_owned())
                        .unwrap_or_default(),
                    cwd: program.cwd.as_bytes().to_owned(),
                    user: identity.name.clone(),
                })?;
        Ok(Self {
            pid,
            pipes: Some(ours),
            started,
            exit: Some(exit),
            reaper,
            cgroup,
        })
    }

    /// Waits for the end; once it has been told, for ever.
    pub(crate) async fn wait(&mut self) -> Exit {
        if let Some(exit) = &mut self.exit {
            let told = exit.await;
            self.exit = None;
            if let Ok(exit) = told {
                return exit;
            }
        }
        std::future::pending().await
    }

    /// Signals the process group.
    pub(crate) fn signal(&self, signal: i32) {
        self.reaper.signal_group(self.pid, signal);
    }

    /// Kills the process with all that it started; without a cgroup, its group.
    pub(crate) fn kill(&self) {
        match self.cgroup.as_ref().map(Cgroup::kill) {
            Some(Ok(())) => {}
            None | Some(Err(_)) => self.signal(libc::SIGKILL),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.exit.is_some() {
            self.kill();
        }
    }
}

/// The program's three descriptors, and ours. Pipes belong to the program's user,
/// or it could not open /dev/stdout.
fn pipes(stdin: bool, identity: &Identity) -> io::Result<([OwnedFd; 3], Pipes)> {
    let (stdin, our_stdin) = if stdin {
        let (reader, writer) = io::pipe()?;
        fchown(&reader, Some(identity.uid), Some(identity.gid))?;
        (OwnedFd::from(reader), Some(OwnedFd::from(writer)))
    } else {
        (OwnedFd::from(File::open("/dev/null")?), None)
    };
    let (our_stdout, stdout) = io::pipe()?;
    fchown(&stdout, Some(identity.uid), Some(identity.gid))?;
    let (our_stderr, stderr) = io::pipe()?;
    fchown(&stderr, Some(identity.uid), Some(identity.gid))?;

    let ours = Pipes {
        stdin: our_stdin,
        stdout: our_stdout.into(),
        stderr: our_stderr.into(),
    };
    Ok(([stdin, stdout.into(), stderr.into()], ours))
}
