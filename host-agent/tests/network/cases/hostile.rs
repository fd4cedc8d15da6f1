//! Guests that mean harm.

use etherparse::PacketBuilder;
use soulbox_host::net::Mac;

use super::Sandbox;
use crate::world::{INTERNET, SILENCE, World, at, sh};

const GUEST4: [u8; 4] = [172, 30, 0, 2];
const GUEST6: &str = "fd5b::2";

fn udp4(mac: [u8; 6], from: [u8; 4], to: &str, ports: (u16, u16)) -> Vec<u8> {
    let to: std::net::Ipv4Addr = to.parse().unwrap();
    let builder = PacketBuilder::ethernet2(mac, Mac::GATEWAY.bytes())
        .ipv4(from, to.octets(), 64)
        .udp(ports.0, ports.1);
    let mut frame = Vec::new();
    builder.write(&mut frame, b"content").unwrap();
    frame
}

fn udp6(mac: [u8; 6], from: &str, to: &str, ports: (u16, u16)) -> Vec<u8> {
    let [from, to] = [from, to].map(|text| text.parse::<std::net::Ipv6Addr>().unwrap().octets());
    let builder = PacketBuilder::ethernet2(mac, Mac::GATEWAY.bytes())
        .ipv6(from, to, 64)
        .udp(ports.0, ports.1);
    let mut frame = Vec::new();
    builder.write(&mut frame, b"content").unwrap();
    frame
}

/// An ICMPv6 message of `kind`, with the hop limit that neighbour discovery asks for.
fn icmp6(mac: [u8; 6], from: &str, to: &str, kind: u8, content: &[u8]) -> Vec<u8> {
    let [from, to] = [from, to].map(|text| text.parse::<std::net::Ipv6Addr>().unwrap().octets());
    let builder = PacketBuilder::ethernet2(mac, [0x33, 0x33, 0, 0, 0, 1])
        .ipv6(from, to, 255)
        .icmpv6_raw(kind, 0, [0; 4]);
    let mut frame = Vec::new();
    builder.write(&mut frame, content).unwrap();
    frame
}

fn arp(mac: [u8; 6], operation: u8, from_mac: [u8; 6], from: [u8; 4], to: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(mac);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, operation]);
    frame.extend(from_mac);
    frame.extend(from);
    frame.extend([0; 6]);
    frame.extend(to);
    frame
}

/// A neighbour solicitation for `target` that tells the sender's Ethernet address.
fn solicitation(mac: [u8; 6], from: &str, target: &str) -> Vec<u8> {
    let mut content = target
        .parse::<std::net::Ipv6Addr>()
        .unwrap()
        .octets()
        .to_vec();
    content.extend([1, 1]);
    content.extend(mac);
    icmp6(mac, from, "ff02::1:ff00:1", 135, &content)
}

fn neighbours(sandbox: &Sandbox) -> usize {
    let name = sandbox
        .slot
        .namespace
        .file_name()
        .unwrap()
        .to_str()
        .unwrap();
    sh(&format!("ip -n {name} neigh show dev tap0"))
        .lines()
        .count()
}

pub async fn spoofed_sources_go_nowhere(world: World) {
    let mut sandbox = Sandbox::start().await;
    let own = sandbox.slot.mac.bytes();
    let other = Mac::random().unwrap().bytes();
    // The frames are sound: the same with the guest's own addresses is heard.
    let heard = world.internet.heard();
    sandbox
        .guest
        .inject(&udp4(own, GUEST4, INTERNET[0], (5000, 80)));
    sandbox
        .guest
        .inject(&udp6(own, GUEST6, INTERNET[1], (5000, 80)));
    crate::world::eventually("they are not heard", async || {
        world.internet.heard() == heard + 2
    })
    .await;
    let before = sandbox.dropped("spoofed").await;
    for source in [
        [172, 30, 0, 3],
        [10, 213, 0, 1],
        [203, 0, 113, 20],
        [0, 0, 0, 0],
        [127, 0, 0, 1],
    ] {
        sandbox
            .guest
            .inject(&udp4(own, source, INTERNET[0], (5000, 80)));
    }
    for source in ["fd5b::3", "2001:db8:2::20", "fe80::1", "::1", "::"] {
        sandbox
            .guest
            .inject(&udp6(own, source, INTERNET[1], (5000, 80)));
    }
    sandbox
        .guest
        .inject(&udp4(other, GUEST4, INTERNET[0], (5000, 80)));
    sandbox
        .guest
        .inject(&udp6(other, GUEST6, INTERNET[1], (5000, 80)));
    sandbox
        .guest
        .inject(&arp(own, 1, other, GUEST4, [172, 30, 0, 1]));
    sandbox
        .guest
        .inject(&arp(own, 2, own, [172, 30, 0, 1], GUEST4));
    tokio::time::sleep(SILENCE).await;
    assert_eq!(sandbox.dropped("spoofed").await, before + 14);
    assert_eq!(world.internet.heard(), heard + 2);
    assert_eq!(sandbox.denied.recv().await.unwrap().reason, "spoofed");
    assert!(sandbox.guest.reaches(at(INTERNET[0], 80)));
}

