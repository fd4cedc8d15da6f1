//! What a request asks for, checked as far as that goes without looking at the
//! host.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use serde::Serialize;
use soulbox_proto::host::v1 as proto;

use super::error::CreateError;
use super::{MAX_DISK_MIB, MAX_MEMORY_MIB, MAX_TTL_SECONDS, MAX_VCPUS, MIN_MEMORY_MIB};
use crate::admission::Amounts;
use crate::config::{Defaults, Limits};
use crate::id::SnapshotId;
use crate::net::Policy;
use crate::record::Resources;
use crate::service::convert::policy_from_proto;
use crate::status::FieldViolation;
use crate::template::{Manifest, is_template_name};

const MAX_REQUEST_ID_BYTES: usize = 128;
const MAX_LABELS: usize = 64;
const MAX_FORKS: u32 = 1000;
const MAX_LABEL_KEY_BYTES: usize = 63;
const MAX_LABEL_VALUE_BYTES: usize = 255;

/// A request whose fields are well-formed. Zeros and absent fields stand for
/// defaults, as they were sent: two requests are the same when these are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct CreateSpec {
    #[serde(skip)]
    pub request_id: Option<String>,
    pub template: String,
    /// None: the node's default.
    pub vcpus: Option<u32>,
    pub memory_mib: Option<u32>,
    pub disk_mib: Option<u32>,
    pub ttl: Option<Duration>,
    pub labels: BTreeMap<String, String>,
    pub network: NetworkSpec,
}

/// What a sandbox may reach.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub enum NetworkSpec {
    /// The node's default.
    #[default]
    Default,
    None,
    Policy(Box<Policy>),
}

/// A snapshot to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotSpec {
    pub name: Option<String>,
    pub labels: BTreeMap<String, String>,
    pub cold: bool,
}

/// A fork to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForkSpec {
    pub count: u32,
    pub labels: BTreeMap<String, String>,
    pub ttl: Option<Duration>,
    pub delete_parent: bool,
}

/// Collects what is wrong with a request.
#[derive(Debug, Default)]
struct Violations(Vec<FieldViolation>);

// === impl CreateSpec ===

impl CreateSpec {
    /// Checks `request` alone. A vCPU count or memory size that is given must
    /// be in the monitor's range.
    pub fn parse(request: proto::CreateSandboxRequest) -> Result<Self, CreateError> {
        let mut violations = Violations::default();
        if request.request_id.len() > MAX_REQUEST_ID_BYTES {
            violations.add(
                "request_id",
                format!(
                    "has {} bytes; give at most {MAX_REQUEST_ID_BYTES}",
                    request.request_id.len()
                ),
            );
        }
        let resources = request.resources.unwrap_or_default();
        if resources.vcpus > MAX_VCPUS {
            violations.add(
                "resources.vcpus",
                format!("is {}; give 1 to {MAX_VCPUS}", resources.vcpus),
            );
        }
        if resources.memory_mib != 0
            && !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&resources.memory_mib)
        {
            violations.add(
                "resources.memory_mib",
                format!(
                    "is {}; give {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB}",
                    resources.memory_mib
                ),
            );
        }
        if resources.disk_mib > MAX_DISK_MIB {
            violations.add(
                "resources.disk_mib",
                format!("is {}; give at most {MAX_DISK_MIB}", resources.disk_mib),
            );
        }
        let ttl = check_ttl(request.ttl, &mut violations);
        let labels = check_labels(request.labels, &mut violations);
        let network = check_network(request.network, &mut violations);
        violations.into_result()?;
        Ok(Self {
            request_id: Some(request.request_id).filter(|id| !id.is_empty()),
            template: request.template,
            vcpus: non_zero(resources.vcpus),
            memory_mib: non_zero(resources.memory_mib),
            disk_mib: non_zero(resources.disk_mib),
            ttl,
            labels,
            network,
        })
    }

    /// Fills in the defaults and checks the result against the template and
    /// what this node has in all.
    pub(super) fn resolve(
        &self,
        defaults: &Defaults,
        manifest: &Manifest,
        capacity: Amounts,
        max_vcpus: u32,
    ) -> Result<Resources, CreateError> {
        let rootfs_mib = u32::try_from(manifest.rootfs_mib()).unwrap_or(u32::MAX);
        let resources = Resources {
            vcpus: self.vcpus.unwrap_or(defaults.vcpus),
            memory_mib: self.memory_mib.unwrap_or(defaults.memory_mib),
            disk_mib: self.disk_mib.unwrap_or(defaults.disk_mib.max(rootfs_mib)),
        };
        let mut violations = Violations::default();
        if resources.disk_mib < rootfs_mib {
            violations.add(
                "resources.disk_mib",
                format!(
                    "is {}, less than the template's root disk; give at least {rootfs_mib}",
                    resources.disk_mib
                ),
            );
        }
        check_capacity(resources, capacity, max_vcpus, &mut violations);
        violations.into_result()?;
        Ok(resources)
    }

    /// The sizes of a snapshot, which cannot be changed.
    pub(super) fn resolve_of(
        &self,
        resources: Resources,
        capacity: Amounts,
        max_vcpus: u32,
    ) -> Result<Resources, CreateError> {
        let mut violations = Violations::default();
        for (field, asked, has) in [
            ("resources.vcpus", self.vcpus, resources.vcpus),
            (
                "resources.memory_mib",
                self.memory_mib,
                resources.memory_mib,
            ),
            ("resources.disk_mib", self.disk_mib, resources.disk_mib),
        ] {
            if let Some(asked) = asked
                && asked != has
            {
                let mend = format!("is {asked}, but the snapshot has {has}; leave it out");
                violations.add(field, mend);
            }
        }
        check_capacity(resources, capacity, max_vcpus, &mut violations);
        violations.into_result()?;
        Ok(resources)
    }

    /// What is compared to tell a repeated request from another one.
    pub(super) fn body(&self) -> serde_json::Value {
        serde_json::json!(self)
    }
}

