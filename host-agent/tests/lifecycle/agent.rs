//! An agent whose programs are words.

use std::collections::{BTreeMap, HashMap};
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use hyper_util::rt::TokioIo;
use soulbox_proto::guest::MAX_REQUEST_BYTES;
use soulbox_proto::guest::v1::code_service_server::CodeServiceServer;
use soulbox_proto::guest::v1::filesystem_service_server::FilesystemServiceServer;
use soulbox_proto::guest::v1::metrics_service_server::MetricsServiceServer;
use soulbox_proto::guest::v1::process_service_server::{ProcessService, ProcessServiceServer};
use soulbox_proto::guest::v1::system_service_server::{SystemService, SystemServiceServer};
use soulbox_proto::guest::v1::{self as guest, exec_request, exec_response, exited, process_input};
use soulbox_proto::vmm::v1::exited::Reason;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::monitor::{Machine, fault_in_guest, log};
use crate::raw::{Forward, Raw};

pub async fn serve(machine: Machine, incoming: mpsc::Receiver<std::io::Result<UnixStream>>) {
    let agent = Agent(machine.clone(), Arc::default());
    let mut routes = Routes::builder();
    routes.add_service(SystemServiceServer::new(agent.clone()));
    if &*machine.behaviour == "real" {
        let real = real().await;
        routes
            .add_service(Forward::<ProcessServiceServer<()>>::new(&real))
            .add_service(Forward::<FilesystemServiceServer<()>>::new(&real))
            .add_service(Forward::<CodeServiceServer<()>>::new(&real))
            .add_service(Forward::<MetricsServiceServer<()>>::new(&real));
    } else {
        let process = ProcessServiceServer::new(agent);
        routes
            .add_service(process.max_decoding_message_size(MAX_REQUEST_BYTES))
            .add_service(Raw::<FilesystemServiceServer<()>>::new(&machine))
            .add_service(Raw::<CodeServiceServer<()>>::new(&machine))
            .add_service(Raw::<MetricsServiceServer<()>>::new(&machine));
    }
    tonic::transport::Server::builder()
        .add_routes(routes.routes())
        .serve_with_incoming(ReceiverStream::new(incoming))
        .await
        .unwrap();
}

