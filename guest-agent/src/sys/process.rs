//! What the agent does to its own process.

use std::io;

/// Keeps the C allocator to one arena. It would give each thread its own, and
/// the agent's second thread exists only to start programs.
pub(crate) fn use_one_malloc_arena() {
    // SAFETY: mallopt sets an integer of the allocator; no other thread runs yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Gives memory that nothing uses back to the kernel: what the allocator keeps for
/// later is otherwise part of the next snapshot. Takes as long as it has found
/// something to give.
pub(crate) fn give_memory_back() {
    // SAFETY: malloc_trim takes no pointers, and locks what it works on.
    unsafe { libc::malloc_trim(0) };
}

/// Takes back what whatever started the agent had it ignore, but for SIGPIPE, which
/// the agent needs ignored: programs would inherit it.
pub(crate) fn ignore_no_signals() {
    // The kernel's own sigaction (handler, flags, restorer, mask); glibc's wrapper
    // refuses the two signals that it uses itself.
    const DEFAULT: [u64; 4] = [0; 4];
    const IGNORED: u64 = libc::SIG_IGN as u64;
    let call = |signal: i32, new: *const u64, old: *mut u64| {
        // SAFETY: reads and writes one kernel sigaction each, where they are not null,
        // as the calls below have it. No handler is set that could be lost.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, new, old, size_of::<u64>()) };
    };
    for signal in (1..=64).filter(|signal| *signal != libc::SIGPIPE) {
        let mut old = DEFAULT;
        call(signal, std::ptr::null(), old.as_mut_ptr());
        if old.first() == Some(&IGNORED) {
            call(signal, DEFAULT.as_ptr(), std::ptr::null_mut());
        }
    }
}

/// Has every signal go to other threads than this one.
pub(crate) fn block_signals() {
    let _ = super::spawn::block_signals();
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

/// Signals one process. One that has gone is not an error.
pub(crate) fn kill_one(pid: i32, signal: i32) {
    debug_assert!(pid > 1, "no process, or the agent");
    // SAFETY: kill takes no pointers.
    unsafe { libc::kill(pid, signal) };
}

/// Signals every process but PID 1, as which it must be called.
pub(crate) fn kill_all(signal: i32) {
    // From any other process it would end the machine of whoever tests this.
    assert_eq!(std::process::id(), 1, "only PID 1 may signal every process");
    // SAFETY: kill takes no pointers.
    unsafe { libc::kill(-1, signal) };
}
