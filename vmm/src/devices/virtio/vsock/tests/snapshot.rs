//! Pauses, snapshots and clones.

use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use proptest::prelude::*;
use virtio_queue::QueueState;

use super::super::packet::{Header, Key, Op};
use super::super::{
    BUF_ALLOC_BYTES, CreditState, MAX_CONNECTIONS, MAX_SPARES, MAX_UNREAD_BYTES, Ports,
    SMALL_BUF_ALLOC_BYTES, SpareState, VsockState,
};
use super::flow::Socket;
use super::guest::{GUEST_CID, Guest, QUEUE_SIZE, noise, read_line, read_now};
use crate::devices::StateError;
use crate::devices::virtio::{ChipState, VirtioDevice as _};

const PORT: u32 = 1024;
const FIRST_HOST_PORT: u32 = 1 << 30;

const KEY: Key = Key {
    host_port: 52,
    guest_port: 7,
};

/// What an HTTP/2 server sends at once.
const SETTINGS: &[u8] = b"\0\0\x06\x04\0\0\0\0\0\0\x03\0\0\0\x64";

/// The keys of the RSTs that a guest gets until it is quiet.
fn resets(guest: &mut Guest) -> Vec<Key> {
    guest.settle();
    let resets = guest.received.drain(..).map(|(header, _)| {
        assert_eq!(header.op, Op::Reset as u16, "{header:?}");
        assert_eq!(header.src_cid, 2);
        Key {
            host_port: header.src_port,
            guest_port: header.dst_port,
        }
    });
    let mut resets: Vec<_> = resets.collect();
    resets.sort();
    resets
}

fn ports(keys: &[Key]) -> Vec<Ports> {
    keys.iter().map(|key| (*key).into()).collect()
}

#[test]
fn spare_goes_on_in_a_clone() {
    let mut guest = Guest::new();
    let keys = guest.open_spares(PORT, 2);
    guest.send_data(keys[0], SETTINGS);
    let saved = guest.save();
    assert_eq!(saved.state.lost, []);
    let unread: Vec<_> = saved.state.spares.iter().map(|it| &it.unread[..]).collect();
    assert_eq!(unread, [SETTINGS, b""]);

    let (mut clone, spares) = Guest::restored(&saved);
    for spare in &spares {
        assert_eq!(spare.guest_port, PORT);
        let flags = rustix::io::fcntl_getfd(&spare.stream).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
        let flags = rustix::fs::fcntl_getfl(&spare.stream).unwrap();
        assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK));
    }
    let mut streams = spares
        .into_iter()
        .map(|spare| UnixStream::from(spare.stream));
    let (mut first, mut second) = (streams.next().unwrap(), streams.next().unwrap());
    assert!(streams.next().is_none());
    clone.resume_as(&saved);
    clone.assert_quiet();

    let mut settings = [0; SETTINGS.len()];
    first.read_exact(&mut settings).unwrap();
    assert_eq!(settings, SETTINGS);
    for (key, stream) in keys.iter().zip([&mut first, &mut second]) {
        assert_eq!(read_now(stream), None);
        stream.write_all(b"request").unwrap();
        let (header, payload) = clone.expect();
        assert_eq!(Key::from(ports_of(&header)), *key);
        assert_eq!(payload, b"request");
        clone.send_data(*key, b"answer");
        let mut answer = [0; 6];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"answer");
    }
    // The credit counts what the guest has sent since the beginning.
    clone.send(clone.packet(keys[0], Op::CreditRequest), &[]);
    let update = clone.expect_op(Op::CreditUpdate);
    assert_eq!(update.fwd_cnt as usize, SETTINGS.len() + 6);

    // The guest learns when the host closes.
    drop(first);
    clone.expect_op(Op::Shutdown);
    assert_eq!(guest.counter("spares_open"), 2, "the parent has its own");
}

fn ports_of(header: &Header) -> Ports {
    Ports {
        host_port: header.src_port,
        guest_port: header.dst_port,
    }
}

