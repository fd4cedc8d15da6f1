//! What real guests must do, by subject, and the fixture they share.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{LazyLock, Mutex};

use anyhow::{Context, Result, ensure};

use crate::support::{Daemon, Host};

mod faults;
mod lifecycle;
mod network;
mod programs;
mod services;
mod snapshots;

type Test = (&'static str, fn() -> Result<()>);

/// All tests, the cheap ones first.
pub(crate) const ALL: &[Test] = &[
    ("python_and_node_run", programs::python_and_node_run),
    (
        "exit_codes_are_the_programs",
        programs::exit_codes_are_the_programs,
    ),
    (
        "programs_that_cannot_start",
        programs::programs_that_cannot_start,
    ),
    (
        "streams_are_apart_and_stdin_ends",
        programs::streams_are_apart_and_stdin_ends,
    ),
    (
        "arguments_and_environment_are_bytes",
        programs::arguments_and_environment_are_bytes,
    ),
    (
        "the_root_is_writable_and_the_users_own",
        programs::the_root_is_writable_and_the_users_own,
    ),
    (
        "out_of_memory_kills_the_program_only",
        programs::out_of_memory_kills_the_program_only,
    ),
    (
        "a_client_that_goes_takes_its_program_along",
        programs::a_client_that_goes_takes_its_program_along,
    ),
    (
        "a_gibibyte_of_output_in_bounded_memory",
        programs::a_gibibyte_of_output_in_bounded_memory,
    ),
    ("people_build_and_serve", services::people_build_and_serve),
    ("limits_hold", services::limits_hold),
    (
        "programs_are_left_and_found_again",
        services::programs_are_left_and_found_again,
    ),
    ("code_keeps_its_state", services::code_keeps_its_state),
    ("files_go_both_ways", services::files_go_both_ways),
    ("files_are_mounted", services::files_are_mounted),
    ("an_agent_stays_light", services::an_agent_stays_light),
    (
        "machines_have_the_shape_asked_for",
        lifecycle::machines_have_the_shape_asked_for,
    ),
    ("a_bzimage_boots_too", lifecycle::a_bzimage_boots_too),
    (
        "a_request_id_makes_one_sandbox",
        lifecycle::a_request_id_makes_one_sandbox,
    ),
    ("a_time_to_live_ends", lifecycle::a_time_to_live_ends),
    ("run_leaves_nothing", lifecycle::run_leaves_nothing),
    (
        "a_guest_panic_fails_the_sandbox",
        faults::a_guest_panic_fails_the_sandbox,
    ),
    (
        "a_killed_monitor_ends_its_calls",
        faults::a_killed_monitor_ends_its_calls,
    ),
    ("sigterm_drains_and_stops", faults::sigterm_drains_and_stops),
    (
        "a_killed_daemon_is_followed_by_one_that_adopts",
        faults::a_killed_daemon_is_followed_by_one_that_adopts,
    ),
    (
        "what_cannot_be_adopted_is_cleaned_up",
        faults::what_cannot_be_adopted_is_cleaned_up,
    ),
    (
        "a_create_restores_the_template",
        snapshots::a_create_restores_the_template,
    ),
    (
        "clones_share_no_secret_and_no_name",
        snapshots::clones_share_no_secret_and_no_name,
    ),
    (
        "a_clone_that_runs_true_writes_little",
        snapshots::a_clone_that_runs_true_writes_little,
    ),
    (
        "a_pause_keeps_programs_files_and_time",
        snapshots::a_pause_keeps_programs_files_and_time,
    ),
    (
        "many_pauses_lose_nothing",
        snapshots::many_pauses_lose_nothing,
    ),
    (
        "a_paused_sandbox_survives_the_daemon",
        snapshots::a_paused_sandbox_survives_the_daemon,
    ),
    (
        "a_sandbox_is_rolled_back",
        snapshots::a_sandbox_is_rolled_back,
    ),
    (
        "a_snapshot_is_a_template",
        snapshots::a_snapshot_is_a_template,
    ),
    (
        "children_of_a_fork_are_on_their_own",
        snapshots::children_of_a_fork_are_on_their_own,
    ),
    (
        "code_survives_a_snapshot",
        services::code_survives_a_snapshot,
    ),
    ("a_pause_ends_every_call", services::a_pause_ends_every_call),
    (
        "memory_comes_back_to_the_host",
        snapshots::memory_comes_back_to_the_host,
    ),
    ("sandboxes_have_networks", network::sandboxes_have_networks),
    (
        "a_monitor_killed_while_paused_is_not_missed",
        snapshots::a_monitor_killed_while_paused_is_not_missed,
    ),
];

/// Small sandboxes, and time enough where everything is emulated.
const CONFIG: &str = "[capacity]\nvcpus = 64\n[defaults]\nmemory_mib = 256\n\
    [timeouts]\nboot_ms = 120000\nclean_stop_ms = 20000\n";

/// A host of a test's own, with real templates, on which sandboxes are booted.
pub(crate) fn host(extra: &str) -> Host {
    real_host(&format!(
        "{CONFIG}[templates]\nsnapshot = false\n[shells]\nmaximum = 0\n{extra}"
    ))
}

fn real_host(config: &str) -> Host {
    let (templates, monitor) = (template_dir(), monitor());
    Host::with_paths(
        &[("template_dir", &templates), ("monitor", &monitor)],
        config,
    )
}

/// A host on which sandboxes are restored.
pub(crate) struct Snapshotted {
    pub(crate) host: Host,
    daemon: Option<Daemon>,
}

// === impl Snapshotted ===

impl Snapshotted {
    /// Stops the daemon as a service manager would, and starts it again.
    pub(crate) fn restart(&mut self) -> Result<()> {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.terminate();
        }
        self.daemon = Some(self.host.start());
        Ok(())
    }

    /// `soulbox snapshot create`; the snapshot's id.
    pub(crate) fn snapshot(&self, id: &str, options: &[&str]) -> Result<String> {
        let args = [&["snapshot", "create"], options, &[id]].concat();
        Ok(succeed(self.host.soulbox(&args))?.trim().to_owned())
    }

    /// `soulbox fork`; the children's ids.
    pub(crate) fn fork(&self, id: &str, count: usize) -> Result<Vec<String>> {
        let count = count.to_string();
        let output = succeed(self.host.soulbox(&["fork", "--count", &count, id]))?;
        Ok(output.lines().map(str::to_owned).collect())
    }

    /// The folders of snapshots that no sandbox uses are gone, but those of the
    /// templates.
    pub(crate) fn nothing_but_template_snapshots(&self) -> Result<()> {
        let folder = self.host.path("state/snapshots");
        let count = || -> Result<usize> { Ok(std::fs::read_dir(&folder)?.count()) };
        eventually("unused snapshots are collected", || Ok(count()? <= 1))
    }

    /// The processes that write to the sandbox's log.
    pub(crate) fn monitors_of(&self, id: &str) -> Result<Vec<i32>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc")?.flatten() {
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            else {
                continue;
            };
            let log = std::fs::read_link(entry.path().join("fd/1")).unwrap_or_default();
            if log.to_string_lossy().contains(id) {
                found.push(pid);
            }
        }
        Ok(found)
    }
}

