//! `soulbox`: the command line.

mod args;
mod code;
mod commands;
mod connect;
mod copy;
mod deletions;
mod error;
mod exec;
mod files;
mod mount;
mod network;
mod output;
mod place;
mod policy;
mod ports;
mod processes;
mod run;
mod session;
mod signals;
mod snapshots;
mod stdio;
mod terminal;
mod top;
mod tunnel;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};

use self::args::{Args, Command, NetCommand, Output, SnapshotCommand, TemplateCommand};
use self::error::CliError;

/// What `run` and `exec` end with when the fault is SoulBox's and not the
/// program's, as `docker run` and `timeout` do.
const OWN_FAILURE: u8 = 125;

/// All of the command line but its exit code.
pub fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => return usage(&error),
    };
    if let Command::Completions { shell } = args.command {
        clap_complete::generate(
            shell,
            &mut Args::command(),
            "soulbox",
            &mut std::io::stdout(),
        );
        return ExitCode::SUCCESS;
    }
    let runs_a_program = args.command.runs_a_program();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let outcome = match runtime {
        Ok(runtime) => {
            let outcome = runtime.block_on(dispatch(args));
            // A read of standard input may never end; it is not waited for.
            runtime.shutdown_background();
            outcome
        }
        Err(source) => Err(CliError::Runtime { source }),
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            error.print();
            ExitCode::from(error.exit_code().unwrap_or(if runs_a_program {
                OWN_FAILURE
            } else {
                1
            }))
        }
    }
}

async fn dispatch(args: Args) -> Result<u8, CliError> {
    let host = connect::Host::parse(&args.host)?;
    let output = if args.json { Output::Json } else { args.output };
    match args.command {
        Command::Run(run) => run::run(&host, output, run).await,
        Command::Exec(exec) => exec::exec(&host, output, exec).await,
        Command::Ps { id } => processes::ps(&host, output, &id).await,
        Command::Attach(attach) => processes::attach(&host, attach).await,
        Command::Kill(kill) => processes::kill(&host, kill).await,
        Command::Code { command } => code::code(&host, output, command).await,
        Command::Fs { command } => files::files(&host, output, command).await,
        Command::Top(top) => top::top(&host, output, top).await,
        Command::Create(create) => commands::create(&host, output, create).await,
        Command::Ls { labels } => commands::ls(&host, output, labels).await,
        Command::Get { id } => commands::get(&host, output, id).await,
        Command::Rm(rm) => commands::rm(&host, rm).await,
        Command::Pause { id, cold, timings } => {
            snapshots::pause(&host, output, id, cold, timings).await
        }
        Command::Resume { id, timings } => snapshots::resume(&host, output, id, timings).await,
        Command::Snapshot { command } => match command {
            SnapshotCommand::Create(args) => snapshots::make(&host, output, args).await,
            SnapshotCommand::Ls { sandbox, labels } => {
                snapshots::ls(&host, output, sandbox, labels).await
            }
            SnapshotCommand::Rm { ids } => snapshots::rm(&host, ids).await,
        },
        Command::Rollback {
            id,
            snapshot,
            timings,
        } => snapshots::roll_back(&host, output, id, snapshot, timings).await,
        Command::Fork(fork) => snapshots::fork(&host, output, fork).await,
        Command::Net { command } => match command {
            NetCommand::Show { id } => network::show(&host, output, id).await,
            NetCommand::Set(args) => network::set(&host, output, args).await,
        },
        Command::Port(args) => ports::port(&host, output, args).await,
        Command::Connect { id, port } => tunnel::connect(&host, id, port).await,
        Command::Cp(args) => copy::copy(&host, output, args).await,
        Command::Mount(args) => mount::mount(&host, args).await,
        Command::Watch { labels } => commands::watch(&host, output, labels).await,
        Command::Node => commands::node(&host, output).await,
        Command::Template {
            command: TemplateCommand::Ls,
        } => commands::template_ls(&host, output).await,
        // Answered before there is a host to talk to.
        Command::Completions { .. } => Ok(0),
    }
}

/// Says what is wrong with the arguments; `--help` comes here too.
fn usage(error: &clap::Error) -> ExitCode {
    // A closed terminal is no reason to fail differently.
    let _ = error.print();
    let program_was_to_run = std::env::args_os()
        .take_while(|arg| arg != "--")
        .any(|arg| arg == "run" || arg == "exec" || arg == "attach");
    match error.exit_code() {
        0 => ExitCode::SUCCESS,
        _ if program_was_to_run => ExitCode::from(OWN_FAILURE),
        _ => ExitCode::from(2),
    }
}