#[test]
fn request_lies_in_the_ring_before_the_guest_runs() {
    let mut guest = Guest::new();
    guest.open_spares(PORT, 1);
    let saved = guest.save();

    // Written before the transport resumes the device, and after.
    let (mut clone, spares) = Guest::restored(&saved);
    let mut stream = UnixStream::from(spares.into_iter().next().unwrap().stream);
    stream.write_all(b"early").unwrap();
    // The event loop may look meanwhile.
    assert!(clone.source_is_ready());
    clone.device.source_ready(0);
    clone.resume_as(&saved);
    clone.drain_rx();
    assert_eq!(clone.received.pop_front().unwrap().1, b"early");
    let interrupts = clone.interrupt.irqfd().read();
    assert_eq!(interrupts.unwrap(), 1);

    stream.write_all(b"late").unwrap();
    clone.device.source_ready(0);
    clone.drain_rx();
    assert_eq!(clone.received.pop_front().unwrap().1, b"late");
}

#[test]
fn exhausted_credit_is_kept() {
    let mut guest = Guest::new();
    let key = guest.open_spares(PORT, 1)[0];
    let mut update = guest.packet(key, Op::CreditUpdate);
    update.buf_alloc = 5000;
    guest.send(update, &[]);
    let saved = guest.save();
    let (mut clone, mut streams) = Guest::clone_of(&saved);
    let data = noise(9000);
    streams[0].write_all(&data).unwrap();
    let (first, second) = (clone.expect().1, clone.expect().1);
    assert_eq!([first, second].concat(), data[..5000]);
    clone.expect_op(Op::CreditRequest);
    clone.assert_quiet();
    update.fwd_cnt = 5000;
    clone.send(update, &[]);
    assert_eq!(clone.expect().1, data[5000..]);
    clone.assert_quiet();
}

#[test]
fn counters_wrap_in_a_clone() {
    let mut guest = Guest::new();
    let key = guest.open_spares(PORT, 1)[0];
    guest.send_data(key, SETTINGS);
    let mut saved = guest.save();
    let at = u32::MAX - 9;
    saved.state.spares[0].credit = CreditState {
        buf_alloc_bytes: BUF_ALLOC_BYTES,
        // Five bytes are not forwarded yet.
        received: at,
        forwarded: at - 5,
        announced: at - 10,
        peer_buf_alloc_bytes: 30,
        sent: at,
        peer_forwarded: at - 10,
    };
    let (mut clone, mut streams) = Guest::clone_of(&saved);
    streams[0].write_all(&[7; 100]).unwrap();
    let (header, payload) = clone.expect();
    assert_eq!(payload, [7; 20]);
    assert_eq!(header.fwd_cnt, at, "all is with the host now");
    clone.expect_op(Op::CreditRequest);

    let mut sent = at;
    let data = noise(1 << 20);
    let mut received = Vec::new();
    for chunk in data.chunks(32 << 10) {
        let mut header = clone.packet(key, Op::Data);
        header.len = 32 << 10;
        // Nothing more may come to the guest.
        header.buf_alloc = 0;
        clone.send(header, chunk);
        sent = sent.wrapping_add(header.len);
        received.extend(read_now(&streams[0]).unwrap());
    }
    assert!(received == [SETTINGS, &data].concat());
    clone.settle();
    let last = clone.received.pop_back().unwrap().0;
    assert_eq!(last.op, Op::CreditUpdate as u16);
    assert!(sent.wrapping_sub(last.fwd_cnt) < BUF_ALLOC_BYTES / 4);
    assert_eq!(clone.counter("connections_reset"), 0);
}

#[test]
fn unread_bytes_are_kept_in_order_wherever_they_wait() {
    let mut guest = Guest::new();
    let key = guest.open_spares(PORT, 1)[0];
    // In packets so small that the socket is full of their overhead.
    let data = noise(MAX_UNREAD_BYTES);
    for chunk in data.chunks(32) {
        guest.send_data(key, chunk);
    }
    assert!(guest.counter("buffered_bytes") > 0);
    let saved = guest.save();
    let spare = &saved.state.spares[0];
    assert!(spare.unread == data);
    assert_ne!(spare.credit.received, spare.credit.forwarded);

    let (mut clone, mut streams) = Guest::clone_of(&saved);
    assert_eq!(clone.counter("buffered_bytes"), 0);
    // More follows what waits.
    clone.send_data(key, b"more");
    let mut read = vec![0; data.len() + 4];
    streams[0].read_exact(&mut read).unwrap();
    assert!(read == [&data[..], b"more"].concat());
    assert_eq!(read_now(&streams[0]), None);

    // One byte more is too much, for the parent's next snapshot.
    guest.send_data(key, b"1");
    let saved = guest.save();
    assert_eq!(saved.state.spares, []);
    assert_eq!(saved.state.lost, ports(&[key]));
    assert_eq!(guest.counter("spares_open"), 1);
}

