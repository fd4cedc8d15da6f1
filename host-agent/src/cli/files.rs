//! `soulbox fs`: files of a sandbox.

use std::ffi::OsString;
use std::io::Read as _;
use std::os::unix::ffi::OsStringExt as _;

use clap::Subcommand;
use serde_json::json;
use soulbox_proto::guest::v1::open_write::How;
use soulbox_proto::guest::v1::{
    CommitWrite, FilePath, ListRequest, MakeDirectoryRequest, MoveRequest, OpenWrite, ReadRequest,
    RemoveRequest, SearchRequest, StatRequest, WatchRequest, WriteRequest, read_response,
    search_response, watch_response, write_request,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::args::{Output, size};
use super::connect::Host;
use super::error::CliError;
use super::{output, stdio};

/// Of one message to the guest.
const CHUNK_BYTES: usize = 256 * 1024;
/// What waits to be sent.
const WAITING_CHUNKS: usize = 4;
const PAGE: u32 = 10_000;

#[derive(Debug, Subcommand)]
pub(super) enum FsCommand {
    /// List a directory.
    Ls {
        #[command(flatten)]
        at: At,
        /// A directory [default: the user's home].
        #[arg(default_value = ".", hide_default_value = true)]
        path: OsString,
        /// How many levels below it.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
        depth: u32,
    },
    /// Show what is known of a file.
    Stat {
        #[command(flatten)]
        at: At,
        path: OsString,
        /// Of a symbolic link: what it leads to.
        #[arg(long, short = 'L')]
        follow: bool,
    },
    /// Print a file.
    Cat {
        #[command(flatten)]
        at: At,
        path: OsString,
        /// Begin here, such as 4096 or 1M.
        #[arg(long, value_parser = offset, default_value = "0", hide_default_value = true)]
        offset: u64,
        /// End after so much.
        #[arg(long, value_parser = size)]
        length: Option<u64>,
    },
    /// Write standard input into a file.
    Write(WriteArgs),
    /// Make a directory.
    Mkdir {
        #[command(flatten)]
        at: At,
        path: OsString,
        /// Those above it too; one that is there is no error.
        #[arg(long, short)]
        parents: bool,
        /// Such as 700 [default: 755].
        #[arg(long, short, value_parser = mode)]
        mode: Option<u32>,
    },
    /// Rename a file or a directory.
    Mv {
        #[command(flatten)]
        at: At,
        from: OsString,
        to: OsString,
        /// Fail when the new name is there already.
        #[arg(long, short)]
        no_replace: bool,
    },
    /// Remove a file or a directory.
    Rm {
        #[command(flatten)]
        at: At,
        path: OsString,
        /// With all that is in it.
        #[arg(long, short)]
        recursive: bool,
        /// One that is not there is no error.
        #[arg(long, short)]
        force: bool,
    },
    /// Find files by name and by content.
    ///
    /// What .gitignore leaves out is left out, unless asked for.
    Find(FindArgs),
    /// Print changes of files as they happen, until interrupted.
    Watch {
        #[command(flatten)]
        at: At,
        /// A directory or a file.
        path: OsString,
        /// Also what is below it.
        #[arg(long, short)]
        recursive: bool,
    },
}

/// Where paths are.
#[derive(Debug, clap::Args)]
pub(super) struct At {
    /// The sandbox.
    id: String,
    /// Act as this user, a name or UID[:GID] [default: the template's]. Paths are
    /// relative to its home.
    #[arg(long, default_value = "", hide_default_value = true)]
    user: String,
    /// Let no path lead out of this directory.
    #[arg(long, default_value = "", hide_default_value = true)]
    root: OsString,
}

#[derive(Debug, clap::Args)]
pub(super) struct WriteArgs {
    #[command(flatten)]
    at: At,
    path: OsString,
    /// To its end; else the file is replaced when all of it is there.
    #[arg(long, short)]
    append: bool,
    /// Fail when the file is there already.
    #[arg(long, conflicts_with = "append")]
    create: bool,
    /// Make the directories above it that are missing.
    #[arg(long, short)]
    parents: bool,
    /// Of a new file, such as 600 [default: 644].
    #[arg(long, short, value_parser = mode)]
    mode: Option<u32>,
    /// Return when it is on the guest's disk.
    #[arg(long)]
    sync: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct FindArgs {
    #[command(flatten)]
    at: At,
    /// Where to look [default: the user's home].
    #[arg(default_value = ".", hide_default_value = true)]
    path: OsString,
    /// Names, as in .gitignore, such as '*.rs' or '!target/'; may be repeated.
    #[arg(long = "name", short, value_name = "GLOB")]
    globs: Vec<String>,
    /// A regular expression that a line must match.
    #[arg(long = "grep", short, value_name = "PATTERN")]
    pattern: Option<String>,
    #[arg(long, short)]
    ignore_case: bool,
    /// The pattern is plain text.
    #[arg(long, short = 'F')]
    fixed: bool,
    /// Also what .gitignore and its like leave out.
    #[arg(long)]
    no_ignore: bool,
    /// Also names that begin with a dot.
    #[arg(long)]
    hidden: bool,
    /// Lines before and after each match.
    #[arg(long, short = 'C', default_value_t = 0, value_parser = clap::value_parser!(u32).range(..=100))]
    context: u32,
    /// End after so many.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    max_matches: u32,
}

pub(super) async fn files(host: &Host, format: Output, command: FsCommand) -> Result<u8, CliError> {
    match command {
        FsCommand::Ls { at, path, depth } => ls(host, format, &at, path, depth).await,
        FsCommand::Stat { at, path, follow } => {
            let request = StatRequest {
                path: Some(at.path(path)),
                follow,
            };
            let reply = host.files(&at.id).await?.stat(request).await?;
            let entry = reply.into_inner().entry.unwrap_or_default();
            match format {
                Output::Table => output::entry_details(&entry)?,
                Output::Json => output::json(&output::entry(&entry))?,
            }
            Ok(0)
        }
        FsCommand::Cat {
            at,
            path,
            offset,
            length,
        } => {
            let request = ReadRequest {
                path: Some(at.path(path)),
                offset,
                length: length.unwrap_or_default(),
            };
            let parts = host.files(&at.id).await?.read(request).await?;
            let mut parts = parts.into_inner();
            let mut stdout = tokio::io::stdout();
            while let Some(part) = parts.message().await? {
                if let Some(read_response::Message::Data(data)) = part.message {
                    stdio::write(&mut stdout, &data).await?;
                }
            }
            Ok(0)
        }
        FsCommand::Write(args) => write(host, format, args).await,
        FsCommand::Mkdir {
            at,
            path,
            parents,
            mode,
        } => {
            let request = MakeDirectoryRequest {
                path: Some(at.path(path)),
                parents,
                mode,
            };
            host.files(&at.id).await?.make_directory(request).await?;
            Ok(0)
        }
        FsCommand::Mv {
            at,
            from,
            to,
            no_replace,
        } => {
            let request = MoveRequest {
                from: Some(at.path(from)),
                to: Some(at.path(to)),
                replace: !no_replace,
                exchange: false,
            };
            host.files(&at.id).await?.r#move(request).await?;
            Ok(0)
        }
        FsCommand::Rm {
            at,
            path,
            recursive,
            force,
        } => {
            let request = RemoveRequest {
                path: Some(at.path(path)),
                recursive,
                missing_ok: force,
            };
            host.files(&at.id).await?.remove(request).await?;
            Ok(0)
        }
        FsCommand::Find(args) => find(host, format, args).await,
        FsCommand::Watch {
            at,
            path,
            recursive,
        } => {
            let request = WatchRequest {
                path: Some(at.path(path)),
                recursive,
            };
            watch(host, format, &at.id, request).await
        }
    }
}

async fn ls(
    host: &Host,
    format: Output,
    at: &At,
    path: OsString,
    depth: u32,
) -> Result<u8, CliError> {
    let mut client = host.files(&at.id).await?;
    let mut request = ListRequest {
        path: Some(at.path(path)),
        depth,
        page_size: PAGE,
        ..ListRequest::default()
    };
    let mut entries = Vec::new();
    loop {
        let page = client.list(request.clone()).await?.into_inner();
        entries.extend(page.entries);
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    match format {
        Output::Table => output::entry_table(&entries)?,
        Output::Json => output::json(&entries.iter().map(output::entry).collect())?,
    }
    Ok(0)
}

async fn write(host: &Host, format: Output, args: WriteArgs) -> Result<u8, CliError> {
    let how = match (args.append, args.create) {
        (true, _) => How::Append,
        (false, true) => How::Create,
        (false, false) => How::Replace,
    };
    let open = OpenWrite {
        path: Some(args.at.path(args.path)),
        how: how.into(),
        mode: args.mode,
        make_parents: args.parents,
        sync: args.sync,
        ..OpenWrite::default()
    };
    let mut client = host.files(&args.at.id).await?;
    let (requests, stream) = mpsc::channel(WAITING_CHUNKS);
    // The channel has just been made, so there is room.
    let _ = requests.try_send(request(write_request::Message::Open(open)));
    // What cannot be read must not look like a file that ends there: then nothing
    // is committed.
    let reading = std::thread::spawn(move || send_stdin(&requests));
    let written = client.write(ReceiverStream::new(stream)).await;
    let entry = match written {
        Ok(reply) => reply.into_inner().entry.unwrap_or_default(),
        // It is waited for only where it is at its end.
        Err(status) if reading.is_finished() => {
            reading.join().unwrap_or(Ok(())).map_err(CliError::Input)?;
            return Err(status.into());
        }
        Err(status) => return Err(status.into()),
    };
    if format == Output::Json {
        output::json(&output::entry(&entry))?;
    }
    Ok(0)
}

fn send_stdin(requests: &mpsc::Sender<WriteRequest>) -> std::io::Result<()> {
    let mut stdin = std::io::stdin().lock();
    loop {
        let mut chunk = Vec::with_capacity(CHUNK_BYTES);
        let limit = u64::try_from(CHUNK_BYTES).unwrap_or(u64::MAX);
        let message = match stdin.by_ref().take(limit).read_to_end(&mut chunk)? {
            0 => write_request::Message::Commit(CommitWrite {}),
            _ => write_request::Message::Data(chunk.into()),
        };
        let is_last = matches!(message, write_request::Message::Commit(_));
        // The call may have ended: its status says why.
        if requests.blocking_send(request(message)).is_err() || is_last {
            return Ok(());
        }
    }
}

fn request(message: write_request::Message) -> WriteRequest {
    WriteRequest {
        message: Some(message),
    }
}

async fn find(host: &Host, format: Output, args: FindArgs) -> Result<u8, CliError> {
    let request = SearchRequest {
        path: Some(args.at.path(args.path)),
        globs: args.globs,
        pattern: args.pattern.unwrap_or_default(),
        case_insensitive: args.ignore_case,
        literal: args.fixed,
        no_ignore: args.no_ignore,
        hidden: args.hidden,
        context_lines: args.context,
        max_matches: args.max_matches,
        max_depth: 0,
    };
    let found = host.files(&args.at.id).await?.search(request).await?;
    let mut found = found.into_inner();
    while let Some(response) = found.message().await? {
        match response.message {
            Some(search_response::Message::Match(found)) => output::found(format, &found)?,
            Some(search_response::Message::End(end)) => {
                if end.truncated {
                    eprintln!("soulbox: there are more; raise --max-matches");
                }
                if end.unreadable > 0 {
                    eprintln!("soulbox: {} could not be read", end.unreadable);
                }
                return Ok(0);
            }
            None => {}
        }
    }
    Err(CliError::NoEnd)
}

async fn watch(
    host: &Host,
    format: Output,
    id: &str,
    request: WatchRequest,
) -> Result<u8, CliError> {
    let changes = host.files(id).await?.watch(request).await?;
    let mut changes = changes.into_inner();
    while let Some(response) = changes.message().await? {
        match response.message {
            Some(watch_response::Message::Event(event)) => output::file_event(format, &event)?,
            Some(watch_response::Message::Overflow(_)) => output::line(&match format {
                Output::Table => "overflow".to_owned(),
                Output::Json => json!({"kind": "overflow"}).to_string(),
            })?,
            Some(watch_response::Message::Ready(ready)) if format == Output::Json => {
                let told = json!({"kind": "ready", "directories": ready.directories});
                output::line(&told.to_string())?;
            }
            Some(watch_response::Message::Ready(_)) | None => {}
        }
    }
    Err(CliError::NoEnd)
}

// === impl At ===

impl At {
    fn path(&self, path: OsString) -> FilePath {
        FilePath {
            path: path.into_vec().into(),
            user: self.user.clone(),
            root: self.root.clone().into_vec().into(),
        }
    }
}

fn mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o7777 && !text.starts_with('+') => Ok(mode),
        _ => Err("give octal digits, such as 644".to_owned()),
    }
}

fn offset(text: &str) -> Result<u64, String> {
    match text {
        "0" => Ok(0),
        text => size(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_octal() {
        assert_eq!(mode("755"), Ok(0o755));
        assert_eq!(mode("4755"), Ok(0o4755));
        for bad in ["", "8", "+7", "17777", "rwx"] {
            assert!(mode(bad).is_err(), "{bad}");
        }
        assert_eq!(offset("0"), Ok(0));
    }
}