// === impl SnapshotSpec ===

impl SnapshotSpec {
    pub fn parse(request: proto::SnapshotSandboxRequest) -> Result<Self, CreateError> {
        let mut violations = Violations::default();
        let name = Some(request.name).filter(|name| !name.is_empty());
        if let Some(name) = &name
            && (!is_template_name(name) || name.parse::<SnapshotId>().is_ok())
        {
            violations.add(
                "name",
                "is no name; give 1 to 64 of [a-z0-9._-], starting with a letter or digit, and no snapshot's id".to_owned(),
            );
        }
        let labels = check_labels(request.labels, &mut violations);
        violations.into_result()?;
        Ok(Self {
            name,
            labels,
            cold: request.cold,
        })
    }

    /// What to say when a template has the name.
    pub(super) fn name_is_a_templates(&self) -> FieldViolation {
        let name = self.name.as_deref().unwrap_or_default();
        FieldViolation {
            field: "name".to_owned(),
            description: format!("is {name:?}, which a template has; choose another"),
        }
    }
}

// === impl ForkSpec ===

impl ForkSpec {
    pub fn parse(request: proto::ForkSandboxRequest) -> Result<Self, CreateError> {
        let mut violations = Violations::default();
        if !(1..=MAX_FORKS).contains(&request.count) {
            let mend = format!("is {}; give 1 to {MAX_FORKS}", request.count);
            violations.add("count", mend);
        }
        let ttl = check_ttl(request.ttl, &mut violations);
        let labels = check_labels(request.labels, &mut violations);
        violations.into_result()?;
        Ok(Self {
            count: request.count,
            labels,
            ttl,
            delete_parent: request.delete_parent,
        })
    }
}

// === impl Violations ===

impl Violations {
    fn add(&mut self, field: &str, description: String) {
        self.0.push(FieldViolation {
            field: field.to_owned(),
            description,
        });
    }

    fn into_result(self) -> Result<(), CreateError> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(CreateError::Invalid(self.0))
        }
    }
}

/// How long a sandbox lives that is to live `asked`; none for no end.
pub(super) fn resolve_ttl(
    asked: Option<Duration>,
    defaults: &Defaults,
    limits: &Limits,
) -> Result<Option<Duration>, CreateError> {
    let seconds = |value: u64| (value != 0).then(|| Duration::from_secs(value));
    let most = seconds(limits.max_ttl_seconds);
    if let (Some(asked), Some(most)) = (asked, most)
        && asked > most
    {
        let mut violations = Violations::default();
        violations.add(
            "ttl",
            format!(
                "is {} s; this node allows at most {} s",
                asked.as_secs(),
                most.as_secs()
            ),
        );
        violations.into_result()?;
    }
    Ok(asked.or(seconds(defaults.ttl_seconds)).or(most))
}

/// What no state of this node could serve.
fn check_capacity(
    resources: Resources,
    capacity: Amounts,
    max_vcpus: u32,
    violations: &mut Violations,
) {
    let vcpus = capacity.vcpus.min(max_vcpus.into());
    for (field, asked, most) in [
        ("resources.vcpus", resources.vcpus, vcpus),
        (
            "resources.memory_mib",
            resources.memory_mib,
            capacity.memory_mib,
        ),
        ("resources.disk_mib", resources.disk_mib, capacity.disk_mib),
    ] {
        if u64::from(asked) > most {
            violations.add(
                field,
                format!("is {asked}, more than this node has in all; give at most {most}"),
            );
        }
    }
}

