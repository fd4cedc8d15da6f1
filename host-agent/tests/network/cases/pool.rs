//! Slots that wait, are taken and come back.

use std::collections::HashSet;

use soulbox_host::net::{Network, NoSlot, SlotError};

use super::{Sandbox, no_internet};
use crate::guest::Guest;
use crate::world::{INTERNET, World, at, config, eventually, sh, state};

fn namespaces() -> usize {
    sh("ls /run/netns | grep -c ^soulbox- || true")
        .trim()
        .parse()
        .unwrap()
}

pub async fn a_slot_is_refused_when_there_is_none(_: World) {
    let before = state();
    let mut two = config();
    two.slots_max = 2;
    let network = Network::start(&two, &[]).await.unwrap().network;
    let one = network.take_or_make().await.unwrap();
    let other = network.take_or_make().await.unwrap();
    for refused in [network.take(), network.take_or_make().await] {
        let error = refused.unwrap_err();
        assert!(matches!(error, NoSlot::Exhausted { max: 2 }), "{error}");
        assert!(error.to_string().contains("network.slots_max"), "{error}");
    }
    assert_eq!(namespaces(), 2, "nothing half made");
    let (mac, index) = (one.mac, one.index);
    drop(one.tap);
    network.release(index).await.unwrap();
    assert!(
        matches!(network.release(index).await, Err(SlotError::Unknown { slot }) if slot == index)
    );
    let again = network.take_or_make().await.unwrap();
    assert_eq!(again.index, index);
    assert_ne!(again.mac, mac, "two guests never share a MAC");
    for slot in [again, other] {
        drop(slot.tap);
        network.release(slot.index).await.unwrap();
    }
    network.stop().await;
    assert_eq!(state(), before);
}

pub async fn a_slot_comes_back_clean(_: World) {
    let mut sandbox = Sandbox::start().await;
    let (_stream, _) = sandbox.guest.connect(at(INTERNET[0], 80)).unwrap();
    sandbox.guest.refused(at("10.99.0.1", 80));
    sandbox.denied.recv().await.unwrap();
    sandbox.apply(&no_internet()).await;
    let index = sandbox.slot.index;
    drop(sandbox.guest);
    drop(sandbox.slot.tap);
    sandbox.network.release(index).await.unwrap();
    // The same number comes round when all others have had their turn.
    let mut held = Vec::new();
    let slot = loop {
        let slot = sandbox.network.take_or_make().await.unwrap();
        if slot.index == index {
            break slot;
        }
        held.push(slot);
    };
    let counters = sandbox.network.counters(index).await.unwrap();
    assert_eq!(counters.connections_open, 0);
    assert_eq!((counters.connections, counters.sent.packets), (0, 0));
    assert!(
        counters
            .dropped
            .values()
            .all(|traffic| traffic.packets == 0)
    );
    let guest = Guest::start("next", &slot.tap, slot.mac);
    assert!(
        guest.reaches(at(INTERNET[0], 80)),
        "the policy is the default again"
    );
}

pub async fn many_slots_are_there_at_once(_: World) {
    let before = state();
    let mut many = config();
    many.slots_ready = 24;
    many.slots_max = 32;
    let network = Network::start(&many, &[]).await.unwrap().network;
    eventually("they are not made", async || network.ready() == 24).await;
    let slots: Vec<_> = (0..24).map(|_| network.take().unwrap()).collect();
    let distinct: HashSet<_> = slots
        .iter()
        .map(|slot| (slot.mac, slot.ipv4, slot.ipv6))
        .collect();
    assert_eq!(distinct.len(), 24);
    // More are made to replace them, as far as there may be.
    eventually("no more are made", async || network.ready() == 8).await;
    assert_eq!(namespaces(), 32);
    for slot in slots {
        drop(slot.tap);
        network.release(slot.index).await.unwrap();
    }
    network.stop().await;
    assert_eq!(state(), before);
}
