//! Programs that run in a sandbox, whoever started them.

use soulbox_proto::guest::v1::{
    AttachProcess, AttachRequest, ListProcessesRequest, ProcessInput, SignalProcessRequest,
    attach_request,
};

use super::args::Output;
use super::connect::Host;
use super::error::CliError;
use super::output;
use super::session::Session;
use super::signals::Signals;
use super::terminal;

#[derive(Debug, clap::Args)]
pub(super) struct AttachArgs {
    /// The sandbox.
    id: String,
    /// The program's id, as `soulbox ps` shows it.
    process: u64,
    /// Pass standard input to the program; when it has a terminal, this one's keys and
    /// size.
    #[arg(short, long)]
    interactive: bool,
    /// Only what it says from now on.
    #[arg(long)]
    skip_kept: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct KillArgs {
    /// The sandbox.
    id: String,
    /// The program's id, as `soulbox ps` shows it.
    process: u64,
    /// A signal's name or number.
    #[arg(short, long, default_value = "TERM")]
    signal: String,
    /// To all that the program started; KILL always is.
    #[arg(long)]
    tree: bool,
}

pub(super) async fn ps(host: &Host, format: Output, id: &str) -> Result<u8, CliError> {
    let mut client = host.processes(id).await?;
    let reply = client.list_processes(ListProcessesRequest {}).await?;
    let processes = reply.into_inner().processes;
    match format {
        Output::Table => output::process_table(&processes)?,
        Output::Json => output::json(&processes.iter().map(output::process).collect())?,
    }
    Ok(0)
}

pub(super) async fn attach(host: &Host, args: AttachArgs) -> Result<u8, CliError> {
    let mut signals = Signals::install()?;
    let mut client = host.processes(&args.id).await?;
    let has_terminal = args.interactive && {
        let reply = client.list_processes(ListProcessesRequest {}).await?;
        let processes = reply.into_inner().processes;
        processes
            .iter()
            .any(|process| process.id == args.process && process.terminal)
    };
    let attach = AttachProcess {
        id: args.process,
        skip_kept_output: args.skip_kept,
    };
    let first = AttachRequest {
        message: Some(attach_request::Message::Attach(attach)),
    };
    let (mut session, requests) = Session::new(first, input);
    session.is_interactive = args.interactive;
    session.has_terminal = has_terminal && terminal::has_keys();
    session.passes_signals = false;
    session.is_resized = session.has_terminal;
    session.run(client.attach(requests), &mut signals).await
}

fn input(input: ProcessInput) -> AttachRequest {
    AttachRequest {
        message: Some(attach_request::Message::Input(input)),
    }
}

pub(super) async fn kill(host: &Host, args: KillArgs) -> Result<u8, CliError> {
    let request = SignalProcessRequest {
        id: args.process,
        signal: args.signal,
        whole_tree: args.tree,
    };
    let mut client = host.processes(&args.id).await?;
    let reply = client.signal_process(request).await?;
    if !reply.into_inner().sent {
        eprintln!("soulbox: program {} had ended", args.process);
    }
    Ok(0)
}
