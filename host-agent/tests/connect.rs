//! `soulbox connect` as a program, against a daemon that does as each test says.

#![allow(clippy::unwrap_used)]

use std::io::{Read as _, Write as _};
use std::pin::Pin;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use soulbox_proto::host::v1::network_service_server::{NetworkService, NetworkServiceServer};
use soulbox_proto::host::v1::{
    ConnectEnd, ConnectOpened, ConnectRequest, ConnectResponse, ForwardPortRequest,
    ForwardPortResponse, GetNetworkRequest, GetNetworkResponse, ListForwardsRequest,
    ListForwardsResponse, RemoveForwardRequest, RemoveForwardResponse, SetNetworkRequest,
    SetNetworkResponse, connect_request, connect_response,
};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

/// Only ever waited for in full by a test that fails.
const LONG: Duration = Duration::from_secs(30);

/// What a sandbox's end of a connection does.
type Script = fn(Side) -> Pin<Box<dyn Future<Output = ()> + Send>>;

struct Scripted(Script);

/// A sandbox's end of a connection.
struct Side {
    heard: Streaming<ConnectRequest>,
    says: mpsc::Sender<Result<ConnectResponse, Status>>,
}

/// What the program did.
struct Ended {
    code: Option<i32>,
    stdout: Vec<u8>,
    stderr: String,
}

// === impl Scripted ===

#[tonic::async_trait]
impl NetworkService for Scripted {
    type ConnectStream = Pin<Box<dyn Stream<Item = Result<ConnectResponse, Status>> + Send>>;

    async fn connect(
        &self,
        request: Request<Streaming<ConnectRequest>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let (says, stream) = mpsc::channel(1);
        let mut side = Side {
            heard: request.into_inner(),
            says,
        };
        match side.hear().await {
            connect_request::Message::Open(open) if open.port == 22 => {
                assert_eq!(open.sandbox_id, "sb-test");
                tokio::spawn((self.0)(side));
                Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
            }
            _ => Err(Status::failed_precondition("nothing listens there")),
        }
    }

    async fn get_network(
        &self,
        _: Request<GetNetworkRequest>,
    ) -> Result<Response<GetNetworkResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn set_network(
        &self,
        _: Request<SetNetworkRequest>,
    ) -> Result<Response<SetNetworkResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn forward_port(
        &self,
        _: Request<ForwardPortRequest>,
    ) -> Result<Response<ForwardPortResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn list_forwards(
        &self,
        _: Request<ListForwardsRequest>,
    ) -> Result<Response<ListForwardsResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn remove_forward(
        &self,
        _: Request<RemoveForwardRequest>,
    ) -> Result<Response<RemoveForwardResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

// === impl Side ===

impl Side {
    async fn hear(&mut self) -> connect_request::Message {
        let heard = self.heard.message().await.unwrap();
        heard.expect("it hung up").message.unwrap()
    }

    /// Data up to the end that was said.
    async fn hear_all(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            match self.hear().await {
                connect_request::Message::Data(bytes) => all.extend(bytes),
                connect_request::Message::End(_) => return all,
                connect_request::Message::Open(_) => panic!("opened twice"),
            }
        }
    }

    async fn say(&self, message: connect_response::Message) {
        let message = Some(message);
        self.says
            .send(Ok(ConnectResponse { message }))
            .await
            .unwrap();
    }

    async fn open(&self) {
        self.say(connect_response::Message::Opened(ConnectOpened {}))
            .await;
    }

    async fn say_bytes(&self, bytes: &[u8]) {
        self.say(connect_response::Message::Data(bytes.to_vec()))
            .await;
    }

    async fn end(&self) {
        self.say(connect_response::Message::End(ConnectEnd {}))
            .await;
    }
}

