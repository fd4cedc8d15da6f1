//! Starting `soulbox-vmm`.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::process::{MonitorProcess, ProcessError};
use super::socket::ControlSocket;

/// The number under which the monitor inherits its control socket: its standard
/// input, so that nothing of ours runs between fork and exec.
const CONTROL_FD: i32 = 0;

/// How long a new process may take from the end of its spawn to its first
/// instruction: microseconds, on a host that is alive.
const EXEC: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    #[error("{} is missing; install soulbox-vmm there or set paths.monitor", .binary.display())]
    Missing { binary: PathBuf },
    #[error("{} may not be executed; see its permissions or set paths.monitor", .binary.display())]
    NotExecutable { binary: PathBuf },
    #[error("{} cannot be started; see the host's limits on processes, memory and open files", .binary.display())]
    Start { binary: PathBuf, source: io::Error },
    #[error("a control socket for the monitor cannot be made; see the limit on open files")]
    Socket { source: io::Error },
    #[error("the monitor was started and ended again, because {0}")]
    Process(#[from] ProcessError),
}

/// Starts a monitor that has nothing but its control socket and a log.
///
/// It leads a process group of its own, so that a Ctrl-C meant for the daemon
/// does not reach it. It ends by itself when the daemon dies before a control
/// listener has been handed to it.
pub fn spawn(binary: &Path, log: File) -> Result<(MonitorProcess, ControlSocket), SpawnError> {
    let socket = |source| SpawnError::Socket { source };
    let (ours, theirs) = ControlSocket::pair().map_err(socket)?;
    let stderr = log.try_clone().map_err(socket)?;
    let mut command = Command::new(binary);
    command
        .arg("--control-fd")
        .arg(CONTROL_FD.to_string())
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::from(theirs))
        .stdout(log)
        .stderr(stderr)
        .process_group(0);
    let mut child = command.spawn().map_err(|source| {
        let binary = binary.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound => SpawnError::Missing { binary },
            io::ErrorKind::PermissionDenied => SpawnError::NotExecutable { binary },
            _ => SpawnError::Start { binary, source },
        }
    })?;
    let before = std::fs::read_link("/proc/self/exe");
    if let Err(source) = before.and_then(|before| wait_for_exec(child.id(), &before)) {
        // Dropped, it would run on.
        let _ = child.kill();
        let _ = child.wait();
        let binary = binary.to_owned();
        return Err(SpawnError::Start { binary, source });
    }
    Ok((MonitorProcess::of_child(child)?, ours))
}

/// Waits until process `pid` runs another program than `before`.
///
/// A spawn returns when exec closes what it is to close, or lets go of a vfork; the
/// memory is exchanged some instructions later (begin_new_exec in Linux 6.12.117).
/// A pagemap that is opened between the two is for ever of the memory from before.
fn wait_for_exec(pid: u32, before: &Path) -> io::Result<()> {
    let program = format!("/proc/{pid}/exe");
    let give_up = Instant::now() + EXEC;
    // None has ended, which others find out.
    while std::fs::read_link(&program).is_ok_and(|program| program == before) {
        if Instant::now() > give_up {
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::yield_now();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::{FileExt as _, PermissionsExt};

    use super::*;

    fn script(folder: &Path, text: &str) -> PathBuf {
        let path = folder.join("monitor");
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        path
    }

    #[tokio::test]
    async fn a_monitor_gets_its_socket_and_nothing_else() {
        // As the daemon does: whoever runs the tests may have left a socket open.
        crate::descriptors::keep_descriptors_from_children().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("vmm.log");
        // Prints its surroundings, then waits for the control socket's end.
        let binary = script(
            folder.path(),
            "#!/bin/sh\necho \"args $*\"\nreadlink /proc/$$/fd/0\npwd\nreadlink /proc/$$/fd/* | grep -c '^socket:'\nexec cat\n",
        );
        let (mut process, socket) = spawn(&binary, File::create(&log).unwrap()).unwrap();
        drop(socket);
        process.ended().await;
        let told = std::fs::read_to_string(&log).unwrap();
        assert!(told.starts_with("args --control-fd 0\nsocket:["), "{told}");
        // Its end of the control socket is the only socket.
        assert!(told.ends_with("]\n/\n1\n"), "{told}");
    }

    #[test]
    fn what_has_not_run_its_program_yet_is_waited_for() {
        let mut child = Command::new("/bin/sh")
            .args(["-c", "read line; exec cat"])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let pid = child.id();
        let program = || std::fs::read_link(format!("/proc/{pid}/exe")).unwrap();
        let [shell, cat] = ["/bin/sh", "/bin/cat"].map(|path| std::fs::canonicalize(path).unwrap());
        // Of the test's own spawn.
        wait_for_exec(pid, &std::env::current_exe().unwrap()).unwrap();
        assert_eq!(program(), shell);
        let teller = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            stdin.write_all(b"\n").unwrap();
            stdin
        });
        wait_for_exec(pid, &shell).unwrap();
        assert_eq!(program(), cat);
        drop(teller.join().unwrap());
        child.wait().unwrap();
        // One that has ended is no reason to wait.
        wait_for_exec(pid, &shell).unwrap();
    }

    #[tokio::test]
    async fn its_pagemap_is_of_its_own_memory() {
        let folder = tempfile::tempdir().unwrap();
        let binary = script(folder.path(), "#!/bin/sh\nread line\n");
        // Each may be met in the middle of its exec.
        for round in 0..300 {
            let log = tempfile::tempfile().unwrap();
            let (mut process, socket) = spawn(&binary, log).unwrap();
            let pagemap = process.pagemap().unwrap();
            std::thread::sleep(Duration::from_micros(500));
            // Of memory that is gone, nothing is read.
            let read = pagemap.read_at(&mut [0; 8], 0).unwrap();
            assert_eq!(read, 8, "in round {round}");
            drop(socket);
            process.ended().await;
        }
    }

    #[tokio::test]
    async fn a_missing_binary_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let log = || File::create(folder.path().join("log")).unwrap();
        let missing = folder.path().join("none");
        assert!(matches!(
            spawn(&missing, log()),
            Err(SpawnError::Missing { .. })
        ));
        std::fs::write(&missing, "").unwrap();
        assert!(matches!(
            spawn(&missing, log()),
            Err(SpawnError::NotExecutable { .. })
        ));
    }
}
