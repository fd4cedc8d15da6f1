//! Requests, replies and events over a control socket.
//!
//! What comes from a monitor is untrusted: it holds a guest that may have
//! broken into it. Whatever it sends, this side uses bounded memory.

use std::collections::HashMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use prost::Message as _;
use soulbox_proto::vmm::v1::{
    self as proto, FromMonitor, event::Event, from_monitor::Message, reply, request,
};
use tokio::sync::{mpsc, oneshot, watch};

use super::socket::{ControlSocket, Datagram, ReceiveError};
use crate::sync::lock;
use crate::text::printable;

/// Connections of guest programs to the host that wait to be looked at. More
/// are closed.
const MAX_WAITING_CONNECTIONS: usize = 16;

/// What is kept of a monitor's sentence, and of a stage's name.
const MAX_SENTENCE_CHARS: usize = 500;
const MAX_STAGE_CHARS: usize = 32;
/// What is kept of an operation's stages; a monitor has fewer.
const MAX_STAGES: usize = 16;
/// Spare connections that a restore may hand over.
const MAX_SPARES: usize = 16;

/// The control socket of one monitor. It is closed when this is dropped.
#[derive(Debug)]
pub struct Control {
    socket: Arc<ControlSocket>,
    pending: Arc<Mutex<Pending>>,
    reader: tokio::task::JoinHandle<()>,
}

/// A guest program's connection to a port of the host.
#[derive(Debug)]
pub struct Connection {
    pub host_port: u32,
    pub stream: OwnedFd,
}

