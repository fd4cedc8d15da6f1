//! A program that Exec started, for as long as it is known: what its task, its
//! callers and the table share.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::SystemTime;

use soulbox_proto::guest::v1::exec_response::Event;
use soulbox_proto::guest::v1::{Dropped, Exited, ProcessEntry, TerminalSize};
use tokio::sync::{Mutex as TurnMutex, OwnedMutexGuard};
use tonic::Status;

use super::log::{Log, Stream};
use super::process::{About, Control};
use super::stdio::{Input, Terminal};
use crate::status::internal;

pub(super) struct Job {
    pub(super) id: u64,
    pub(super) pid: i32,
    pub(super) has_stdin: bool,
    pub(super) kill_on_disconnect: bool,
    about: About,
    tag: String,
    start_time: SystemTime,
    /// Callers write in turn, a message at a time.
    stdin: Arc<TurnMutex<Option<Input>>>,
    state: Mutex<State>,
}

struct State {
    log: Log,
    callers: Vec<Caller>,
    next_caller: u64,
    /// Of the program's task, while it waits for callers.
    reader: Option<Waker>,
    /// None when the program has ended with all that it started.
    control: Option<Arc<Control>>,
    terminal: Option<Arc<Terminal>>,
    exited: Option<Exited>,
    /// Nothing more is told after this.
    is_over: bool,
}

/// Somebody who reads what the program says.
struct Caller {
    key: u64,
    /// Of the next byte to tell.
    offset: u64,
    /// The program waits for this one.
    is_waited_for: bool,
    refused: Option<Status>,
    waker: Option<Waker>,
}

/// What a program is started with that outlives its start.
pub(super) struct Options {
    pub(super) has_stdin: bool,
    pub(super) kill_on_disconnect: bool,
    pub(super) tag: String,
    pub(super) keep_output_bytes: u32,
}

/// The right to write to the program's stdin.
pub(super) type Turn = OwnedMutexGuard<Option<Input>>;

// === impl Job ===

impl Job {
    pub(super) fn new(
        id: u64,
        about: About,
        control: Arc<Control>,
        stdin: Option<Input>,
        options: Options,
    ) -> Self {
        let terminal = stdin.as_ref().and_then(Input::terminal);
        Self {
            id,
            pid: control.pid,
            has_stdin: options.has_stdin,
            kill_on_disconnect: options.kill_on_disconnect,
            about,
            tag: options.tag,
            start_time: SystemTime::now(),
            stdin: Arc::new(TurnMutex::new(stdin)),
            state: Mutex::new(State {
                log: Log::new(options.keep_output_bytes),
                callers: Vec::new(),
                next_caller: 0,
                reader: None,
                control: Some(control),
                terminal,
                exited: None,
                is_over: false,
            }),
        }
    }

    // --- What its task does.

