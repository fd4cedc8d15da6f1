//! Reading a directory: pages of the guest's listing, as far as they are asked for.

use std::sync::Arc;

use bytes::Bytes;
use fuser::Errno;
use soulbox_proto::guest::v1::{ListRequest, ListResponse};

use super::attributes::{Attributes, name};
use super::errno::errno;
use super::tree::{Epoch, Listed, Listing};
use crate::cli::place::{Files, answer};

const PAGE: u32 = 1000;
/// What fits into one answer to the kernel, about.
pub(super) const PART: usize = 256;
/// A guest could go on for ever.
const MAX_ENTRIES: usize = 1_000_000;
const MAX_PAGES: usize = 100_000;

/// One opendir(3).
#[derive(Debug)]
pub(super) struct Reading {
    pub(super) ino: u64,
    progress: tokio::sync::Mutex<Progress>,
}

#[derive(Debug, Default)]
struct Progress {
    entries: Vec<Listed>,
    pages: usize,
    next_page: Bytes,
    asked: Option<Epoch>,
    /// Set once all is read.
    whole: Option<Listing>,
}

/// Some entries of it, from `at`.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) entries: Vec<Listed>,
    /// When the first page was asked for.
    pub(super) asked: Epoch,
    /// All of it, when it has just been read to the end.
    pub(super) whole: Option<Listing>,
}

// === impl Reading ===

impl Reading {
    pub(super) fn of(ino: u64) -> Self {
        Self {
            ino,
            progress: tokio::sync::Mutex::default(),
        }
    }

    /// Some from there; empty at the end. From the beginning it is read
    /// anew, as rewinddir(3) says.
    pub(super) async fn part(
        &self,
        files: &Files,
        path: &Bytes,
        now: Epoch,
        at: usize,
    ) -> Result<Part, Errno> {
        let mut progress = self.progress.lock().await;
        if at == 0 {
            *progress = Progress::default();
        }
        let asked = *progress.asked.get_or_insert(now);
        let mut whole = None;
        while progress.whole.is_none() && progress.entries.len() <= at {
            whole = progress.read_page(files, path).await?;
        }
        let entries = match &progress.whole {
            Some(whole) => whole.as_slice(),
            None => progress.entries.as_slice(),
        };
        let rest = entries.get(at..).unwrap_or_default();
        Ok(Part {
            entries: rest[..rest.len().min(PART)].to_vec(),
            asked,
            whole,
        })
    }
}

// === impl Progress ===

impl Progress {
    async fn read_page(&mut self, files: &Files, path: &Bytes) -> Result<Option<Listing>, Errno> {
        let request = ListRequest {
            path: files.path(path.clone()),
            depth: 1,
            page_size: PAGE,
            page_token: self.next_page.clone(),
        };
        let mut client = files.client.clone();
        let page = answer(client.list(request)).await;
        let ListResponse {
            entries,
            next_page_token,
        } = page.map_err(|status| errno(&status))?;
        self.pages += 1;
        // What cannot be is left out, so that the rest can be reached.
        self.entries.extend(entries.into_iter().filter_map(|entry| {
            let name = name(&entry.path)?;
            let attributes = Attributes::try_from(Some(entry)).ok()?;
            Some(Listed { name, attributes })
        }));
        if self.entries.len() > MAX_ENTRIES || self.pages > MAX_PAGES {
            return Err(Errno::EOVERFLOW);
        }
        self.next_page = next_page_token;
        if !self.next_page.is_empty() {
            return Ok(None);
        }
        let whole: Listing = Arc::new(std::mem::take(&mut self.entries));
        self.whole = Some(Arc::clone(&whole));
        Ok(Some(whole))
    }
}
