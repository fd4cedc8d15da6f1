//! Starts one program: clone3(2), what a child has to do before its program
//! runs, and execve(2).
//!
//! The child shares the agent's memory (CLONE_VM) and the thread that starts it
//! waits (CLONE_VFORK) until the child has executed its program or has failed.
//! A fork would copy the page tables and make every page of the agent fault on
//! its next write: in a restored guest each such fault is also a page that the
//! clone no longer shares with its template. It would cost a pipe for the error,
//! too; here the child writes it where the parent reads it. `std` can do neither
//! with what the child has to do, and cannot use CLONE_INTO_CGROUP, without which
//! joining a cgroup waits for an RCU grace period.
//!
//! Because memory is shared, the child may only make system calls and touch
//! what [`ChildArgs`] points to: no allocation, no lock, no panic, and no libc
//! wrapper that talks to other threads (setuid and its kin).

use std::arch::asm;
use std::ffi::{CStr, CString, c_char, c_int};
use std::os::fd::{AsRawFd as _, BorrowedFd, RawFd};
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

use rustix::io::Errno;

/// Everything about a program that is to start; validated, and complete.
pub(crate) struct Command<'a> {
    /// Paths that are tried in turn, as execvp(3) does.
    pub(crate) candidates: &'a [CString],
    pub(crate) argv: &'a [CString],
    pub(crate) env: &'a [CString],
    pub(crate) cwd: &'a CStr,
    /// Start in `/` rather than fail where `cwd` cannot be entered.
    pub(crate) cwd_may_fail: bool,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: &'a [u32],
    pub(crate) limits: &'a [(libc::__rlimit_resource_t, libc::rlimit)],
    /// setpriority(2).
    pub(crate) nice: i32,
    /// stdin is a terminal, which becomes the session's.
    pub(crate) has_terminal: bool,
    /// stdin, stdout and stderr; each above 2.
    pub(crate) stdio: [BorrowedFd<'a>; 3],
    /// The cgroup's folder, into which the process is born.
    pub(crate) cgroup: Option<BorrowedFd<'a>>,
}

/// What was being done when a start failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    Clone,
    Session,
    Stdio,
    Terminal,
    Limits,
    Priority,
    User,
    Directory,
    Execute,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the process failed at stage {stage:?}: {errno}")]
pub(crate) struct SpawnError {
    pub(crate) stage: Stage,
    pub(crate) errno: Errno,
}

// === impl SpawnError ===

impl SpawnError {
    /// Whether it can be the cgroup's: it has been removed, or takes no processes.
    pub(crate) fn is_of_cgroup(&self) -> bool {
        let of_cgroup = [Errno::NODEV, Errno::NOENT, Errno::BUSY, Errno::OPNOTSUPP];
        self.stage == Stage::Clone && of_cgroup.contains(&self.errno)
    }
}

/// The child's stack. It calls a few functions with small frames; debug builds
/// have the largest.
const STACK_BYTES: usize = 64 * 1024;

const FLAGS: u64 =
    (libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_PARENT_SETTID) as u64 | CLONE_CLEAR_SIGHAND;
// linux/sched.h; above the 32 bits that libc's constants have.
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

const STAGES: [Stage; 9] = [
    Stage::Clone,
    Stage::Session,
    Stage::Stdio,
    Stage::Terminal,
    Stage::Limits,
    Stage::Priority,
    Stage::User,
    Stage::Directory,
    Stage::Execute,
];

/// What parent and child share. Pointers, because the child must not run a
/// destructor or be tempted into a library call.
struct ChildArgs<'a> {
    command: &'a Command<'a>,
    stdio: [RawFd; 3],
    argv: *const *const c_char,
    env: *const *const c_char,
    stage: AtomicUsize,
    errno: AtomicI32,
}

