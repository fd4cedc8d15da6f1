//! No packet allocates memory.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use super::*;

/// Counts each thread's allocations, in the crate's unit tests.
struct Counting;

thread_local! {
    // Made without an initializer or a destructor, so that to touch it allocates
    // nothing.
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: all is the system allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Allocations of this thread while `f` runs.
fn allocations(f: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.get();
    f();
    ALLOCATIONS.get() - before
}

#[test]
fn packets_allocate_nothing() {
    assert_eq!(allocations(|| drop(Box::new(1))), 1, "they are counted");
    let mut guest = Guest::new(MERGED);
    let mut received = 0;
    for round in 0..40 {
        guest.rx_next = RX_BUFFERS;
        guest.tx_next = TX_BUFFERS;
        // Also packets that wait for buffers, and chains that are refused.
        for seed in 0..60 {
            guest.peer.send(&frame(1000, seed)).unwrap();
            guest.offer_packet(&[0; 12], &frame(1000, seed));
        }
        let bad = guest.put(&[0; 3]);
        guest.tx.add(&[bad]);
        for _ in 0..40 {
            guest.rx.add(&[writable(guest.rx_next, 600)]);
            guest.rx_next += 600;
        }
        let allocated = allocations(|| {
            for _ in 0..20 {
                guest.net.queue_notified(RX);
                guest.net.queue_notified(TX);
                guest.net.source_ready(0);
            }
        });
        assert_eq!(allocated, 0, "in round {round}");
        assert_eq!(guest.received().len(), 60);
        guest.tx.take_used();
        received += guest.rx.take_used().len();
    }
    assert_eq!(received, 1600);
}
