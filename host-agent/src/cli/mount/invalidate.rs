//! Telling the kernel what to drop.
//!
//! On a thread of its own: the kernel takes the directory's lock, or waits for a page
//! that is being read, which a request of it may hold that we have yet to answer.
//! That wait is what makes it safe: an answer from before a change is in the cache
//! when it is dropped, not after.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use fuser::{INodeNo, Notifier};
use tokio::sync::mpsc;

use super::tree::Stale;

/// A watch with more waits, and its guest with it.
const BATCHES: usize = 256;

#[derive(Debug, Clone)]
pub(super) struct Invalidations {
    batches: mpsc::Sender<Vec<Stale>>,
}

// === impl Invalidations ===

impl Invalidations {
    pub(super) fn new() -> (Self, mpsc::Receiver<Vec<Stale>>) {
        let (batches, queue) = mpsc::channel(BATCHES);
        (Self { batches }, queue)
    }

    pub(super) async fn send(&self, stale: Vec<Stale>) {
        if !stale.is_empty() {
            // The thread ends with the mount: then the kernel has nothing any more.
            let _ = self.batches.send(stale).await;
        }
    }

    /// False: the queue is full.
    pub(super) fn try_send(&self, stale: Stale) -> bool {
        self.batches.try_send(vec![stale]).is_ok()
    }
}

/// Until the queue's other end is gone.
pub(super) fn run(notifier: Notifier, mut queue: mpsc::Receiver<Vec<Stale>>) {
    std::thread::spawn(move || {
        while let Some(batch) = queue.blocking_recv() {
            for stale in batch {
                tell(&notifier, &stale);
            }
        }
    });
}

/// What the kernel does not know need not be dropped, and after an unmount it knows
/// nothing: its errors say no more than that.
fn tell(notifier: &Notifier, stale: &Stale) {
    let _ = match stale {
        // An offset below 0 is the attributes alone.
        Stale::Attributes(ino) => notifier.inval_inode(INodeNo(*ino), -1, 0),
        Stale::Content(ino) => notifier.inval_inode(INodeNo(*ino), 0, 0),
        Stale::Name(parent, name) => {
            notifier.inval_entry(INodeNo(*parent), OsStr::from_bytes(name))
        }
    };
}
