//! Spare connections: the device opens them itself and keeps the host's ends, so
//! that clones of the machine begin with connections that the guest has accepted.

use std::io::{Error, ErrorKind, Result};
use std::time::Instant;

use super::super::connection::{Connection, Phase};
use super::super::link::Link;
use super::super::reactor::{NO_PORT, Token};
use super::super::stream::Stream;
use super::super::{MAX_CONNECTIONS, MAX_SPARES, Spare, socket};
use super::Muxer;

// === impl Muxer ===

impl Muxer {
    /// Sees to it that there are `count` connections to the port whose host's ends
    /// stay here; a snapshot leaves those that it has saved. On an error from the
    /// host, some of them may have been asked for.
    pub(in super::super) fn open_spares(&mut self, guest_port: u32, count: u32) -> Result<()> {
        let refusal = |kind, words: String| Err(Error::new(kind, words));
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        if guest_port == NO_PORT {
            let words = format!("{guest_port} stands for any port; name one");
            return refusal(ErrorKind::InvalidInput, words);
        }
        if count > MAX_SPARES {
            let words = format!("{count} spare connections; ask for at most {MAX_SPARES}");
            return refusal(ErrorKind::InvalidInput, words);
        }
        if !self.active {
            let words = "the guest's vsock driver is not ready; try again".to_owned();
            return refusal(ErrorKind::NotConnected, words);
        }
        let spares = self.spares().count();
        let to_port = self
            .connections
            .iter()
            .filter(|(key, link)| key.guest_port == guest_port && link.is_spare());
        let count = count.saturating_sub(to_port.count());
        if spares + count > MAX_SPARES {
            let words = format!("{spares} spare connections exist, of at most {MAX_SPARES}");
            return refusal(ErrorKind::ResourceBusy, words);
        }
        let connections = self.connections.len();
        if connections + count > MAX_CONNECTIONS {
            let words = format!("{connections} connections exist, of at most {MAX_CONNECTIONS}");
            return refusal(ErrorKind::ResourceBusy, words);
        }

        let pairs: Vec<_> = (0..count).map(|_| socket::pair()).collect::<Result<_>>()?;
        let now = Instant::now();
        for (ours, theirs) in pairs {
            let key = self.free_key(guest_port);
            self.reactor.watch_stream(&ours, Token::Connection(key))?;
            let connection =
                Connection::from_host(key, self.config.guest_cid, self.buf_alloc_bytes());
            let link = Link::spare(connection, Stream::new(ours), theirs, now);
            self.connections.insert(key, link);
            self.refresh(key, now);
        }
        Ok(())
    }

    pub(in super::super) fn take_spares(&mut self) -> Vec<Spare> {
        std::mem::take(&mut self.restored)
    }

    /// Those that the guest has accepted.
    pub(super) fn open_spare_count(&self) -> usize {
        self.spares()
            .filter(|link| link.connection.phase() == Phase::Open)
            .count()
    }

    fn spares(&self) -> impl Iterator<Item = &Link> {
        self.connections.values().filter(|link| link.is_spare())
    }
}
