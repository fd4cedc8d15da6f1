//! `soulbox`, as a person would call it.

use std::path::{Path, PathBuf};
use std::process::Command;

pub(super) struct CommandLine {
    program: PathBuf,
    socket: PathBuf,
    sandbox: String,
}

// === impl CommandLine ===

impl CommandLine {
    /// None where there is no such program.
    pub(super) fn find(program: Option<PathBuf>, socket: &Path, sandbox: &str) -> Option<Self> {
        let program = program.filter(|program| program.is_file())?;
        Some(Self {
            program,
            socket: socket.to_owned(),
            sandbox: sandbox.to_owned(),
        })
    }

    pub(super) fn command(&self, subcommand: &str) -> Command {
        let mut command = Command::new(&self.program);
        command
            .arg("--host")
            .arg(format!("unix:{}", self.socket.display()))
            .arg(subcommand);
        command
    }

    /// A path in the guest.
    pub(super) fn place(&self, path: &str) -> String {
        format!("{}:{path}", self.sandbox)
    }
}
