//! Services of a guest whose answers are written by hand, byte by byte where a test
//! wants an agent that does not keep to its protocol.

use std::convert::Infallible;
use std::marker::PhantomData;
use std::task::{Context, Poll};

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use prost::Message;
use soulbox_proto::guest::v1::{self as guest};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service};
use tonic::server::NamedService;
use tonic::transport::Channel;

use crate::monitor::{Machine, log};

/// The service whose server is `S`.
pub struct Raw<S>(Machine, PhantomData<fn() -> S>);

/// The same, as another agent has it.
pub struct Forward<S>(Channel, PhantomData<fn() -> S>);

type Frames = BoxStream<'static, Result<Frame<Bytes>, Status>>;

/// Values of GetMetricsRequest.processes to which the agent answers like none.
pub mod hostile {
    pub const NO_TRAILERS: u32 = 901;
    pub const GARBAGE_TRAILERS: u32 = 902;
    pub const HUGE_STATUS: u32 = 903;
    pub const RESET: u32 = 904;
    pub const HUGE_HEADER: u32 = 905;
    pub const NO_GRPC: u32 = 906;
    pub const HUGE_TRAILERS: u32 = 907;
    pub const FORGED: u32 = 908;
    pub const ALL: [u32; 8] = [
        NO_TRAILERS,
        GARBAGE_TRAILERS,
        HUGE_STATUS,
        RESET,
        HUGE_HEADER,
        NO_GRPC,
        HUGE_TRAILERS,
        FORGED,
    ];
}

// === impl Raw ===

impl<S> Raw<S> {
    pub fn new(machine: &Machine) -> Self {
        Self(machine.clone(), PhantomData)
    }
}

impl<S> Clone for Raw<S> {
    fn clone(&self) -> Self {
        Self::new(&self.0)
    }
}

impl<S: NamedService> NamedService for Raw<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for Raw<S> {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let machine = self.0.clone();
        Box::pin(async move {
            let path = request.uri().path().to_owned();
            // What a caller says to others must not come here.
            assert!(!request.headers().contains_key("authorization"));
            assert!(!request.headers().contains_key("soulbox-sandbox"));
            let sent = request.into_body().collect().await.unwrap().to_bytes();
            log!("call: {path}");
            Ok(answer(&machine, &path, messages(sent)))
        })
    }
}

/// What gRPC frames: a flag and a length before each message.
fn messages(mut sent: Bytes) -> Vec<Bytes> {
    let mut messages = Vec::new();
    while sent.len() >= 5 {
        let head = sent.split_to(5);
        let length = u32::from_be_bytes(head[1..5].try_into().unwrap());
        messages.push(sent.split_to(length.try_into().unwrap()));
    }
    messages
}

fn frame(message: &impl Message) -> Result<Frame<Bytes>, Status> {
    let mut bytes = BytesMut::new();
    bytes.put_u8(0);
    bytes.put_u32(message.encoded_len().try_into().unwrap());
    message.encode(&mut bytes).unwrap();
    Ok(Frame::data(bytes.freeze()))
}

