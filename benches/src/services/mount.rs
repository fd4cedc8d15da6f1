//! Attributes of files through a mount, when the kernel has them.

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::{Guest, aside};
use crate::report::{Promise, Report, Row};
use crate::scratch::Scratch;

const DEVICE: &str = "/dev/fuse";
const FILES: usize = 1000;
const PASSES: usize = 10;
/// How long it may take to be mounted, and to go.
const READY: Duration = Duration::from_secs(60);
const END: Duration = Duration::from_secs(30);
/// What `soulbox mount` says then.
const READY_LINE: &str = "soulbox: ready: ";
/// Arguments: the folder, how many files.
const MAKE_FILES: &str = r#"mkdir "$1" && cd "$1" && seq -f "file-%g" "$2" | xargs touch"#;

/// `soulbox mount` on a folder. Dropping it unmounts.
struct Mounted {
    child: Child,
    folder: TempDir,
}

pub(super) async fn measure(
    guest: &mut Guest,
    scratch: &Scratch,
    report: &mut Report,
) -> Result<()> {
    let mut leave_out = |lacks: &str| report.left_out.push(format!("the mount: {lacks}"));
    let Some(command_line) = &guest.command_line else {
        leave_out("there is no program soulbox, see --soulbox");
        return Ok(());
    };
    if !Path::new(DEVICE).exists() {
        leave_out("this host has no /dev/fuse");
        return Ok(());
    }
    let there = format!("{}/mounted", guest.folders.disk);
    let argv = ["sh", "-c", MAKE_FILES, "sh", &there, &FILES.to_string()];
    guest.agent.run(&argv).await?;

    let command = command_line.command("mount");
    let place = command_line.place(&there);
    let folder = scratch.folder()?;
    let (first, cached) = aside(move || {
        let mounted = Mounted::start(command, &place, folder)?;
        let paths: Vec<PathBuf> = (1..=FILES)
            .map(|number| mounted.point().join(format!("file-{number}")))
            .collect();
        let first = stat_all(&paths)?;
        let mut cached = Vec::new();
        for _ in 0..PASSES {
            cached.extend(stat_all(&paths)?);
        }
        mounted.end()?;
        Ok((first, cached))
    })
    .await?;

    let first = Row::new(
        "stat through the mount, of a file for the first time",
        "µs",
        first,
    );
    let cached = Row::new("stat through the mount, from cache", "µs", cached);
    report.promises.push(Promise::at_most(
        "stat through the mount from cache, p50 µs",
        cached.p50,
        50.0,
    ));
    report.rows.extend([first, cached]);
    Ok(())
}

/// In microseconds.
fn stat_all(paths: &[PathBuf]) -> Result<Vec<f64>> {
    let stat = |path: &PathBuf| {
        let start = Instant::now();
        std::fs::symlink_metadata(path).with_context(|| format!("stat of {}", path.display()))?;
        Ok(start.elapsed().as_secs_f64() * 1e6)
    };
    paths.iter().map(stat).collect()
}

// === impl Mounted ===

impl Mounted {
    fn start(mut command: Command, place: &str, folder: TempDir) -> Result<Self> {
        let (point, log) = (folder.path().join("mount"), folder.path().join("log"));
        std::fs::create_dir(&point)?;
        let child = command
            .arg(place)
            .arg(&point)
            .stdin(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()
            .context("running soulbox mount")?;
        let mut mounted = Self { child, folder };
        let give_up = Instant::now() + READY;
        loop {
            let said = std::fs::read_to_string(&log)?;
            if said.lines().any(|line| line.starts_with(READY_LINE)) {
                // All but this line tells of something that is not as it should be.
                let is_alone = said.lines().count() == 1;
                ensure!(is_alone && mounted.is_mounted()?, "soulbox mount: {said}");
                return Ok(mounted);
            }
            if mounted.child.try_wait()?.is_some() || Instant::now() > give_up {
                bail!("soulbox mount does not mount: {said}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn point(&self) -> PathBuf {
        self.folder.path().join("mount")
    }

    fn is_mounted(&self) -> Result<bool> {
        let above = std::fs::metadata(self.folder.path())?;
        Ok(std::fs::metadata(self.point())?.dev() != above.dev())
    }

    /// As a person ends it.
    fn end(mut self) -> Result<()> {
        self.ask_to_end();
        let give_up = Instant::now() + END;
        while Instant::now() < give_up {
            if let Some(status) = self.child.try_wait()? {
                ensure!(status.success(), "soulbox mount ended with {status}");
                ensure!(
                    !self.is_mounted()?,
                    "soulbox mount has left its mount behind"
                );
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("soulbox mount does not end")
    }

    fn ask_to_end(&self) {
        if let Some(pid) = Pid::from_raw(self.child.id() as i32) {
            // It may have ended by itself.
            let _ = kill_process(pid, Signal::TERM);
        }
    }
}

impl Drop for Mounted {
    /// Before the folder is removed with all that is seen in it.
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        let _ = unmount(self.point(), UnmountFlags::DETACH);
    }
}
