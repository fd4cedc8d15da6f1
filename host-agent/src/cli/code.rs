//! `soulbox code`: interpreters in a sandbox, and code that runs in them.

use std::ffi::OsString;
use std::io::{Read as _, Write as _};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Subcommand, ValueEnum, ValueHint};
use soulbox_proto::guest::v1::code_service_client::CodeServiceClient;
use soulbox_proto::guest::v1::run_code_response::Event;
use soulbox_proto::guest::v1::run_finished::{Ended, Outcome};
use soulbox_proto::guest::v1::{
    CodeResult, CreateContextRequest, DeleteContextRequest, InterruptContextRequest,
    ListContextsRequest, RestartContextRequest, RunCodeRequest, RunCodeResponse, RunFinished,
};
use tonic::Streaming;

use super::args::{Output, duration};
use super::connect::{Guest, Host};
use super::deletions::Deletions;
use super::error::CliError;
use super::session::TIMED_OUT;
use super::signals::{SIGINT, Signals};
use super::{exec, output};

/// Of code that failed, as interpreters end.
const FAILED: u8 = 1;
/// 128 and SIGINT.
const INTERRUPTED: u8 = 128 + 2;

#[derive(Debug, Subcommand)]
pub(super) enum CodeCommand {
    /// Run code and print what it says and the value of its last expression.
    ///
    /// Ends with 1 when the code failed or its interpreter ended, 124 after --timeout,
    /// 130 when it was interrupted, and 125 when SoulBox itself failed. Ctrl-C
    /// interrupts the code; once more leaves.
    Run(RunArgs),
    /// List contexts.
    Contexts {
        /// The sandbox.
        id: String,
    },
    /// Make a context and print its id.
    New(NewArgs),
    /// End contexts and what runs in them.
    Rm {
        /// The sandbox.
        id: String,
        #[arg(required = true)]
        contexts: Vec<String>,
    },
    /// Put a new interpreter in the place of a context's; its state is lost.
    Restart {
        /// The sandbox.
        id: String,
        context: String,
    },
    /// Interrupt the code that runs in a context.
    Interrupt {
        /// The sandbox.
        id: String,
        context: String,
    },
}

#[derive(Debug, clap::Args)]
pub(super) struct RunArgs {
    /// The sandbox.
    id: String,
    /// Run it in this context.
    #[arg(long, conflicts_with = "language")]
    context: Option<String>,
    /// Run it in the default context of a language [default: python].
    #[arg(long, short, value_enum)]
    language: Option<Language>,
    /// Interrupt the code after this long, such as 500ms, 30s or 5m.
    #[arg(long, value_parser = duration)]
    timeout: Option<Duration>,
    /// Write images, PDF and the like into this folder, each in a file of its own.
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    save_dir: Option<PathBuf>,
    /// The code [default: standard input, as for -].
    code: Option<OsString>,
}

