//! Contexts, and what code says and shows.

use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Map, Value, json};
use soulbox_proto::guest::v1::chart::Kind;
use soulbox_proto::guest::v1::chart_point::X;
use soulbox_proto::guest::v1::run_code_response::Event;
use soulbox_proto::guest::v1::run_finished::{Ended, Outcome};
use soulbox_proto::guest::v1::{Chart, ChartSeries, CodeContext, CodeResult, Language};

use super::{age, line, rfc3339, table, trim};
use crate::cli::error::CliError;
use crate::text::printable;

const MAX_CHARS: usize = 120;

pub(in crate::cli) fn context(context: &CodeContext) -> Value {
    json!({
        "id": context.id,
        "language": language(context.language()),
        "cwd": String::from_utf8_lossy(&context.cwd),
        "user": context.user,
        "pid": context.pid,
        "busy": context.busy,
        "execution_count": context.execution_count,
        "create_time": context.create_time.map(rfc3339),
        "restarts": context.restarts,
    })
}

pub(in crate::cli) fn context_table(contexts: &[CodeContext]) -> Result<(), CliError> {
    let mut table = table(&[
        "ID", "LANGUAGE", "STATE", "RUNS", "RESTARTS", "PID", "USER", "AGE", "CWD",
    ]);
    for context in contexts {
        table.add_row([
            printable(&context.id, MAX_CHARS),
            language(context.language()).to_owned(),
            if context.busy { "busy" } else { "idle" }.to_owned(),
            context.execution_count.to_string(),
            context.restarts.to_string(),
            context.pid.to_string(),
            printable(&context.user, MAX_CHARS),
            context.create_time.map(age).unwrap_or_default(),
            printable(&String::from_utf8_lossy(&context.cwd), MAX_CHARS),
        ]);
    }
    line(&trim(&table))
}

fn language(language: Language) -> &'static str {
    match language {
        Language::Python => "python",
        Language::Javascript => "javascript",
        Language::Typescript => "typescript",
        Language::Bash => "bash",
        Language::Unspecified => "unknown",
    }
}

/// One event of a run, and the files that were made of it.
pub(in crate::cli) fn code_event(event: &Event, saved: &[PathBuf]) -> Value {
    match event {
        Event::Started(started) => json!({
            "event": "started",
            "context_id": started.context_id,
            "execution_count": started.execution_count,
        }),
        Event::Stdout(bytes) => {
            json!({"event": "stdout", "text": String::from_utf8_lossy(bytes)})
        }
        Event::Stderr(bytes) => {
            json!({"event": "stderr", "text": String::from_utf8_lossy(bytes)})
        }
        Event::Result(result) => json!({
            "event": "result",
            "main": result.main,
            "data": data(result),
            "chart": result.chart.as_ref().map(chart),
            "omitted": result.omitted,
            "saved": saved,
        }),
        Event::Error(error) => json!({
            "event": "error",
            "name": error.name,
            "value": error.value,
            "traceback": error.traceback,
        }),
        Event::Finished(finished) => {
            let outcome = match finished.outcome() {
                Outcome::Ok => "ok",
                Outcome::Failed => "failed",
                Outcome::Interrupted => "interrupted",
                Outcome::TimedOut => "timed out",
                Outcome::InterpreterEnded => "interpreter ended",
                Outcome::Unspecified => "unknown",
            };
            let (exit_code, signal) = match finished.ended {
                Some(Ended::ExitCode(code)) => (Some(code), None),
                Some(Ended::Signal(signal)) => (None, Some(signal)),
                None => (None, None),
            };
            json!({
                "event": "finished",
                "outcome": outcome,
                "execution_count": finished.execution_count,
                "wall_us": finished.wall_us,
                "dropped_output_bytes": finished.dropped_output_bytes,
                "exit_code": exit_code,
                "signal": signal,
            })
        }
    }
}

/// By MIME type: text as it is, JSON as a value, other bytes in base64.
fn data(result: &CodeResult) -> Value {
    let form = |(kind, bytes): (&String, &bytes::Bytes)| {
        let text = || String::from_utf8_lossy(bytes).into_owned().into();
        let value = match kind.as_str() {
            "application/json" => serde_json::from_slice(bytes).unwrap_or_else(|_| text()),
            "image/svg+xml" | "application/javascript" => text(),
            kind if kind.starts_with("text/") => text(),
            _ => BASE64.encode(bytes).into(),
        };
        (kind.clone(), value)
    };
    Value::Object(result.data.iter().map(form).collect::<Map<_, _>>())
}

fn chart(chart: &Chart) -> Value {
    let kind = match chart.kind() {
        Kind::Line => "line",
        Kind::Scatter => "scatter",
        Kind::Bar => "bar",
        Kind::Pie => "pie",
        Kind::Box => "box",
        Kind::Super => "super",
        Kind::Unknown | Kind::Unspecified => "unknown",
    };
    json!({
        "kind": kind,
        "title": chart.title,
        "x_label": chart.x_label,
        "y_label": chart.y_label,
        "x_scale": chart.x_scale,
        "y_scale": chart.y_scale,
        "series": chart.series.iter().map(series).collect::<Vec<_>>(),
        "charts": chart.charts.iter().map(self::chart).collect::<Vec<_>>(),
    })
}

fn series(series: &ChartSeries) -> Value {
    let points = series.points.iter().map(|point| {
        let x = match &point.x {
            Some(X::Number(number)) => json!(number),
            Some(X::Text(text)) => json!(text),
            None => Value::Null,
        };
        json!({"x": x, "y": point.y})
    });
    json!({
        "label": series.label,
        "points": points.collect::<Vec<_>>(),
        "box": series.r#box.as_ref().map(|summary| json!({
            "min": summary.min,
            "first_quartile": summary.first_quartile,
            "median": summary.median,
            "third_quartile": summary.third_quartile,
            "max": summary.max,
            "outliers": summary.outliers,
        })),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_is_told_as_programs_can_read_it() {
        let forms: [(&str, &[u8]); 4] = [
            ("text/plain", b"42"),
            ("image/png", b"\x89PNG"),
            ("application/json", b"{\"a\": 1}"),
            ("image/svg+xml", b"<svg/>"),
        ];
        let result = CodeResult {
            main: true,
            data: forms
                .into_iter()
                .map(|(kind, bytes)| (kind.to_owned(), bytes.to_vec().into()))
                .collect(),
            ..CodeResult::default()
        };
        let told = code_event(&Event::Result(result), &["a/result-1.png".into()]);
        assert_eq!(
            told["data"],
            json!({
                "text/plain": "42",
                "image/png": "iVBORw==",
                "application/json": {"a": 1},
                "image/svg+xml": "<svg/>",
            })
        );
        assert_eq!(told["saved"], json!(["a/result-1.png"]));
    }
}
