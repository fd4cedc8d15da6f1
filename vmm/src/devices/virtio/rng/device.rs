use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::Bytes;

use crate::devices::StateError;
use crate::devices::virtio::{
    ActivateError, Activation, ChipState, Counters, Interrupt, VirtioDevice,
};
use crate::memory::GuestMemory;

const QUEUE_SIZE: u16 = 16;

/// The most bytes one request gets: the driver takes what the used length says
/// and asks again. It keeps one notification short, whatever the guest asks.
const REQUEST_MAX_BYTES: usize = 64 * 1024;

/// getrandom(2) is asked for this much at a time; up to 256 bytes it is never
/// interrupted, and larger pieces win nothing.
const PIECE_BYTES: usize = 256;

/// The entropy device.
#[derive(Debug, Default)]
pub struct Rng {
    active: Option<Active>,
    requests: u64,
    bytes: u64,
    failures: u64,
}

#[derive(Debug)]
struct Active {
    memory: GuestMemory,
    queue: Queue,
    interrupt: Interrupt,
}

// === impl Rng ===

impl Rng {
    pub const QUEUES: usize = 1;

    pub fn new() -> Self {
        Self::default()
    }

    fn process(&mut self) {
        let Some(Active {
            memory,
            queue,
            interrupt,
        }) = &mut self.active
        else {
            return;
        };
        let mut used_any = false;
        // A queue's worth of chains is all that an honest driver can have
        // offered; one that offers more while we serve it waits for its next
        // notification.
        for _ in 0..queue.size() {
            // An error means that the available index is absurd. Only a reset
            // can mend such a queue, so it is left alone.
            let Some(chain) = queue
                .iter(&*memory)
                .ok()
                .and_then(|mut chains| chains.next())
            else {
                match queue.enable_notification(&*memory) {
                    Ok(true) if queue.iter(&*memory).is_ok() => continue,
                    _ => break,
                }
            };
            let head = chain.head_index();
            let written = match fill(chain, memory) {
                Ok(written) => {
                    self.requests += 1;
                    self.bytes += u64::from(written);
                    written
                }
                Err(written) => {
                    self.failures += 1;
                    written
                }
            };
            used_any |= queue.add_used(&*memory, head, written).is_ok();
        }
        if used_any && queue.needs_notification(&*memory).unwrap_or(true) {
            interrupt.signal_used_queue();
        }
    }
}

impl VirtioDevice for Rng {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    /// The device has no configuration space.
    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut queue = activation
            .queues
            .into_iter()
            .next()
            .ok_or(ActivateError::MissingQueue)?;
        queue.set_event_idx(activation.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0);
        self.active = Some(Active {
            memory: activation.memory,
            queue,
            interrupt: activation.interrupt,
        });
        Ok(())
    }

    fn queue_notified(&mut self, _queue: usize) {
        self.process();
    }

    fn reset(&mut self) {
        self.active = None;
    }

    fn quiesce(&mut self) -> Vec<Queue> {
        // Requests are served as they are taken: none is in flight.
        self.active
            .take()
            .map(|active| active.queue)
            .into_iter()
            .collect()
    }

    fn save(&self) -> ChipState {
        ChipState::Rng
    }

    fn restore(&mut self, state: ChipState) -> Result<(), StateError> {
        match state {
            ChipState::Rng => Ok(()),
            _ => Err(StateError::Kind),
        }
    }

    fn counters(&self) -> Counters {
        Counters::from([
            ("requests", self.requests),
            ("bytes", self.bytes),
            ("failures", self.failures),
        ])
    }
}

/// Fills the chain's buffers; the bytes written, whether all went well or not.
fn fill(chain: DescriptorChain<&GuestMemory>, memory: &GuestMemory) -> Result<u32, u32> {
    let mut written = 0;
    let mut piece = [0; PIECE_BYTES];
    for descriptor in chain {
        if !descriptor.is_write_only() {
            // The driver must place no readable buffer here (5.4.6.1).
            return Err(written as u32);
        }
        let room = (descriptor.len() as usize).min(REQUEST_MAX_BYTES - written);
        let mut address = descriptor.addr();
        let mut left = room;
        while left > 0 {
            let want = left.min(PIECE_BYTES);
            let got = getrandom(&mut piece[..want], GetRandomFlags::empty())
                .map_err(|_| written as u32)?;
            memory
                .write_slice(&piece[..got], address)
                .map_err(|_| written as u32)?;
            written += got;
            left -= got;
            // write_slice has found all of the piece in memory, so its end is
            // an address.
            address.0 += got as u64;
        }
        if written == REQUEST_MAX_BYTES {
            break;
        }
    }
    Ok(written as u32)
}

#[cfg(test)]
mod tests {
    use super::Rng;
    use super::*;
    use crate::devices::virtio::testing::{self, Driver, readable, writable};
    use proptest::prelude::*;
    use virtio_queue::desc::split::Descriptor;
    use vm_memory::GuestAddress;

