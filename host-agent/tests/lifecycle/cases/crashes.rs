//! Daemons and monitors that are killed in the middle of an operation.

use super::*;

/// A running sandbox with something to lose, and a snapshot of it.
async fn with_content(client: &mut Client) -> (String, Snapshot) {
    let id = make(client).await;
    word(client, &id, &["write", "one"]).await;
    let saved = save(client, &id, "").await.unwrap();
    word(client, &id, &["write", "two"]).await;
    word(client, &id, &["set", "kept"]).await;
    (id, saved)
}

/// Nothing is lost, chains are whole, and all goes when it is to.
async fn check_and_remove(host: &Host, daemon: &Daemon, id: &str, disk: &str) {
    let mut client = daemon.sandboxes().await;
    resume(&mut client, id).await.unwrap();
    assert_eq!(read_disk(&mut client, id).await, disk);
    word(&mut client, id, &["write", "more"]).await;
    pause(&mut client, id).await.unwrap();
    resume(&mut client, id).await.unwrap();
    let forked = fork(&mut client, id, 1).await.unwrap();
    let child = forked.children[0].sandbox.as_ref().unwrap().id.clone();
    for id in [id, child.as_str()] {
        assert_eq!(read_disk(&mut client, id).await, format!("{disk}more\n"));
        assert_eq!(files_below(host, &format!("state/sandboxes/{id}")), 2);
    }
    for sandbox in list(&mut client).await {
        delete(&mut client, &sandbox.id, true).await;
    }
    for snapshot in list_snapshots(&mut client).await.iter().rev() {
        delete_snapshot(&mut client, &snapshot.id).await.unwrap();
    }
    eventually("something is left", async || {
        files_below(host, "state/snapshots") == 0
    })
    .await;
    host.assert_nothing_left();
    assert_all_is_free(daemon).await;
}

async fn kill_monitors(host: &Host) {
    host.monitors().into_iter().for_each(kill);
    eventually("they live", async || host.monitors().is_empty()).await;
}

/// Calls it, and returns once a faked monitor hangs at the step.
async fn call_until(
    host: &Host,
    client: &Client,
    fault: &str,
    operation: &'static str,
    id: &str,
    snapshot: &str,
) -> tokio::task::JoinHandle<()> {
    host.fault(fault);
    let (mut client, id, snapshot) = (client.clone(), id.to_owned(), snapshot.to_owned());
    let call = tokio::spawn(async move {
        // The daemon will be killed.
        let _ = match operation {
            "pause" => pause(&mut client, &id).await.map(drop),
            "snapshot" => save(&mut client, &id, "cut-off").await.map(drop),
            "fork" => fork(&mut client, &id, 2).await.map(drop),
            "rollback" => roll_back(&mut client, &id, &snapshot).await.map(drop),
            _ => resume(&mut client, &id).await.map(drop),
        };
    });
    host.wait_for_fault().await;
    call
}

pub(super) async fn a_daemon_killed_while_it_saves_loses_nothing() {
    let steps = [
        "spares:hang",
        "suspend:hang",
        "snapshot:hang",
        "swapped:hang",
    ];
    for operation in ["pause", "snapshot", "fork"] {
        for fault in steps {
            let host = host();
            let mut daemon = host.start();
            let mut client = daemon.sandboxes().await;
            let (id, saved) = with_content(&mut client).await;
            let call = call_until(&host, &client, fault, operation, &id, &saved.id).await;
            daemon.kill();
            call.await.unwrap();
            host.no_fault();
            let mut next = host.start();
            let summary = next.wait_for_log("records and host agree");
            assert!(
                summary.contains("adopted=1"),
                "{operation}, {fault}: {summary}"
            );
            let mut client = next.sandboxes().await;
            assert_eq!(get(&mut client, &id).await.state(), SandboxState::Running);
            assert_eq!(get_word(&mut client, &id).await, "kept");
            // The snapshot that was cut off is none; its name is free.
            assert_eq!(list_snapshots(&mut client).await.len(), 1);
            save(&mut client, &id, "cut-off").await.unwrap();
            check_and_remove(&host, &next, &id, "one\ntwo\n").await;
        }
    }
}

