//! Admission: from a request to an actor that starts its sandbox.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::actor::{Actor, Caller, MAX_COMMANDS};
use super::error::{CreateError, StartError};
use super::pool::Pool;
use super::requests::{Claim, Claimed};
use super::restore::Plan;
use super::spec::{CreateSpec, NetworkSpec};
use crate::admission::Reservation;
use crate::id::{SandboxId, SnapshotId};
use crate::record::{Base, Reply, Resources, SandboxRecord, State};
use crate::status::Refusal;
use crate::template::{OpenTemplate, TemplateError};
use crate::time::{Stage, Stopwatch, UnixMillis};

/// A sandbox that runs, and how long its making took.
#[derive(Debug, Clone)]
pub struct Created {
    pub record: SandboxRecord,
    pub stages: Vec<Stage>,
    /// It was restored, not booted.
    pub restored: bool,
}

/// What a sandbox begins with.
#[derive(Debug)]
pub(super) enum Origin {
    Boot(OpenTemplate),
    Restore(Box<Plan>),
    /// A template's own snapshot; should that fail, the template.
    Template {
        plan: Box<Plan>,
        template: OpenTemplate,
    },
}

/// What has been admitted.
#[derive(Debug)]
struct Admitted {
    record: SandboxRecord,
    origin: Origin,
    reservation: Reservation,
}

impl From<Created> for Reply {
    fn from(created: Created) -> Self {
        Self::Created {
            record: Box::new(created.record),
            stages: created.stages,
            restored: created.restored,
        }
    }
}

impl From<Reply> for Result<Created, Refusal> {
    fn from(reply: Reply) -> Self {
        match reply {
            Reply::Created {
                record,
                stages,
                restored,
            } => Ok(Created {
                record: *record,
                stages,
                restored,
            }),
            Reply::Refused(refusal) => Err(refusal),
        }
    }
}

impl Pool {
    /// Makes a sandbox, or gives the reply that the same request has had. When
    /// the caller drops this, a sandbox without a request id is taken down.
    pub async fn create(self: &Arc<Self>, spec: CreateSpec) -> Result<Created, Refusal> {
        loop {
            let Some(request_id) = spec.request_id.clone() else {
                return self.make(spec, None).await;
            };
            match self.requests.claim(&request_id, &spec.body()) {
                Claim::First(claimed) => return self.make(spec, Some(claimed)).await,
                Claim::Reused => {
                    return Err(Refusal::from(&CreateError::RequestIdReused(request_id)));
                }
                Claim::Repeated(mut reply) => {
                    let reply = reply.wait_for(Option::is_some).await;
                    if let Some(reply) = reply.ok().and_then(|reply| reply.clone()) {
                        return reply.into();
                    }
                    // The first one was refused before it became a sandbox:
                    // this one may fare better.
                }
            }
        }
    }

    async fn make(
        self: &Arc<Self>,
        spec: CreateSpec,
        claimed: Option<Claimed>,
    ) -> Result<Created, Refusal> {
        let watch = Stopwatch::start();
        if let NetworkSpec::Policy(policy) = &spec.network
            && let Err(found) = self.check_policy(policy, "network_policy").await
        {
            return Err(Refusal::from(&CreateError::Invalid(found)));
        }
        let admitted = self.admit(spec).map_err(|error| Refusal::from(&error))?;
        let (done, outcome) = oneshot::channel();
        let caller = Caller {
            claimed,
            together: None,
            done,
        };
        let Admitted {
            record,
            origin,
            reservation,
        } = admitted;
        self.begin(record, origin, reservation, watch, caller);
        outcome
            .await
            .unwrap_or_else(|_| Err(Refusal::from(&CreateError::ActorLost)))
    }

    /// Starts the actor of a sandbox that has been admitted.
    pub(super) fn begin(
        self: &Arc<Self>,
        record: SandboxRecord,
        origin: Origin,
        reservation: Reservation,
        watch: Stopwatch,
        caller: Caller,
    ) {
        let (commands, commands_rx) = mpsc::channel(MAX_COMMANDS);
        self.registry.insert(record.clone(), commands);
        let mut actor = Actor::new(self, record);
        actor.reservation = Some(reservation);
        self.actors
            .spawn(actor.run_new(origin, watch, caller, commands_rx));
    }

