//! Distributions, promises, and how they are shown.

use std::fs::File;
use std::io::Write;
use std::path::Path;

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
}

/// Where it was measured. Figures compare only within one run.
#[derive(Debug, Serialize)]
pub(crate) struct Host {
    pub(crate) kernel: String,
    pub(crate) cpu: String,
    pub(crate) hardware_virtualization: bool,
}

/// A measured quantity.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) samples: usize,
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
    /// p50 over the p50 of the floor, where there is one.
    pub(crate) of_floor: Option<f64>,
}

/// A bound that the project promises, and what was found.
#[derive(Debug, Serialize)]
pub(crate) struct Promise {
    pub(crate) promise: String,
    pub(crate) found: f64,
    pub(crate) bound: f64,
    pub(crate) kept: bool,
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
    pub(crate) fn new(name: &'static str, unit: &'static str, mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        Self {
            name,
            unit,
            samples: samples.len(),
            p50: quantile(&samples, 0.50),
            p90: quantile(&samples, 0.90),
            p99: quantile(&samples, 0.99),
            max: quantile(&samples, 1.0),
            of_floor: None,
        }
    }

    pub(crate) fn beside(mut self, floor: &Row) -> Self {
        self.of_floor = Some(self.p50 / floor.p50);
        self
    }
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
            bound,
            kept: found <= bound,
        }
    }
}

// === impl Report ===

impl Report {
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
                "{}  {}: {:.2} (at most {:.2})",
                if promise.kept { "kept  " } else { "BROKEN" },
                promise.promise,
                promise.found,
                promise.bound,
            );
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
                row.name.to_owned(),
                row.unit.to_owned(),
                row.samples.to_string(),
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
    fn a_promise_without_samples_is_broken() {
        let empty = Row::new("", "ms", Vec::new());
        assert!(!Promise::at_most("x", empty.p50, 1.0).kept);
    }
}
