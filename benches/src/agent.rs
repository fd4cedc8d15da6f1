//! Calls to the agent of one guest.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use hyper_util::rt::TokioIo;
use soulbox_proto::guest::v1::code_service_client::CodeServiceClient;
use soulbox_proto::guest::v1::filesystem_service_client::FilesystemServiceClient;
use soulbox_proto::guest::v1::process_service_client::ProcessServiceClient;
use soulbox_proto::guest::v1::{
    ExecRequest, ExecResponse, ProcessInput, ProcessSpec, StdinEof, exec_request,
    exec_response::Event, exited, process_input,
};
use soulbox_proto::guest::{MAX_CHUNK_BYTES, SANDBOX_METADATA};
use tokio::net::UnixStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};

/// As the command line has them.
const STREAM_WINDOW_BYTES: u32 = 1024 * 1024;
const CONNECTION_WINDOW_BYTES: u32 = (1 << 31) - 1;
const FRAME_BYTES: u32 = 256 * 1024;

pub(crate) type Way = InterceptedService<Channel, Named>;

/// The services of one sandbox.
pub(crate) struct Agent {
    processes: ProcessServiceClient<Way>,
    pub(crate) files: FilesystemServiceClient<Way>,
    pub(crate) code: CodeServiceClient<Way>,
}

/// Names the sandbox that calls are for.
#[derive(Clone)]
pub(crate) struct Named(MetadataValue<Ascii>);

/// A program that did well.
pub(crate) struct Ran {
    pub(crate) stdout: Vec<u8>,
    /// From the call to the event.
    pub(crate) to_exit: Duration,
}

/// A program that runs until this is dropped.
pub(crate) struct Held {
    _responses: Streaming<ExecResponse>,
}

/// A connection that many calls share.
pub(crate) async fn dial(socket: &Path) -> Result<Channel, tonic::transport::Error> {
    let path = socket.to_owned();
    Endpoint::from_static("http://soulboxd")
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES)
        .connect_with_connector(tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        }))
        .await
}

// === impl Agent ===

impl Agent {
    pub(crate) fn new(channel: Channel, sandbox: &str) -> Result<Self> {
        let named = Named(sandbox.parse().context("a sandbox id that is none")?);
        let way = InterceptedService::new(channel, named);
        Ok(Self {
            processes: ProcessServiceClient::new(way.clone()),
            files: FilesystemServiceClient::new(way.clone()),
            code: CodeServiceClient::new(way),
        })
    }

    /// Runs a program until the call is over. One that fails is an error with what it
    /// said.
    pub(crate) async fn run(&mut self, argv: &[&str]) -> Result<Ran> {
        self.exec(argv, None).await
    }

    /// The same with bytes as its standard input.
    pub(crate) async fn feed(&mut self, argv: &[&str], input: &[u8]) -> Result<()> {
        self.exec(argv, Some(input)).await?;
        Ok(())
    }

    /// Starts a program and waits until it has said something.
    pub(crate) async fn hold(&mut self, argv: &[&str]) -> Result<Held> {
        let process = ProcessSpec {
            kill_on_disconnect: true,
            ..spec(argv)
        };
        let requests = tokio_stream::once(request(exec_request::Message::Start(process)));
        let responses = self.processes.exec(Request::new(requests)).await;
        let mut responses = responses.context("Exec")?.into_inner();
        let mut said = Vec::new();
        while let Some(response) = responses.message().await.context("Exec")? {
            match response.event {
                Some(Event::Stdout(_)) => {
                    return Ok(Held {
                        _responses: responses,
                    });
                }
                Some(Event::Stderr(bytes)) => said.extend_from_slice(&bytes),
                Some(Event::Started(_) | Event::Dropped(_) | Event::Exited(_)) | None => {}
            }
        }
        bail!(
            "{} ended before it said anything: {}",
            argv[0],
            String::from_utf8_lossy(&said)
        )
    }

    async fn exec(&mut self, argv: &[&str], input: Option<&[u8]>) -> Result<Ran> {
        let process = ProcessSpec {
            stdin: input.is_some(),
            ..spec(argv)
        };
        let mut messages = vec![exec_request::Message::Start(process)];
        if let Some(input) = input {
            let chunks = input.chunks(MAX_CHUNK_BYTES);
            messages.extend(
                chunks.map(|chunk| stdin(process_input::Input::Stdin(chunk.to_vec().into()))),
            );
            messages.push(stdin(process_input::Input::StdinEof(StdinEof {})));
        }
        let requests = tokio_stream::iter(messages.into_iter().map(request));
        let start = Instant::now();
        let responses = self.processes.exec(requests).await.context("Exec")?;
        let mut responses = responses.into_inner();
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let mut ended = None;
        // To the end of the call, not of the program: one that is broken off takes its
        // connection to the agent with it.
        while let Some(response) = responses.message().await.context("Exec")? {
            match response.event {
                Some(Event::Stdout(bytes)) => stdout.extend_from_slice(&bytes),
                Some(Event::Stderr(bytes)) => stderr.extend_from_slice(&bytes),
                Some(Event::Exited(exited)) => ended = Some((exited.status, start.elapsed())),
                Some(Event::Started(_) | Event::Dropped(_)) | None => {}
            }
        }
        match ended {
            Some((Some(exited::Status::Code(0)), to_exit)) => Ok(Ran { stdout, to_exit }),
            Some((status, _)) => bail!(
                "{argv:?} ended with {status:?}: {}{}",
                String::from_utf8_lossy(&stdout),
                String::from_utf8_lossy(&stderr)
            ),
            None => bail!("the exec of {argv:?} ended without an exit"),
        }
    }
}

// === impl Named ===

impl Interceptor for Named {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let metadata = request.metadata_mut();
        metadata.insert(SANDBOX_METADATA, self.0.clone());
        Ok(request)
    }
}

fn spec(argv: &[&str]) -> ProcessSpec {
    let argument = |argument: &&str| Bytes::copy_from_slice(argument.as_bytes());
    ProcessSpec {
        argv: argv.iter().map(argument).collect(),
        ..Default::default()
    }
}

fn stdin(input: process_input::Input) -> exec_request::Message {
    exec_request::Message::Input(ProcessInput { input: Some(input) })
}

fn request(message: exec_request::Message) -> ExecRequest {
    ExecRequest {
        message: Some(message),
    }
}