    /// Everything that can be refused without making anything.
    fn admit(&self, spec: CreateSpec) -> Result<Admitted, CreateError> {
        if self.is_draining() {
            return Err(CreateError::Draining);
        }
        let name = if spec.template.is_empty() {
            &self.config.defaults.template
        } else {
            &spec.template
        };
        let ttl = super::spec::resolve_ttl(spec.ttl, &self.config.defaults, &self.config.limits)?;
        let kvm = self.kvm.get();
        let max_vcpus = kvm.as_ref().map_or(super::MAX_VCPUS, |kvm| kvm.max_vcpus);
        let capacity = self.admission.capacity();
        let by_id = name.parse::<SnapshotId>().ok();
        let snapshot = match &by_id {
            Some(id) => self.snapshots.take(id),
            None => self.snapshots.take_named(name),
        };
        // A request that no state of this host could serve is told so first.
        let (resources, origin, base) = match snapshot {
            Some((snapshot, hold)) => {
                let resources = spec.resolve_of(snapshot.resources, capacity, max_vcpus)?;
                kvm?;
                let plan = self.plan(&snapshot, hold).map_err(StartError::from)?;
                let base = (snapshot.template, snapshot.base);
                (resources, Origin::Restore(Box::new(plan)), base)
            }
            None if by_id.is_some() => return Err(CreateError::SnapshotNotFound(name.clone())),
            None => {
                let template = self.templates.open(name)?;
                let manifest = &template.manifest;
                let resources =
                    spec.resolve(&self.config.defaults, manifest, capacity, max_vcpus)?;
                template
                    .kernel_image
                    .check_fits(resources.memory_mib)
                    .map_err(|error| TemplateError::Kernel {
                        name: name.clone(),
                        error,
                    })?;
                kvm?;
                let base = (name.clone(), manifest.base());
                (resources, self.origin_of(name, template, resources), base)
            }
        };
        let network = self.network_of(spec.network)?;
        let id = SandboxId::random().map_err(CreateError::Random)?;
        let reservation = self.admission.reserve(resources)?;
        let expires_at = ttl.map(|ttl| UnixMillis::now().plus(ttl));
        let mut record = self.new_record(id, resources, base, &origin);
        record.labels = spec.labels;
        record.network = network;
        record.expires_at = expires_at;
        record.request_id = spec.request_id;
        Ok(Admitted {
            record,
            origin,
            reservation,
        })
    }

    /// The template's own snapshot, where there is one of these sizes.
    fn origin_of(&self, name: &str, template: OpenTemplate, resources: Resources) -> Origin {
        let Some((snapshot, hold)) = self.snapshots.take_template(name, resources) else {
            return Origin::Boot(template);
        };
        if !self.is_current(&snapshot, &template.manifest) {
            self.template_changed.notify_one();
            return Origin::Boot(template);
        }
        match template.rootfs.try_clone() {
            Ok(rootfs) => Origin::Template {
                plan: Box::new(Plan::new(&snapshot, hold, rootfs)),
                template,
            },
            // For want of a descriptor, of which booting needs fewer.
            Err(_) => Origin::Boot(template),
        }
    }

    /// A sandbox of which nothing exists yet.
    pub(super) fn new_record(
        &self,
        id: SandboxId,
        resources: Resources,
        (template, base): (String, Base),
        origin: &Origin,
    ) -> SandboxRecord {
        let plan = match origin {
            Origin::Boot(_) => None,
            Origin::Restore(plan) | Origin::Template { plan, .. } => Some(plan),
        };
        SandboxRecord {
            id,
            sequence: self.registry.next_sequence(),
            template,
            state: State::Pending,
            resources,
            labels: BTreeMap::new(),
            created_at: UnixMillis::now(),
            expires_at: None,
            request_id: None,
            monitor: None,
            failure: None,
            goes_with_exec: false,
            chains: plan.map(|plan| plan.chains.clone()).unwrap_or_default(),
            layer: 0,
            saved: None,
            snapshot: plan.map(|plan| plan.snapshot.clone()),
            parent: None,
            base,
            network: None,
            slot: None,
        }
    }
}
