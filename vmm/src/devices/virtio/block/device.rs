use std::os::fd::{AsFd, BorrowedFd};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};

use super::disk::Disk;
use super::engine::{Engine, SetupError};
use super::freeze::{self, Prepared};
use super::metrics::Metrics;
use super::queue::{Active, Backend, Owner};
use super::request::{SEGMENTS_MAX, ZERO_MAX_SECTORS};
use super::{
    BLOCK_BYTES, BlockConfig, BlockError, BlockState, Freeze, FreezeError, ID_MAX_BYTES,
    QUEUE_SIZE, SECTOR_BYTES,
};
use crate::devices::virtio::{
    ActivateError, Activation, ChipState, Counters, VirtioDevice, read_config_space,
};
use crate::devices::{Chip, StateError};
use crate::rate_limiter::RateLimiter;

/// The length of `struct virtio_blk_config` up to the write-zeroes fields.
const CONFIG_BYTES: usize = 60;

/// The place of each source in [`VirtioDevice::sources`].
const ENGINE: usize = 0;
const LIMITER: usize = 1;

/// The block device.
pub struct Block {
    backend: Backend,
    active: Option<Active>,
    prepared: Option<Prepared>,
}

/// The io_uring of a disk that is to be. Made apart, because the monitor gives up
/// making any before it knows its disks.
pub struct Ring(Engine<Owner>);

// === impl Ring ===

impl Ring {
    /// Must run before the seccomp filter that denies io_uring_setup.
    pub fn new() -> Result<Self, BlockError> {
        Engine::new().map(Self).map_err(|error| match error {
            SetupError::Unavailable(error) => BlockError::IoUringUnavailable(error),
            SetupError::Failed(error) => BlockError::IoUring(error),
        })
    }
}

// === impl Block ===

impl Block {
    pub const QUEUES: usize = 1;

    /// Checks the files and lays out the layer if it is empty.
    pub fn new(config: BlockConfig, ring: Ring) -> Result<Self, BlockError> {
        let id = padded_id(&config.id)?;
        let disk = Disk::new(config.base, config.size_bytes, config.frozen, config.layer)?;
        let Ring(mut engine) = ring;
        engine
            .add_first_files(&disk.files())
            .map_err(BlockError::IoUring)?;
        let limiter = RateLimiter::new(config.rate_limit).map_err(BlockError::Timer)?;
        Ok(Self {
            backend: Backend {
                id,
                disk,
                engine,
                limiter,
                metrics: Metrics::default(),
            },
            active: None,
            prepared: None,
        })
    }

    pub fn is_writable(&self) -> bool {
        self.backend.disk.is_writable()
    }

    /// How many frozen layers the disk has.
    pub fn frozen_layers(&self) -> usize {
        self.backend.disk.frozen.len()
    }

    /// Does all of a freeze that can fail: writes the layer's record of what is
    /// present, merges, and lays out the next layer. Nothing of it is made
    /// durable. Only while quiesced. One of [`Block::commit_freeze`] and
    /// [`Block::abandon_freeze`] must follow.
    pub fn prepare_freeze(&mut self, freeze: Freeze) -> Result<(), FreezeError> {
        if self.active.is_some() || self.prepared.is_some() {
            return Err(FreezeError::Request("the disk is in use; pause it first"));
        }
        let Backend { disk, engine, .. } = &mut self.backend;
        self.prepared = freeze::prepare(freeze, disk, engine)?;
        Ok(())
    }

    /// From now on the disk writes to the next layer, if it was given one.
    pub fn commit_freeze(&mut self) {
        if let Some(prepared) = self.prepared.take() {
            prepared.commit(&mut self.backend.disk, &mut self.backend.engine);
        }
    }

    /// The disk goes on as before. Harmless where nothing was prepared.
    pub fn abandon_freeze(&mut self) {
        if let Some(prepared) = self.prepared.take() {
            prepared.abandon(&mut self.backend.engine);
        }
    }

    fn state(&self) -> BlockState {
        let id = self.backend.id.split(|&byte| byte == 0).next();
        BlockState {
            id: String::from_utf8_lossy(id.unwrap_or_default()).into_owned(),
            size_bytes: self.backend.disk.size_bytes(),
            writable: self.backend.disk.is_writable(),
        }
    }

    fn process(&mut self) {
        if let Some(active) = &mut self.active {
            active.process(&mut self.backend);
        }
    }

