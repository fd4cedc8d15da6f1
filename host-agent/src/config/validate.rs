//! Rules that single values and their combinations must keep.

use std::path::Path;

use ipnet::IpNet;

use super::Config;
use crate::id::SandboxId;
use crate::net::{GUEST4_NET, GUEST6_NET, Ranges};
use crate::sandbox::{MAX_DISK_MIB, MAX_MEMORY_MIB, MAX_TTL_SECONDS, MAX_VCPUS, MIN_MEMORY_MIB};
use crate::template::is_template_name;

/// A rule that a field breaks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The field's name, such as `capacity.vcpus`.
    pub field: &'static str,
    /// What to do about it.
    pub mend: String,
}

/// `sockaddr_un.sun_path` holds 108 bytes, of which the last is a NUL.
const MAX_SOCKET_PATH_BYTES: usize = 107;
/// A day: more is surely a mistake of units.
const MAX_TIMEOUT_MS: u64 = 24 * 60 * 60 * 1000;
/// Each is a process with a descriptor for each of its parts.
const MAX_SHELLS: u32 = 10_000;
/// A slot is a namespace with two links; Linux has no bound, its memory has.
const MAX_SLOTS: u32 = 100_000;
const MAX_CONNECTIONS: u32 = 1_000_000;
/// With the number of a slot it stays far below what a file's name may have.
const MAX_PREFIX_BYTES: usize = 32;

pub(super) fn validate(config: &Config) -> Vec<Violation> {
    let mut found = Vec::new();
    listen(config, &mut found);
    paths(config, &mut found);
    amounts(config, &mut found);
    times(config, &mut found);
    shells(config, &mut found);
    network(config, &mut found);
    found.extend(config.forwards.violations());
    found.extend(config.proxy.violations());
    found
}

fn listen(config: &Config, found: &mut Vec<Violation>) {
    let path = &config.listen.unix_path;
    absolute("listen.unix_path", path, found);
    let length = path.as_os_str().len();
    if length > MAX_SOCKET_PATH_BYTES {
        found.push(Violation {
            field: "listen.unix_path",
            mend: format!(
                "is {length} bytes long, but a Unix socket's path has at most {MAX_SOCKET_PATH_BYTES}; choose a shorter one"
            ),
        });
    }
}

fn paths(config: &Config, found: &mut Vec<Violation>) {
    let paths = &config.paths;
    absolute("paths.state_dir", &paths.state_dir, found);
    absolute("paths.run_dir", &paths.run_dir, found);
    absolute("paths.template_dir", &paths.template_dir, found);
    absolute("paths.kvm", &paths.kvm, found);
    if !paths.monitor.as_os_str().is_empty() {
        absolute("paths.monitor", &paths.monitor, found);
    }
    let longest =
        paths.run_dir.as_os_str().len() + "/vm/".len() + SandboxId::LEN + "/control.sock".len();
    if longest > MAX_SOCKET_PATH_BYTES {
        found.push(Violation {
            field: "paths.run_dir",
            mend: format!(
                "makes the sockets in it {longest} bytes long, but a Unix socket's path has at most {MAX_SOCKET_PATH_BYTES}; choose a folder with a name that is {} bytes shorter",
                longest - MAX_SOCKET_PATH_BYTES
            ),
        });
    }
    if paths.run_dir == paths.state_dir {
        found.push(Violation {
            field: "paths.run_dir",
            mend: "is also paths.state_dir; give each a folder of its own".to_owned(),
        });
    }
}

