//! What the Python runner reads from matplotlib's figures, with the real matplotlib.
//!
//! It is in no template: it is this machine's (`images/setup test`), of the first
//! `python3` in PATH, or of the distribution's.

use std::process::Command;

use soulbox_proto::guest::v1::chart::Kind;
use soulbox_proto::guest::v1::chart_point::X;
use soulbox_proto::guest::v1::*;

use crate::common::interpreters::*;
use crate::common::*;

/// A context of a Python that has it.
struct Plots {
    code: Interpreters,
    context: String,
    _guest: Guest,
}

impl Plots {
    async fn start() -> Self {
        let own = std::env::var("PATH").unwrap();
        let paths = [own.clone(), format!("/usr/bin:{own}")];
        let has_plots = |path: &String| {
            let found = Command::new("env")
                .args(["python3", "-c", "import matplotlib, pandas"])
                .env("PATH", path)
                .output();
            found.is_ok_and(|found| found.status.success())
        };
        let path = paths.into_iter().find(has_plots);
        let path = path.expect("no python3 has matplotlib and pandas: run `images/setup test`");
        let guest = Guest::start().await;
        let mut code = Interpreters::of(&guest).await;
        let request = CreateContextRequest {
            language: Language::Python.into(),
            env: vec![variable("PATH", path)],
            ..CreateContextRequest::default()
        };
        let context = code.create_with(request).await.unwrap().id;
        let mut plots = Self {
            code,
            context,
            _guest: guest,
        };
        plots
            .run("import matplotlib.pyplot as plt, pandas as pd")
            .await;
        plots
    }

    async fn run(&mut self, code: &str) -> Ran {
        self.code.run(run_in(&self.context, code)).await.ok()
    }

    /// The chart of the one figure that it shows.
    async fn chart(&mut self, code: &str) -> Chart {
        let ran = self.run(code).await;
        assert_eq!(ran.results.len(), 1, "{ran:?}");
        assert!(ran.results[0].data["image/png"].starts_with(b"\x89PNG"));
        ran.results[0].chart.clone().unwrap()
    }
}

fn points(series: &ChartSeries) -> Vec<(String, f64)> {
    let x = |point: &ChartPoint| match point.x.as_ref().unwrap() {
        X::Number(number) => number.to_string(),
        X::Text(text) => text.clone(),
    };
    let points = series.points.iter();
    points.map(|point| (x(point), point.y)).collect()
}

fn named(pairs: &[(&str, f64)]) -> Vec<(String, f64)> {
    let pairs = pairs.iter();
    pairs.map(|(x, y)| ((*x).to_owned(), *y)).collect()
}

