//! An agent whose programs are words.

use std::collections::HashMap;
use std::pin::Pin;

use soulbox_proto::guest::MAX_REQUEST_BYTES;
use soulbox_proto::guest::v1::process_service_server::{ProcessService, ProcessServiceServer};
use soulbox_proto::guest::v1::system_service_server::{SystemService, SystemServiceServer};
use soulbox_proto::guest::v1::{self as guest, exec_request, exec_response, exited, process_input};
use soulbox_proto::vmm::v1::exited::Reason;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::monitor::{Machine, fault_in_guest, log};

pub async fn serve(machine: Machine, incoming: mpsc::Receiver<std::io::Result<UnixStream>>) {
    tonic::transport::Server::builder()
        .add_service(
            ProcessServiceServer::new(Agent(machine.clone()))
                .max_decoding_message_size(MAX_REQUEST_BYTES),
        )
        .add_service(SystemServiceServer::new(Agent(machine)))
        .serve_with_incoming(ReceiverStream::new(incoming))
        .await
        .unwrap();
}

struct Agent(Machine);

type Events = mpsc::Sender<Result<guest::ExecResponse, Status>>;

/// Tells the log when the call ends, however it ends.
struct Program(String);

impl Drop for Program {
    fn drop(&mut self) {
        log!("ended: {}", self.0);
    }
}

#[tonic::async_trait]
impl ProcessService for Agent {
    type ExecStream = Pin<Box<dyn Stream<Item = Result<guest::ExecResponse, Status>> + Send>>;

    async fn exec(
        &self,
        request: Request<Streaming<guest::ExecRequest>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        let mut input = request.into_inner();
        let Some(exec_request::Message::Start(spec)) = input.message().await?.unwrap().message
        else {
            panic!("no start");
        };
        let argv: Vec<String> = spec
            .argv
            .iter()
            .map(|arg| String::from_utf8_lossy(arg).into_owned())
            .collect();
        if argv[0] == "missing" {
            let metadata = HashMap::from([("exit_code".to_owned(), "127".to_owned())]);
            let details = ErrorDetails::with_error_info("COMMAND_NOT_FOUND", "soulbox", metadata);
            let message = "missing is not there; see PATH";
            return Err(Status::with_error_details(Code::NotFound, message, details));
        }
        self.0.wait_for(|runs| runs.machine && runs.programs).await;
        let (events, stream) = mpsc::channel(1);
        let machine = self.0.clone();
        tokio::spawn(async move {
            let _program = Program(argv[0].clone());
            tokio::select! {
                () = program(&machine, &argv, input, &events) => {}
                () = events.closed() => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

async fn program(
    machine: &Machine,
    argv: &[String],
    mut input: Streaming<guest::ExecRequest>,
    events: &Events,
) {
    let say = async |event| {
        let response = guest::ExecResponse { event: Some(event) };
        // The caller may be gone.
        let _ = events.send(Ok(response)).await;
    };
    say(exec_response::Event::Started(guest::Started {
        pid: 1,
        id: 1,
    }))
    .await;
    let number = argv.get(1).and_then(|arg| arg.parse::<u32>().ok());
    let mut status = exited::Status::Code(0);
    match argv[0].as_str() {
        "exit" => status = exited::Status::Code(number.unwrap()),
        "signal" => status = exited::Status::Signal(number.unwrap()),
        "flood" => {
            let chunk = vec![b'x'; 1 << 20];
            for _ in 0..number.unwrap() {
                say(exec_response::Event::Stdout(chunk.clone().into())).await;
            }
        }
        "cat" => loop {
            let message = input.message().await.ok().flatten();
            let Some(exec_request::Message::Input(sent)) = message.and_then(|sent| sent.message)
            else {
                break;
            };
            match sent.input.unwrap() {
                process_input::Input::Stdin(bytes) => {
                    say(exec_response::Event::Stdout(bytes)).await;
                }
                process_input::Input::Signal(signal) => {
                    status = exited::Status::Signal(signal);
                    break;
                }
                process_input::Input::StdinEof(_) => break,
            }
        },
        "sleep" => std::future::pending().await,
        "set" => machine.set_word(&argv[1]),
        "get" => say(exec_response::Event::Stdout(machine.word().into())).await,
        "/bin/cat" => {
            let meminfo = "MemTotal: 524288 kB\nMemFree: 307200 kB\n";
            say(exec_response::Event::Stdout(meminfo.into())).await;
        }
        "write" => machine.write(&argv[1]),
        "read" => say(exec_response::Event::Stdout(machine.read().into())).await,
        "panic" => {
            machine.panic().await;
            std::future::pending::<()>().await;
        }
        "poweroff" => machine.exit(Reason::PoweredOff).await,
        _ => {}
    }
    say(exec_response::Event::Exited(guest::Exited {
        status: Some(status),
        ..guest::Exited::default()
    }))
    .await;
}

#[tonic::async_trait]
impl SystemService for Agent {
    async fn configure(
        &self,
        request: Request<guest::ConfigureRequest>,
    ) -> Result<Response<guest::ConfigureResponse>, Status> {
        self.0.wait_for(|runs| runs.machine).await;
        if fault_in_guest("configure").await.is_some() {
            return Err(Status::internal("as the test wants it"));
        }
        let request = request.get_ref();
        log!("hostname: {}", request.hostname);
        assert!(request.wall_clock.is_some());
        assert!(request.entropy.len() >= 32 && request.entropy.iter().any(|byte| *byte != 0));
        assert_eq!(request.new_identity, !request.hostname.is_empty());
        self.0.runs.send_modify(|runs| runs.programs = true);
        Ok(Response::new(guest::ConfigureResponse {}))
    }

    async fn suspend(
        &self,
        _request: Request<guest::SuspendRequest>,
    ) -> Result<Response<guest::SuspendResponse>, Status> {
        self.0.wait_for(|runs| runs.machine).await;
        if fault_in_guest("suspend").await.is_some() {
            return Err(Status::internal("as the test wants it"));
        }
        self.0.runs.send_modify(|runs| runs.programs = false);
        log!("suspended");
        Ok(Response::new(guest::SuspendResponse {}))
    }

    async fn health(
        &self,
        _request: Request<guest::HealthRequest>,
    ) -> Result<Response<guest::HealthResponse>, Status> {
        self.0.wait_for(|runs| runs.machine).await;
        Ok(Response::new(guest::HealthResponse {
            memory_available_bytes: 300 << 20,
            ..guest::HealthResponse::default()
        }))
    }

    async fn shutdown(
        &self,
        _request: Request<guest::ShutdownRequest>,
    ) -> Result<Response<guest::ShutdownResponse>, Status> {
        log!("clean stop");
        if &*self.0.behaviour == "stubborn" {
            std::future::pending::<()>().await;
        }
        let machine = self.0.clone();
        tokio::spawn(async move { machine.exit(Reason::PoweredOff).await });
        Ok(Response::new(guest::ShutdownResponse {}))
    }
}