/// Starts the program and returns once it runs. `pid` holds the process's id
/// before the process can end, so that a reaper on another thread can tell it
/// from an orphan. Blocks while the child opens its program: call it where
/// waiting for a slow filesystem is harmless.
pub(crate) fn spawn(command: &Command<'_>, pid: &AtomicI32) -> Result<(), SpawnError> {
    let argv = null_terminated(command.argv);
    let env = null_terminated(command.env);
    let args = ChildArgs {
        command,
        stdio: command.stdio.map(|fd| fd.as_raw_fd()),
        argv: argv.as_ptr(),
        env: env.as_ptr(),
        stage: AtomicUsize::new(Stage::Clone as usize),
        errno: AtomicI32::new(0),
    };
    // u128 for the 16-byte alignment that the ABI wants of a stack.
    let mut stack: Vec<u128> = Vec::with_capacity(STACK_BYTES / size_of::<u128>());

    // No handler of the agent may run in the child: it would run on shared memory.
    // CLONE_CLEAR_SIGHAND takes care of that. But what the agent ignores stays
    // ignored; until the child has changed that, no signal may reach it.
    let mask = block_signals();

    let mut flags = FLAGS;
    let mut cgroup = 0;
    if let Some(fd) = command.cgroup {
        flags |= CLONE_INTO_CGROUP;
        cgroup = u64::from(fd.as_raw_fd().cast_unsigned());
    }
    let clone_args = libc::clone_args {
        flags,
        pidfd: 0,
        child_tid: 0,
        parent_tid: pid.as_ptr() as u64,
        exit_signal: libc::SIGCHLD as u64,
        stack: stack.as_mut_ptr() as u64,
        stack_size: STACK_BYTES as u64,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup,
    };
    // SAFETY: `stack` is STACK_BYTES of memory that nothing else uses, `args` and
    // all it points to live until this function returns, and CLONE_VFORK holds
    // this thread inside the call until the child has left both. `child` keeps
    // to the rules at the top of this file.
    let result = unsafe { clone3(&clone_args, &args) };

    set_signal_mask(&mask);

    if result < 0 {
        let errno = Errno::from_raw_os_error(i32::try_from(-result).unwrap_or(libc::EINVAL));
        return Err(SpawnError {
            stage: Stage::Clone,
            errno,
        });
    }
    match args.errno.load(Ordering::Acquire) {
        0 => Ok(()),
        errno => Err(SpawnError {
            stage: args.stage(),
            errno: Errno::from_raw_os_error(errno),
        }),
    }
}

fn null_terminated(strings: &[CString]) -> Vec<*const c_char> {
    let pointers = strings.iter().map(|string| string.as_ptr());
    pointers.chain([ptr::null()]).collect()
}

/// clone3(2) whose child calls [`child`] on its own stack and never returns here.
/// Inline, because a child that shares memory must not return through a libc
/// wrapper's frame; glibc exports none for clone3 anyway.
///
/// # Safety
/// `clone_args` must ask for a stack that is 16-byte aligned and free, and for
/// CLONE_VM with CLONE_VFORK; `args` must be whole and outlive the call.
unsafe fn clone3(clone_args: &libc::clone_args, args: &ChildArgs<'_>) -> i64 {
    let result: i64;
    // SAFETY: the kernel changes only rax, rcx and r11 for the parent. The child
    // starts with the same registers but rax = 0 and its own stack, takes the
    // branch that the parent does not, and never leaves it.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r8",
            "call r9",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") ptr::from_ref(clone_args),
            in("rsi") size_of::<libc::clone_args>(),
            in("r8") ptr::from_ref(args),
            in("r9") child as extern "C" fn(&ChildArgs<'_>) -> !,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    result
}

impl ChildArgs<'_> {
    fn stage(&self) -> Stage {
        let index = self.stage.load(Ordering::Acquire);
        STAGES.get(index).copied().unwrap_or(Stage::Clone)
    }

    fn enter(&self, stage: Stage) {
        self.stage.store(stage as usize, Ordering::Release);
    }
}

/// The child. Runs on shared memory: see the rules at the top of this file.
extern "C" fn child(args: &ChildArgs<'_>) -> ! {
    let Err(errno) = prepare_and_execute(args);
    args.errno.store(errno, Ordering::Release);
    // SAFETY: _exit runs no destructor and no handler.
    unsafe { libc::_exit(127) }
}

