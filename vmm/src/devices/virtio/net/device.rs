use std::os::fd::{AsFd, BorrowedFd};

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_LINK_UP,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};

use super::metrics::Metrics;
use super::rx::{Held, Rx};
use super::tx::Tx;
use super::watch::{Side, Watch};
use super::{NetChange, NetConfig, NetError, NetState, QUEUE_SIZE, Tap};
use crate::config::RateLimit;
use crate::devices::virtio::{
    ActivateError, Activation, ChipState, Counters, Interrupt, VirtioDevice, read_config_space,
};
use crate::devices::{Chip, StateError};
use crate::memory::GuestMemory;
use crate::rate_limiter::RateLimiter;

/// The number of the receive queue (section 5.1.2); the other one is the
/// transmit queue.
const RX: usize = 0;

const FEATURES: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_MTU
    | 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// The network device.
pub struct Net {
    mac: [u8; 6],
    mtu: u16,
    backend: Backend,
    active: Option<Active>,
    /// What the driver was last told of the link. One that stands still is told
    /// of a change when it is active again.
    told_link_up: bool,
}

/// What the device has whether a driver uses it or not.
pub(super) struct Backend {
    pub(super) tap: Option<Tap>,
    /// Never without a TAP.
    pub(super) link_up: bool,
    /// The TAP has packets, as far as we know.
    pub(super) readable: bool,
    pub(super) held: Held,
    pub(super) rx_limiter: Option<RateLimiter>,
    pub(super) tx_limiter: Option<RateLimiter>,
    pub(super) watch: Watch,
    pub(super) metrics: Metrics,
}

struct Active {
    memory: GuestMemory,
    rx: Rx,
    tx: Tx,
    interrupt: Interrupt,
}

// === impl Net ===

impl Net {
    /// Receive and transmit.
    pub const QUEUES: usize = 2;

    pub fn new(config: NetConfig) -> Result<Self, NetError> {
        let watch = Watch::new().map_err(NetError::Host)?;
        if let Some(tap) = &config.tap {
            watch.watch_tap(tap).map_err(NetError::Host)?;
        }
        let link_up = config.tap.is_some();
        Ok(Self {
            mac: config.mac,
            mtu: config.mtu,
            backend: Backend {
                link_up,
                readable: link_up,
                tap: config.tap,
                held: Held::new(),
                rx_limiter: new_limiter(&watch, config.rx, Side::Rx)?,
                tx_limiter: new_limiter(&watch, config.tx, Side::Tx)?,
                watch,
                metrics: Metrics::default(),
            },
            active: None,
            told_link_up: link_up,
        })
    }

    /// Changes limits and link. New limits begin with full buckets. Nothing has
    /// changed after an error.
    pub fn change(&mut self, change: NetChange) -> Result<(), NetError> {
        let backend = &mut self.backend;
        if change.link_up == Some(true) && backend.tap.is_none() {
            return Err(NetError::NoTap);
        }
        let limiter = |limit: Option<RateLimit>, side| {
            limit
                .map(|limit| new_limiter(&backend.watch, limit, side))
                .transpose()
        };
        let (rx, tx) = (limiter(change.rx, Side::Rx)?, limiter(change.tx, Side::Tx)?);
        if let Some(rx) = rx {
            backend.rx_limiter = rx;
        }
        if let Some(tx) = tx {
            backend.tx_limiter = tx;
        }
        backend.link_up = change.link_up.unwrap_or(backend.link_up);
        if let Some(active) = &mut self.active {
            active.rx.tokens_added();
            active.tx.go_on();
        }
        self.tell_link();
        self.backend.watch.wake();
        Ok(())
    }

    /// Tells an active driver of a change.
    fn tell_link(&mut self) {
        if let Some(active) = &self.active
            && self.told_link_up != self.backend.link_up
        {
            self.told_link_up = self.backend.link_up;
            active.interrupt.signal_config_change();
        }
    }

