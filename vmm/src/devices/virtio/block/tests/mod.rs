//! The chip against a mock driver, temporary files and a real io_uring.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use tempfile::TempDir;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::devices::virtio::testing::{self, Driver, readable, writable};
use crate::devices::virtio::{Activation, VirtioDevice};
use crate::memory::GuestMemory;

mod freeze;
mod hostile;
mod layers;
mod model;
mod requests;

const MEMORY_BYTES: usize = 8 << 20;
const RINGS: u64 = 0x1000;
/// Where headers, statuses and data lie in guest memory.
const HEADERS: u64 = 0x2_0000;
const STATUSES: u64 = 0x3_0000;
const DATA: u64 = 0x10_0000;
/// What a status byte holds until the device writes it.
const UNANSWERED: u8 = 0xee;

const OK: u8 = VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = VIRTIO_BLK_S_UNSUPP as u8;

/// The files of a disk.
struct Files {
    folder: TempDir,
    size_bytes: u64,
    /// Names of the frozen layers, root first.
    frozen: Vec<String>,
    /// The name of the top layer.
    top: String,
    /// Layers made.
    made: u32,
}

/// A guest with one disk.
struct Guest {
    memory: GuestMemory,
    driver: Driver,
    block: Block,
    features: u64,
    /// Requests made; spreads their headers and statuses.
    made: u64,
}

impl Files {
    /// A base image with recognisable contents, and a disk of `size_bytes`.
    fn new(base_bytes: u64, size_bytes: u64) -> Self {
        let files = Self {
            folder: tempfile::tempdir().unwrap(),
            size_bytes,
            frozen: Vec::new(),
            top: "layer".into(),
            made: 0,
        };
        let mut base = File::create(files.folder.path().join("base")).unwrap();
        base.write_all(&Self::base_contents(base_bytes)).unwrap();
        files
    }

    /// No two blocks are alike, and none is like what tests write.
    fn base_contents(bytes: u64) -> Vec<u8> {
        let word = |at: u64| ((at * 0x9e37_79b9) | 1).to_le_bytes();
        (0..bytes / 8).flat_map(word).collect()
    }

    fn base(&self) -> File {
        File::open(self.folder.path().join("base")).unwrap()
    }

    fn base_bytes(&self) -> Vec<u8> {
        std::fs::read(self.folder.path().join("base")).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn writable(&self, name: &str) -> File {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        options.open(self.path(name)).unwrap()
    }

    /// The top layer's file.
    fn layer(&self) -> File {
        self.writable(&self.top)
    }

    /// The name of a layer that there is not yet.
    fn new_name(&mut self) -> String {
        self.made += 1;
        format!("layer.{}", self.made)
    }

    /// A read-only disk of these layers.
    fn config_of(&self, frozen: &[String]) -> BlockConfig {
        let open = |name: &String| File::open(self.path(name)).unwrap();
        BlockConfig {
            frozen: frozen.iter().map(open).collect(),
            layer: None,
            ..self.config()
        }
    }

    /// Freezes the disk of a guest, whose files these are, and returns the layers
    /// of the snapshot.
    fn freeze(
        &mut self,
        guest: &mut Guest,
        next: bool,
        keep: Option<usize>,
    ) -> Result<Vec<String>, FreezeError> {
        let queues = guest.block.quiesce();
        let result = self.freeze_quiesced(&mut guest.block, next, keep);
        guest.resume(queues);
        result
    }

    fn freeze_quiesced(
        &mut self,
        block: &mut Block,
        next: bool,
        keep: Option<usize>,
    ) -> Result<Vec<String>, FreezeError> {
        let next = next.then(|| self.new_name());
        let merged = keep.map(|keep| (self.new_name(), keep));
        block.prepare_freeze(Freeze {
            next: next.as_ref().map(|name| self.writable(name)),
            merge: merged.as_ref().map(|(name, keep)| Merge {
                file: self.writable(name),
                keep: *keep,
            }),
        })?;
        block.commit_freeze();
        let (newest, keep) = merged.unwrap_or((self.top.clone(), self.frozen.len()));
        let mut chain = self.frozen[..keep].to_vec();
        chain.push(newest);
        if let Some(next) = next {
            self.frozen.clone_from(&chain);
            self.top = next;
        }
        Ok(chain)
    }

    fn config(&self) -> BlockConfig {
        BlockConfig {
            id: "root".into(),
            size_bytes: self.size_bytes,
            base: self.base(),
            frozen: self
                .frozen
                .iter()
                .map(|name| File::open(self.path(name)).unwrap())
                .collect(),
            layer: Some(self.layer()),
            rate_limit: RateLimit::default(),
        }
    }

    fn error(&self, change: impl FnOnce(&mut BlockConfig)) -> BlockError {
        let mut config = self.config();
        change(&mut config);
        made(config)
            .err()
            .expect("the configuration must be refused")
    }
}

impl Guest {
    fn new(config: BlockConfig) -> Self {
        Self::with_features(config, u64::MAX)
    }

