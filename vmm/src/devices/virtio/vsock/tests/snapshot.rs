//! Snapshots, and the clones made from them.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use super::super::packet::{Header, Key, Op};
use super::super::{BUF_ALLOC_BYTES, CreditState, MAX_CONNECTIONS, MAX_UNREAD_BYTES, Ports};
use super::guest::{Guest, QUEUE_SIZE, key_of, noise, read_now};
use crate::devices::virtio::{ChipState, VirtioDevice as _};

const PORT: u32 = 1024;

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
        key_of(&header)
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
        assert_eq!(key_of(&header), *key);
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
    let asked = key_of(&guest.expect_op(Op::Request));
    guest.device.open_spares(PORT, 2).unwrap();
    let spare_asked = key_of(&guest.expect_op(Op::Request));
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
        asked,
        spare_asked,
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
    assert_eq!(key_of(&update), keys[1]);
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
