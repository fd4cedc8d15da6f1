//! virtio-balloon (traditional memory balloon device, section 5.5): the guest
//! gives memory back, when it is asked to (inflate) and whenever it has none to
//! do with it (free page reporting).
//!
//! The queue of reported pages is number 2: of queues that a device does not
//! offer (statistics, free page hints) Linux leaves no gap.
//!
//! # What a page that was given back reads as
//!
//! Its private copy is dropped (`MADV_DONTNEED`). Then it reads as zeros in a
//! booted machine, but in a restored one as what the snapshot's layer has there:
//! the mapping is a private one of the layer's file. Both are allowed. Nothing
//! is promised of a page in the balloon (5.5.6), and without
//! VIRTIO_BALLOON_F_PAGE_POISON, which this device does not offer, the driver
//! must treat a reported page as uninitialized (5.5.6.7.1). Linux relies on what
//! its free pages hold only if it poisons them or clears them as they are freed,
//! and then it does not accept VIRTIO_BALLOON_F_REPORTING (virtballoon_validate
//! in drivers/virtio/virtio_balloon.c).
//!
//! It leaks nothing either. A layer holds what this very guest had in its memory
//! when it, or the template that it came from, was saved; never another tenant's
//! pages. What a guest wrote since is gone from its view for good.
//!
//! A snapshot saves such a page as it is: as not private, so that it comes from
//! the layers below.

use serde::{Deserialize, Serialize};

mod device;
mod metrics;
mod queue;
#[cfg(test)]
mod tests;

pub use device::Balloon;

/// Bit numbers of the features (section 5.5.3).
const VIRTIO_BALLOON_F_DEFLATE_ON_OOM: u32 = 2;
const VIRTIO_BALLOON_F_REPORTING: u32 = 5;

/// Linux reports up to 32 ranges at once (PAGE_REPORTING_CAPACITY) and wants a
/// queue that holds as many; in the others it has one buffer at a time.
const QUEUE_SIZE: u16 = 32;

/// The balloon's unit, whatever the guest's pages are (section 5.5.6).
const PAGES_PER_MIB: u32 = 256;

/// What is saved of the balloon. The pages in it stay in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// What the guest is asked to give, in pages of 4 KiB.
    pub target_pages: u32,
    /// What it says it has given.
    pub actual_pages: u32,
}
