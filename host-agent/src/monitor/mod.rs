//! One `soulbox-vmm` process, as this daemon sees it: a process to wait for
//! and a control socket to talk over.

mod client;
mod process;
mod socket;
mod spawn;

pub use client::{Connection, Control, Observed, RequestError};
pub use process::{MonitorProcess, ProcessError, anonymous_bytes, monitors_below, stray_monitors};
pub use socket::{ControlSocket, Datagram, ReceiveError};
pub use spawn::{SpawnError, spawn};