fn check_ttl(ttl: Option<prost_types::Duration>, violations: &mut Violations) -> Option<Duration> {
    ttl.and_then(|ttl| match Duration::try_from(ttl) {
        Ok(ttl) if ttl.is_zero() => {
            violations.add(
                "ttl",
                "is zero; leave it out for the node's default".to_owned(),
            );
            None
        }
        Ok(ttl) if ttl > Duration::from_secs(MAX_TTL_SECONDS) => {
            violations.add(
                "ttl",
                format!(
                    "is {} s; give at most {MAX_TTL_SECONDS} s, or leave it out",
                    ttl.as_secs()
                ),
            );
            None
        }
        Ok(ttl) => Some(ttl),
        Err(_) => {
            violations.add("ttl", "is negative; give a positive duration".to_owned());
            None
        }
    })
}

fn check_network(
    network: Option<proto::create_sandbox_request::Network>,
    violations: &mut Violations,
) -> NetworkSpec {
    use proto::create_sandbox_request::Network;
    match network {
        None | Some(Network::NoNetwork(false)) => NetworkSpec::Default,
        Some(Network::NoNetwork(true)) => NetworkSpec::None,
        Some(Network::NetworkPolicy(policy)) => {
            match policy_from_proto(&policy, "network_policy") {
                Ok(policy) => NetworkSpec::Policy(Box::new(policy)),
                Err(found) => {
                    violations.0.extend(found);
                    NetworkSpec::Default
                }
            }
        }
    }
}

fn check_labels(
    labels: HashMap<String, String>,
    violations: &mut Violations,
) -> BTreeMap<String, String> {
    if labels.len() > MAX_LABELS {
        violations.add(
            "labels",
            format!("has {} entries; give at most {MAX_LABELS}", labels.len()),
        );
        return BTreeMap::new();
    }
    for (key, value) in &labels {
        let allowed = |byte: u8| {
            byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._/-".contains(&byte)
        };
        if key.is_empty() || key.len() > MAX_LABEL_KEY_BYTES || !key.bytes().all(allowed) {
            let key: String = key.chars().take(MAX_LABEL_KEY_BYTES).collect();
            violations.add(
                "labels",
                format!(
                    "has the key {key:?}; give 1 to {MAX_LABEL_KEY_BYTES} bytes of [a-z0-9._/-]"
                ),
            );
        }
        if value.len() > MAX_LABEL_VALUE_BYTES {
            violations.add(
                "labels",
                format!(
                    "has a value of {} bytes; give at most {MAX_LABEL_VALUE_BYTES}",
                    value.len()
                ),
            );
        }
    }
    labels.into_iter().collect()
}

