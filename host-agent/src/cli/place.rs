//! Where files are: `SANDBOX:PATH` in a sandbox, or a path here.

use std::ffi::OsString;
use std::fmt;
use std::future::Future;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;
use std::time::Duration;

use soulbox_proto::guest::v1::FilePath;
use soulbox_proto::guest::v1::filesystem_service_client::FilesystemServiceClient;
use tonic::{Response, Status};

use super::connect::Guest;

/// A page of a listing, with links of 4 KiB each.
const MAX_REPLY_BYTES: usize = 64 << 20;
/// A call that has been answered by nobody for so long will not be.
const ANSWER: Duration = Duration::from_secs(60);

/// Files of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) sandbox: String,
    /// Never empty; not beginning with "/": relative to the user's home.
    pub(super) path: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Location {
    Sandbox(Place),
    Here(PathBuf),
    /// "-": standard input or output.
    Stdio,
}

/// The file service of one sandbox, as one of its users.
#[derive(Debug, Clone)]
pub(super) struct Files {
    pub(super) client: FilesystemServiceClient<Guest>,
    user: String,
}

// === impl Place ===

impl Place {
    /// `SANDBOX[:PATH]`; without a path, the user's home.
    pub(super) fn parse(text: OsString) -> Result<Self, String> {
        let bytes = text.into_vec();
        let (sandbox, path) = match bytes.iter().position(|&byte| byte == b':') {
            Some(at) => (&bytes[..at], &bytes[at + 1..]),
            None => (&bytes[..], &b""[..]),
        };
        let sandbox = std::str::from_utf8(sandbox).unwrap_or_default();
        if sandbox.is_empty() || !sandbox.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err("give SANDBOX or SANDBOX:PATH".to_owned());
        }
        Ok(Self {
            sandbox: sandbox.to_owned(),
            path: if path.is_empty() { b"." } else { path }.to_vec(),
        })
    }
}

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = String::from_utf8_lossy(&self.path);
        write!(formatter, "{}:{}", self.sandbox, path.escape_debug())
    }
}

// === impl Location ===

impl Location {
    /// As scp tells them apart: a colon before any slash makes it a sandbox's.
    pub(super) fn parse(text: OsString) -> Result<Self, String> {
        let bytes = text.as_bytes();
        if bytes.is_empty() {
            return Err("give a path, or SANDBOX:PATH".to_owned());
        }
        if bytes == b"-" {
            return Ok(Self::Stdio);
        }
        match bytes.iter().find(|&&byte| byte == b':' || byte == b'/') {
            Some(b':') => Place::parse(text).map(Self::Sandbox),
            _ => Ok(Self::Here(text.into())),
        }
    }
}

// === impl Files ===

impl Files {
    pub(super) fn of(client: FilesystemServiceClient<Guest>, user: &str) -> Self {
        Self {
            client: client.max_decoding_message_size(MAX_REPLY_BYTES),
            user: user.to_owned(),
        }
    }

    pub(super) fn path(&self, path: impl Into<bytes::Bytes>) -> Option<FilePath> {
        Some(FilePath {
            path: path.into(),
            user: self.user.clone(),
            root: bytes::Bytes::new(),
        })
    }
}

/// What a call says, or DEADLINE_EXCEEDED: none is waited for without end.
pub(super) async fn answer<T>(
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Status> {
    in_time(async { call.await.map(Response::into_inner) }).await
}

/// The same of anything that a guest is to say.
pub(super) async fn in_time<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    match tokio::time::timeout(ANSWER, call).await {
        Ok(said) => said,
        Err(_) => Err(Status::deadline_exceeded(
            "the sandbox has not answered for a minute; see whether it runs with `soulbox get`",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(sandbox: &str, path: &str) -> Place {
        Place {
            sandbox: sandbox.to_owned(),
            path: path.as_bytes().to_vec(),
        }
    }

    #[test]
    fn a_place_has_a_sandbox_and_maybe_a_path() {
        for (text, path) in [
            ("sb-1", "."),
            ("sb-1:", "."),
            ("sb-1:/", "/"),
            ("sb-1:a:b", "a:b"),
        ] {
            assert_eq!(Place::parse(text.into()), Ok(place("sb-1", path)), "{text}");
        }
        for text in ["", ":", ":/x", "sb 1:/x", "sb-\u{e9}:/x"] {
            assert!(Place::parse(text.into()).is_err(), "{text}");
        }
    }

    #[test]
    fn a_colon_after_a_slash_is_part_of_a_path_here() {
        let here = |text: &str| Location::Here(text.into());
        for text in ["a", "./a:b", "/a:b", "a/b:c", "--"] {
            assert_eq!(Location::parse(text.into()), Ok(here(text)), "{text}");
        }
        assert_eq!(Location::parse("-".into()), Ok(Location::Stdio));
        let there = Location::Sandbox(place("sb-1", "/a/b"));
        assert_eq!(Location::parse("sb-1:/a/b".into()), Ok(there));
        assert!(Location::parse("".into()).is_err());
        assert!(Location::parse(":x".into()).is_err());
    }
}
