//! virtio-rng (entropy device, section 5.4): fills the guest's buffers from
//! getrandom(2).

mod device;

pub use device::Rng;
