//! virtio-balloon (section 5.5): the guest gives memory back, when it is asked
//! to (inflate) and whenever it has none to do with it (free page reporting).

use serde::{Deserialize, Serialize};

mod device;

pub use device::Balloon;

/// What is saved of the balloon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// What the guest is asked to give, in pages of 4 KiB.
    pub target_pages: u32,
    /// What it says it has given.
    pub actual_pages: u32,
}
