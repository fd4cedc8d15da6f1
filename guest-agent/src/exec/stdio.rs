//! Our ends of a program's pipes, or of its terminal.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use rustix::io::{Errno, ioctl_fionread, read, write};
use rustix::pty::OpenptFlags;
use rustix::termios::{Winsize, tcsetwinsize};
use soulbox_proto::guest::v1::TerminalSize;
use tokio::io::Interest;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};

use crate::sys::terminal::hang_up;
use crate::sys::watch::watch;

/// The most that is read at once; what a pipe holds.
pub(super) const CHUNK_BYTES: usize = 64 * 1024;

/// Where the program's stdin comes from.
pub(super) enum Input {
    Pipe(AsyncFd<OwnedFd>),
    Terminal(Arc<Terminal>),
}

/// What the program says goes here.
pub(super) enum Output {
    Pipe(AsyncFd<OwnedFd>),
    Terminal(Arc<Terminal>),
}

/// The master of a pseudoterminal; pty(7).
pub(super) struct Terminal {
    master: AsyncFd<OwnedFd>,
}

enum Taken {
    Bytes(usize),
    NotYet,
    End,
}

// All of them are in non-blocking mode (`process`), and are watched by the runtime
// in which these are called.

// === impl Input ===

impl Input {
    pub(super) fn pipe(fd: OwnedFd) -> io::Result<Self> {
        watch(fd, Interest::WRITABLE).map(Self::Pipe)
    }

    pub(super) fn terminal(&self) -> Option<Arc<Terminal>> {
        match self {
            Self::Terminal(terminal) => Some(Arc::clone(terminal)),
            Self::Pipe(_) => None,
        }
    }

    /// Writes some of `bytes`, which are not empty; nothing when it is cancelled.
    pub(super) async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let fd = match self {
            Self::Pipe(pipe) => pipe,
            Self::Terminal(terminal) => &terminal.master,
        };
        loop {
            let mut ready = fd.writable().await?;
            match ready.try_io(|fd| Ok(write(fd, bytes)?)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(written) => return written,
                Err(_) => {}
            }
        }
    }
}

// === impl Output ===

impl Output {
    pub(super) fn pipe(fd: OwnedFd) -> io::Result<Self> {
        watch(fd, Interest::READABLE).map(Self::Pipe)
    }

    /// Waits for bytes, and hands over those that there are; nothing when it is
    /// cancelled. Returns how many, or None at the end.
    pub(super) async fn read(&self, take: impl FnOnce(&[u8])) -> Option<usize> {
        let fd = match self {
            Self::Pipe(pipe) => pipe,
            Self::Terminal(terminal) => &terminal.master,
        };
        let mut take = Some(take);
        loop {
            let mut ready = fd.readable().await.ok()?;
            match self.take_ready(&mut ready, &mut take) {
                Taken::Bytes(bytes) => return Some(bytes),
                Taken::NotYet => {}
                Taken::End => return None,
            }
        }
    }

    /// Not async, because of its buffer: on the stack, since most programs say less,
    /// and none may take memory while it is silent.
    fn take_ready(
        &self,
        ready: &mut AsyncFdReadyGuard<'_, OwnedFd>,
        take: &mut Option<impl FnOnce(&[u8])>,
    ) -> Taken {
        let mut buffer = [MaybeUninit::uninit(); CHUNK_BYTES];
        match ready.try_io(|fd| Ok(read(fd, &mut buffer[..])?.0)) {
            Ok(Ok([])) => Taken::End,
            Ok(Ok(bytes)) => {
                // It was all: no need to ask and be told so. A terminal may have more,
                // and tell of it no second time; epoll(7).
                if bytes.len() < CHUNK_BYTES && matches!(self, Self::Pipe(_)) {
                    ready.clear_ready();
                }
                if let Some(take) = take.take() {
                    take(bytes);
                }
                Taken::Bytes(bytes.len())
            }
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => Taken::NotYet,
            // EIO: nobody has the terminal open.
            Ok(Err(_)) => Taken::End,
            Err(_) => Taken::NotYet,
        }
    }

    /// What can be read now.
    pub(super) fn held(&self) -> usize {
        let held = match self {
            Self::Pipe(pipe) => ioctl_fionread(pipe),
            Self::Terminal(terminal) => ioctl_fionread(&terminal.master),
        };
        held.ok()
            .and_then(|bytes| usize::try_from(bytes).ok())
            .unwrap_or(0)
    }
}

// === impl Terminal ===

impl Terminal {
    pub(super) fn new(master: OwnedFd) -> io::Result<Self> {
        let master = watch(master, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self { master })
    }

    /// Its foreground process group hears of it with SIGWINCH.
    pub(super) fn resize(&self, size: TerminalSize) {
        // Only fails for what is no terminal.
        let _ = tcsetwinsize(&self.master, winsize(size));
    }

    /// What the kernel does when the master is closed, so that what the program said
    /// before can still be read: SIGHUP to the session's leader, and no more reads
    /// and writes of what has it open.
    pub(super) fn hang_up(&self) -> io::Result<()> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let slave = rustix::pty::ioctl_tiocgptpeer(&self.master, flags)?;
        hang_up(slave.as_fd())
    }
}

/// Of a size that has been checked.
pub(super) fn winsize(size: TerminalSize) -> Winsize {
    let cells = |number| u16::try_from(number).unwrap_or(u16::MAX);
    Winsize {
        ws_row: cells(size.rows),
        ws_col: cells(size.columns),
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

/// Makes reads and writes of it return at once.
pub(super) fn set_nonblocking(fd: &OwnedFd) -> Result<(), Errno> {
    rustix::io::ioctl_fionbio(fd, true)
}
