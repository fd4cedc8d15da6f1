//! SoulBox's KVM monitor. One process is one microVM.

pub mod devices;
pub mod memory;
