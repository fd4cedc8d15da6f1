//! The virtio side: three queues and who is told what.

use std::io;
use std::os::fd::BorrowedFd;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::super::{
    ActivateError, Activation, ChipState, Counters, Interrupt, VirtioDevice, read_config_space,
};
use super::chain::Buffers;
use super::muxer::{Muxer, Output};
use super::packet::{HEADER_LEN, Header, Key};
use super::{Spare, VsockConfig};
use crate::devices::{Chip, StateError};
use crate::memory::GuestMemory;

/// The queues that are served on notification; the third is for events
/// (section 5.10.2).
const RX: usize = 0;
const TX: usize = 1;
const QUEUE_SIZES: [u16; 3] = [256, 256, 256];

/// VIRTIO_VSOCK_F_STREAM (section 5.10.3): implied when no type is offered, and
/// said here all the same.
const VSOCK_F_STREAM: u64 = 1 << 0;
const F_EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

/// Buffers of one queue served in one go. The event loop has other devices too.
const CHAINS_PER_TURN: usize = 512;

/// The smallest CID that a guest may have: 0 is reserved, 1 local, 2 the host.
const FIRST_GUEST_CID: u64 = 3;

/// A virtio-vsock chip.
pub struct Vsock {
    muxer: Muxer,
    active: Option<Active>,
}

struct Active {
    memory: GuestMemory,
    rx: Queue,
    tx: Queue,
    /// Where events would go (section 5.10.6.7). None ever happens.
    event: Queue,
    interrupt: Interrupt,
}

#[derive(Debug, thiserror::Error)]
pub enum NewVsockError {
    #[error("context id {0} cannot be a guest's; give one from 3 to 4294967294")]
    GuestCid(u64),
    #[error("the host refused the epoll instance or timer of the vsock device")]
    Host(#[source] io::Error),
}

// === impl Vsock ===

impl Vsock {
    pub const QUEUES: usize = QUEUE_SIZES.len();

    pub fn new(config: VsockConfig) -> Result<Self, NewVsockError> {
        // CIDs have 32 bits in use; the last is VMADDR_CID_ANY (section 5.10.4).
        if !(FIRST_GUEST_CID..u64::from(u32::MAX)).contains(&config.guest_cid) {
            return Err(NewVsockError::GuestCid(config.guest_cid));
        }
        Ok(Self {
            muxer: Muxer::new(config).map_err(NewVsockError::Host)?,
            active: None,
        })
    }

    /// Moves packets from the guest. Never waits for RX buffers: a guest that
    /// waits in turn for its TX packets could wait for ever (section 5.10.6.1).
    fn process_tx(&mut self) {
        let Some(active) = &mut self.active else {
            return;
        };
        let memory = &active.memory;
        let mut buffers = Buffers::default();
        let mut served = 0;
        let mut rechecked = false;
        let _ = active.tx.disable_notification(memory);
        while served < CHAINS_PER_TURN {
            let Some(chain) = active.tx.pop_descriptor_chain(memory) else {
                // True: the driver added a buffer meanwhile. Twice in a row with
                // none to pop: it lies about its index.
                if !rechecked && active.tx.enable_notification(memory).unwrap_or(false) {
                    rechecked = true;
                    continue;
                }
                break;
            };
            rechecked = false;
            served += 1;
            let head_index = chain.head_index();
            buffers.clear();
            match buffers.push(memory, chain, false) {
                Ok(_) => receive_packet(&mut self.muxer, &mut buffers),
                Err(_) => self.muxer.metrics.invalid_packets += 1,
            }
            let _ = active.tx.add_used(memory, head_index, 0);
        }
        if served == CHAINS_PER_TURN {
            // Notifications stay off: this is the reminder.
            self.muxer.wake();
        }
        if served > 0 && active.tx.needs_notification(memory).unwrap_or(true) {
            active.interrupt.signal_used_queue();
        }
    }

