//! What PID 1 does before it serves: the guest's filesystems, limits, loopback
//! interface and name.
//!
//! No step is fatal. A guest that lacks one can still be asked what is wrong,
//! so a failure is one line on the console. The console is slow (each byte may
//! leave the VM), so there are no lines about success.

mod mounts;
mod resize;

use std::fmt::Display;
use std::fs;
use std::io;

use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::system::sethostname;

use crate::system::{FILES, lay_over, loopback_up};

/// A distribution's usual limits of open files: programs start with the soft one
/// and may raise it to the hard one.
const OPEN_FILES_SOFT: u64 = 65_536;
const OPEN_FILES_HARD: u64 = 1_048_576;

/// Makes a bare kernel with a root filesystem a machine that programs know.
///
/// Left as the kernel has them: sysctls, and the agent's oom_score_adj. The
/// kernel never chooses PID 1 as the victim, and programs inherit the score, so
/// a score of our own would have to be taken back in each of them.
pub(crate) fn set_up() {
    for mount in mounts::ALL {
        attempt(mount.target, mount.make());
    }
    attempt("/dev", mounts::link_descriptors());
    attempt("/", mounts::make_root_writable());
    attempt("/tmp", mounts::make_sticky("/tmp"));
    attempt("/run/lock", mounts::make_sticky("/run/lock"));
    attempt("growing /", resize::grow_root());
    for path in FILES {
        attempt(path, lay_over(path));
    }
    attempt("lo", loopback_up());
    let limit = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: Some(OPEN_FILES_SOFT),
            maximum: Some(OPEN_FILES_HARD),
        },
    );
    attempt("the limit of open files", limit);
    attempt("the hostname", set_hostname());
}

/// The template's own name until the host gives the guest another.
fn set_hostname() -> io::Result<()> {
    let file = fs::read_to_string("/etc/hostname").unwrap_or_default();
    let name = Some(file.trim())
        .filter(|name| !name.is_empty())
        .unwrap_or("soulbox");
    Ok(sethostname(name.as_bytes())?)
}

fn attempt<E: Display>(what: &str, result: Result<(), E>) {
    if let Err(error) = result {
        eprintln!("soulbox-guest: {what}: {error}");
    }
}
