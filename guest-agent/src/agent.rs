//! The agent from its first instruction to its last.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use rustix::fs::Mode;
use rustix::process::{getpid, set_child_subreaper, umask};
use soulbox_proto::guest::RPC_PORT;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener};

use crate::exec::{Cgroups, Processes};
use crate::options::Options;
use crate::ports::Ports;
use crate::reaper::Reaper;
use crate::server::Services;
use crate::system::{System, boot_time_us, power_off, stop_programs};
use crate::{init, ready, sys};

/// How long calls that run may take to end once the agent stops serving.
const DRAIN: Duration = Duration::from_secs(5);
/// How long an idle thread that starts programs is kept.
const THREAD_KEEP_ALIVE: Duration = Duration::from_secs(10);

const CGROUP: &str = "/sys/fs/cgroup/soulbox";

/// Runs the agent. PID 1 does not return but by an error.
pub fn run(options: Options) -> anyhow::Result<()> {
    let started_us = boot_time_us();
    sys::process::use_one_malloc_arena();
    sys::process::ignore_no_signals();
    sys::process::set_inherited_fds_cloexec().context("descriptors")?;
    open_standard_descriptors();
    exit_on_panic();
    umask(Mode::from_raw_mode(0o022));
    if options.is_init {
        init::set_up();
    } else {
        set_child_subreaper(Some(getpid())).context("becoming the reaper of orphans")?;
    }

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_keep_alive(THREAD_KEEP_ALIVE)
        // A program's end is for the thread that serves: another would wake up to
        // wake it.
        .on_thread_start(sys::process::block_signals)
        .build()
        .context("the runtime")?;
    runtime.block_on(serve(&options, started_us))?;
    if options.is_init {
        power_off().context("turning off")?;
    }
    Ok(())
}

/// Serves until Shutdown, or until SIGTERM where the agent is not PID 1, and then
/// until programs and calls have ended or have had their time.
async fn serve(options: &Options, started_us: u64) -> anyhow::Result<()> {
    let reaper = Reaper::default();
    let sigchld = signal(SignalKind::child()).context("SIGCHLD")?;
    tokio::spawn(reaper.clone().run(sigchld));

    let (stop, stopped) = watch::channel(false);
    let processes = Processes::new(reaper, cgroups(options), stopped.clone());
    let system = System::new(processes.clone(), stop.clone(), options.is_init);
    let ports = Ports::new(stopped.clone());
    let services = Services::new(processes.clone(), system, ports);

    let stopping = async {
        wait_for_stop(&stop, options.is_init).await?;
        stop.send_replace(true);
        if options.is_init {
            stop_programs(processes.is_suspended()).await;
        }
        Ok(())
    };
    let serving = async {
        let stopped = || wait_until(stopped.clone());
        let served = async {
            match &options.serve_unix {
                Some(path) => {
                    let listener = UnixListener::bind(path)
                        .with_context(|| format!("listening on {}", path.display()))?;
                    services
                        .serve(UnixListenerStream::new(listener), stopped())
                        .await
                }
                None => {
                    let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, RPC_PORT))
                        .context("listening on vsock: the guest needs a vsock device")?;
                    tokio::spawn(ready::call(started_us));
                    services.serve(listener.incoming(), stopped()).await
                }
            }
            .context("serving")
        };
        tokio::select! {
            served = served => served,
            () = async { stopped().await; tokio::time::sleep(DRAIN).await } => Ok(()),
        }
    };
    tokio::try_join!(stopping, serving)?;
    Ok(())
}

async fn wait_for_stop(stop: &watch::Sender<bool>, is_init: bool) -> anyhow::Result<()> {
    let called = wait_until(stop.subscribe());
    if is_init {
        called.await;
        return Ok(());
    }
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    tokio::select! {
        () = called => {}
        _ = terminate.recv() => {}
    }
    Ok(())
}

async fn wait_until(mut told: watch::Receiver<bool>) {
    // The sender lives as long as `serve`.
    let _ = told.wait_for(|stop| *stop).await;
}

fn cgroups(options: &Options) -> Option<Cgroups> {
    let folder = match (&options.cgroup, options.is_init) {
        (Some(folder), _) => folder.clone(),
        (None, true) => PathBuf::from(CGROUP),
        (None, false) => return None,
    };
    let made = Cgroups::below(folder);
    made.inspect_err(|error| eprintln!("soulbox-guest: kills reach process groups only: {error}"))
        .ok()
}

/// Makes sure that 0, 1 and 2 are taken: a pipe to a program must not get one of
/// those numbers. The kernel opens the console on them, where there is one.
fn open_standard_descriptors() {
    while let Ok(file) = File::options().read(true).write(true).open("/dev/null") {
        if file.as_raw_fd() > 2 {
            return;
        }
        // Kept open for ever.
        let _ = std::os::fd::IntoRawFd::into_raw_fd(file);
    }
}

fn exit_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::exit(101);
    }));
}
