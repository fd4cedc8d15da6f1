//! From an admitted record to a guest that has run a program.

use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::Duration;

use soulbox_proto::vmm::v1::{self as proto, reply, request};
use tokio::time::timeout;
use tonic::Status;

use super::actor::Actor;
use super::create::Origin;
use super::error::StartError;
use super::files::BootFiles;
use super::launch::{Launched, Wanted};
use super::machine::{console_text, failure};
use super::requests::Claimed;
use crate::guest::{Guest, Identity};
use crate::kvm::UsableKvm;
use crate::monitor::RequestError;
use crate::record::{Chains, Transition};
use crate::template::OpenTemplate;
use crate::text::printable;
use crate::time::Stopwatch;

/// No PCI and no legacy devices; a panic ends the guest at once, and whatever
/// ends it goes through ACPI, where the monitor sees it.
pub(super) const KERNEL_CMDLINE: &str = "console=ttyS0 root=/dev/vda rootfstype=ext4 rw init=/sbin/init \
     panic=-1 reboot=acpi quiet loglevel=4 8250.nr_uarts=1 pci=off random.trust_cpu=on";

/// Every monitor has a vsock of its own, so all guests can be the first.
const GUEST_CID: u32 = 3;

/// What is kept of an agent's sentence.
pub(super) const MAX_SENTENCE_CHARS: usize = 500;

/// How long a monitor that serves nothing else may take to tell its console.
const CONSOLE: Duration = Duration::from_millis(500);

impl Actor {
    /// Returns whether it was restored. On an error, or when this is dropped, what
    /// exists of the sandbox is in `self`, for [`Actor::stop`] to take down.
    pub(super) async fn start(
        &mut self,
        origin: Origin,
        claimed: Option<&Claimed>,
        watch: &mut Stopwatch,
    ) -> Result<bool, StartError> {
        // Watchers see both steps; the disk sees them as one.
        let starting = self.record.apply(Transition::Start)?;
        self.publish();
        self.record = starting;
        let id = self.record.id.clone();
        let admitted = claimed.and_then(|claimed| claimed.admitted(&id));
        self.unstored.extend(admitted);
        self.publish();
        match origin {
            Origin::Boot(template) => {
                self.note().await?;
                watch.lap("admission");
                self.boot(&template, watch).await?;
                Ok(false)
            }
            // Its first record is stored while it is restored: until then all there is
            // of it are files, and a monitor, that a daemon removes which finds them
            // without one.
            Origin::Restore(plan) => {
                watch.lap("admission");
                let identity = Identity::New(id.as_str());
                self.restore(&plan, identity, watch).await?;
                Ok(true)
            }
            Origin::Template { plan, template } => {
                watch.lap("admission");
                let identity = Identity::New(id.as_str());
                match self.restore(&plan, identity, watch).await {
                    Ok(()) => return Ok(true),
                    Err(error) if !error.may_boot_instead() => return Err(error),
                    Err(error) => {
                        tracing::warn!(sandbox = %id, snapshot = %plan.snapshot, %error, "not restored; booting it instead");
                    }
                }
                self.pool.discard_template_snapshot(&plan.snapshot).await;
                self.begin_again().await?;
                watch.lap("not_restored");
                self.boot(&template, watch).await?;
                Ok(false)
            }
        }
    }

    /// Takes down what a restore has left, so that it can be booted.
    async fn begin_again(&mut self) -> Result<(), StartError> {
        if let Some(mut machine) = self.machine.take() {
            machine.process.end().await;
        }
        self.detach().await;
        let removed = self.files.remove();
        removed.map_err(|source| StartError::Prepare {
            what: "folder",
            source,
        })?;
        self.record.monitor = None;
        self.record.chains = Chains::default();
        self.record.snapshot = None;
        Ok(())
    }

    /// From a template's kernel to a guest that has run a program.
    pub(super) async fn boot(
        &mut self,
        template: &OpenTemplate,
        watch: &mut Stopwatch,
    ) -> Result<(), StartError> {
        let files = self.files.create(self.record.layer)?;
        watch.lap("prepare");
        if self.attach().await? {
            watch.lap("network");
        }

        let launched = self.launch(Wanted::New, watch)?;
        self.note().await?;
        self.publish();

        let timeout_ms = self.pool.config.timeouts.boot_ms;
        let booting = self.boot_machine(template, files, launched, watch);
        match timeout(Duration::from_millis(timeout_ms), booting).await {
            Ok(booted) => booted?,
            Err(_) => {
                return Err(StartError::BootTimeout {
                    timeout_ms,
                    hardware_virtualization: self.pool.facts.hardware_virtualization,
                    console_tail: self.console_tail().await,
                });
            }
        }
        self.hand_over_tap();
        watch.lap("boot");

        let guest = Guest::new(&self.files.vsock_socket());
        let hostname = self.record.id.as_str().to_owned();
        let configured = guest.configure(Identity::New(&hostname), self.guest_network());
        self.ask("take its name and the time", configured).await?;
        watch.lap("configure");

        self.ask("run /bin/true", guest.prove_exec()).await?;
        watch.lap("first_exec");
        self.guest = Some(guest);
        Ok(())
    }

