//! States that no device has saved.

use std::os::fd::AsFd as _;

use proptest::prelude::*;

use super::super::packet::{Key, Op};
use super::super::{
    BUF_ALLOC_BYTES, CreditState, MAX_SPARES, MAX_UNREAD_BYTES, Ports, SMALL_BUF_ALLOC_BYTES,
    SpareState, VsockState,
};
use super::guest::{GUEST_CID, Guest, QUEUE_SIZE, key_of, noise, read_now};
use crate::devices::StateError;
use crate::devices::virtio::{ChipState, VirtioDevice as _};

const PORT: u32 = 1024;
const FIRST_HOST_PORT: u32 = 1 << 30;

const KEY: Key = Key {
    host_port: 52,
    guest_port: 7,
};

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
        lost: vec![KEY.into()],
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
    type Change = fn(&mut VsockState);

    assert!(restore(state()).is_ok());
    let changes: [(Change, &str); 13] = [
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
            let key = saved.ports.into();
            let given = guest.received.iter().filter(|(header, _)| key_of(header) == key);
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
