//! Getting a thread out of KVM_RUN.
#![allow(unsafe_code)]

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// Writes `immediate_exit` of a `kvm_run` from another thread
/// (Documentation/virt/kvm/api.rst, section 5).
pub(super) struct ImmediateExit(Mutex<*const AtomicU8>);

// SAFETY: the pointer is only used under the lock and only until `clear`, which
// the vCPU's thread calls before it drops the VcpuFd that the pointer leads
// into; what it leads to is an atomic.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

// === impl ImmediateExit ===

impl ImmediateExit {
    /// The caller must call [`ImmediateExit::clear`] before it drops `vcpu`.
    pub(super) fn of(vcpu: &mut VcpuFd) -> Self {
        let byte: *mut u8 = &raw mut vcpu.get_kvm_run().immediate_exit;
        Self(Mutex::new(byte.cast_const().cast::<AtomicU8>()))
    }

    /// KVM_RUN returns at once from now on.
    pub(super) fn set(&self) {
        self.store(1);
    }

    /// KVM_RUN enters the guest again.
    pub(super) fn unset(&self) {
        self.store(0);
    }

    fn store(&self, value: u8) {
        let byte = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !byte.is_null() {
            // SAFETY: not cleared yet, so kvm_run is mapped. It is memory shared
            // with the kernel, which reads this byte at each KVM_RUN; AtomicU8
            // has the layout of u8, and nothing on our side reads or writes it
            // otherwise.
            unsafe { &**byte }.store(value, Ordering::Release);
        }
    }

    pub(super) fn clear(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = std::ptr::null();
    }
}

extern "C" fn do_nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// The handler does nothing: the signal's arrival ends KVM_RUN with EINTR.
pub(super) fn install_handler() -> io::Result<()> {
    register_signal_handler(SIGRTMIN(), do_nothing)
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

pub(super) fn kick(thread: &JoinHandle<()>) {
    // SAFETY: the thread has not been joined, so its pthread_t is valid; the
    // signal's handler is installed and does nothing. A thread that is over
    // gives ESRCH, which is as good.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN()) };
}