#[derive(Debug, clap::Args)]
pub(super) struct NewArgs {
    /// The sandbox.
    id: String,
    #[arg(long, short, value_enum, default_value_t = Language::Python)]
    language: Language,
    /// Add a variable to its environment; may be repeated.
    #[arg(long = "env", short = 'e', value_name = "NAME=VALUE")]
    env: Vec<OsString>,
    /// Where it runs [default: the user's home].
    #[arg(long, default_value = "", hide_default_value = true)]
    cwd: OsString,
    /// A user's name or UID[:GID] [default: the template's].
    #[arg(long, default_value = "", hide_default_value = true)]
    user: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Language {
    Python,
    Javascript,
    Typescript,
    Bash,
}

pub(super) async fn code(
    host: &Host,
    format: Output,
    command: CodeCommand,
) -> Result<u8, CliError> {
    match command {
        CodeCommand::Run(args) => run(host, format, args).await,
        CodeCommand::Contexts { id } => {
            let mut client = host.code(&id).await?;
            let reply = client.list_contexts(ListContextsRequest {}).await?;
            let contexts = reply.into_inner().contexts;
            match format {
                Output::Table => output::context_table(&contexts)?,
                Output::Json => output::json(&contexts.iter().map(output::context).collect())?,
            }
            Ok(0)
        }
        CodeCommand::New(args) => new(host, format, args).await,
        CodeCommand::Rm { id, contexts } => {
            let mut client = host.code(&id).await?;
            let mut deletions = Deletions::of("contexts");
            for id in contexts {
                let request = DeleteContextRequest { id: id.clone() };
                deletions.tell(&id, client.delete_context(request).await)?;
            }
            deletions.end()
        }
        CodeCommand::Restart { id, context } => {
            let request = RestartContextRequest { id: context };
            host.code(&id).await?.restart_context(request).await?;
            Ok(0)
        }
        CodeCommand::Interrupt { id, context } => {
            let request = InterruptContextRequest { id: context };
            let reply = host.code(&id).await?.interrupt_context(request).await?;
            if !reply.into_inner().interrupted {
                eprintln!("soulbox: nothing was running in it");
            }
            Ok(0)
        }
    }
}

async fn new(host: &Host, format: Output, args: NewArgs) -> Result<u8, CliError> {
    let request = CreateContextRequest {
        language: args.language.number(),
        cwd: args.cwd.into_vec().into(),
        env: args
            .env
            .into_iter()
            .map(exec::variable)
            .collect::<Result<_, _>>()?,
        user: args.user,
    };
    let reply = host.code(&args.id).await?.create_context(request).await?;
    let context = reply.into_inner().context.unwrap_or_default();
    match format {
        Output::Table => output::line(&context.id)?,
        Output::Json => output::json(&output::context(&context))?,
    }
    Ok(0)
}

async fn run(host: &Host, format: Output, args: RunArgs) -> Result<u8, CliError> {
    let language = match (&args.context, args.language) {
        (Some(_), _) => 0,
        (None, language) => language.unwrap_or(Language::Python).number(),
    };
    let request = RunCodeRequest {
        context_id: args.context.unwrap_or_default(),
        language,
        code: text(args.code)?,
        timeout: args.timeout.and_then(|timeout| timeout.try_into().ok()),
        interrupt_on_disconnect: true,
        ..RunCodeRequest::default()
    };
    let mut signals = Signals::install()?;
    let mut client = host.code(&args.id).await?;
    let mut events = client.run_code(request).await?.into_inner();
    let mut shown = Shown {
        format,
        save_dir: args.save_dir,
        saved: 0,
        context: String::new(),
    };
    let mut is_interrupted = false;
    let finished = loop {
        tokio::select! {
            finished = shown.next(&mut events) => if let Some(finished) = finished? {
                break finished;
            },
            signal = signals.next() => {
                // Leaving interrupts the code as well.
                if signal != SIGINT || std::mem::replace(&mut is_interrupted, true) {
                    return Err(CliError::Interrupted);
                }
                interrupt(client.clone(), shown.context.clone());
            }
        }
    };
    Ok(exit_code(format, &finished))
}

/// In a task: what the code says meanwhile is printed.
fn interrupt(mut client: CodeServiceClient<Guest>, id: String) {
    tokio::spawn(async move {
        let request = InterruptContextRequest { id };
        if let Err(status) = client.interrupt_context(request).await {
            CliError::from(status).print();
        }
    });
}

fn text(given: Option<OsString>) -> Result<String, CliError> {
    let bytes = match given {
        Some(code) if code != "-" => code.into_vec(),
        _ => {
            let mut code = Vec::new();
            std::io::stdin()
                .lock()
                .read_to_end(&mut code)
                .map_err(CliError::Input)?;
            code
        }
    };
    String::from_utf8(bytes).map_err(|_| CliError::CodeNotText)
}

/// What is printed of a run.
struct Shown {
    format: Output,
    save_dir: Option<PathBuf>,
    saved: u32,
    context: String,
}

// === impl Shown ===

impl Shown {
    /// Shows one event. Returns the last one. Nothing is half done when this is
    /// dropped while it waits.
    async fn next(
        &mut self,
        events: &mut Streaming<RunCodeResponse>,
    ) -> Result<Option<RunFinished>, CliError> {
        let Some(response) = events.message().await? else {
            return Err(CliError::NoExit);
        };
        let Some(event) = response.event else {
            return Ok(None);
        };
        if let Event::Started(started) = &event {
            started.context_id.clone_into(&mut self.context);
        }
        let saved = match &event {
            Event::Result(result) => self.save(result)?,
            _ => Vec::new(),
        };
        match self.format {
            Output::Table => show(&event)?,
            Output::Json => output::line(&output::code_event(&event, &saved).to_string())?,
        }
        if self.format == Output::Table {
            for path in saved {
                eprintln!("soulbox: saved {}", path.display());
            }
        }
        Ok(match event {
            Event::Finished(finished) => Some(finished),
            _ => None,
        })
    }

    fn save(&mut self, result: &CodeResult) -> Result<Vec<PathBuf>, CliError> {
        let Some(folder) = self.save_dir.as_deref() else {
            return Ok(Vec::new());
        };
        let mut forms: Vec<_> = result
            .data
            .iter()
            .filter_map(|(kind, bytes)| Some((extension(kind)?, bytes)))
            .collect();
        if forms.is_empty() {
            return Ok(Vec::new());
        }
        forms.sort_unstable();
        self.saved += 1;
        let number = self.saved;
        let write = |(extension, bytes): (&str, &bytes::Bytes)| {
            let path = folder.join(format!("result-{number}.{extension}"));
            write_file(folder, &path, bytes)
                .map_err(|source| CliError::Save {
                    path: path.clone(),
                    source,
                })
                .map(|()| path)
        };
        forms.into_iter().map(write).collect()
    }
}

fn write_file(folder: &Path, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    std::fs::write(path, bytes)
}

/// Of what is worth a file.
fn extension(kind: &str) -> Option<&'static str> {
    match kind {
        "image/png" => Some("png"),
        "image/jpeg" => Some("jpg"),
        "image/svg+xml" => Some("svg"),
        "application/pdf" => Some("pdf"),
        "text/html" => Some("html"),
        _ => None,
    }
}

