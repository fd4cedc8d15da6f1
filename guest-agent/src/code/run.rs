//! One run of code, from its turn to `finished`.

use std::collections::VecDeque;
use std::pin::pin;
use std::time::{Duration, Instant};

use soulbox_proto::guest::v1::run_code_response::Event;
use soulbox_proto::guest::v1::run_finished::{Ended, Outcome};
use soulbox_proto::guest::v1::{CodeError, RunCodeResponse, RunFinished};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, watch};
use tonic::Status;

use super::channel::{BrokenChannel, Frame, SLACK_BYTES};
use super::context::Order;
use super::interpreter::{Heard, Interpreter, Listen};
use super::request::RunSpec;
use crate::sys::wait::ExitStatus;

/// What the caller reads. When the caller goes away it closes.
pub(super) type Responses = mpsc::Sender<Result<RunCodeResponse, Status>>;

/// How long code has to give way after it was interrupted for its time-out, and its
/// interpreter to end after it has closed its channel or was killed.
const GRACE: Duration = Duration::from_secs(2);

/// How often and how soon an interpreter that may have missed an interrupt is
/// interrupted again.
const REMINDERS: u32 = 10;
const REMIND_AFTER: Duration = Duration::from_millis(200);

/// Of what code says once it was interrupted, the most that waits for a caller who
/// does not read: pieces of output with 64 KiB each, and all messages.
const MAX_HURRIED_OUTPUT: usize = 16;
const MAX_HURRIED: usize = 1024;

/// A run that is going on.
pub(super) struct Run<'a> {
    interpreter: &'a mut Interpreter,
    spec: &'a RunSpec,
    responses: &'a Responses,
    number: u64,
    /// For the caller, who has not taken it yet. While there is something, no more is
    /// read from the interpreter: that waits for the caller then.
    waiting: VecDeque<Event>,
    caller_is_gone: bool,
    output_left: u64,
    result_left: usize,
    dropped_bytes: u64,
    alarm: Alarm,
    timed_out: bool,
    /// How often it is still to be interrupted again.
    reminders: u32,
    /// It was interrupted: what it says from now on waits for no caller, or one who
    /// does not read would keep it from ending.
    hurries: bool,
    /// No more is read from the channel.
    is_broken: bool,
}

/// What happens next when nothing else does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Alarm {
    None,
    TimeOut,
    Kill,
    /// Even that did not help.
    GiveUp,
}

/// How it ended.
#[derive(Clone, Copy, Debug)]
enum End {
    /// The code did.
    Finished(Outcome),
    /// The interpreter did; None where it had to be given up.
    Gone(Option<ExitStatus>),
}

// === impl Run ===

impl<'a> Run<'a> {
    pub(super) fn new(
        interpreter: &'a mut Interpreter,
        spec: &'a RunSpec,
        responses: &'a Responses,
        number: u64,
    ) -> Self {
        let limit = usize::try_from(spec.max_result_bytes).unwrap_or(usize::MAX);
        Self {
            interpreter,
            spec,
            responses,
            number,
            waiting: VecDeque::new(),
            caller_is_gone: false,
            output_left: spec.max_output_bytes,
            result_left: limit.saturating_add(SLACK_BYTES),
            dropped_bytes: 0,
            alarm: spec.timeout.map_or(Alarm::None, |_| Alarm::TimeOut),
            timed_out: false,
            reminders: 0,
            hurries: false,
            is_broken: false,
        }
    }

    /// Tells the caller something before the code runs.
    pub(super) fn tell(&mut self, event: Event) {
        match event {
            Event::Stdout(_) | Event::Stderr(_) => self.output(event),
            event => self.waiting.push_back(event),
        }
    }

    pub(super) fn drop_bytes(&mut self, bytes: u64) {
        self.dropped_bytes += bytes;
    }