#[test]
fn clones_of_one_state_are_independent() {
    let mut guest = Guest::new();
    let key = guest.open_spares(PORT, 1)[0];
    guest.send_data(key, SETTINGS);
    let saved = guest.save();
    let mut clones: Vec<_> = (0..2).map(|_| Guest::clone_of(&saved)).collect();
    for (name, (clone, streams)) in clones.iter_mut().enumerate() {
        let mut settings = [0; SETTINGS.len()];
        streams[0].read_exact(&mut settings).unwrap();
        streams[0].write_all(&[name as u8]).unwrap();
        assert_eq!(clone.expect().1, [name as u8]);
        clone.send_data(key, &[name as u8]);
    }
    for (name, (clone, streams)) in clones.iter_mut().enumerate() {
        assert_eq!(read_now(&streams[0]), Some(vec![name as u8]));
        clone.assert_quiet();
    }
    let (first, _) = clones.remove(0);
    drop(first);
    let (second, mut streams) = clones.remove(0);
    streams[0].write_all(b"on").unwrap();
    let mut second = second;
    assert_eq!(second.expect().1, b"on");
    guest.assert_quiet();

    // A clone's connection is no spare of its own snapshots.
    let saved = second.save();
    assert_eq!(saved.state.spares, []);
    assert_eq!(saved.state.lost, ports(&[key]));
}

#[test]
fn clone_is_told_that_all_else_is_lost() {
    let mut guest = Guest::new();
    let (from_host, _client) = guest.open_from_host(5);
    let _stream = guest.open_from_guest(KEY);
    let spare = guest.open_spares(PORT, 1)[0];
    // Half closed by the host.
    let (half_shut, half) = guest.open_from_host(6);
    half.shutdown(std::net::Shutdown::Write).unwrap();
    guest.expect_op(Op::Shutdown);
    // Asked for, and not answered: one of them a spare one.
    let _asking = guest.dial("CONNECT 8\n");
    let asked = ports_of(&guest.expect_op(Op::Request));
    guest.device.open_spares(PORT, 1).unwrap();
    let spare_asked = ports_of(&guest.expect_op(Op::Request));
    // A client whose request the guest has not seen, and RSTs that wait.
    guest.refill = false;
    fill_up(&mut guest, from_host);
    let _unheard = guest.dial("CONNECT 9\n");
    guest.settle();
    let stray = Key {
        host_port: 1,
        guest_port: 2,
    };
    for _ in 0..3 {
        guest.send(guest.packet(stray, Op::Data), &[]);
    }
    let elsewhere = Header {
        dst_cid: 99,
        ..guest.packet(stray, Op::Data)
    };
    guest.send(elsewhere, &[]);
    // Accepted, and the guest has no buffer for the answer; over, likewise.
    let accepted = Key {
        guest_port: 8,
        ..KEY
    };
    guest.send(guest.packet(accepted, Op::Request), &[]);
    let over = guest.packet(from_host, Op::Request);
    guest.send(over, &[]);
    assert_eq!(guest.counter("connections_open"), 8);

    let saved = guest.save();
    assert_eq!(saved.state.spares.len(), 1);
    assert_eq!(saved.state.spares[0].ports, Ports::from(spare));
    let mut lost = vec![
        from_host,
        KEY,
        half_shut,
        asked.into(),
        spare_asked.into(),
        stray,
        accepted,
    ];
    lost.sort();
    assert_eq!(saved.state.lost, ports(&lost));

    let (mut clone, _spares) = Guest::clone_of(&saved);
    clone.refill = true;
    clone.offer_all_rx();
    clone.received.clear();
    clone.settle();
    clone
        .received
        .retain(|(header, _)| header.op != Op::Data as u16);
    assert_eq!(resets(&mut clone), lost);
    assert_eq!(clone.counter("connections_open"), 1);
    // All ports are free again.
    let _stream = clone.open_from_guest(KEY);
    let (next, _client) = clone.open_from_host(5);
    assert!(!lost.contains(&next) && next != spare);
}

