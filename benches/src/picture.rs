//! The distributions of a report's times, as a picture: one strip for each, on
//! one logarithmic axis.

use std::path::Path;

use anyhow::{Result, anyhow, ensure};
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::report::{Host, Report, Row};

const WIDTH: u32 = 1280;
const HEAD: u32 = 84;
const FOOT: u32 = 64;
const STRIP: u32 = 30;
/// Room for the names on the left and the figures on the right, in pixels.
const NAMES: u32 = 400;
const FIGURES: u32 = 250;

const INK: RGBColor = RGBColor(34, 34, 34);
const FAINT: RGBColor = RGBColor(150, 150, 150);
const GRID: RGBColor = RGBColor(225, 225, 225);
const DOT: RGBColor = RGBColor(31, 119, 180);
const MEDIAN: RGBColor = RGBColor(200, 40, 40);

type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<LogCoord<f64>, RangedCoordf64>>;

pub(crate) fn draw(report: &Report, path: &Path) -> Result<()> {
    let times: Vec<&Row> = report
        .rows
        .iter()
        .filter(|row| row.unit == "ms" && row.n > 0 && !row.is_part)
        .collect();
    ensure!(!times.is_empty(), "there are no times to draw");
    // The backend writes the file when it is dropped, and panics if it cannot.
    let mut svg = String::new();
    let height = HEAD + FOOT + STRIP * times.len() as u32;
    {
        let root = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        on(&root, report, &times).map_err(|error| anyhow!("drawing the picture: {error}"))?;
    }
    std::fs::write(path, svg).map_err(|error| anyhow!("writing {}: {error}", path.display()))
}

fn on<'b>(
    root: &DrawingArea<SVGBackend<'b>, Shift>,
    report: &Report,
    times: &[&Row],
) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
    root.fill(&WHITE)?;
    let text = |size: i32, colour: &RGBColor| ("sans-serif", size).into_font().color(colour);
    root.draw_text(&title(report.bench), &text(24, &INK), (16, 14))?;
    root.draw_text(&place(&report.host), &text(14, &FAINT), (16, 46))?;

    let (_, below) = root.split_vertically(HEAD);
    let (low, high) = decades(times);
    let strips = times.len() as f64;
    let mut chart = ChartBuilder::on(&below)
        .set_label_area_size(LabelAreaPosition::Bottom, FOOT)
        .margin_left(NAMES)
        .margin_right(FIGURES)
        .build_cartesian_2d((low..high).log_scale(), 0.0..strips)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .bold_line_style(GRID)
        .light_line_style(GRID.mix(0.4))
        .axis_style(FAINT)
        .x_desc("milliseconds, logarithmic; a dot is a measurement, the red line its p50, the grey ones p90 and p99")
        .x_label_formatter(&|value| format!("{value}"))
        .label_style(text(13, &INK))
        .draw()?;

    for (index, row) in times.iter().enumerate() {
        // The first row is at the top.
        let centre = strips - index as f64 - 0.5;
        strip(&mut chart, row, centre)?;
        let y = (HEAD + STRIP * index as u32 + STRIP / 2) as i32;
        let left = text(14, &INK).pos(Pos::new(HPos::Right, VPos::Center));
        root.draw_text(&row.name, &left, (NAMES as i32 - 12, y))?;
        let right = text(13, &INK).pos(Pos::new(HPos::Left, VPos::Center));
        root.draw_text(&figures(row), &right, ((WIDTH - FIGURES) as i32 + 12, y))?;
    }
    root.present()
}

fn strip(
    chart: &mut Chart<'_, '_>,
    row: &Row,
    centre: f64,
) -> Result<(), DrawingAreaErrorKind<std::io::Error>> {
    chart.draw_series(row.samples.iter().enumerate().map(|(index, &sample)| {
        // Spread by the golden ratio, so that equal samples do not hide each other.
        let spread = (index as f64 * 0.618_034).fract() - 0.5;
        Circle::new((sample, centre + spread * 0.55), 2, DOT.mix(0.35).filled())
    }))?;
    let tick = |at: f64, half: f64, style: ShapeStyle| {
        PathElement::new(vec![(at, centre - half), (at, centre + half)], style)
    };
    chart.draw_series([
        tick(row.p90, 0.3, FAINT.stroke_width(2)),
        tick(row.p99, 0.3, FAINT.stroke_width(2)),
        tick(row.p50, 0.42, MEDIAN.stroke_width(3)),
    ])?;
    Ok(())
}

/// Whole decades around all samples.
fn decades(times: &[&Row]) -> (f64, f64) {
    let samples = || times.iter().flat_map(|row| &row.samples).copied();
    // A logarithm has no zero; a microsecond is below all that is measured.
    let low = samples().fold(f64::INFINITY, f64::min).max(1e-3);
    let high = samples().fold(0.0, f64::max).max(low);
    let (low, high) = (low.log10().floor(), high.log10().ceil());
    (10f64.powf(low), 10f64.powf(high.max(low + 1.0)))
}

fn title(bench: &str) -> String {
    format!("SoulBox, {bench}: distributions of times")
}

fn place(host: &Host) -> String {
    let virtualization = if host.hardware_virtualization {
        "vmx or svm"
    } else {
        "no vmx, no svm"
    };
    format!(
        "{}; {} × {} ({virtualization}); Linux {}",
        host.date, host.cpus, host.cpu, host.kernel
    )
}

fn figures(row: &Row) -> String {
    format!(
        "p50 {}, p99 {}, n {}",
        three_digits(row.p50),
        three_digits(row.p99),
        row.n
    )
}

fn three_digits(value: f64) -> String {
    let digits = (2.0 - value.abs().max(1e-3).log10().floor()).clamp(0.0, 3.0) as usize;
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        Report {
            rows: vec![
                Row::new("floor", "ms", vec![0.4, 0.5, 3.0]),
                Row::new("memory <private>", "KiB", vec![700.0]),
                Row::new("slow & rare", "ms", vec![0.0, 420.0]),
            ],
            ..Report::new("cold-start").unwrap()
        }
    }

    #[test]
    fn times_are_drawn_and_memory_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("times.svg");
        draw(&report(), &path).unwrap();
        let svg = std::fs::read_to_string(path).unwrap();
        assert!(svg.starts_with("<svg"), "{svg}");
        assert!(svg.contains("floor") && svg.contains("slow &amp; rare"));
        assert!(!svg.contains("memory"));
        assert_eq!(svg.matches("<circle").count(), 5);
    }

    #[test]
    fn a_report_without_times_is_refused() {
        let mut report = report();
        report.rows.retain(|row| row.unit != "ms");
        assert!(draw(&report, Path::new("unused")).is_err());
    }

    #[test]
    fn figures_have_three_digits() {
        let found: Vec<_> = [0.0, 0.4815, 7.25, 14.13, 421.7, 3000.0]
            .map(three_digits)
            .into();
        assert_eq!(found, ["0.000", "0.481", "7.25", "14.1", "422", "3000"]);
    }
}
