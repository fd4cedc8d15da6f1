//! wait4(2), for its rusage.

use std::time::Duration;

/// How one process ended and what it used, as wait4(2) tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit {
    pub(crate) status: ExitStatus,
    /// With that of the descendants it waited for.
    pub(crate) user_cpu: Duration,
    pub(crate) system_cpu: Duration,
    /// The largest of it and of the descendants it waited for. Never less than
    /// the agent's own, whose memory a process has until it executes its program.
    pub(crate) max_resident_bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ExitStatus {
    Code(u32),
    Signal(u32),
}

/// Reaps one child that has ended, if there is one; never blocks.
pub(crate) fn reap_one() -> Option<(libc::pid_t, Exit)> {
    let mut status = 0;
    // SAFETY: rusage is plain data for which all zeroes is a valid value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to live locals of the types that wait4 writes.
    // WNOHANG cannot be interrupted by a signal.
    let pid = unsafe { libc::wait4(-1, &raw mut status, libc::WNOHANG, &raw mut usage) };
    if pid <= 0 {
        return None;
    }
    let status = if libc::WIFSIGNALED(status) {
        ExitStatus::Signal(libc::WTERMSIG(status).cast_unsigned())
    } else {
        ExitStatus::Code(libc::WEXITSTATUS(status).cast_unsigned())
    };
    let exit = Exit {
        status,
        user_cpu: duration(usage.ru_utime),
        system_cpu: duration(usage.ru_stime),
        max_resident_bytes: usage.ru_maxrss.cast_unsigned() * 1024,
    };
    Some((pid, exit))
}

fn duration(time: libc::timeval) -> Duration {
    Duration::from_secs(time.tv_sec.cast_unsigned())
        + Duration::from_micros(time.tv_usec.cast_unsigned())
}
