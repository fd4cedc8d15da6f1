//! The names of sandboxes and of snapshots.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

const RANDOM_CHARACTERS: usize = 20;
/// RFC 4648's base-32 alphabet, in lower case: safe in host names and paths.
const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

#[derive(Debug, thiserror::Error)]
#[error(
    "{text:?} is not a {what} id: give \"{prefix}\" and {RANDOM_CHARACTERS} characters of [a-z2-7], as `{shown_by}` prints it"
)]
pub struct ParseIdError {
    text: String,
    /// "sandbox" or "snapshot".
    pub what: &'static str,
    prefix: &'static str,
    shown_by: &'static str,
}

macro_rules! id {
    ($name:ident, $prefix:literal, $what:literal, $shown_by:literal) => {
        #[doc = concat!("\"", $prefix, "\" and 20 characters of `[a-z2-7]`: 100 random bits.")]
        ///
        /// A value of this type is safe as a path component and as a host name.
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The length of every id, in bytes.
            pub const LEN: usize = $prefix.len() + RANDOM_CHARACTERS;

            /// A new id from the kernel's random number generator.
            pub fn random() -> std::io::Result<Self> {
                random($prefix).map(Self)
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                if is_id(text, $prefix) {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(ParseIdError {
                        text: text.chars().take(64).collect(),
                        what: $what,
                        prefix: $prefix,
                        shown_by: $shown_by,
                    })
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = ParseIdError;

            fn try_from(text: String) -> Result<Self, Self::Error> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(SandboxId, "sb-", "sandbox", "soulbox ls");
id!(SnapshotId, "sn-", "snapshot", "soulbox snapshot ls");

fn random(prefix: &str) -> std::io::Result<String> {
    let mut bytes = [0_u8; RANDOM_CHARACTERS];
    let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    // Requests of at most 256 bytes are never cut short (getrandom(2)).
    debug_assert_eq!(filled, bytes.len());
    let mut id = String::with_capacity(prefix.len() + RANDOM_CHARACTERS);
    id.push_str(prefix);
    id.extend(bytes.map(|byte| char::from(ALPHABET[usize::from(byte & 31)])));
    Ok(id)
}

fn is_id(text: &str, prefix: &str) -> bool {
    text.len() == prefix.len() + RANDOM_CHARACTERS
        && text
            .strip_prefix(prefix)
            .is_some_and(|rest| rest.bytes().all(|byte| ALPHABET.contains(&byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_random_id_parses_as_itself() {
        let id = SandboxId::random().unwrap();
        assert_eq!(id.as_str().parse::<SandboxId>().unwrap(), id);
        assert_ne!(SandboxId::random().unwrap(), id);
        let id = SnapshotId::random().unwrap();
        assert_eq!(id.as_str().parse::<SnapshotId>().unwrap(), id);
        assert!(id.as_str().parse::<SandboxId>().is_err());
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