fn amounts(config: &Config, found: &mut Vec<Violation>) {
    let capacity = &config.capacity;
    let defaults = &config.defaults;
    if capacity.vcpu_overcommit == 0 || capacity.vcpu_overcommit > 1000 {
        found.push(Violation {
            field: "capacity.vcpu_overcommit",
            mend: format!("is {}; give 1 to 1000", capacity.vcpu_overcommit),
        });
    }
    if capacity.memory_mib != 0 && capacity.memory_mib < u64::from(MIN_MEMORY_MIB) {
        found.push(Violation {
            field: "capacity.memory_mib",
            mend: format!(
                "is {}, too little for one sandbox; give at least {MIN_MEMORY_MIB}, or 0 for the host's",
                capacity.memory_mib
            ),
        });
    }
    if !is_template_name(&defaults.template) {
        found.push(Violation {
            field: "defaults.template",
            mend: format!(
                "is {:?}; give the name of a folder in paths.template_dir: 1 to 64 of [a-z0-9._-], starting with a letter or digit",
                defaults.template
            ),
        });
    }
    if defaults.vcpus == 0 || defaults.vcpus > MAX_VCPUS {
        found.push(Violation {
            field: "defaults.vcpus",
            mend: format!("is {}; give 1 to {MAX_VCPUS}", defaults.vcpus),
        });
    }
    if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&defaults.memory_mib) {
        found.push(Violation {
            field: "defaults.memory_mib",
            mend: format!(
                "is {}; give {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB}",
                defaults.memory_mib
            ),
        });
    }
    if defaults.disk_mib > MAX_DISK_MIB {
        found.push(Violation {
            field: "defaults.disk_mib",
            mend: format!(
                "is {}; give at most {MAX_DISK_MIB}, or 0 for the template's",
                defaults.disk_mib
            ),
        });
    }
    if capacity.vcpus != 0 && defaults.vcpus > capacity.vcpus {
        found.push(Violation {
            field: "defaults.vcpus",
            mend: format!(
                "is {}, more than capacity.vcpus ({}); lower it",
                defaults.vcpus, capacity.vcpus
            ),
        });
    }
    if capacity.memory_mib != 0 && u64::from(defaults.memory_mib) > capacity.memory_mib {
        found.push(Violation {
            field: "defaults.memory_mib",
            mend: format!(
                "is {}, more than capacity.memory_mib ({}); lower it",
                defaults.memory_mib, capacity.memory_mib
            ),
        });
    }
    if capacity.disk_mib != 0 && u64::from(defaults.disk_mib) > capacity.disk_mib {
        found.push(Violation {
            field: "defaults.disk_mib",
            mend: format!(
                "is {}, more than capacity.disk_mib ({}); lower it",
                defaults.disk_mib, capacity.disk_mib
            ),
        });
    }
}

fn times(config: &Config, found: &mut Vec<Violation>) {
    let timeouts = &config.timeouts;
    let given = [
        ("timeouts.boot_ms", timeouts.boot_ms, 1),
        ("timeouts.clean_stop_ms", timeouts.clean_stop_ms, 0),
        ("timeouts.snapshot_ms", timeouts.snapshot_ms, 1),
        ("timeouts.drain_ms", timeouts.drain_ms, 0),
    ];
    for (field, value, least) in given {
        if value < least || value > MAX_TIMEOUT_MS {
            found.push(Violation {
                field,
                mend: format!("is {value}; give {least} to {MAX_TIMEOUT_MS} milliseconds"),
            });
        }
    }
    let (ttl, max) = (config.defaults.ttl_seconds, config.limits.max_ttl_seconds);
    for (field, value) in [
        ("defaults.ttl_seconds", ttl),
        ("limits.max_ttl_seconds", max),
    ] {
        if value > MAX_TTL_SECONDS {
            found.push(Violation {
                field,
                mend: format!("is {value}; give at most {MAX_TTL_SECONDS}, or 0 for no end"),
            });
        }
    }
    if max != 0 && ttl > max {
        found.push(Violation {
            field: "defaults.ttl_seconds",
            mend: format!("is {ttl}, more than limits.max_ttl_seconds ({max}); lower it"),
        });
    }
}

fn shells(config: &Config, found: &mut Vec<Violation>) {
    let shells = &config.shells;
    let mut wrong = |field, mend: String| found.push(Violation { field, mend });
    if shells.maximum > MAX_SHELLS {
        let mend = format!("is {}; give 0 to {MAX_SHELLS}", shells.maximum);
        wrong("shells.maximum", mend);
    }
    // A maximum of 0 turns them off, whatever the minimum.
    if shells.maximum != 0 && shells.minimum > shells.maximum {
        wrong(
            "shells.minimum",
            format!(
                "is {}, more than shells.maximum ({}); lower it",
                shells.minimum, shells.maximum
            ),
        );
    }
    if !(1..=MAX_SHELLS).contains(&shells.refill_per_second) {
        let mend = format!("is {}; give 1 to {MAX_SHELLS}", shells.refill_per_second);
        wrong("shells.refill_per_second", mend);
    }
    for shape in &shells.shapes {
        let fits = (1..=MAX_VCPUS).contains(&shape.vcpus)
            && (MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&shape.memory_mib);
        if !fits {
            wrong(
                "shells.shapes",
                format!(
                    "has {} vCPUs with {} MiB; give 1 to {MAX_VCPUS} with {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB}",
                    shape.vcpus, shape.memory_mib
                ),
            );
        }
    }
    if config.templates.warm_up.iter().any(Vec::is_empty) {
        let mend = "has a program without a name; give each as [\"NAME\", \"ARGUMENT\"…]";
        wrong("templates.warm_up", mend.to_owned());
    }
}

