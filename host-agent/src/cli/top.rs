//! `soulbox top`: what goes on in a sandbox.

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use soulbox_proto::guest::v1::{GetMetricsRequest, GetMetricsResponse};

use super::args::{Output, duration};
use super::connect::Host;
use super::error::CliError;
use super::output;

/// Over which CPU use is told when it is asked once.
const SAMPLE: Duration = Duration::from_millis(500);
const HOME: &str = "\x1b[H";
const CLEAR_LINE: &str = "\x1b[K\n";
const CLEAR_REST: &str = "\x1b[J";

#[derive(Debug, clap::Args)]
pub(super) struct TopArgs {
    /// The sandbox.
    id: String,
    /// Show it once and end.
    #[arg(long)]
    once: bool,
    /// Show it again after this long.
    #[arg(long, default_value = "2s", value_parser = duration)]
    interval: Duration,
    /// Processes to show.
    #[arg(long, short = 'n', default_value_t = 20, value_parser = clap::value_parser!(u32).range(..=1000))]
    processes: u32,
}

pub(super) async fn top(host: &Host, format: Output, args: TopArgs) -> Result<u8, CliError> {
    let mut client = host.metrics(&args.id).await?;
    let request = GetMetricsRequest {
        processes: args.processes,
    };
    let mut before: Option<GetMetricsResponse> = None;
    loop {
        let now = client.get_metrics(request).await?.into_inner();
        if format == Output::Json {
            output::line(&output::metrics(&now).to_string())?;
            if args.once {
                return Ok(0);
            }
            tokio::time::sleep(args.interval).await;
            continue;
        }
        match &before {
            Some(before) => {
                show(&output::metrics_page(before, &now), args.once)?;
                if args.once {
                    return Ok(0);
                }
                tokio::time::sleep(args.interval).await;
            }
            // CPU use is what has been used since.
            None => tokio::time::sleep(SAMPLE.min(args.interval)).await,
        }
        before = Some(now);
    }
}

/// Over what is there in a terminal; below it elsewhere.
fn show(page: &str, once: bool) -> Result<(), CliError> {
    let mut stdout = std::io::stdout();
    let text = if !once && stdout.is_terminal() {
        let lines: String = page
            .lines()
            .map(|line| format!("{line}{CLEAR_LINE}"))
            .collect();
        format!("{HOME}{lines}{CLEAR_REST}")
    } else {
        format!("{page}\n")
    };
    let written = stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush());
    written.map_err(CliError::Output)
}
