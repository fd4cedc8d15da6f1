//! The network device.

use std::os::fd::OwnedFd;

use soulbox_proto::vmm::v1;

use super::{ConfigError, Fds, RateLimit, invalid};
use crate::devices::virtio::net::{DEFAULT_MTU, NetChange, NetConfig, Tap};

/// The smallest MTU that Ethernet's IPv4 may have (RFC 791), in bytes.
const MTU_MIN: u16 = 68;

// === impl NetConfig ===

impl NetConfig {
    pub(super) fn from_message(net: v1::Net, fds: &mut Fds) -> Result<Self, ConfigError> {
        let tap = fds.take_optional("net.tap_fd", net.tap_fd)?;
        Ok(Self {
            mac: checked_mac(&net.mac)?,
            mtu: checked_mtu(net.mtu)?,
            rx: RateLimit::from_message("net.rx", net.rx)?,
            tx: RateLimit::from_message("net.tx", net.tx)?,
            // Last, because it changes the descriptor.
            tap: tap.map(checked_tap).transpose()?,
        })
    }
}

fn checked_mac(mac: &[u8]) -> Result<[u8; 6], ConfigError> {
    let field = "net.mac";
    let mac: [u8; 6] = mac
        .try_into()
        .map_err(|_| invalid(field, format!("{} bytes; an address has 6", mac.len())))?;
    let [first, ..] = mac;
    if first & 1 != 0 || mac == [0; 6] {
        return Err(invalid(field, format!("{mac:02x?} is not of one host")));
    }
    Ok(mac)
}

fn checked_mtu(mtu: u32) -> Result<u16, ConfigError> {
    match u16::try_from(mtu) {
        Ok(0) => Ok(DEFAULT_MTU),
        Ok(mtu) if mtu >= MTU_MIN => Ok(mtu),
        _ => Err(invalid(
            "net.mtu",
            format!("{mtu} is neither 0 nor within {MTU_MIN}–65,535"),
        )),
    }
}

fn checked_tap(fd: OwnedFd) -> Result<Tap, ConfigError> {
    Tap::new(fd).map_err(|error| invalid("net.tap_fd", error.to_string()))
}

// === impl NetChange ===

impl NetChange {
    pub fn from_message(set: v1::SetNet, fds: Vec<OwnedFd>) -> Result<Self, ConfigError> {
        Fds::new(fds).finish()?;
        let limit = |field, limit: Option<v1::RateLimit>| {
            limit
                .map(|limit| RateLimit::from_message(field, Some(limit)))
                .transpose()
        };
        Ok(Self {
            rx: limit("rx", set.rx)?,
            tx: limit("tx", set.tx)?,
            link_up: set.link_up,
        })
    }
}
