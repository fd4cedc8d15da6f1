//! Which sandbox a call is for, and what of it goes there.

use std::collections::HashSet;
use std::sync::OnceLock;

use http::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, TE};
use prost::Message as _;
use prost_types::FileDescriptorSet;
use soulbox_proto::FILE_DESCRIPTOR_SET;
use soulbox_proto::guest::{DELETE_AFTER_METADATA, SANDBOX_METADATA};
use tonic::Status;
use tonic::body::Body;

use super::super::sandboxes::invalid;
use crate::guest::Way;
use crate::id::SandboxId;

const PACKAGE: &str = "soulbox.guest.v1";
/// What a caller may tell an agent beside the message. All else, credentials among
/// it, was meant for whoever is on the way.
const FOR_AGENT: [HeaderName; 2] = [
    HeaderName::from_static("grpc-encoding"),
    HeaderName::from_static("grpc-accept-encoding"),
];
/// They wait for what may never come, and lose nothing when they are made again.
const ENDLESS: [&str; 2] = [
    "/soulbox.guest.v1.FilesystemService/Watch",
    "/soulbox.guest.v1.ProcessService/Attach",
];

pub(super) struct Asked {
    pub(super) id: SandboxId,
    pub(super) delete_after: bool,
    pub(super) way: Way,
    pub(super) is_endless: bool,
    pub(super) for_agent: http::Request<Body>,
}

// === impl Asked ===

impl Asked {
    pub(super) fn parse(request: http::Request<Body>) -> Result<Self, Status> {
        let (mut head, body) = request.into_parts();
        let id = sandbox(&head.headers)?;
        let delete_after = delete_after(&head.headers)?;
        head.headers = headers_for_agent(&head.headers);
        let path = head.uri.path();
        Ok(Self {
            id,
            delete_after,
            way: way(path),
            is_endless: ENDLESS.contains(&path),
            for_agent: http::Request::from_parts(head, body),
        })
    }
}

fn sandbox(headers: &HeaderMap) -> Result<SandboxId, Status> {
    let mut values = headers.get_all(SANDBOX_METADATA).iter();
    let refused = |mend: &str| Err(invalid(SANDBOX_METADATA, mend.to_owned()));
    match (values.next(), values.next()) {
        (Some(id), None) => {
            let id = id.to_str().ok().and_then(|id| id.parse().ok());
            id.map_or_else(|| refused("is not a sandbox id"), Ok)
        }
        (None, _) => refused("is missing; name the sandbox with this key of the call's metadata"),
        (Some(_), Some(_)) => refused("is there twice; give it once"),
    }
}

fn delete_after(headers: &HeaderMap) -> Result<bool, Status> {
    match headers
        .get(DELETE_AFTER_METADATA)
        .map(HeaderValue::as_bytes)
    {
        None | Some(b"false") => Ok(false),
        Some(b"true") => Ok(true),
        Some(_) => Err(invalid(
            DELETE_AFTER_METADATA,
            "is neither true nor false".to_owned(),
        )),
    }
}

fn headers_for_agent(headers: &HeaderMap) -> HeaderMap {
    let mut sent = HeaderMap::with_capacity(4);
    sent.insert(TE, HeaderValue::from_static("trailers"));
    sent.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    for name in FOR_AGENT {
        if let Some(value) = headers.get(&name) {
            sent.insert(name, value.clone());
        }
    }
    sent
}

/// Calls that stream, and those of another version's services, which may.
fn way(path: &str) -> Way {
    static UNARY: OnceLock<HashSet<String>> = OnceLock::new();
    if UNARY.get_or_init(unary).contains(path) {
        Way::Shared
    } else {
        Way::Own
    }
}

fn unary() -> HashSet<String> {
    // What is built in decodes; without it every call has a connection of its own.
    let set = FileDescriptorSet::decode(FILE_DESCRIPTOR_SET).unwrap_or_default();
    let files = set.file.iter().filter(|file| file.package() == PACKAGE);
    let services = files.flat_map(|file| &file.service);
    services
        .flat_map(|service| {
            let calls = service.method.iter();
            let unary = calls.filter(|call| !call.client_streaming() && !call.server_streaming());
            unary.map(|call| format!("/{PACKAGE}.{}/{}", service.name(), call.name()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use tonic_types::StatusExt as _;

    use super::*;

    const ID: &str = "sb-aaaaaaaaaaaaaaaaaaaa";

    fn parse(headers: &[(&str, &str)]) -> Result<Asked, Status> {
        let mut request = http::Request::new(Body::empty());
        *request.uri_mut() = "/soulbox.guest.v1.CodeService/RunCode".parse().unwrap();
        for (name, value) in headers {
            let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
            request.headers_mut().append(name, value.parse().unwrap());
        }
        Asked::parse(request)
    }

    fn field(refused: Result<Asked, Status>) -> String {
        let status = refused.err().expect("it was taken");
        let details = status.get_error_details();
        assert_eq!(details.error_info().unwrap().reason, "INVALID_REQUEST");
        details.bad_request().unwrap().field_violations[0]
            .field
            .clone()
    }

    #[test]
    fn a_call_names_one_sandbox() {
        let asked = parse(&[(SANDBOX_METADATA, ID)]).unwrap();
        assert_eq!((asked.id.as_str(), asked.delete_after), (ID, false));
        let asked = parse(&[(SANDBOX_METADATA, ID), (DELETE_AFTER_METADATA, "true")]).unwrap();
        assert!(asked.delete_after);
        let twice = [(SANDBOX_METADATA, ID), (SANDBOX_METADATA, ID)];
        for wrong in [&[][..], &[(SANDBOX_METADATA, "../etc")], &twice] {
            assert_eq!(field(parse(wrong)), SANDBOX_METADATA);
        }
        let neither = [(SANDBOX_METADATA, ID), (DELETE_AFTER_METADATA, "yes")];
        assert_eq!(field(parse(&neither)), DELETE_AFTER_METADATA);
    }

    #[test]
    fn an_agent_is_told_nothing_that_was_meant_for_others() {
        let asked = parse(&[
            (SANDBOX_METADATA, ID),
            ("authorization", "Bearer secret"),
            ("cookie", "secret"),
            ("connection", "close"),
            ("grpc-encoding", "zstd"),
            ("content-type", "application/grpc+proto"),
        ])
        .unwrap();
        let mut names: Vec<_> = asked
            .for_agent
            .headers()
            .keys()
            .map(HeaderName::as_str)
            .collect();
        names.sort_unstable();
        assert_eq!(names, ["content-type", "grpc-encoding", "te"]);
    }

    #[test]
    fn calls_that_stream_have_a_connection_of_their_own() {
        for (call, expected) in [
            ("ProcessService/Exec", Way::Own),
            ("ProcessService/ListProcesses", Way::Shared),
            ("FilesystemService/Read", Way::Own),
            ("FilesystemService/Write", Way::Own),
            ("FilesystemService/Stat", Way::Shared),
            ("MetricsService/GetMetrics", Way::Shared),
            ("CodeService/NewInTheNextVersion", Way::Own),
        ] {
            assert_eq!(way(&format!("/{PACKAGE}.{call}")), expected, "{call}");
        }
    }
}
