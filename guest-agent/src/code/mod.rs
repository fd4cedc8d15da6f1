//! CodeService: interpreters that live between calls.
//!
//! `language` says what runs a language, `request` checks what was asked, `channel`
//! is what agent and interpreter say to each other, `interpreter` starts and kills
//! one, `context` is the queue in front of it, and `run` one call's code.
//!
//! The interpreters are ordinary programs of the guest. Between runs they and the
//! agent sleep in a read, without threads or timers of ours: one in a snapshot
//! answers at once when it is restored, and touches little memory for it.

mod channel;
mod context;
mod interpreter;
mod language;
mod output;
mod request;
mod run;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::rand::{GetRandomFlags, getrandom};
use soulbox_proto::guest::v1::code_service_server::CodeService;
use soulbox_proto::guest::v1::{
    CreateContextRequest, CreateContextResponse, DeleteContextRequest, DeleteContextResponse,
    InterruptContextRequest, InterruptContextResponse, ListContextsRequest, ListContextsResponse,
    RestartContextRequest, RestartContextResponse, RunCodeRequest, RunCodeResponse,
};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status};

use self::context::{Context, Order};
use self::language::Runner;
use self::request::{ContextSpec, RunSpec, Target};
use crate::exec::Processes;
use crate::spec::Violations;
use crate::status::{excerpt, internal, refused};

/// Each is a process with memory of its own; more of them are a mistake.
const MAX_CONTEXTS: usize = 64;
/// How many messages wait for a caller who reads slowly; of output, each has 64 KiB
/// at most.
const RESPONSES: usize = 4;

const ID_BYTES: usize = 8;
const ID_ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";

/// Serves CodeService. Clones share everything.
#[derive(Clone)]
pub(crate) struct Contexts {
    guest: Guest,
    contexts: Arc<Mutex<Vec<Context>>>,
    /// Held while one is made: two calls must not both make a default one, nor one
    /// too many.
    making: Arc<tokio::sync::Mutex<()>>,
}

/// What interpreters need to know of where they are.
#[derive(Clone)]
struct Guest {
    processes: Processes,
    stop: watch::Receiver<bool>,
    /// How often the guest has become another.
    identity: Arc<AtomicU64>,
}

// === impl Contexts ===

impl Contexts {
    pub(crate) fn new(processes: Processes, stop: watch::Receiver<bool>) -> Self {
        Self {
            guest: Guest {
                processes,
                stop,
                identity: Arc::default(),
            },
            contexts: Arc::default(),
            making: Arc::default(),
        }
    }