    const MEMORY_BYTES: usize = 1 << 20;
    const BUFFERS: u64 = 0x1_0000;

    fn start() -> (GuestMemory, Driver, Rng) {
        let memory = testing::memory(MEMORY_BYTES);
        let driver = Driver::new(&memory, 0x1000, QUEUE_SIZE);
        let mut rng = Rng::new();
        rng.activate(driver.activation(0)).unwrap();
        (memory, driver, rng)
    }

    #[test]
    fn fills_every_buffer_of_a_chain() {
        let (memory, mut driver, mut rng) = start();
        let head = driver.add(&[writable(BUFFERS, 300), writable(BUFFERS + 0x1000, 64)]);
        rng.queue_notified(0);
        assert_eq!(driver.take_used(), [(head, 364)]);
        assert_eq!(driver.interrupts(), 1);
        for (address, len) in [(BUFFERS, 300), (BUFFERS + 0x1000, 64)] {
            let mut bytes = vec![0; len + 1];
            memory
                .read_slice(&mut bytes, GuestAddress(address))
                .unwrap();
            // 64 random bytes are all zero once in 2^512 runs.
            assert!(bytes[len - 64..len].iter().any(|&b| b != 0));
            assert_eq!(bytes[len], 0, "wrote past the buffer");
        }
        assert_eq!(rng.counters()["bytes"], 364);
    }

    #[test]
    fn two_requests_differ() {
        let (memory, mut driver, mut rng) = start();
        driver.add(&[writable(BUFFERS, 32)]);
        driver.add(&[writable(BUFFERS + 32, 32)]);
        rng.queue_notified(0);
        let mut bytes = [0; 64];
        memory
            .read_slice(&mut bytes, GuestAddress(BUFFERS))
            .unwrap();
        assert_ne!(bytes[..32], bytes[32..]);
    }

    #[test]
    fn a_large_request_is_cut() {
        let (_, mut driver, mut rng) = start();
        let head = driver.add(&[writable(BUFFERS, 128 * 1024)]);
        rng.queue_notified(0);
        assert_eq!(driver.take_used(), [(head, REQUEST_MAX_BYTES as u32)]);
    }

    #[test]
    fn bad_chains_are_given_back_empty() {
        let (_, mut driver, mut rng) = start();
        let wrong_way = driver.add(&[readable(BUFFERS, 64)]);
        let outside = driver.add(&[writable(u64::MAX - 8, 64)]);
        let good = driver.add(&[writable(BUFFERS, 64)]);
        rng.queue_notified(0);
        assert_eq!(
            driver.take_used(),
            [(wrong_way, 0), (outside, 0), (good, 64)]
        );
        assert_eq!(rng.counters()["failures"], 2);
    }

    #[test]
    fn serves_more_chains_than_the_queue_is_long_over_time() {
        let (_, mut driver, mut rng) = start();
        for _ in 0..5 * QUEUE_SIZE {
            let head = driver.add(&[writable(BUFFERS, 8)]);
            rng.queue_notified(0);
            assert_eq!(driver.take_used(), [(head, 8)]);
        }
    }

    #[test]
    fn an_absurd_available_index_stops_the_queue_until_reset() {
        let (_, mut driver, mut rng) = start();
        driver.set_avail_index(QUEUE_SIZE + 1);
        rng.queue_notified(0);
        assert_eq!(driver.take_used(), []);
        rng.reset();
        rng.queue_notified(0);
        assert_eq!(driver.take_used(), []);
    }

    proptest! {
        /// Whatever the descriptors say, each chain is given back and nothing
        /// panics; what lies outside guest memory cannot be touched by the safe
        /// code above.
        #[test]
        fn any_chain_is_given_back(
            descriptors in prop::collection::vec(
                (any::<u64>(), any::<u32>(), any::<u16>(), any::<u16>(), any::<bool>()),
                1..QUEUE_SIZE as usize,
            ),
            heads in prop::collection::vec(0..QUEUE_SIZE, 1..QUEUE_SIZE as usize),
        ) {
            let (_, mut driver, mut rng) = start();
            for (index, &(address, len, flags, next, tame)) in descriptors.iter().enumerate() {
                let descriptor = if tame {
                    let inside = BUFFERS + address % (MEMORY_BYTES as u64 - BUFFERS);
                    Descriptor::new(inside, len % 8192, flags & 7, next % QUEUE_SIZE)
                } else {
                    Descriptor::new(address, len, flags, next)
                };
                driver.set_descriptor(index as u16, descriptor);
            }
            for &head in &heads {
                driver.offer(head);
            }
            rng.queue_notified(0);
            prop_assert_eq!(driver.take_used().len(), heads.len());
        }
    }
}
