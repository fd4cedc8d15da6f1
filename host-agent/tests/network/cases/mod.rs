//! The tests.

mod crashes;
mod egress;
mod hostile;
mod pool;
mod start;

use std::sync::Arc;

use soulbox_host::net::{Denied, Network, Policy, Rule, Slot, SlotCounters};
use tokio::sync::mpsc::Receiver;

use crate::guest::Guest;
use crate::world::{Case, config};

macro_rules! cases {
    ($($module:ident: $($name:ident),+;)+) => {
        pub const ALL: &[(&str, Case)] = &[
            $($((stringify!($name), |world| Box::pin($module::$name(world))),)+)+
        ];
    };
}

cases! {
    egress: a_guest_reaches_the_internet_and_nothing_else,
        the_host_reaches_a_guest_and_nobody_else_does,
        lists_are_judged_in_their_order,
        what_is_no_longer_allowed_stops_at_once,
        a_change_under_load_loses_no_packet_that_is_allowed,
        a_domain_opens_what_its_answers_name,
        one_sandbox_has_so_many_connections;
    hostile: spoofed_sources_go_nowhere,
        floods_and_forgeries_stay_in_the_slot,
        any_frame_is_taken_without_harm;
    pool: a_slot_is_refused_when_there_is_none,
        a_slot_comes_back_clean,
        many_slots_are_there_at_once;
    start: what_is_wrong_with_the_host_is_said,
        nftables_that_is_absent_or_refuses_is_said,
        the_resolver_has_its_sockets,
        neither_the_host_nor_a_sandbox_is_asked_for_names;
    crashes: a_daemon_killed_at_any_step_leaves_nothing,
        a_live_sandbox_keeps_its_network,
        what_was_removed_from_a_live_slot_comes_back;
}

/// A started network with a sandbox in it.
struct Sandbox {
    network: Arc<Network>,
    denied: Receiver<Denied>,
    slot: Slot,
    guest: Guest,
}

// === impl Sandbox ===

impl Sandbox {
    async fn start() -> Self {
        let started = Network::start(&config(), &[]).await.unwrap();
        let slot = started.network.take().unwrap();
        let guest = Guest::start("guest", &slot.tap, slot.mac);
        Self {
            network: started.network,
            denied: started.denied,
            slot,
            guest,
        }
    }

    async fn apply(&self, policy: &Policy) {
        self.network.apply(self.slot.index, policy).await.unwrap();
    }

    async fn counters(&self) -> SlotCounters {
        self.network.counters(self.slot.index).await.unwrap()
    }

    async fn dropped(&self, reason: &str) -> u64 {
        self.counters().await.dropped[reason].packets
    }
}

fn rule(cidr: &str) -> Rule {
    Rule::parse(cidr, "any", &[]).unwrap()
}

fn no_internet() -> Policy {
    Policy {
        internet: false,
        ..Policy::default()
    }
}
