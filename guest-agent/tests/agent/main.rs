//! The agent as a process of this machine, asked as soulboxd asks it.
//!
//! One program for all of them: what they share is compiled once.

// Clippy knows no tests outside `#[test]`.
#![allow(unreachable_pub, clippy::unwrap_used)]

mod attach;
mod code;
mod common;
mod faults;
mod files;
mod fork;
mod init;
mod network;
mod ports;
mod start;
mod stream;
mod terminal;
