//! `soulboxd`: parse, bind, run, drain.

mod args;
mod listen;
mod lock;
mod serve;
mod signals;

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser as _;
use sd_notify::NotifyState;

use self::args::Args;
use self::listen::Listeners;
use self::lock::StateLock;
use self::serve::Services;
use self::signals::Signals;
use crate::config::{Config, DEFAULT_TOML, OnShutdown};
use crate::descriptors;
use crate::host::HostFacts;
use crate::sandbox::Pool;

/// All of the daemon but its exit code.
pub fn main() -> ExitCode {
    let args = Args::parse();
    if args.print_default_config {
        print!("{DEFAULT_TOML}");
        return ExitCode::SUCCESS;
    }
    let config = match Config::load(args.config.as_deref()) {
        Ok(config) => config,
        Err(error) => return fail(&error.into()),
    };
    if args.check_config {
        println!("The configuration is valid.");
        return ExitCode::SUCCESS;
    }
    log_to_stderr();
    if let Err(error) = descriptors::keep_descriptors_from_children() {
        return fail(&anyhow::Error::new(error).context("inherited descriptors cannot be marked"));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let outcome = runtime
        .context("the runtime cannot be started; see the limit on threads")
        .and_then(|runtime| runtime.block_on(run(config)));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

async fn run(config: Config) -> anyhow::Result<()> {
    let mut signals = Signals::install().context("signal handlers cannot be installed")?;
    let facts = HostFacts::read()?;
    let monitor = config
        .paths
        .monitor_binary()
        .context("the folder of soulboxd cannot be found; set paths.monitor")?;
    let lock = StateLock::take(&config.paths.state_dir)?;
    let capacity = facts
        .capacity(&config.capacity, &config.paths.state_dir)
        .context("the free space of state_dir cannot be found; set capacity.disk_mib")?;
    let listeners = Listeners::bind(&config.listen, &config.proxy)?;

    let drain_limit = config.timeouts.drain();
    let on_shutdown = config.shutdown.sandboxes;
    let (pool, summary) = tokio::select! {
        opened = Pool::open(config, facts, monitor, capacity) => opened?,
        // What is half done is found again by the next start.
        signal = signals.next() => {
            tracing::info!(signal, "stopped before it was ready");
            return Ok(());
        }
    };
    tracing::info!(
        adopted = summary.adopted,
        paused = summary.paused,
        failed = summary.failed,
        undone = summary.undone,
        deleted = summary.deleted,
        stray_monitors = summary.stray_monitors,
        stray_folders = summary.stray_folders,
        "records and host agree"
    );
    if let Err(error) = pool.kvm().get() {
        tracing::warn!(%error, "no sandbox can be made yet");
    }

    let services = Services::start(&pool, listeners).await?;
    notify(&[NotifyState::Ready]);
    tracing::info!(
        vcpus = capacity.vcpus,
        memory_mib = capacity.memory_mib,
        disk_mib = capacity.disk_mib,
        "ready"
    );

    let signal = signals.next().await;
    tracing::info!(signal, limit_ms = drain_limit.as_millis(), "stopping");
    notify(&[NotifyState::Stopping]);
    pool.drain();
    tokio::select! {
        () = services.drain(drain_limit) => {}
        // Whoever asks twice does not want to wait.
        _ = signals.next() => tracing::warn!("asked again; calls are cut off"),
    }
    match on_shutdown {
        OnShutdown::Keep => pool.leave().await,
        OnShutdown::Stop => pool.stop_all().await,
    }
    services.close().await;
    // The records close before the lock on them goes.
    drop(pool);
    drop(lock);
    tracing::info!("stopped");
    Ok(())
}

fn notify(states: &[NotifyState<'_>]) {
    // Without a service manager there is nobody to tell.
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "the service manager cannot be told");
    }
}

fn log_to_stderr() {
    use std::io::IsTerminal as _;
    use tracing_subscriber::EnvFilter;

    let filter = EnvFilter::try_from_env("SOULBOX_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
}

/// Says an error and what caused it, each cause on a line.
fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("soulboxd: {error}");
    for cause in error.chain().skip(1) {
        eprintln!("  because: {cause}");
    }
    ExitCode::FAILURE
}
