//! A guest that breaks every rule, and what it cannot do thereby.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::process::Command;

use proptest::prelude::*;

use super::super::packet::{HEADER_LEN, Header, Key, Op, SHUTDOWN_BOTH};
use super::super::{BUF_ALLOC_BYTES, MAX_CONNECTIONS};
use super::guest::{GUEST_CID, Guest, QUEUE_SIZE, noise, read_now};
use crate::devices::virtio::VirtioDevice as _;
use vm_memory::{Bytes as _, GuestAddress};

const KEY: Key = Key {
    host_port: 52,
    guest_port: 1024,
};

/// Free memory of the mock guest, and an address outside of it.
const SCRATCH: u64 = 0x1a0_0000;
const NOWHERE: u64 = 0xffff_ffff_0000;

const WRITE: u16 = 2;
const HEADER: u32 = HEADER_LEN as u32;

fn write_header(guest: &Guest, header: Header) {
    guest
        .memory
        .write_slice(&header.to_bytes(), GuestAddress(SCRATCH))
        .unwrap();
}

#[test]
fn packets_without_a_connection_are_reset() {
    let mut guest = Guest::new();
    for op in [
        Op::Response,
        Op::Shutdown,
        Op::Data,
        Op::CreditUpdate,
        Op::CreditRequest,
    ] {
        guest.send(guest.packet(KEY, op), &[]);
        let reset = guest.expect_op(Op::Reset);
        assert_eq!(reset.src_port, KEY.host_port);
        assert_eq!(reset.dst_port, KEY.guest_port);
    }
    guest.send(guest.packet(KEY, Op::Reset), &[]);
    guest.assert_quiet();
}

#[test]
fn unknown_fields_are_reset_and_forgeries_dropped() {
    let mut guest = Guest::new();
    let request = guest.packet(KEY, Op::Request);
    for bad in [
        Header { kind: 2, ..request },
        Header { op: 0, ..request },
        Header { op: 8, ..request },
        Header {
            op: 0xffff,
            ..request
        },
        Header {
            dst_cid: 99,
            ..request
        },
        Header {
            dst_port: u32::MAX,
            ..request
        },
        Header {
            src_port: u32::MAX,
            ..request
        },
    ] {
        guest.send(bad, &[]);
        let reset = guest.expect_op(Op::Reset);
        assert_eq!((reset.src_cid, reset.kind), (bad.dst_cid, bad.kind));
    }
    guest.send(
        Header {
            src_cid: 7,
            ..request
        },
        &[],
    );
    guest.assert_quiet();
    assert_eq!(guest.counter("invalid_packets"), 1);
    assert_eq!(guest.counter("connections_opened"), 0);
}

#[test]
fn second_request_resets_the_first() {
    let mut guest = Guest::new();
    let mut stream = guest.open_from_guest(KEY);
    guest.send(guest.packet(KEY, Op::Request), &[]);
    guest.expect_op(Op::Reset);
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    // The port is free again.
    let _stream = guest.open_from_guest(KEY);
    assert_eq!(guest.counter("connections_reset"), 1);
}

#[test]
fn overrun_of_credit_is_reset() {
    let mut guest = Guest::new();
    let stream = guest.open_from_guest(KEY);
    let data = noise(65_536);
    let mut header = guest.packet(KEY, Op::Data);
    header.len = 65_536;
    for _ in 0..64 {
        guest.send(header, &data);
        assert!(guest.counter("buffered_bytes") <= u64::from(BUF_ALLOC_BYTES));
    }
    guest.wait_for(|guest| {
        guest
            .received
            .pop_front()
            .filter(|(header, _)| header.op == Op::Reset as u16)
    });
    assert_eq!(guest.counter("buffered_bytes"), 0);
    assert_eq!(guest.counter("connections_reset"), 1);
    drop(stream);
}

#[test]
fn opening_and_resetting_without_reading_grows_nothing() {
    let mut guest = Guest::inactive();
    guest.activate();
    for _ in 0..5000 {
        guest.send(guest.packet(KEY, Op::Request), &[]);
        guest.send(guest.packet(KEY, Op::Reset), &[]);
        guest.connections.lock().unwrap().clear();
    }
    assert_eq!(guest.counter("connections_open"), 0);
    assert_eq!(guest.device.waiting(), 0);
    guest.fill_rx(QUEUE_SIZE);
    guest.assert_quiet();
}

