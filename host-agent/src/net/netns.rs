//! Network namespaces with a name, as `ip netns` keeps them, and TAPs in them.
//!
//! A thread that enters a namespace was made for that and ends there: no thread
//! of the runtime is ever anywhere but in the daemon's own.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};
use tokio::sync::oneshot;

use super::slot::step;

/// Where `ip netns` looks.
pub(super) const FOLDER: &str = "/run/netns";
const OWN: &str = "/proc/thread-self/ns/net";
const TUN: &str = "/dev/net/tun";

/// A network namespace, kept alive by this.
#[derive(Debug)]
pub(super) struct Namespace {
    file: File,
}

// === impl Namespace ===

impl Namespace {
    /// That of the calling thread.
    pub(super) fn own() -> io::Result<Self> {
        Ok(Self {
            file: File::open(OWN)?,
        })
    }

    /// A new one, with its name at `path`.
    pub(super) async fn create(path: PathBuf) -> io::Result<Self> {
        on_thread(move || {
            // The name comes first: whatever happens after, the next daemon finds it.
            File::options().write(true).create_new(true).open(&path)?;
            step("named");
            // SAFETY: `unshare` is unsafe for CLONE_FILES, with which two threads could
            // disagree about who owns a descriptor; a network namespace has none.
            // The thread is this function's own and ends with it.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET)? };
            step("unshared");
            rustix::mount::mount_bind(OWN, &path)?;
            Self::own()
        })
        .await
    }

    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self {
            file: File::open(path)?,
        })
    }

    /// What `work` returns, on a thread in this namespace. What it opens there,
    /// and the programs it starts, stay there.
    pub(super) async fn run<T, F>(&self, work: F) -> io::Result<T>
    where
        F: FnOnce() -> io::Result<T> + Send + 'static,
        T: Send + 'static,
    {
        let file = self.file.try_clone()?;
        // What needs the runtime, such as a netlink socket, finds it there too.
        let runtime = tokio::runtime::Handle::current();
        on_thread(move || {
            let _inside = runtime.enter();
            rustix::thread::move_into_link_name_space(
                file.as_fd(),
                Some(LinkNameSpaceType::Network),
            )?;
            work()
        })
        .await
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Removes the name. The namespace goes with the last descriptor into it.
pub(super) fn unname(path: &Path) -> io::Result<()> {
    // A name that was never mounted over, or not once only, is removed all the same.
    while rustix::mount::unmount(path, UnmountFlags::DETACH).is_ok() {}
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Makes the folder of names as `ip netns` does: a mount that is shared, so that
/// a name removed here is gone in every mount namespace.
pub(super) fn prepare_folder() -> io::Result<()> {
    std::fs::create_dir_all(FOLDER)?;
    let shared = MountPropagationFlags::SHARED | MountPropagationFlags::REC;
    if rustix::mount::mount_change(FOLDER, shared).is_ok() {
        return Ok(());
    }
    rustix::mount::mount_bind_recursive(FOLDER, FOLDER)?;
    Ok(rustix::mount::mount_change(FOLDER, shared)?)
}

/// A TAP in the calling thread's namespace, which lives as long as its descriptor.
/// Frames carry a `virtio_net_hdr`.
pub(super) fn open_tap(name: &str) -> io::Result<OwnedFd> {
    let file = File::options().read(true).write(true).open(TUN)?;
    // SAFETY: all zeros is an `ifreq`: numbers and arrays of them.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays NUL.
    let room = request.ifr_name.len() - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = i16::try_from(flags).map_err(io::Error::other)?;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which outlives the call. No
    // crate in the tree offers it in a safe form.
    let made = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    match made {
        0 => Ok(file.into()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether this host has TAPs and lets us make them.
pub(super) fn probe_tap() -> io::Result<()> {
    File::options().read(true).write(true).open(TUN).map(drop)
}

async fn on_thread<T, F>(work: F) -> io::Result<T>
where
    F: FnOnce() -> io::Result<T> + Send + 'static,
    T: Send + 'static,
{
    let (tell, told) = oneshot::channel();
    std::thread::Builder::new()
        .name("netns".to_owned())
        .spawn(move || {
            // Nobody listens any more when the caller has given up.
            let _ = tell.send(work());
        })?;
    told.await
        .unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace panicked")))
}
