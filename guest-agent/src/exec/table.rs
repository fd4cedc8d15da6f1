//! Every program that is known: those that run, and the last that have ended.
//!
//! No timer runs. What has been kept for long enough goes when the table is next
//! looked at or changed.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::rand::{GetRandomFlags, getrandom};
use soulbox_proto::guest::v1::ProcessEntry;
use tokio::time::Instant;

use super::job::Job;
use crate::sys::process::give_memory_back;

/// How long and how many programs are known after their end.
const KEEP: Duration = Duration::from_secs(10 * 60);
const KEEP_MOST: usize = 64;
/// Of the output of all that have ended; the last one keeps its own in any case.
const KEEP_OUTPUT_BYTES: u64 = 2 << 20;
/// After so much output the allocator is worth being asked what it holds.
const MUCH_OUTPUT_BYTES: u64 = 1 << 20;

#[derive(Default)]
pub(super) struct Table {
    jobs: Mutex<Jobs>,
}

#[derive(Default)]
struct Jobs {
    running: Vec<Numbered>,
    /// In the order of their ends.
    ended: VecDeque<(Instant, Numbered)>,
    next_number: u64,
    /// Since memory was last given back.
    output_bytes: u64,
}

/// In the order of their starts.
struct Numbered {
    number: u64,
    job: Arc<Job>,
}

// === impl Table ===

impl Table {
    /// An id for a program that is to start.
    ///
    /// Random: a counter would go on alike in a copy of this guest, and in the guest
    /// itself. The kernel's generator gets new entropy in both before a program is
    /// started again (the fork contract).
    pub(super) fn fresh_id(&self) -> io::Result<u64> {
        loop {
            let mut bytes = [0; 8];
            // Fewer than 256 bytes come whole, and without a wait once it is seeded.
            getrandom(&mut bytes, GetRandomFlags::empty())?;
            let id = u64::from_ne_bytes(bytes);
            if id != 0 && self.find(id).is_none() {
                return Ok(id);
            }
        }
    }

    pub(super) fn insert(&self, job: Arc<Job>) {
        let mut jobs = self.lock();
        let number = jobs.next_number;
        jobs.next_number += 1;
        jobs.running.push(Numbered { number, job });
        jobs.tidy();
    }

    /// Moves it to those that have ended.
    pub(super) fn ended(&self, job: &Arc<Job>) {
        let mut jobs = self.lock();
        let is_it = |other: &Numbered| Arc::ptr_eq(&other.job, job);
        if let Some(index) = jobs.running.iter().position(is_it) {
            let ended = jobs.running.swap_remove(index);
            jobs.ended.push_back((Instant::now(), ended));
            jobs.output_bytes = jobs.output_bytes.saturating_add(job.output_bytes());
        }
        jobs.tidy();
        if jobs.running.is_empty() && jobs.output_bytes >= MUCH_OUTPUT_BYTES {
            jobs.output_bytes = 0;
            give_memory_back();
        }
    }

    pub(super) fn find(&self, id: u64) -> Option<Arc<Job>> {
        let mut jobs = self.lock();
        jobs.tidy();
        let found = jobs.all().find(|numbered| numbered.job.id == id);
        found.map(|numbered| Arc::clone(&numbered.job))
    }

    /// In the order of their starts.
    pub(super) fn list(&self) -> Vec<ProcessEntry> {
        let mut jobs = self.lock();
        jobs.tidy();
        let mut all: Vec<_> = jobs.all().collect();
        all.sort_unstable_by_key(|numbered| numbered.number);
        all.into_iter()
            .map(|numbered| numbered.job.entry())
            .collect()
    }

    pub(super) fn running(&self) -> u32 {
        u32::try_from(self.lock().running.len()).unwrap_or(u32::MAX)
    }

    fn lock(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Jobs ===

impl Jobs {
    fn all(&self) -> impl Iterator<Item = &Numbered> {
        let ended = self.ended.iter().map(|(_, numbered)| numbered);
        self.running.iter().chain(ended)
    }

    fn tidy(&mut self) {
        let now = Instant::now();
        while let Some((at, _)) = self.ended.front()
            && (self.ended.len() > KEEP_MOST || now.duration_since(*at) >= KEEP)
        {
            self.ended.pop_front();
        }
        let mut kept = 0;
        for (index, (_, Numbered { job, .. })) in self.ended.iter().rev().enumerate() {
            kept += job.kept_bytes();
            if kept > KEEP_OUTPUT_BYTES && index > 0 {
                job.forget_output();
            }
        }
    }
}
