//! `soulbox cp`: files and trees into a sandbox and out of it.

mod download;
mod error;
mod pack;
mod part;
mod pipe;
mod progress;
mod unpack;
mod upload;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::time::Instant;

use clap::ValueEnum;
use clap::builder::{OsStringValueParser, TypedValueParser as _};
use serde_json::json;
use soulbox_proto::guest::v1::Compression;

pub(super) use self::error::CopyError;
use super::args::Output;
use super::connect::Host;
use super::error::CliError;
use super::output;
use super::place::{Files, Location, Place};
use super::signals::Signals;

#[derive(Debug, clap::Args)]
pub(super) struct CopyArgs {
    /// A file or directory here, SANDBOX:PATH, or - for standard input.
    #[arg(value_name = "SRC", value_hint = clap::ValueHint::AnyPath,
        value_parser = OsStringValueParser::new().try_map(Location::parse))]
    source: Location,
    /// Where to: a path here, SANDBOX:PATH, or - for standard output.
    #[arg(value_name = "DST", value_hint = clap::ValueHint::AnyPath,
        value_parser = OsStringValueParser::new().try_map(Location::parse))]
    target: Location,
    /// As which of the sandbox's users: a name or UID[:GID] [default: the template's].
    #[arg(long, default_value = "", hide_default_value = true)]
    user: String,
    /// Keep owners too, and the bits that make a program run as its owner. Both ends
    /// must be root.
    #[arg(short, long)]
    archive: bool,
    /// Begin anew where an earlier copy of a large file was broken off.
    #[arg(long)]
    no_resume: bool,
    /// Whether trees travel compressed.
    #[arg(long, value_enum, default_value_t)]
    compress: Compress,
    /// No progress bar.
    #[arg(short, long)]
    quiet: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Compress {
    /// To a daemon of another host.
    #[default]
    Auto,
    Always,
    Never,
}

/// How to copy, and with whom.
struct Plan {
    files: Files,
    archive: bool,
    anew: bool,
    compress: bool,
    quiet: bool,
}

/// What was copied.
#[derive(Debug, Default)]
struct Copied {
    entries: u64,
    bytes: u64,
    /// Of an earlier copy.
    resumed_bytes: u64,
    /// Devices, pipes and sockets.
    left_out: u64,
    changed: u64,
}

pub(super) async fn copy(host: &Host, format: Output, args: CopyArgs) -> Result<u8, CliError> {
    let mut signals = Signals::install()?;
    let began = Instant::now();
    let copying = async {
        match (&args.source, &args.target) {
            (Location::Sandbox(place), Location::Here(target)) => {
                let plan = plan(host, &args, format, place).await?;
                download::download(&plan, place, Some(target.clone())).await
            }
            (Location::Sandbox(place), Location::Stdio) => {
                let plan = plan(host, &args, format, place).await?;
                download::download(&plan, place, None).await
            }
            (Location::Here(source), Location::Sandbox(place)) => {
                let plan = plan(host, &args, format, place).await?;
                upload::upload(&plan, Some(source.clone()), place).await
            }
            (Location::Stdio, Location::Sandbox(place)) => {
                let plan = plan(host, &args, format, place).await?;
                upload::upload(&plan, None, place).await
            }
            _ => Err(CopyError::Sides.into()),
        }
    };
    let copied = tokio::select! {
        copied = copying => copied?,
        // What is worth going on with stays.
        _ = signals.next() => return Err(CliError::Interrupted),
    };
    if copied.left_out > 0 {
        let left_out = copied.left_out;
        eprintln!("soulbox: {left_out} devices, pipes or sockets were left out");
    }
    // Standard output may be the file.
    if format == Output::Json && args.target != Location::Stdio {
        let duration = began.elapsed().as_micros();
        output::json(&json!({
            "entries": copied.entries,
            "bytes": copied.bytes,
            "resumed_bytes": copied.resumed_bytes,
            "left_out": copied.left_out,
            "changed": copied.changed,
            "duration_us": u64::try_from(duration).unwrap_or(u64::MAX),
        }))?;
    }
    Ok(u8::from(copied.changed > 0))
}

async fn plan(
    host: &Host,
    args: &CopyArgs,
    format: Output,
    place: &Place,
) -> Result<Plan, CliError> {
    Ok(Plan {
        files: Files::of(host.files(&place.sandbox).await?, &args.user),
        archive: args.archive,
        anew: args.no_resume,
        compress: match args.compress {
            // On one host, bytes are cheaper than the time to compress them.
            Compress::Auto => matches!(host, Host::Tcp(_)),
            Compress::Always => true,
            Compress::Never => false,
        },
        quiet: args.quiet || format == Output::Json,
    })
}

// === impl Plan ===

impl Plan {
    fn compression(&self) -> Compression {
        match self.compress {
            true => Compression::Zstd,
            false => Compression::Unspecified,
        }
    }
}

/// The name that a path ends with. None: it ends with "." or "..", or is "/": then
/// what is in the directory is meant.
fn last_part(path: &[u8]) -> Option<&OsStr> {
    let end = path.iter().rposition(|&byte| byte != b'/')? + 1;
    let start = path[..end].iter().rposition(|&byte| byte == b'/');
    let part = &path[start.map_or(0, |slash| slash + 1)..end];
    (part != b"." && part != b"..").then(|| OsStr::from_bytes(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_ends_with_a_name_or_means_what_is_inside() {
        for (path, part) in [
            ("a", Some("a")),
            ("/a/b/", Some("b")),
            ("a//", Some("a")),
            ("/", None),
            ("", None),
            (".", None),
            ("a/.", None),
            ("a/..", None),
            ("...", Some("...")),
        ] {
            assert_eq!(last_part(path.as_bytes()), part.map(OsStr::new), "{path}");
        }
    }
}
