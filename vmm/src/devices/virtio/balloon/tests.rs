use std::fs::File;
use std::os::unix::fs::FileExt as _;

use proptest::prelude::*;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_mmio::{self as reg, VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes as _, GuestAddress};

use super::{Balloon, BalloonState, QUEUE_SIZE, VIRTIO_BALLOON_F_REPORTING};
use crate::devices::Device as _;
use crate::devices::virtio::mmio::VirtioMmio;
use crate::devices::virtio::testing::{self, Driver, readable, writable};
use crate::devices::virtio::{ActivateError, Activation, ChipState, Interrupt, VirtioDevice as _};
use crate::machine::Wire;
use crate::memory::pagemap::Pagemap;
use crate::memory::{self, GuestMemory, PAGE_BYTES};

const MEMORY_BYTES: u64 = 4 << 20;
const MEMORY_PAGES: u64 = MEMORY_BYTES / PAGE_BYTES;
const BUFFERS: u64 = 0x1_0000;
/// The first page that is neither ring nor buffer.
const FREE_PAGE: u64 = 64;
const REPORTING: u64 = 1 << VIRTIO_BALLOON_F_REPORTING;

/// A guest with a driver for each queue.
struct Guest {
    memory: GuestMemory,
    inflate: Driver,
    deflate: Driver,
    reporting: Driver,
    interrupt: Interrupt,
    balloon: Balloon,
}

// === impl Guest ===

impl Guest {
    fn new() -> Self {
        let memory = memory::reserve(MEMORY_BYTES).unwrap();
        memory::map_anonymous(&memory).unwrap();
        Self::with_memory(memory, REPORTING)
    }

    fn with_memory(memory: GuestMemory, features: u64) -> Self {
        let driver = |start| Driver::new(&memory, start, QUEUE_SIZE);
        let mut guest = Self {
            inflate: driver(0x1000),
            deflate: driver(0x2000),
            reporting: driver(0x3000),
            interrupt: testing::interrupt(),
            balloon: Balloon::new(),
            memory,
        };
        guest.activate(features);
        guest
    }

    fn activate(&mut self, features: u64) {
        let drivers = [&self.inflate, &self.deflate, &self.reporting];
        let activation = Activation {
            memory: self.memory.clone(),
            queues: drivers.map(Driver::queue).into(),
            interrupt: self.interrupt.clone(),
            features,
        };
        self.balloon.activate(activation).unwrap();
    }

    /// Sends page numbers, in one buffer, to be given back.
    fn inflate(&mut self, pfns: &[u32]) {
        let bytes: Vec<u8> = pfns.iter().flat_map(|pfn| pfn.to_le_bytes()).collect();
        self.write(BUFFERS, &bytes);
        let head = self.inflate.add(&[readable(BUFFERS, bytes.len() as u32)]);
        self.balloon.queue_notified(0);
        assert_eq!(self.inflate.take_used(), [(head, 0)]);
    }