pub(super) async fn what_was_on_disk_before_the_daemon_died_is_finished() {
    for operation in ["pause", "snapshot", "fork"] {
        for monitor_dies in [false, true] {
            let host = host();
            let mut daemon = host.start();
            let mut client = daemon.sandboxes().await;
            let (id, saved) = with_content(&mut client).await;
            let call = call_until(&host, &client, "swapped:hang", operation, &id, &saved.id).await;
            daemon.kill();
            call.await.unwrap();
            host.no_fault();
            // As a daemon does that is killed before it has stored the record.
            let snapshots = host.path("state/snapshots");
            let draft = fs::read_dir(&snapshots)
                .unwrap()
                .flatten()
                .map(|entry| entry.file_name().into_string().unwrap())
                .find(|name| name.starts_with('.'))
                .unwrap();
            let name = draft.trim_start_matches('.').trim_end_matches(".tmp");
            fs::write(snapshots.join(&draft).join("manifest.json"), "{}").unwrap();
            fs::rename(snapshots.join(&draft), snapshots.join(name)).unwrap();
            if monitor_dies {
                kill_monitors(&host).await;
            }
            let mut next = host.start();
            let mut client = next.sandboxes().await;
            let state = get(&mut client, &id).await.state();
            match (operation, monitor_dies) {
                ("pause", _) => assert_eq!(state, SandboxState::Paused),
                (_, false) => assert_eq!(state, SandboxState::Running),
                (_, true) => assert_eq!(state, SandboxState::Failed),
            }
            let listed = list_snapshots(&mut client).await;
            assert_eq!(listed.len(), if operation == "snapshot" { 2 } else { 1 });
            if operation == "snapshot" {
                // It can be used, whatever has become of its sandbox.
                let child = create(&mut client, "cut-off").await.unwrap();
                let child = child.sandbox.unwrap().id;
                assert_eq!(read_disk(&mut client, &child).await, "one\ntwo\n");
                delete(&mut client, &child, true).await;
            }
            if state == SandboxState::Failed {
                delete(&mut client, &id, false).await;
                for snapshot in listed.iter().rev() {
                    delete_snapshot(&mut client, &snapshot.id).await.unwrap();
                }
                host.assert_nothing_left();
                assert_all_is_free(&next).await;
            } else {
                check_and_remove(&host, &next, &id, "one\ntwo\n").await;
            }
            next.terminate();
        }
    }
}

pub(super) async fn a_daemon_killed_while_it_restores_leaves_it_paused() {
    for operation in ["resume", "rollback"] {
        for fault in ["restore:hang", "configure:hang"] {
            for monitor_dies in [false, true] {
                let host = host();
                let mut daemon = host.start();
                let mut client = daemon.sandboxes().await;
                let (id, saved) = with_content(&mut client).await;
                if operation == "resume" {
                    pause(&mut client, &id).await.unwrap();
                }
                let call = call_until(&host, &client, fault, operation, &id, &saved.id).await;
                daemon.kill();
                call.await.unwrap();
                host.no_fault();
                if monitor_dies {
                    kill_monitors(&host).await;
                }
                let mut next = host.start();
                let summary = next.wait_for_log("records and host agree");
                assert!(
                    summary.contains("paused=1"),
                    "{operation}, {fault}: {summary}"
                );
                assert!(host.monitors().is_empty());
                let disk = if operation == "resume" {
                    "one\ntwo\n"
                } else {
                    "one\n"
                };
                check_and_remove(&host, &next, &id, disk).await;
            }
        }
    }
}

