//! Telling the kernel what to drop.
//!
//! On a thread of its own: the kernel takes the directory's lock, or waits for a page
//! that is being read, which a request of it may hold that we have yet to answer.
//! That wait is what makes it safe: an answer from before a change is in the cache
//! when it is dropped, not after.

use std::io::IoSlice;
use std::os::fd::OwnedFd;

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

/// Until the queue's other end is gone. `device` is that of the session.
pub(super) fn run(notifier: Notifier, device: OwnedFd, mut queue: mpsc::Receiver<Vec<Stale>>) {
    std::thread::spawn(move || {
        while let Some(batch) = queue.blocking_recv() {
            for stale in batch {
                tell(&notifier, &device, &stale);
            }
        }
    });
}

/// What the kernel does not know need not be dropped, and after an unmount it knows
/// nothing: its errors say no more than that.
fn tell(notifier: &Notifier, device: &OwnedFd, stale: &Stale) {
    let _ = match stale {
        // An offset below 0 is the attributes alone.
        Stale::Attributes(ino) => notifier.inval_inode(INodeNo(*ino), -1, 0),
        Stale::Content(ino) => notifier.inval_inode(INodeNo(*ino), 0, 0),
        Stale::Name(parent, name) => expire(device, *parent, name),
    };
}

/// Makes the kernel ask for the name when it is used next. fuser can only drop it: a
/// program whose working directory that is would be nowhere.
fn expire(device: &OwnedFd, parent: u64, name: &[u8]) -> std::io::Result<()> {
    let (header, body) = message(parent, name);
    let parts = [&header[..], &body, name, b"\0"].map(IoSlice::new);
    rustix::io::writev(device, &parts)?;
    Ok(())
}

/// `fuse_out_header` and `fuse_notify_inval_entry_out` of <linux/fuse.h>. Before Linux
/// 6.2 the flags are padding, and the name is dropped.
fn message(parent: u64, name: &[u8]) -> ([u8; 16], [u8; 16]) {
    const NOTIFY_INVAL_ENTRY: u32 = 3;
    const EXPIRE_ONLY: u32 = 1;
    // A name has at most 255 bytes.
    let name_bytes = u32::try_from(name.len()).unwrap_or_default();
    let mut header = [0; 16];
    header[..4].copy_from_slice(&(32 + name_bytes + 1).to_ne_bytes());
    header[4..8].copy_from_slice(&NOTIFY_INVAL_ENTRY.to_ne_bytes());
    let mut body = [0; 16];
    body[..8].copy_from_slice(&parent.to_ne_bytes());
    body[8..12].copy_from_slice(&name_bytes.to_ne_bytes());
    body[12..].copy_from_slice(&EXPIRE_ONLY.to_ne_bytes());
    (header, body)
}
