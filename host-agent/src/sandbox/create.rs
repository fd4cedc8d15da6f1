//! Admission: from a request to an actor that starts its sandbox.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::actor::{Actor, Caller, MAX_COMMANDS};
use super::error::CreateError;
use super::pool::Pool;
use super::requests::{Claim, Claimed};
use super::spec::CreateSpec;
use crate::admission::Reservation;
use crate::id::SandboxId;
use crate::record::{Reply, SandboxRecord, State};
use crate::status::Refusal;
use crate::template::{OpenTemplate, TemplateError};
use crate::time::{Stage, Stopwatch, UnixMillis};

/// A sandbox that runs, and how long its making took.
#[derive(Debug, Clone)]
pub struct Created {
    pub record: SandboxRecord,
    pub stages: Vec<Stage>,
}

impl From<Created> for Reply {
    fn from(created: Created) -> Self {
        Self::Created {
            record: Box::new(created.record),
            stages: created.stages,
        }
    }
}

impl From<Reply> for Result<Created, Refusal> {
    fn from(reply: Reply) -> Self {
        match reply {
            Reply::Created { record, stages } => Ok(Created {
                record: *record,
                stages,
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
        let (record, template, reservation) =
            self.admit(spec).map_err(|error| Refusal::from(&error))?;
        let (done, outcome) = oneshot::channel();
        let (commands, commands_rx) = mpsc::channel(MAX_COMMANDS);
        self.registry.insert(record.clone(), commands);
        let mut actor = Actor::new(self, record);
        actor.reservation = Some(reservation);
        let caller = Caller { claimed, done };
        self.actors
            .spawn(actor.run_new(template, watch, caller, commands_rx));
        outcome
            .await
            .unwrap_or_else(|_| Err(Refusal::from(&CreateError::ActorLost)))
    }

    /// Everything that can be refused without making anything.
    fn admit(
        &self,
        spec: CreateSpec,
    ) -> Result<(SandboxRecord, OpenTemplate, Reservation), CreateError> {
        if self.is_draining() {
            return Err(CreateError::Draining);
        }
        let name = if spec.template.is_empty() {
            &self.config.defaults.template
        } else {
            &spec.template
        };
        let ttl = spec.resolve_ttl(&self.config.defaults, &self.config.limits)?;
        let template = self.templates.open(name)?;
        let kvm = self.kvm.get();
        // A request that no state of this host could serve is told so first.
        let resources = spec.resolve(
            &self.config.defaults,
            &template.manifest,
            self.admission.capacity(),
            kvm.as_ref().map_or(super::MAX_VCPUS, |kvm| kvm.max_vcpus),
        )?;
        template
            .kernel_image
            .check_fits(resources.memory_mib)
            .map_err(|error| TemplateError::Kernel {
                name: name.clone(),
                error,
            })?;
        kvm?;
        let id = SandboxId::random().map_err(CreateError::Random)?;
        let reservation = self.admission.reserve(resources)?;
        let created_at = UnixMillis::now();
        let record = SandboxRecord {
            id,
            sequence: self.registry.next_sequence(),
            template: name.clone(),
            state: State::Pending,
            resources,
            labels: spec.labels,
            created_at,
            expires_at: ttl.map(|ttl| created_at.plus(ttl)),
            request_id: spec.request_id,
            monitor: None,
            failure: None,
            goes_with_exec: false,
        };
        Ok((record, template, reservation))
    }
}
