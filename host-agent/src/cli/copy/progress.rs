//! A bar on standard error, where somebody looks at it.

use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

const FILE: &str = "{msg} {bytes}/{total_bytes} {wide_bar} {bytes_per_sec} {eta}";
const TREE: &str = "{msg} {bytes} {bytes_per_sec} {spinner} {prefix}";
const FRAME: Duration = Duration::from_millis(100);

#[derive(Debug, Clone)]
pub(super) struct Progress {
    bar: ProgressBar,
    entries: std::sync::Arc<std::sync::atomic::AtomicU64>,
}

// === impl Progress ===

impl Progress {
    /// Without a total it counts only.
    pub(super) fn new(name: &str, total_bytes: Option<u64>, quiet: bool) -> Self {
        if quiet || !std::io::stderr().is_terminal() {
            return Self::silent();
        }
        let target = ProgressDrawTarget::stderr();
        let (bar, template) = match total_bytes {
            Some(total) => (ProgressBar::with_draw_target(Some(total), target), FILE),
            None => (ProgressBar::with_draw_target(None, target), TREE),
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        // A name could move the cursor.
        bar.set_message(name.escape_debug().to_string());
        bar.enable_steady_tick(FRAME);
        Self {
            bar,
            entries: std::sync::Arc::default(),
        }
    }

    pub(super) fn silent() -> Self {
        Self {
            bar: ProgressBar::hidden(),
            entries: std::sync::Arc::default(),
        }
    }

    pub(super) fn bytes(&self, count: usize) {
        self.bar.inc(count as u64);
    }

    /// Where it goes on.
    pub(super) fn at(&self, position: u64) {
        self.bar.set_position(position);
        self.bar.reset_eta();
    }

    pub(super) fn entry(&self) {
        let before = self
            .entries
            .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        if before.is_multiple_of(100) && !self.bar.is_hidden() {
            self.bar.set_prefix(format!("{} entries", before + 1));
        }
    }

    pub(super) fn end(&self) {
        self.bar.finish_and_clear();
    }
}
