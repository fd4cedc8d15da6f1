//! The `nft` program: rules are text, as an operator reads them.

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::process::{Command, Stdio};

#[derive(Debug, thiserror::Error)]
pub enum NftError {
    #[error("the program {program:?} is missing; install nftables, or set network.nft")]
    Missing { program: OsString },
    #[error("{program:?} cannot be run; see its permissions and the host's limits on processes")]
    Run {
        program: OsString,
        source: io::Error,
    },
    #[error(
        "nftables refused the rules for want of permission; run soulboxd as root or with CAP_NET_ADMIN ({message})"
    )]
    Permission { message: String },
    #[error(
        "nftables did not take the rules; see that the kernel has nf_tables with inet, netdev, nat, ct, fib, log and reject ({message})"
    )]
    Refused { message: String },
}

/// Hands `text` to the kernel as one transaction, in the calling thread's
/// namespace. Blocks for some milliseconds.
pub(super) fn apply(program: &OsString, text: &str) -> Result<(), NftError> {
    run(program, &["-f", "-"], text).map(drop)
}

/// What `nft --json` says to `arguments`.
pub(super) fn query(program: &OsString, arguments: &[&str]) -> Result<String, NftError> {
    let mut all = vec!["--json"];
    all.extend(arguments);
    run(program, &all, "")
}

fn run(program: &OsString, arguments: &[&str], input: &str) -> Result<String, NftError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => NftError::Missing {
            program: program.clone(),
        },
        _ => NftError::Run {
            program: program.clone(),
            source,
        },
    };
    let mut child = Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    // It reads all before it writes. One that ends without reading says why itself.
    let written = child
        .stdin
        .take()
        .map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output().map_err(failed)?;
    if !output.status.success() {
        return Err(refusal(&String::from_utf8_lossy(&output.stderr)));
    }
    written.map_err(failed)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn refusal(told: &str) -> NftError {
    // The first line has the reason; the others repeat the rule.
    let message = told.lines().next().unwrap_or("it said nothing").to_owned();
    match told.contains("Operation not permitted") || told.contains("Permission denied") {
        true => NftError::Permission { message },
        false => NftError::Refused { message },
    }
}
