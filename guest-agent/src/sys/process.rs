//! What the agent does to its own process.

use std::io;

/// Keeps the C allocator to one arena. It would give each thread its own, and
/// the agent's second thread exists only to start programs.
pub(crate) fn use_one_malloc_arena() {
    // SAFETY: mallopt sets an integer of the allocator; no other thread runs yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Marks every descriptor above stderr close-on-exec: whatever started the agent
/// must not leak into the programs that it starts.
pub(crate) fn set_inherited_fds_cloexec() -> io::Result<()> {
    // SAFETY: close_range with CLOSE_RANGE_CLOEXEC closes nothing, so no owned
    // descriptor is invalidated.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Signals a process group. By number, because rustix names no real-time signal.
/// A group that has gone is not an error.
pub(crate) fn kill_group(leader: i32, signal: i32) {
    debug_assert!(
        leader > 1,
        "0 and 1 would be the agent's own group and every process"
    );
    // SAFETY: kill takes no pointers.
    unsafe { libc::kill(-leader, signal) };
}

/// Signals every process but PID 1, as which it must be called.
pub(crate) fn kill_all(signal: i32) {
    // From any other process it would end the machine of whoever tests this.
    assert_eq!(std::process::id(), 1, "only PID 1 may signal every process");
    // SAFETY: kill takes no pointers.
    unsafe { libc::kill(-1, signal) };
}
