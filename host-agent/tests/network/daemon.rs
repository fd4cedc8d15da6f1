//! A daemon in a process of its own, which kills itself at a step.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Stdio};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::{Deserialize, Serialize};
use soulbox_host::net::{LiveSlot, Mac, Network, Policy};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};

use crate::world::config;

/// What a daemon is told, in the environment.
const LIVE: &str = "SOULBOX_TEST_LIVE";

/// A sandbox's slot as a record would have it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    pub index: u32,
    pub mac: Mac,
    pub policy: Policy,
}

/// A running daemon.
pub struct Daemon {
    child: Child,
    socket: UnixStream,
}

// === impl Record ===

impl Record {
    pub fn live(&self) -> LiveSlot {
        LiveSlot {
            index: self.index,
            mac: self.mac,
            policy: self.policy.clone(),
        }
    }
}

// === impl Daemon ===

impl Daemon {
    /// One that kills itself at the step `kill_at`, given as `step:n` for the n-th
    /// time that it is there, or lives where no step is called so.
    pub fn start(kill_at: &str, live: &[Record]) -> Self {
        let (socket, theirs) = UnixStream::pair().unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--daemon", kill_at])
            .env(LIVE, serde_json::to_string(live).unwrap())
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .spawn()
            .unwrap();
        Self { child, socket }
    }

    /// Asks for a slot.
    pub fn take(&self) -> (Record, OwnedFd) {
        rustix::net::send(&self.socket, b"take", SendFlags::NOSIGNAL).unwrap();
        let mut bytes = vec![0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = rustix::net::recvmsg(&self.socket, &mut parts, &mut ancillary, flags).unwrap();
        let mut fds = ancillary.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
            _ => Vec::new(),
        });
        let tap = fds.next().expect("a TAP");
        (serde_json::from_slice(&bytes[..got.bytes]).unwrap(), tap)
    }

    pub fn tell(&self, word: &str) {
        // It may be dead by now, as it was to be.
        let _ = rustix::net::send(&self.socket, word.as_bytes(), SendFlags::NOSIGNAL);
    }

    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Whether it killed itself, after having been told all that it is.
    pub fn was_killed(mut self) -> bool {
        self.tell("stop");
        let status = self.child.wait().unwrap();
        match status.signal() {
            Some(libc::SIGKILL) => true,
            None if status.success() => false,
            _ => panic!("{status}"),
        }
    }
}

/// Kills this process when it comes to a step for the n-th time.
struct Killer {
    step: String,
    left: std::sync::atomic::AtomicI64,
}

impl<S: tracing::Subscriber> Layer<S> for Killer {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        if event.metadata().target() != "soulbox_host::net::step" {
            return;
        }
        let mut is_it = false;
        event.record(
            &mut |_: &tracing::field::Field, value: &dyn std::fmt::Debug| {
                is_it = is_it || format!("{value:?}").trim_matches('"') == self.step;
            },
        );
        if is_it && self.left.fetch_sub(1, std::sync::atomic::Ordering::SeqCst) == 1 {
            let own = rustix::process::getpid();
            rustix::process::kill_process(own, rustix::process::Signal::KILL).unwrap();
            // No further step, whatever thread the signal meets first.
            loop {
                std::thread::park();
            }
        }
    }
}

pub fn main(kill_at: &str) -> ! {
    let (step, left) = kill_at.split_once(':').unwrap_or((kill_at, "1"));
    let killer = Killer {
        step: step.to_owned(),
        left: left.parse::<i64>().unwrap().into(),
    };
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(killer)).unwrap();
    let live: Vec<Record> = serde_json::from_str(&std::env::var(LIVE).unwrap()).unwrap();
    let live: Vec<LiveSlot> = live.iter().map(Record::live).collect();
    tokio::runtime::Runtime::new()
        .unwrap()
        .block_on(serve(&live));
    std::process::exit(0)
}

async fn serve(live: &[LiveSlot]) {
    let started = Network::start(&config(), live).await.unwrap();
    assert!(started.lost.is_empty(), "{:?}", started.lost);
    let network = started.network;
    let mut taken = Vec::new();
    let stdin = std::io::stdin();
    loop {
        let mut word = [0; 4];
        let got = rustix::net::recv(&stdin, &mut word[..], RecvFlags::WAITALL);
        match got.map_or(&b""[..], |(length, _)| &word[..length]) {
            b"take" => {
                let slot = network.take_or_make().await.unwrap();
                send(&slot);
                taken.push(slot);
            }
            b"free" => {
                let slot = taken.pop().unwrap();
                drop(slot.tap);
                network.release(slot.index).await.unwrap();
            }
            b"stop" => return network.stop().await,
            _ => return,
        }
    }
}

fn send(slot: &soulbox_host::net::Slot) {
    let record = Record {
        index: slot.index,
        mac: slot.mac,
        policy: Policy::default(),
    };
    let bytes = serde_json::to_vec(&record).unwrap();
    let fds = [slot.tap.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
    let parts = [IoSlice::new(&bytes)];
    let flags = SendFlags::empty();
    rustix::net::sendmsg(std::io::stdin(), &parts, &mut ancillary, flags).unwrap();
}
