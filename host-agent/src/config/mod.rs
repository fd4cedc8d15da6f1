//! The daemon's configuration: one TOML file, validated whole before anything
//! is opened.

mod validate;

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::{Ipv4Net, Ipv6Net};
use serde::Deserialize;

pub use crate::ingress::config::{Forwards, Proxy};
pub use validate::Violation;

/// What `--print-default-config` prints.
pub const DEFAULT_TOML: &str = include_str!("default.toml");

/// Where `soulboxd` looks without `--config`.
pub const DEFAULT_PATH: &str = "/etc/soulbox/soulboxd.toml";

#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub listen: Listen,
    pub paths: Paths,
    pub capacity: Capacity,
    pub defaults: Defaults,
    pub limits: Limits,
    pub timeouts: Timeouts,
    pub shells: Shells,
    pub templates: Templates,
    pub network: Network,
    pub forwards: Forwards,
    pub proxy: Proxy,
    pub shutdown: Shutdown,
}

/// Network namespaces that wait for a sandbox, and what they have in common.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Network {
    pub enabled: bool,
    /// Where each slot has a /31.
    #[serde(deserialize_with = "ipv4_range")]
    pub ipv4_range: Ipv4Net,
    /// Where each slot has a /127.
    #[serde(deserialize_with = "ipv6_range")]
    pub ipv6_range: Ipv6Net,
    pub namespace_prefix: String,
    /// How many wait.
    pub slots_ready: u32,
    /// How many there are at most, used ones among them.
    pub slots_max: u32,
    /// That one sandbox may have at once.
    pub connections_max: u32,
    /// Empty: those of /etc/resolv.conf.
    pub dns_upstream: Vec<IpAddr>,
    /// A path, or a name that is looked for in PATH.
    pub nft: PathBuf,
}

/// Monitors that wait for a machine.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Shells {
    /// Of each shape, however little is asked for.
    pub minimum: u32,
    /// Of each shape, however much is asked for. Zero: none are kept.
    pub maximum: u32,
    pub refill_per_second: u32,
    /// Empty: the one that `defaults` give.
    pub shapes: Vec<ShellShape>,
}

#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShellShape {
    pub vcpus: u32,
    pub memory_mib: u32,
}

/// Snapshots that sandboxes of a template start from.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Templates {
    pub snapshot: bool,
    /// Programs and their arguments, run before the snapshot is made.
    pub warm_up: Vec<Vec<String>>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Listen {
    pub unix_path: PathBuf,
    /// A group's name or number; empty for the daemon's own.
    pub unix_group: String,
    #[serde(deserialize_with = "empty_is_none")]
    pub tcp_address: Option<SocketAddr>,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Paths {
    pub state_dir: PathBuf,
    pub run_dir: PathBuf,
    pub template_dir: PathBuf,
    /// Empty for the `soulbox-vmm` beside this binary.
    pub monitor: PathBuf,
    pub kvm: PathBuf,
}

/// Zero stands for "derived from the host".
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Capacity {
    pub vcpus: u32,
    pub vcpu_overcommit: u32,
    pub memory_mib: u64,
    pub disk_mib: u64,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Defaults {
    pub template: String,
    pub vcpus: u32,
    pub memory_mib: u32,
    /// Zero for the size of the template's root disk.
    pub disk_mib: u32,
    /// Zero for no end.
    pub ttl_seconds: u64,
}

#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// Zero for no limit.
    pub max_ttl_seconds: u64,
}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Timeouts {
    pub boot_ms: u64,
    pub clean_stop_ms: u64,
    pub snapshot_ms: u64,
    pub drain_ms: u64,
}

#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Shutdown {
    pub sandboxes: OnShutdown,
}

/// What SIGTERM does with running sandboxes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnShutdown {
    #[default]
    Keep,
    Stop,
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error(
        "{path} cannot be read; give another file with --config, or make one with `soulboxd --print-default-config`"
    )]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path} is not a valid configuration; mend this and try again:\n{message}")]
    Parse { path: PathBuf, message: String },
    #[error("{path} has {} to mend:{}", values(.violations), list(.violations))]
    Invalid {
        path: PathBuf,
        violations: Vec<Violation>,
    },
}

// === impl Config ===

impl Config {
    /// Reads and validates `path`. Without one, the default file is read where
    /// there is one, and the defaults hold where there is none.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let (path, required) = match path {
            Some(path) => (path, true),
            None => (Path::new(DEFAULT_PATH), false),
        };
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(path, &text),
            Err(error) if !required && error.kind() == std::io::ErrorKind::NotFound => {
                Self::parse(path, "")
            }
            Err(source) => Err(ConfigError::Read {
                path: path.to_owned(),
                source,
            }),
        }
    }

    /// Parses and validates `text`, which `path` names in errors.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| ConfigError::Parse {
            path: path.to_owned(),
            message: error.to_string().trim_end().to_owned(),
        })?;
        let violations = config.violations();
        if violations.is_empty() {
            Ok(config)
        } else {
            Err(ConfigError::Invalid {
                path: path.to_owned(),
                violations,
            })
        }
    }

    /// Every rule that a value breaks.
    pub fn violations(&self) -> Vec<Violation> {
        validate::validate(self)
    }
}

// === impl Paths ===

impl Paths {
    /// The monitor's binary, the one beside this one unless configured.
    pub fn monitor_binary(&self) -> std::io::Result<PathBuf> {
        if self.monitor.as_os_str().is_empty() {
            Ok(std::env::current_exe()?.with_file_name("soulbox-vmm"))
        } else {
            Ok(self.monitor.clone())
        }
    }
}

// === impl Timeouts ===

impl Timeouts {
    pub fn boot(&self) -> Duration {
        Duration::from_millis(self.boot_ms)
    }

