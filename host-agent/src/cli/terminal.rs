//! The terminal that this program runs in, as a program in a sandbox needs it.

use std::io::IsTerminal as _;
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, Once};

use rustix::stdio::{stderr, stdin, stdout};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use soulbox_proto::guest::v1::TerminalSize;

use super::error::CliError;
use crate::sync::lock;

/// Of a terminal that does not know its own.
const DEFAULT_SIZE: TerminalSize = TerminalSize {
    columns: 80,
    rows: 24,
};

/// How the terminal was before.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// While this lives, every key is a byte on standard input: the terminal neither
/// echoes it nor makes a signal of it.
#[derive(Debug)]
pub(super) struct RawMode;

// === impl RawMode ===

impl RawMode {
    pub(super) fn enter() -> Result<Self, CliError> {
        static RESTORE_ON_PANIC: Once = Once::new();

        let failed = |error: rustix::io::Errno| CliError::Terminal(error.into());
        let before = tcgetattr(stdin()).map_err(failed)?;
        let mut raw = before.clone();
        raw.make_raw();
        RESTORE_ON_PANIC.call_once(|| {
            let tell = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                restore();
                tell(panic);
            }));
        });
        *lock(&SAVED) = Some(before);
        let raw_mode = Self;
        tcsetattr(stdin(), OptionalActions::Now, &raw).map_err(failed)?;
        Ok(raw_mode)
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    if let Some(before) = lock(&SAVED).take() {
        // A terminal that is gone has nothing to restore.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &before);
    }
}

/// Whether keys can be read from a terminal.
pub(super) fn has_keys() -> bool {
    std::io::stdin().is_terminal()
}

/// The size of the first of the standard streams that is a terminal.
pub(super) fn size() -> TerminalSize {
    [stdin(), stdout(), stderr()]
        .into_iter()
        .find_map(size_of)
        .unwrap_or(DEFAULT_SIZE)
}

fn size_of(fd: BorrowedFd<'_>) -> Option<TerminalSize> {
    let size = tcgetwinsize(fd).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then(|| TerminalSize {
        columns: size.ws_col.into(),
        rows: size.ws_row.into(),
    })
}