#[test]
fn flood_without_rx_buffers_is_bounded_and_always_taken() {
    let mut guest = Guest::inactive();
    guest.activate();
    for port in 0..3000 {
        let key = Key {
            host_port: port,
            ..KEY
        };
        guest.send(guest.packet(key, Op::Data), &[]);
        assert_eq!(guest.tx_in_flight(), 0);
    }
    assert_eq!(guest.counter("dropped_resets"), 3000 - 1024);
    guest.fill_rx(QUEUE_SIZE);
    guest.settle();
    assert_eq!(guest.received.len(), 1024);
}

#[test]
fn malformed_tx_chains_are_given_back() {
    let mut guest = Guest::new();
    let mut stream = guest.open_from_guest(KEY);
    let mut header = guest.packet(KEY, Op::Data);
    header.len = 10;
    write_header(&guest, header);
    for chain in [
        // Too short for a header; of the wrong direction; nowhere; half nowhere.
        &[(SCRATCH, HEADER - 1, 0)][..],
        &[(SCRATCH, HEADER, WRITE), (SCRATCH, 10, 0)],
        &[(SCRATCH, HEADER, 0), (SCRATCH, 10, WRITE)],
        &[(NOWHERE, HEADER, 0)],
        &[(SCRATCH, HEADER, 0), (NOWHERE, 10, 0)],
        &[(SCRATCH, HEADER, 0), (u64::MAX - 4, 10, 0)],
        &[(SCRATCH, 0, 0)],
    ] {
        guest.send_chain(chain);
        assert_eq!(guest.tx_in_flight(), 0, "{chain:?}");
    }
    assert_eq!(guest.counter("invalid_packets"), 7);
    guest.assert_quiet();
    assert_eq!(read_now(&stream), None);

    // A header that promises more than the chain holds.
    guest.send_chain(&[(SCRATCH, HEADER + 9, 0)]);
    guest.expect_op(Op::Reset);
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
}

#[test]
fn any_framing_of_a_packet_is_understood() {
    let mut guest = Guest::new();
    let mut stream = guest.open_from_guest(KEY);
    let payload = noise(9000);
    let mut header = guest.packet(KEY, Op::Data);
    header.len = 9000;
    write_header(&guest, header);
    guest
        .memory
        .write_slice(&payload, GuestAddress(SCRATCH + u64::from(HEADER)))
        .unwrap();
    for cuts in [
        &[9044][..],
        &[44, 9000],
        &[10, 20, 14, 9000],
        &[40, 4100, 4096, 808],
        // More than the header says.
        &[44, 4096, 10_000],
    ] {
        let mut at = SCRATCH;
        let chain: Vec<_> = cuts
            .iter()
            .map(|&len| {
                let descriptor = (at, len, 0);
                at += u64::from(len);
                descriptor
            })
            .collect();
        guest.send_chain(&chain);
        let mut received = vec![0; 9000];
        stream.read_exact(&mut received).unwrap();
        assert!(received == payload, "{cuts:?}");
        assert_eq!(read_now(&stream), None);
    }
}

#[test]
fn chain_that_loops_ends() {
    let mut guest = Guest::new();
    // Descriptor 0 names itself as its next.
    guest
        .memory
        .write_slice(&[0; 16], GuestAddress(0x2_0000))
        .unwrap();
    guest.send_chain(&[(SCRATCH, 1, 1)]);
    assert_eq!(guest.tx_in_flight(), 0);
    guest.assert_quiet();
}

#[test]
fn useless_rx_buffers_are_given_back() {
    let mut guest = Guest::inactive();
    guest.activate();
    guest.refill = false;
    let mut client = guest.dial("CONNECT 1\n");
    for chain in [
        &[(SCRATCH, 4096, 0)][..],
        &[(SCRATCH, HEADER - 1, WRITE)],
        &[(NOWHERE, 4096, WRITE)],
    ] {
        guest.offer_rx_chain(chain);
        guest.settle();
    }
    assert_eq!(guest.counter("invalid_packets"), 3);
    assert_eq!(guest.received, []);

    guest.fill_rx(1);
    let request = guest.expect_op(Op::Request);
    let key = Key {
        host_port: request.src_port,
        guest_port: 1,
    };
    guest.send(guest.packet(key, Op::Response), &[]);
    client.write_all(b"data").unwrap();
    guest.settle();
    // Room for a header alone serves no data.
    guest.offer_rx_chain(&[(SCRATCH, HEADER, WRITE)]);
    guest.settle();
    assert_eq!(guest.counter("invalid_packets"), 4);
    guest.fill_rx(1);
    assert_eq!(guest.expect().1, b"data");
}