fn network(config: &Config, found: &mut Vec<Violation>) {
    let network = &config.network;
    let mut wrong = |field, mend: String| found.push(Violation { field, mend });
    let ranges = Ranges::new(network);
    if !(1..=MAX_SLOTS).contains(&network.slots_max) {
        let mend = format!("is {}; give 1 to {MAX_SLOTS}", network.slots_max);
        wrong("network.slots_max", mend);
    } else if u64::from(network.slots_max) > ranges.slots() {
        wrong(
            "network.slots_max",
            format!(
                "is {}, but network.ipv4_range and network.ipv6_range have pairs of addresses for {}; lower it or give larger ranges",
                network.slots_max,
                ranges.slots()
            ),
        );
    }
    if network.slots_ready > network.slots_max {
        wrong(
            "network.slots_ready",
            format!(
                "is {}, more than network.slots_max ({}); lower it",
                network.slots_ready, network.slots_max
            ),
        );
    }
    if !(1..=MAX_CONNECTIONS).contains(&network.connections_max) {
        let mend = format!(
            "is {}; give 1 to {MAX_CONNECTIONS}",
            network.connections_max
        );
        wrong("network.connections_max", mend);
    }
    let prefix = &network.namespace_prefix;
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    // What ends in a digit would run into the slot's number.
    let apart = prefix.ends_with('-') && prefix.len() > 1;
    if prefix.len() > MAX_PREFIX_BYTES || !prefix.bytes().all(plain) || !apart {
        wrong(
            "network.namespace_prefix",
            format!(
                "is {prefix:?}; give up to {MAX_PREFIX_BYTES} of [a-z0-9-] that end with \"-\", such as \"soulbox-\""
            ),
        );
    }
    if network.nft.as_os_str().is_empty() {
        wrong(
            "network.nft",
            "is empty; give \"nft\" or its path".to_owned(),
        );
    }
    let usable = |net: IpNet| {
        let address = net.network();
        !(address.is_unspecified() || address.is_loopback() || address.is_multicast())
    };
    let inside = |a: IpNet, b: IpNet| a.contains(&b) || b.contains(&a);
    let (ipv4, ipv6) = (IpNet::V4(ranges.ipv4), IpNet::V6(ranges.ipv6));
    let guests = [
        ("network.ipv4_range", ipv4, IpNet::V4(GUEST4_NET)),
        ("network.ipv6_range", ipv6, IpNet::V6(GUEST6_NET)),
    ];
    for (field, range, guest) in guests {
        if inside(range, guest) {
            let mend = format!("overlaps {guest}, which every guest has inside; give another");
            wrong(field, mend);
        } else if !usable(range) {
            wrong(
                field,
                format!("is {range}; give a range of unicast addresses"),
            );
        }
    }
    let bad = network
        .dns_upstream
        .iter()
        .find(|address| address.is_unspecified() || address.is_multicast());
    if let Some(address) = bad {
        let mend = format!("has {address}, which no resolver can have; give unicast addresses");
        wrong("network.dns_upstream", mend);
    }
}