fn trailers(pairs: &[(&'static str, &[u8])]) -> Result<Frame<Bytes>, Status> {
    let mut trailers = HeaderMap::new();
    for (name, value) in pairs {
        trailers.append(*name, HeaderValue::from_bytes(value).unwrap());
    }
    Ok(Frame::trailers(trailers))
}

fn ok() -> Result<Frame<Bytes>, Status> {
    trailers(&[("grpc-status", b"0")])
}

fn response(frames: Frames) -> Response<Body> {
    let mut response = Response::new(Body::new(StreamBody::new(frames)));
    let kind = HeaderValue::from_static("application/grpc");
    response.headers_mut().insert("content-type", kind);
    response
}

/// All of `frames`, in their order.
fn list(frames: Vec<Result<Frame<Bytes>, Status>>) -> Frames {
    futures_util::stream::iter(frames).boxed()
}

fn answer(machine: &Machine, path: &str, sent: Vec<Bytes>) -> Response<Body> {
    let (_, method) = path.rsplit_once('/').unwrap();
    let first = sent.first().cloned().unwrap_or_default();
    let entry = |path: &str, size: usize| guest::Entry {
        path: path.to_owned().into(),
        kind: guest::FileKind::Regular.into(),
        size_bytes: size as u64,
        mode: 0o644,
        ..guest::Entry::default()
    };
    let frames = match method {
        "GetMetrics" => {
            let asked = guest::GetMetricsRequest::decode(first).unwrap();
            return metrics(asked.processes);
        }
        "RunCode" => return run_code(machine, &guest::RunCodeRequest::decode(first).unwrap()),
        "InterruptContext" => {
            machine.interrupts.send_modify(|count| *count += 1);
            vec![
                frame(&guest::InterruptContextResponse { interrupted: true }),
                ok(),
            ]
        }
        "CreateContext" => {
            let asked = guest::CreateContextRequest::decode(first).unwrap();
            let context = guest::CodeContext {
                id: "abcd1234".to_owned(),
                language: asked.language,
                cwd: asked.cwd,
                ..guest::CodeContext::default()
            };
            let context = Some(context);
            vec![frame(&guest::CreateContextResponse { context }), ok()]
        }
        "ListContexts" => {
            let contexts = vec![guest::CodeContext {
                id: "python".to_owned(),
                language: guest::Language::Python.into(),
                cwd: "/home/\x1b[2J".into(),
                ..guest::CodeContext::default()
            }];
            vec![frame(&guest::ListContextsResponse { contexts }), ok()]
        }
        "List" => {
            let asked = guest::ListRequest::decode(first).unwrap();
            // Two pages.
            let (name, next) = match asked.page_token.is_empty() {
                true => ("a", "next"),
                false => ("b\x1b[31m", ""),
            };
            let reply = guest::ListResponse {
                entries: vec![entry(name, 7)],
                next_page_token: next.into(),
            };
            vec![frame(&reply), ok()]
        }
        "Read" => {
            let part = |message| guest::ReadResponse {
                message: Some(message),
            };
            use guest::read_response::Message;
            vec![
                frame(&part(Message::Entry(entry("a", 6)))),
                frame(&part(Message::Data("one".into()))),
                frame(&part(Message::Data("two".into()))),
                ok(),
            ]
        }
        "Write" => {
            use guest::write_request::Message;
            let mut written = 0;
            let mut is_whole = false;
            for request in sent {
                match guest::WriteRequest::decode(request)
                    .unwrap()
                    .message
                    .unwrap()
                {
                    Message::Open(open) => {
                        log!("open: {:?}", open.how());
                    }
                    Message::Data(data) => written += data.len(),
                    Message::Commit(_) => is_whole = true,
                }
            }
            log!("written: {written}, whole: {is_whole}");
            let reply = guest::WriteResponse {
                entry: Some(entry("a", written)),
                written_bytes: written as u64,
            };
            vec![frame(&reply), ok()]
        }
        "Search" => {
            use guest::search_response::Message;
            let found = guest::SearchMatch {
                path: "src/a.rs".into(),
                line_number: 3,
                line: "fn a() {}".into(),
                ..guest::SearchMatch::default()
            };
            let part = |message| guest::SearchResponse {
                message: Some(message),
            };
            vec![
                frame(&part(Message::Match(found))),
                frame(&part(Message::End(guest::SearchEnd::default()))),
                ok(),
            ]
        }
        "Watch" => {
            use guest::watch_response::Message;
            let part = |message| guest::WatchResponse {
                message: Some(message),
            };
            let event = guest::WatchEvent {
                kind: guest::watch_event::Kind::Renamed.into(),
                path: "new".into(),
                from: "old".into(),
                directory: false,
            };
            let frames = vec![
                frame(&part(Message::Ready(guest::WatchReady { directories: 1 }))),
                frame(&part(Message::Event(event))),
            ];
            return response(list(frames).chain(futures_util::stream::pending()).boxed());
        }
        _ => {
            let told = "there is no such file";
            return refusal(tonic::Code::NotFound, "FILE_NOT_FOUND", told).into_http();
        }
    };
    response(list(frames))
}

fn refusal(code: tonic::Code, reason: &str, message: &str) -> Status {
    use tonic_types::{ErrorDetails, StatusExt as _};
    let metadata = [("users".to_owned(), "root".to_owned())];
    let details = ErrorDetails::with_error_info(reason, "soulbox", metadata);
    Status::with_error_details(code, message, details)
}

fn run_code(machine: &Machine, asked: &guest::RunCodeRequest) -> Response<Body> {
    use guest::run_code_response::Event;
    use guest::run_finished::Outcome;

    let event = |event| frame(&guest::RunCodeResponse { event: Some(event) });
    let started = event(Event::Started(guest::RunStarted {
        context_id: "python".to_owned(),
        execution_count: 1,
    }));
    let finished = move |outcome: Outcome| {
        event(Event::Finished(guest::RunFinished {
            outcome: outcome.into(),
            ..guest::RunFinished::default()
        }))
    };
    match asked.code.as_str() {
        "fail" => response(list(vec![
            started,
            event(Event::Stderr("warned\n".into())),
            event(Event::Error(guest::CodeError {
                name: "ZeroDivisionError".to_owned(),
                value: "division by zero".to_owned(),
                traceback: vec!["Traceback".to_owned(), "ZeroDivisionError".to_owned()],
            })),
            finished(Outcome::Failed),
            ok(),
        ])),
        "wait" => {
            let mut interrupts = machine.interrupts.subscribe();
            let rest = futures_util::stream::once(async move {
                interrupts.changed().await.unwrap();
                finished(Outcome::Interrupted)
            });
            let rest = rest.chain(futures_util::stream::iter([ok()]));
            response(futures_util::stream::iter([started]).chain(rest).boxed())
        }
        code => response(list(vec![
            started,
            event(Event::Stdout(format!("ran {code}\n").into())),
            event(Event::Result(guest::CodeResult {
                main: true,
                data: [
                    ("text/plain".to_owned(), "2".into()),
                    ("image/png".to_owned(), Bytes::from_static(b"\x89PNG")),
                ]
                .into(),
                ..guest::CodeResult::default()
            })),
            finished(Outcome::Ok),
            ok(),
        ])),
    }
}

fn metrics(asked: u32) -> Response<Body> {
    let reply = guest::GetMetricsResponse {
        uptime_us: 5_000_000,
        cpus: 2,
        cpu: Some(guest::CpuTimes::default()),
        processes: vec![guest::GuestProcess {
            pid: 1,
            name: "init".to_owned(),
            command_line: "/sbin/init\x1b]0;x".into(),
            ..guest::GuestProcess::default()
        }],
        ..guest::GetMetricsResponse::default()
    };
    let message = frame(&reply);
    let long = vec![b'x'; 15_000];
    match asked {
        hostile::NO_TRAILERS => response(list(vec![message])),
        hostile::GARBAGE_TRAILERS => {
            let garbage = trailers(&[
                ("grpc-status", b"two"),
                ("grpc-message", b"%ff%00\xff"),
                ("grpc-status-details-bin", b"!!!"),
                ("soulbox-forged", b"1"),
            ]);
            response(list(vec![message, garbage]))
        }
        hostile::HUGE_STATUS => {
            let huge = trailers(&[("grpc-status", b"5"), ("grpc-message", &long)]);
            response(list(vec![huge]))
        }
        hostile::RESET => response(list(vec![message, Err(Status::internal("reset"))])),
        hostile::HUGE_HEADER => {
            let mut response = response(list(vec![message, ok()]));
            let huge = HeaderValue::from_bytes(&vec![b'x'; 100_000]).unwrap();
            response.headers_mut().insert("x", huge);
            response
        }
        hostile::NO_GRPC => {
            let mut response = response(list(vec![message, ok()]));
            let kind = HeaderValue::from_static("text/html");
            response.headers_mut().insert("content-type", kind);
            response
        }
        hostile::HUGE_TRAILERS => {
            let huge = trailers(&[("x", &long), ("y", &long), ("grpc-status", b"0")]);
            response(list(vec![message, huge]))
        }
        hostile::FORGED => {
            let said = "soulboxd says:\x1b[2J your sandbox is gone";
            refusal(tonic::Code::Unavailable, "SANDBOX_DELETED", said).into_http()
        }
        _ => {
            let mut response = response(list(vec![message, ok()]));
            // For the daemon's callers it is not.
            let forged = HeaderValue::from_static("1");
            response.headers_mut().insert("soulbox-forged", forged);
            response
        }
    }
}

// === impl Forward ===

impl<S> Forward<S> {
    pub fn new(to: &Channel) -> Self {
        Self(to.clone(), PhantomData)
    }
}

impl<S> Clone for Forward<S> {
    fn clone(&self) -> Self {
        Self::new(&self.0)
    }
}

impl<S: NamedService> NamedService for Forward<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for Forward<S> {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let mut to = self.0.clone();
        Box::pin(async move {
            std::future::poll_fn(|cx| to.poll_ready(cx)).await.unwrap();
            Ok(to.call(request).await.unwrap())
        })
    }
}
