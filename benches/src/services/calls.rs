//! Calls that say little: a program that does nothing, and code that adds one to one.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use soulbox_proto::guest::v1::run_code_response::Event;
use soulbox_proto::guest::v1::run_finished::Outcome;
use soulbox_proto::guest::v1::{FilePath, Language, RunCodeRequest, StatRequest};

use super::Guest;
use crate::agent::Agent;
use crate::report::{Promise, Report, Row, ms, progress};

/// Of one quantity at a time: the one before is over by the second of them.
const BLOCK: u32 = 10;
const CODE: &str = "1+1";
const VALUE: &str = "2";
const LANGUAGES: [(Language, &str); 2] = [
    (Language::Python, "Python"),
    (Language::Javascript, "JavaScript"),
];

#[derive(Default)]
struct Samples {
    round_trip: Vec<f64>,
    stat: Vec<f64>,
    spawn: Vec<f64>,
    exec: Vec<f64>,
    code: [Vec<f64>; LANGUAGES.len()],
}

pub(super) async fn measure(guest: &mut Guest, runs: u32, report: &mut Report) -> Result<()> {
    let mut samples = Samples::default();
    // Contexts are made when they are first used.
    samples.block(guest).await?;
    samples = Samples::default();
    let blocks = runs.div_ceil(BLOCK);
    let bar = progress(u64::from(blocks))?;
    for _ in 0..blocks {
        samples.block(guest).await?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    samples.report(report);
    Ok(())
}

// === impl Samples ===

impl Samples {
    async fn block(&mut self, guest: &mut Guest) -> Result<()> {
        if let Some(raw) = &guest.raw {
            for _ in 0..BLOCK {
                self.round_trip.push(ms(raw.round_trip()?));
            }
            self.spawn.extend(raw.spawn(BLOCK)?.into_iter().map(ms));
        }
        for _ in 0..BLOCK {
            self.stat.push(ms(stat_root(&mut guest.agent).await?));
        }
        for _ in 0..BLOCK {
            let ran = guest.agent.run(&["/bin/true"]).await?;
            self.exec.push(ms(ran.to_exit));
        }
        for ((language, name), samples) in LANGUAGES.into_iter().zip(&mut self.code) {
            for _ in 0..BLOCK {
                let took = run_code(&mut guest.agent, language).await;
                samples.push(ms(took.with_context(|| format!("RunCode in {name}"))?));
            }
        }
        Ok(())
    }

    fn report(self, report: &mut Report) {
        let stat = Row::new("floor: Stat of /, a call that does least", "ms", self.stat);
        let mut exec = Row::new("exec of /bin/true, call to exit", "ms", self.exec);
        let mut code = LANGUAGES
            .into_iter()
            .zip(self.code)
            .map(|((_, name), samples)| {
                Row::new(format!("RunCode({CODE:?}), {name}"), "ms", samples)
            });
        if self.round_trip.is_empty() {
            report.rows.extend([stat, exec]);
            report.rows.extend(code);
            return;
        }
        let round_trip = Row::new("floor: a byte there and back", "ms", self.round_trip);
        let spawn = Row::new("floor: /bin/true by the guest itself", "ms", self.spawn);
        let ratio = exec.p50 / (spawn.p50 + round_trip.p50);
        exec.of_floor = Some(ratio);
        report.promises.push(Promise::at_most(
            "exec of /bin/true, p50 × running it in the guest and a round trip",
            ratio,
            2.0,
        ));
        if let Some(python) = code.next() {
            let python = python.beside(&round_trip);
            report.promises.push(Promise::at_most(
                "RunCode(\"1+1\") in Python, p50 × a round trip",
                python.times(&round_trip),
                3.0,
            ));
            let others: Vec<Row> = code.map(|row| row.beside(&round_trip)).collect();
            let stat = stat.beside(&round_trip);
            report.rows.extend([round_trip, stat, spawn, exec, python]);
            report.rows.extend(others);
        }
    }
}

/// Through the same programs as every call.
async fn stat_root(agent: &mut Agent) -> Result<Duration> {
    let request = StatRequest {
        path: Some(FilePath {
            path: Bytes::from_static(b"/"),
            ..Default::default()
        }),
        ..Default::default()
    };
    let start = Instant::now();
    agent.files.stat(request).await.context("Stat of /")?;
    Ok(start.elapsed())
}

/// In the language's default context, until it has finished.
async fn run_code(agent: &mut Agent, language: Language) -> Result<Duration> {
    let request = RunCodeRequest {
        language: language.into(),
        code: CODE.to_owned(),
        ..Default::default()
    };
    let start = Instant::now();
    let mut events = agent.code.run_code(request).await?.into_inner();
    let (mut value, mut finished) = (None, None);
    // To the end of the call, as with a program.
    while let Some(response) = events.message().await? {
        match response.event {
            Some(Event::Result(result)) if result.main => {
                value = result.data.get("text/plain").cloned();
            }
            Some(Event::Error(error)) => bail!("{}: {}", error.name, error.value),
            Some(Event::Finished(run)) => finished = Some((run.outcome(), start.elapsed())),
            _ => {}
        }
    }
    let (outcome, took) = finished.context("the call ended before the code had")?;
    ensure!(outcome == Outcome::Ok, "the code ended as {outcome:?}");
    ensure!(
        value.as_deref() == Some(VALUE.as_bytes()),
        "{CODE} is {value:?}"
    );
    Ok(took)
}