    /// Waits until the program may say more: whoever it waits for has read enough.
    pub(super) async fn may_speak(&self) {
        poll_fn(|context| {
            let mut state = self.lock();
            if state.log.is_full(state.unread()) {
                state.reader = Some(context.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready(())
        })
        .await;
    }

    pub(super) fn say(&self, stream: Stream, bytes: &[u8]) {
        let mut state = self.lock();
        state.log.push(stream, bytes);
        state.trim();
        state.wake_callers();
    }

    /// The program has ended; its output need not have.
    pub(super) fn ended(&self, exited: Exited) {
        let mut state = self.lock();
        state.exited = Some(exited);
        state.let_go_of_the_ended();
    }

    /// Nothing more comes: callers hear how it ended.
    pub(super) fn over(&self) {
        let mut state = self.lock();
        state.is_over = true;
        state.terminal = None;
        state.let_go_of_the_ended();
        state.wake_callers();
    }

    /// Lets go of the program's stdin, once nobody writes to it.
    pub(super) async fn close_stdin(&self) {
        self.stdin.lock().await.take();
    }

    // --- What the table does.

    pub(super) fn kept_bytes(&self) -> u64 {
        self.lock().log.kept_bytes()
    }

    pub(super) fn output_bytes(&self) -> u64 {
        self.lock().log.end()
    }

    /// Gives back what is kept of the output, but for what somebody still reads for
    /// whom the program waited.
    pub(super) fn forget_output(&self) {
        let mut state = self.lock();
        state.log.limit(0);
        state.trim();
    }

    pub(super) fn entry(&self) -> ProcessEntry {
        let state = self.lock();
        ProcessEntry {
            id: self.id,
            pid: self.pid.cast_unsigned(),
            argv: self.about.argv.clone(),
            cwd: self.about.cwd.clone(),
            user: self.about.user.clone(),
            tag: self.tag.clone(),
            terminal: self.about.has_terminal,
            start_time: Some(self.start_time.into()),
            exited: state.exited,
            callers: u32::try_from(state.callers.len()).unwrap_or(u32::MAX),
            output_bytes: state.log.end(),
        }
    }

    // --- What callers do.

    /// Adds a caller. It reads what is kept, or only what is `new`.
    pub(super) fn join(&self, is_waited_for: bool, only_new: bool) -> u64 {
        let mut state = self.lock();
        let key = state.next_caller;
        state.next_caller += 1;
        let offset = if only_new { state.log.end() } else { 0 };
        state.callers.push(Caller {
            key,
            offset,
            is_waited_for,
            refused: None,
            waker: None,
        });
        key
    }

    /// Removes a caller. The program goes on, unless it was to end with this one.
    pub(super) fn leave(&self, key: u64) {
        let mut state = self.lock();
        let Some(index) = state.callers.iter().position(|caller| caller.key == key) else {
            return;
        };
        let caller = state.callers.swap_remove(index);
        state.trim();
        state.wake_reader();
        if let Some(control) = state.control_of_running()
            && caller.is_waited_for
            && self.kill_on_disconnect
        {
            control.kill();
        }
    }

    /// What a caller is to hear next.
    pub(super) fn poll_event(
        &self,
        key: u64,
        context: &mut Context<'_>,
    ) -> Poll<Result<Event, Status>> {
        let mut state = self.lock();
        let State {
            log,
            callers,
            exited,
            is_over,
            ..
        } = &mut *state;
        let Some(caller) = callers.iter_mut().find(|caller| caller.key == key) else {
            return Poll::Ready(Err(internal("the caller has left")));
        };
        if let Some(status) = caller.refused.take() {
            return Poll::Ready(Err(status));
        }
        let missed = log.start().saturating_sub(caller.offset);
        if missed > 0 {
            caller.offset = log.start();
            return Poll::Ready(Ok(Event::Dropped(Dropped { bytes: missed })));
        }
        if let Some((stream, bytes)) = log.read(caller.offset) {
            caller.offset += bytes.len() as u64;
            if caller.is_waited_for {
                state.trim();
                state.wake_reader();
            }
            return Poll::Ready(Ok(match stream {
                Stream::Stdout => Event::Stdout(bytes),
                Stream::Stderr => Event::Stderr(bytes),
            }));
        }
        if let Some(exited) = exited.filter(|_| *is_over) {
            return Poll::Ready(Ok(Event::Exited(exited)));
        }
        caller.waker = Some(context.waker().clone());
        Poll::Pending
    }

    /// Ends a caller's call: it broke the protocol.
    pub(super) fn refuse(&self, key: u64, status: Status) {
        let mut state = self.lock();
        if let Some(caller) = state.callers.iter_mut().find(|caller| caller.key == key) {
            caller.refused = Some(status);
            if let Some(waker) = caller.waker.take() {
                waker.wake();
            }
        }
    }

    /// Waits until nobody else writes to the program's stdin.
    pub(super) async fn turn(&self) -> Turn {
        Arc::clone(&self.stdin).lock_owned().await
    }

    pub(super) fn has_terminal(&self) -> bool {
        self.about.has_terminal
    }

    /// Signals the process group. False: the program had ended.
    pub(super) fn signal(&self, signal: i32) -> bool {
        let state = self.lock();
        let control = state.control_of_running();
        control.map(|control| control.signal(signal)).is_some()
    }

    /// Signals all that the program started, also where it has ended and left some of
    /// it. False: nothing was left.
    pub(super) fn signal_tree(&self, signal: i32) -> bool {
        self.with_tree(|control| control.signal_tree(signal))
    }

    /// Kills all that the program started, as above.
    pub(super) fn kill(&self) -> bool {
        self.with_tree(Control::kill)
    }

    pub(super) fn resize(&self, size: TerminalSize) {
        if let Some(terminal) = &self.lock().terminal {
            terminal.resize(size);
        }
    }

    /// Takes the program's terminal away, as when a line is cut.
    pub(super) fn hang_up(&self) {
        let state = self.lock();
        let hung_up = state.terminal.as_ref().map(|terminal| terminal.hang_up());
        if let (Some(Err(_)), Some(control)) = (hung_up, state.control_of_running()) {
            control.signal(libc::SIGHUP);
        }
    }

    fn with_tree(&self, tell: impl FnOnce(&Control)) -> bool {
        let mut state = self.lock();
        state.let_go_of_the_ended();
        state.control.as_deref().map(tell).is_some()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl State ===

impl State {
    fn control_of_running(&self) -> Option<&Control> {
        let control = self.control.as_deref();
        control.filter(|_| self.exited.is_none())
    }

    /// Of the first byte that somebody has still to read for whom the program waits.
    fn unread(&self) -> u64 {
        let waited_for = self.callers.iter().filter(|caller| caller.is_waited_for);
        let offsets = waited_for.map(|caller| caller.offset);
        offsets.min().unwrap_or(self.log.end())
    }

    /// Drops the hold on a program that has ended and left nothing running: its cgroup
    /// is for the next.
    fn let_go_of_the_ended(&mut self) {
        if self.exited.is_some() {
            self.control
                .take_if(|control| !control.has_left_processes());
        }
    }

    fn trim(&mut self) {
        let unread = self.unread();
        self.log.trim(unread);
    }

    fn wake_callers(&mut self) {
        let wakers = self.callers.iter_mut().filter_map(|c| c.waker.take());
        wakers.for_each(Waker::wake);
    }

    fn wake_reader(&mut self) {
        if let Some(waker) = self.reader.take() {
            waker.wake();
        }
    }
}
