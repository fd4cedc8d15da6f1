//! SoulBox's KVM monitor. One process is one microVM; it opens no path and
//! works only with descriptors that its client sends it (docs/architecture.md).
//!
//! The main thread serves the control socket and all devices from one epoll
//! loop ([`monitor`]); each vCPU has a thread ([`vcpu`]) that meets devices on
//! the [`bus`]. [`machine`] builds it all.

pub mod bus;
mod clock;
pub mod config;
pub mod console;
pub mod control;
pub mod devices;
pub mod events;
pub mod jail;
pub mod machine;
pub mod memory;
pub mod monitor;
pub mod rate_limiter;
pub mod snapshot;
mod sys;
pub mod testing;
pub mod vcpu;

/// An error and its sources, as one line.
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        line.push_str(": ");
        line.push_str(&error.to_string());
        source = error.source();
    }
    line
}
