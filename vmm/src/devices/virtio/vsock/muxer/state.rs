//! Connections in a snapshot: spare ones go on in every clone, and the guest is
//! told that all others are over.

use std::collections::BTreeSet;
use std::time::Instant;

use super::super::connection::Connection;
use super::super::credit::Credit;
use super::super::link::Link;
use super::super::packet::{Header, Key, TYPE_STREAM};
use super::super::reactor::{NO_PORT, Token};
use super::super::stream::Stream;
use super::super::{
    HOST_CID, MAX_CONNECTIONS, MAX_SPARES, MAX_UNREAD_BYTES, SMALL_BUF_ALLOC_BYTES, Spare,
    SpareState, VsockState, socket,
};
use super::{FIRST_HOST_PORT, LAST_HOST_PORT, MAX_RESETS, Muxer};
use crate::devices::StateError;

// All lost connections fit among the RSTs, and all unread bytes in the room that
// the least of connections promises.
const _: () = assert!(MAX_CONNECTIONS <= MAX_RESETS);
const _: () = assert!(MAX_UNREAD_BYTES <= SMALL_BUF_ALLOC_BYTES as usize);

// === impl Muxer ===

impl Muxer {
    pub(in super::super) fn save(&self) -> VsockState {
        // An RST to another address than the host's has no place in the state.
        // It answers a packet to nobody: its sender tires of waiting.
        let resets: BTreeSet<Key> = self
            .resets
            .iter()
            .filter(|reset| reset.src_cid == HOST_CID && reset.kind == TYPE_STREAM)
            .map(|reset| Key {
                host_port: reset.src_port,
                guest_port: reset.dst_port,
            })
            .filter(|key| is_port_pair(*key))
            .collect();
        let mut spares = Vec::new();
        let mut lost = BTreeSet::new();
        for (&key, link) in &self.connections {
            match link.unread(MAX_UNREAD_BYTES) {
                Some(unread) if !resets.contains(&key) => spares.push(SpareState {
                    ports: key.into(),
                    credit: link.connection.credit.save(),
                    unread,
                }),
                _ if link.connection.guest_knows() => {
                    lost.insert(key);
                }
                _ => {}
            }
        }
        for reset in resets {
            if lost.len() == MAX_RESETS {
                break;
            }
            lost.insert(reset);
        }
        VsockState {
            guest_cid: self.config.guest_cid,
            next_host_port: self.next_host_port,
            spares,
            lost: lost.into_iter().map(Into::into).collect(),
        }
    }

    /// Takes over a state, which is untrusted. The muxer is new.
    pub(in super::super) fn restore(&mut self, state: VsockState) -> Result<(), StateError> {
        self.check(&state).map_err(StateError::Chip)?;
        self.next_host_port = state.next_host_port;
        for ports in state.lost {
            self.push_reset(Header::reset(ports.into(), self.config.guest_cid));
        }
        for spare in state.spares {
            self.restore_spare(&spare).map_err(StateError::Chip)?;
        }
        Ok(())
    }

    fn check(&self, state: &VsockState) -> Result<(), String> {
        if state.guest_cid != self.config.guest_cid {
            return Err(format!(
                "its guest has context id {}, this machine's {}",
                state.guest_cid, self.config.guest_cid
            ));
        }
        if !(FIRST_HOST_PORT..=LAST_HOST_PORT).contains(&state.next_host_port) {
            let port = state.next_host_port;
            return Err(format!("{port} is no port that the host connects from"));
        }
        for (what, count, limit) in [
            ("spare", state.spares.len(), MAX_SPARES),
            ("lost", state.lost.len(), MAX_RESETS),
        ] {
            if count > limit {
                return Err(format!(
                    "it has {count} {what} connections, of at most {limit}"
                ));
            }
        }
        let mut keys = BTreeSet::new();
        let spares = state.spares.iter().map(|spare| spare.ports);
        for ports in spares.chain(state.lost.iter().copied()) {
            let key = Key::from(ports);
            let named = format!("ports {} and {}", key.host_port, key.guest_port);
            if !is_port_pair(key) {
                return Err(format!("no connection has {named}"));
            }
            if !keys.insert(key) {
                return Err(format!("two connections have {named}"));
            }
        }
        state.spares.iter().try_for_each(check_spare)
    }

    fn restore_spare(&mut self, saved: &SpareState) -> Result<(), String> {
        let refused = |error| format!("the host refused a spare connection's socket: {error}");
        let key = Key::from(saved.ports);
        let guest_cid = self.config.guest_cid;
        let mut credit = Credit::restore(&saved.credit).map_err(|error| error.to_string())?;
        let (ours, theirs) = socket::pair().map_err(refused)?;
        let mut stream = Stream::new(ours);
        if stream.greet(&saved.unread).is_err() {
            // The host gives sockets less room than where the state is from.
            self.push_reset(Header::reset(key, guest_cid));
            return Ok(());
        }
        credit.note_forwarded(credit.held_bytes());
        let token = Token::Connection(key);
        self.reactor.watch_stream(&stream, token).map_err(refused)?;
        let connection = Connection::restored(key, guest_cid, credit);
        self.connections
            .insert(key, Link::restored(connection, stream));
        self.restored.push(Spare {
            guest_port: key.guest_port,
            stream: theirs,
        });
        self.refresh(key, Instant::now());
        Ok(())
    }
}

fn check_spare(spare: &SpareState) -> Result<(), String> {
    let bad = |words| {
        let ports = spare.ports;
        Err(format!(
            "of the spare connection with ports {} and {}: {words}",
            ports.host_port, ports.guest_port
        ))
    };
    if !(FIRST_HOST_PORT..=LAST_HOST_PORT).contains(&spare.ports.host_port) {
        return bad("the host does not connect from this port".into());
    }
    let unread = spare.unread.len();
    if unread > MAX_UNREAD_BYTES {
        return bad(format!(
            "{unread} bytes wait for the host, of at most {MAX_UNREAD_BYTES}"
        ));
    }
    match Credit::restore(&spare.credit) {
        Err(error) => bad(error.to_string()),
        Ok(credit) if credit.held_bytes() as usize > unread => bad(format!(
            "it holds {} bytes, and only {unread} wait for the host",
            credit.held_bytes()
        )),
        Ok(_) => Ok(()),
    }
}

fn is_port_pair(key: Key) -> bool {
    key.host_port != NO_PORT && key.guest_port != NO_PORT
}
