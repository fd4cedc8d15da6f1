//! A vCPU: one thread in KVM_RUN.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, TryRecvError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuExit, VcpuFd};
use soulbox_proto::vmm::v1::exited::Reason;

use crate::bus::{Bus, Space};
use crate::clock::monotonic_ns;
use crate::events::EventSender;

pub mod boot;
pub mod cpuid;
pub mod features;
mod kick;
pub mod state;
mod xsave;

/// KVM_EXIT_*, as far as vCPUs count them apart.
const EXIT_NAMES: [&str; 8] = [
    "IO",
    "MMIO",
    "INTR",
    "SHUTDOWN",
    "SYSTEM_EVENT",
    "INTERNAL_ERROR",
    "FAIL_ENTRY",
    "OTHER",
];
const IO: usize = 0;
const MMIO: usize = 1;
const INTR: usize = 2;
const SHUTDOWN: usize = 3;
const SYSTEM_EVENT: usize = 4;
const INTERNAL_ERROR: usize = 5;
const FAIL_ENTRY: usize = 6;
const OTHER: usize = 7;

/// What the guest did when its KVM could not go on, in words.
const EMULATION_FAILED: &str = "KVM could not emulate an instruction of the guest: this KVM \
     cannot run guest kernels (a CPU without vmx or svm, or nested where the outer hypervisor \
     lacks it). Run on such a CPU, or through images/bench/run, which finds or makes one";

/// How often a vCPU that was told to stop or to pause is told again.
const KICK_INTERVAL: Duration = Duration::from_micros(500);

/// A vCPU's thread. Dropping it stops and joins the thread.
pub struct VcpuThread {
    thread: Option<JoinHandle<()>>,
    commands: mpsc::Sender<Command>,
    /// Disconnected when the thread is over.
    end: mpsc::Receiver<()>,
    shared: Arc<Shared>,
}

/// How long a thread stays awake for what another one is to tell it.
const STAY_AWAKE: Duration = Duration::from_micros(500);

/// What a vCPU's thread and the monitor share.
struct Shared {
    /// `immediate_exit` of the vCPU's `kvm_run`; empty once the thread is over.
    immediate_exit: kick::ImmediateExit,
    exits: [AtomicU64; EXIT_NAMES.len()],
    /// CLOCK_MONOTONIC, in nanoseconds; 0 before it.
    first_exit_ns: AtomicU64,
}

/// What a vCPU is told. While it runs it looks for commands when KVM_RUN was
/// interrupted, which completes an exit that was left half done (api.rst,
/// KVM_RUN).
enum Command {
    /// Only before Start, and while paused.
    Call(Box<dyn FnOnce(&VcpuFd) + Send>),
    /// Once.
    Start(Arc<Bus>, EventSender),
    Pause(mpsc::Sender<()>),
    Resume,
    Stop,
}

/// The thread's side.
struct Vcpu {
    index: u8,
    fd: VcpuFd,
    commands: mpsc::Receiver<Command>,
    shared: Arc<Shared>,
}

/// Why a vCPU left its loop.
enum Stop {
    /// It was told to.
    Asked,
    /// The machine is over.
    Over(Reason, String),
}

#[derive(Debug, thiserror::Error)]
#[error("a vCPU has ended, and with it the machine")]
pub struct VcpuGone;

// === impl Vcpu ===

impl Vcpu {
    fn live(mut self) {
        if let Some((bus, events)) = self.wait_for_start()
            && let Stop::Over(reason, message) = self.run(&bus)
        {
            events.exit(reason, format!("vCPU {}: {message}", self.index));
        }
        // `kvm_run` is unmapped with the VcpuFd.
        self.shared.immediate_exit.clear();
    }

    /// None: it is told to stop, or the machine is being torn down.
    fn wait_for_start(&self) -> Option<(Arc<Bus>, EventSender)> {
        loop {
            match self.next_command()? {
                Command::Call(call) => call(&self.fd),
                Command::Start(bus, events) => return Some((bus, events)),
                Command::Stop => return None,
                Command::Pause(_) | Command::Resume => {}
            }
        }
    }

    /// Waits for a command; none comes when the machine is being torn down.
    fn next_command(&self) -> Option<Command> {
        receive_awake(&self.commands)
    }