#[test]
fn driver_that_lies_about_its_index_hangs_nothing() {
    let mut guest = Guest::new();
    let mut client = guest.dial("CONNECT 1\n");
    client.write_all(b"x").unwrap();
    for queue in [1, 2] {
        guest
            .memory
            .write_obj(0x7fffu16, GuestAddress(queue * 0x1_0000 + 0x4002))
            .unwrap();
    }
    guest.device.queue_notified(0);
    guest.device.queue_notified(1);
    guest.device.queue_notified(2);
    // Accepts the client, then learns that its stream has a byte.
    for _ in 0..2 {
        guest.device.source_ready(0);
    }
    assert!(!guest.source_is_ready());
}

/// What a hostile guest, or a host client, may do next.
#[derive(Clone, Debug)]
enum Step {
    Packet { header: Header, lie: i32, to: u8 },
    Dial { port: u32 },
    Write { client: u8, len: usize },
    Read { client: u8 },
    Close { client: u8 },
    Turns,
    Refill(bool),
}

fn port() -> impl Strategy<Value = u32> {
    prop_oneof![8 => 0..4u32, 1 => Just(u32::MAX), 1 => any::<u32>()]
}

fn step() -> impl Strategy<Value = Step> {
    let header = (
        prop_oneof![20 => Just(GUEST_CID), 1 => any::<u64>()],
        prop_oneof![20 => Just(2u64), 1 => any::<u64>()],
        (port(), port()),
        prop_oneof![10 => 0..70_000u32, 1 => any::<u32>()],
        prop_oneof![20 => Just(1u16), 1 => any::<u16>()],
        prop_oneof![30 => 1..8u16, 1 => any::<u16>()],
        prop_oneof![Just(0), Just(1), Just(2), Just(3), any::<u32>()],
        prop_oneof![0..100_000u32, any::<u32>()],
        prop_oneof![Just(0), 0..100_000u32, any::<u32>()],
    )
        .prop_map(
            |(src_cid, dst_cid, (src_port, dst_port), len, kind, op, flags, buf_alloc, fwd_cnt)| {
                Header {
                    src_cid,
                    dst_cid,
                    src_port,
                    dst_port,
                    len,
                    kind,
                    op,
                    flags,
                    buf_alloc,
                    fwd_cnt,
                }
            },
        );
    prop_oneof![
        12 => (header, prop_oneof![10 => Just(0), 1 => -50..50i32], any::<u8>())
            .prop_map(|(header, lie, to)| Step::Packet { header, lie, to }),
        3 => (0..4u32).prop_map(|port| Step::Dial { port }),
        3 => (any::<u8>(), 0..40_000usize).prop_map(|(client, len)| Step::Write { client, len }),
        2 => any::<u8>().prop_map(|client| Step::Read { client }),
        1 => any::<u8>().prop_map(|client| Step::Close { client }),
        6 => Just(Step::Turns),
        1 => any::<bool>().prop_map(Step::Refill),
    ]
}

