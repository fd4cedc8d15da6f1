//! Distributions, promises, and how they are shown.

use std::fmt;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, Table};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// What one bench found.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) bench: &'static str,
    pub(crate) host: Host,
    pub(crate) rows: Vec<Row>,
    pub(crate) promises: Vec<Promise>,
    /// What could not be measured, and what it lacks.
    pub(crate) left_out: Vec<String>,
}

/// Where and when it was measured. Figures compare only within one run.
#[derive(Debug, Serialize)]
pub(crate) struct Host {
    /// UTC.
    pub(crate) date: String,
    pub(crate) kernel: String,
    pub(crate) cpu: String,
    pub(crate) cpus: usize,
    pub(crate) hardware_virtualization: bool,
}

/// A measured quantity.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) unit: &'static str,
    pub(crate) n: usize,
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
    /// p50 over the p50 of the floor, where there is one.
    pub(crate) of_floor: Option<f64>,
    /// A part of the row above it, which the picture leaves out.
    #[serde(skip)]
    pub(crate) is_part: bool,
    /// In ascending order, for the picture.
    #[serde(skip)]
    pub(crate) samples: Vec<f64>,
}

/// A bound that the project promises, and what was found.
#[derive(Debug, Serialize)]
pub(crate) struct Promise {
    pub(crate) promise: String,
    pub(crate) found: f64,
    pub(crate) bound: Bound,
    pub(crate) kept: bool,
}

#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

// === impl Host ===

impl Host {
    pub(crate) fn here() -> Result<Self> {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").context("reading /proc/cpuinfo")?;
        let field = |name: &str| {
            cpuinfo
                .lines()
                .find(|line| line.starts_with(name))
                .and_then(|line| line.split_once(": "))
                .map(|(_, value)| value.to_owned())
                .unwrap_or_default()
        };
        let release = rustix::system::uname();
        Ok(Self {
            date: utc_date(SystemTime::now().duration_since(UNIX_EPOCH)?),
            cpus: std::thread::available_parallelism()?.get(),
            kernel: release.release().to_string_lossy().into_owned(),
            cpu: field("model name"),
            hardware_virtualization: field("flags")
                .split(' ')
                .any(|flag| flag == "vmx" || flag == "svm"),
        })
    }
}

// === impl Row ===

impl Row {
    pub(crate) fn new(name: impl Into<String>, unit: &'static str, mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        Self {
            name: name.into(),
            unit,
            n: samples.len(),
            p50: quantile(&samples, 0.50),
            p90: quantile(&samples, 0.90),
            p99: quantile(&samples, 0.99),
            max: quantile(&samples, 1.0),
            of_floor: None,
            is_part: false,
            samples,
        }
    }

    pub(crate) fn beside(mut self, floor: &Row) -> Self {
        self.of_floor = Some(self.times(floor));
        self
    }

    /// How many times the other's p50 this one's is.
    pub(crate) fn times(&self, other: &Row) -> f64 {
        self.p50 / other.p50
    }
}

pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// The day as YYYY-MM-DD: days since the epoch to the civil calendar, by eras of
/// 400 years that begin in March (Howard Hinnant, "chrono-compatible low-level
/// date algorithms").
fn utc_date(since_epoch: Duration) -> String {
    let days = since_epoch.as_secs() / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

/// A bar that counts rounds, on standard error.
pub(crate) fn progress(rounds: u64) -> Result<ProgressBar> {
    let style = ProgressStyle::with_template("{elapsed:>4} {bar:40} {pos}/{len} rounds")?;
    Ok(ProgressBar::new(rounds).with_style(style))
}

/// The smallest sample that at least `q` of the sorted samples do not exceed.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let rank = (q * sorted.len() as f64).ceil() as usize;
    sorted
        .get(rank.saturating_sub(1))
        .copied()
        .unwrap_or(f64::NAN)
}

// === impl Promise ===

impl Promise {
    pub(crate) fn at_most(promise: impl Into<String>, found: f64, bound: f64) -> Self {
        Self {
            promise: promise.into(),
            found,
            bound: Bound::AtMost(bound),
            kept: found <= bound,
        }
    }

    pub(crate) fn at_least(promise: impl Into<String>, found: f64, bound: f64) -> Self {
        Self {
            promise: promise.into(),
            found,
            bound: Bound::AtLeast(bound),
            kept: found >= bound,
        }
    }
}

// === impl Bound ===

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMost(bound) => write!(f, "at most {bound:.2}"),
            Self::AtLeast(bound) => write!(f, "at least {bound:.2}"),
        }
    }
}

// === impl Report ===

impl Report {
    pub(crate) fn new(bench: &'static str) -> Result<Self> {
        Ok(Self {
            bench,
            host: Host::here()?,
            rows: Vec::new(),
            promises: Vec::new(),
            left_out: Vec::new(),
        })
    }

    pub(crate) fn promises_kept(&self) -> bool {
        self.promises.iter().all(|promise| promise.kept)
    }

    /// Shows the table, and writes JSON where it was asked for.
    pub(crate) fn write(&self, json: Option<&Path>) -> Result<()> {
        let encoded = serde_json::to_string_pretty(self)? + "\n";
        match json {
            Some(path) if path == Path::new("-") => {
                std::io::stdout().write_all(encoded.as_bytes())?;
                return Ok(());
            }
            Some(path) => File::create(path)
                .and_then(|mut file| file.write_all(encoded.as_bytes()))
                .with_context(|| format!("writing {}", path.display()))?,
            None => {}
        }
        println!("{}", self.table());
        for promise in &self.promises {
            println!(
                "{}  {}: {:.2} ({})",
                if promise.kept { "kept  " } else { "BROKEN" },
                promise.promise,
                promise.found,
                promise.bound,
            );
        }
        for what in &self.left_out {
            println!("left out: {what}");
        }
        Ok(())
    }

    fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(comfy_table::presets::UTF8_BORDERS_ONLY);
        table.set_header(["", "unit", "n", "p50", "p90", "p99", "max", "× floor"]);
        for column in table.column_iter_mut().skip(2) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let figure = |value: f64| format!("{value:.3}");
        for row in &self.rows {
            table.add_row([
                row.name.clone(),
                row.unit.to_owned(),
                row.n.to_string(),
                figure(row.p50),
                figure(row.p90),
                figure(row.p99),
                figure(row.max),
                row.of_floor.map_or_else(String::new, |x| format!("{x:.2}")),
            ]);
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_samples() {
        let row = Row::new("", "ms", (1..=100).rev().map(f64::from).collect());
        assert_eq!(
            (row.p50, row.p90, row.p99, row.max),
            (50.0, 90.0, 99.0, 100.0)
        );
        let one = Row::new("", "ms", vec![7.0]);
        assert_eq!((one.p50, one.p99), (7.0, 7.0));
    }

    #[test]
    fn days_have_their_dates() {
        let date = |day: u64| utc_date(Duration::from_secs(day * 86_400));
        assert_eq!(date(0), "1970-01-01");
        assert_eq!(date(11_016), "2000-02-29");
        assert_eq!(date(19_722), "2023-12-31");
        assert_eq!(date(20_513), "2026-03-01");
    }

    #[test]
    fn a_promise_without_samples_is_broken() {
        let empty = Row::new("", "ms", Vec::new());
        assert!(!Promise::at_most("x", empty.p50, 1.0).kept);
        assert!(!Promise::at_least("x", empty.p50, 1.0).kept);
    }
}
