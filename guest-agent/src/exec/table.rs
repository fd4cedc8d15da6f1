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
            // So few come whole. No secret, so there is no wait for the first seed.
            getrandom(&mut bytes, GetRandomFlags::INSECURE)?;
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

#[cfg(test)]
mod tests {
    use soulbox_proto::guest::v1::Exited;

    use super::super::job::Options;
    use super::super::log::Stream;
    use super::super::process::{About, Control};
    use super::*;

    fn job(table: &Table) -> Arc<Job> {
        let options = Options {
            has_stdin: false,
            kill_on_disconnect: false,
            tag: String::new(),
            keep_output_bytes: 16 << 20,
        };
        let id = table.fresh_id().unwrap();
        let control = Arc::new(Control::of_nobody());
        let job = Arc::new(Job::new(id, About::default(), control, None, options));
        table.insert(Arc::clone(&job));
        job
    }

    fn end(table: &Table, job: &Arc<Job>) {
        job.ended(Exited::default());
        table.ended(job);
        job.over();
    }

    #[tokio::test(start_paused = true)]
    async fn the_ended_are_known_for_ten_minutes() {
        let table = Table::default();
        let (first, second, running) = (job(&table), job(&table), job(&table));
        end(&table, &second);
        tokio::time::advance(KEEP / 2).await;
        end(&table, &first);
        let known = || -> Vec<u64> { table.list().iter().map(|entry| entry.id).collect() };
        assert_eq!(known(), [first.id, second.id, running.id]);
        assert_eq!(table.running(), 1);
        tokio::time::advance(KEEP / 2 - Duration::from_secs(1)).await;
        assert!(table.find(second.id).is_some());
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(table.find(second.id).is_none());
        assert_eq!(known(), [first.id, running.id]);
        tokio::time::advance(KEEP).await;
        assert_eq!(known(), [running.id]);
    }

    #[tokio::test]
    async fn output_of_the_ended_is_bounded_but_for_the_last() {
        let table = Table::default();
        let jobs: Vec<_> = (0..10).map(|_| job(&table)).collect();
        for job in &jobs {
            for _ in 0..16 {
                job.say(Stream::Stdout, &[0; 65_536]);
            }
            end(&table, job);
            let kept: u64 = jobs.iter().map(|job| job.kept_bytes()).sum();
            let running = jobs.iter().filter(|job| job.entry().exited.is_none());
            let of_running: u64 = running.map(|job| job.kept_bytes()).sum();
            assert!(kept - of_running <= KEEP_OUTPUT_BYTES);
        }
        let large = job(&table);
        for _ in 0..64 {
            large.say(Stream::Stdout, &[0; 65_536]);
        }
        end(&table, &large);
        assert_eq!(large.kept_bytes(), 4 << 20);
        assert!(jobs.iter().all(|job| job.kept_bytes() == 0));
    }

    #[test]
    fn ids_do_not_come_again() {
        let (table, copy) = (Table::default(), Table::default());
        let ids: std::collections::HashSet<u64> = (0..1000)
            .map(|_| table.fresh_id().unwrap())
            .chain((0..1000).map(|_| copy.fresh_id().unwrap()))
            .collect();
        assert_eq!(ids.len(), 2000);
    }
}