fn prepare_and_execute(args: &ChildArgs<'_>) -> Result<std::convert::Infallible, c_int> {
    let command = args.command;

    args.enter(Stage::Session);
    // SAFETY: takes no pointers. The child is no group leader, so it cannot fail.
    check(unsafe { libc::setsid() }.into())?;

    args.enter(Stage::Stdio);
    for (target, source) in (0..).zip(args.stdio) {
        // SAFETY: takes no pointers, and changes the child's own table only.
        check(unsafe { libc::dup2(source, target) }.into())?;
    }

    if command.has_terminal {
        args.enter(Stage::Terminal);
        // SAFETY: takes no pointer: 0 is not to take it from another session.
        check(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) }.into())?;
    }

    args.enter(Stage::Limits);
    for (resource, limit) in command.limits {
        // SAFETY: setrlimit reads one rlimit through a reference's pointer.
        check(unsafe { libc::setrlimit(*resource, limit) }.into())?;
    }

    // Before the user, who may not go below what it is.
    if command.nice != 0 {
        args.enter(Stage::Priority);
        // SAFETY: takes no pointers; 0 is the calling process.
        check(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, command.nice) }.into())?;
    }

    // Raw calls: glibc's would make every thread that it finds in this memory
    // change its user, which is the agent.
    args.enter(Stage::User);
    let (uid, gid) = (command.uid, command.gid);
    // SAFETY: setgroups reads as many ids as the slice has; the others take no
    // pointers. All three act on the calling task only.
    unsafe {
        check(libc::syscall(
            libc::SYS_setgroups,
            command.groups.len(),
            command.groups.as_ptr(),
        ))?;
        check(libc::syscall(libc::SYS_setresgid, gid, gid, gid))?;
        check(libc::syscall(libc::SYS_setresuid, uid, uid, uid))?;
    }

    // After the user, whose permissions decide.
    args.enter(Stage::Directory);
    // SAFETY: chdir reads a NUL-terminated string.
    let entered = check(unsafe { libc::chdir(command.cwd.as_ptr()) }.into());
    if entered.is_err() && command.cwd_may_fail {
        // SAFETY: as above.
        check(unsafe { libc::chdir(c"/".as_ptr()) }.into())?;
    } else {
        entered?;
    }

    args.enter(Stage::Execute);
    reset_signals();
    let mut errno = libc::ENOENT;
    for path in command.candidates {
        // SAFETY: a NUL-terminated path, and two arrays of NUL-terminated strings
        // that end with a null pointer; all outlive the call.
        unsafe { libc::execve(path.as_ptr(), args.argv, args.env) };
        match last_errno() {
            libc::ENOENT | libc::ENOTDIR => {}
            libc::EACCES => errno = libc::EACCES,
            fatal => return Err(fatal),
        }
    }
    Err(errno)
}

/// First what the agent ignores, then the mask: a signal that is pending must not be
/// ignored either. The agent ignores SIGPIPE only; see `ignore_no_signals`.
fn reset_signals() {
    // The kernel's own sigaction (handler, flags, restorer, mask), in which zero is
    // SIG_DFL. Not libc's, whose wrapper is more than a system call.
    const DEFAULT: [u64; 4] = [0; 4];
    const MASK_BYTES: usize = size_of::<u64>();
    let none = DEFAULT.as_ptr();
    // SAFETY: both read one structure, all of whose bytes are there. The signal
    // table is the child's own (no CLONE_SIGHAND).
    unsafe {
        let old = ptr::null_mut::<u64>();
        libc::syscall(libc::SYS_rt_sigaction, libc::SIGPIPE, none, old, MASK_BYTES);
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            none,
            old,
            MASK_BYTES,
        );
    }
}

/// Blocks every signal for this thread, and returns what was blocked before.
pub(super) fn block_signals() -> libc::sigset_t {
    // SAFETY: sigset_t is plain data, and both pointers are to live locals. With
    // a valid first argument the call cannot fail.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        before
    }
}

fn set_signal_mask(mask: &libc::sigset_t) {
    // SAFETY: reads the set through a reference's pointer; cannot fail either.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, mask, ptr::null_mut()) };
}

fn check(result: i64) -> Result<(), c_int> {
    if result < 0 {
        Err(last_errno())
    } else {
        Ok(())
    }
}

fn last_errno() -> c_int {
    // SAFETY: the address of this thread's errno, which the child shares with
    // the parent's waiting thread.
    unsafe { *libc::__errno_location() }
}
