//! Pauses and snapshots of a guest, as the transport makes them.

use std::os::unix::net::UnixStream;

use virtio_queue::{Queue, QueueState};
use vm_memory::{Bytes, GuestAddress};

use super::super::super::{Spare, Vsock, VsockState};
use super::{DriverQueue, Guest, MEMORY_LEN, TX_BUFFERS};
use crate::devices::virtio::{Activation, ChipState, VirtioDevice};

/// A guest as a snapshot keeps it.
pub(in super::super) struct Saved {
    pub(in super::super) state: VsockState,
    memory: Vec<u8>,
    queues: Vec<QueueState>,
    driver_queues: [DriverQueue; 3],
    held_rx: Vec<u16>,
    features: u64,
}

// === impl Guest ===

impl Guest {
    pub(in super::super) fn quiesce(&mut self) -> Vec<QueueState> {
        let queues = self.device.quiesce();
        assert_eq!(queues.len(), Vsock::QUEUES);
        queues.iter().map(Queue::state).collect()
    }

    pub(in super::super) fn resume(&mut self, queues: Vec<QueueState>) {
        let queues = queues.into_iter().map(|state| state.try_into().unwrap());
        self.device
            .activate(Activation {
                memory: self.memory.clone(),
                queues: queues.collect(),
                interrupt: self.interrupt.clone(),
                features: self.features,
            })
            .unwrap();
        for queue in 0..Vsock::QUEUES {
            self.device.queue_notified(queue);
        }
    }

    /// All that the device may write to.
    pub(in super::super) fn shared_memory(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(TX_BUFFERS).unwrap()];
        self.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }

    /// Takes a snapshot; the guest goes on.
    pub(in super::super) fn save(&mut self) -> Saved {
        let queues = self.quiesce();
        let ChipState::Vsock(state) = self.device.save() else {
            panic!("the state of another chip");
        };
        let state = postcard::to_extend(&state, Vec::new()).unwrap();
        let mut memory = vec![0; MEMORY_LEN];
        self.memory
            .read_slice(&mut memory, GuestAddress(0))
            .unwrap();
        let saved = Saved {
            state: postcard::from_bytes(&state).unwrap(),
            memory,
            queues: queues.clone(),
            driver_queues: self.queues,
            held_rx: self.held_rx.clone(),
            features: self.features,
        };
        self.resume(queues);
        saved
    }

    /// A clone that has yet to be resumed, and its spare connections.
    pub(in super::super) fn restored(saved: &Saved) -> (Self, Vec<Spare>) {
        let mut guest = Self::inactive();
        guest.features = saved.features;
        guest.queues = saved.driver_queues;
        guest.held_rx.clone_from(&saved.held_rx);
        guest
            .memory
            .write_slice(&saved.memory, GuestAddress(0))
            .unwrap();
        let state = ChipState::Vsock(saved.state.clone());
        guest.device.restore(state).unwrap();
        let spares = guest.device.take_spares();
        assert!(guest.device.take_spares().is_empty());
        (guest, spares)
    }

    /// A clone that runs, and the host's ends of its spare connections.
    pub(in super::super) fn clone_of(saved: &Saved) -> (Self, Vec<UnixStream>) {
        let (mut guest, spares) = Self::restored(saved);
        guest.resume(saved.queues.clone());
        let streams = spares.into_iter().map(|spare| spare.stream.into());
        (guest, streams.collect())
    }

    pub(in super::super) fn resume_as(&mut self, saved: &Saved) {
        self.resume(saved.queues.clone());
    }
}