    pub fn clean_stop(&self) -> Duration {
        Duration::from_millis(self.clean_stop_ms)
    }

    pub fn snapshot(&self) -> Duration {
        Duration::from_millis(self.snapshot_ms)
    }

    pub fn drain(&self) -> Duration {
        Duration::from_millis(self.drain_ms)
    }
}

// === impl Default ===

impl Default for Listen {
    fn default() -> Self {
        Self {
            unix_path: "/run/soulbox/soulboxd.sock".into(),
            unix_group: String::new(),
            tcp_address: None,
        }
    }
}

impl Default for Paths {
    fn default() -> Self {
        Self {
            state_dir: "/var/lib/soulbox".into(),
            run_dir: "/run/soulbox".into(),
            template_dir: "/var/lib/soulbox/templates".into(),
            monitor: PathBuf::new(),
            kvm: "/dev/kvm".into(),
        }
    }
}

impl Default for Capacity {
    fn default() -> Self {
        Self {
            vcpus: 0,
            vcpu_overcommit: 4,
            memory_mib: 0,
            disk_mib: 0,
        }
    }
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            template: "base".into(),
            vcpus: 1,
            memory_mib: 512,
            disk_mib: 0,
            ttl_seconds: 0,
        }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            boot_ms: 60_000,
            clean_stop_ms: 5_000,
            snapshot_ms: 120_000,
            drain_ms: 30_000,
        }
    }
}

impl Default for Shells {
    fn default() -> Self {
        Self {
            minimum: 2,
            maximum: 64,
            refill_per_second: 100,
            shapes: Vec::new(),
        }
    }
}

impl Default for Network {
    fn default() -> Self {
        Self {
            enabled: true,
            ipv4_range: Ipv4Net::new_assert([10, 213, 0, 0].into(), 16),
            ipv6_range: Ipv6Net::new_assert(
                [0xfd73, 0x6f75, 0x6c62, 0x6f78, 0, 0, 0, 0].into(),
                64,
            ),
            namespace_prefix: "soulbox-".to_owned(),
            slots_ready: 16,
            slots_max: 4096,
            connections_max: 8192,
            dns_upstream: Vec::new(),
            nft: "nft".into(),
        }
    }
}

impl Default for Templates {
    fn default() -> Self {
        let program = |argv: [&str; 3]| argv.map(str::to_owned).to_vec();
        Self {
            snapshot: true,
            warm_up: vec![
                program(["python3", "-c", "import json, random, ssl, subprocess"]),
                program(["node", "-e", "0"]),
            ],
        }
    }
}

fn empty_is_none<'de, D>(deserializer: D) -> Result<Option<SocketAddr>, D::Error>
where
    D: serde::Deserializer<'de>,
{
    let text = String::deserialize(deserializer)?;
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| {
        serde::de::Error::custom(format!(
            "{text:?} is not an address: give IP:PORT, such as \"10.0.0.5:7600\", or \"\" for none"
        ))
    })
}

fn ipv4_range<'de, D>(deserializer: D) -> Result<Ipv4Net, D::Error>
where
    D: serde::Deserializer<'de>,
{
    range(deserializer, "10.213.0.0/16")
}

fn ipv6_range<'de, D>(deserializer: D) -> Result<Ipv6Net, D::Error>
where
    D: serde::Deserializer<'de>,
{
    range(deserializer, "fd73:6f75:6c62:6f78::/64")
}

fn range<'de, T, D>(deserializer: D, example: &str) -> Result<T, D::Error>
where
    T: std::str::FromStr,
    D: serde::Deserializer<'de>,
{
    let text = String::deserialize(deserializer)?;
    text.parse().map_err(|_| {
        serde::de::Error::custom(format!(
            "{text:?} is not a range of addresses: give one such as {example:?}"
        ))
    })
}

fn values(violations: &[Violation]) -> String {
    match violations.len() {
        1 => "one value".to_owned(),
        count => format!("{count} values"),
    }
}

fn list(violations: &[Violation]) -> String {
    violations
        .iter()
        .map(|violation| format!("\n  {}: {}", violation.field, violation.mend))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(Path::new("test.toml"), text)
    }

    #[test]
    fn the_printed_defaults_are_the_defaults() {
        let uncommented: String = DEFAULT_TOML
            .lines()
            .map(|line| match line.strip_prefix('#') {
                Some(rest) if !rest.starts_with(' ') => format!("{rest}\n"),
                _ => format!("{line}\n"),
            })
            .collect();
        assert!(uncommented.contains("\nboot_ms = 60000\n"));
        assert_eq!(parse(&uncommented).unwrap(), Config::default());
        assert_eq!(parse(DEFAULT_TOML).unwrap(), Config::default());
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn an_unknown_name_is_named() {
        let error = parse("[timeouts]\nboot_seconds = 3")
            .unwrap_err()
            .to_string();
        assert!(error.contains("boot_seconds"), "{error}");
        assert!(error.contains("boot_ms"), "{error}");
    }

    #[test]
    fn a_bad_range_is_said_with_the_mend() {
        for (line, mend) in [
            ("ipv4_range = \"10.0.0.0/33\"", "10.213.0.0/16"),
            ("ipv4_range = \"fd73::/64\"", "10.213.0.0/16"),
            ("ipv6_range = \"fd73::\"", "/64"),
        ] {
            let error = parse(&format!("[network]\n{line}"))
                .unwrap_err()
                .to_string();
            assert!(error.contains("give one such as"), "{error}");
            assert!(error.contains(mend), "{error}");
        }
    }

    #[test]
    fn a_bad_address_is_said_with_the_mend() {
        let error = parse("[listen]\ntcp_address = \"localhost\"")
            .unwrap_err()
            .to_string();
        assert!(error.contains("IP:PORT"), "{error}");
    }
}