/// What the code says goes where it would; so does the value, as text.
fn show(event: &Event) -> Result<(), CliError> {
    let (mut stdout, mut stderr) = (std::io::stdout(), std::io::stderr());
    let written = match event {
        Event::Stdout(bytes) => stdout.write_all(bytes).and_then(|()| stdout.flush()),
        Event::Stderr(bytes) => stderr.write_all(bytes),
        Event::Result(result) if result.main => match result.data.get("text/plain") {
            Some(text) => stdout
                .write_all(text)
                .and_then(|()| stdout.write_all(b"\n"))
                .and_then(|()| stdout.flush()),
            None => Ok(()),
        },
        Event::Error(error) if error.traceback.is_empty() => {
            writeln!(stderr, "{}: {}", error.name, error.value)
        }
        Event::Error(error) => writeln!(stderr, "{}", error.traceback.join("\n").trim_end()),
        Event::Started(_) | Event::Result(_) | Event::Finished(_) => Ok(()),
    };
    written.map_err(CliError::Output)
}

fn exit_code(format: Output, finished: &RunFinished) -> u8 {
    let (code, told) = match finished.outcome() {
        Outcome::Ok => (0, None),
        Outcome::Unspecified | Outcome::Failed => (FAILED, None),
        Outcome::Interrupted => (INTERRUPTED, None),
        Outcome::TimedOut => (
            TIMED_OUT,
            Some("the code was interrupted because its --timeout was over".to_owned()),
        ),
        Outcome::InterpreterEnded => {
            let how = match finished.ended {
                Some(Ended::ExitCode(code)) => format!("with exit code {code}"),
                Some(Ended::Signal(signal)) => format!("by signal {signal}"),
                None => "by itself".to_owned(),
            };
            let told = format!("the interpreter ended {how}; its state is lost");
            (FAILED, Some(told))
        }
    };
    // Programs read both in the last event.
    if format == Output::Table {
        if let Some(told) = told {
            eprintln!("soulbox: {told}");
        }
        if finished.dropped_output_bytes > 0 {
            eprintln!(
                "soulbox: {} bytes of output were dropped: it was more than is kept",
                finished.dropped_output_bytes
            );
        }
    }
    code
}

// === impl Language ===

impl Language {
    fn number(self) -> i32 {
        use soulbox_proto::guest::v1::Language as Proto;
        let language = match self {
            Self::Python => Proto::Python,
            Self::Javascript => Proto::Javascript,
            Self::Typescript => Proto::Typescript,
            Self::Bash => Proto::Bash,
        };
        language.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_tell_how_the_code_ended() {
        let code = |outcome: Outcome| {
            let finished = RunFinished {
                outcome: outcome.into(),
                ..RunFinished::default()
            };
            exit_code(Output::Json, &finished)
        };
        assert_eq!(code(Outcome::Ok), 0);
        assert_eq!(code(Outcome::Failed), 1);
        assert_eq!(code(Outcome::InterpreterEnded), 1);
        assert_eq!(code(Outcome::TimedOut), 124);
        assert_eq!(code(Outcome::Interrupted), 130);
    }

    #[test]
    fn each_form_worth_a_file_is_saved() {
        let folder = tempfile::tempdir().unwrap();
        let mut shown = Shown {
            format: Output::Table,
            save_dir: Some(folder.path().join("new")),
            saved: 0,
            context: String::new(),
        };
        let result = |kinds: &[&str]| CodeResult {
            data: kinds
                .iter()
                .map(|kind| ((*kind).to_owned(), bytes::Bytes::from_static(b"\x89PNG")))
                .collect(),
            ..CodeResult::default()
        };
        assert!(shown.save(&result(&["text/plain"])).unwrap().is_empty());
        let saved = shown
            .save(&result(&["image/svg+xml", "image/png", "../x"]))
            .unwrap();
        let names: Vec<_> = saved.iter().filter_map(|path| path.file_name()).collect();
        assert_eq!(names, ["result-1.png", "result-1.svg"]);
        assert_eq!(std::fs::read(&saved[0]).unwrap(), b"\x89PNG");
        assert_eq!(shown.save(&result(&["image/png"])).unwrap().len(), 1);
        assert!(folder.path().join("new/result-2.png").exists());
    }
}
