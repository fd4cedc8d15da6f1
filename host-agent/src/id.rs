//! The name of a sandbox.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

const PREFIX: &str = "sb-";
const RANDOM_CHARACTERS: usize = 20;
/// RFC 4648's base-32 alphabet, in lower case: safe in host names and paths.
const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

/// "sb-" and 20 characters of `[a-z2-7]`: 100 random bits.
///
/// A value of this type is safe as a path component and as a host name.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SandboxId(String);

#[derive(Debug, thiserror::Error)]
#[error(
    "{0:?} is not a sandbox id: give \"sb-\" and {RANDOM_CHARACTERS} characters of [a-z2-7], as `soulbox ls` prints it"
)]
pub struct ParseIdError(String);

// === impl SandboxId ===

impl SandboxId {
    /// The length of every id, in bytes.
    pub const LEN: usize = PREFIX.len() + RANDOM_CHARACTERS;

    /// A new id from the kernel's random number generator.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0_u8; RANDOM_CHARACTERS];
        let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        // Requests of at most 256 bytes are never cut short (getrandom(2)).
        debug_assert_eq!(filled, bytes.len());
        let mut id = String::with_capacity(Self::LEN);
        id.push_str(PREFIX);
        id.extend(bytes.map(|byte| char::from(ALPHABET[usize::from(byte & 31)])));
        Ok(Self(id))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SandboxId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let valid = text.len() == Self::LEN
            && text
                .strip_prefix(PREFIX)
                .is_some_and(|rest| rest.bytes().all(|byte| ALPHABET.contains(&byte)));
        if valid {
            Ok(Self(text.to_owned()))
        } else {
            Err(ParseIdError(text.chars().take(64).collect()))
        }
    }
}

impl TryFrom<String> for SandboxId {
    type Error = ParseIdError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<SandboxId> for String {
    fn from(id: SandboxId) -> Self {
        id.0
    }
}

impl fmt::Display for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for SandboxId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_random_id_parses_as_itself() {
        let id = SandboxId::random().unwrap();
        assert_eq!(id.as_str().parse::<SandboxId>().unwrap(), id);
        assert_ne!(SandboxId::random().unwrap(), id);
    }

    #[test]
    fn whatever_is_no_id_is_refused() {
        for bad in [
            "",
            "sb-",
            "../../../../etc/passwd",
            "sb-abcdefghijklmnopqrs",
            "sb-abcdefghijklmnopqrstu",
            "sb-ABCDEFGHIJKLMNOPQRST",
            "sb-abcdefghijklmnopqrs/",
            "sb-abcdefghijklmnopqrs1",
        ] {
            assert!(bad.parse::<SandboxId>().is_err(), "{bad}");
        }
    }
}
