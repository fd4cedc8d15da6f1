//! Where benches make their folders.

use std::path::PathBuf;

#[derive(Debug, Default, clap::Args)]
#[group(id = "scratch-folder")]
pub(crate) struct Scratch {
    /// Where snapshots are written, in a folder that is removed afterwards
    /// [default: $SOULBOX_SCRATCH, else the folder for temporary files]
    #[arg(long, value_name = "DIR", env = "SOULBOX_SCRATCH", hide_env = true)]
    scratch: Option<PathBuf>,
}

// === impl Scratch ===

impl Scratch {
    pub(crate) fn folder(&self) -> std::io::Result<tempfile::TempDir> {
        match &self.scratch {
            Some(below) => tempfile::tempdir_in(below),
            None => tempfile::tempdir(),
        }
    }
}
