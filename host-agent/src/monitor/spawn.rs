//! Starting `soulbox-vmm`.

use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::process::{MonitorProcess, ProcessError};
use super::socket::ControlSocket;

/// The number under which the monitor inherits its control socket: its standard
/// input, so that the standard library starts it with posix_spawn(3), which
/// copies no page tables of a large daemon.
const CONTROL_FD: i32 = 0;

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
    let child = command.spawn().map_err(|source| {
        let binary = binary.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound => SpawnError::Missing { binary },
            io::ErrorKind::PermissionDenied => SpawnError::NotExecutable { binary },
            _ => SpawnError::Start { binary, source },
        }
    })?;
    Ok((MonitorProcess::of_child(child)?, ours))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

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