    /// Moves packets to the guest, as long as there are packets and buffers.
    fn process_rx(&mut self) {
        let Some(active) = &mut self.active else {
            return;
        };
        let mut queue = RxQueue {
            queue: &mut active.rx,
            memory: &active.memory,
            served: 0,
        };
        let mut buffers = Buffers::default();
        while self.muxer.has_output() {
            if queue.served >= CHAINS_PER_TURN {
                self.muxer.wake();
                break;
            }
            buffers.clear();
            match queue.take(&mut buffers) {
                Taken::Empty => break,
                Taken::Invalid => {
                    self.muxer.metrics.invalid_packets += 1;
                    continue;
                }
                Taken::Room => {}
            }
            match self.muxer.next_output() {
                None => queue.put_back(1),
                Some(Output::Control(header)) => {
                    queue.finish(&buffers, 0, &header);
                    self.muxer.metrics.rx_packets += 1;
                }
                Some(Output::Data {
                    key,
                    max_bytes,
                    chains,
                }) => send_data(
                    &mut self.muxer,
                    &mut queue,
                    &mut buffers,
                    (key, max_bytes, chains),
                ),
            }
        }
        let served = queue.served;
        if served > 0 && active.rx.needs_notification(&active.memory).unwrap_or(true) {
            active.interrupt.signal_used_queue();
        }
    }

    /// Asks the guest for `count` connections that only clones of this machine
    /// will use. Those that it has accepted by then are part of every snapshot;
    /// a reset of the driver ends them.
    ///
    /// `NotConnected` if the driver is not ready, `InvalidInput` for what is no
    /// port or more than [`MAX_SPARES`](super::MAX_SPARES), `ResourceBusy` if
    /// there would be too many together with those that exist.
    pub fn open_spares(&mut self, guest_port: u32, count: u32) -> io::Result<()> {
        let opened = self.muxer.open_spares(guest_port, count);
        self.process_rx();
        opened
    }

    /// The host's ends of the spare connections that were restored, once, in
    /// the order of the state.
    pub fn take_spares(&mut self) -> Vec<Spare> {
        self.muxer.take_spares()
    }

    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.muxer.waiting()
    }
}

impl VirtioDevice for Vsock {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        VSOCK_F_STREAM | F_EVENT_IDX
    }

    /// The guest's CID, little-endian (section 5.10.4).
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.muxer.guest_cid().to_le_bytes(), offset, data);
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.muxer.as_source()]
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let queues: [Queue; 3] = activation
            .queues
            .try_into()
            .map_err(|_| ActivateError::MissingQueue)?;
        let [mut rx, mut tx, mut event] = queues;
        let event_idx = activation.features & F_EVENT_IDX != 0;
        for queue in [&mut rx, &mut tx, &mut event] {
            queue.set_event_idx(event_idx);
        }
        // A driver that refills the RX queue need not say so until packets wait.
        let _ = rx.disable_notification(&activation.memory);
        self.active = Some(Active {
            memory: activation.memory,
            rx,
            tx,
            event,
            interrupt: activation.interrupt,
        });
        self.muxer.start();
        Ok(())
    }

    fn queue_notified(&mut self, queue: usize) {
        match queue {
            RX => self.process_rx(),
            TX => {
                self.process_tx();
                // Answers, and credit for what the host took.
                self.process_rx();
            }
            // Buffers for events.
            _ => {}
        }
    }

    fn source_ready(&mut self, _source: usize) {
        let woken = self.muxer.poll_host();
        if woken {
            self.process_tx();
        }
        self.process_rx();
    }

    fn reset(&mut self) {
        self.muxer.stop();
        self.active = None;
    }

    /// Nothing is ever in flight but in the rings: what was not yet popped is
    /// served when the transport notifies all queues again.
    fn quiesce(&mut self) -> Vec<Queue> {
        self.muxer.pause();
        self.active
            .take()
            .map(|active| vec![active.rx, active.tx, active.event])
            .unwrap_or_default()
    }

    fn save(&self) -> ChipState {
        ChipState::Vsock(self.muxer.save())
    }

    fn restore(&mut self, state: ChipState) -> Result<(), StateError> {
        match state {
            ChipState::Vsock(state) => self.muxer.restore(state),
            _ => Err(StateError::Kind),
        }
    }

    fn chip(&mut self) -> Chip<'_> {
        Chip::Vsock(self)
    }

    fn counters(&self) -> Counters {
        self.muxer.counters()
    }
}

/// Gives the muxer the packet in `buffers`, which hold one chain.
fn receive_packet(muxer: &mut Muxer, buffers: &mut Buffers<'_>) {
    let [chain] = buffers.chains() else {
        return;
    };
    let header = Header::from_bytes(&buffers.read_header(chain));
    let len = header.len as usize;
    if len > chain.data_len {
        muxer.receive_malformed(&header);
        return;
    }
    buffers.truncate_data(len);
    muxer.receive_packet(&header, buffers.data());
}