/// Has the device use up all RX buffers that it has.
fn fill_up(guest: &mut Guest, key: Key) {
    for _ in 0..=QUEUE_SIZE {
        guest.send(guest.packet(key, Op::CreditRequest), &[]);
    }
    // The answer to the last found no buffer.
    guest.settle();
}

#[test]
fn pending_answers_of_a_spare_make_it_lost() {
    let mut guest = Guest::new();
    let keys = guest.open_spares(PORT, 2);
    guest.refill = false;
    fill_up(&mut guest, keys[0]);
    let saved = guest.save();
    assert_eq!(saved.state.lost, ports(&keys[..1]));
    assert_eq!(saved.state.spares.len(), 1);
    assert_eq!(saved.state.spares[0].ports, Ports::from(keys[1]));
}

#[test]
fn credit_update_that_is_due_reaches_the_clone() {
    let mut guest = Guest::new();
    let keys = guest.open_spares(PORT, 2);
    guest.refill = false;
    fill_up(&mut guest, keys[0]);
    // A quarter of its buffer, all with the host, and no buffer to say so.
    guest.send_data(keys[1], &[1; BUF_ALLOC_BYTES as usize / 4 - 1]);
    guest.send_data(keys[1], &[1; 1]);
    let saved = guest.save();
    assert_eq!(saved.state.spares.len(), 1);
    let (mut clone, _streams) = Guest::clone_of(&saved);
    clone.offer_all_rx();
    clone.settle();
    let update = clone.received.pop_back().unwrap().0;
    assert_eq!(update.op, Op::CreditUpdate as u16);
    assert_eq!(ports_of(&update), Ports::from(keys[1]));
    assert_eq!(update.fwd_cnt, BUF_ALLOC_BYTES / 4);
}

#[test]
fn packets_in_the_ring_are_served_by_parent_and_clone() {
    let mut guest = Guest::new();
    let spare = guest.open_spares(PORT, 1)[0];
    let mut stream = guest.open_from_guest(KEY);
    for key in [spare, KEY] {
        let mut data = guest.packet(key, Op::Data);
        data.len = 6;
        guest.queue_packet(data, b"queued");
    }
    let saved = guest.save();
    assert_eq!(saved.state.spares[0].unread, b"");
    let mut queued = [0; 6];
    stream.read_exact(&mut queued).unwrap();
    assert_eq!(&queued, b"queued");
    guest.assert_quiet();

    let (mut clone, mut streams) = Guest::clone_of(&saved);
    streams[0].read_exact(&mut queued).unwrap();
    assert_eq!(&queued, b"queued");
    // Once because it is lost, once more because it goes on.
    assert_eq!(resets(&mut clone), [KEY, KEY]);
}

#[test]
fn reset_of_the_driver_ends_restored_spares() {
    let mut guest = Guest::new();
    guest.open_spares(PORT, 2);
    let saved = guest.save();
    let (mut clone, spares) = Guest::restored(&saved);
    clone.resume_as(&saved);
    clone.device.reset();
    for spare in spares {
        assert_eq!(read_now(&spare.stream.into()), Some(Vec::new()));
    }
    clone.activate();
    clone.fill_rx(QUEUE_SIZE);
    clone.assert_quiet();
    clone.open_spares(PORT, 16);

    // Not taken yet, they are not given out any more.
    let mut untaken = Guest::inactive();
    let state = ChipState::Vsock(saved.state.clone());
    untaken.device.restore(state).unwrap();
    untaken.device.reset();
    assert!(untaken.device.take_spares().is_empty());
}

