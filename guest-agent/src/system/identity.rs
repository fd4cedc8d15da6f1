//! What makes a guest this one and no other: its random numbers, its name, its
//! machine-id and boot id, its network, its clock.
//!
//! The agent itself has nothing that would have to change with them: what `std`
//! seeds its hash maps with, and tokio the order in which it polls, are no secrets
//! and no names, and everything else that it draws comes from the kernel anew.

use std::fs::{self, File};
use std::io;

use bytes::Bytes;
use rustix::system::sethostname;
use rustix::time::{ClockId, Timespec, clock_settime};
use soulbox_proto::guest::v1::ConfigureRequest;

use super::network::{self, Network, NetworkError, Nic, ResetError};
use super::overlay::{self, lay_over};
use crate::spec::Violations;
use crate::sys::random::{MAX_ENTROPY_BYTES, add_entropy, reseed};

/// A checked [`ConfigureRequest`].
#[derive(Debug)]
pub(crate) struct Identity {
    entropy: Bytes,
    /// None: the guest keeps its name, even where the rest of it is new.
    hostname: Option<String>,
    is_new: bool,
    network: Option<Network>,
    resets_connections: bool,
    clock: Option<Timespec>,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum AssumeError {
    #[error("the guest could not be given its {what}")]
    Own {
        what: &'static str,
        source: io::Error,
    },
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Reset(#[from] ResetError),
}

/// The files of /etc that are in memory; see [`overlay`].
pub(crate) const FILES: [&str; 4] = [HOSTNAME, HOSTS, MACHINE_ID, RESOLV_CONF];
const HOSTNAME: &str = "/etc/hostname";
const HOSTS: &str = "/etc/hosts";
const MACHINE_ID: &str = "/etc/machine-id";
const RESOLV_CONF: &str = "/etc/resolv.conf";
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// HOST_NAME_MAX of Linux.
const MAX_HOSTNAME_BYTES: usize = 64;
/// The address that Debian gives a host's own name.
const OWN_ADDRESS: &str = "127.0.1.1";

// === impl Identity ===

impl TryFrom<ConfigureRequest> for Identity {
    type Error = Violations;

    fn try_from(request: ConfigureRequest) -> Result<Self, Violations> {
        let mut violations = Violations::default();
        if request.entropy.len() > MAX_ENTROPY_BYTES {
            let problem = format!("must have at most {MAX_ENTROPY_BYTES} bytes");
            violations.add("entropy", problem);
        }
        let hostname = Some(request.hostname).filter(|name| !name.is_empty());
        if hostname.as_ref().is_some_and(|name| !is_hostname(name)) {
            let problem = "must be letters, digits, \"-\" and \".\", at most 64, and begin and end \
                           with a letter or digit";
            violations.add("hostname", problem);
        }
        let clock = request.wall_clock.map(|time| {
            let sound = time.seconds >= 0 && (0..1_000_000_000).contains(&time.nanos);
            if !sound {
                let problem = "must be after 1970 and have nanos from 0 to 999999999";
                violations.add("wall_clock", problem);
            }
            Timespec {
                tv_sec: time.seconds,
                tv_nsec: time.nanos.into(),
            }
        });
        let network = request.network.as_ref();
        let network = network.map(|network| Network::check(network, &mut violations));
        violations.into_result()?;
        Ok(Self {
            entropy: request.entropy,
            hostname,
            is_new: request.new_identity,
            network,
            resets_connections: request.reset_connections,
            clock,
        })
    }
}

impl Identity {
    /// Makes the guest be this; the `first` time with ids of its own in any case,
    /// since the template has none. Entropy before them, because they are made of
    /// it; the network before connections are reset, whose peers would hear of it
    /// from the Ethernet address of another guest; the clock last: nothing should
    /// delay it. Can be repeated, also after it has failed half-way.
    pub(crate) fn assume(&self, first: bool, nic: Nic) -> Result<(), AssumeError> {
        let error = |what| move |source| AssumeError::Own { what, source };
        if !self.entropy.is_empty() {
            seed(&self.entropy).map_err(error("entropy"))?;
        }
        if let Some(hostname) = &self.hostname {
            take_name(hostname).map_err(error("hostname"))?;
        }
        if self.is_new || first {
            take_machine_id().map_err(error("machine-id"))?;
            take_boot_id().map_err(error("boot id"))?;
        }
        match &self.network {
            Some(network) => {
                nic.connect(network)?;
                let text = network.resolv_conf();
                let written = overlay::write(RESOLV_CONF, text.as_bytes());
                written.map_err(error("resolv.conf"))?;
            }
            None => nic.disconnect()?,
        }
        if self.resets_connections {
            network::reset()?;
        }
        if let Some(clock) = self.clock {
            let set = clock_settime(ClockId::Realtime, clock);
            set.map_err(io::Error::from).map_err(error("clock"))?;
        }
        Ok(())
    }

    /// The guest is a copy, or may be one.
    pub(crate) fn is_new(&self) -> bool {
        self.is_new
    }
}

fn seed(entropy: &[u8]) -> io::Result<()> {
    let random = File::open("/dev/urandom")?;
    add_entropy(&random, entropy)?;
    reseed(&random)
}

fn take_name(hostname: &str) -> io::Result<()> {
    sethostname(hostname.as_bytes())?;
    overlay::write(HOSTNAME, format!("{hostname}\n").as_bytes())?;
    let hosts = match fs::read(HOSTS) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        hosts => hosts?,
    };
    overlay::write(HOSTS, &with_own_name(&hosts, hostname))
}

/// A random UUID without its dashes is what machine-id(5) wants.
fn take_machine_id() -> io::Result<()> {
    overlay::write(MACHINE_ID, fresh_uuid()?.replace('-', "").as_bytes())
}

/// The kernel makes its own when it is first read and never another. Its file
/// cannot be written, even by root; so when this one cannot be, nothing has been
/// laid over it yet, or somebody has taken that away.
fn take_boot_id() -> io::Result<()> {
    let id = fresh_uuid()?;
    match overlay::write(BOOT_ID, id.as_bytes()) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            lay_over(BOOT_ID)?;
            overlay::write(BOOT_ID, id.as_bytes())
        }
        written => written,
    }
}

