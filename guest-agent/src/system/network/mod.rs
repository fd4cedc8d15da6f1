//! The guest's network: what the host says of it, over rtnetlink.
//!
//! It is on the way of every restore, where all but the Ethernet address is as it
//! has to be. So what there is is read first, in a few dumps, and what has to change
//! goes to the kernel in one piece.

mod connections;
mod interface;
mod link;
mod netlink;
mod spec;
#[cfg(test)]
mod tests;

use std::fs;
use std::io;

use netlink_sys::protocols::NETLINK_ROUTE;
use rustix::io::Errno;

pub(crate) use self::connections::{ResetError, reset};
use self::interface::Interface;
use self::link::Link;
use self::netlink::{Netlink, Refused};
pub(crate) use self::spec::Network;

/// The interface that the host speaks of: the first one that there was before any
/// program could make another. It is known by its number from then on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Nic {
    index: Option<u32>,
}

/// The network is as it was, or some of it is.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    #[error("the guest has no network interface: give the machine one, or configure no network")]
    NoInterface,
    #[error("the guest's network could not be read")]
    Look(#[from] io::Error),
    #[error("the guest's {what} could not be set")]
    Change {
        what: &'static str,
        source: io::Error,
    },
}

// === impl Nic ===

impl Nic {
    pub(crate) fn find() -> Result<Self, NetworkError> {
        let mut netlink = open()?;
        let link = Link::find(&mut netlink)?;
        let index = link.map(|link| link.index);
        Ok(Self { index })
    }

    /// Makes the interface what the host wants, and touches nothing that is so.
    /// Can be repeated, also after it has failed half-way.
    pub(crate) fn connect(self, network: &Network) -> Result<(), NetworkError> {
        let index = self.index.ok_or(NetworkError::NoInterface)?;
        let mut netlink = open()?;
        let link = Link::read(&mut netlink, index)?;
        // Before it comes up: they count from then on.
        calm_ipv6(&link).map_err(|source| NetworkError::Change {
            what: "settings of IPv6",
            source,
        })?;
        let interface = Interface::read(&mut netlink, link, network)?;
        Ok(netlink.carry_out(&interface.changes_to(network))?)
    }

    /// Turns the interface off, where there is one and it is on.
    pub(crate) fn disconnect(self) -> Result<(), NetworkError> {
        let Some(index) = self.index else {
            return Ok(());
        };
        let mut netlink = open()?;
        match Link::read(&mut netlink, index) {
            Ok(link) if link.is_up => Ok(netlink.carry_out(&[link.turn_off()])?),
            Ok(_) => Ok(()),
            // A program has moved it out of our namespace.
            Err(error) if Errno::from_io_error(&error) == Some(Errno::NODEV) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl From<Refused> for NetworkError {
    fn from(Refused { what, source }: Refused) -> Self {
        Self::Change { what, source }
    }
}

/// Brings the loopback interface up; the kernel gives it its addresses.
pub(crate) fn loopback_up() -> io::Result<()> {
    let up = open()?.carry_out(&[Link::turn_on_loopback()]);
    up.map_err(|refused| refused.source)
}

fn open() -> io::Result<Netlink> {
    let netlink = Netlink::open(NETLINK_ROUTE)?;
    netlink.be_strict()?;
    Ok(netlink)
}

/// Makes IPv6 believe no router and ask nobody: the guest is told all by the host.
fn calm_ipv6(link: &Link) -> io::Result<()> {
    let Some(now) = link.ipv6 else {
        return Ok(());
    };
    for (setting, value) in [
        ("accept_ra", now.accept_ra),
        ("autoconf", now.autoconf),
        ("accept_dad", now.accept_dad),
    ] {
        if value != 0 {
            let path = format!("/proc/sys/net/ipv6/conf/{}/{setting}", link.name);
            fs::write(path, "0")?;
        }
    }
    Ok(())
}
