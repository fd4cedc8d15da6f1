//! A program at a terminal.

use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Termios, Winsize, tcgetattr, tcsetwinsize};

use crate::support::PATIENCE;

pub struct Terminal {
    /// Where a person would sit.
    person: std::fs::File,
    /// Where the program is.
    program: OwnedFd,
    shown: Arc<Mutex<String>>,
}

// === impl Terminal ===

impl Terminal {
    pub fn new(columns: u16, rows: u16) -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let person = openpt(flags).unwrap();
        grantpt(&person).unwrap();
        unlockpt(&person).unwrap();
        let program = ioctl_tiocgptpeer(&person, flags).unwrap();
        let person = std::fs::File::from(person);
        let shown = Arc::new(Mutex::new(String::new()));
        let terminal = Self {
            person,
            program,
            shown,
        };
        terminal.resize(columns, rows);
        let (mut reader, shown) = (
            terminal.person.try_clone().unwrap(),
            Arc::clone(&terminal.shown),
        );
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut bytes) {
                let text = String::from_utf8_lossy(&bytes[..count]);
                shown.lock().unwrap().push_str(&text);
            }
        });
        terminal
    }

    pub fn spawn(&self, command: &mut Command) -> Child {
        let stream = || self.program.try_clone().unwrap();
        let command = command.stdin(stream()).stdout(stream()).stderr(stream());
        command.spawn().unwrap()
    }

    pub fn resize(&self, columns: u16, rows: u16) {
        let size = Winsize {
            ws_col: columns,
            ws_row: rows,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&self.person, size).unwrap();
    }

    pub fn press(&self, keys: &[u8]) {
        (&self.person).write_all(keys).unwrap();
    }

    pub fn settings(&self) -> Termios {
        tcgetattr(&self.program).unwrap()
    }

    /// All that it has shown.
    pub fn shown(&self) -> String {
        self.shown.lock().unwrap().clone()
    }

    /// Forgets what it has shown.
    pub fn clear(&self) {
        self.shown.lock().unwrap().clear();
    }

    /// Waits until it shows `text`.
    pub fn wait_for(&self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.shown().contains(text) {
            assert!(Instant::now() < deadline, "no {text:?}: {:?}", self.shown());
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

/// Waits for its end.
pub fn ended(mut child: Child) -> ExitStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if Instant::now() >= deadline {
            child.kill().unwrap();
            panic!("it does not end");
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}