    fn report(&mut self, ranges: &[(u64, u32)]) {
        let ranges: Vec<_> = ranges
            .iter()
            .map(|&(address, len)| writable(address, len))
            .collect();
        let head = self.reporting.add(&ranges);
        self.balloon.queue_notified(2);
        assert_eq!(self.reporting.take_used(), [(head, 0)]);
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    fn touch(&self, pages: std::ops::Range<u64>) {
        for page in pages {
            self.write(page * PAGE_BYTES, b"!");
        }
    }

    /// The free pages that the process has memory for.
    fn private(&self) -> Vec<(u64, u64)> {
        let pagemap = Pagemap::new(File::open("/proc/self/pagemap").unwrap());
        let private = pagemap.private(&self.memory).unwrap();
        private
            .iter()
            .filter(|pages| pages.end > FREE_PAGE)
            .map(|pages| (pages.start, pages.end))
            .collect()
    }

    fn counter(&self, name: &str) -> u64 {
        self.balloon.counters()[name]
    }

    fn config(&self) -> [u32; 2] {
        let mut space = [0xff; 12];
        self.balloon.read_config(0, &mut space);
        assert_eq!(space[8..], [0; 4], "past the end");
        [0, 4].map(|at| u32::from_le_bytes(space[at..at + 4].try_into().unwrap()))
    }
}

#[test]
fn inflating_frees_the_pages() {
    let mut guest = Guest::new();
    guest.touch(100..110);
    guest.touch(200..203);
    assert_eq!(guest.private(), [(100, 110), (200, 203)]);
    guest.inflate(&[202, 103, 104, 201, 105, 104]);
    assert_eq!(guest.private(), [(100, 103), (106, 110), (200, 201)]);
    assert_eq!(guest.interrupt.status(), VIRTIO_MMIO_INT_VRING);
    assert_eq!(guest.counter("inflated_pages"), 5);
    assert_eq!(guest.counter("failures"), 0);
    // What the guest takes back it may use before the device knows.
    guest.touch(103..104);
    assert_eq!(guest.private()[0], (100, 104));
    let head = guest.deflate.add(&[readable(BUFFERS, 24)]);
    guest.balloon.queue_notified(1);
    assert_eq!(guest.deflate.take_used(), [(head, 0)]);
    assert_eq!(guest.private()[0], (100, 104));
}

#[test]
fn numbers_may_be_split_over_buffers() {
    let mut guest = Guest::new();
    guest.touch(100..102);
    guest.write(BUFFERS, &[100, 0, 0, 0, 101, 0]);
    guest.write(BUFFERS + 64, &[0, 0]);
    guest
        .inflate
        .add(&[readable(BUFFERS, 6), readable(BUFFERS + 64, 2)]);
    guest.balloon.queue_notified(0);
    assert_eq!(guest.private(), []);
}

#[test]
fn only_whole_pages_of_what_is_reported_are_freed() {
    let mut guest = Guest::new();
    guest.touch(100..120);
    let page = |number: u64| number * PAGE_BYTES;
    guest.report(&[
        (page(100), 2 * PAGE_BYTES as u32),
        (page(105) - 1, 2 * PAGE_BYTES as u32),
        (page(110) + 1, PAGE_BYTES as u32),
        (page(115), 0),
    ]);
    assert_eq!(guest.private(), [(102, 105), (106, 120)]);
    assert_eq!(guest.counter("reported_bytes"), 3 * PAGE_BYTES);
    assert_eq!(guest.counter("failures"), 0);
}

#[test]
fn a_page_given_back_is_what_its_layer_holds() {
    let layer = tempfile::tempfile().unwrap();
    layer.set_len(MEMORY_BYTES).unwrap();
    layer.write_all_at(b"layer", 100 * PAGE_BYTES).unwrap();
    let memory = memory::reserve(MEMORY_BYTES).unwrap();
    memory::map_first_layer(&memory, &layer).unwrap();
    let mut guest = Guest::with_memory(memory, REPORTING);
    guest.touch(100..102);
    guest.inflate(&[100]);
    guest.report(&[(101 * PAGE_BYTES, PAGE_BYTES as u32)]);
    assert_eq!(guest.private(), []);
    for (page, expected) in [(100, b"layer"), (101, &[0; 5])] {
        let mut found = [0xff; 5];
        guest
            .memory
            .read_slice(&mut found, GuestAddress(page * PAGE_BYTES))
            .unwrap();
        assert_eq!(&found, expected);
    }
}

#[test]
fn pages_that_are_not_ram_are_passed_over() {
    let mut guest = Guest::new();
    guest.touch(100..102);
    guest.touch(MEMORY_PAGES - 1..MEMORY_PAGES);
    let end = MEMORY_PAGES as u32;
    guest.inflate(&[100, u32::MAX, end - 1, end, end + 1, u32::MAX - 1, 101]);
    assert_eq!(guest.private(), []);
    assert_eq!(guest.counter("inflated_pages"), 3);
    assert_eq!(guest.counter("failures"), 4);
    let beyond = (MEMORY_BYTES - PAGE_BYTES, 2 * PAGE_BYTES as u32);
    guest.touch(100..102);
    guest.report(&[beyond, (1 << 40, 4096), (100 * PAGE_BYTES, 8192)]);
    assert_eq!(guest.private(), []);
    assert_eq!(guest.counter("reported_bytes"), 2 * PAGE_BYTES);
    assert_eq!(guest.counter("failures"), 6);
}

#[test]
fn malformed_chains_are_given_back_and_counted() {
    let mut guest = Guest::new();
    guest.touch(100..101);
    guest.write(BUFFERS, &[100, 0, 0, 0]);
    let inflate = [
        vec![writable(BUFFERS, 4)],
        vec![readable(BUFFERS, 4), writable(BUFFERS + 4, 4)],
        vec![readable(BUFFERS, 5)],
        vec![readable(BUFFERS, 4), readable(MEMORY_BYTES, 4)],
        vec![readable(u64::MAX - 1, 4)],
        vec![readable(BUFFERS, 4 * 4096), readable(BUFFERS, 4)],
        vec![readable(BUFFERS, u32::MAX)],
    ];
    for chain in &inflate {
        guest.inflate.add(chain);
    }
    guest.balloon.queue_notified(0);
    assert_eq!(guest.inflate.take_used().len(), inflate.len());
    let report = [
        readable(100 * PAGE_BYTES, 4096),
        writable(u64::MAX - 4095, 4096),
        writable(u64::MAX, 1),
    ];
    for descriptor in report {
        guest.reporting.add(&[descriptor]);
    }
    guest.balloon.queue_notified(2);
    assert_eq!(guest.reporting.take_used().len(), report.len());
    assert_eq!(guest.private(), [(100, 101)]);
    let failures = inflate.len() + report.len();
    assert_eq!(guest.counter("failures"), failures as u64);
    // What is on the ring next is served.
    guest.inflate(&[100]);
    assert_eq!(guest.private(), []);
}

#[test]
fn a_guest_is_told_of_a_target_that_differs() {
    let mut guest = Guest::new();
    assert_eq!(guest.interrupt.status(), 0);
    guest.balloon.set_target_mib(2);
    assert_eq!(guest.interrupt.status(), VIRTIO_MMIO_INT_CONFIG);
    guest.interrupt.acknowledge(u32::MAX);
    assert_eq!(guest.config(), [512, 0]);
    guest.balloon.write_config(4, &512u32.to_le_bytes());
    assert_eq!(guest.config(), [512, 512]);
    assert_eq!(guest.counter("target_mib"), 2);
    assert_eq!(guest.counter("actual_mib"), 2);
    guest.balloon.set_target_mib(2);
    assert_eq!(guest.interrupt.status(), 0, "it is there already");
    guest.balloon.set_target_mib(u32::MAX);
    assert_eq!(guest.config()[0], u32::MAX);
}

#[test]
fn a_driver_writes_nothing_else_of_the_configuration() {
    let mut guest = Guest::new();
    guest.balloon.write_config(0, &7u32.to_le_bytes());
    guest.balloon.write_config(4, &[7, 7]);
    guest.balloon.write_config(4, &[7; 8]);
    guest.balloon.write_config(6, &[7; 4]);
    guest.balloon.write_config(u64::MAX, &[7; 4]);
    assert_eq!(guest.config(), [0, 0]);
}

#[test]
fn the_balloon_goes_on_after_a_snapshot() {
    let mut guest = Guest::new();
    guest.balloon.set_target_mib(1);
    guest.balloon.write_config(4, &100u32.to_le_bytes());
    guest.inflate(&[100]);
    guest.interrupt.acknowledge(u32::MAX);
    let queues = guest.balloon.quiesce();
    guest.balloon.queue_notified(0);
    let state = guest.balloon.save();
    let expected = BalloonState {
        target_pages: 256,
        actual_pages: 100,
    };
    assert_eq!(state, ChipState::Balloon(expected));

    let mut restored = Balloon::new();
    assert!(restored.restore(ChipState::Rng).is_err());
    restored.restore(state.clone()).unwrap();
    assert_eq!(restored.save(), state);
    // Asked for while nobody could be told.
    restored.set_target_mib(2);
    guest.balloon = restored;
    let activation = |queues| Activation {
        memory: guest.memory.clone(),
        queues,
        interrupt: guest.interrupt.clone(),
        features: REPORTING,
    };
    guest.balloon.activate(activation(queues)).unwrap();
    assert_eq!(guest.interrupt.status(), VIRTIO_MMIO_INT_CONFIG);
    assert_eq!(guest.config(), [512, 100]);
    guest.touch(101..102);
    guest.inflate(&[101]);
    assert_eq!(guest.private(), []);
}

#[test]
fn a_reset_forgets_the_driver() {
    let mut guest = Guest::new();
    guest.balloon.set_target_mib(1);
    guest.balloon.write_config(4, &100u32.to_le_bytes());
    guest.balloon.reset();
    assert_eq!(guest.config(), [256, 0]);
    guest.inflate.add(&[readable(BUFFERS, 4)]);
    guest.balloon.queue_notified(0);
    assert_eq!(guest.inflate.take_used(), []);
    assert!(guest.balloon.quiesce().is_empty());
}

#[test]
fn without_reporting_its_queue_is_nobodys() {
    let memory = memory::reserve(MEMORY_BYTES).unwrap();
    memory::map_anonymous(&memory).unwrap();
    let mut guest = Guest::with_memory(memory, 0);
    guest.touch(100..101);
    guest
        .reporting
        .add(&[writable(100 * PAGE_BYTES, PAGE_BYTES as u32)]);
    guest.balloon.queue_notified(2);
    assert_eq!(guest.reporting.take_used(), []);
    assert_eq!(guest.private(), [(100, 101)]);
    let missing = Balloon::new().activate(guest.inflate.activation(0));
    assert!(matches!(missing, Err(ActivateError::MissingQueue)));
}

/// Linux sets up no queue of a feature that it does not accept.
#[test]
fn a_driver_sets_up_the_queues_of_its_features() {
    const DRIVER_OK: u32 = 15;
    for (features, queues, accepted) in [(0, 2, true), (REPORTING, 2, false), (REPORTING, 3, true)]
    {
        let memory = testing::memory(MEMORY_BYTES as usize);
        let wire = Wire::new(Balloon::QUEUES).unwrap();
        let mut mmio = VirtioMmio::new(Box::new(Balloon::new()), memory, wire);
        let mut write = |register: u32, value: u32| {
            mmio.write(u64::from(register), &value.to_le_bytes());
        };
        for status in [1, 3] {
            write(reg::VIRTIO_MMIO_STATUS, status);
        }
        write(reg::VIRTIO_MMIO_DRIVER_FEATURES, features as u32);
        write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
        write(
            reg::VIRTIO_MMIO_DRIVER_FEATURES,
            1 << (VIRTIO_F_VERSION_1 - 32),
        );
        write(reg::VIRTIO_MMIO_STATUS, 11);
        for queue in 0..queues {
            let start = 0x1000 * (queue + 1);
            write(reg::VIRTIO_MMIO_QUEUE_SEL, queue);
            write(reg::VIRTIO_MMIO_QUEUE_NUM, u32::from(QUEUE_SIZE));
            write(reg::VIRTIO_MMIO_QUEUE_DESC_LOW, start);
            write(reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, start + 0x400);
            write(reg::VIRTIO_MMIO_QUEUE_USED_LOW, start + 0x800);
            write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
        }
        write(reg::VIRTIO_MMIO_STATUS, DRIVER_OK);
        let mut read = |register: u32| {
            let mut data = [0; 4];
            mmio.read(u64::from(register), &mut data);
            u32::from_le_bytes(data)
        };
        let status = read(reg::VIRTIO_MMIO_STATUS);
        assert_eq!(status == DRIVER_OK, accepted, "{features:#x} {queues}");
        let actual = u64::from(reg::VIRTIO_MMIO_CONFIG) + 4;
        mmio.write(actual, &512u32.to_le_bytes());
        assert_eq!(mmio.counters()["actual_mib"], 2);

        // A machine with such a driver is restored as well.
        mmio.pause();
        let state = mmio.save();
        let memory = testing::memory(MEMORY_BYTES as usize);
        let wire = Wire::new(Balloon::QUEUES).unwrap();
        let mut restored = VirtioMmio::new(Box::new(Balloon::new()), memory, wire);
        restored.restore(state.clone()).unwrap();
        assert_eq!(restored.save(), state);
        restored.resume();
        assert_eq!(restored.counters()["actual_mib"], 2);
    }
}

proptest! {
    /// Whatever the descriptors and page numbers say, each chain is given back
    /// and nothing panics. The guest keeps its rings, so that it can tell.
    #[test]
    fn any_chain_is_given_back(
        descriptors in prop::collection::vec(
            (any::<u64>(), any::<u32>(), any::<u16>(), any::<u16>(), any::<bool>()),
            1..QUEUE_SIZE as usize,
        ),
        heads in prop::collection::vec(0..QUEUE_SIZE, 1..QUEUE_SIZE as usize),
        numbers in prop::collection::vec(any::<u32>(), 64),
    ) {
        let mut guest = Guest::new();
        for (at, number) in (0u64..).zip(&numbers) {
            // Of RAM past the rings, or beyond RAM.
            let pfn = if at % 2 == 0 { FREE_PAGE as u32 + number % 256 } else { number | 1 << 20 };
            guest.write(BUFFERS + 4 * at, &pfn.to_le_bytes());
        }
        for driver in [&mut guest.inflate, &mut guest.deflate, &mut guest.reporting] {
            for (index, &(address, len, flags, next, tame)) in descriptors.iter().enumerate() {
                let descriptor = if tame {
                    let inside = BUFFERS + address % (MEMORY_BYTES - BUFFERS);
                    Descriptor::new(inside, len % 8192, flags & 3, next % QUEUE_SIZE)
                } else {
                    // Beyond RAM.
                    Descriptor::new(address | 1 << 40, len, flags, next)
                };
                driver.set_descriptor(index as u16, descriptor);
            }
            for &head in &heads {
                driver.offer(head);
            }
        }
        for queue in 0..4 {
            guest.balloon.queue_notified(queue);
        }
        for driver in [&mut guest.inflate, &mut guest.deflate, &mut guest.reporting] {
            prop_assert_eq!(driver.take_used().len(), heads.len());
        }
    }
}
