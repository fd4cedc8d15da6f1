//! One process from its start to its end.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::fchown;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use rustix::fs::{Mode, OFlags, fchmod};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{InputModes, OptionalActions, tcgetattr, tcsetattr, tcsetwinsize};
use soulbox_proto::guest::v1::TerminalSize;

use super::cgroup::{Cgroup, Cgroups, LimitsError};
use super::program::{Program, StringTooLong};
use super::stdio::{set_nonblocking, winsize};
use crate::reaper::{Child, Reaper};
use crate::spec::Spec;
use crate::sys::process::kill_one;
use crate::sys::spawn::{Command, SpawnError, spawn};
use crate::sys::wait::{Exit, ExitStatus};
use crate::users::{Identity, NoSuchUser, Users};

/// A running program and our ends of what it speaks through. It is killed when
/// dropped before its end was told.
pub(crate) struct Process {
    pub(crate) stdio: Option<Stdio>,
    pub(crate) about: About,
    pub(crate) started: Instant,
    pub(crate) control: Arc<Control>,
    exit: Option<tokio::sync::oneshot::Receiver<Exit>>,
}

/// The hold on a process and all that it started. Its cgroup is another's when nobody
/// has this any more.
pub(crate) struct Control {
    pub(crate) pid: i32,
    reaper: Reaper,
    cgroup: Option<Cgroup>,
}

/// In non-blocking mode.
pub(crate) enum Stdio {
    Pipes {
        /// None where the program's stdin is /dev/null.
        stdin: Option<OwnedFd>,
        stdout: OwnedFd,
        stderr: OwnedFd,
    },
    /// The master.
    Terminal(OwnedFd),
}