fn absolute(field: &'static str, path: &Path, found: &mut Vec<Violation>) {
    if !path.is_absolute() {
        found.push(Violation {
            field,
            mend: format!("is {path:?}; give an absolute path"),
        });
    }
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, ConfigError};

    #[track_caller]
    fn refused(text: &str) -> Vec<&'static str> {
        match Config::parse("test.toml".as_ref(), text) {
            Err(ConfigError::Invalid { violations, .. }) => {
                violations.iter().map(|violation| violation.field).collect()
            }
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn every_bad_value_is_named() {
        let long = format!("/{}", "r".repeat(107));
        let cases = [
            (
                "listen.unix_path",
                "unix_path = \"relative.sock\"".to_owned(),
            ),
            ("listen.unix_path", format!("unix_path = {long:?}")),
            ("paths.state_dir", "state_dir = \"\"".to_owned()),
            ("paths.run_dir", "run_dir = \"run\"".to_owned()),
            ("paths.run_dir", format!("run_dir = {:?}", &long[..90])),
            ("paths.run_dir", "run_dir = \"/var/lib/soulbox\"".to_owned()),
            ("paths.template_dir", "template_dir = \"t\"".to_owned()),
            ("paths.monitor", "monitor = \"soulbox-vmm\"".to_owned()),
            ("paths.kvm", "kvm = \"kvm\"".to_owned()),
            ("capacity.vcpu_overcommit", "vcpu_overcommit = 0".to_owned()),
            ("defaults.template", "template = \"../base\"".to_owned()),
            ("defaults.vcpus", "vcpus = 0".to_owned()),
            ("defaults.vcpus", "vcpus = 33".to_owned()),
            ("defaults.memory_mib", "memory_mib = 64".to_owned()),
            (
                "defaults.ttl_seconds",
                "ttl_seconds = 9223372036854775807".to_owned(),
            ),
            (
                "limits.max_ttl_seconds",
                "max_ttl_seconds = 9223372036854775807".to_owned(),
            ),
            ("timeouts.boot_ms", "boot_ms = 0".to_owned()),
            (
                "timeouts.clean_stop_ms",
                "clean_stop_ms = 86400001".to_owned(),
            ),
            ("timeouts.snapshot_ms", "snapshot_ms = 0".to_owned()),
            ("timeouts.drain_ms", "drain_ms = 86400001".to_owned()),
            ("shells.minimum", "minimum = 65".to_owned()),
            ("shells.maximum", "maximum = 10001".to_owned()),
            (
                "shells.refill_per_second",
                "refill_per_second = 0".to_owned(),
            ),
            (
                "shells.shapes",
                "shapes = [{ vcpus = 0, memory_mib = 512 }]".to_owned(),
            ),
            ("templates.warm_up", "warm_up = [[]]".to_owned()),
            (
                "network.slots_max",
                "slots_ready = 0\nslots_max = 0".to_owned(),
            ),
            (
                "network.slots_max",
                "ipv4_range = \"10.213.0.0/24\"".to_owned(),
            ),
            ("network.slots_ready", "slots_max = 15".to_owned()),
            ("network.connections_max", "connections_max = 0".to_owned()),
            (
                "network.namespace_prefix",
                "namespace_prefix = \"\"".to_owned(),
            ),
            (
                "network.namespace_prefix",
                "namespace_prefix = \"a/-\"".to_owned(),
            ),
            (
                "network.namespace_prefix",
                "namespace_prefix = \"vm1\"".to_owned(),
            ),
            ("network.nft", "nft = \"\"".to_owned()),
            (
                "network.ipv4_range",
                "ipv4_range = \"172.16.0.0/12\"".to_owned(),
            ),
            (
                "network.ipv4_range",
                "ipv4_range = \"224.0.0.0/16\"".to_owned(),
            ),
            (
                "network.ipv6_range",
                "ipv6_range = \"fd5b::/48\"".to_owned(),
            ),
            (
                "network.dns_upstream",
                "dns_upstream = [\"0.0.0.0\"]".to_owned(),
            ),
        ];
        for (field, line) in cases {
            let section = field.split('.').next().unwrap();
            assert_eq!(refused(&format!("[{section}]\n{line}")), [field], "{line}");
        }
    }

    #[test]
    fn defaults_must_fit_the_capacity() {
        for (field, text) in [
            (
                "defaults.vcpus",
                "[capacity]\nvcpus = 2\n[defaults]\nvcpus = 4",
            ),
            ("defaults.memory_mib", "[capacity]\nmemory_mib = 256"),
            ("capacity.memory_mib", "[capacity]\nmemory_mib = 127"),
            (
                "defaults.disk_mib",
                "[capacity]\ndisk_mib = 10\n[defaults]\ndisk_mib = 11",
            ),
            (
                "defaults.ttl_seconds",
                "[limits]\nmax_ttl_seconds = 10\n[defaults]\nttl_seconds = 11",
            ),
        ] {
            assert_eq!(refused(text)[0], field);
        }
    }

    #[test]
    fn all_mistakes_are_told_at_once() {
        let error = Config::parse(
            "test.toml".as_ref(),
            "[defaults]\nvcpus = 0\nmemory_mib = 1\n[timeouts]\nboot_ms = 0",
        )
        .unwrap_err()
        .to_string();
        assert!(error.contains("3 values"), "{error}");
        assert!(
            error.contains("\n  defaults.vcpus: is 0; give 1 to 32"),
            "{error}"
        );
    }
}
