//! How connections begin and end.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::super::packet::{Key, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::super::{Admission, HOST_CID, NewVsockError, Vsock, VsockConfig};
use super::guest::{GUEST_CID, Guest, QUEUE_SIZE, read_line, read_now};
use crate::devices::virtio::VirtioDevice as _;

const KEY: Key = Key {
    host_port: 52,
    guest_port: 1024,
};

#[test]
fn config_space_is_the_cid() {
    let guest = Guest::inactive();
    let mut cid = [0xff; 12];
    guest.device.read_config(0, &mut cid);
    assert_eq!(cid[..8], GUEST_CID.to_le_bytes());
    assert_eq!(cid[8..], [0; 4]);
    assert_eq!(guest.device.device_id(), 19);
    assert_eq!(guest.device.queue_sizes(), [256; 3]);
}

#[test]
fn reserved_cids_are_refused() {
    for cid in [0, 1, 2, u64::from(u32::MAX), 1 << 32] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock");
        let config = VsockConfig {
            guest_cid: cid,
            listener: std::os::unix::net::UnixListener::bind(path).unwrap(),
            on_guest_connection: Box::new(|_| Admission::Refused),
        };
        assert!(matches!(
            Vsock::new(config),
            Err(NewVsockError::GuestCid(refused)) if refused == cid
        ));
    }
}

#[test]
fn host_connects_talks_and_closes() {
    let mut guest = Guest::new();
    let (key, mut client) = guest.open_from_host(1000);

    client.write_all(b"ping").unwrap();
    let (header, payload) = guest.expect();
    assert_eq!(header.op, Op::Data as u16);
    assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, GUEST_CID));
    assert_eq!(payload, b"ping");

    let mut pong = guest.packet(key, Op::Data);
    pong.len = 4;
    guest.send(pong, b"pong");
    let mut answer = [0; 4];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"pong");

    // The host half-closes; the guest can still send.
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect_op(Op::Shutdown).flags, SHUTDOWN_SEND);
    guest.send(pong, b"last");
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"last");

    // The guest closes, and learns that its port is free.
    let mut shutdown = guest.packet(key, Op::Shutdown);
    shutdown.flags = SHUTDOWN_BOTH;
    guest.send(shutdown, &[]);
    guest.expect_op(Op::Reset);
    assert_eq!(client.read(&mut answer).unwrap(), 0);

    assert_eq!(guest.counter("connections_opened"), 1);
    assert_eq!(guest.counter("connections_open"), 0);
    assert_eq!(guest.counter("connections_reset"), 0);
    assert_eq!(guest.counter("rx_bytes"), 4);
    assert_eq!(guest.counter("tx_bytes"), 8);
    guest.assert_quiet();
}

#[test]
fn data_and_half_close_in_one_go_both_arrive() {
    let mut guest = Guest::new();
    let (_, mut client) = guest.open_from_host(1000);
    client.write_all(b"all I have").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect().1, b"all I have");
    assert_eq!(guest.expect_op(Op::Shutdown).flags, SHUTDOWN_SEND);
}

#[test]
fn bytes_sent_with_the_connect_line_arrive() {
    let mut guest = Guest::new();
    let mut client = guest.dial("CONNECT 7\nearly\n");
    let request = guest.expect_op(Op::Request);
    guest.assert_quiet();
    let key = Key {
        host_port: request.src_port,
        guest_port: 7,
    };
    guest.send(guest.packet(key, Op::Response), &[]);
    assert_eq!(guest.expect().1, b"early\n");
    assert!(read_line(&mut client).unwrap().starts_with("OK "));
}

#[test]
fn host_that_closes_ends_the_connection() {
    let mut guest = Guest::new();
    let (key, mut client) = guest.open_from_host(1000);
    client.write_all(b"bye").unwrap();
    drop(client);
    assert_eq!(guest.expect().1, b"bye");
    assert_eq!(guest.expect_op(Op::Shutdown).flags, SHUTDOWN_BOTH);
    // What the guest had under way is dropped in silence.
    let mut data = guest.packet(key, Op::Data);
    data.len = 3;
    guest.send(data, b"abc");
    guest.assert_quiet();
    guest.send(guest.packet(key, Op::Reset), &[]);
    guest.assert_quiet();
    assert_eq!(guest.counter("connections_open"), 0);
    assert_eq!(guest.counter("connections_reset"), 0);
}

#[test]
fn guest_that_does_not_confirm_a_close_is_reset() {
    let mut guest = Guest::new();
    let (_, client) = guest.open_from_host(1000);
    drop(client);
    guest.expect_op(Op::Shutdown);
    assert_eq!(guest.counter("connections_open"), 1);
    // CLOSE_TIMEOUT later.
    guest.expect_op(Op::Reset);
    assert_eq!(guest.counter("connections_open"), 0);
    assert_eq!(guest.counter("connections_reset"), 1);
}

#[test]
fn guest_half_closes() {
    let mut guest = Guest::new();
    let (key, mut client) = guest.open_from_host(1000);
    let mut shutdown = guest.packet(key, Op::Shutdown);
    shutdown.flags = SHUTDOWN_SEND;
    guest.send(shutdown, &[]);
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    client.write_all(b"still here").unwrap();
    assert_eq!(guest.expect().1, b"still here");

    shutdown.flags = SHUTDOWN_RECEIVE;
    guest.send(shutdown, &[]);
    guest.expect_op(Op::Reset);
    assert!(client.write_all(b"x").is_err());
}

