//! Daemons that are killed, and what the next one finds.

use soulbox_host::net::Network;

use crate::daemon::{Daemon, Record};
use crate::guest::{Guest, echoes};
use crate::world::{INTERNET, World, at, config, eventually, sh, state};

/// Where a slot can be left half made, and half removed.
const MAKING: [&str; 9] = [
    "named",
    "unshared",
    "namespace",
    "tap",
    "veth",
    "host_end",
    "links",
    "rules",
    "ready",
];
const REMOVING: [&str; 2] = ["unlinked", "unnamed"];

pub async fn a_daemon_killed_at_any_step_leaves_nothing(_: World) {
    let before = state();
    for step in MAKING {
        // The first slot is made before the daemon serves; taking two needs a second.
        for time in 1..=2 {
            let daemon = Daemon::start(&format!("{step}:{time}"), &[]);
            if time == 2 {
                daemon.tell("take");
                daemon.tell("take");
            }
            assert!(daemon.was_killed(), "{step} is never come to");
        }
    }
    killed_while_removing(&[], || ());
    // What the last of them has left is there to be found.
    let next = Daemon::start("never", &[]);
    drop(next.take());
    next.tell("free");
    assert!(!next.was_killed());
    assert_eq!(state(), before);
}

/// Kills daemons as they take a slot back, and as they remove what those have left.
fn killed_while_removing(live: &[Record], mut check: impl FnMut()) {
    for step in REMOVING {
        assert!(!Daemon::start("never", live).was_killed());
        let daemon = Daemon::start(step, live);
        drop(daemon.take());
        daemon.tell("free");
        assert!(daemon.was_killed(), "{step} is never come to");
        check();
        assert!(Daemon::start(step, live).was_killed(), "nothing was left");
        check();
    }
}

pub async fn a_live_sandbox_keeps_its_network(_: World) {
    let before = state();
    let first = Daemon::start("never", &[]);
    let (record, tap) = first.take();
    let guest = Guest::start("guest", &tap, record.mac);
    let (mut stream, _) = guest.connect(at(INTERNET[0], 80)).unwrap();
    let records = [record.clone()];
    first.kill();
    assert!(echoes(&mut stream), "it needs no daemon");
    for step in MAKING {
        let daemon = Daemon::start(step, &records);
        assert!(daemon.was_killed(), "{step} is never come to");
        assert!(echoes(&mut stream), "{step}");
    }
    killed_while_removing(&records, || assert!(echoes(&mut stream)));
    let started = Network::start(&config(), &[record.live()]).await.unwrap();
    assert!(started.lost.is_empty());
    let network = started.network;
    assert!(echoes(&mut stream) && guest.reaches(at(INTERNET[1], 80)));
    assert!(network.counters(record.index).await.unwrap().connections >= 2);
    // It is the next daemon's in every respect.
    network
        .apply(record.index, &super::no_internet())
        .await
        .unwrap();
    assert!(!echoes(&mut stream));
    drop((guest, tap));
    network.release(record.index).await.unwrap();
    network.stop().await;
    assert_eq!(state(), before);
}

pub async fn what_was_removed_from_a_live_slot_comes_back(_: World) {
    let before = state();
    let first = Daemon::start("never", &[]);
    let (record, tap) = first.take();
    let guest = Guest::start("guest", &tap, record.mac);
    first.kill();
    let name = format!("soulbox-{}", record.index);
    for damage in [
        format!("ip netns exec {name} nft flush ruleset"),
        format!("ip link del sb{}", record.index),
        "nft flush ruleset".to_owned(),
    ] {
        sh(&damage);
        let daemon = Daemon::start("never", std::slice::from_ref(&record));
        let (other, _tap) = daemon.take();
        assert_ne!(other.index, record.index);
        assert!(
            guest.reaches(at(INTERNET[0], 80)) && guest.reaches(at(INTERNET[1], 80)),
            "{damage}"
        );
        assert!(guest.connect(at("10.99.0.1", 80)).is_err(), "{damage}");
        daemon.kill();
    }
    // A sandbox whose monitor is gone is told as lost, and its slot is removed.
    drop((guest, tap));
    eventually("the TAP stays", async || {
        !sh(&format!("ip -n {name} -o link")).contains("tap0")
    })
    .await;
    let started = Network::start(&config(), &[record.live()]).await.unwrap();
    assert_eq!(started.lost.len(), 1);
    assert!(started.lost[0].error.to_string().contains("no TAP"));
    started.network.stop().await;
    assert_eq!(state(), before);
}