/// What a monitor has said about its own end.
#[derive(Debug, Clone, Default)]
pub struct Observed {
    /// The guest's kernel panicked; the console's last bytes.
    pub panic: Option<Vec<u8>>,
    pub exited: Option<proto::Exited>,
    /// Nothing more will come.
    pub closed: bool,
    /// The monitor broke the protocol.
    pub broken: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    #[error("{}", .0.message)]
    Refused(proto::Error),
    #[error("the monitor closed its control socket")]
    Closed,
    #[error("the request cannot be sent to the monitor")]
    Send(#[source] std::io::Error),
}

/// A reply and what travelled beside it.
type Answer = (reply::Result, Vec<OwnedFd>);

#[derive(Debug, Default)]
struct Pending {
    next_id: u64,
    /// None once the socket is closed.
    waiting: Option<HashMap<u64, oneshot::Sender<Answer>>>,
}

#[derive(Debug, thiserror::Error)]
enum ProtocolError {
    #[error(transparent)]
    Receive(#[from] ReceiveError),
    #[error("the monitor sent a message that does not decode")]
    Decode(#[source] prost::DecodeError),
    #[error("the monitor sent an empty message")]
    Empty,
    #[error("the monitor answered request {0}, which was not asked")]
    Unasked(u64),
    #[error("the monitor sent {0} descriptors where {1} belong")]
    Descriptors(usize, usize),
}

// === impl Control ===

impl Control {
    /// Begins to read `socket`. The receivers see what the monitor says of its
    /// own accord.
    pub fn start(
        socket: ControlSocket,
    ) -> (Self, mpsc::Receiver<Connection>, watch::Receiver<Observed>) {
        let socket = Arc::new(socket);
        let pending = Arc::new(Mutex::new(Pending {
            next_id: 1,
            waiting: Some(HashMap::new()),
        }));
        let (connections, connections_rx) = mpsc::channel(MAX_WAITING_CONNECTIONS);
        let (observed, observed_rx) = watch::channel(Observed::default());
        let reader = Reader {
            socket: Arc::clone(&socket),
            pending: Arc::clone(&pending),
            connections,
            observed,
        };
        let control = Self {
            socket,
            pending,
            reader: tokio::spawn(reader.run()),
        };
        (control, connections_rx, observed_rx)
    }

    /// Sends one request with its descriptors and waits for the reply.
    pub async fn request(
        &self,
        op: request::Op,
        fds: &[BorrowedFd<'_>],
    ) -> Result<reply::Result, RequestError> {
        let (result, _none) = self.exchange(op, fds).await?;
        Ok(result)
    }

    /// As [`Self::request`], for a reply that descriptors come with.
    pub async fn exchange(
        &self,
        op: request::Op,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(reply::Result, Vec<OwnedFd>), RequestError> {
        let (answer, answered) = oneshot::channel();
        let id = {
            let mut pending = lock(&self.pending);
            let id = pending.next_id;
            pending.next_id += 1;
            let waiting = pending.waiting.as_mut().ok_or(RequestError::Closed)?;
            waiting.retain(|_, other| !other.is_closed());
            waiting.insert(id, answer);
            id
        };
        let request = proto::Request { id, op: Some(op) };
        self.socket
            .send(&request.encode_to_vec(), fds)
            .await
            .map_err(RequestError::Send)?;
        match answered.await {
            Ok((reply::Result::Error(mut error), _)) => {
                error.message = printable(&error.message, MAX_SENTENCE_CHARS);
                Err(RequestError::Refused(error))
            }
            Ok((mut result, fds)) => {
                tidy_stages(&mut result);
                Ok((result, fds))
            }
            Err(_) => Err(RequestError::Closed),
        }
    }

    /// The monitor's memory, counters and console.
    pub async fn metrics(&self) -> Result<proto::Metrics, RequestError> {
        match self
            .request(request::Op::GetMetrics(proto::GetMetrics {}), &[])
            .await?
        {
            reply::Result::Metrics(metrics) => Ok(metrics),
            _ => Err(RequestError::Closed),
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

struct Reader {
    socket: Arc<ControlSocket>,
    pending: Arc<Mutex<Pending>>,
    connections: mpsc::Sender<Connection>,
    observed: watch::Sender<Observed>,
}

// === impl Reader ===

impl Reader {
    async fn run(self) {
        let ended = self.read_all().await;
        // Whoever waits for a reply learns that none will come.
        lock(&self.pending).waiting = None;
        self.observed.send_modify(|observed| {
            observed.closed = true;
            observed.broken = ended.err().map(|error| error.to_string());
        });
    }

    async fn read_all(&self) -> Result<(), ProtocolError> {
        while let Some(datagram) = self.socket.receive().await? {
            self.handle(datagram)?;
        }
        Ok(())
    }

    fn handle(&self, datagram: Datagram) -> Result<(), ProtocolError> {
        let Datagram { bytes, fds } = datagram;
        let message = FromMonitor::decode(bytes.as_slice()).map_err(ProtocolError::Decode)?;
        match message.message.ok_or(ProtocolError::Empty)? {
            Message::Reply(reply) => {
                expect_descriptors(&fds, spares(&reply))?;
                self.answer(reply, fds)
            }
            Message::Event(event) => self.note(event.event.ok_or(ProtocolError::Empty)?, fds),
        }
    }

    fn answer(&self, reply: proto::Reply, fds: Vec<OwnedFd>) -> Result<(), ProtocolError> {
        let result = reply.result.ok_or(ProtocolError::Empty)?;
        let mut pending = lock(&self.pending);
        let waiting = pending
            .waiting
            .as_mut()
            .and_then(|waiting| waiting.remove(&reply.id));
        if let Some(waiting) = waiting {
            // The asker may have given up; that is no fault of the monitor's.
            let _ = waiting.send((result, fds));
            return Ok(());
        }
        // An asker that gave up has been forgotten; an id that was never given
        // out is a lie.
        if reply.id >= pending.next_id {
            return Err(ProtocolError::Unasked(reply.id));
        }
        Ok(())
    }

    fn note(&self, event: Event, mut fds: Vec<OwnedFd>) -> Result<(), ProtocolError> {
        match event {
            Event::VsockConnection(connection) => {
                expect_descriptors(&fds, 1)?;
                let stream = fds.remove(0);
                let connection = Connection {
                    host_port: connection.host_port,
                    stream,
                };
                if self.connections.try_send(connection).is_err() {
                    tracing::debug!("a guest's connection to the host was closed: too many wait");
                }
            }
            Event::GuestPanic(panic) => {
                expect_descriptors(&fds, 0)?;
                self.observed.send_modify(|observed| {
                    observed.panic.get_or_insert(panic.console_tail);
                });
            }
            Event::Exited(mut exited) => {
                expect_descriptors(&fds, 0)?;
                exited.message = printable(&exited.message, MAX_SENTENCE_CHARS);
                self.observed.send_modify(|observed| {
                    observed.exited.get_or_insert(exited);
                });
            }
        }
        Ok(())
    }
}

/// How many descriptors come with a reply.
fn spares(reply: &proto::Reply) -> usize {
    match &reply.result {
        // Others do not fit into a datagram either way.
        Some(reply::Result::Restored(restored)) => restored.spare_ports.len().min(MAX_SPARES),
        _ => 0,
    }
}

/// What a monitor says of its stages is bounded, and fit to be printed.
fn tidy_stages(result: &mut reply::Result) {
    let stages = match result {
        reply::Result::Booted(booted) => &mut booted.stages,
        reply::Result::Prepared(prepared) => &mut prepared.stages,
        reply::Result::Restored(restored) => &mut restored.stages,
        reply::Result::Snapshotted(snapshotted) => &mut snapshotted.stages,
        _ => return,
    };
    stages.truncate(MAX_STAGES);
    for stage in stages {
        stage.stage = printable(&stage.stage, MAX_STAGE_CHARS);
    }
}

fn expect_descriptors(fds: &[OwnedFd], expected: usize) -> Result<(), ProtocolError> {
    if fds.len() == expected {
        Ok(())
    } else {
        Err(ProtocolError::Descriptors(fds.len(), expected))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    type Parts = (
        Control,
        mpsc::Receiver<Connection>,
        watch::Receiver<Observed>,
        ControlSocket,
    );

    fn start() -> Parts {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("c.sock");
        let listener = ControlSocket::listener(&path).unwrap();
        let ours = ControlSocket::connect(&path).unwrap();
        // The monitor's end, as it accepts it.
        let theirs = rustix::net::accept(&listener).unwrap();
        let (control, connections, observed) = Control::start(ours);
        let monitor = ControlSocket::new(theirs).unwrap();
        (control, connections, observed, monitor)
    }

    fn event(event: Event) -> Vec<u8> {
        FromMonitor {
            message: Some(Message::Event(proto::Event { event: Some(event) })),
        }
        .encode_to_vec()
    }

    fn reply(id: u64, result: reply::Result) -> Vec<u8> {
        FromMonitor {
            message: Some(Message::Reply(proto::Reply {
                id,
                result: Some(result),
            })),
        }
        .encode_to_vec()
    }

    async fn broken(mut observed: watch::Receiver<Observed>) -> String {
        let seen = observed.wait_for(|seen| seen.closed).await.unwrap();
        seen.broken.clone().unwrap_or_default()
    }

    #[tokio::test]
    async fn replies_find_their_requests_in_any_order() {
        let (control, _connections, _observed, monitor) = start();
        let serve = async {
            let mut ids = Vec::new();
            for _ in 0..2 {
                let datagram = monitor.receive().await.unwrap().unwrap();
                ids.push(
                    proto::Request::decode(datagram.bytes.as_slice())
                        .unwrap()
                        .id,
                );
            }
            for id in ids.into_iter().rev() {
                let metrics = proto::Metrics {
                    console_tail: id.to_string().into_bytes(),
                    ..Default::default()
                };
                monitor
                    .send(&reply(id, reply::Result::Metrics(metrics)), &[])
                    .await
                    .unwrap();
            }
        };
        let (first, second, ()) = tokio::join!(control.metrics(), control.metrics(), serve);
        assert_eq!(first.unwrap().console_tail, b"1");
        assert_eq!(second.unwrap().console_tail, b"2");
    }

    #[tokio::test]
    async fn a_refusal_is_an_error_and_a_death_ends_the_wait() {
        let (control, _connections, _observed, monitor) = start();
        let serve = async {
            monitor.receive().await.unwrap().unwrap();
            let error = proto::Error {
                code: proto::error::Code::WrongState.into(),
                message: format!("not\nbooted{}", "!".repeat(60_000)),
            };
            monitor
                .send(&reply(1, reply::Result::Error(error)), &[])
                .await
                .unwrap();
        };
        let (refused, ()) = tokio::join!(control.metrics(), serve);
        assert!(
            matches!(refused, Err(RequestError::Refused(error)) if error.message.starts_with("not booted!") && error.message.len() < 600)
        );
        let (closed, ()) = tokio::join!(control.metrics(), async {
            monitor.receive().await.unwrap().unwrap();
            drop(monitor);
        });
        assert!(matches!(closed, Err(RequestError::Closed)));
        assert!(matches!(control.metrics().await, Err(RequestError::Closed)));
    }

    #[tokio::test]
    async fn the_first_word_about_the_end_stands() {
        let (_control, _connections, observed, monitor) = start();
        for tail in ["first", "second"] {
            let panic = proto::GuestPanic {
                console_tail: tail.into(),
            };
            monitor
                .send(&event(Event::GuestPanic(panic)), &[])
                .await
                .unwrap();
        }
        let exited = proto::Exited {
            message: "the \x1b[2Jend".to_owned(),
            ..proto::Exited::default()
        };
        monitor
            .send(&event(Event::Exited(exited)), &[])
            .await
            .unwrap();
        drop(monitor);
        let mut watching = observed.clone();
        let seen = watching.wait_for(|seen| seen.closed).await.unwrap();
        assert_eq!(seen.panic.as_deref(), Some(b"first".as_slice()));
        assert_eq!(seen.exited.as_ref().unwrap().message, "the  [2Jend");
        assert!(seen.broken.is_none());
    }

    #[tokio::test]
    async fn hostile_messages_end_the_connection() {
        let connection = event(Event::VsockConnection(proto::VsockConnection::default()));
        let unasked = reply(9, reply::Result::ShuttingDown(proto::ShuttingDown {}));
        for (bytes, expected) in [
            (vec![0xff; 40], "does not decode"),
            (FromMonitor::default().encode_to_vec(), ""),
            (connection, "0 descriptors where 1 belong"),
            (unasked, "request 9"),
        ] {
            let (_control, _connections, observed, monitor) = start();
            if bytes.is_empty() {
                drop(monitor);
            } else {
                monitor.send(&bytes, &[]).await.unwrap();
            }
            let message = broken(observed).await;
            assert!(message.contains(expected), "{message}");
        }
    }

    #[tokio::test]
    async fn a_restore_brings_its_spare_connections() {
        let (control, _connections, _observed, monitor) = start();
        let restored = |spare_ports| {
            reply::Result::Restored(proto::Restored {
                spare_ports,
                ..proto::Restored::default()
            })
        };
        let file = std::fs::File::open("/dev/null").unwrap();
        let op = || request::Op::Restore(proto::Restore::default());
        let (answered, ()) = tokio::join!(control.exchange(op(), &[]), async {
            monitor.receive().await.unwrap().unwrap();
            let bytes = reply(1, restored(vec![1024, 1024]));
            monitor
                .send(&bytes, &[file.as_fd(), file.as_fd()])
                .await
                .unwrap();
        });
        assert_eq!(answered.unwrap().1.len(), 2);
        // One descriptor fewer than it names: the connection is over.
        let (answered, ()) = tokio::join!(control.exchange(op(), &[]), async {
            monitor.receive().await.unwrap().unwrap();
            let bytes = reply(2, restored(vec![1024, 1024]));
            monitor.send(&bytes, &[file.as_fd()]).await.unwrap();
        });
        assert!(matches!(answered, Err(RequestError::Closed)));
    }

    #[tokio::test]
    async fn a_flood_of_connections_is_bounded() {
        let (_control, mut connections, observed, monitor) = start();
        let file = std::fs::File::open("/dev/null").unwrap();
        let connection = event(Event::VsockConnection(proto::VsockConnection {
            host_port: 1025,
            guest_port: 1,
        }));
        for _ in 0..200 {
            monitor.send(&connection, &[file.as_fd()]).await.unwrap();
        }
        drop(monitor);
        assert_eq!(broken(observed).await, "");
        let mut kept = 0;
        while connections.recv().await.is_some() {
            kept += 1;
        }
        assert_eq!(kept, MAX_WAITING_CONNECTIONS);
    }

    mod properties {
        use proptest::prelude::*;

        use super::*;

        proptest! {
            #![proptest_config(ProptestConfig::with_cases(64))]
            /// No sequence of bytes makes the reader panic or hang.
            #[test]
            fn any_bytes_are_survived(messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..64), 0..6)) {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    let (_control, _connections, observed, monitor) = start();
                    for bytes in &messages {
                        // The reader may have hung up on an earlier one.
                        let _ = monitor.send(bytes, &[]).await;
                    }
                    drop(monitor);
                    broken(observed).await;
                });
            }
        }
    }
}
