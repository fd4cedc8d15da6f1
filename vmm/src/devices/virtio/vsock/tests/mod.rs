//! The chip, driven through its queues by a guest's driver and over real Unix
//! sockets by the host. No KVM.

mod flow;
mod guest;
mod hostile;
mod lifecycle;
mod pauses;
mod snapshot;
mod spares;
mod states;