pub async fn floods_and_forgeries_stay_in_the_slot(_: World) {
    let sandbox = Sandbox::start().await;
    let own = sandbox.slot.mac.bytes();
    let link_local = sandbox.slot.mac.link_local().to_string();
    let others = crate::world::state();
    assert!(sandbox.guest.reaches(at(INTERNET[1], 80)));
    let known = neighbours(&sandbox);
    for number in 0..1000_u32 {
        let [_, _, high, low] = number.to_be_bytes();
        let claimed = format!("fe80::{number:x}");
        sandbox
            .guest
            .inject(&solicitation(own, &claimed, "fd5b::1"));
        sandbox
            .guest
            .inject(&solicitation(own, &link_local, "fd5b::1"));
        sandbox
            .guest
            .inject(&arp(own, 1, own, GUEST4, [172, 30, 0, 1]));
        sandbox
            .guest
            .inject(&arp(own, 1, own, [172, 30, high, low], [172, 30, 0, 1]));
    }
    let counters = sandbox.counters().await;
    assert!(counters.dropped["flood"].packets > 1500, "{counters:?}");
    assert!(counters.dropped["spoofed"].packets > 1900, "{counters:?}");
    // Its own link-local address may have been learnt.
    assert!(neighbours(&sandbox) <= known + 1);
    assert_eq!(crate::world::state(), others);

    let before = counters.dropped["forged"].packets;
    // Answers of DHCP servers, a router's advertisement, a redirect.
    sandbox
        .guest
        .inject(&udp4(own, GUEST4, "255.255.255.255", (67, 68)));
    sandbox
        .guest
        .inject(&udp6(own, GUEST6, "ff02::1", (547, 546)));
    sandbox
        .guest
        .inject(&icmp6(own, &link_local, "ff02::1", 134, &[0; 8]));
    sandbox
        .guest
        .inject(&icmp6(own, GUEST6, "ff02::1", 137, &[0; 32]));
    sandbox
        .guest
        .inject(&arp(own, 2, own, GUEST4, [172, 30, 0, 1]));
    // No Ethernet type that anybody here speaks.
    let mut strange = udp4(own, GUEST4, INTERNET[0], (1, 80));
    strange[12..14].copy_from_slice(&[0x88, 0x63]);
    sandbox.guest.inject(&strange);
    assert_eq!(sandbox.dropped("forged").await, before + 6);
    assert!(sandbox.guest.reaches(at(INTERNET[0], 80)));
}

pub async fn any_frame_is_taken_without_harm(world: World) {
    let sandbox = Sandbox::start().await;
    let own = sandbox.slot.mac.bytes();
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let sound = [
        udp4(own, GUEST4, "10.99.0.1", (5000, 80)),
        udp6(own, GUEST6, "fd99::1", (5000, 80)),
        solicitation(own, "fd5b::2", "fd5b::1"),
        arp(own, 1, own, GUEST4, [172, 30, 0, 1]),
    ];
    let heard = world.internet.heard();
    for round in 0..4000_usize {
        let mut frame = sound[round % sound.len()].clone();
        for _ in 0..=next() % 4 {
            let place = usize::try_from(next()).unwrap() % frame.len();
            // Where it goes stays: another might be allowed.
            if !(22..60).contains(&place) {
                frame[place] = u8::try_from(next() & 0xff).unwrap();
            }
        }
        let length = 14 + usize::try_from(next()).unwrap() % (frame.len() - 14);
        frame.truncate(if next() & 1 == 0 { length } else { frame.len() });
        sandbox.guest.inject(&frame);
    }
    assert_eq!(world.internet.heard(), heard);
    assert!(
        sandbox.guest.reaches(at(INTERNET[0], 80)) && sandbox.guest.reaches(at(INTERNET[1], 80))
    );
}
