//! Ethernet addresses.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A unicast Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac([u8; 6]);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an Ethernet address of one host; give one such as \"02:00:00:00:00:01\"")]
pub struct MacError(String);

// === impl Mac ===

impl Mac {
    /// Locally administered, the same in every slot.
    pub const GATEWAY: Self = Self([0x02, 0x53, 0x42, 0x00, 0x00, 0x01]);
    /// Of the slot's end of its veth pair, and the host's: each pair is a network
    /// of its own.
    pub(super) const UPLINK: Self = Self([0x02, 0x53, 0x42, 0x00, 0x00, 0x02]);
    pub(super) const HOST: Self = Self([0x02, 0x53, 0x42, 0x00, 0x00, 0x03]);

    /// Of an interface without a slot.
    pub const UNUSED: Self = Self([0x02, 0x53, 0x42, 0x00, 0x00, 0x04]);

    /// Locally administered and unicast, 46 bits of it random.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 6];
        let mut filled = 0;
        while filled < bytes.len() {
            filled += rustix::rand::getrandom(
                &mut bytes[filled..],
                rustix::rand::GetRandomFlags::empty(),
            )?;
        }
        bytes[0] = bytes[0] & !1 | 2;
        Ok(Self(bytes))
    }

    pub fn bytes(self) -> [u8; 6] {
        self.0
    }

    /// The link-local address that a guest derives from it (RFC 4291, appendix A).
    pub fn link_local(self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.0;
        Ipv6Addr::from([
            0xfe,
            0x80,
            0,
            0,
            0,
            0,
            0,
            0,
            a ^ 2,
            b,
            c,
            0xff,
            0xfe,
            d,
            e,
            f,
        ])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let error = || MacError(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(error)?;
            let digits = part.len() == 2 && part.bytes().all(|c| c.is_ascii_hexdigit());
            *byte = u8::from_str_radix(part, 16)
                .ok()
                .filter(|_| digits)
                .ok_or_else(error)?;
        }
        let unicast = bytes[0] & 1 == 0 && bytes != [0; 6];
        match parts.next() {
            None if unicast => Ok(Self(bytes)),
            _ => Err(error()),
        }
    }
}

impl TryFrom<String> for Mac {
    type Error = MacError;

    fn try_from(text: String) -> Result<Self, MacError> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_addresses_are_refused() {
        for text in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:01:02",
            "02-00-00-00-00-01",
            "2:0:0:0:0:1",
            "+2:00:00:00:00:01",
            "0g:00:00:00:00:01",
            "01:00:5e:00:00:01",
            "ff:ff:ff:ff:ff:ff",
            "00:00:00:00:00:00",
        ] {
            assert!(text.parse::<Mac>().is_err(), "{text}");
        }
        let mac: Mac = "02:AB:00:00:00:01".parse().unwrap();
        assert_eq!(mac.to_string(), "02:ab:00:00:00:01");
        assert_eq!(mac.link_local().to_string(), "fe80::ab:ff:fe00:1");
    }

    #[test]
    fn random_ones_are_local_unicast_and_differ() {
        let (one, other) = (Mac::random().unwrap(), Mac::random().unwrap());
        assert_ne!(one, other);
        assert_eq!(one.bytes()[0] & 3, 2);
        assert_eq!(one.to_string().parse(), Ok(one));
    }
}