    /// The configuration space (5.2.4).
    fn config(&self) -> [u8; CONFIG_BYTES] {
        let mut config = [0; CONFIG_BYTES];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        let sectors = self.backend.disk.size_bytes() / SECTOR_BYTES;
        let block_sectors = (BLOCK_BYTES / SECTOR_BYTES) as u32;
        put(0, &sectors.to_le_bytes());
        put(12, &SEGMENTS_MAX.to_le_bytes());
        put(20, &(BLOCK_BYTES as u32).to_le_bytes());
        // Topology: one logical block in a physical one, aligned; the least and
        // the best I/O are one block (both in logical blocks).
        put(24, &[0, 0]);
        put(26, &1u16.to_le_bytes());
        put(28, &1u32.to_le_bytes());
        put(34, &1u16.to_le_bytes());
        if self.backend.disk.is_writable() {
            put(36, &ZERO_MAX_SECTORS.to_le_bytes());
            put(40, &1u32.to_le_bytes());
            put(44, &block_sectors.to_le_bytes());
            put(48, &ZERO_MAX_SECTORS.to_le_bytes());
            put(52, &1u32.to_le_bytes());
            put(56, &[1]);
        }
        config
    }
}

impl VirtioDevice for Block {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC;
        always
            | if self.backend.disk.is_writable() {
                1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
            } else {
                1 << VIRTIO_BLK_F_RO
            }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.config(), offset, data);
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        let limiter = self.backend.limiter.as_ref().map(AsFd::as_fd);
        std::iter::once(self.backend.engine.as_fd())
            .chain(limiter)
            .collect()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut queue = activation
            .queues
            .into_iter()
            .next()
            .ok_or(ActivateError::MissingQueue)?;
        queue.set_event_idx(activation.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        let write_through = activation.features & 1 << VIRTIO_BLK_F_FLUSH == 0;
        self.active = Some(Active::new(
            activation.memory,
            queue,
            activation.interrupt,
            write_through,
        ));
        // A restored driver may have requests in its ring and no reason to
        // notify us of them.
        self.backend.engine.wake();
        Ok(())
    }

    fn queue_notified(&mut self, _queue: usize) {
        self.process();
    }

    fn source_ready(&mut self, source: usize) {
        match source {
            ENGINE => self.backend.engine.acknowledge(),
            LIMITER => {
                if let Some(limiter) = &self.backend.limiter {
                    limiter.acknowledge();
                }
            }
            _ => {}
        }
        self.process();
    }

    fn reset(&mut self) {
        if let Some(active) = self.active.take() {
            active.reset(&mut self.backend);
        }
    }

    fn quiesce(&mut self) -> Vec<Queue> {
        let active = self.active.take();
        active
            .map(|active| active.quiesce(&mut self.backend))
            .into_iter()
            .collect()
    }

    fn save(&self) -> ChipState {
        ChipState::Block(self.state())
    }

    fn restore(&mut self, state: ChipState) -> Result<(), StateError> {
        let ChipState::Block(saved) = state else {
            return Err(StateError::Kind);
        };
        let own = self.state();
        if saved == own {
            return Ok(());
        }
        Err(StateError::Chip(format!(
            "the snapshot's disk is {saved}, but {own} was passed; pass the disk that was saved"
        )))
    }

    fn chip(&mut self) -> Chip<'_> {
        Chip::Disk(self)
    }

    fn counters(&self) -> Counters {
        let Backend { disk, metrics, .. } = &self.backend;
        let top = disk.top.as_ref();
        let layer_blocks = top.map_or(0, |top| top.layer.present_blocks());
        metrics.counters(disk.layers(), layer_blocks)
    }
}

// === impl BlockState ===

impl std::fmt::Display for BlockState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            id,
            size_bytes,
            writable,
        } = self;
        let access = if *writable { "writable" } else { "read-only" };
        write!(f, "a {access} one of {size_bytes} bytes called {id:?}")
    }
}

/// The serial as GET_ID returns it, padded with NULs.
fn padded_id(id: &str) -> Result<[u8; ID_MAX_BYTES], BlockError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    if id.is_empty() || id.len() > ID_MAX_BYTES || !id.bytes().all(allowed) {
        return Err(BlockError::Id(id.to_owned()));
    }
    let mut padded = [0; ID_MAX_BYTES];
    padded[..id.len()].copy_from_slice(id.as_bytes());
    Ok(padded)
}