/// One turn of a connection: fills RX buffers from its stream. `buffers` hold
/// the first of them.
fn send_data<'m>(
    muxer: &mut Muxer,
    queue: &mut RxQueue<'_, 'm>,
    buffers: &mut Buffers<'m>,
    (key, max_bytes, max_chains): (Key, usize, usize),
) {
    let mut room: usize = buffers.chains().iter().map(|chain| chain.data_len).sum();
    if room == 0 {
        // A buffer with room for a header alone: of no use here.
        queue.refuse(buffers);
        muxer.metrics.invalid_packets += 1;
        return;
    }
    while room < max_bytes && buffers.chains().len() < max_chains {
        let taken = queue.take_another(buffers);
        if taken == 0 {
            break;
        }
        room += taken;
    }
    buffers.truncate_data(max_bytes);

    let mut unsent = muxer.read(key, buffers.data());
    let mut used = 0;
    for (i, chain) in buffers.chains().iter().enumerate() {
        let len = unsent.min(chain.data_len);
        // `max_bytes` is a credit, so `len` is below 2³².
        let Some(header) = u32::try_from(len)
            .ok()
            .filter(|&len| len > 0)
            .and_then(|len| muxer.data_header(key, len))
        else {
            break;
        };
        queue.finish(buffers, i, &header);
        muxer.metrics.rx_packets += 1;
        unsent -= len;
        used += 1;
    }
    queue.put_back(buffers.chains().len() - used);
}

/// The RX queue, for the length of one call.
struct RxQueue<'q, 'm> {
    queue: &'q mut Queue,
    memory: &'m GuestMemory,
    /// Buffers given back to the driver.
    served: usize,
}

enum Taken {
    Room,
    /// The driver has given no more, and will notify when it does.
    Empty,
    /// The buffer cannot hold a packet; it went back to the driver.
    Invalid,
}

// === impl RxQueue ===

impl<'m> RxQueue<'_, 'm> {
    /// Takes the driver's next buffer.
    fn take(&mut self, buffers: &mut Buffers<'m>) -> Taken {
        let mut chain = self.queue.pop_descriptor_chain(self.memory);
        if chain.is_none() {
            // Host reads pause here, until the driver notifies.
            if self.queue.enable_notification(self.memory).unwrap_or(false) {
                chain = self.queue.pop_descriptor_chain(self.memory);
            }
            if chain.is_some() {
                let _ = self.queue.disable_notification(self.memory);
            }
        }
        let Some(chain) = chain else {
            return Taken::Empty;
        };
        let head_index = chain.head_index();
        match buffers.push(self.memory, chain, true) {
            Ok(_) => Taken::Room,
            Err(_) => {
                self.add_used(head_index, 0);
                Taken::Invalid
            }
        }
    }

    /// Takes one more buffer if it is there and good; gives its room.
    fn take_another(&mut self, buffers: &mut Buffers<'m>) -> usize {
        let Some(chain) = self.queue.pop_descriptor_chain(self.memory) else {
            return 0;
        };
        let taken = buffers.chains().len();
        let room = buffers.push(self.memory, chain, true).unwrap_or(0);
        if room == 0 {
            // It will be the first of the next turn, and refused there.
            buffers.forget_after(taken);
            self.put_back(1);
        }
        room
    }

    /// Gives the last `count` buffers taken back, as if they had not been.
    fn put_back(&mut self, count: usize) {
        for _ in 0..count {
            self.queue.go_to_previous_position();
        }
    }

    /// Completes a buffer with a packet whose payload is in place.
    fn finish(&mut self, buffers: &Buffers<'_>, chain: usize, header: &Header) {
        let chain = &buffers.chains()[chain];
        buffers.write_header(chain, &header.to_bytes());
        // The header's length is 44.
        self.add_used(chain.head_index, HEADER_LEN as u32 + header.len);
    }

    /// Gives back empty the only buffer taken.
    fn refuse(&mut self, buffers: &Buffers<'_>) {
        for chain in buffers.chains() {
            self.add_used(chain.head_index, 0);
        }
    }

    fn add_used(&mut self, head_index: u16, len: u32) {
        // Fails only for a head index past the queue's end, which the driver
        // made up: there is nothing to give back then.
        let _ = self.queue.add_used(self.memory, head_index, len);
        self.served += 1;
    }
}
