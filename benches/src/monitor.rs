//! Finding the monitor to measure.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The `soulbox-vmm` beside this program, built first when cargo runs us: the
/// figures must be of the code as it is.
pub(crate) fn find(given: Option<&PathBuf>) -> Result<PathBuf> {
    if let Some(path) = given {
        ensure!(path.is_file(), "{} is not a file", path.display());
        return Ok(path.clone());
    }
    let ours = std::env::current_exe().context("finding this program")?;
    let folder = ours.parent().context("finding this program's folder")?;
    if let Some(cargo) = std::env::var_os("CARGO") {
        let mut build = Command::new(cargo);
        build.args(["build", "--quiet", "--package", "soulbox-vmm"]);
        if folder.ends_with("release") {
            build.arg("--release");
        }
        ensure!(build.status()?.success(), "soulbox-vmm does not build");
    }
    let monitor = folder.join("soulbox-vmm");
    ensure!(
        monitor.is_file(),
        "there is no soulbox-vmm beside this program; build it, or name it with --monitor"
    );
    Ok(monitor)
}
