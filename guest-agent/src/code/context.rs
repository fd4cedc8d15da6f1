//! One context: a queue of code and the interpreter that runs it.
//!
//! A task of its own holds the interpreter. Between runs it waits for the next, for
//! orders, and for what the interpreter still says: a server that code has started in
//! the background must not get stuck on a full pipe. It has no timer then.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use soulbox_proto::guest::v1::run_code_response::Event;
use soulbox_proto::guest::v1::{CodeContext, RunStarted};
use tokio::sync::{mpsc, oneshot, watch};
use tonic::{Code, Status};

use super::channel;
use super::interpreter::{Heard, Interpreter, InterpreterError, Listen};
use super::request::{ContextSpec, RunSpec};
use super::run::{Responses, Run};
use super::{Guest, not_found};
use crate::status::refused;

/// More code than that waits for nothing good.
const MAX_WAITING: usize = 256;
/// What is kept of what is said between runs, for the next one to tell.
const KEPT_BYTES: usize = 64 * 1024;

/// A context, as others see it. Clones are one context.
#[derive(Clone)]
pub(super) struct Context {
    pub(super) id: Arc<str>,
    spec: Arc<ContextSpec>,
    user: Arc<str>,
    cwd: Bytes,
    created: SystemTime,
    info: Arc<Mutex<Info>>,
    jobs: mpsc::Sender<Job>,
    orders: mpsc::UnboundedSender<Order>,
}

/// What changes.
#[derive(Debug, Default)]
struct Info {
    pid: u32,
    runs: u64,
    restarts: u32,
    /// That run or wait to.
    jobs: u32,
}

/// What ends a run, or does not wait for its end.
#[derive(Debug)]
pub(super) enum Order {
    Interrupt(oneshot::Sender<bool>),
    Restart(oneshot::Sender<Result<(), Status>>),
    /// Answered when all is over.
    Delete(oneshot::Sender<()>),
}

struct Job {
    spec: RunSpec,
    responses: Responses,
    _counted: Counted,
}

/// Counts a job while it runs or waits.
struct Counted(Arc<Mutex<Info>>);

/// The task.
struct Keeper {
    id: Arc<str>,
    spec: Arc<ContextSpec>,
    guest: Guest,
    interpreter: Option<Interpreter>,
    info: Arc<Mutex<Info>>,
    jobs: mpsc::Receiver<Job>,
    orders: mpsc::UnboundedReceiver<Order>,
    stop: watch::Receiver<bool>,
    kept: Kept,
}

/// What was said between runs.
#[derive(Default)]
struct Kept {
    events: VecDeque<Event>,
    bytes: usize,
    dropped: u64,
}

/// What the keeper has to do.
enum Next {
    Job(Job),
    Order(Order),
    Heard(Heard),
    Stop,
}

// === impl Context ===

impl Context {
    /// Starts an interpreter and keeps it.
    pub(super) async fn start(
        id: String,
        spec: ContextSpec,
        guest: &Guest,
    ) -> Result<Self, InterpreterError> {
        let interpreter = Interpreter::start(&guest.processes, &spec, guest.identity()).await?;
        let (user, cwd) = (interpreter.user.as_str().into(), interpreter.cwd.clone());
        let (id, spec): (Arc<str>, _) = (id.into(), Arc::new(spec));
        let info = Arc::new(Mutex::new(Info {
            pid: interpreter.pid(),
            ..Info::default()
        }));
        let (jobs, waiting) = mpsc::channel(MAX_WAITING);
        let (orders, ordered) = mpsc::unbounded_channel();
        let keeper = Keeper {
            id: Arc::clone(&id),
            spec: Arc::clone(&spec),
            guest: guest.clone(),
            interpreter: Some(interpreter),
            info: Arc::clone(&info),
            jobs: waiting,
            orders: ordered,
            stop: guest.stop.clone(),
            kept: Kept::default(),
        };
        tokio::spawn(keeper.keep());
        Ok(Self {
            id,
            spec,
            user,
            cwd,
            created: SystemTime::now(),
            info,
            jobs,
            orders,
        })
    }

    pub(super) fn spec(&self) -> &ContextSpec {
        &self.spec
    }

    pub(super) fn describe(&self) -> CodeContext {
        let info = lock(&self.info);
        CodeContext {
            id: self.id.to_string(),
            language: self.spec.runner.language.into(),
            cwd: self.cwd.clone(),
            pid: info.pid,
            busy: info.jobs > 0,
            execution_count: info.runs,
            create_time: Some(self.created.into()),
            restarts: info.restarts,
            user: self.user.to_string(),
        }
    }

    /// Puts code into the queue.
    pub(super) fn run(&self, spec: RunSpec, responses: Responses) -> Result<(), Status> {
        let job = Job {
            spec,
            responses,
            _counted: Counted::new(&self.info),
        };
        self.jobs.try_send(job).map_err(|error| match error {
            mpsc::error::TrySendError::Closed(_) => not_found(&self.id),
            mpsc::error::TrySendError::Full(_) => {
                let message = format!(
                    "{MAX_WAITING} pieces of code wait in this context already: make another one"
                );
                refused(Code::ResourceExhausted, "OUT_OF_RESOURCES", message)
            }
        })
    }

    /// Gives an order and waits until it has been done. None: the context is gone.
    pub(super) async fn order<T>(
        &self,
        order: impl FnOnce(oneshot::Sender<T>) -> Order,
    ) -> Option<T> {
        let (reply, done) = oneshot::channel();
        self.orders.send(order(reply)).ok()?;
        done.await.ok()
    }
}