pub(super) async fn a_fork_that_is_cut_off_leaves_no_child() {
    for fault in ["restore:hang", "restore:die"] {
        let host = host();
        let mut daemon = host.start();
        let mut client = daemon.sandboxes().await;
        let (id, saved) = with_content(&mut client).await;
        let call = call_until(&host, &client, fault, "fork", &id, &saved.id).await;
        daemon.kill();
        call.await.unwrap();
        host.no_fault();
        let next = host.start();
        assert_eq!(list(&mut next.sandboxes().await).await.len(), 1);
        assert_eq!(host.monitors().len(), 1);
        check_and_remove(&host, &next, &id, "one\ntwo\n").await;
    }
    // A caller that goes away has no children either.
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let (id, saved) = with_content(&mut client).await;
    let call = call_until(&host, &client, "restore:hang", "fork", &id, &saved.id).await;
    call.abort();
    eventually("children stay", async || {
        list(&mut client).await.len() == 1 && host.monitors().len() == 1
    })
    .await;
    host.no_fault();
    check_and_remove(&host, &daemon, &id, "one\ntwo\n").await;
}

pub(super) async fn a_monitor_that_dies_with_the_daemon_fails_only_its_sandbox() {
    for fault in ["suspend:hang", "snapshot:hang", "swapped:hang"] {
        for operation in ["pause", "snapshot"] {
            let host = host();
            let mut daemon = host.start();
            let mut client = daemon.sandboxes().await;
            let (id, saved) = with_content(&mut client).await;
            let call = call_until(&host, &client, fault, operation, &id, &saved.id).await;
            daemon.kill();
            call.await.unwrap();
            host.no_fault();
            kill_monitors(&host).await;
            let next = host.start();
            let mut client = next.sandboxes().await;
            let failed = get(&mut client, &id).await;
            // Until somebody reaps it, a process that was killed can be found.
            let reason = failed.failure.unwrap().reason;
            assert!(
                reason == "MONITOR_DIED" || reason == "MONITOR_LOST",
                "{reason}"
            );
            assert_eq!(files_below(&host, "state/snapshots"), 1);
            // What was saved of it before is still there.
            let child = create(&mut client, &saved.id)
                .await
                .unwrap()
                .sandbox
                .unwrap();
            assert_eq!(read_disk(&mut client, &child.id).await, "one\n");
            delete(&mut client, &id, false).await;
            check_and_remove(&host, &next, &child.id, "one\n").await;
        }
    }
}

pub(super) async fn a_full_disk_costs_no_sandbox() {
    let host = host();
    fs::create_dir(host.path("state")).unwrap();
    let state = host.path("state");
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=16m", "tmpfs"])
        .arg(&state)
        .stderr(std::process::Stdio::null())
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        println!("not root here: a full disk is only faked, in another case");
        return;
    }
    let _mount = Mount(state.clone());
    let mut daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let id = make(&mut client).await;
    word(&mut client, &id, &["write", "one"]).await;
    let filler = state.join("filler");
    for left_kib in [0, 12, 20, 40] {
        let mut file = fs::File::create(&filler).unwrap();
        while std::io::Write::write_all(&mut file, &[1; 4096]).is_ok() {}
        let length = file.metadata().unwrap().len();
        file.set_len(length.saturating_sub(left_kib << 10)).unwrap();
        for status in [
            save(&mut client, &id, "").await.err(),
            pause(&mut client, &id).await.err(),
        ] {
            let Some(status) = status else { continue };
            let reason = reason(&status);
            assert!(
                reason == "DISK_FULL" || reason == "STORE_FAILED",
                "{status:?}"
            );
        }
        fs::remove_file(&filler).unwrap();
        resume(&mut client, &id).await.unwrap();
        assert_eq!(read_disk(&mut client, &id).await, "one\n");
        for snapshot in list_snapshots(&mut client).await {
            // Its sandbox may build on it.
            let _ = delete_snapshot(&mut client, &snapshot.id).await;
        }
    }
    word(&mut client, &id, &["write", "two"]).await;
    pause(&mut client, &id).await.unwrap();
    daemon.kill();
    let next = host.start();
    check_and_remove(&host, &next, &id, "one\ntwo\n").await;
}

/// Unmounted when the test is over.
struct Mount(std::path::PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        // Afterwards their logs are below no folder.
        kill_logging_below(&self.0);
        let unmounted = std::process::Command::new("umount")
            .arg("--lazy")
            .arg(&self.0)
            .status();
        assert!(unmounted.is_ok_and(|status| status.success()));
    }
}