#[test]
fn lost_connections_and_new_answers_stay_bounded() {
    let mut guest = Guest::new();
    let streams: Vec<_> = (0..u32::try_from(MAX_CONNECTIONS).unwrap())
        .map(|guest_port| guest.open_from_guest(Key { guest_port, ..KEY }))
        .collect();
    let saved = guest.save();
    assert_eq!(saved.state.lost.len(), MAX_CONNECTIONS);
    drop(streams);
    let (mut clone, _) = Guest::restored(&saved);
    clone.activate();
    for guest_port in 0..10 {
        let key = Key {
            host_port: 99,
            guest_port,
        };
        clone.send(clone.packet(key, Op::Data), &[]);
    }
    assert_eq!(clone.counter("dropped_resets"), 9);
    assert_eq!(clone.device.waiting(), 1024);
    clone.fill_rx(QUEUE_SIZE);
    assert_eq!(resets(&mut clone).len(), 1024);
}

// --- Pauses ---

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
                assert_eq!(Key::from(ports_of(&header)), key);
                assert_eq!(payload, b"while it slept");
            }
            Op::Shutdown => assert_eq!(header.dst_port, 6),
            Op::Request => requests.push(Key::from(ports_of(&header))),
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
    let key = Key::from(ports_of(&guest.expect_op(Op::Request)));
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

// --- Hostile states ---

fn state() -> VsockState {
    VsockState {
        guest_cid: GUEST_CID,
        next_host_port: FIRST_HOST_PORT + 1,
        spares: vec![SpareState {
            ports: Ports {
                host_port: FIRST_HOST_PORT,
                guest_port: PORT,
            },
            credit: CreditState {
                buf_alloc_bytes: BUF_ALLOC_BYTES,
                received: 3,
                forwarded: 0,
                announced: 0,
                peer_buf_alloc_bytes: 1000,
                sent: 0,
                peer_forwarded: 0,
            },
            unread: b"abc".to_vec(),
        }],
        lost: ports(&[KEY]),
    }
}

fn restore(state: VsockState) -> Result<Guest, StateError> {
    let mut guest = Guest::inactive();
    guest
        .device
        .restore(ChipState::Vsock(state))
        .map(|()| guest)
}

#[test]
fn states_that_no_device_has_are_refused() {
    assert!(restore(state()).is_ok());
    let changes: [(fn(&mut VsockState), &str); 13] = [
        (|state| state.guest_cid = 43, "context id 43"),
        (|state| state.next_host_port = 1, "1 is no port"),
        (|state| state.next_host_port = 1 << 31, "is no port"),
        (
            |state| state.spares = vec![state.spares[0].clone(); MAX_SPARES + 1],
            "17 spare connections",
        ),
        (
            |state| state.lost = vec![KEY.into(); 1025],
            "1025 lost connections",
        ),
        (|state| state.lost.push(KEY.into()), "two connections"),
        (
            |state| state.lost.push(state.spares[0].ports),
            "two connections",
        ),
        (
            |state| state.lost[0].guest_port = u32::MAX,
            "no connection has",
        ),
        (
            |state| state.spares[0].ports.host_port = u32::MAX,
            "no connection has",
        ),
        (
            |state| state.spares[0].ports.host_port = 52,
            "does not connect from",
        ),
        (
            |state| state.spares[0].unread = vec![0; MAX_UNREAD_BYTES + 1],
            "65537 bytes wait",
        ),
        (
            |state| state.spares[0].credit.received = 4,
            "it holds 4 bytes",
        ),
        (
            |state| state.spares[0].credit.buf_alloc_bytes = 0,
            "promises 0 bytes",
        ),
    ];
    for (change, words) in changes {
        let mut state = state();
        change(&mut state);
        let Err(StateError::Chip(error)) = restore(state) else {
            panic!("accepted, though {words}");
        };
        assert!(error.contains(words), "{error}");
    }
    let mut guest = Guest::inactive();
    let other = guest.device.restore(ChipState::Rng);
    assert!(matches!(other, Err(StateError::Kind)));
}

fn number() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => 0..300_000u32,
        2 => FIRST_HOST_PORT..FIRST_HOST_PORT + 4,
        1 => Just(SMALL_BUF_ALLOC_BYTES),
        4 => Just(BUF_ALLOC_BYTES),
        1 => Just(u32::MAX),
        1 => any::<u32>(),
    ]
}