    /// The configuration space (section 5.1.4).
    fn config(&self) -> [u8; 12] {
        let mut config = [0; 12];
        let status = match self.backend.link_up {
            true => VIRTIO_NET_S_LINK_UP as u16,
            false => 0,
        };
        config[..6].copy_from_slice(&self.mac);
        config[6..8].copy_from_slice(&status.to_le_bytes());
        // One pair of queues.
        config[8..10].copy_from_slice(&1u16.to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.to_le_bytes());
        config
    }
}

impl VirtioDevice for Net {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; Self::QUEUES]
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config(), offset, data);
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.backend.watch.as_fd()]
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation {
            memory,
            queues,
            interrupt,
            features,
        } = activation;
        let queues: [Queue; Self::QUEUES] =
            queues.try_into().map_err(|_| ActivateError::MissingQueue)?;
        let [mut rx, mut tx] = queues;
        if let Some(tap) = &self.backend.tap {
            tap.set_offloads(features).map_err(ActivateError::Backend)?;
        }
        let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        rx.set_event_idx(event_idx);
        tx.set_event_idx(event_idx);
        self.active = Some(Active {
            rx: Rx::new(rx, &memory, features, self.mtu),
            tx: Tx::new(tx, &memory),
            memory,
            interrupt,
        });
        self.tell_link();
        // What has come before, and what lies in the rings of a restored driver.
        self.backend.watch.wake();
        Ok(())
    }

    fn queue_notified(&mut self, queue: usize) {
        let Some(active) = &mut self.active else {
            return;
        };
        if queue == RX {
            active.rx.buffers_added(&active.memory);
            active.process_rx(&mut self.backend);
        } else {
            active.process_tx(&mut self.backend);
        }
    }

    fn source_ready(&mut self, _source: usize) {
        let happened = self.backend.watch.take();
        self.backend.readable |= happened.readable;
        let Some(active) = &mut self.active else {
            return;
        };
        if happened.rx {
            active.rx.tokens_added();
        }
        if happened.tx {
            active.tx.go_on();
        }
        if happened.rx || happened.readable || happened.wake {
            active.process_rx(&mut self.backend);
        }
        if happened.tx || happened.wake {
            active.process_tx(&mut self.backend);
        }
    }

    fn reset(&mut self) {
        self.active = None;
        if self.backend.held.drop_packet() {
            self.backend.metrics.rx.no_buffer += 1;
        }
    }

    /// Packets are moved at once: none is in flight. Buffers that were taken
    /// ahead are in the driver's ring as before.
    fn quiesce(&mut self) -> Vec<Queue> {
        self.active.take().map_or_else(Vec::new, |active| {
            vec![active.rx.into_queue(), active.tx.into_queue()]
        })
    }

    fn save(&self) -> ChipState {
        ChipState::Net(NetState {
            link_up: self.told_link_up,
        })
    }

    fn restore(&mut self, state: ChipState) -> Result<(), StateError> {
        let ChipState::Net(state) = state else {
            return Err(StateError::Kind);
        };
        self.told_link_up = state.link_up;
        Ok(())
    }

    fn chip(&mut self) -> Chip<'_> {
        Chip::Net(self)
    }

    fn counters(&self) -> Counters {
        self.backend.metrics.counters(self.backend.link_up)
    }
}

// === impl Active ===

impl Active {
    fn process_rx(&mut self, backend: &mut Backend) {
        if self.rx.process(&self.memory, backend) {
            self.interrupt.signal_used_queue();
        }
    }

    fn process_tx(&mut self, backend: &mut Backend) {
        if self.tx.process(&self.memory, backend) {
            self.interrupt.signal_used_queue();
        }
    }
}

fn new_limiter(
    watch: &Watch,
    limit: RateLimit,
    side: Side,
) -> Result<Option<RateLimiter>, NetError> {
    let limiter = RateLimiter::new(limit).map_err(NetError::Host)?;
    if let Some(limiter) = &limiter {
        watch.watch_limiter(limiter, side).map_err(NetError::Host)?;
    }
    Ok(limiter)
}
