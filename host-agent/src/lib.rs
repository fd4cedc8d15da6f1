//! The host's side of SoulBox: `soulboxd`, which keeps the sandboxes of one
//! host, and `soulbox`, the command line that talks to it.
//!
//! A call travels `service` → `sandbox` → `monitor` and `guest`. `service`
//! speaks gRPC, `sandbox` owns every sandbox's life, `monitor` drives one
//! `soulbox-vmm` process, `guest` reaches the agent inside.

// The exceptions are `descriptors` and `net::netns`, which say why.
#![deny(unsafe_code)]

mod accept;
pub mod admission;
pub mod cli;
pub mod config;
pub mod daemon;
mod descriptors;
pub mod guest;
pub mod host;
pub mod id;
pub mod ingress;
pub mod kvm;
pub mod monitor;
pub mod net;
pub mod record;
pub mod sandbox;
pub mod service;
pub mod snapshot;
pub mod status;
pub mod store;
mod sync;
pub mod template;
mod text;
pub mod time;