    /// The guest is a copy from now on: random numbers that interpreters draw in
    /// their own memory must not be those of the original. They are seeded anew
    /// before the next code runs.
    pub(crate) fn reseed(&self) {
        self.guest.identity.fetch_add(1, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Context>> {
        self.contexts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, id: &str) -> Option<Context> {
        self.lock()
            .iter()
            .find(|context| &*context.id == id)
            .cloned()
    }

    fn get(&self, id: &str) -> Result<Context, Status> {
        self.find(id).ok_or_else(|| not_found(id))
    }

    async fn make(&self, spec: ContextSpec) -> Result<Context, Status> {
        let _turn = self.making.lock().await;
        let id = self.fresh_id()?;
        self.make_in_turn(id, spec).await
    }

    async fn get_default(&self, runner: &'static Runner) -> Result<Context, Status> {
        let id = runner.default_context;
        if let Some(context) = self.find(id) {
            return Ok(context);
        }
        let _turn = self.making.lock().await;
        match self.find(id) {
            Some(context) => Ok(context),
            None => {
                let spec = ContextSpec::default_of(runner);
                self.make_in_turn(id.to_owned(), spec).await
            }
        }
    }

    async fn make_in_turn(&self, id: String, spec: ContextSpec) -> Result<Context, Status> {
        if self.lock().len() >= MAX_CONTEXTS {
            let message = format!("there are {MAX_CONTEXTS} contexts: delete one first");
            return Err(refused(
                Code::ResourceExhausted,
                "TOO_MANY_CONTEXTS",
                message,
            ));
        }
        let context = Context::start(id, spec, &self.guest).await?;
        self.lock().push(context.clone());
        Ok(context)
    }

    fn fresh_id(&self) -> Result<String, Status> {
        loop {
            let mut random = [0_u8; ID_BYTES];
            getrandom(&mut random, GetRandomFlags::empty())
                .map_err(|error| internal(format!("no random number for an id: {error}")))?;
            let id: String = random.iter().map(|byte| letter(*byte)).collect();
            if self.find(&id).is_none() && Runner::of_default_context(&id).is_none() {
                return Ok(id);
            }
        }
    }

    /// The context that code is to run in.
    async fn target(&self, target: &Target) -> Result<Context, Status> {
        match target {
            Target::Default(runner) => self.get_default(runner).await,
            Target::Context(id, language) => {
                let context = match Runner::of_default_context(id) {
                    Some(runner) => self.get_default(runner).await?,
                    None => self.get(id)?,
                };
                let own = context.spec().runner.language;
                if language.is_some_and(|language| language != own) {
                    let problem =
                        format!("must be the context's, {}, or absent", own.as_str_name());
                    return Err(Violations::of("language", &problem).into());
                }
                Ok(context)
            }
        }
    }
}

// === impl Guest ===

impl Guest {
    fn identity(&self) -> u64 {
        self.identity.load(Ordering::Relaxed)
    }
}

#[tonic::async_trait]
impl CodeService for Contexts {
    async fn create_context(
        &self,
        request: Request<CreateContextRequest>,
    ) -> Result<Response<CreateContextResponse>, Status> {
        let spec = ContextSpec::try_from(request.into_inner())?;
        let context = self.make(spec).await?.describe();
        Ok(Response::new(CreateContextResponse {
            context: Some(context),
        }))
    }

    async fn list_contexts(
        &self,
        _: Request<ListContextsRequest>,
    ) -> Result<Response<ListContextsResponse>, Status> {
        let contexts = self.lock().iter().map(Context::describe).collect();
        Ok(Response::new(ListContextsResponse { contexts }))
    }

    async fn delete_context(
        &self,
        request: Request<DeleteContextRequest>,
    ) -> Result<Response<DeleteContextResponse>, Status> {
        let id = request.into_inner().id;
        if let Some(context) = self.find(&id) {
            // Not found from now on, and ended also when the caller does not wait.
            self.lock().retain(|other| *other.id != *id);
            context.order(Order::Delete).await;
        }
        Ok(Response::new(DeleteContextResponse {}))
    }

    async fn restart_context(
        &self,
        request: Request<RestartContextRequest>,
    ) -> Result<Response<RestartContextResponse>, Status> {
        let id = request.into_inner().id;
        let context = self.get(&id)?;
        context
            .order(Order::Restart)
            .await
            .ok_or_else(|| not_found(&id))??;
        Ok(Response::new(RestartContextResponse {
            context: Some(context.describe()),
        }))
    }

    async fn interrupt_context(
        &self,
        request: Request<InterruptContextRequest>,
    ) -> Result<Response<InterruptContextResponse>, Status> {
        let id = request.into_inner().id;
        let interrupted = self.get(&id)?.order(Order::Interrupt).await;
        let interrupted = interrupted.ok_or_else(|| not_found(&id))?;
        Ok(Response::new(InterruptContextResponse { interrupted }))
    }

    type RunCodeStream = ReceiverStream<Result<RunCodeResponse, Status>>;

    async fn run_code(
        &self,
        request: Request<RunCodeRequest>,
    ) -> Result<Response<Self::RunCodeStream>, Status> {
        let spec = RunSpec::try_from(request.into_inner())?;
        let context = self.target(&spec.target).await?;
        let (responses, stream) = mpsc::channel(RESPONSES);
        context.run(spec, responses)?;
        // When its turn comes at once, `started` goes out with the headers.
        tokio::task::yield_now().await;
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

fn letter(random: u8) -> char {
    let index = usize::from(random) % ID_ALPHABET.len();
    char::from(ID_ALPHABET.get(index).copied().unwrap_or(b'a'))
}

fn not_found(id: &str) -> Status {
    let message = format!(
        "there is no context {}: list them, or make it first",
        excerpt(id.as_bytes())
    );
    refused(Code::NotFound, "CONTEXT_NOT_FOUND", message)
}

fn stopping() -> Status {
    let message = "the guest is turning off: run it in another";
    refused(Code::Unavailable, "STOPPING", message)
}