/// The way to the real agent, in a thread of this process: its programs are this
/// machine's.
async fn real() -> Channel {
    use soulbox_guest::options::{Options, Wanted};

    let socket = std::env::temp_dir().join(format!("soulbox-agent-{}", std::process::id()));
    let args = ["--serve-unix".into(), socket.clone().into_os_string()];
    let Wanted::Run(options) = Options::parse(args, std::process::id()).unwrap() else {
        panic!("not run");
    };
    std::thread::spawn(move || soulbox_guest::run(options).unwrap());
    while UnixStream::connect(&socket).await.is_err() {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    let connected = Endpoint::from_static("http://guest")
        .connect_with_connector(tower::service_fn({
            let socket = socket.clone();
            move |_| {
                let socket = socket.clone();
                async move { UnixStream::connect(socket).await.map(TokioIo::new) }
            }
        }))
        .await;
    std::fs::remove_file(socket).unwrap();
    connected.unwrap()
}

#[derive(Clone)]
struct Agent(Machine, Arc<Mutex<Programs>>);

/// Programs that outlive their callers, by id, and the signal that ended them.
type Programs = BTreeMap<u64, (guest::ProcessSpec, watch::Sender<Option<u32>>)>;

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
        if argv[0] == "daemon" {
            let mut programs = self.1.lock().unwrap();
            let id = programs.len() as u64 + 41;
            programs.insert(id, (spec, watch::Sender::new(None)));
            let event = exec_response::Event::Started(guest::Started { pid: 7, id });
            events
                .try_send(Ok(guest::ExecResponse { event: Some(event) }))
                .unwrap();
            // It says nothing more to this caller.
            tokio::spawn(async move { events.closed().await });
            return Ok(Response::new(Box::pin(ReceiverStream::new(stream))));
        }
        tokio::spawn(async move {
            let _program = Program(argv[0].clone());
            tokio::select! {
                () = program(&machine, &spec, &argv, input, &events) => {}
                () = events.closed() => {}
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    type AttachStream = Self::ExecStream;

    async fn attach(
        &self,
        request: Request<Streaming<guest::AttachRequest>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut input = request.into_inner();
        let first = input.message().await?.unwrap().message;
        let Some(guest::attach_request::Message::Attach(attach)) = first else {
            panic!("no attach");
        };
        let mut ended = {
            let programs = self.1.lock().unwrap();
            let Some((_, ended)) = programs.get(&attach.id) else {
                let details =
                    ErrorDetails::with_error_info("PROCESS_NOT_FOUND", "soulbox", HashMap::new());
                let message = "there is no such program";
                return Err(Status::with_error_details(Code::NotFound, message, details));
            };
            ended.subscribe()
        };
        let (events, stream) = mpsc::channel(4);
        tokio::spawn(async move {
            let say = async |event| {
                let event = Some(event);
                let _ = events.send(Ok(guest::ExecResponse { event })).await;
            };
            say(exec_response::Event::Dropped(guest::Dropped { bytes: 3 })).await;
            say(exec_response::Event::Stdout("kept\n".into())).await;
            let signal = tokio::select! {
                signal = ended.wait_for(Option::is_some) => signal.unwrap().unwrap(),
                () = events.closed() => return,
            };
            say(exec_response::Event::Exited(guest::Exited {
                status: Some(exited::Status::Signal(signal)),
                ..guest::Exited::default()
            }))
            .await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn list_processes(
        &self,
        _: Request<guest::ListProcessesRequest>,
    ) -> Result<Response<guest::ListProcessesResponse>, Status> {
        let programs = self.1.lock().unwrap();
        let processes = programs
            .iter()
            .map(|(id, (spec, ended))| guest::ProcessEntry {
                id: *id,
                pid: 7,
                argv: spec.argv.clone(),
                tag: spec.tag.clone(),
                exited: ended.borrow().map(|signal| guest::Exited {
                    status: Some(exited::Status::Signal(signal)),
                    ..guest::Exited::default()
                }),
                ..guest::ProcessEntry::default()
            });
        let processes = processes.collect();
        Ok(Response::new(guest::ListProcessesResponse { processes }))
    }

    async fn signal_process(
        &self,
        request: Request<guest::SignalProcessRequest>,
    ) -> Result<Response<guest::SignalProcessResponse>, Status> {
        let request = request.into_inner();
        log!("signal: {request:?}");
        let programs = self.1.lock().unwrap();
        let (_, ended) = &programs[&request.id];
        let sent = ended.borrow().is_none();
        ended.send_replace(Some(15));
        Ok(Response::new(guest::SignalProcessResponse { sent }))
    }
}

/// Tells what comes from the terminal, until "q" is typed; with an argument, what it
/// is.
async fn terminal(
    spec: &guest::ProcessSpec,
    input: &mut Streaming<guest::ExecRequest>,
    events: &Events,
) -> exited::Status {
    let size = |size: guest::TerminalSize| format!("size {}x{}", size.columns, size.rows);
    let mut line = match spec.terminal {
        Some(terminal) => size(terminal),
        None => "no terminal".to_owned(),
    };
    let term = spec
        .env
        .iter()
        .find(|variable| &variable.name[..] == b"TERM");
    line.push_str(&format!(
        " TERM={}",
        String::from_utf8_lossy(&term.map(|term| term.value.clone()).unwrap_or_default())
    ));
    loop {
        let event = exec_response::Event::Stdout(format!("{line}\r\n").into());
        let _ = events
            .send(Ok(guest::ExecResponse { event: Some(event) }))
            .await;
        if spec.argv.len() > 1 {
            return exited::Status::Code(9);
        }
        let message = input.message().await.ok().flatten();
        let Some(exec_request::Message::Input(sent)) = message.and_then(|sent| sent.message) else {
            return exited::Status::Signal(1);
        };
        line = match sent.input.unwrap() {
            process_input::Input::Stdin(bytes) if &bytes[..] == b"q" => {
                return exited::Status::Code(7);
            }
            process_input::Input::Stdin(bytes) => format!("keys {bytes:?}"),
            process_input::Input::Resize(resized) => size(resized),
            process_input::Input::Signal(signal) => return exited::Status::Signal(signal),
            process_input::Input::StdinEof(_) => return exited::Status::Signal(1),
        };
    }
}

async fn program(
    machine: &Machine,
    spec: &guest::ProcessSpec,
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
                process_input::Input::Resize(_) => {}
            }
        },
        "terminal" => status = terminal(spec, &mut input, events).await,
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