#[test]
fn guest_that_stops_reading_breaks_the_hosts_pipe() {
    let mut guest = Guest::new();
    let (key, mut client) = guest.open_from_host(1000);
    let mut shutdown = guest.packet(key, Op::Shutdown);
    shutdown.flags = SHUTDOWN_RECEIVE;
    guest.send(shutdown, &[]);
    let error = client.write_all(b"x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    // The other direction lives.
    let mut data = guest.packet(key, Op::Data);
    data.len = 2;
    guest.send(data, b"ok");
    assert_eq!(read_now(&client).unwrap(), b"ok");
    drop(client);
    assert_eq!(guest.expect_op(Op::Shutdown).flags, SHUTDOWN_BOTH);
}

#[test]
fn guest_connects() {
    let mut guest = Guest::new();
    let mut stream = guest.open_from_guest(KEY);
    stream.write_all(b"hello").unwrap();
    assert_eq!(guest.expect().1, b"hello");
    guest.send(guest.packet(KEY, Op::Reset), &[]);
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    guest.assert_quiet();
    assert_eq!(guest.counter("connections_reset"), 1);
}

#[test]
fn refused_guest_connection_is_reset() {
    let mut guest = Guest::with_admission(|connection| match connection.host_port {
        52 => Admission::Accepted,
        _ => Admission::Refused,
    });
    guest.activate();
    guest.fill_rx(QUEUE_SIZE);
    let refused = Key {
        host_port: 53,
        ..KEY
    };
    guest.send(guest.packet(refused, Op::Request), &[]);
    let reset = guest.expect_op(Op::Reset);
    assert_eq!((reset.src_port, reset.dst_port), (53, KEY.guest_port));
    let _stream = guest.open_from_guest(KEY);
    assert_eq!(guest.counter("connections_open"), 1);
}

#[test]
fn guest_refuses_a_host_connection() {
    let mut guest = Guest::new();
    let mut client = guest.dial("CONNECT 9\n");
    let request = guest.expect_op(Op::Request);
    let key = Key {
        host_port: request.src_port,
        guest_port: 9,
    };
    guest.send(guest.packet(key, Op::Reset), &[]);
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    guest.assert_quiet();
    assert_eq!(guest.counter("connections_opened"), 0);
    assert_eq!(guest.counter("connections_reset"), 1);
}

#[test]
fn client_that_leaves_before_the_answer_is_forgotten() {
    let mut guest = Guest::new();
    let client = guest.dial("CONNECT 9\n");
    let request = guest.expect_op(Op::Request);
    drop(client);
    guest.expect_op(Op::Reset);
    let key = Key {
        host_port: request.src_port,
        guest_port: 9,
    };
    // Too late: the answer is to a connection that is gone.
    guest.send(guest.packet(key, Op::Response), &[]);
    guest.expect_op(Op::Reset);
    assert_eq!(guest.counter("connections_open"), 0);
}

#[test]
fn silent_guest_and_slow_client_time_out() {
    let mut guest = Guest::new();
    let mut unanswered = guest.dial("CONNECT 9\n");
    let mut slow = guest.dial("CONN");
    guest.expect_op(Op::Request);
    guest.expect_op(Op::Reset);
    assert_eq!(unanswered.read(&mut [0; 1]).unwrap(), 0);
    guest.wait_for(|guest| (guest.counter("handshakes_refused") == 1).then_some(()));
    assert_eq!(slow.read(&mut [0; 1]).unwrap(), 0);
    assert_eq!(guest.counter("connections_open"), 0);
}

#[test]
fn bad_handshakes_are_closed() {
    let mut guest = Guest::new();
    for line in [
        "HELLO\n",
        "CONNECT x\n",
        "CONNECT 1 and then far too many bytes",
    ] {
        let mut client = guest.dial(line);
        guest.settle();
        // Closing with bytes unread gives the client ECONNRESET, else the end.
        assert!(client.read(&mut [0; 1]).map_or(true, |len| len == 0));
    }
    assert_eq!(guest.counter("handshakes_refused"), 3);
    guest.assert_quiet();
}

#[test]
fn unfinished_handshakes_are_bounded_and_the_rest_wait() {
    let mut guest = Guest::new();
    let mut slow: Vec<UnixStream> = (0..80).map(|_| guest.dial("CONNECT ")).collect();
    guest.settle();
    let mut served = 0;
    for client in &mut slow {
        client.write_all(b"5\n").unwrap();
    }
    while served < slow.len() {
        guest.expect_op(Op::Request);
        served += 1;
    }
    assert_eq!(guest.counter("handshakes_refused"), 0);
}

#[test]
fn clients_wait_in_the_backlog_until_the_driver_is_ready() {
    let mut guest = Guest::inactive();
    let _client = guest.dial("CONNECT 5\n");
    assert!(!guest.source_is_ready());
    guest.activate();
    guest.fill_rx(QUEUE_SIZE);
    guest.expect_op(Op::Request);
    guest.device.reset();
    let _second = guest.dial("CONNECT 5\n");
    assert!(!guest.source_is_ready());
}

#[test]
fn device_works_again_after_a_reset() {
    let mut guest = Guest::new();
    let (_, mut client) = guest.open_from_host(1000);
    guest.device.reset();
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);
    assert_eq!(guest.counter("connections_open"), 0);
    guest.activate();
    guest.fill_rx(QUEUE_SIZE);
    let (_, mut client) = guest.open_from_host(1000);
    client.write_all(b"again").unwrap();
    assert_eq!(guest.expect().1, b"again");
}
