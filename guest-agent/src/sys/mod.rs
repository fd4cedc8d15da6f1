//! The system calls that have no safe wrapper. The only module with `unsafe`.

#![allow(unsafe_code)]

pub(crate) mod credentials;
pub(crate) mod disk;
pub(crate) mod process;
pub(crate) mod random;
pub(crate) mod readiness;
pub(crate) mod spawn;
pub(crate) mod wait;