/// Starts the host on first use and waits for the template's snapshot. Tests that
/// use it run one at a time.
pub(crate) fn snapshotted() -> impl std::ops::DerefMut<Target = Snapshotted> {
    static SNAPSHOTTED: LazyLock<Mutex<Snapshotted>> = LazyLock::new(|| {
        let host = real_host(CONFIG);
        let daemon = Some(host.start());
        let snapshotted = Snapshotted { host, daemon };
        eventually("sandboxes start from the template's snapshot", || {
            let daemon = snapshotted.daemon.as_ref();
            let log = daemon.map(Daemon::log).unwrap_or_default();
            Ok(log
                .iter()
                .any(|line| line.contains("start from a snapshot")))
        })
        .unwrap();
        Mutex::new(snapshotted)
    });
    let snapshotted = SNAPSHOTTED
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    // What a test left that failed is not the next one's.
    let _ = snapshotted.host.soulbox(&["rm", "--force", "--all"]);
    snapshotted
}

/// Whether the host is an emulated machine.
pub(crate) fn emulated() -> bool {
    std::env::var("SOULBOX_BENCH").is_ok_and(|bench| bench == "nested")
}

pub(crate) fn template_dir() -> PathBuf {
    let cache = std::env::var_os("SOULBOX_CACHE")
        .map(PathBuf::from)
        .unwrap_or_else(|| {
            let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
            let home = std::env::var_os("HOME")
                .map(PathBuf::from)
                .unwrap_or_default();
            base.unwrap_or_else(|| home.join(".cache")).join("soulbox")
        });
    cache.join("templates/current")
}

/// The monitor beside the daemon; `cargo test` of the workspace builds it.
pub(crate) fn monitor() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_soulboxd")).with_file_name("soulbox-vmm")
}

/// A sandbox that many tests look into.
pub(crate) struct Shared {
    pub(crate) host: Host,
    pub(crate) daemon: Daemon,
    pub(crate) id: String,
}

/// Starts the shared sandbox on first use. Tests that use it run one at a time,
/// so that none sees what another leaves running.
pub(crate) fn shared() -> impl std::ops::Deref<Target = Shared> {
    static SHARED: LazyLock<Mutex<Shared>> = LazyLock::new(|| {
        let host = host("");
        let daemon = host.start();
        let id = create(&host, &[]).unwrap();
        Mutex::new(Shared { host, daemon, id })
    });
    SHARED
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// `soulbox create`; the new sandbox's id.
pub(crate) fn create(host: &Host, options: &[&str]) -> Result<String> {
    let args = [&["create"], options].concat();
    Ok(succeed(host.soulbox(&args))?.trim().to_owned())
}

/// `soulbox exec` of a shell line as root.
pub(crate) fn sh(host: &Host, id: &str, line: &str) -> Output {
    host.soulbox(&["exec", "--user", "root", id, "--", "sh", "-c", line])
}

/// The standard output of a command that has to succeed.
pub(crate) fn succeed(output: Output) -> Result<String> {
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {stderr}", output.status);
    String::from_utf8(output.stdout).context("output is UTF-8")
}

/// `soulbox` in the background.
pub(crate) fn soulbox(host: &Host, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_soulbox"));
    command
        .env("SOULBOX_HOST", format!("unix:{}", host.socket().display()))
        .args(args)
        .stdin(Stdio::null());
    command
}

/// Tries until it holds or patience is over.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = std::time::Instant::now() + crate::support::PATIENCE;
    while !holds()? {
        ensure!(std::time::Instant::now() < deadline, "never: {what}");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    Ok(())
}

/// A field of /proc/PID/status, in KiB.
pub(crate) fn status_kib(status: &str, field: &str) -> Result<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let value = line.and_then(|line| line.split_whitespace().next());
    Ok(value.with_context(|| format!("no {field}"))?.parse()?)
}
