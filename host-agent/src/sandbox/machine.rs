//! The live parts of one sandbox: its monitor's process and control socket.

use std::sync::Arc;
use std::time::Duration;

use soulbox_proto::guest::READY_PORT;
use soulbox_proto::guest::v1::Hello;
use soulbox_proto::vmm::CONSOLE_TAIL_BYTES;
use soulbox_proto::vmm::v1::exited::Reason;
use soulbox_proto::vmm::v1::{self as proto, request};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use crate::guest::read_hello;
use crate::monitor::{Connection, Control, ControlSocket, MonitorProcess, Observed};
use crate::record::Failure;

/// How long a monitor that ended may take to be heard out.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// How long a monitor may take to obey Shutdown, or to exit after its guest
/// has panicked, before it is killed.
const OBEY: Duration = Duration::from_millis(500);
/// How long the bytes of a ready-call may take.
const HELLO: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(super) struct Machine {
    pub(super) process: MonitorProcess,
    pub(super) control: Arc<Control>,
    connections: mpsc::Receiver<Connection>,
    observed: watch::Receiver<Observed>,
}

// === impl Machine ===

impl Machine {
    pub(super) fn new(process: MonitorProcess, socket: ControlSocket) -> Self {
        let (control, connections, observed) = Control::start(socket);
        Self {
            process,
            control: Arc::new(control),
            connections,
            observed,
        }
    }

    /// Whether it has ended, or is about to.
    pub(super) fn is_over(&self) -> bool {
        is_end(&self.observed.borrow()) || self.observed.has_changed().is_err()
    }

    /// Waits for the monitor's word on its end, or its silence.
    pub(super) fn over(&self) -> impl Future<Output = ()> + use<> {
        let mut observed = self.observed.clone();
        async move {
            // A lost sender means that nothing more will be told.
            let _ = observed.wait_for(is_end).await;
        }
    }

    /// Waits for the guest's ready-call; none when the machine ends instead.
    pub(super) async fn ready(&mut self) -> Option<Hello> {
        loop {
            let connection = tokio::select! {
                connection = self.connections.recv() => connection?,
                () = end_of(&mut self.process, &mut self.observed) => return None,
            };
            if connection.host_port != READY_PORT {
                tracing::debug!(
                    port = connection.host_port,
                    "a guest called a port that nobody serves"
                );
                continue;
            }
            match timeout(HELLO, read_hello(connection.stream)).await {
                Ok(Ok(hello)) => return Some(hello),
                Ok(Err(error)) => tracing::warn!(%error, "a ready-call was refused"),
                Err(_) => tracing::warn!("a ready-call was not finished in time"),
            }
        }
    }

    /// Waits for the first sign of the machine's end. Meanwhile what the guest
    /// sends to ports of the host is closed.
    pub(super) async fn ended(&mut self) {
        loop {
            tokio::select! {
                () = end_of(&mut self.process, &mut self.observed) => return,
                connection = self.connections.recv() => match connection {
                    Some(connection) => tracing::debug!(port = connection.host_port, "a guest called a port that nobody serves"),
                    None => {
                        end_of(&mut self.process, &mut self.observed).await;
                        return;
                    }
                },
            }
        }
    }

    /// After [`Self::ended`]: hears the monitor out and sees to it that its
    /// process is gone.
    pub(super) async fn bury(&mut self) -> Observed {
        let panicked_only = {
            let seen = self.observed.borrow();
            seen.panic.is_some() && seen.exited.is_none() && !seen.closed
        };
        let patience = if panicked_only { OBEY } else { LAST_WORDS };
        let closed = self.observed.wait_for(|seen| seen.closed);
        // On time-out or a lost sender there is just no more to hear.
        let _ = timeout(patience, closed).await.map(|closed| closed.is_ok());
        if timeout(LAST_WORDS, self.process.ended()).await.is_err() {
            self.process.end().await;
        }
        self.observed.borrow().clone()
    }

