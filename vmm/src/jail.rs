//! What the monitor gives up before it reads its first message: every
//! capability, every path (Landlock), and every system call it does not need
//! (seccomp). All it may touch comes later, as descriptors.

use std::os::fd::AsRawFd;

use landlock::{ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr};
use rustix::thread::{CapabilitySet, CapabilitySets};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

use crate::devices::virtio::block::REGISTER_FILES_UPDATE;
use crate::devices::virtio::net::TAP_IOCTLS;
use crate::memory::pagemap::PAGEMAP_SCAN;

/// KVM's ioctls (`KVMIO`), in bits 15:8 of every one of their numbers.
const KVM_IOCTL_TYPE: u64 = 0xae << 8;
const IOCTL_TYPE_MASK: u64 = 0xff << 8;

/// From linux/prctl.h; not in libc yet.
const PR_GET_AUXV: u64 = 0x4155_5856;

/// System calls that are allowed with any arguments.
const ALLOWED: &[libc::c_long] = &[
    // The event loop and its descriptors.
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_fcntl,
    // The control socket and vsock's streams. No socket(2), no connect(2).
    libc::SYS_recvmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_accept4,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    // Disks, layers and the kernel image.
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_newfstatat,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_copy_file_range,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_msync,
    // Memory and threads.
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_mincore,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_seccomp,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_restart_syscall,
    // Time and random numbers.
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_getrandom,
];

#[derive(Debug, thiserror::Error)]
pub enum JailError {
    #[error("capabilities could not be given up")]
    Capabilities(#[source] rustix::io::Errno),
    #[error("no_new_privs could not be set")]
    NoNewPrivileges(#[source] rustix::io::Errno),
    #[error("Landlock could not be set up")]
    Landlock(#[source] landlock::RulesetError),
    #[error("the seccomp filter could not be built")]
    Filter(#[source] BackendError),
    #[error("the seccomp filter could not be installed")]
    Install(#[source] seccompiler::Error),
}

/// Gives it all up, for this thread and every thread it starts, and closes every
/// inherited descriptor but the standard streams and `control`. There is one
/// thread when this is called, and nothing has been opened.
pub fn enter(control: &impl AsRawFd) -> Result<(), JailError> {
    crate::sys::close_inherited(control.as_raw_fd());
    crate::sys::use_one_malloc_arena();
    rustix::thread::set_no_new_privs(true).map_err(JailError::NoNewPrivileges)?;
    deny_paths().map_err(JailError::Landlock)?;
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: CapabilitySet::empty(),
            permitted: CapabilitySet::empty(),
            inheritable: CapabilitySet::empty(),
        },
    )
    .map_err(JailError::Capabilities)?;
    let filter = filter().map_err(JailError::Filter)?;
    seccompiler::apply_filter(&filter).map_err(JailError::Install)
}

/// Gives up, before any guest code runs, what only building a machine needs:
/// new io_urings, whose operations seccomp does not see. The disks' own are
/// there already, restricted to what a disk does. It holds for all threads: a
/// shell has its vCPUs' before it has disks.
///
/// A snapshot gives a disk a new layer, so a ring's files may be replaced. That
/// is no new power: only a descriptor that the process has can be given, and the
/// ring does no more with it than readv, writev, fdatasync and fallocate, which
/// the process may do with any of its descriptors without a ring.
pub fn seal() -> Result<(), JailError> {
    let filter = seal_filter().map_err(JailError::Filter)?;
    seccompiler::apply_filter_all_threads(&filter).map_err(JailError::Install)
}

fn seal_filter() -> Result<BpfProgram, BackendError> {
    let other_than_files = SeccompRule::new(vec![SeccompCondition::new(
        1,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::Ne,
        u64::from(REGISTER_FILES_UPDATE),
    )?])?;
    let denied = [
        (libc::SYS_io_uring_setup, Vec::new()),
        (libc::SYS_io_uring_register, vec![other_than_files]),
    ];
    SeccompFilter::new(
        denied.into_iter().collect(),
        SeccompAction::Allow,
        SeccompAction::KillProcess,
        TargetArch::x86_64,
    )?
    .try_into()
}

/// Denies every path and TCP port that this kernel's Landlock can deny. Where
/// there is no Landlock, seccomp still refuses open(2) and its kin.
fn deny_paths() -> Result<(), landlock::RulesetError> {
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V5))?
        .handle_access(AccessNet::from_all(ABI::V5))?
        .create()?
        .restrict_self()?;
    Ok(())
}

fn filter() -> Result<BpfProgram, BackendError> {
    let argument = |index, operator, value| {
        SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value)
    };
    let mut rules: std::collections::BTreeMap<i64, Vec<SeccompRule>> =
        ALLOWED.iter().map(|number| (*number, Vec::new())).collect();
    let kvm = argument(1, SeccompCmpOp::MaskedEq(IOCTL_TYPE_MASK), KVM_IOCTL_TYPE)?;
    let nonblocking = argument(1, SeccompCmpOp::Eq, libc::FIONBIO)?;
    let pagemap = argument(1, SeccompCmpOp::Eq, PAGEMAP_SCAN)?;
    let mut ioctls = vec![
        SeccompRule::new(vec![kvm])?,
        SeccompRule::new(vec![nonblocking])?,
        SeccompRule::new(vec![pagemap])?,
    ];
    for request in TAP_IOCTLS {
        let tap = argument(1, SeccompCmpOp::Eq, request)?;
        ioctls.push(SeccompRule::new(vec![tap])?);
    }
    rules.insert(libc::SYS_ioctl, ioctls);
    let unix = argument(0, SeccompCmpOp::Eq, libc::AF_UNIX as u64)?;
    rules.insert(libc::SYS_socketpair, vec![SeccompRule::new(vec![unix])?]);
    // Naming threads; finding the vDSO's clock; and, with seccomp(2) above, the
    // second filter: filters can only be added to.
    let prctls = [
        libc::PR_SET_NAME as u64,
        PR_GET_AUXV,
        libc::PR_SET_NO_NEW_PRIVS as u64,
    ];
    let prctl = |option| SeccompRule::new(vec![argument(0, SeccompCmpOp::Eq, option)?]);
    rules.insert(
        libc::SYS_prctl,
        prctls.into_iter().map(prctl).collect::<Result<_, _>>()?,
    );
    SeccompFilter::new(
        rules,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?
    .try_into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filters_compile() {
        assert!(filter().unwrap().len() > ALLOWED.len());
        assert!(seal_filter().is_ok());
    }
}
