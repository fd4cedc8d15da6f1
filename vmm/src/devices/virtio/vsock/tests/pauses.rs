//! Pauses of a machine that goes on in the same process.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use proptest::prelude::*;
use virtio_queue::QueueState;

use super::super::packet::Op;
use super::flow::Socket;
use super::guest::{Guest, key_of, noise, read_line};
use crate::devices::virtio::VirtioDevice as _;

const PORT: u32 = 1024;

#[test]
fn pause_loses_nothing_of_the_host() {
    let mut guest = Guest::new();
    let (key, mut client) = guest.open_from_host(5);
    let (_, leaving) = guest.open_from_host(6);
    let queues = guest.quiesce();
    let before = guest.shared_memory();
    client.write_all(b"while it slept").unwrap();
    drop(leaving);
    let mut newcomer = guest.dial("CONNECT 7\n");
    // The edges come while nothing can be done about them.
    while guest.source_is_ready() {
        guest.device.source_ready(0);
    }
    guest.device.queue_notified(0);
    guest.device.queue_notified(1);
    guest.device.open_spares(PORT, 1).unwrap();
    assert!(
        guest.shared_memory() == before,
        "it wrote to a paused guest"
    );

    guest.resume(queues);
    guest.settle();
    let mut requests = Vec::new();
    for (header, payload) in std::mem::take(&mut guest.received) {
        match Op::from_wire(header.op).unwrap() {
            Op::Data => {
                assert_eq!(key_of(&header), key);
                assert_eq!(payload, b"while it slept");
            }
            Op::Shutdown => assert_eq!(header.dst_port, 6),
            Op::Request => requests.push(key_of(&header)),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(
        requests
            .iter()
            .map(|key| key.guest_port)
            .collect::<Vec<_>>(),
        [7, PORT]
    );
    guest.send(guest.packet(requests[0], Op::Response), &[]);
    assert!(read_line(&mut newcomer).unwrap().starts_with("OK "));
}

/// As long as the device gives a guest to answer, and some.
#[test]
fn pause_is_not_counted_against_the_guest() {
    let mut guest = Guest::new();
    let mut client = guest.dial("CONNECT 7\n");
    let key = key_of(&guest.expect_op(Op::Request));
    let mut slow = guest.dial("CONN");
    guest.settle();
    let queues = guest.quiesce();
    std::thread::sleep(Duration::from_millis(5500));
    guest.resume(queues);
    slow.write_all(b"ECT 8\n").unwrap();
    guest.expect_op(Op::Request);
    guest.send(guest.packet(key, Op::Response), &[]);
    assert_eq!(
        read_line(&mut client).unwrap(),
        format!("OK {}\n", key.host_port)
    );
    assert_eq!(guest.counter("handshakes_refused"), 0);

    // A machine that stays paused has its event loop sleep.
    let _asking = guest.dial("CONNECT 7\n");
    guest.settle();
    let queues = guest.quiesce();
    std::thread::sleep(Duration::from_millis(5500));
    while guest.source_is_ready() {
        guest.device.source_ready(0);
    }
    std::thread::sleep(Duration::from_millis(100));
    assert!(!guest.source_is_ready());
    // And those that do not answer afterwards are given up all the same.
    guest.resume(queues);
    guest.wait_for(|guest| (guest.counter("connections_open") == 1).then_some(()));
}

#[derive(Clone, Copy, Debug)]
enum Step {
    /// The host writes, or reads, up to so many bytes.
    Write(usize),
    Read(usize),
    /// The guest sends, with or without a notification.
    Send(usize, bool),
    Take,
    Turn,
    Quiesce,
    Resume,
    Refill(bool),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (1..100_000usize).prop_map(Step::Write),
        (1..200_000usize).prop_map(Step::Read),
        (1..65_000usize, any::<bool>()).prop_map(|(len, notify)| Step::Send(len, notify)),
        Just(Step::Take),
        Just(Step::Turn),
        Just(Step::Quiesce),
        Just(Step::Resume),
        any::<bool>().prop_map(Step::Refill),
    ]
}

/// One stream between a guest and its host, with all that has gone into it.
struct Talk {
    guest: Guest,
    client: UnixStream,
    socket: Socket,
    data: Vec<u8>,
    written: usize,
    sent: usize,
    read: Vec<u8>,
    /// The queues and memory of a guest that stands still.
    paused: Option<(Vec<QueueState>, Vec<u8>)>,
}

// === impl Talk ===

impl Talk {
    fn new() -> Self {
        let mut guest = Guest::new();
        let (key, client) = guest.open_from_host(5);
        client.set_nonblocking(true).unwrap();
        let mut socket = Socket::new(key, 50_000);
        socket.learn_credit(&mut guest);
        Self {
            guest,
            client,
            socket,
            data: noise(1 << 20),
            written: 0,
            sent: 0,
            read: Vec::new(),
            paused: None,
        }
    }

    fn play(&mut self, step: Step) {
        let runs = self.paused.is_none();
        match step {
            Step::Write(len) => {
                let end = self.data.len().min(self.written + len);
                let more = &self.data[self.written..end];
                self.written += self.client.write(more).unwrap_or(0);
            }
            Step::Read(len) => {
                let mut bytes = vec![0; len];
                let len = self.client.read(&mut bytes).unwrap_or(0);
                self.read.extend(&bytes[..len]);
            }
            Step::Send(len, notify) if runs => {
                if self.guest.tx_in_flight() > 100 {
                    self.guest.device.queue_notified(1);
                }
                let end = self.data.len().min(self.sent + len);
                let more = &self.data[self.sent..end];
                self.sent += if notify {
                    self.socket.send(&mut self.guest, more)
                } else {
                    self.socket.queue(&mut self.guest, more)
                };
            }
            Step::Take if runs => self.take(),
            Step::Turn if runs => {
                self.guest.turn();
            }
            Step::Turn if self.guest.source_is_ready() => self.guest.device.source_ready(0),
            Step::Quiesce if runs => {
                let queues = self.guest.quiesce();
                self.paused = Some((queues, self.guest.shared_memory()));
            }
            Step::Resume => {
                if let Some((queues, memory)) = self.paused.take() {
                    assert!(self.guest.shared_memory() == memory);
                    self.guest.resume(queues);
                }
            }
            Step::Refill(refill) if runs => {
                self.guest.refill = refill;
                if refill {
                    self.guest.offer_all_rx();
                }
            }
            Step::Send(..) | Step::Take | Step::Turn | Step::Quiesce | Step::Refill(_) => {}
        }
    }

    fn take(&mut self) {
        if self.guest.tx_in_flight() > 100 {
            self.guest.device.queue_notified(1);
        }
        self.socket.take(&mut self.guest);
    }

    /// Lets all that is on its way arrive.
    fn finish(&mut self) {
        self.play(Step::Resume);
        self.play(Step::Refill(true));
        self.guest.device.queue_notified(1);
        for _ in 0..100_000 {
            if self.read.len() == self.sent && self.socket.received.len() == self.written {
                break;
            }
            self.play(Step::Turn);
            self.play(Step::Take);
            self.play(Step::Read(200_000));
        }
        assert!(self.read == self.data[..self.sent], "to the host");
        assert!(
            self.socket.received == self.data[..self.written],
            "to the guest"
        );
        assert_eq!(self.guest.counter("connections_open"), 1);
        assert_eq!(self.guest.counter("connections_reset"), 0);
        assert_eq!(self.guest.counter("invalid_packets"), 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 60,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn pauses_disturb_no_stream(steps in prop::collection::vec(step(), 1..120)) {
        let mut talk = Talk::new();
        for step in steps {
            talk.play(step);
        }
        talk.finish();
    }
}
