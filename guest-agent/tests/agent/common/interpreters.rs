//! Drives CodeService: `python`, `run`, `start`.

use soulbox_proto::guest::v1::code_service_client::CodeServiceClient;
use soulbox_proto::guest::v1::run_code_response::Event;
use soulbox_proto::guest::v1::run_finished::Outcome;
use soulbox_proto::guest::v1::*;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use super::{Guest, LONG};

pub struct Interpreters {
    client: CodeServiceClient<Channel>,
}

/// A call that runs.
pub struct Running {
    responses: Streaming<RunCodeResponse>,
    early: Vec<Event>,
    context: String,
}

/// All that a call told.
#[derive(Debug, Default)]
pub struct Ran {
    pub started: RunStarted,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub results: Vec<CodeResult>,
    pub error: Option<CodeError>,
    pub finished: RunFinished,
    /// The kinds of what came, without repetitions.
    pub order: Vec<&'static str>,
}

// === impl Interpreters ===

impl Interpreters {
    /// On a connection of its own.
    pub async fn of(guest: &Guest) -> Self {
        let client = CodeServiceClient::new(guest.connection().await);
        Self {
            client: client.max_decoding_message_size(usize::MAX),
        }
    }

    pub async fn python(&mut self, code: &str) -> Ran {
        self.run_in(Language::Python, code).await
    }

    /// In the default context.
    pub async fn run_in(&mut self, language: Language, code: &str) -> Ran {
        self.run(run(language, code)).await
    }

    pub async fn run(&mut self, request: RunCodeRequest) -> Ran {
        self.try_run(request).await.unwrap()
    }

    pub async fn try_run(&mut self, request: RunCodeRequest) -> Result<Ran, Status> {
        self.try_start(request).await?.try_finish().await
    }

    pub async fn start(&mut self, request: RunCodeRequest) -> Running {
        self.try_start(request).await.unwrap()
    }

    async fn try_start(&mut self, request: RunCodeRequest) -> Result<Running, Status> {
        Ok(Running {
            responses: self.client.run_code(request).await?.into_inner(),
            early: Vec::new(),
            context: String::new(),
        })
    }

    pub async fn create(&mut self, language: Language) -> Result<CodeContext, Status> {
        let request = CreateContextRequest {
            language: language.into(),
            ..CreateContextRequest::default()
        };
        self.create_with(request).await
    }

    pub async fn create_with(
        &mut self,
        request: CreateContextRequest,
    ) -> Result<CodeContext, Status> {
        let response = self.client.create_context(request).await?;
        Ok(response.into_inner().context.unwrap())
    }

    pub async fn list(&mut self) -> Vec<CodeContext> {
        let response = self.client.list_contexts(ListContextsRequest {}).await;
        response.unwrap().into_inner().contexts
    }

    pub async fn delete(&mut self, id: &str) {
        let id = id.to_owned();
        self.client
            .delete_context(DeleteContextRequest { id })
            .await
            .unwrap();
    }

    pub async fn restart(&mut self, id: &str) -> Result<CodeContext, Status> {
        let id = id.to_owned();
        let response = self
            .client
            .restart_context(RestartContextRequest { id })
            .await?;
        Ok(response.into_inner().context.unwrap())
    }

    pub async fn interrupt(&mut self, id: &str) -> Result<bool, Status> {
        let id = id.to_owned();
        let response = self
            .client
            .interrupt_context(InterruptContextRequest { id })
            .await?;
        Ok(response.into_inner().interrupted)
    }
}

// === impl Running ===

impl Running {
    /// Known once it has begun.
    pub fn context(&self) -> &str {
        &self.context
    }

    pub async fn until_output(&mut self) {
        loop {
            let event = self.event().await.unwrap().unwrap();
            if let Event::Started(started) = &event {
                self.context.clone_from(&started.context_id);
            }
            let is_output = matches!(event, Event::Stdout(_));
            self.early.push(event);
            if is_output {
                return;
            }
        }
    }

    pub async fn finish(self) -> Ran {
        self.try_finish().await.unwrap()
    }

    /// The error that it ends with.
    pub async fn status(self) -> Status {
        self.try_finish().await.unwrap_err()
    }

    async fn event(&mut self) -> Result<Option<Event>, Status> {
        let response = tokio::time::timeout(LONG, self.responses.message());
        let response = response.await.unwrap()?;
        Ok(response.map(|response| response.event.unwrap()))
    }

    /// Reads to the end, which must be `finished` and nothing after it.
    async fn try_finish(mut self) -> Result<Ran, Status> {
        let mut ran = Ran::default();
        let mut early = std::mem::take(&mut self.early).into_iter();
        let mut is_first = true;
        loop {
            let event = match early.next() {
                Some(event) => event,
                None => self.event().await?.unwrap(),
            };
            assert_eq!(is_first, matches!(event, Event::Started(_)), "{event:?}");
            is_first = false;
            let kind = match event {
                Event::Started(started) => {
                    ran.started = started;
                    continue;
                }
                Event::Stdout(bytes) => {
                    ran.stdout.extend_from_slice(&bytes);
                    "stdout"
                }
                Event::Stderr(bytes) => {
                    ran.stderr.extend_from_slice(&bytes);
                    "stderr"
                }
                Event::Result(result) => {
                    ran.results.push(result);
                    ran.order.push("result");
                    continue;
                }
                Event::Error(error) => {
                    assert!(ran.error.is_none());
                    ran.error = Some(error);
                    "error"
                }
                Event::Finished(finished) => {
                    ran.finished = finished;
                    assert_eq!(self.event().await?, None);
                    return Ok(ran);
                }
            };
            if ran.order.last() != Some(&kind) {
                ran.order.push(kind);
            }
        }
    }
}

// === impl Ran ===

impl Ran {
    pub fn outcome(&self) -> Outcome {
        self.finished.outcome()
    }

    /// Checks that nothing failed.
    pub fn ok(self) -> Self {
        assert_eq!(
            (self.outcome(), &self.error),
            (Outcome::Ok, &None),
            "{self:?}"
        );
        self
    }

    pub fn out(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }

    pub fn err(&self) -> &str {
        std::str::from_utf8(&self.stderr).unwrap()
    }

    /// The text of the last expression's value.
    pub fn value(&self) -> &str {
        let main = self.results.iter().find(|result| result.main);
        text(main.unwrap_or_else(|| panic!("no value: {self:?}")))
    }
}

pub fn text(result: &CodeResult) -> &str {
    std::str::from_utf8(&result.data["text/plain"]).unwrap()
}

/// In the default context.
pub fn run(language: Language, code: &str) -> RunCodeRequest {
    RunCodeRequest {
        language: language.into(),
        code: code.to_owned(),
        ..RunCodeRequest::default()
    }
}

pub fn run_in(id: &str, code: &str) -> RunCodeRequest {
    RunCodeRequest {
        context_id: id.to_owned(),
        code: code.to_owned(),
        ..RunCodeRequest::default()
    }
}
