//! Calls to the services of a guest, passed on to its agent as they are.
//!
//! Nothing is decoded and nothing is kept: who does not read is waited for, through
//! the windows of HTTP/2. What is the daemon's own: which sandbox is meant, that its
//! end ends the call with a reason, and that an agent's words are made harmless.

mod answer;
mod death;
mod request;
mod told;

use std::convert::Infallible;
use std::marker::PhantomData;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service};
use tonic::server::NamedService;

use self::answer::{Answer, News};
use self::request::Asked;
use crate::guest::Way;
use crate::id::SandboxId;
use crate::sandbox::{Pool, UseError};
use crate::status::status;

/// Passes calls on.
#[derive(Debug, Clone)]
pub struct Relay {
    pool: Arc<Pool>,
    /// Holds a token for every call that a drain waits for.
    calls: TaskTracker,
    /// Ends the calls that would never end by themselves.
    stopping: CancellationToken,
    /// Ends all others.
    ending: CancellationToken,
}

/// The service of a guest whose server is `S`.
#[derive(Debug)]
pub struct Relayed<S> {
    relay: Relay,
    service: PhantomData<fn() -> S>,
}

/// A sandbox that is to go with a call, however that ends.
#[derive(Debug)]
struct Farewell {
    pool: Arc<Pool>,
    id: SandboxId,
    call: TaskTrackerToken,
    is_done: bool,
}

// === impl Relay ===

impl Relay {
    pub fn new(
        pool: Arc<Pool>,
        calls: TaskTracker,
        stopping: CancellationToken,
        ending: CancellationToken,
    ) -> Self {
        Self {
            pool,
            calls,
            stopping,
            ending,
        }
    }

    /// The guest's service whose server is `S`, for this daemon's callers.
    pub fn service<S>(&self) -> Relayed<S> {
        Relayed {
            relay: self.clone(),
            service: PhantomData,
        }
    }

    async fn pass(self, request: http::Request<Body>) -> Result<http::Response<Body>, Status> {
        let call = self.calls.token();
        let Asked {
            id,
            delete_after,
            way,
            is_endless,
            for_agent,
        } = Asked::parse(request)?;
        let farewell = delete_after.then(|| Farewell {
            pool: Arc::clone(&self.pool),
            id: id.clone(),
            call: call.clone(),
            is_done: false,
        });
        let end = if is_endless {
            self.stopping
        } else {
            self.ending
        };
        match answered(&self.pool, &id, delete_after, way, for_agent, end).await {
            Ok((reply, news)) => Ok(Answer::to(id, reply, news, farewell, call)),
            Err(status) => {
                if let Some(mut farewell) = farewell {
                    farewell.say().await;
                }
                Err(status)
            }
        }
    }
}

/// The head of the agent's answer, and what would end the call before it ends.
async fn answered(
    pool: &Pool,
    id: &SandboxId,
    delete_after: bool,
    way: Way,
    for_agent: http::Request<Body>,
    end: CancellationToken,
) -> Result<(http::Response<crate::guest::Reply>, News), Status> {
    let mut view = pool.view(id).map_err(|error| status(&error))?;
    let live = death::usable(&view.borrow()).map_err(|error| status(&error))?;
    if delete_after {
        // Before anything runs: this daemon may not live to delete it.
        let recorded = pool.go_with_exec(id).await;
        recorded.map_err(|error| status(&error))?;
    }
    let (guest, monitor, of) = (live.guest.clone(), live.monitor(), id.clone());
    drop(live);
    let mut news: News = Box::pin(async move {
        tokio::select! {
            error = death::death(&of, monitor, &mut view) => error,
            () = end.cancelled() => UseError::Stopping,
        }
    });
    let called = tokio::select! {
        // What the guest has said goes first: a program may end its sandbox.
        biased;
        called = guest.call(way, for_agent) => called,
        error = &mut news => return Err(status(&error)),
    };
    match called {
        Ok(reply) => {
            told::check(&reply)?;
            Ok((reply, news))
        }
        Err(broken) => {
            let otherwise = answer::otherwise(id, broken);
            let explained = tokio::time::timeout(answer::EXPLANATION, news).await;
            Err(explained.map_or(otherwise, |error| status(&error)))
        }
    }
}

// === impl Farewell ===

impl Farewell {
    async fn say(&mut self) {
        // What was asked of it is over, and its disk goes with it: nothing is left
        // that a clean stop would save.
        if let Err(error) = self.pool.delete(&self.id, true).await {
            tracing::error!(sandbox = %self.id, %error, "not deleted after its call");
        }
        self.is_done = true;
    }
}

impl Drop for Farewell {
    /// The caller is gone.
    fn drop(&mut self) {
        if self.is_done {
            return;
        }
        let mut farewell = Self {
            pool: Arc::clone(&self.pool),
            id: self.id.clone(),
            call: self.call.clone(),
            // Whatever becomes of it, this was the last try.
            is_done: true,
        };
        tokio::spawn(async move { farewell.say().await });
    }
}

// === impl Relayed ===

impl<S> Clone for Relayed<S> {
    fn clone(&self) -> Self {
        self.relay.service()
    }
}

impl<S: NamedService> NamedService for Relayed<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for Relayed<S> {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let relay = self.relay.clone();
        Box::pin(async move {
            let passed = relay.pass(request).await;
            Ok(passed.unwrap_or_else(Status::into_http))
        })
    }
}