/// What a process is known by.
#[derive(Clone, Default)]
pub(crate) struct About {
    /// Cut; see [`ARGV_BYTES`].
    pub(crate) argv: Vec<Bytes>,
    pub(crate) cwd: Bytes,
    pub(crate) user: String,
    pub(crate) has_terminal: bool,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error(transparent)]
    NoSuchUser(#[from] NoSuchUser),
    #[error(transparent)]
    StringTooLong(#[from] StringTooLong),
    #[error("no pipes could be made for the program: stop others, or raise fs.file-max")]
    Pipes(#[source] io::Error),
    #[error("no terminal could be made: close others, or mount devpts on /dev/pts")]
    Terminal(#[source] io::Error),
    #[error("no cgroup could be made for the program: stop others, or look at /sys/fs/cgroup")]
    Cgroup(#[source] io::Error),
    #[error(transparent)]
    Limits(#[from] LimitsError),
    #[error("{error}")]
    Spawn {
        error: SpawnError,
        name: Vec<u8>,
        cwd: Vec<u8>,
        user: String,
    },
}

/// How much of its arguments a process is known by: a list of a thousand must not
/// have a thousand times what Linux takes.
const ARGV_BYTES: usize = 1024;
/// What still has new processes after so many looks forks faster than we read.
const SIGNAL_ROUNDS: usize = 16;

// === impl Process ===

impl Process {
    /// Starts the program. Blocks: see [`spawn`].
    pub(crate) fn start(
        spec: &Spec,
        reaper: Reaper,
        cgroups: Option<Arc<Cgroups>>,
    ) -> Result<Self, StartError> {
        let identity = Users::read(Path::new("/etc")).find(&spec.user)?;
        let program = Program::new(spec, &identity)?;
        let (theirs, ours) = match spec.terminal {
            Some(size) => terminal(size, &identity).map_err(StartError::Terminal)?,
            None => pipes(spec.stdin, &identity).map_err(StartError::Pipes)?,
        };
        let mut cgroup = cgroup(spec, cgroups.as_ref())?;

        let started = Instant::now();
        let child = loop {
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
                nice: spec.nice,
                has_terminal: spec.terminal.is_some(),
                stdio: theirs.each_ref().map(OwnedFd::as_fd),
                cgroup: cgroup.as_ref().map(Cgroup::folder),
            };
            match reaper.start(|pid| spawn(&command, pid)) {
                Ok(child) => break child,
                // What used the folder before has made it unfit for others.
                Err(error)
                    if error.is_of_cgroup() && cgroup.as_ref().is_some_and(Cgroup::is_used) =>
                {
                    if let Some(cgroup) = cgroup.take() {
                        cgroup.spoil();
                    }
                    cgroup = self::cgroup(spec, cgroups.as_ref())?;
                }
                Err(error) => {
                    return Err(StartError::Spawn {
                        error,
                        name: program.name().to_owned(),
                        cwd: program.cwd.as_bytes().to_owned(),
                        user: identity.name,
                    });
                }
            }
        };
        let Child { pid, exit } = child;
        Ok(Self {
            stdio: Some(ours),
            about: About::new(&program, identity.name, spec.terminal.is_some()),
            started,
            control: Arc::new(Control {
                pid,
                reaper,
                cgroup,
            }),
            exit: Some(exit),
        })
    }

    /// Waits for the end; once it has been told, for ever.
    pub(crate) async fn wait(&mut self) -> Exit {
        if let Some(exit) = &mut self.exit {
            let told = exit.await;
            self.exit = None;
            if let Ok(exit) = told {
                // It may have been root in the guest, by way of the cgroup.
                if exit.status == ExitStatus::Signal(libc::SIGKILL.cast_unsigned())
                    && let Some(cgroup) = &self.control.cgroup
                {
                    cgroup.spoil();
                }
                return exit;
            }
        }
        std::future::pending().await
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.exit.is_some() {
            self.control.kill();
        }
    }
}

// === impl Control ===

impl Control {
    /// Signals the process group.
    pub(crate) fn signal(&self, signal: i32) {
        self.reaper.signal_group(self.pid, signal);
    }

    /// Signals the process with all that it started; without a cgroup, its group.
    pub(crate) fn signal_tree(&self, signal: i32) {
        let Some(cgroup) = &self.cgroup else {
            return self.signal(signal);
        };
        // Those that are forked meanwhile are in the next list. A number is another
        // process's only after all others have been used, which is no risk in the
        // microseconds between.
        let mut signalled = Vec::new();
        for _ in 0..SIGNAL_ROUNDS {
            let listed = cgroup.processes();
            let known = signalled.len();
            for pid in listed {
                if !signalled.contains(&pid) {
                    kill_one(pid, signal);
                    signalled.push(pid);
                }
            }
            if signalled.len() == known {
                return;
            }
        }
    }

    /// Whether something that it started is known to have outlived it.
    pub(crate) fn has_left_processes(&self) -> bool {
        let cgroup = self.cgroup.as_ref();
        cgroup.is_some_and(|cgroup| !cgroup.is_empty())
    }

    /// Kills the process with all that it started; without a cgroup, its group.
    pub(crate) fn kill(&self) {
        match self.cgroup.as_ref().map(Cgroup::kill) {
            Some(Ok(())) => {}
            None | Some(Err(_)) => self.signal(libc::SIGKILL),
        }
    }
}

#[cfg(test)]
impl Control {
    /// Of a process that never was; nothing is sent to it.
    pub(super) fn of_nobody() -> Self {
        Self {
            pid: 0,
            reaper: Reaper::default(),
            cgroup: None,
        }
    }
}

// === impl About ===

impl About {
    fn new(program: &Program, user: String, has_terminal: bool) -> Self {
        let mut room = ARGV_BYTES;
        let argv = program.argv.iter().map_while(|argument| {
            let argument = argument.as_bytes();
            let shown = argument.get(..room.min(argument.len()))?;
            let is_room = room > 0;
            // One more, so that empty ones have an end, too.
            room = room.saturating_sub(shown.len() + 1);
            is_room.then(|| Bytes::copy_from_slice(shown))
        });
        Self {
            argv: argv.collect(),
            cwd: Bytes::copy_from_slice(program.cwd.as_bytes()),
            user,
            has_terminal,
        }
    }
}

fn cgroup(spec: &Spec, cgroups: Option<&Arc<Cgroups>>) -> Result<Option<Cgroup>, StartError> {
    match (cgroups, &spec.cgroup) {
        (Some(cgroups), None) => cgroups.make().map(Some).map_err(StartError::Cgroup),
        (Some(cgroups), Some(limits)) => Ok(Some(cgroups.make_limited(limits)?)),
        (None, Some(_)) => Err(LimitsError::NoCgroups.into()),
        (None, None) => Ok(None),
    }
}

/// The program's three descriptors, and ours. Pipes belong to the program's user,
/// or it could not open /dev/stdout.
fn pipes(stdin: bool, identity: &Identity) -> io::Result<([OwnedFd; 3], Stdio)> {
    let own = |fd: &OwnedFd| fchown(fd, Some(identity.uid), Some(identity.gid));
    let (stdin, our_stdin) = if stdin {
        let (reader, writer) = io::pipe()?;
        let (reader, writer) = (OwnedFd::from(reader), OwnedFd::from(writer));
        own(&reader)?;
        set_nonblocking(&writer)?;
        (reader, Some(writer))
    } else {
        (OwnedFd::from(File::open("/dev/null")?), None)
    };
    let output = || -> io::Result<(OwnedFd, OwnedFd)> {
        let (reader, writer) = io::pipe()?;
        let (reader, writer) = (OwnedFd::from(reader), OwnedFd::from(writer));
        own(&writer)?;
        set_nonblocking(&reader)?;
        Ok((reader, writer))
    };
    let (our_stdout, stdout) = output()?;
    let (our_stderr, stderr) = output()?;
    let ours = Stdio::Pipes {
        stdin: our_stdin,
        stdout: our_stdout,
        stderr: our_stderr,
    };
    Ok(([stdin, stdout, stderr], ours))
}

/// The slave three times, and the master. The slave is opened by way of the master:
/// what is mounted on /dev/pts by then does not matter.
fn terminal(size: TerminalSize, identity: &Identity) -> io::Result<([OwnedFd; 3], Stdio)> {
    // `openpt` has no O_NONBLOCK.
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let master = rustix::fs::open("/dev/ptmx", flags, Mode::empty())?;
    unlockpt(&master)?;
    tcsetwinsize(&master, winsize(size))?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = ioctl_tiocgptpeer(&master, flags)?;
    // The group, tty, is the filesystem's to say.
    fchown(&slave, Some(identity.uid), None)?;
    fchmod(&slave, Mode::from_raw_mode(0o620))?;
    // Backspace takes a character, not a byte: LANG is UTF-8.
    let mut modes = tcgetattr(&slave)?;
    modes.input_modes |= InputModes::IUTF8;
    tcsetattr(&slave, OptionalActions::Now, &modes)?;
    let theirs = [slave.try_clone()?, slave.try_clone()?, slave];
    Ok((theirs, Stdio::Terminal(master)))
}
