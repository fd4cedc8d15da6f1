//! A monitor without a machine. How it behaves is written behind the headers
//! of the kernel that it is given, and in the file `fault` of the test's host.
//!
//! Its guest's memory is one word, its disk the words in its layers.

use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use prost::Message as _;
use serde::{Deserialize, Serialize};
use soulbox_host::monitor::{ControlSocket, Datagram};
use soulbox_proto::guest::READY_PORT;
use soulbox_proto::guest::v1::Hello;
use soulbox_proto::vmm::v1::{
    self as proto, FromMonitor, error::Code, event::Event, from_monitor, reply, request,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, watch};

use crate::agent;

/// Prints to the log, also when its disk is full.
macro_rules! log {
    ($($what:tt)*) => {
        let _ = std::io::Write::write_fmt(&mut std::io::stdout(), format_args!("{}\n", format_args!($($what)*)));
    };
}
pub(crate) use log;

pub const CONSOLE: &[u8] = b"[    0.000000] Linux version of the test\n";
/// Where the guest's word lies in its memory.
const WORD_OFFSET: u64 = 4096;
const MAX_SPARES: u32 = 16;

/// Ways out of the fake machine, for the agent in it.
#[derive(Clone)]
pub struct Machine {
    control: Arc<Mutex<Arc<ControlSocket>>>,
    pub behaviour: Arc<str>,
    guest: Arc<Mutex<Guest>>,
    /// Whether vCPUs run, and programs may.
    pub runs: Arc<watch::Sender<Runs>>,
    /// How often code was interrupted.
    pub interrupts: Arc<watch::Sender<u32>>,
    connections: mpsc::Sender<std::io::Result<UnixStream>>,
}

#[derive(Clone, Copy)]
pub struct Runs {
    pub machine: bool,
    pub programs: bool,
}

struct Guest {
    /// What a snapshot holds of it.
    state: State,
    word: String,
    memory_layers: usize,
    frozen: Vec<std::fs::File>,
    top: std::fs::File,
    balloon_mib: u32,
}

/// The file `snapshot`.
#[derive(Serialize, Deserialize)]
struct State {
    behaviour: String,
    vcpus: u32,
    memory_mib: u32,
    memory_layers: usize,
    disk_layers: usize,
    spares: u32,
}

const MAGIC: &str = "FAKE1 ";

/// What a test wants to go wrong at `step`: "die", "hang", or a word of the
/// step's own. Written into the file `fault` of its host as "step:what".
async fn fault(step: &str) -> Option<String> {
    let log = std::fs::read_link("/proc/self/fd/1").ok()?;
    let state = log.ancestors().find(|folder| folder.ends_with("state"))?;
    let wanted = std::fs::read_to_string(state.parent()?.join("fault")).ok()?;
    let (at, what) = wanted.trim().split_once(':')?;
    if at != step {
        return None;
    }
    log!("fault: {wanted}");
    // Tells the test that it is here.
    let here: PathBuf = state.parent()?.join("here");
    std::fs::write(here, step).unwrap();
    match what {
        "die" => std::process::exit(1),
        "hang" => std::future::pending().await,
        other => Some(other.to_owned()),
    }
}

/// As [`fault`], for the agent.
pub async fn fault_in_guest(step: &str) -> Option<String> {
    fault(step).await
}

pub fn main() -> ! {
    // The real one is called so; soulboxd finds strays by it.
    std::fs::write("/proc/self/comm", "soulbox-vmm").unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(run());
    std::process::exit(0);
}

/// A request's descriptors.
struct Fds(Vec<Option<OwnedFd>>);

impl Fds {
    fn take(&mut self, index: u32) -> OwnedFd {
        self.0[usize::try_from(index).unwrap()].take().unwrap()
    }

    fn file(&mut self, index: u32) -> std::fs::File {
        self.take(index).into()
    }
}

async fn receive(control: &ControlSocket) -> Option<(u64, request::Op, Fds)> {
    let Datagram { bytes, fds } = control.receive().await.ok()??;
    let request = proto::Request::decode(bytes.as_slice()).unwrap();
    let fds = Fds(fds.into_iter().map(Some).collect());
    Some((request.id, request.op.unwrap(), fds))
}

