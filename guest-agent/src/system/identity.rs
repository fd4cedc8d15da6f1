//! What makes a guest this one and no other: its name, its machine-id, its clock.

use std::fs;
use std::io;

use rustix::system::sethostname;
use rustix::time::{ClockId, Timespec, clock_settime};
use soulbox_proto::guest::v1::ConfigureRequest;
use tonic_types::FieldViolation;

use crate::spec::Violations;

/// A checked [`ConfigureRequest`].
#[derive(Debug)]
pub(crate) struct Identity {
    /// None: the guest keeps its name.
    hostname: Option<String>,
    clock: Option<Timespec>,
}

#[derive(Debug, thiserror::Error)]
#[error("the guest could not be given its {what}")]
pub(crate) struct AssumeError {
    what: &'static str,
    pub(crate) source: io::Error,
}

/// HOST_NAME_MAX of Linux.
const MAX_HOSTNAME_BYTES: usize = 64;
/// The address that Debian gives a host's own name.
const OWN_ADDRESS: &str = "127.0.1.1";

// === impl Identity ===

impl TryFrom<ConfigureRequest> for Identity {
    type Error = Violations;

    fn try_from(request: ConfigureRequest) -> Result<Self, Violations> {
        let mut violations = Vec::new();
        let hostname = Some(request.hostname).filter(|name| !name.is_empty());
        if hostname.as_ref().is_some_and(|name| !is_hostname(name)) {
            let problem = "must be letters, digits, \"-\" and \".\", at most 64, and begin and end \
                           with a letter or digit";
            violations.push(FieldViolation::new("hostname", problem));
        }
        let clock = request.wall_clock.map(|time| {
            let sound = time.seconds >= 0 && (0..1_000_000_000).contains(&time.nanos);
            if !sound {
                let problem = "must be after 1970 and have nanos from 0 to 999999999";
                violations.push(FieldViolation::new("wall_clock", problem));
            }
            Timespec {
                tv_sec: time.seconds,
                tv_nsec: time.nanos.into(),
            }
        });
        if violations.is_empty() {
            Ok(Self { hostname, clock })
        } else {
            Err(Violations(violations))
        }
    }
}

impl Identity {
    /// Makes the guest be this. The clock last: the files should not delay it.
    pub(crate) fn assume(&self) -> Result<(), AssumeError> {
        let error = |what| move |source| AssumeError { what, source };
        if let Some(hostname) = &self.hostname {
            sethostname(hostname.as_bytes())
                .map_err(io::Error::from)
                .map_err(error("hostname"))?;
            fs::write("/etc/hostname", format!("{hostname}\n")).map_err(error("/etc/hostname"))?;
            let hosts = fs::read_to_string("/etc/hosts").unwrap_or_default();
            fs::write("/etc/hosts", with_own_name(&hosts, hostname))
                .map_err(error("/etc/hosts"))?;
        }
        // The kernel's random UUID, without its dashes, is what machine-id(5) wants.
        let uuid =
            fs::read_to_string("/proc/sys/kernel/random/uuid").map_err(error("machine-id"))?;
        fs::write("/etc/machine-id", uuid.replace('-', "")).map_err(error("machine-id"))?;
        if let Some(clock) = self.clock {
            let set = clock_settime(ClockId::Realtime, clock);
            set.map_err(io::Error::from).map_err(error("clock"))?;
        }
        Ok(())
    }
}

// RFC 1123, with the kernel's length.
fn is_hostname(name: &str) -> bool {
    let is_label = |label: &str| {
        let inner = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        let edge = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric());
        label.bytes().all(inner) && edge(label.bytes().next()) && edge(label.bytes().last())
    };
    name.len() <= MAX_HOSTNAME_BYTES && name.split('.').all(is_label)
}

/// The hosts file with one line for our own name, whatever it was before.
fn with_own_name(hosts: &str, hostname: &str) -> String {
    let others = hosts
        .lines()
        .filter(|line| line.split_whitespace().next() != Some(OWN_ADDRESS));
    let mut lines: Vec<_> = others.map(str::to_owned).collect();
    lines.push(format!("{OWN_ADDRESS} {hostname}\n"));
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use prost_types::Timestamp;

    use super::*;

    #[test]
    fn a_new_name_replaces_the_old_one() {
        let first = with_own_name("127.0.0.1 localhost\n::1 localhost\n", "one");
        assert_eq!(first, "127.0.0.1 localhost\n::1 localhost\n127.0.1.1 one\n");
        assert_eq!(with_own_name(&first, "two"), first.replace("one", "two"));
        assert_eq!(with_own_name("", "one"), "127.0.1.1 one\n");
    }

    #[test]
    fn refuses_what_is_no_name_or_no_time() {
        let long = "a".repeat(65);
        for name in [
            "-a",
            "a-",
            "a..b",
            ".",
            "a b",
            "a\n127.0.0.1 b",
            "ä",
            long.as_str(),
        ] {
            let request = ConfigureRequest {
                hostname: name.to_owned(),
                wall_clock: None,
            };
            assert!(Identity::try_from(request).is_err(), "{name:?}");
        }
        for (seconds, nanos) in [(-1, 0), (0, -1), (0, 1_000_000_000)] {
            let wall_clock = Some(Timestamp { seconds, nanos });
            let request = ConfigureRequest {
                hostname: "a".to_owned(),
                wall_clock,
            };
            assert!(Identity::try_from(request).is_err(), "{seconds} {nanos}");
        }
        for name in ["", "a", "sb-1.example", "0"] {
            let request = ConfigureRequest {
                hostname: name.to_owned(),
                wall_clock: None,
            };
            assert!(Identity::try_from(request).is_ok(), "{name:?}");
        }
    }
}