    fn with_features(config: BlockConfig, accepted: u64) -> Self {
        let memory = testing::memory(MEMORY_BYTES);
        let driver = Driver::new(&memory, RINGS, QUEUE_SIZE);
        let mut block = made(config).unwrap();
        let features = block.features() & accepted;
        block.activate(driver.activation(features)).unwrap();
        Self {
            memory,
            driver,
            block,
            features,
            made: 0,
        }
    }

    /// Has a quiesced disk go on with its queues.
    fn resume(&mut self, queues: Vec<virtio_queue::Queue>) {
        let activation = Activation {
            queues,
            ..self.driver.activation(self.features)
        };
        self.block.activate(activation).unwrap();
    }

    /// Makes a request available without telling the device; where its status
    /// will be.
    fn offer(
        &mut self,
        kind: u32,
        sector: u64,
        data: &[virtio_queue::desc::split::Descriptor],
    ) -> u64 {
        let place = self.made % u64::from(QUEUE_SIZE);
        self.made += 1;
        let (header, status) = (HEADERS + place * 16, STATUSES + place);
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        self.memory
            .write_slice(&bytes, GuestAddress(header))
            .unwrap();
        self.memory
            .write_obj(UNANSWERED, GuestAddress(status))
            .unwrap();
        let mut chain = vec![readable(header, 16)];
        chain.extend_from_slice(data);
        chain.push(writable(status, 1));
        self.driver.add(&chain);
        status
    }

    fn status(&self, at: u64) -> u8 {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    /// Makes one request and waits for its status and used length.
    fn request(
        &mut self,
        kind: u32,
        sector: u64,
        data: &[virtio_queue::desc::split::Descriptor],
    ) -> (u8, u32) {
        let status = self.offer(kind, sector, data);
        self.block.queue_notified(0);
        let used = self.driver.wait_used(&mut self.block, 1);
        (self.status(status), used[0].1)
    }

    fn put(&self, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(DATA)).unwrap();
    }

    fn got(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(DATA))
            .unwrap();
        bytes
    }

    fn write(&mut self, sector: u64, bytes: &[u8]) -> u8 {
        self.put(bytes);
        self.request(
            VIRTIO_BLK_T_OUT,
            sector,
            &[readable(DATA, bytes.len() as u32)],
        )
        .0
    }

    fn read(&mut self, sector: u64, len: usize) -> Vec<u8> {
        self.put(&vec![0xaa; len]);
        let (status, used) = self.request(VIRTIO_BLK_T_IN, sector, &[writable(DATA, len as u32)]);
        assert_eq!((status, used as usize), (OK, len + 1));
        self.got(len)
    }

    fn flush(&mut self) -> u8 {
        self.request(VIRTIO_BLK_T_FLUSH, 0, &[]).0
    }

    /// A discard or write-zeroes of one range.
    fn zero(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        let mut range = [0; 16];
        range[..8].copy_from_slice(&sector.to_le_bytes());
        range[8..12].copy_from_slice(&sectors.to_le_bytes());
        range[12..].copy_from_slice(&flags.to_le_bytes());
        self.put(&range);
        self.request(kind, 0, &[readable(DATA, 16)]).0
    }

    fn counter(&self, name: &str) -> u64 {
        self.block.counters()[name]
    }
}

/// The disk with a ring of its own.
fn made(config: BlockConfig) -> Result<Block, BlockError> {
    Block::new(config, Ring::new()?)
}