/// Plays the steps; panics where the device breaks a promise.
fn play(steps: Vec<Step>) {
    let mut guest = Guest::new();
    let mut clients: Vec<UnixStream> = Vec::new();
    let mut host_ports: Vec<u32> = Vec::new();
    let data = noise(70_000);
    for step in steps {
        let count = clients.len().max(1);
        let chosen = |client: u8| usize::from(client) % count;
        match step {
            Step::Packet {
                mut header,
                lie,
                to,
            } => {
                // Mostly to a connection that exists.
                if let Some(&port) = host_ports.get(usize::from(to) % 8) {
                    header.dst_port = port;
                }
                let len = match Op::from_wire(header.op) {
                    Some(Op::Data) => header.len.min(65_000),
                    _ => 0,
                };
                let payload = &data[..len as usize];
                header.len = len.saturating_add_signed(lie);
                guest.send(header, payload);
            }
            Step::Dial { port } if clients.len() < 32 => {
                clients.push(guest.dial(&format!("CONNECT {port}\n")));
            }
            Step::Write { client, len } => {
                if let Some(client) = clients.get_mut(chosen(client)) {
                    client.set_nonblocking(true).unwrap();
                    let _ = client.write(&data[..len]);
                }
            }
            Step::Read { client } => {
                if let Some(client) = clients.get_mut(chosen(client)) {
                    client.set_nonblocking(true).unwrap();
                    let _ = client.read(&mut [0; 50_000]);
                }
            }
            Step::Close { client } if !clients.is_empty() => {
                drop(clients.swap_remove(chosen(client)));
            }
            Step::Dial { .. } | Step::Close { .. } => {}
            Step::Turns => {
                for _ in 0..3 {
                    guest.turn();
                }
                clients.extend(
                    (guest.connections.lock().unwrap().drain(..))
                        .map(|connection| UnixStream::from(connection.stream)),
                );
                for (header, _) in guest.received.drain(..) {
                    if header.op == Op::Request as u16 && host_ports.len() < 8 {
                        host_ports.push(header.src_port);
                    }
                }
            }
            Step::Refill(refill) => guest.refill = refill,
        }
        assert_eq!(guest.tx_in_flight(), 0);
        let open = guest.counter("connections_open");
        assert!(open <= MAX_CONNECTIONS as u64);
        assert!(guest.counter("buffered_bytes") <= open * u64::from(BUF_ALLOC_BYTES));
    }
    guest.device.reset();
    assert_eq!(guest.counter("connections_open"), 0);
    assert!(!guest.source_is_ready());
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 200,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn no_sequence_of_packets_breaks_the_device(steps in prop::collection::vec(step(), 1..120)) {
        play(steps);
    }
}

/// Runs a test alone in a process of its own, where no other test opens or
/// closes descriptors. True in that process.
fn alone(test: &str) -> bool {
    const ALONE: &str = "SOULBOX_VSOCK_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let path = format!("{}::{test}", module_path!().split_once("::").unwrap().1);
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &path, "--test-threads=1"])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{stdout}");
    assert!(stdout.contains("1 passed"), "{stdout}");
    false
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn no_descriptor_leaks() {
    if !alone("no_descriptor_leaks") {
        return;
    }
    let at_first = descriptors();
    let mut guest = Guest::new();
    let idle = descriptors();
    {
        // Connections in every state there is.
        let _open: Vec<_> = (0..20).map(|port| guest.open_from_host(port)).collect();
        let _unanswered: Vec<_> = (0..20).map(|_| guest.dial("CONNECT 7\n")).collect();
        let _slow: Vec<_> = (0..20).map(|_| guest.dial("CONNECT")).collect();
        guest.device.open_spares(7, 8).unwrap();
        guest.settle();
        guest.received.clear();
        let closed_by_host: Vec<_> = (0..20)
            .map(|guest_port| {
                guest.open_from_guest(Key {
                    host_port: 9,
                    guest_port,
                })
            })
            .collect();
        drop(closed_by_host);
        guest.settle();
        guest.received.clear();
        let closing = guest.open_from_guest(KEY);
        let mut shutdown = guest.packet(KEY, Op::Shutdown);
        shutdown.flags = SHUTDOWN_BOTH;
        guest.send(shutdown, &[]);
        drop(closing);
        guest.settle();
        assert!(descriptors() > idle + 100);
        guest.device.reset();
    }
    assert_eq!(descriptors(), idle);

    guest.activate();
    guest.fill_rx(QUEUE_SIZE);
    guest.received.clear();
    guest.open_spares(7, 8);
    let saved = guest.save();
    guest.device.reset();
    let (clone, spares) = Guest::restored(&saved);
    assert!(descriptors() > idle + 16);
    drop((clone, spares));
    assert_eq!(descriptors(), idle);
    drop(guest);
    assert_eq!(descriptors(), at_first);

    let mut runner = proptest::test_runner::TestRunner::deterministic();
    runner
        .run(&prop::collection::vec(step(), 1..100), |steps| {
            play(steps);
            prop_assert_eq!(descriptors(), at_first);
            Ok(())
        })
        .unwrap();
}
