//! The requests of an active disk, from the available ring to the used ring.

use std::collections::VecDeque;
use std::sync::Arc;

use rustix::io::Errno;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::disk::{Disk, Mounted, Place};
use super::engine::{Buffers, Engine, Piece};
use super::flush::{Flush, Flushed};
use super::metrics::Metrics;
use super::request::{Limits, Operation, Request};
use super::{BLOCK_BYTES, ID_MAX_BYTES, QUEUE_SIZE};
use crate::devices::virtio::Interrupt;
use crate::memory::GuestMemory;
use crate::rate_limiter::RateLimiter;

/// Rounds of work before the event loop gets its turn. A guest that adds
/// requests as fast as they are served would otherwise keep the loop for itself.
const ROUNDS_MAX: usize = 4;

/// Zeros written to guest memory before the event loop gets its turn, in bytes.
const ZEROS_MAX_BYTES: u64 = 8 << 20;

static ZEROS: [u8; BLOCK_BYTES as usize] = [0; BLOCK_BYTES as usize];

/// What a disk has whether a driver uses it or not.
pub(super) struct Backend {
    pub(super) id: [u8; ID_MAX_BYTES],
    /// Before the disk, so that it is dropped first: closing the layer gives up
    /// its lock, which must outlast the last write.
    pub(super) engine: Engine<Owner>,
    pub(super) disk: Disk,
    pub(super) limiter: Option<RateLimiter>,
    pub(super) metrics: Metrics,
}

/// Whose a piece of I/O is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Owner {
    /// A request, by its place in [`Active::requests`].
    Request(usize),
    Flush,
}

/// A queue in use by a driver.
pub(super) struct Active {
    memory: Arc<GuestMemory>,
    queue: Queue,
    interrupt: Interrupt,
    /// The driver did not accept VIRTIO_BLK_F_FLUSH, so each write must be
    /// durable before it completes (5.2.6.2).
    write_through: bool,
    /// The available ring is absurd; only a reset can mend it.
    broken: bool,
    requests: Vec<Option<InFlight>>,
    free: Vec<usize>,
    /// Requests with pieces yet to be issued, in order.
    ready: VecDeque<usize>,
    /// The request that waits for the rate limiter, and all behind it.
    throttled: Option<Request>,
    flush: Flush<usize>,
    used_any: bool,
}

struct InFlight {
    request: Request,
    /// The next byte of the disk to issue.
    next: u64,
    /// The end of the range; `next` once nothing is left to issue.
    end: u64,
    /// Pieces with the engine.
    under_way: usize,
    status: u32,
}

// === impl Active ===

impl Active {
    pub(super) fn new(
        memory: GuestMemory,
        queue: Queue,
        interrupt: Interrupt,
        write_through: bool,
    ) -> Self {
        Self {
            memory: Arc::new(memory),
            queue,
            interrupt,
            write_through,
            broken: false,
            requests: (0..QUEUE_SIZE).map(|_| None).collect(),
            free: (0..usize::from(QUEUE_SIZE)).rev().collect(),
            ready: VecDeque::new(),
            throttled: None,
            flush: Flush::new(),
            used_any: false,
        }
    }

    /// Moves everything on as far as it goes without waiting.
    pub(super) fn process(&mut self, backend: &mut Backend) {
        // An error means that the ring is not in guest memory, which taking
        // from it will find as well.
        let _ = self.queue.disable_notification(&*self.memory);
        let mut zeros_left = ZEROS_MAX_BYTES;
        let mut rounds = 0;
        loop {
            let took = self.take(backend);
            self.issue(backend, &mut zeros_left);
            backend.engine.submit();
            let finished = self.reap(backend);
            // What a completion leads to, the next stage of a flush or the rest
            // of a short read, has to be issued before we may rest.
            self.issue(backend, &mut zeros_left);
            backend.engine.submit();
            self.signal();

            rounds += 1;
            if rounds == ROUNDS_MAX || zeros_left == 0 {
                return backend.engine.wake();
            }
            if !took && !finished && !self.more_available() {
                return;
            }
        }
    }