async fn run() {
    let mut args = std::env::args().skip_while(|arg| arg != "--control-fd");
    let number = args.nth(1).unwrap().parse().unwrap();
    // SAFETY: soulboxd starts a monitor with its control socket as the descriptor
    // that it names, and nothing in this process has touched it before.
    let control = unsafe { OwnedFd::from_raw_fd(number) };
    let control = Arc::new(ControlSocket::new(control).unwrap());
    let mut shape = None;
    // A shell ends with its daemon.
    while let Some((id, op, fds)) = receive(&control).await {
        match op {
            request::Op::Prepare(prepare) => {
                if fault("prepare").await.is_some() {
                    let refused = error(Code::Kvm, "no KVM for a shell");
                    send_reply(&control, id, refused, &[]).await;
                    return;
                }
                let wanted = prepare.shape.unwrap();
                assert!(wanted.vsock && wanted.block_devices == 1);
                assert!(
                    shape
                        .replace((wanted.vcpu_count, wanted.memory_mib))
                        .is_none()
                );
                let prepared = reply::Result::Prepared(proto::Prepared { stages: Vec::new() });
                send_reply(&control, id, prepared, &[]).await;
            }
            request::Op::Boot(boot) => return booted(control, id, boot, fds).await,
            request::Op::Restore(restore) => {
                return restored(control, id, restore, fds, shape).await;
            }
            other => panic!("not Boot: {other:?}"),
        }
    }
}