    fn run(&mut self, bus: &Bus) -> Stop {
        let shared = Arc::clone(&self.shared);
        let mut is_first = true;
        loop {
            let left = self.fd.run();
            if std::mem::take(&mut is_first) {
                shared
                    .first_exit_ns
                    .store(monotonic_ns(), Ordering::Relaxed);
            }
            let kind = match left {
                Ok(VcpuExit::IoIn(port, data)) => {
                    bus.read(Space::Port, u64::from(port), data);
                    IO
                }
                Ok(VcpuExit::IoOut(port, data)) => {
                    bus.write(Space::Port, u64::from(port), data);
                    IO
                }
                Ok(VcpuExit::MmioRead(address, data)) => {
                    bus.read(Space::Memory, address, data);
                    MMIO
                }
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    bus.write(Space::Memory, address, data);
                    MMIO
                }
                Ok(VcpuExit::Intr) => INTR,
                // EINTR: a signal or immediate_exit. EAGAIN: an INIT that was
                // taken by a vCPU that waits for its SIPI.
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => INTR,
                Ok(VcpuExit::Shutdown) => {
                    shared.count(SHUTDOWN);
                    return Stop::Over(
                        Reason::Crashed,
                        "the guest crashed with a triple fault".into(),
                    );
                }
                Ok(VcpuExit::SystemEvent(kind, _)) => {
                    let message = format!("the guest ended with system event {kind}");
                    shared.count(SYSTEM_EVENT);
                    return Stop::Over(Reason::Reset, message);
                }
                Ok(VcpuExit::InternalError) => {
                    shared.count(INTERNAL_ERROR);
                    return Stop::Over(Reason::EmulationFailed, self.emulation_failure());
                }
                Ok(VcpuExit::FailEntry(reason, _)) => {
                    shared.count(FAIL_ENTRY);
                    return Stop::Over(
                        Reason::InternalError,
                        format!("the CPU refused to enter the guest (reason {reason:#x})"),
                    );
                }
                Ok(other) => {
                    let message = format!("KVM left the guest in a way not asked for: {other:?}");
                    shared.count(OTHER);
                    return Stop::Over(Reason::InternalError, message);
                }
                Err(error) => {
                    shared.count(OTHER);
                    return Stop::Over(Reason::InternalError, format!("KVM_RUN failed ({error})"));
                }
            };
            shared.count(kind);
            if kind == INTR && self.obey() {
                return Stop::Asked;
            }
        }
    }

    /// Does what it was told, if anything. True when that is to stop.
    fn obey(&self) -> bool {
        let mut paused = false;
        loop {
            let command = if paused {
                self.next_command().unwrap_or(Command::Stop)
            } else {
                match self.commands.try_recv() {
                    Ok(command) => command,
                    Err(_) => return false,
                }
            };
            match command {
                Command::Pause(reply) => {
                    // Cleared here and not when it resumes: the next command may
                    // have set it by then.
                    self.shared.immediate_exit.unset();
                    paused = true;
                    let _ = reply.send(());
                }
                Command::Call(call) => call(&self.fd),
                Command::Resume => {
                    // So that the guest's watchdog does not take the pause for a
                    // lockup. EINVAL: it has no kvmclock.
                    let _ = self.fd.kvmclock_ctrl();
                    return false;
                }
                Command::Stop => return true,
                Command::Start(..) => {}
            }
        }
    }

    /// Names the place, as far as KVM still tells it.
    fn emulation_failure(&self) -> String {
        match self.fd.get_regs() {
            Ok(regs) => format!("{EMULATION_FAILED} (at rip {:#x})", regs.rip),
            Err(_) => EMULATION_FAILED.to_owned(),
        }
    }
}

// === impl VcpuThread ===

impl VcpuThread {
    /// Starts the thread of a vCPU that has not run. It does not until `start`.
    pub fn spawn(index: u8, mut fd: VcpuFd) -> io::Result<Self> {
        let (sender, commands) = mpsc::channel();
        let shared = Arc::new(Shared {
            immediate_exit: kick::ImmediateExit::of(&mut fd),
            exits: Default::default(),
            first_exit_ns: AtomicU64::new(0),
        });
        let vcpu = Vcpu {
            index,
            fd,
            commands,
            shared: Arc::clone(&shared),
        };
        let (alive, end) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            // The loop is shallow; the default of 2 MiB would only be reserved.
            .stack_size(256 * 1024)
            .spawn(move || {
                let _alive = alive;
                vcpu.live();
            })?;
        Ok(Self {
            thread: Some(thread),
            commands: sender,
            end,
            shared,
        })
    }

    /// Adds this vCPU's exits to a sum by name.
    pub fn add_exits(&self, sum: &mut std::collections::HashMap<String, u64>) {
        for (name, count) in EXIT_NAMES.iter().zip(&self.shared.exits) {
            let count = count.load(Ordering::Relaxed);
            if count > 0 {
                *sum.entry((*name).to_owned()).or_default() += count;
            }
        }
    }