    /// Waits for all I/O, and forgets its requests.
    pub(super) fn reset(mut self, backend: &mut Backend) {
        // Blocks written by forgotten requests stay what they were before: the
        // driver has been told nothing of them.
        backend.engine.drain(|_, _| ());
        self.flush.abandon(&mut backend.disk);
    }

    /// Finishes and answers every request that was started, and gives the queue
    /// back. The one that waits for the rate limiter goes back to the ring, where
    /// it is the last that was taken.
    pub(super) fn quiesce(mut self, backend: &mut Backend) -> Queue {
        while self.free.len() < self.requests.len() {
            let mut zeros_left = u64::MAX;
            self.issue(backend, &mut zeros_left);
            let mut done = Vec::new();
            backend
                .engine
                .drain(|owner, result| done.push((owner, result)));
            self.completed(done, backend);
        }
        if self.throttled.take().is_some() {
            self.queue.go_to_previous_position();
        }
        self.signal();
        self.queue
    }

    /// Asks the driver to notify us again, unless we could not take what it
    /// offers. True if it has offered something meanwhile.
    fn more_available(&mut self) -> bool {
        if self.broken || self.throttled.is_some() || self.free.is_empty() {
            return false;
        }
        self.queue
            .enable_notification(&*self.memory)
            .unwrap_or(false)
    }

    /// Takes requests off the ring. True if there were any.
    fn take(&mut self, backend: &mut Backend) -> bool {
        let mut any = false;
        if let Some(request) = self.throttled.take() {
            if !admit(backend, &request) {
                self.throttled = Some(request);
                return false;
            }
            self.start(request, backend);
            any = true;
        }
        let limits = Limits {
            size_bytes: backend.disk.size_bytes(),
            writable: backend.disk.is_writable(),
        };
        // An honest driver has no more chains with us than the queue is long; a
        // hostile one would make us hold requests without bound.
        let memory = Arc::clone(&self.memory);
        for _ in 0..QUEUE_SIZE {
            if self.broken || self.free.is_empty() {
                break;
            }
            let chain = match self.queue.iter(&*memory) {
                Ok(mut chains) => chains.next(),
                Err(_) => {
                    self.broken = true;
                    backend.metrics.failures += 1;
                    None
                }
            };
            let Some(chain) = chain else {
                break;
            };
            any = true;
            match Request::parse(chain, &memory, limits) {
                Ok(request) if admit(backend, &request) => self.start(request, backend),
                Ok(request) => {
                    backend.metrics.throttled += 1;
                    self.throttled = Some(request);
                    break;
                }
                Err(refusal) => {
                    backend.metrics.failures += 1;
                    self.answer(refusal.head, refusal.status, 0);
                }
            }
        }
        any
    }

    fn start(&mut self, request: Request, backend: &mut Backend) {
        let (next, end) = match &request.operation {
            Operation::Read(range)
            | Operation::Write(range)
            | Operation::Discard(range)
            | Operation::WriteZeroes(range) => (range.start, range.end),
            Operation::Flush | Operation::GetId => (0, 0),
        };
        let Some(index) = self.free.pop() else {
            // `take` starts a request only where there is room.
            unreachable!("no room for a request");
        };
        let operation = request.operation.clone();
        self.requests[index] = Some(InFlight {
            request,
            next,
            end,
            under_way: 0,
            status: VIRTIO_BLK_S_OK,
        });
        match operation {
            Operation::Flush => self.flush.request(index),
            Operation::GetId => {
                self.write_id(index, &backend.id);
                self.finish(index, backend);
            }
            _ => self.ready.push_back(index),
        }
    }

    fn write_id(&mut self, index: usize, id: &[u8]) {
        let Some(in_flight) = &mut self.requests[index] else {
            return;
        };
        let mut id = id;
        for segment in in_flight.request.data.take(id.len() as u64) {
            let (part, rest) = id.split_at(segment.len);
            if self.memory.write_slice(part, segment.address).is_err() {
                in_flight.status = VIRTIO_BLK_S_IOERR;
            }
            id = rest;
        }
    }

