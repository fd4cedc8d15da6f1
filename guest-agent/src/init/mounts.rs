//! The virtual filesystems. `/tmp` is not among them: it stays on the disk,
//! because files in a tmpfs would take the memory that programs need, and every
//! snapshot would carry them.

use std::ffi::CString;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt as _, symlink};

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_remount};

pub(super) struct Mount {
    pub(super) target: &'static str,
    kind: &'static str,
    flags: MountFlags,
    options: &'static str,
}

const NONE: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);
const NO_DEVICES: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);
const DEVICES: MountFlags = MountFlags::NOSUID;

/// In the order that their mount points appear.
pub(super) const ALL: [Mount; 7] = [
    Mount {
        target: "/proc",
        kind: "proc",
        flags: NONE,
        options: "",
    },
    Mount {
        target: "/sys",
        kind: "sysfs",
        flags: NONE,
        options: "",
    },
    Mount {
        target: "/sys/fs/cgroup",
        kind: "cgroup2",
        flags: NONE,
        options: "nsdelegate",
    },
    Mount {
        target: "/dev",
        kind: "devtmpfs",
        flags: DEVICES,
        options: "mode=755",
    },
    // Group 5 is tty, as everywhere.
    Mount {
        target: "/dev/pts",
        kind: "devpts",
        flags: MountFlags::NOSUID.union(MountFlags::NOEXEC),
        options: "mode=620,gid=5,ptmxmode=666",
    },
    Mount {
        target: "/dev/shm",
        kind: "tmpfs",
        flags: NO_DEVICES,
        options: "mode=1777",
    },
    Mount {
        target: "/run",
        kind: "tmpfs",
        flags: NO_DEVICES,
        options: "mode=755",
    },
];

const LINKS: [(&str, &str); 4] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
];

// === impl Mount ===

impl Mount {
    /// Mounts it, unless the kernel has already done so (`/dev`).
    pub(super) fn make(&self) -> io::Result<()> {
        // Fails where it exists, and on a read-only root; mount will tell.
        let _ = fs::create_dir(self.target);
        let options = CString::new(self.options)?;
        match mount(
            self.kind,
            self.target,
            self.kind,
            self.flags,
            options.as_c_str(),
        ) {
            Ok(()) | Err(Errno::BUSY) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

pub(super) fn link_descriptors() -> io::Result<()> {
    for (link, target) in LINKS {
        match symlink(target, link) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

pub(super) fn make_sticky(path: &str) -> io::Result<()> {
    fs::create_dir_all(path)?;
    fs::set_permissions(path, Permissions::from_mode(0o1777))
}

/// The kernel mounts the root read-only unless its command line has `rw`.
pub(super) fn make_root_writable() -> io::Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    if is_read_only(&mounts, "/") {
        mount_remount("/", MountFlags::empty(), "")?;
    }
    Ok(())
}

// "device mount-point type options 0 0"; of two on one point the last counts.
fn is_read_only(mounts: &str, mount_point: &str) -> bool {
    let mut lines = mounts.lines().rev().map(|line| line.split(' '));
    let options = lines.find_map(|mut fields| {
        (fields.nth(1) == Some(mount_point))
            .then(|| fields.nth(1))
            .flatten()
    });
    options.is_some_and(|options| options.split(',').any(|option| option == "ro"))
}

#[cfg(test)]
mod tests {
    use super::is_read_only;

    #[test]
    fn the_last_mount_of_a_point_counts() {
        let mounts =
            "rootfs / rootfs rw 0 0\n/dev/root / ext4 ro,relatime 0 0\nproc /proc proc rw 0 0\n";
        assert!(is_read_only(mounts, "/"));
        assert!(!is_read_only(mounts, "/proc"));
        assert!(!is_read_only(
            "/dev/root / ext4 rw,errors=remount-ro 0 0\n",
            "/"
        ));
        assert!(!is_read_only("", "/"));
    }
}