    /// Runs to the end of the code, or of its interpreter: then it returns false.
    /// Orders that are not for the run itself end it, and are put into `orders_after`.
    pub(super) async fn run(
        mut self,
        orders: &mut mpsc::UnboundedReceiver<Order>,
        orders_after: &mut Vec<Order>,
        stop: &mut watch::Receiver<bool>,
    ) -> bool {
        let responses = self.responses;
        let started = Instant::now();
        let mut sleep = pin!(tokio::time::sleep(self.spec.timeout.unwrap_or_default()));
        let mut remind = pin!(tokio::time::sleep(REMIND_AFTER));
        let mut stopping = false;
        let end = loop {
            let (alarm, listen, reminders) = (self.alarm, self.listen(), self.reminders);
            tokio::select! {
                permit = responses.reserve(), if !self.waiting.is_empty() => {
                    match (permit, self.waiting.pop_front()) {
                        (Ok(permit), Some(event)) => permit.send(Ok(response(event))),
                        _ => self.caller_has_gone(),
                    }
                }
                () = responses.closed(), if !self.caller_is_gone => self.caller_has_gone(),
                heard = self.interpreter.heard(listen) => {
                    if let Some(end) = self.take(heard) {
                        break end;
                    }
                }
                () = &mut sleep, if alarm != Alarm::None => match alarm {
                    Alarm::None => {}
                    Alarm::TimeOut => {
                        self.timed_out = true;
                        self.interrupt();
                        self.alarm = Alarm::Kill;
                    }
                    Alarm::Kill => self.kill(),
                    Alarm::GiveUp => break End::Gone(None),
                },
                () = &mut remind, if reminders > 0 => {
                    self.reminders -= 1;
                    self.interpreter.interrupt();
                }
                Some(order) = orders.recv() => match order {
                    Order::Interrupt(reply) => {
                        self.interrupt();
                        let _ = reply.send(true);
                    }
                    order => {
                        orders_after.push(order);
                        self.kill();
                    }
                },
                _ = stop.wait_for(|stop| *stop), if !stopping => {
                    stopping = true;
                    self.kill();
                }
            }
            if self.alarm != alarm {
                sleep.as_mut().reset(tokio::time::Instant::now() + GRACE);
            }
            if self.reminders != reminders {
                let next = tokio::time::Instant::now() + REMIND_AFTER;
                remind.as_mut().reset(next);
            }
        };
        let finished = self.finished(end, started.elapsed());
        let last = if stopping {
            Err(super::stopping())
        } else {
            Ok(Event::Finished(finished))
        };
        hand_over(responses, self.waiting, last);
        matches!(end, End::Finished(_))
    }

    fn listen(&self) -> Listen {
        let has_room = self.waiting.is_empty() || self.hurries && self.waiting.len() < MAX_HURRIED;
        Listen {
            // What would be dropped anyway waits for nobody.
            output: has_room || self.output_left == 0 || self.hurries,
            frames: has_room && !self.is_broken,
            limit: self.result_left,
        }
    }

    fn take(&mut self, heard: Heard) -> Option<End> {
        match heard {
            Heard::Output(event) => self.output(event),
            Heard::Frame(frame, cost) => return self.frame(frame, cost).map(End::Finished),
            Heard::Broken(error) => self.broken(&error),
            // One that ends closes it just before.
            Heard::Closed if self.alarm != Alarm::GiveUp => self.alarm = Alarm::Kill,
            Heard::Closed => {}
            Heard::Exited(status) => {
                // What it said before that.
                while !self.is_broken
                    && let Some((frame, cost)) = self.interpreter.try_frame(self.result_left)
                {
                    self.frame(frame, cost);
                }
                self.drain();
                return Some(End::Gone(Some(status)));
            }
        }
        None
    }

    fn frame(&mut self, frame: Frame, cost: usize) -> Option<Outcome> {
        self.result_left = self.result_left.saturating_sub(cost);
        // What was printed before it comes before it.
        self.drain();
        match frame {
            Frame::Result(result) => self.show(Event::Result(result)),
            Frame::Error(error) => self.show(Event::Error(error)),
            Frame::Finished(outcome) => return Some(outcome),
            Frame::Ready => self.broken(&BrokenChannel::Malformed),
        }
        None
    }