/// The program, connected to a sandbox that follows `script`.
async fn connect(script: Script, port: &str) -> Child {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = NetworkServiceServer::new(Scripted(script));
    let server = Server::builder().add_service(service);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    Command::new(env!("CARGO_BIN_EXE_soulbox"))
        .env("SOULBOX_HOST", format!("http://{address}"))
        .args(["connect", "sb-test", port])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Does `work` with the program on a thread of its own.
async fn with<T: Send + 'static>(
    mut program: Child,
    work: impl FnOnce(&mut Child) -> T + Send + 'static,
) -> T {
    let working = tokio::task::spawn_blocking(move || {
        let done = work(&mut program);
        // It has ended, or the test has failed.
        let _ = program.kill();
        let _ = program.wait();
        done
    });
    tokio::time::timeout(LONG, working).await.unwrap().unwrap()
}

/// Gives it `input` and its end, and waits for its own.
async fn ended(program: Child, input: Vec<u8>) -> Ended {
    with(program, |program| {
        let mut stdin = program.stdin.take().unwrap();
        let writing = std::thread::spawn(move || {
            // It need not take any.
            let _ = stdin.write_all(&input);
        });
        let mut stdout = Vec::new();
        program
            .stdout
            .take()
            .unwrap()
            .read_to_end(&mut stdout)
            .unwrap();
        let mut stderr = String::new();
        program
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut stderr)
            .unwrap();
        writing.join().unwrap();
        let code = program.wait().unwrap().code();
        Ended {
            code,
            stdout,
            stderr,
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_input_is_told_and_the_answer_still_comes() {
    let script: Script = |mut side| {
        Box::pin(async move {
            side.open().await;
            let mut heard = side.hear_all().await;
            heard.reverse();
            side.say_bytes(&heard).await;
            side.end().await;
        })
    };
    let ended = ended(connect(script, "22").await, b"\0\xffhello".to_vec()).await;
    assert_eq!(ended.stdout, b"olleh\xff\0");
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sandboxs_end_is_seen_while_input_goes_on() {
    let script: Script = |mut side| {
        Box::pin(async move {
            side.open().await;
            side.say_bytes(b"bye").await;
            side.end().await;
            // Otherwise the call ends with an error, and so does the program.
            if side.hear_all().await != b"late" {
                let _ = side
                    .says
                    .send(Err(Status::unknown("not what was sent")))
                    .await;
            }
        })
    };
    let program = connect(script, "22").await;
    let (stdout, code) = with(program, |program| {
        let mut stdout = Vec::new();
        program
            .stdout
            .take()
            .unwrap()
            .read_to_end(&mut stdout)
            .unwrap();
        // Only now, after all of its output.
        program.stdin.take().unwrap().write_all(b"late").unwrap();
        (stdout, program.wait().unwrap().code())
    })
    .await;
    assert_eq!(stdout, b"bye");
    assert_eq!(code, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn much_flows_both_ways_at_once() {
    let script: Script = |mut side| {
        Box::pin(async move {
            side.open().await;
            while let connect_request::Message::Data(bytes) = side.hear().await {
                side.say_bytes(&bytes).await;
            }
            side.end().await;
        })
    };
    let input: Vec<u8> = (0..8_u32 << 18).flat_map(u32::to_le_bytes).collect();
    let ended = ended(connect(script, "22").await, input.clone()).await;
    assert_eq!(ended.code, Some(0));
    assert!(
        ended.stdout == input,
        "{} bytes came back",
        ended.stdout.len()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_cut_off_is_no_end() {
    let script: Script = |side| {
        Box::pin(async move {
            side.open().await;
            side.say_bytes(b"half of").await;
        })
    };
    let ended = ended(connect(script, "22").await, Vec::new()).await;
    assert_eq!((ended.code, &ended.stdout[..]), (Some(1), &b"half of"[..]));
    assert!(ended.stderr.contains("cut off"), "{}", ended.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_told() {
    let script: Script = |_| Box::pin(async {});
    let ended = ended(connect(script, "23").await, Vec::new()).await;
    assert_eq!((ended.code, ended.stdout.len()), (Some(1), 0));
    assert_eq!(ended.stderr, "soulbox: nothing listens there\n");
}
