//! The guest agent: PID 1 of a SoulBox guest.
//!
//! One thread serves everything (others exist while a program is being started, or
//! files are worked on), and when nobody asks it anything it sleeps without a timer. Both
//! because it is in every snapshot: a page it touches after a restore is a page
//! that clones do not share, and a wake-up is a page it touches.
//!
//! A panic ends the agent, and a kernel whose PID 1 ends panics. That is meant:
//! `panic=-1` and pvpanic tell the host at once, where an agent that limps on, or
//! a machine that turns itself off, would look like an ordinary end.

#![deny(unsafe_code)]

mod agent;
mod exec;
mod files;
mod init;
pub mod options;
mod ports;
mod ready;
mod reaper;
mod server;
mod spec;
mod status;
mod sys;
mod system;
mod users;

pub use self::agent::run;

/// Of this agent.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
