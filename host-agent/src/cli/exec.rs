//! Running a program in a sandbox.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;

use soulbox_proto::guest::v1::process_service_client::ProcessServiceClient;
use soulbox_proto::guest::v1::{
    CgroupLimits, EnvVar, ExecRequest, ProcessInput, ProcessSpec, exec_request, exec_response,
};

use super::args::{ExecArgs, Output, ProcessArgs};
use super::connect::{Guest, Host};
use super::error::CliError;
use super::output;
use super::session::Session;
use super::signals::Signals;
use super::terminal;

pub(super) async fn exec(host: &Host, format: Output, args: ExecArgs) -> Result<u8, CliError> {
    let mut process = process(args.process, args.argv)?;
    let mut signals = Signals::install()?;
    let mut client = host.processes(&args.id).await?;
    if args.detach {
        process.kill_on_disconnect = false;
        return detached(&mut client, format, process).await;
    }
    attached(&mut client, process, &mut signals).await
}

/// What the guest is to start; it goes with its call.
pub(super) fn process(args: ProcessArgs, argv: Vec<OsString>) -> Result<ProcessSpec, CliError> {
    let mut env: Vec<EnvVar> = args
        .env
        .into_iter()
        .map(variable)
        .collect::<Result<_, _>>()?;
    if args.tty
        && !env.iter().any(|variable| &variable.name[..] == b"TERM")
        && let Some(term) = std::env::var_os("TERM")
    {
        env.push(EnvVar {
            name: "TERM".into(),
            value: term.into_vec().into(),
        });
    }
    let limits = args.limits;
    let has_cgroup = limits.cpus.is_some() || limits.memory.is_some() || limits.pids.is_some();
    Ok(ProcessSpec {
        argv: argv.into_iter().map(|arg| arg.into_vec().into()).collect(),
        shell_line: args.shell.unwrap_or_default().into_vec().into(),
        env,
        cwd: args.cwd.into_vec().into(),
        user: args.user,
        timeout: args.timeout.and_then(|timeout| timeout.try_into().ok()),
        stdin: args.interactive,
        terminal: args.tty.then(terminal::size),
        nice: limits.nice,
        cgroup: has_cgroup.then_some(CgroupLimits {
            cpu_millis: limits.cpus,
            memory_bytes: limits.memory,
            pids: limits.pids,
        }),
        kill_on_disconnect: true,
        tag: args.tag,
        ..ProcessSpec::default()
    })
}

pub(super) fn variable(given: OsString) -> Result<EnvVar, CliError> {
    let bytes = given.into_vec();
    match bytes.iter().position(|&byte| byte == b'=') {
        Some(at) if at > 0 => Ok(EnvVar {
            name: bytes[..at].to_vec().into(),
            value: bytes[at + 1..].to_vec().into(),
        }),
        _ => Err(CliError::Env {
            variable: String::from_utf8_lossy(&bytes).into_owned(),
        }),
    }
}

/// Whether this program's terminal can be the process's.
pub(super) fn check_terminal(process: &ProcessSpec) -> Result<(), CliError> {
    if process.stdin && process.terminal.is_some() && !terminal::has_keys() {
        return Err(CliError::NoTerminal);
    }
    Ok(())
}

/// Runs it to its end.
pub(super) async fn attached(
    client: &mut ProcessServiceClient<Guest>,
    process: ProcessSpec,
    signals: &mut Signals,
) -> Result<u8, CliError> {
    check_terminal(&process)?;
    let (is_interactive, has_terminal) = (process.stdin, process.terminal.is_some());
    let (mut session, requests) = Session::new(start(process), input);
    session.is_interactive = is_interactive;
    session.has_terminal = has_terminal;
    session.run(client.exec(requests), signals).await
}

/// Starts it, prints its id, and leaves it running.
async fn detached(
    client: &mut ProcessServiceClient<Guest>,
    format: Output,
    process: ProcessSpec,
) -> Result<u8, CliError> {
    let (_session, requests) = Session::new(start(process), input);
    let mut responses = client.exec(requests).await?.into_inner();
    while let Some(response) = responses.message().await? {
        if let Some(exec_response::Event::Started(started)) = response.event {
            match format {
                Output::Table => output::line(&started.id.to_string())?,
                Output::Json => {
                    output::json(&serde_json::json!({"id": started.id, "pid": started.pid}))?;
                }
            }
            return Ok(0);
        }
    }
    Err(CliError::NoExit)
}

fn start(process: ProcessSpec) -> ExecRequest {
    ExecRequest {
        message: Some(exec_request::Message::Start(process)),
    }
}

fn input(input: ProcessInput) -> ExecRequest {
    ExecRequest {
        message: Some(exec_request::Message::Input(input)),
    }
}