fn any_ports(host_port: impl Strategy<Value = u32>) -> impl Strategy<Value = Ports> {
    (host_port, number()).prop_map(|(host_port, guest_port)| Ports {
        host_port,
        guest_port,
    })
}

fn any_spare() -> impl Strategy<Value = SpareState> {
    let host_port = prop_oneof![9 => FIRST_HOST_PORT..FIRST_HOST_PORT + 100, 1 => number()];
    let buf_alloc = prop_oneof![9 => Just(BUF_ALLOC_BYTES), 1 => number()];
    (
        any_ports(host_port),
        (buf_alloc, number(), number()),
        (number(), number(), number()),
        prop_oneof![20 => 0..100usize, 1 => 0..70_000usize],
        prop_oneof![9 => (0..100u32).prop_map(Some), 1 => Just(None)],
    )
        .prop_map(|(ports, receiving, sending, unread, held)| {
            let (buf_alloc_bytes, forwarded, announced) = receiving;
            let (peer_buf_alloc_bytes, sent, peer_forwarded) = sending;
            let held = held.map_or(announced, |held| held.min(unread as u32));
            SpareState {
                ports,
                credit: CreditState {
                    buf_alloc_bytes,
                    received: forwarded.wrapping_add(held),
                    forwarded,
                    announced,
                    peer_buf_alloc_bytes,
                    sent,
                    peer_forwarded,
                },
                unread: vec![7; unread],
            }
        })
}

fn any_state() -> impl Strategy<Value = VsockState> {
    (
        prop_oneof![20 => Just(GUEST_CID), 1 => any::<u64>()],
        prop_oneof![20 => FIRST_HOST_PORT..FIRST_HOST_PORT + 4, 1 => number()],
        prop::collection::vec(any_spare(), 0..5),
        prop::collection::vec(any_ports(number()), 0..5),
    )
        .prop_map(|(guest_cid, next_host_port, spares, lost)| VsockState {
            guest_cid,
            next_host_port,
            spares,
            lost,
        })
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 300,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Whatever a snapshot says, the device stands, and what it accepts is a
    /// guest like any other.
    #[test]
    fn no_state_breaks_the_device(state in any_state(), data in 0..70_000usize) {
        let Ok(mut guest) = restore(state.clone()) else {
            return Ok(());
        };
        let spares = guest.device.take_spares();
        prop_assert_eq!(spares.len(), state.spares.len());
        guest.activate();
        guest.fill_rx(QUEUE_SIZE);
        let data = noise(data);
        for (spare, saved) in spares.iter().zip(&state.spares) {
            let unread = read_now(&spare.stream.try_clone().unwrap().into()).unwrap_or_default();
            prop_assert_eq!(&unread, &saved.unread);
            let flags = rustix::net::SendFlags::DONTWAIT;
            let _ = rustix::net::send(spare.stream.as_fd(), &data, flags);
            for chunk in data.chunks(60_000) {
                guest.send_data(saved.ports.into(), chunk);
            }
        }
        let _client = guest.dial("CONNECT 5\n");
        guest.settle();
        let rsts = guest.received.iter().filter(|(header, _)| header.op == Op::Reset as u16);
        prop_assert!(rsts.count() >= state.lost.len());
        for saved in &state.spares {
            let port = saved.ports;
            let given = guest.received.iter().filter(|(header, _)| ports_of(header) == port);
            let given: u32 = given.map(|(header, _)| header.len).sum();
            let credit = &saved.credit;
            let in_flight = credit.sent.wrapping_sub(credit.peer_forwarded);
            // The data that the guest has sent gave it a room of 256 KiB.
            let room = credit.peer_buf_alloc_bytes.saturating_sub(in_flight);
            prop_assert!(given <= room.max(256 << 10));
        }
        prop_assert!(guest.counter("connections_open") <= state.spares.len() as u64 + 1);
        let buffered = guest.counter("buffered_bytes");
        prop_assert!(buffered <= state.spares.len() as u64 * u64::from(BUF_ALLOC_BYTES));
        prop_assert!(!guest.source_is_ready());
        guest.device.reset();
        prop_assert_eq!(guest.counter("connections_open"), 0);
    }
}