    fn broken(&mut self, error: &BrokenChannel) {
        self.is_broken = true;
        self.kill();
        let value = format!(
            "the code wrote to descriptor 3, by which its interpreter talks to the sandbox \
             ({error}); the interpreter was ended"
        );
        self.show(Event::Error(CodeError {
            name: "ChannelBroken".to_owned(),
            value,
            traceback: Vec::new(),
        }));
    }

    fn show(&mut self, event: Event) {
        if !self.caller_is_gone {
            self.waiting.push_back(event);
        }
    }

    fn output(&mut self, event: Event) {
        let (mut bytes, event): (_, fn(_) -> _) = match event {
            Event::Stdout(bytes) => (bytes, Event::Stdout),
            Event::Stderr(bytes) => (bytes, Event::Stderr),
            _ => return,
        };
        let length = bytes.len() as u64;
        let is_full = self.hurries && self.waiting.len() >= MAX_HURRIED_OUTPUT;
        let fitting = if self.caller_is_gone || is_full {
            0
        } else {
            length.min(self.output_left)
        };
        self.output_left -= fitting;
        self.dropped_bytes += length - fitting;
        if fitting > 0 {
            bytes.truncate(usize::try_from(fitting).unwrap_or(usize::MAX));
            self.waiting.push_back(event(bytes));
        }
    }

    fn drain(&mut self) {
        let mut said = Vec::new();
        self.interpreter.drain(&mut |event| said.push(event));
        for event in said {
            self.output(event);
        }
    }

    fn caller_has_gone(&mut self) {
        self.caller_is_gone = true;
        self.waiting.clear();
        if self.spec.interrupt_on_disconnect {
            self.interrupt();
        }
    }

    fn interrupt(&mut self) {
        self.interpreter.interrupt();
        self.hurries = true;
        if self.interpreter.misses_interrupts() {
            self.reminders = REMINDERS;
        }
    }

    fn kill(&mut self) {
        self.interpreter.kill();
        self.alarm = Alarm::GiveUp;
    }

    fn finished(&self, end: End, wall: Duration) -> RunFinished {
        let outcome = match end {
            End::Finished(_) if self.timed_out => Outcome::TimedOut,
            End::Finished(outcome) => outcome,
            End::Gone(_) => Outcome::InterpreterEnded,
        };
        let ended = match end {
            End::Finished(_) => None,
            End::Gone(Some(ExitStatus::Code(code))) => Some(Ended::ExitCode(code)),
            End::Gone(Some(ExitStatus::Signal(signal))) => Some(Ended::Signal(signal)),
            End::Gone(None) => Some(Ended::Signal(libc::SIGKILL.cast_unsigned())),
        };
        RunFinished {
            outcome: outcome.into(),
            execution_count: self.number,
            wall_us: u64::try_from(wall.as_micros()).unwrap_or(u64::MAX),
            dropped_output_bytes: self.dropped_bytes,
            timed_out: self.timed_out,
            ended,
        }
    }
}

/// Sends the last of a run without waiting for a caller who does not read: that one
/// must not hold up the next.
fn hand_over(responses: &Responses, rest: VecDeque<Event>, last: Result<Event, Status>) {
    let rest = rest.into_iter().map(Ok);
    let mut rest = rest.chain([last]).map(|event| event.map(response));
    while let Some(next) = rest.next() {
        match responses.try_send(next) {
            Ok(()) => {}
            Err(TrySendError::Closed(_)) => return,
            Err(TrySendError::Full(next)) => {
                let responses = responses.clone();
                let rest: Vec<_> = rest.collect();
                tokio::spawn(async move {
                    for response in std::iter::once(next).chain(rest) {
                        if responses.send(response).await.is_err() {
                            return;
                        }
                    }
                });
                return;
            }
        }
    }
}

fn response(event: Event) -> RunCodeResponse {
    RunCodeResponse { event: Some(event) }
}