    /// The error with the monitor's last words, where it has ended.
    pub(super) async fn explain(&mut self, error: StartError) -> StartError {
        match error {
            StartError::Gone => StartError::Ended(self.bury().await),
            other => other,
        }
    }

    /// Hands the monitor its machine and waits for the guest's ready-call.
    async fn boot_machine(
        &mut self,
        template: &OpenTemplate,
        files: BootFiles,
        launched: Launched,
        watch: &mut Stopwatch,
    ) -> Result<(), StartError> {
        let kvm = self.pool.kvm.get().map_err(|error| StartError::Refused {
            code: proto::error::Code::Kvm,
            message: error.to_string(),
        })?;
        let (boot, fds) = self.boot_request(template, &kvm, &files, &launched);
        let Some(machine) = &self.machine else {
            return Err(StartError::Protocol);
        };
        let booted = match machine.control.request(request::Op::Boot(boot), &fds).await {
            Ok(reply::Result::Booted(booted)) => booted,
            Ok(_) => return Err(StartError::Protocol),
            Err(RequestError::Refused(error)) => {
                return Err(StartError::Refused {
                    code: error.code(),
                    message: error.message,
                });
            }
            Err(RequestError::Closed | RequestError::Send(_)) => {
                return Err(StartError::Ended(self.bury().await));
            }
        };
        for stage in booted.stages {
            let name = format!("boot.{}", stage.stage);
            watch.push(&name, Duration::from_nanos(stage.duration_ns));
        }
        let Some(machine) = self.machine.as_mut() else {
            return Err(StartError::Protocol);
        };
        let Some(hello) = machine.ready().await else {
            return Err(StartError::Ended(self.bury().await));
        };
        watch.push("boot.guest", Duration::from_micros(hello.agent_started_us));
        let agent_us = hello.agent_ready_us.saturating_sub(hello.agent_started_us);
        watch.push("boot.agent", Duration::from_micros(agent_us));
        Ok(())
    }

    /// One call to the agent, ended by the machine's end or the boot's limit.
    pub(super) async fn ask(
        &mut self,
        step: &'static str,
        call: impl Future<Output = Result<(), Status>>,
    ) -> Result<(), StartError> {
        let Some(machine) = self.machine.as_mut() else {
            return Err(StartError::Protocol);
        };
        let limit = self.pool.config.timeouts.boot();
        let message = tokio::select! {
            answered = timeout(limit, call) => match answered {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(status)) => printable(status.message(), MAX_SENTENCE_CHARS),
                Err(_) => format!("no answer within {} ms", limit.as_millis()),
            },
            () = machine.ended() => String::new(),
        };
        // A lost connection is more often the guest's end than the agent's.
        if message.is_empty() || timeout(CONSOLE, machine.ended()).await.is_ok() {
            let observed = machine.bury().await;
            self.machine = None;
            return Err(StartError::Ended(failure(
                &observed,
                self.files.last_log_line(),
            )));
        }
        Err(StartError::Agent { step, message })
    }

    fn boot_request<'fd>(
        &'fd self,
        template: &'fd OpenTemplate,
        kvm: &'fd UsableKvm,
        files: &'fd BootFiles,
        launched: &'fd Launched,
    ) -> (proto::Boot, Vec<BorrowedFd<'fd>>) {
        let resources = self.record.resources;
        let mut fds = Vec::new();
        let mut attach = |fd: BorrowedFd<'fd>| {
            fds.push(fd);
            u32::try_from(fds.len() - 1).unwrap_or(u32::MAX)
        };
        let boot = proto::Boot {
            kvm_fd: attach(kvm.device.as_fd()),
            kernel_fd: attach(template.kernel.as_fd()),
            console_fd: None,
            control_listener_fd: Some(attach(files.control_listener.as_fd())),
            pagemap_fd: launched.pagemap.as_ref().map(|fd| attach(fd.as_fd())),
            machine: Some(proto::MachineConfig {
                vcpu_count: resources.vcpus,
                memory_mib: resources.memory_mib,
                cmdline: KERNEL_CMDLINE.to_owned(),
                block_devices: vec![proto::BlockDevice {
                    id: "root".to_owned(),
                    size_bytes: u64::from(resources.disk_mib) << 20,
                    base_fd: attach(template.rootfs.as_fd()),
                    layer_fd: Some(attach(files.layer.as_fd())),
                    rate_limit: None,
                }],
                vsock: Some(proto::VsockDevice {
                    guest_cid: GUEST_CID,
                    listener_fd: attach(files.vsock_listener.as_fd()),
                }),
                net: Some(self.net_device(&mut attach)),
            }),
        };
        (boot, fds)
    }

    async fn console_tail(&self) -> String {
        let Some(machine) = &self.machine else {
            return String::new();
        };
        match timeout(CONSOLE, machine.control.metrics()).await {
            Ok(Ok(metrics)) => console_text(&metrics.console_tail),
            _ => String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_one_that_a_monitor_takes() {
        assert!(KERNEL_CMDLINE.is_ascii() && KERNEL_CMDLINE.len() < 2048);
        assert!(!KERNEL_CMDLINE.contains("  ") && !KERNEL_CMDLINE.contains('\n'));
    }
}