fn non_zero(value: u32) -> Option<u32> {
    (value != 0).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::template::{FileEntry, RootfsEntry};

    fn request() -> proto::CreateSandboxRequest {
        proto::CreateSandboxRequest::default()
    }

    fn fields<T: std::fmt::Debug>(result: Result<T, CreateError>) -> Vec<String> {
        match result {
            Err(CreateError::Invalid(violations)) => violations
                .into_iter()
                .map(|violation| violation.field)
                .collect(),
            other => panic!("{other:?}"),
        }
    }

    fn manifest() -> Manifest {
        Manifest {
            name: "base".to_owned(),
            description: String::new(),
            architecture: "x86_64".to_owned(),
            kernel: FileEntry {
                file: "vmlinux".to_owned(),
                size_bytes: 1,
                sha256: String::new(),
            },
            rootfs: RootfsEntry {
                file: "rootfs.ext4".to_owned(),
                size_bytes: 300 << 20,
                sha256: String::new(),
                filesystem: "ext4".to_owned(),
            },
            agent_version: "0.1.0".to_owned(),
        }
    }

    #[test]
    fn each_bad_field_is_named() {
        let resources = |vcpus, memory_mib| {
            Some(proto::Resources {
                vcpus,
                memory_mib,
                disk_mib: 0,
            })
        };
        let label = |key: &str, value: &str| HashMap::from([(key.to_owned(), value.to_owned())]);
        let ttl = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
        let many = (0..65)
            .map(|index| (format!("k{index}"), String::new()))
            .collect();
        let cases = [
            (
                "request_id",
                proto::CreateSandboxRequest {
                    request_id: "x".repeat(129),
                    ..request()
                },
            ),
            (
                "resources.vcpus",
                proto::CreateSandboxRequest {
                    resources: resources(33, 0),
                    ..request()
                },
            ),
            (
                "resources.memory_mib",
                proto::CreateSandboxRequest {
                    resources: resources(1, 127),
                    ..request()
                },
            ),
            (
                "resources.memory_mib",
                proto::CreateSandboxRequest {
                    resources: resources(1, MAX_MEMORY_MIB + 1),
                    ..request()
                },
            ),
            (
                "resources.disk_mib",
                proto::CreateSandboxRequest {
                    resources: Some(proto::Resources {
                        disk_mib: MAX_DISK_MIB + 1,
                        ..proto::Resources::default()
                    }),
                    ..request()
                },
            ),
            (
                "ttl",
                proto::CreateSandboxRequest {
                    ttl: ttl(i64::MAX),
                    ..request()
                },
            ),
            (
                "ttl",
                proto::CreateSandboxRequest {
                    ttl: ttl(0),
                    ..request()
                },
            ),
            (
                "ttl",
                proto::CreateSandboxRequest {
                    ttl: ttl(-1),
                    ..request()
                },
            ),
            (
                "labels",
                proto::CreateSandboxRequest {
                    labels: label("", ""),
                    ..request()
                },
            ),
            (
                "labels",
                proto::CreateSandboxRequest {
                    labels: label("Upper", ""),
                    ..request()
                },
            ),
            (
                "labels",
                proto::CreateSandboxRequest {
                    labels: label(&"k".repeat(64), ""),
                    ..request()
                },
            ),
            (
                "labels",
                proto::CreateSandboxRequest {
                    labels: label("k", &"v".repeat(256)),
                    ..request()
                },
            ),
            (
                "labels",
                proto::CreateSandboxRequest {
                    labels: many,
                    ..request()
                },
            ),
        ];
        for (field, request) in cases {
            assert_eq!(fields(CreateSpec::parse(request)), [field]);
        }
    }

    #[test]
    fn defaults_fill_in_and_the_node_bounds() {
        let capacity = Amounts {
            vcpus: 8,
            memory_mib: 1024,
            disk_mib: 1000,
        };
        let resolve = |vcpus, memory_mib, disk_mib, max_vcpus| {
            let spec = CreateSpec::parse(proto::CreateSandboxRequest {
                resources: Some(proto::Resources {
                    vcpus,
                    memory_mib,
                    disk_mib,
                }),
                ..request()
            })
            .unwrap();
            spec.resolve(&Defaults::default(), &manifest(), capacity, max_vcpus)
        };
        let defaults = Resources {
            vcpus: 1,
            memory_mib: 512,
            disk_mib: 300,
        };
        assert_eq!(resolve(0, 0, 0, 32).unwrap(), defaults);
        assert_eq!(fields(resolve(8, 0, 0, 4)), ["resources.vcpus"]);
        assert_eq!(
            fields(resolve(9, 1025, 1001, 32)),
            [
                "resources.vcpus",
                "resources.memory_mib",
                "resources.disk_mib"
            ]
        );
        assert_eq!(fields(resolve(0, 0, 299, 32)), ["resources.disk_mib"]);
    }

    #[test]
    fn the_longest_life_bounds_all() {
        let limits = Limits {
            max_ttl_seconds: 60,
        };
        let spec = |seconds: Option<i64>| {
            CreateSpec::parse(proto::CreateSandboxRequest {
                ttl: seconds.map(|seconds| prost_types::Duration { seconds, nanos: 0 }),
                ..request()
            })
            .unwrap()
        };
        let defaults = Defaults::default();
        let ttl = |seconds, limits: &Limits| resolve_ttl(spec(seconds).ttl, &defaults, limits);
        assert_eq!(ttl(None, &Limits::default()).unwrap(), None);
        assert_eq!(ttl(None, &limits).unwrap(), Some(Duration::from_secs(60)));
        assert_eq!(ttl(Some(5), &limits).unwrap(), Some(Duration::from_secs(5)));
        assert_eq!(fields(ttl(Some(61), &limits)), ["ttl"]);
    }

    #[test]
    fn the_body_ignores_the_id_and_the_order_of_labels() {
        let labels: HashMap<String, String> =
            (0..20).map(|n| (format!("k{n}"), n.to_string())).collect();
        let body = |request_id: &str| {
            let request = proto::CreateSandboxRequest {
                request_id: request_id.to_owned(),
                labels: labels.clone().into_iter().collect(),
                ..request()
            };
            CreateSpec::parse(request).unwrap().body()
        };
        assert_eq!(body("a"), body("b"));
    }
}
