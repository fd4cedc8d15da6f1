//! The directory that is mounted on. Mounted by this program itself where it may,
//! else by fusermount3, which is setuid. Not by fuser: its unmount of a busy mount
//! fails, and after an unmount by another it may unmount what is there next.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

const DEVICE: &str = "/dev/fuse";
const KIND: &str = "fuse.soulbox";
const HELPERS: [&str; 2] = ["fusermount3", "fusermount"];
/// How the helper knows its end of the socket by which it sends the device.
const HELPER_SOCKET: &str = "_FUSE_COMMFD";
/// For a stream, which the kernel else reads 128 KiB ahead.
const READ_AHEAD_KIB: &str = "4096";

#[derive(Debug, thiserror::Error)]
pub(crate) enum MountError {
    #[error("{path} cannot be mounted on ({source}); give a directory that is there")]
    Directory { path: String, source: io::Error },
    #[error(
        "what is mounted on {path} has no program any more and cannot be unmounted; do it with `umount {path}` as root"
    )]
    Dead { path: String },
    #[error("{path} has a mount of soulbox already; unmount it with `umount {path}`")]
    Busy { path: String },
    #[error("{DEVICE} cannot be opened ({source}); load the module with `modprobe fuse`")]
    Device { source: io::Error },
    #[error("{path} cannot be mounted on ({source}); run this as root, or install fusermount3")]
    Mount { path: String, source: io::Error },
    #[error("{path} cannot be mounted on; fusermount3 says: {said}")]
    Helper { path: String, said: String },
    #[error("the kernel's side of the mount cannot be served ({source}); see dmesg")]
    Session { source: io::Error },
    #[error("{place} is no directory; mount the directory that it is in")]
    NotADirectory { place: String },
    #[error("the sandbox is gone, and {path} was unmounted: {said}")]
    Gone { path: String, said: String },
}

/// A mount that this program serves.
#[derive(Debug)]
pub(super) struct MountPoint {
    path: PathBuf,
}

/// What the mount is to be.
#[derive(Debug)]
pub(super) struct Options<'a> {
    /// What mount(8) shows.
    pub(super) source: &'a str,
    pub(super) read_only: bool,
    pub(super) allow_other: bool,
}

// === impl MountPoint ===

impl MountPoint {
    /// Mounts on `directory`, after clearing away what a killed one left there.
    pub(super) fn attach(
        directory: &Path,
        options: &Options<'_>,
    ) -> Result<(Self, OwnedFd), MountError> {
        let path = prepare(directory)?;
        let device = match mount(&path, options) {
            Err(MountError::Mount { source, .. }) if source.raw_os_error() == Some(libc::EPERM) => {
                ask_helper(&path, options)?
            }
            mounted => mounted?,
        };
        let point = Self { path };
        point.read_ahead();
        Ok((point, device))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Programs that still use it keep their files until this one ends.
    pub(super) fn detach(&self) {
        // What somebody else has unmounted, or mounted here since, is not ours.
        if !is_ours(&self.path) || detach(&self.path) {
            return;
        }
        let path = self.path.display();
        eprintln!("soulbox: {path} cannot be unmounted; do it with `umount {path}`");
    }

    /// Only root may; the rest reads in smaller pieces.
    fn read_ahead(&self) {
        let Some(device) = mounts().into_iter().rfind(|mount| mount.path == self.path) else {
            return;
        };
        let setting = format!("/sys/class/bdi/{}/read_ahead_kb", device.device);
        let _ = std::fs::write(setting, READ_AHEAD_KIB);
    }
}

fn prepare(directory: &Path) -> Result<PathBuf, MountError> {
    let shown = directory.display().to_string();
    let unusable = |source| MountError::Directory {
        path: shown.clone(),
        source,
    };
    let looked = match std::fs::metadata(directory) {
        // Its program was killed.
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => {
            let path = std::path::absolute(directory).map_err(unusable)?;
            if !detach(&path) {
                return Err(MountError::Dead { path: shown });
            }
            eprintln!("soulbox: unmounted what a killed soulbox left on {shown}");
            std::fs::metadata(directory)
        }
        looked => looked,
    };
    if !looked.map_err(unusable)?.is_dir() {
        return Err(unusable(io::ErrorKind::NotADirectory.into()));
    }
    let path = directory.canonicalize().map_err(unusable)?;
    match is_ours(&path) {
        true => Err(MountError::Busy { path: shown }),
        false => Ok(path),
    }
}

fn mount(path: &Path, options: &Options<'_>) -> Result<OwnedFd, MountError> {
    let failed = |source| MountError::Mount {
        path: path.display().to_string(),
        source,
    };
    let device = File::options().read(true).write(true).open(DEVICE);
    let device = device.map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied => failed(Errno::PERM.into()),
        _ => MountError::Device { source },
    })?;
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
    flags.set(MountFlags::RDONLY, options.read_only);
    let mut data = format!(
        "fd={},rootmode={:o},user_id={},group_id={}",
        device.as_raw_fd(),
        libc::S_IFDIR,
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    if options.allow_other {
        data.push_str(",allow_other");
    }
    let data = CString::new(data).map_err(|error| failed(error.into()))?;
    rustix::mount::mount(options.source, path, KIND, flags, data.as_c_str())
        .map_err(|errno| failed(errno.into()))?;
    Ok(device.into())
}