    /// Gives the engine as many pieces as it has room for.
    fn issue(&mut self, backend: &mut Backend, zeros_left: &mut u64) {
        while let Some(flushed) = self.flush.begin(&mut backend.disk) {
            self.flushed(flushed, backend);
        }
        while backend.engine.has_room()
            && let Some(piece) = self.flush.next_piece()
        {
            backend.engine.push(Owner::Flush, piece);
        }
        while backend.engine.has_room()
            && *zeros_left > 0
            && let Some(&index) = self.ready.front()
        {
            let Some(in_flight) = &mut self.requests[index] else {
                self.ready.pop_front();
                continue;
            };
            if in_flight.status != VIRTIO_BLK_S_OK {
                in_flight.end = in_flight.next;
            }
            if in_flight.next < in_flight.end {
                match in_flight.step(&self.memory, &backend.disk, zeros_left) {
                    Ok(Some(piece)) => {
                        in_flight.under_way += 1;
                        backend.engine.push(Owner::Request(index), piece);
                    }
                    Ok(None) => {}
                    Err(()) => in_flight.status = VIRTIO_BLK_S_IOERR,
                }
                continue;
            }
            self.ready.pop_front();
            if in_flight.under_way == 0 {
                self.io_done(index, backend);
            }
        }
    }

    /// Takes in what the engine has finished. True if it was anything.
    fn reap(&mut self, backend: &mut Backend) -> bool {
        let mut done = Vec::new();
        backend
            .engine
            .reap(|owner, result| done.push((owner, result)));
        let any = !done.is_empty();
        self.completed(done, backend);
        any
    }

    fn completed(&mut self, done: Vec<(Owner, Result<(), Errno>)>, backend: &mut Backend) {
        for (owner, result) in done {
            match owner {
                Owner::Flush => {
                    if let Some(flushed) = self.flush.piece_done(result, &mut backend.disk) {
                        self.flushed(flushed, backend);
                    }
                }
                Owner::Request(index) => self.piece_done(index, result, backend),
            }
        }
    }

    fn piece_done(&mut self, index: usize, result: Result<(), Errno>, backend: &mut Backend) {
        let Some(in_flight) = &mut self.requests[index] else {
            return;
        };
        in_flight.under_way -= 1;
        match result {
            Ok(()) => {
                // A write and a hole are one piece, so all of the range is there.
                if let Some(range) = in_flight.request.operation.changes() {
                    backend.disk.written(range.clone());
                }
            }
            // The file system cannot punch holes: Linux then writes zeros.
            Err(Errno::OPNOTSUPP) => in_flight.status = VIRTIO_BLK_S_UNSUPP,
            Err(_) => in_flight.status = VIRTIO_BLK_S_IOERR,
        }
        // A request with pieces left to issue is first in `ready`, and ends there.
        if in_flight.under_way == 0
            && in_flight.next == in_flight.end
            && self.ready.front() != Some(&index)
        {
            self.io_done(index, backend);
        }
    }

    /// The request's I/O is over.
    fn io_done(&mut self, index: usize, backend: &mut Backend) {
        let Some(in_flight) = &self.requests[index] else {
            return;
        };
        let changed = in_flight.request.operation.changes().is_some();
        if self.write_through && changed && in_flight.status == VIRTIO_BLK_S_OK {
            self.flush.request(index);
        } else {
            self.finish(index, backend);
        }
    }

    fn flushed(&mut self, flushed: Flushed<usize>, backend: &mut Backend) {
        for index in flushed.who {
            if let Some(in_flight) = &mut self.requests[index]
                && !flushed.well
            {
                in_flight.status = VIRTIO_BLK_S_IOERR;
            }
            self.finish(index, backend);
        }
    }