async fn send_reply(
    control: &ControlSocket,
    id: u64,
    result: reply::Result,
    fds: &[BorrowedFd<'_>],
) {
    let reply = proto::Reply {
        id,
        result: Some(result),
    };
    let message = FromMonitor {
        message: Some(from_monitor::Message::Reply(reply)),
    };
    // The daemon may be away.
    let _ = control.send(&message.encode_to_vec(), fds).await;
}

fn error(code: Code, message: &str) -> reply::Result {
    reply::Result::Error(proto::Error {
        code: code.into(),
        message: message.to_owned(),
    })
}

fn stage(stage: &str) -> proto::StageTime {
    proto::StageTime {
        stage: stage.to_owned(),
        duration_ns: 1_000_000,
    }
}

async fn booted(control: Arc<ControlSocket>, id: u64, boot: proto::Boot, mut fds: Fds) {
    let mut kernel = Vec::new();
    fds.file(boot.kernel_fd).read_to_end(&mut kernel).unwrap();
    let behaviour = String::from_utf8_lossy(&kernel[120..]).into_owned();
    let config = boot.machine.unwrap();
    let disk = &config.block_devices[0];
    assert_eq!(disk.size_bytes % 4096, 0);
    fds.take(disk.base_fd);
    let top = fds.file(disk.layer_fd.unwrap());
    assert_eq!(top.metadata().unwrap().len(), 0);
    fds.take(boot.kvm_fd);
    fds.take(boot.pagemap_fd.unwrap());
    let vsock = fds.take(config.vsock.unwrap().listener_fd);
    let takeover = fds.take(boot.control_listener_fd.unwrap());
    let guest = Guest {
        state: State {
            behaviour,
            vcpus: config.vcpu_count,
            memory_mib: config.memory_mib,
            memory_layers: 0,
            disk_layers: 0,
            spares: 0,
        },
        word: "-".to_owned(),
        memory_layers: 0,
        frozen: Vec::new(),
        top,
        balloon_mib: 0,
    };
    let runs = Runs {
        machine: true,
        programs: true,
    };
    let (machine, incoming) = Machine::new(&control, guest, runs);
    if &*machine.behaviour == "refuse" {
        let refused = error(Code::Kernel, "the kernel is of no use");
        machine.reply(id, refused, &[]).await;
        return;
    }
    let booted = proto::Booted {
        stages: vec![stage("machine")],
        started_at_ns: 1,
    };
    machine.reply(id, reply::Result::Booted(booted), &[]).await;
    match &*machine.behaviour {
        "emulation" => machine.exit(proto::exited::Reason::EmulationFailed).await,
        "die" => std::process::exit(1),
        _ => {}
    }
    if &*machine.behaviour != "mute" {
        machine.say_hello().await;
    }
    machine.serve(control, vsock, takeover, incoming).await;
}

async fn restored(
    control: Arc<ControlSocket>,
    id: u64,
    restore: proto::Restore,
    mut fds: Fds,
    shape: Option<(u32, u32)>,
) {
    if let Some(what) = fault("restore").await {
        let refused = match what.as_str() {
            "cpu" => error(Code::Cpu, "this host's CPU lacks avx512f"),
            _ => error(Code::Host, "as the test wants it"),
        };
        return send_reply(&control, id, refused, &[]).await;
    }
    let damaged = |what: &str| error(Code::Snapshot, &format!("the state {what}"));
    let mut bytes = String::new();
    fds.file(restore.state_fd)
        .read_to_string(&mut bytes)
        .unwrap();
    let state: Option<State> = bytes
        .strip_prefix(MAGIC)
        .and_then(|json| serde_json::from_str(json).ok());
    let Some(mut state) = state else {
        return send_reply(&control, id, damaged("is damaged"), &[]).await;
    };
    let [disk] = &restore.disks[..] else {
        panic!("not one disk: {restore:?}");
    };
    if restore.memory_fds.len() != state.memory_layers
        || disk.frozen_layer_fds.len() != state.disk_layers
    {
        return send_reply(&control, id, damaged("needs other layers"), &[]).await;
    }
    // A shell has KVM already.
    assert_eq!(restore.kvm_fd.is_none(), shape.is_some());
    if let Some(shape) = shape {
        assert_eq!(shape, (state.vcpus, state.memory_mib));
    }
    let mut word = vec![0; 64];
    let memory: Vec<std::fs::File> = restore.memory_fds.iter().map(|fd| fds.file(*fd)).collect();
    for layer in &memory {
        let size = u64::from(state.memory_mib) << 20;
        assert_eq!(layer.metadata().unwrap().len(), size);
        layer.read_exact_at(&mut word, WORD_OFFSET).unwrap();
    }
    let word = String::from_utf8(word).unwrap();
    fds.take(disk.base_fd);
    let frozen = disk.frozen_layer_fds.iter().map(|fd| fds.file(*fd));
    let frozen = frozen.collect();
    let top = fds.file(disk.layer_fd.unwrap());
    assert_eq!(top.metadata().unwrap().len(), 0);
    fds.take(restore.pagemap_fd.unwrap());
    let vsock = fds.take(restore.vsock_listener_fd.unwrap());
    let takeover = fds.take(restore.control_listener_fd.unwrap());
    let spares = std::mem::take(&mut state.spares);
    let guest = Guest {
        state,
        word: word.trim_end_matches('\0').to_owned(),
        memory_layers: memory.len(),
        frozen,
        top,
        balloon_mib: 0,
    };
    // Its programs stand still until it is configured.
    let runs = Runs {
        machine: true,
        programs: false,
    };
    let (machine, incoming) = Machine::new(&control, guest, runs);
    let mut hosts = Vec::new();
    for _ in 0..spares {
        let (guest, host) = std::os::unix::net::UnixStream::pair().unwrap();
        guest.set_nonblocking(true).unwrap();
        let guest = UnixStream::from_std(guest).unwrap();
        machine.connections.send(Ok(guest)).await.unwrap();
        hosts.push(host);
    }
    log!("restored with {} spares", hosts.len());
    let restored = proto::Restored {
        stages: vec![stage("memory"), stage("state"), stage("start")],
        started_at_ns: 1,
        spare_ports: vec![1024; hosts.len()],
    };
    let hosts: Vec<BorrowedFd<'_>> = hosts.iter().map(|host| host.as_fd()).collect();
    let restored = reply::Result::Restored(restored);
    machine.reply(id, restored, &hosts).await;
    machine.serve(control, vsock, takeover, incoming).await;
}

// === impl Machine ===

impl Machine {
    fn new(
        control: &Arc<ControlSocket>,
        guest: Guest,
        runs: Runs,
    ) -> (Self, mpsc::Receiver<std::io::Result<UnixStream>>) {
        let (connections, incoming) = mpsc::channel(32);
        let machine = Self {
            control: Arc::new(Mutex::new(Arc::clone(control))),
            behaviour: guest.state.behaviour.as_str().into(),
            guest: Arc::new(Mutex::new(guest)),
            runs: Arc::new(watch::Sender::new(runs)),
            interrupts: Arc::default(),
            connections,
        };
        (machine, incoming)
    }

    async fn serve(
        self,
        control: Arc<ControlSocket>,
        vsock: OwnedFd,
        takeover: OwnedFd,
        incoming: mpsc::Receiver<std::io::Result<UnixStream>>,
    ) {
        tokio::spawn(accept_clients(self.clone(), takeover));
        tokio::spawn(agent::serve(self.clone(), incoming));
        tokio::spawn(serve_vsock(self.clone(), vsock.into()));
        tokio::spawn(serve_control(self, control));
        std::future::pending::<()>().await;
    }

    /// Waits until what a guest does can happen.
    pub async fn wait_for(&self, runs: impl FnMut(&Runs) -> bool) {
        self.runs.subscribe().wait_for(runs).await.unwrap();
    }

    /// The guest's one word of memory.
    pub fn word(&self) -> String {
        self.guest.lock().unwrap().word.clone()
    }

    pub fn set_word(&self, word: &str) {
        word.clone_into(&mut self.guest.lock().unwrap().word);
    }

    /// Appends a word to the disk.
    pub fn write(&self, word: &str) {
        let mut guest = self.guest.lock().unwrap();
        writeln!(guest.top, "{word}").unwrap();
    }

    /// All words on the disk.
    pub fn read(&self) -> String {
        let guest = self.guest.lock().unwrap();
        let layers = guest.frozen.iter().chain([&guest.top]);
        layers.map(content).collect()
    }

    async fn send(&self, message: from_monitor::Message, fds: &[BorrowedFd<'_>]) {
        let control = Arc::clone(&self.control.lock().unwrap());
        let message = FromMonitor {
            message: Some(message),
        };
        // The daemon may be away.
        let _ = control.send(&message.encode_to_vec(), fds).await;
    }

    async fn event(&self, event: Event, fds: &[BorrowedFd<'_>]) {
        let event = proto::Event { event: Some(event) };
        self.send(from_monitor::Message::Event(event), fds).await;
    }

    async fn reply(&self, id: u64, result: reply::Result, fds: &[BorrowedFd<'_>]) {
        let control = Arc::clone(&self.control.lock().unwrap());
        send_reply(&control, id, result, fds).await;
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

    async fn snapshot(&self, snapshot: proto::Snapshot, mut fds: Fds) -> reply::Result {
        let ran = self.runs.borrow().machine;
        self.runs.send_modify(|runs| runs.machine = false);
        let refused = match fault("snapshot").await.as_deref() {
            Some("full") => Some(error(Code::DiskFull, "no space for the memory")),
            Some(_) => Some(error(Code::Host, "as the test wants it")),
            None => None,
        };
        if let Some(refused) = refused {
            self.runs.send_modify(|runs| runs.machine = ran);
            return refused;
        }
        let mut state = fds.file(snapshot.state_fd);
        let memory = fds.file(snapshot.memory_fd);
        let [disk] = &snapshot.disks[..] else {
            panic!("not one disk: {snapshot:?}");
        };
        let next = fds.file(disk.next_layer_fd.unwrap());
        assert_eq!(next.metadata().unwrap().len(), 0);
        let memory_layers = 1 + usize::try_from(snapshot.keep_memory_layers).unwrap();
        let written = {
            let mut guest = self.guest.lock().unwrap();
            guest.write_snapshot(memory_layers, &mut state, &memory, disk, next, &mut fds)
        };
        if written.is_err() {
            self.runs.send_modify(|runs| runs.machine = ran);
            return error(Code::DiskFull, "no space for the snapshot");
        }
        // The machine writes to its next layer from here on.
        fault("swapped").await;
        self.runs
            .send_modify(|runs| runs.machine = !snapshot.leave_paused);
        reply::Result::Snapshotted(proto::Snapshotted {
            stages: vec![stage("memory")],
            paused_ns: 2_000_000,
            memory_bytes: 4096,
            memory_layers: u32::try_from(memory_layers).unwrap(),
            memory_runs: 1,
        })
    }

    async fn resume(&self) -> reply::Result {
        if self.runs.borrow().machine {
            return error(Code::WrongState, "the machine runs");
        }
        fault("resume").await;
        self.runs.send_modify(|runs| runs.machine = true);
        reply::Result::Resumed(proto::Resumed { started_at_ns: 1 })
    }

    async fn open_spares(&self, open: &proto::OpenSpares) -> reply::Result {
        fault("spares").await;
        assert_eq!(open.guest_port, 1024);
        let mut guest = self.guest.lock().unwrap();
        if open.count > MAX_SPARES {
            return error(Code::Invalid, "too many spares");
        }
        guest.state.spares = guest.state.spares.max(open.count);
        reply::Result::SparesOpened(proto::SparesOpened {})
    }

    fn metrics(&self) -> reply::Result {
        let guest = self.guest.lock().unwrap();
        let counters = |name: &str, value: u64| proto::Counters {
            values: [(name.to_owned(), value)].into(),
        };
        reply::Result::Metrics(proto::Metrics {
            memory: Some(proto::MemoryMetrics {
                guest_bytes: u64::from(guest.state.memory_mib) << 20,
                guest_private_bytes: 4096,
            }),
            devices: [
                (
                    "block.root".to_owned(),
                    counters("layers", guest.frozen.len() as u64 + 1),
                ),
                (
                    "balloon".to_owned(),
                    counters("actual_mib", guest.balloon_mib.into()),
                ),
            ]
            .into(),
            console_tail: CONSOLE.to_vec(),
            ..proto::Metrics::default()
        })
    }
}

impl Guest {
    /// Nothing has changed when it fails.
    fn write_snapshot(
        &mut self,
        memory_layers: usize,
        state: &mut std::fs::File,
        memory: &std::fs::File,
        disk: &proto::SnapshotDisk,
        next: std::fs::File,
        fds: &mut Fds,
    ) -> std::io::Result<()> {
        assert!(memory_layers <= self.memory_layers + 1);
        memory.set_len(u64::from(self.state.memory_mib) << 20)?;
        let mut word = self.word.clone().into_bytes();
        word.resize(64, 0);
        memory.write_all_at(&word, WORD_OFFSET)?;
        let keep = usize::try_from(disk.keep).unwrap();
        let merged = disk.merged_layer_fd.map(|merged| fds.file(merged));
        if let Some(mut merged) = merged.as_ref() {
            let rest = self.frozen[keep..].iter().chain([&self.top]);
            let rest: String = rest.map(content).collect();
            merged.write_all(rest.as_bytes())?;
        }
        self.state.memory_layers = memory_layers;
        self.state.disk_layers = keep + 1;
        let json = serde_json::to_string(&self.state).unwrap();
        state.write_all(format!("{MAGIC}{json}").as_bytes())?;
        let top = std::mem::replace(&mut self.top, next);
        match merged {
            Some(merged) => {
                self.frozen.truncate(keep);
                self.frozen.push(merged);
            }
            None => self.frozen.push(top),
        }
        assert_eq!(self.frozen.len(), keep + 1);
        Ok(())
    }
}

fn content(layer: &std::fs::File) -> String {
    let mut bytes = vec![0; usize::try_from(layer.metadata().unwrap().len()).unwrap()];
    layer.read_exact_at(&mut bytes, 0).unwrap();
    String::from_utf8(bytes).unwrap()
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
    while let Some((id, op, mut fds)) = receive(&control).await {
        let result = match op {
            request::Op::Shutdown(_) if &*machine.behaviour == "stubborn" => continue,
            request::Op::Shutdown(_) => {
                let gone = reply::Result::ShuttingDown(proto::ShuttingDown {});
                machine.reply(id, gone, &[]).await;
                machine.exit(proto::exited::Reason::Forced).await
            }
            request::Op::Snapshot(snapshot) => machine.snapshot(snapshot, fds).await,
            request::Op::Resume(_) => machine.resume().await,
            request::Op::OpenSpares(open) => machine.open_spares(&open).await,
            request::Op::SetBalloon(set) => {
                let mut guest = machine.guest.lock().unwrap();
                assert!(set.target_mib < guest.state.memory_mib);
                log!("balloon: {}", set.target_mib);
                guest.balloon_mib = set.target_mib;
                reply::Result::BalloonSet(proto::BalloonSet {})
            }
            request::Op::RecordWorkingSet(record) => {
                fds.file(record.file_fd).write_all(b"working set").unwrap();
                reply::Result::WorkingSetRecorded(proto::WorkingSetRecorded { bytes: 11 })
            }
            request::Op::GetMetrics(_) => machine.metrics(),
            request::Op::SetNet(_) => error(Code::WrongState, "there is no network device"),
            request::Op::Boot(_) | request::Op::Prepare(_) | request::Op::Restore(_) => {
                error(Code::WrongState, "the machine is there")
            }
        };
        machine.reply(id, result, &[]).await;
    }
}

async fn serve_vsock(machine: Machine, listener: StdUnixListener) {
    listener.set_nonblocking(true).unwrap();
    let listener = UnixListener::from_std(listener).unwrap();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let machine = machine.clone();
        tokio::spawn(async move {
            machine.wait_for(|runs| runs.machine).await;
            if let Ok(stream) = handshake(stream).await {
                machine.connections.send(Ok(stream)).await.unwrap();
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
    log!("dialled");
    Ok(stream)
}