// === impl Keeper ===

impl Keeper {
    async fn keep(mut self) {
        let mut deleted = None;
        let refusal = loop {
            match self.next().await {
                Next::Job(job) => {
                    if let Some(reply) = self.job(job).await {
                        deleted = Some(reply);
                        break not_found(&self.id);
                    }
                }
                Next::Order(order) => {
                    if let Some(reply) = self.obey(order).await {
                        deleted = Some(reply);
                        break not_found(&self.id);
                    }
                }
                Next::Heard(Heard::Output(event)) => self.kept.keep(event),
                // Only a run has something to say there; whatever that was, whoever
                // wrote it can write more.
                Next::Heard(_) => self.lose_interpreter().await,
                Next::Stop => break super::stopping(),
            }
        };
        self.jobs.close();
        self.orders.close();
        self.end_interpreter().await;
        while let Ok(job) = self.jobs.try_recv() {
            let _ = job.responses.try_send(Err(refusal.clone()));
        }
        if let Some(reply) = deleted {
            let _ = reply.send(());
        }
    }

    async fn next(&mut self) -> Next {
        let listen = Listen {
            output: true,
            frames: true,
            limit: 0,
        };
        let heard = async {
            match &mut self.interpreter {
                Some(interpreter) => interpreter.heard(listen).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            _ = self.stop.wait_for(|stop| *stop) => Next::Stop,
            Some(order) = self.orders.recv() => Next::Order(order),
            heard = heard => Next::Heard(heard),
            Some(job) = self.jobs.recv() => Next::Job(job),
            else => Next::Stop,
        }
    }

    /// What to answer when it was the order to end.
    async fn obey(&mut self, order: Order) -> Option<oneshot::Sender<()>> {
        match order {
            Order::Interrupt(reply) => drop(reply.send(false)),
            Order::Restart(reply) => {
                self.end_interpreter().await;
                let started = self.start().await;
                let _ = reply.send(started.map_err(Status::from));
            }
            Order::Delete(reply) => return Some(reply),
        }
        None
    }

    async fn job(&mut self, job: Job) -> Option<oneshot::Sender<()>> {
        let Job {
            spec, responses, ..
        } = &job;
        if responses.is_closed() {
            // The caller left while it waited.
            return None;
        }
        // One that stands still would run it before it knew of a new identity.
        let ready = self.guest.processes.may_start().await;
        let started = match ready {
            Ok(()) => self.start().await.map_err(Status::from),
            Err(stopping) => Err(stopping),
        };
        let identity = self.guest.identity();
        let (Ok(()), Some(interpreter)) = (&started, &mut self.interpreter) else {
            let status = started.err().unwrap_or_else(super::stopping);
            let _ = responses.try_send(Err(status));
            return None;
        };
        let number = {
            let mut info = lock(&self.info);
            info.runs += 1;
            info.runs
        };
        interpreter.run(
            channel::Run {
                code: &spec.code,
                number,
                max_result_bytes: spec.max_result_bytes,
                reseed: false,
            },
            identity,
        );
        let mut run = Run::new(interpreter, spec, responses, number);
        run.tell(Event::Started(RunStarted {
            context_id: self.id.to_string(),
            execution_count: number,
        }));
        self.kept.tell(&mut run);
        let mut orders = Vec::new();
        let lives = run.run(&mut self.orders, &mut orders, &mut self.stop).await;
        if !lives && orders.is_empty() {
            self.lose_interpreter().await;
        }
        // In their order, but that nothing comes after the end.
        for order in orders {
            if let Some(reply) = self.obey(order).await {
                return Some(reply);
            }
        }
        None
    }

    /// Starts a new interpreter where the last has ended.
    async fn start(&mut self) -> Result<(), InterpreterError> {
        if self.interpreter.is_none() {
            let identity = self.guest.identity();
            let started = Interpreter::start(&self.guest.processes, &self.spec, identity).await?;
            lock(&self.info).pid = started.pid();
            self.interpreter = Some(started);
        }
        Ok(())
    }

    /// It has ended without an order to.
    async fn lose_interpreter(&mut self) {
        self.end_interpreter().await;
        lock(&self.info).restarts += 1;
    }

    /// Its state is lost with it; so the next run is its first.
    async fn end_interpreter(&mut self) {
        if let Some(interpreter) = self.interpreter.take() {
            interpreter.end().await;
        }
        self.kept = Kept::default();
        let mut info = lock(&self.info);
        (info.pid, info.runs) = (0, 0);
    }
}

// === impl Kept ===

impl Kept {
    fn keep(&mut self, event: Event) {
        let (Event::Stdout(bytes) | Event::Stderr(bytes)) = &event else {
            return;
        };
        if self.bytes + bytes.len() <= KEPT_BYTES {
            self.bytes += bytes.len();
            self.events.push_back(event);
        } else {
            self.dropped += bytes.len() as u64;
        }
    }

    /// Hands all of it to the run.
    fn tell(&mut self, run: &mut Run<'_>) {
        let Self {
            events, dropped, ..
        } = std::mem::take(self);
        for event in events {
            run.tell(event);
        }
        run.drop_bytes(dropped);
    }
}

// === impl Counted ===

impl Counted {
    fn new(info: &Arc<Mutex<Info>>) -> Self {
        lock(info).jobs += 1;
        Self(Arc::clone(info))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        lock(&self.0).jobs -= 1;
    }
}

fn lock(info: &Mutex<Info>) -> MutexGuard<'_, Info> {
    info.lock().unwrap_or_else(PoisonError::into_inner)
}