    /// Answers a request and counts it.
    fn finish(&mut self, index: usize, backend: &mut Backend) {
        let Some(InFlight {
            request, status, ..
        }) = self.requests[index].take()
        else {
            return;
        };
        self.free.push(index);
        let metrics = &mut backend.metrics;
        let mut written = 0;
        if status != VIRTIO_BLK_S_OK {
            metrics.failures += 1;
        } else {
            match &request.operation {
                Operation::Read(range) => {
                    metrics.reads += 1;
                    metrics.read_bytes += range.end - range.start;
                    written = range.end - range.start;
                }
                Operation::Write(range) => {
                    metrics.writes += 1;
                    metrics.write_bytes += range.end - range.start;
                }
                Operation::Discard(_) => metrics.discards += 1,
                Operation::WriteZeroes(_) => metrics.write_zeroes += 1,
                Operation::Flush => metrics.flushes += 1,
                Operation::GetId => written = ID_MAX_BYTES as u64,
            }
        }
        self.answer(
            request.head,
            Some((request.status_at, status as u8)),
            written as u32,
        );
    }

    /// Writes the status and gives the chain back, with the bytes written
    /// before the status.
    fn answer(&mut self, head: u16, status: Option<(GuestAddress, u8)>, written: u32) {
        let mut written = written;
        if let Some((address, code)) = status {
            // Both addresses have been checked, so neither write fails; and if
            // one did, there would be nobody to tell.
            let _ = self.memory.write_obj(code, address);
            written += 1;
        }
        self.used_any |= self.queue.add_used(&*self.memory, head, written).is_ok();
    }

    fn signal(&mut self) {
        if std::mem::take(&mut self.used_any)
            && self.queue.needs_notification(&*self.memory).unwrap_or(true)
        {
            self.interrupt.signal_used_queue();
        }
    }
}

/// Whether the request may go now. If not, the limiter's timer is armed.
fn admit(backend: &mut Backend, request: &Request) -> bool {
    match &mut backend.limiter {
        Some(limiter) => limiter.consume(request.operation.cost_bytes(), 1),
        None => true,
    }
}

// === impl InFlight ===

impl InFlight {
    /// Moves on by one stretch of the disk: zeros are filled in here, the rest
    /// is a piece for the engine.
    fn step(
        &mut self,
        memory: &Arc<GuestMemory>,
        disk: &Disk,
        zeros_left: &mut u64,
    ) -> Result<Option<Piece>, ()> {
        let start = self.next;
        match &self.request.operation {
            Operation::Read(_) => {
                let extent = disk.resolve(start, self.end);
                let (target, offset) = match extent.place {
                    Place::File { target, offset } => (target, offset),
                    Place::Zeros => {
                        let bytes = extent.bytes.min(*zeros_left);
                        *zeros_left -= bytes;
                        self.next += bytes;
                        return self.fill_zeros(memory, bytes).map(|()| None);
                    }
                };
                self.next += extent.bytes;
                let buffers = self.buffers(memory, extent.bytes)?;
                Ok(Some(Piece::Read {
                    target,
                    offset,
                    buffers,
                }))
            }
            Operation::Write(_) => {
                let Mounted { target, layer } = disk.top.as_ref().ok_or(())?;
                self.next = self.end;
                Ok(Some(Piece::Write {
                    target: *target,
                    offset: layer.file_offset(start),
                    buffers: self.buffers(memory, self.end - start)?,
                }))
            }
            Operation::Discard(_) | Operation::WriteZeroes(_) => {
                let Mounted { target, layer } = disk.top.as_ref().ok_or(())?;
                self.next = self.end;
                Ok(Some(Piece::PunchHole {
                    target: *target,
                    offset: layer.file_offset(start),
                    bytes: self.end - start,
                }))
            }
            Operation::Flush | Operation::GetId => Err(()),
        }
    }

    fn buffers(&mut self, memory: &Arc<GuestMemory>, bytes: u64) -> Result<Buffers, ()> {
        Buffers::guest(memory, &self.request.data.take(bytes)).map_err(|_| ())
    }

    fn fill_zeros(&mut self, memory: &GuestMemory, bytes: u64) -> Result<(), ()> {
        for segment in self.request.data.take(bytes) {
            let mut address = segment.address;
            let mut left = segment.len;
            while left > 0 {
                let len = left.min(ZEROS.len());
                memory.write_slice(&ZEROS[..len], address).map_err(|_| ())?;
                left -= len;
                address.0 += len as u64;
            }
        }
        Ok(())
    }
}
