//! What the driver gives back, from the available rings to the host.

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::metrics::Metrics;
use super::{Balloon, QUEUE_SIZE, VIRTIO_BALLOON_F_REPORTING};
use crate::devices::virtio::{ActivateError, Activation, Interrupt};
use crate::memory::{self, GuestMemory, PAGE_BYTES};

const INFLATE: usize = 0;
const REPORTING: usize = 2;

/// The most page numbers in a chain: 16 MiB of memory. Linux sends 256, others
/// a page full. It keeps one notification short, whatever the guest sends.
const PFNS_MAX: usize = 4096;
const PFN_BYTES: usize = size_of::<u32>();

/// The most ranges in a chain: as many as fit into a queue, for the device does
/// not offer indirect descriptors.
const RANGES_MAX: usize = QUEUE_SIZE as usize;

/// The queues in use by a driver.
#[derive(Debug)]
pub(super) struct Active {
    memory: GuestMemory,
    queues: Vec<Queue>,
    interrupt: Interrupt,
    reporting: bool,
}

/// A chain that is not what the driver must put into this queue.
struct Malformed;

// === impl Active ===

impl Active {
    pub(super) fn new(activation: Activation) -> Result<Self, ActivateError> {
        if activation.queues.len() != Balloon::QUEUES {
            return Err(ActivateError::MissingQueue);
        }
        Ok(Self {
            memory: activation.memory,
            queues: activation.queues,
            interrupt: activation.interrupt,
            reporting: activation.features & 1 << VIRTIO_BALLOON_F_REPORTING != 0,
        })
    }

    pub(super) fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    pub(super) fn into_queues(self) -> Vec<Queue> {
        self.queues
    }

    /// Serves what the driver has offered in a queue.
    pub(super) fn process(&mut self, number: usize, metrics: &mut Metrics) {
        if number == REPORTING && !self.reporting {
            return;
        }
        let memory = &self.memory;
        let Some(queue) = self.queues.get_mut(number) else {
            return;
        };
        let mut used_any = false;
        // A queue's worth of chains is all that an honest driver can have
        // offered; one that offers more while we serve it notifies us again.
        for _ in 0..queue.size() {
            // An error means that the available index is absurd. Only a reset
            // can mend such a queue, so it is left alone.
            let Some(chain) = queue.iter(memory).ok().and_then(|mut chains| chains.next()) else {
                break;
            };
            let head = chain.head_index();
            let served = match number {
                INFLATE => inflate(chain, memory, metrics),
                REPORTING => report(chain, memory, metrics),
                // What the guest takes back it touches, and has it again.
                _ => Ok(()),
            };
            if served.is_err() {
                metrics.failures += 1;
            }
            // The device writes into no buffer. In a reported one a length would
            // say that so much of it is initialized.
            used_any |= queue.add_used(memory, head, 0).is_ok();
        }
        if used_any && queue.needs_notification(memory).unwrap_or(true) {
            self.interrupt.signal_used_queue();
        }
    }
}

/// Gives back the pages that the chain names.
fn inflate(
    chain: DescriptorChain<&GuestMemory>,
    memory: &GuestMemory,
    metrics: &mut Metrics,
) -> Result<(), Malformed> {
    let mut pfns = read_pfns(chain, memory)?;
    // In order, most of them make a few runs; Linux sends them as it got them.
    pfns.sort_unstable();
    pfns.dedup();
    let mut rest = pfns.as_slice();
    while let Some(&first) = rest.first() {
        let run = (first..=u32::MAX)
            .zip(rest)
            .take_while(|&(expected, &pfn)| expected == pfn && is_ram(memory, pfn))
            .count();
        if run == 0 {
            metrics.failures += 1;
            rest = &rest[1..];
            continue;
        }
        match memory::discard(memory, address(first), run as u64 * PAGE_BYTES) {
            Ok(()) => metrics.inflated_pages += run as u64,
            Err(_) => metrics.failures += 1,
        }
        rest = &rest[run..];
    }
    Ok(())
}

fn read_pfns(
    chain: DescriptorChain<&GuestMemory>,
    memory: &GuestMemory,
) -> Result<Vec<u32>, Malformed> {
    let mut bytes = Vec::new();
    for descriptor in chain {
        let start = bytes.len();
        let end = start + descriptor.len() as usize;
        if descriptor.is_write_only() || end > PFNS_MAX * PFN_BYTES {
            return Err(Malformed);
        }
        bytes.resize(end, 0);
        memory
            .read_slice(&mut bytes[start..], descriptor.addr())
            .map_err(|_| Malformed)?;
    }
    let (pfns, []) = bytes.as_chunks::<PFN_BYTES>() else {
        return Err(Malformed);
    };
    Ok(pfns.iter().copied().map(u32::from_le_bytes).collect())
}

/// Gives back the whole pages of each of the chain's buffers.
fn report(
    chain: DescriptorChain<&GuestMemory>,
    memory: &GuestMemory,
    metrics: &mut Metrics,
) -> Result<(), Malformed> {
    for (number, descriptor) in chain.enumerate() {
        if number == RANGES_MAX || !descriptor.is_write_only() {
            return Err(Malformed);
        }
        let start = descriptor.addr().0;
        let end = start.checked_add(u64::from(descriptor.len()));
        let first = start.checked_next_multiple_of(PAGE_BYTES);
        let (Some(first), Some(end)) = (first, end) else {
            return Err(Malformed);
        };
        let bytes = end.saturating_sub(first) / PAGE_BYTES * PAGE_BYTES;
        if bytes == 0 {
            continue;
        }
        match memory::discard(memory, GuestAddress(first), bytes) {
            Ok(()) => metrics.reported_bytes += bytes,
            Err(_) => metrics.failures += 1,
        }
    }
    Ok(())
}

fn address(pfn: u32) -> GuestAddress {
    GuestAddress(u64::from(pfn) * PAGE_BYTES)
}

/// RAM's regions are of whole pages.
fn is_ram(memory: &GuestMemory, pfn: u32) -> bool {
    memory.address_in_range(address(pfn))
}