/// Of the kernel's generator, with a newline.
fn fresh_uuid() -> io::Result<String> {
    fs::read_to_string("/proc/sys/kernel/random/uuid")
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

/// The hosts file with one line for our own name, whatever it was before. Bytes:
/// what else is in it is somebody's, and need not be UTF-8.
fn with_own_name(hosts: &[u8], hostname: &str) -> Vec<u8> {
    let is_own = |line: &&[u8]| {
        let mut words = line.split(u8::is_ascii_whitespace);
        words.find(|word| !word.is_empty()) == Some(OWN_ADDRESS.as_bytes())
    };
    let own = format!("{OWN_ADDRESS} {hostname}\n");
    let mut named = Vec::with_capacity(hosts.len() + own.len() + 1);
    let lines = hosts.split_inclusive(|byte| *byte == b'\n');
    for line in lines.filter(|line| !is_own(line)) {
        named.extend_from_slice(line);
    }
    if named.last().is_some_and(|byte| *byte != b'\n') {
        named.push(b'\n');
    }
    named.extend_from_slice(own.as_bytes());
    named
}

#[cfg(test)]
mod tests {
    use prost_types::Timestamp;

    use super::*;

    fn is_taken(request: ConfigureRequest) -> bool {
        Identity::try_from(request).is_ok()
    }

    #[test]
    fn a_new_name_replaces_the_old_one() {
        let named = |hosts: &[u8], hostname| with_own_name(hosts, hostname);
        let first = named(b"127.0.0.1 localhost\n::1 localhost\n", "one");
        assert_eq!(
            first,
            b"127.0.0.1 localhost\n::1 localhost\n127.0.1.1 one\n"
        );
        assert_eq!(named(&first, "one"), first);
        assert_eq!(
            named(&first, "two"),
            b"127.0.0.1 localhost\n::1 localhost\n127.0.1.1 two\n"
        );
        assert_eq!(named(b"", "one"), b"127.0.1.1 one\n");
    }

    #[test]
    fn other_lines_of_the_hosts_file_stay_as_they_are() {
        let hosts = b"# \xff\n\n\t127.0.1.1\tme # old\n127.0.1.10 x\r\n10.0.0.1 last";
        assert_eq!(
            with_own_name(hosts, "one"),
            b"# \xff\n\n127.0.1.10 x\r\n10.0.0.1 last\n127.0.1.1 one\n"
        );
    }

    #[test]
    fn refuses_what_is_no_name_no_time_or_too_much() {
        let long = "a".repeat(65);
        let named = |name: &str| ConfigureRequest {
            hostname: name.to_owned(),
            ..ConfigureRequest::default()
        };
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
            assert!(!is_taken(named(name)), "{name:?}");
        }
        for name in ["", "a", "sb-1.example", "0"] {
            assert!(is_taken(named(name)), "{name:?}");
        }
        for (seconds, nanos) in [(-1, 0), (0, -1), (0, 1_000_000_000)] {
            let wall_clock = Some(Timestamp { seconds, nanos });
            let request = ConfigureRequest {
                wall_clock,
                ..named("a")
            };
            assert!(!is_taken(request), "{seconds} {nanos}");
        }
        for (length, taken) in [(0, true), (512, true), (513, false)] {
            let request = ConfigureRequest {
                entropy: vec![0; length].into(),
                ..ConfigureRequest::default()
            };
            assert_eq!(is_taken(request), taken, "{length}");
        }
    }
}