/// As libfuse asks it: the helper mounts and sends the device back.
fn ask_helper(path: &Path, options: &Options<'_>) -> Result<OwnedFd, MountError> {
    let failed = |source| MountError::Mount {
        path: path.display().to_string(),
        source,
    };
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    // The helper inherits it.
    rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty())
        .map_err(|errno| failed(errno.into()))?;
    // A comma would begin another option.
    let source = options.source.replace('\\', "\\\\").replace(',', "\\,");
    let mut text = format!("nosuid,nodev,fsname={source},subtype=soulbox");
    if options.read_only {
        text.push_str(",ro");
    }
    if options.allow_other {
        text.push_str(",allow_other");
    }
    let mut not_found = io::Error::from(io::ErrorKind::NotFound);
    for helper in HELPERS {
        let started = Command::new(helper)
            .arg("-o")
            .arg(&text)
            .arg("--")
            .arg(path)
            .env(HELPER_SOCKET, theirs.as_raw_fd().to_string())
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let child = match started {
            Ok(child) => child,
            Err(error) => {
                not_found = error;
                continue;
            }
        };
        drop(theirs);
        let device = receive(&ours);
        let output = child.wait_with_output().map_err(failed)?;
        return device.map_err(|_| MountError::Helper {
            path: path.display().to_string(),
            said: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        });
    }
    Err(failed(not_found))
}

fn receive(socket: &UnixStream) -> io::Result<OwnedFd> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buffers = [IoSliceMut::new(&mut byte)];
    rustix::net::recvmsg(socket, &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut devices = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut devices) => devices.next(),
        _ => None,
    });
    devices
        .next()
        .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// Lazily: what is in use goes when it is no more.
fn detach(path: &Path) -> bool {
    match rustix::mount::unmount(path, UnmountFlags::DETACH) {
        Ok(()) => true,
        Err(Errno::PERM) => HELPERS.iter().any(|helper| {
            let mut helper = Command::new(helper);
            helper.args(["-u", "-q", "-z", "--"]).arg(path);
            helper.stdin(Stdio::null()).stderr(Stdio::null());
            helper.status().is_ok_and(|status| status.success())
        }),
        Err(_) => false,
    }
}

/// A line of /proc/self/mountinfo (proc_pid_mountinfo(5)).
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    /// major:minor
    device: String,
    path: PathBuf,
    kind: String,
}

/// Whether the uppermost mount there is one of soulbox.
fn is_ours(path: &Path) -> bool {
    let uppermost = mounts().into_iter().rfind(|mount| mount.path == path);
    uppermost.is_some_and(|mount| mount.kind == KIND)
}

fn mounts() -> Vec<Mount> {
    let text = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    text.split(|&byte| byte == b'\n')
        .filter_map(parse)
        .collect()
}

fn parse(line: &[u8]) -> Option<Mount> {
    let fields: Vec<_> = line.split(|&byte| byte == b' ').collect();
    let separator = fields.iter().position(|field| field == b"-")?;
    let text = |field: &[u8]| String::from_utf8_lossy(field).into_owned();
    Some(Mount {
        device: text(fields.get(2)?),
        path: unescape(fields.get(4)?),
        kind: text(fields.get(separator + 1)?),
    })
}

/// Space, tab, line end and backslash are three octal digits after a backslash.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, after @ ..] = rest {
        let code = match rest {
            [b'\\', digits @ ..] => digits
                .get(..3)
                .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()),
            _ => None,
        };
        bytes.push(code.unwrap_or(*first));
        rest = match code {
            Some(_) => &rest[4..],
            None => after,
        };
    }
    std::ffi::OsString::from_vec(bytes).into()
}

/// For messages and mount(8): a source has no line ends.
pub(super) fn source(place: &str) -> String {
    let shown = |character: char| !character.is_control();
    place
        .chars()
        .filter(|&character| shown(character))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_read_as_the_kernel_writes_them() {
        let line =
            br"36 35 0:52 / /mnt/a\040b\134 rw,nosuid shared:1 - fuse.soulbox sb-1:/ rw,user_id=0";
        let mount = parse(line).unwrap();
        assert_eq!(mount.device, "0:52");
        assert_eq!(mount.path, Path::new(r"/mnt/a b\"));
        assert_eq!(mount.kind, KIND);
        for bad in [&b""[..], b"36 35", b"36 35 0:52 / /mnt rw -"] {
            assert_eq!(parse(bad), None);
        }
        assert_eq!(unescape(br"a\04"), Path::new(r"a\04"));
        assert_eq!(unescape(b"plain"), Path::new("plain"));
    }
}