    /// Stops it without the guest's help, and sees to it that it is gone.
    pub(super) async fn stop(&mut self) {
        let shutdown = request::Op::Shutdown(proto::Shutdown {});
        match timeout(OBEY, self.control.request(shutdown, &[])).await {
            Ok(Ok(_)) => {
                if timeout(OBEY, self.process.ended()).await.is_ok() {
                    return;
                }
            }
            Ok(Err(error)) => tracing::debug!(%error, "a monitor did not take Shutdown"),
            Err(_) => tracing::debug!("a monitor did not answer Shutdown"),
        }
        self.process.end().await;
    }
}

fn is_end(seen: &Observed) -> bool {
    seen.closed || seen.exited.is_some() || seen.panic.is_some()
}

async fn end_of(process: &mut MonitorProcess, observed: &mut watch::Receiver<Observed>) {
    let told = observed.wait_for(is_end);
    tokio::select! {
        // A lost sender means that nothing more will be told, as `closed` does.
        _ = told => {}
        () = process.ended() => {}
    }
}

/// Why the machine ended, in words.
pub(super) fn failure(observed: &Observed, last_log_line: Option<String>) -> Failure {
    let tail = observed
        .exited
        .as_ref()
        .map(|exited| exited.console_tail.as_slice())
        .filter(|tail| !tail.is_empty())
        .or(observed.panic.as_deref())
        .unwrap_or_default();
    let (reason, message) = cause(observed, last_log_line);
    Failure {
        reason: reason.to_owned(),
        message,
        console_tail: console_text(tail),
    }
}

fn cause(observed: &Observed, last_log_line: Option<String>) -> (&'static str, String) {
    if observed.panic.is_some() {
        let message = "the guest's kernel panicked; the console's last lines say why";
        return ("GUEST_PANIC", message.to_owned());
    }
    if let Some(exited) = &observed.exited {
        let said = &exited.message;
        return match exited.reason() {
            Reason::EmulationFailed => (
                "EMULATION_FAILED",
                format!(
                    "this host's KVM cannot run guest kernels ({said}); use a host whose CPU shows vmx or svm, or start soulboxd through the launcher images/bench/run, which nests it"
                ),
            ),
            Reason::PoweredOff => ("GUEST_POWERED_OFF", "the guest powered itself off".to_owned()),
            Reason::Reset => (
                "GUEST_RESET",
                "the guest asked for a reset, which ends a sandbox; the console's last lines may say why".to_owned(),
            ),
            Reason::Crashed => ("GUEST_CRASHED", format!("the guest crashed: {said}")),
            Reason::Forced => ("MONITOR_STOPPED", format!("the monitor was told to stop: {said}")),
            Reason::InternalError | Reason::Unspecified => {
                ("MONITOR_FAILED", format!("the monitor failed: {said}"))
            }
        };
    }
    if let Some(broken) = &observed.broken {
        return ("MONITOR_BROKEN", broken.clone());
    }
    let message = match last_log_line {
        Some(line) => format!("the monitor ended without a word; its log ends with: {line}"),
        None => "the monitor ended without a word: something killed it, perhaps the host's kernel for want of memory".to_owned(),
    };
    ("MONITOR_DIED", message)
}

/// What a monitor may tell of a console, as text.
pub(super) fn console_text(bytes: &[u8]) -> String {
    crate::text::console(bytes, CONSOLE_TAIL_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exited(reason: Reason) -> Observed {
        Observed {
            exited: Some(proto::Exited {
                reason: reason.into(),
                message: "said".to_owned(),
                console_tail: b"tail".to_vec(),
            }),
            ..Observed::default()
        }
    }

    #[test]
    fn each_end_has_its_reason() {
        let reason = |observed: &Observed| failure(observed, None).reason;
        assert_eq!(reason(&exited(Reason::PoweredOff)), "GUEST_POWERED_OFF");
        assert_eq!(reason(&exited(Reason::Crashed)), "GUEST_CRASHED");
        assert_eq!(reason(&Observed::default()), "MONITOR_DIED");
        let mut panicked = exited(Reason::Reset);
        panicked.panic = Some(b"Kernel panic".to_vec());
        assert_eq!(reason(&panicked), "GUEST_PANIC");
        let emulation = failure(&exited(Reason::EmulationFailed), None);
        assert!(
            emulation.message.contains("images/bench/run"),
            "{}",
            emulation.message
        );
        assert_eq!(emulation.console_tail, "tail");
    }
}
