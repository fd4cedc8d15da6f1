//! A monitor without a machine. How it behaves is written behind the headers
//! of the kernel that it is given.

use std::io::Read as _;
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use prost::Message as _;
use soulbox_host::monitor::ControlSocket;
use soulbox_proto::guest::READY_PORT;
use soulbox_proto::guest::v1::Hello;
use soulbox_proto::vmm::v1::{
    self as proto, FromMonitor, event::Event, from_monitor, reply, request,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

use crate::agent;

pub const CONSOLE: &[u8] = b"[    0.000000] Linux version of the test\n";

/// Ways out of the fake machine, for the agent in it.
#[derive(Clone)]
pub struct Machine {
    control: Arc<Mutex<Arc<ControlSocket>>>,
    pub behaviour: Arc<str>,
}

pub fn main() -> ! {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(run());
    std::process::exit(0);
}

async fn run() {
    let mut args = std::env::args().skip_while(|arg| arg != "--control-fd");
    let number = args.nth(1).unwrap().parse().unwrap();
    // SAFETY: soulboxd starts a monitor with its control socket as the descriptor
    // that it names, and nothing in this process has touched it before.
    let control = unsafe { OwnedFd::from_raw_fd(number) };
    let control = Arc::new(ControlSocket::new(control).unwrap());
    let datagram = control.receive().await.unwrap().unwrap();
    let request = proto::Request::decode(datagram.bytes.as_slice()).unwrap();
    let Some(request::Op::Boot(boot)) = request.op else {
        panic!("not Boot: {request:?}");
    };
    let mut fds: Vec<Option<OwnedFd>> = datagram.fds.into_iter().map(Some).collect();
    let mut take = |index: u32| fds[usize::try_from(index).unwrap()].take().unwrap();
    let mut kernel = Vec::new();
    std::fs::File::from(take(boot.kernel_fd))
        .read_to_end(&mut kernel)
        .unwrap();
    let behaviour: Arc<str> = String::from_utf8_lossy(&kernel[120..]).into();
    let config = boot.machine.unwrap();
    let memory = rustix::fs::fstat(take(boot.memory_fd)).unwrap();
    assert_eq!(memory.st_size, i64::from(config.memory_mib) << 20);
    let disk = &config.block_devices[0];
    assert_eq!(disk.size_bytes % 4096, 0);
    take(disk.base_fd);
    take(disk.layer_fd.unwrap());
    take(boot.kvm_fd);
    let vsock = StdUnixListener::from(take(config.vsock.unwrap().listener_fd));
    let takeover = take(boot.control_listener_fd.unwrap());

    let machine = Machine {
        control: Arc::new(Mutex::new(Arc::clone(&control))),
        behaviour,
    };
    if &*machine.behaviour == "refuse" {
        let error = proto::Error {
            code: proto::error::Code::Kernel.into(),
            message: "the kernel is of no use".to_owned(),
        };
        machine.reply(request.id, reply::Result::Error(error)).await;
        return;
    }
    let booted = proto::Booted {
        stages: vec![proto::StageTime {
            stage: "machine".to_owned(),
            duration_ns: 1_000_000,
        }],
        started_at_ns: 1,
    };
    machine
        .reply(request.id, reply::Result::Booted(booted))
        .await;
    match &*machine.behaviour {
        "emulation" => machine.exit(proto::exited::Reason::EmulationFailed).await,
        "die" => std::process::exit(1),
        _ => {}
    }
    tokio::spawn(accept_clients(machine.clone(), takeover));
    tokio::spawn(serve_vsock(machine.clone(), vsock));
    if &*machine.behaviour != "mute" {
        machine.say_hello().await;
    }
    tokio::spawn(serve_control(machine, control));
    std::future::pending::<()>().await;
}

// === impl Machine ===

impl Machine {
    async fn send(&self, message: from_monitor::Message, fds: &[std::os::fd::BorrowedFd<'_>]) {
        let control = Arc::clone(&self.control.lock().unwrap());
        let message = FromMonitor {
            message: Some(message),
        };
        // The daemon may be away.
        let _ = control.send(&message.encode_to_vec(), fds).await;
    }

    async fn event(&self, event: Event, fds: &[std::os::fd::BorrowedFd<'_>]) {
        let event = proto::Event { event: Some(event) };
        self.send(from_monitor::Message::Event(event), fds).await;
    }

    async fn reply(&self, id: u64, result: reply::Result) {
        let reply = proto::Reply {
            id,
            result: Some(result),
        };
        self.send(from_monitor::Message::Reply(reply), &[]).await;
    }

    pub async fn panic(&self) {
        let panic = proto::GuestPanic {
            console_tail: b"Kernel panic - not syncing: asked for\n".to_vec(),
        };
        self.event(Event::GuestPanic(panic), &[]).await;
    }

    pub async fn exit(&self, reason: proto::exited::Reason) -> ! {
        let exited = proto::Exited {
            reason: reason.into(),
            message: "as the test wants it".to_owned(),
            console_tail: CONSOLE.to_vec(),
        };
        self.event(Event::Exited(exited), &[]).await;
        std::process::exit(0);
    }

    async fn say_hello(&self) {
        use std::os::fd::AsFd as _;

        let (guest, host) = std::os::unix::net::UnixStream::pair().unwrap();
        let connection = proto::VsockConnection {
            host_port: READY_PORT,
            guest_port: 1,
        };
        self.event(Event::VsockConnection(connection), &[host.as_fd()])
            .await;
        let hello = Hello {
            agent_version: "test".to_owned(),
            agent_started_us: 1000,
            agent_ready_us: 1500,
        };
        std::io::Write::write_all(&mut &guest, &hello.encode_length_delimited_to_vec()).unwrap();
    }
}

async fn accept_clients(machine: Machine, listener: OwnedFd) {
    loop {
        let accepting = listener.try_clone().unwrap();
        let accepted = tokio::task::spawn_blocking(move || rustix::net::accept(&accepting));
        let accepted = accepted.await.unwrap().unwrap();
        let control = Arc::new(ControlSocket::new(accepted).unwrap());
        *machine.control.lock().unwrap() = Arc::clone(&control);
        tokio::spawn(serve_control(machine.clone(), control));
    }
}

async fn serve_control(machine: Machine, control: Arc<ControlSocket>) {
    while let Ok(Some(datagram)) = control.receive().await {
        let request = proto::Request::decode(datagram.bytes.as_slice()).unwrap();
        let result = match request.op.unwrap() {
            request::Op::Shutdown(_) if &*machine.behaviour == "stubborn" => continue,
            request::Op::Shutdown(_) => {
                let gone = reply::Result::ShuttingDown(proto::ShuttingDown {});
                machine.reply(request.id, gone).await;
                machine.exit(proto::exited::Reason::Forced).await
            }
            _ => reply::Result::Metrics(proto::Metrics {
                console_tail: CONSOLE.to_vec(),
                ..proto::Metrics::default()
            }),
        };
        machine.reply(request.id, result).await;
    }
}

async fn serve_vsock(machine: Machine, listener: StdUnixListener) {
    listener.set_nonblocking(true).unwrap();
    let listener = UnixListener::from_std(listener).unwrap();
    let (connections, incoming) = mpsc::channel(4);
    tokio::spawn(agent::serve(machine, incoming));
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let connections = connections.clone();
        tokio::spawn(async move {
            if let Ok(stream) = handshake(stream).await {
                connections.send(Ok(stream)).await.unwrap();
            }
        });
    }
}

async fn handshake(mut stream: UnixStream) -> std::io::Result<UnixStream> {
    let mut asked = [0; 13];
    let limit = Duration::from_secs(5);
    tokio::time::timeout(limit, stream.read_exact(&mut asked)).await??;
    assert_eq!(&asked, b"CONNECT 1024\n");
    stream.write_all(b"OK 1073741824\n").await?;
    Ok(stream)
}
