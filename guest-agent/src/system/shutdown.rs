//! The way down: programs, disks, power.

use std::fs;
use std::time::Duration;

use rustix::fs::sync;
use rustix::mount::{MountFlags, UnmountFlags, mount_remount, unmount};
use rustix::system::{RebootCommand, reboot};
use tokio::time::{Instant, sleep};

use crate::sys::process::kill_all;

/// How long programs have to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(2);
/// How long the kernel has to end them after SIGKILL.
const KILL_WAIT: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(5);

/// Ends every program: SIGTERM, and SIGKILL for those that stay. Programs that are
/// suspended hear only the latter, and run on for nobody's sake: in a clone they
/// would take themselves for another's.
pub(crate) async fn stop_programs(suspended: bool) {
    if !suspended {
        kill_all(libc::SIGTERM);
    }
    if suspended || !all_gone(GRACE).await {
        kill_all(libc::SIGKILL);
        all_gone(KILL_WAIT).await;
    }
}

/// Puts the disks in order and turns the machine off.
pub(crate) fn power_off() -> std::io::Result<()> {
    sync();
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    // The newest first. What is busy or virtual is none of the disks' business.
    for mount_point in mounts.lines().rev().filter_map(disk_mount_point) {
        if unmount(&mount_point, UnmountFlags::empty()).is_err() {
            let _ = unmount(&mount_point, UnmountFlags::DETACH);
        }
    }
    if let Err(error) = mount_remount("/", MountFlags::RDONLY, "") {
        // The journal is what it is for; a sync has been done.
        eprintln!("soulbox-guest: / stays writable ({error})");
        sync();
    }
    Ok(reboot(RebootCommand::PowerOff)?)
}

/// Waits until no process is left; zombies do not count. There is nothing to
/// wait on, since the orphans of others become ours only when they end.
async fn all_gone(patience: Duration) -> bool {
    let over = Instant::now() + patience;
    while others_live() {
        if Instant::now() > over {
            return false;
        }
        sleep(POLL).await;
    }
    true
}

fn others_live() -> bool {
    let Ok(entries) = fs::read_dir("/proc") else {
        return false;
    };
    entries.flatten().any(|entry| {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            return false;
        };
        // A kernel thread and a zombie have no command line.
        pid != 1 && fs::read(entry.path().join("cmdline")).is_ok_and(|line| !line.is_empty())
    })
}

// "device mount-point type options 0 0"; a space in a name is \040.
fn disk_mount_point(line: &str) -> Option<String> {
    let mut fields = line.split(' ');
    let (device, mount_point) = (fields.next()?, fields.next()?);
    let is_disk = device.starts_with("/dev/") && device != "/dev/root" && mount_point != "/";
    is_disk.then(|| mount_point.replace("\\040", " "))
}

#[cfg(test)]
mod tests {
    use super::disk_mount_point;

    #[test]
    fn only_disks_are_unmounted_and_not_the_root() {
        let point = |line| disk_mount_point(line);
        assert_eq!(
            point("/dev/vdb /mnt/my\\040data ext4 rw 0 0").as_deref(),
            Some("/mnt/my data")
        );
        assert_eq!(point("/dev/root / ext4 rw 0 0"), None);
        assert_eq!(point("/dev/vda / ext4 rw 0 0"), None);
        assert_eq!(point("proc /proc proc rw 0 0"), None);
    }
}