    /// When it left the guest for the first time; 0 before that.
    pub fn first_exit_ns(&self) -> u64 {
        self.shared.first_exit_ns.load(Ordering::Relaxed)
    }

    /// Tells the vCPU to leave the guest, without waiting for it.
    pub fn ask_to_stop(&self) {
        // A thread that is over takes no more commands.
        let _ = self.commands.send(Command::Stop);
        self.shared.immediate_exit.set();
        self.kick();
    }

    /// Tells the vCPU to pause; [`Pausing::wait`] waits for it.
    pub fn ask_to_pause(&self) -> Result<Pausing<'_>, VcpuGone> {
        let (reply, paused) = mpsc::channel();
        self.command(Command::Pause(reply))?;
        self.shared.immediate_exit.set();
        self.kick();
        Ok(Pausing { vcpu: self, paused })
    }

    /// Has the thread call `call`; only before `start` and while paused.
    pub fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&VcpuFd) -> T + Send + 'static,
    ) -> Result<Answer<T>, VcpuGone> {
        let (reply, answer) = mpsc::channel();
        let call = move |fd: &VcpuFd| {
            // Nobody waits only when the machine is being torn down.
            let _ = reply.send(call(fd));
        };
        self.command(Command::Call(Box::new(call)))?;
        Ok(Answer(answer))
    }

    /// Enters the guest.
    pub fn start(&self, bus: &Arc<Bus>, events: EventSender) -> Result<(), VcpuGone> {
        self.command(Command::Start(Arc::clone(bus), events))
    }

    /// Has a paused vCPU go on.
    pub fn resume(&self) {
        // One that is over has told so.
        let _ = self.command(Command::Resume);
    }

    fn command(&self, command: Command) -> Result<(), VcpuGone> {
        self.commands.send(command).map_err(|_| VcpuGone)
    }

    fn kick(&self) {
        if let Some(thread) = &self.thread {
            kick::kick(thread);
        }
    }
}

/// What a vCPU's thread was asked for.
pub struct Answer<T>(mpsc::Receiver<T>);

// === impl Answer ===

impl<T> Answer<T> {
    pub fn wait(self) -> Result<T, VcpuGone> {
        receive_awake(&self.0).ok_or(VcpuGone)
    }
}

/// Receives, at first awake: messages come close together when a machine is restored,
/// and waking a thread takes longer than what it is told. `None` without a sender.
fn receive_awake<T>(receiver: &mpsc::Receiver<T>) -> Option<T> {
    let sleep_at = Instant::now() + STAY_AWAKE;
    while Instant::now() < sleep_at {
        match receiver.try_recv() {
            Ok(message) => return Some(message),
            // With one CPU, it is the other thread that needs it.
            Err(TryRecvError::Empty) => std::thread::yield_now(),
            Err(TryRecvError::Disconnected) => return None,
        }
    }
    receiver.recv().ok()
}

/// A vCPU on its way to a pause.
pub struct Pausing<'a> {
    vcpu: &'a VcpuThread,
    paused: mpsc::Receiver<()>,
}

// === impl Pausing ===

impl Pausing<'_> {
    /// Waits until the vCPU stands still. A signal that comes just before KVM_RUN
    /// is not lost, for by then immediate_exit is set; it is repeated for the
    /// sake of other system calls.
    pub fn wait(self) -> Result<(), VcpuGone> {
        loop {
            match self.paused.recv_timeout(KICK_INTERVAL) {
                Ok(()) => return Ok(()),
                Err(RecvTimeoutError::Timeout) => self.vcpu.kick(),
                Err(RecvTimeoutError::Disconnected) => return Err(VcpuGone),
            }
        }
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.ask_to_stop();
        let Some(thread) = self.thread.take() else {
            return;
        };
        // As in Pausing::wait.
        while self.end.recv_timeout(KICK_INTERVAL) != Err(RecvTimeoutError::Disconnected) {
            kick::kick(&thread);
        }
        // A panic aborts the process, so there is no other outcome.
        let _ = thread.join();
    }
}

// === impl Shared ===

impl Shared {
    fn count(&self, kind: usize) {
        self.exits[kind].fetch_add(1, Ordering::Relaxed);
    }
}

/// Installs the handler of the signal that interrupts KVM_RUN. Once a process.
pub fn install_kick_handler() -> io::Result<()> {
    kick::install_handler()
}