#[tokio::test]
async fn charts_are_what_was_drawn() {
    let mut plots = Plots::start().await;
    let chart = plots
        .chart(
            "plt.plot([1, 2.5], [3, 4], label='one'); plt.plot([1], [9]); plt.axhline(3)\n\
             plt.title('T'); plt.xlabel('X'); plt.ylabel('Y'); plt.yscale('log')",
        )
        .await;
    assert_eq!(chart.kind(), Kind::Line);
    let texts = [&chart.title, &chart.x_label, &chart.y_label];
    assert_eq!(texts, ["T", "X", "Y"]);
    assert_eq!([&chart.x_scale, &chart.y_scale], ["linear", "log"]);
    let labels: Vec<_> = chart.series.iter().map(|series| &series.label).collect();
    assert_eq!(labels, ["one", ""]);
    assert_eq!(points(&chart.series[0]), named(&[("1", 3.0), ("2.5", 4.0)]));

    let chart = plots
        .chart("import datetime; plt.plot([datetime.date(2026, 1, 2)], [1]);")
        .await;
    assert_eq!(chart.x_scale, "datetime");
    assert_eq!(
        points(&chart.series[0]),
        named(&[("2026-01-02T00:00:00Z", 1.0)])
    );
    let chart = plots.chart("plt.plot(['a', 'b'], [1, 2]);").await;
    assert_eq!(chart.x_scale, "categorical");
    assert_eq!(points(&chart.series[0]), named(&[("a", 1.0), ("b", 2.0)]));

    let chart = plots.chart("plt.scatter([1, 2], [3, 4]);").await;
    assert_eq!(chart.kind(), Kind::Scatter);
    assert_eq!(points(&chart.series[0]), named(&[("1", 3.0), ("2", 4.0)]));

    for draw in ["plt.bar", "plt.barh"] {
        let chart = plots.chart(&format!("{draw}(['a', 'b'], [3, 4]);")).await;
        assert_eq!(chart.kind(), Kind::Bar);
        assert_eq!(points(&chart.series[0]), named(&[("a", 3.0), ("b", 4.0)]));
    }
    let frame = "frame = pd.DataFrame({'p': [1, 2], 'q': [3, 4]}, index=['i', 'j'])";
    let chart = plots.chart(&format!("{frame}; frame.plot.bar();")).await;
    assert_eq!(chart.series[1].label, "q");
    assert_eq!(points(&chart.series[1]), named(&[("i", 3.0), ("j", 4.0)]));

    let chart = plots.chart("plt.pie([1, 3], labels=['p', 'q']);").await;
    assert_eq!(chart.kind(), Kind::Pie);
    assert_eq!(
        points(&chart.series[0]),
        named(&[("p", 90.0), ("q", 270.0)])
    );

    let chart = plots.chart("plt.boxplot([[1, 2, 3, 4, 50]]);").await;
    assert_eq!(chart.kind(), Kind::Box);
    let summary = BoxSummary {
        min: 1.0,
        first_quartile: 2.0,
        median: 3.0,
        third_quartile: 4.0,
        max: 4.0,
        outliers: vec![50.0],
    };
    assert_eq!(chart.series[0].r#box.as_ref(), Some(&summary));
    let chart = plots.chart("frame.plot.box();").await;
    let labels: Vec<_> = chart.series.iter().map(|series| &series.label).collect();
    assert_eq!(labels, ["p", "q"]);

    let chart = plots
        .chart("_, (a, b) = plt.subplots(1, 2); a.plot([1]); b.bar([1], [2]); plt.suptitle('S');")
        .await;
    assert_eq!((chart.kind(), chart.title.as_str()), (Kind::Super, "S"));
    let kinds: Vec<_> = chart.charts.iter().map(Chart::kind).collect();
    assert_eq!(kinds, [Kind::Line, Kind::Bar]);
    let chart = plots.chart("plt.imshow([[1, 2]]); plt.colorbar();").await;
    assert_eq!(chart.kind(), Kind::Unknown);
}

#[tokio::test]
async fn figures_and_frames_are_shown_once_and_within_limits() {
    let mut plots = Plots::start().await;
    let ran = plots
        .run("print('a')\nplt.plot([1])\nplt.show()\nfigure, _ = plt.subplots()\nfigure")
        .await;
    assert_eq!(ran.order, ["stdout", "result", "result"]);
    assert!(ran.results[1].main && ran.results[1].data.contains_key("image/png"));
    assert!(plots.run("1").await.results[0].chart.is_none());
    // Too much to tell of, and still to be seen.
    let ran = plots.run("plt.plot(range(30_000));").await;
    assert!(ran.results[0].chart.is_none() && ran.results[0].data.contains_key("image/png"));
    let ran = plots
        .run("%config InlineBackend.figure_format = 'svg'\nplt.plot([1]);")
        .await;
    assert!(ran.results[0].data.contains_key("image/svg+xml"));
    let ran = plots.run("pd.DataFrame({'column': [1]})").await;
    let html = std::str::from_utf8(&ran.results[0].data["text/html"]).unwrap();
    assert!(html.contains("<th>column</th>"), "{html}");
    assert!(text(&ran.results[0]).contains("column"));
}
