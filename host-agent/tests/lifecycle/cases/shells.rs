//! Shells, and the snapshots that templates are started from.

use super::*;

const WARM: &str = "[capacity]\nvcpus = 8\nmemory_mib = 4096\n[timeouts]\nboot_ms = 20000\nclean_stop_ms = 2000\ndrain_ms = 200\n[shells]\nminimum = 2\nmaximum = 3\n[templates]\nwarm_up = [[\"missing\"], [\"set\", \"warm\"], [\"write\", \"warm-disk\"]]\n";
const MADE: &str = "its sandboxes start from a snapshot now";

async fn shells_are(host: &Host, count: usize) -> Vec<i32> {
    eventually("another number of shells", async || {
        host.shells().len() == count
    })
    .await;
    host.shells()
}

/// All of them have mapped the memory of the template's snapshot.
async fn shells_are_prepared(host: &Host, count: usize) {
    eventually("shells without memory", async || {
        let logs = fs::read_dir(host.path("state/shells")).unwrap().flatten();
        let said = logs.map(|log| fs::read_to_string(log.path()).unwrap_or_default());
        let prepared = said.filter(|said| said.contains("prepared memory: true"));
        prepared.count() == count && host.shells().len() == count
    })
    .await;
}

pub(super) async fn a_template_is_warm_before_its_sandboxes_are_made() {
    let host = host_with(WARM);
    let mut daemon = host.start();
    daemon.wait_for_log(MADE);
    let mut client = daemon.sandboxes().await;
    let mut used = std::collections::HashSet::new();
    for _ in 0..4 {
        shells_are_prepared(&host, 2).await;
        let waiting = host.shells();
        let created = create(&mut client, "base").await.unwrap();
        assert!(created.restored);
        assert_eq!(
            stages(&created.stages),
            [
                "admission",
                "prepare",
                "shell",
                "restore.memory",
                "restore.state",
                "restore.start",
                "restore",
                "contract",
                "first_exec",
                "total"
            ]
        );
        let sandbox = created.sandbox.unwrap();
        assert!(sandbox.snapshot_id.starts_with("sn-"));
        assert_eq!(get_word(&mut client, &sandbox.id).await, "warm");
        assert_eq!(read_disk(&mut client, &sandbox.id).await, "warm-disk\n");
        // Nobody had to map its memory or to dial.
        let log = fs::read_to_string(vmm_log(&host, &sandbox.id)).unwrap();
        assert!(log.contains("prepared memory: true"), "{log}");
        assert!(
            log.contains("restored with 4 spares") && !log.contains("dialled"),
            "{log}"
        );
        // A shell is used once.
        let taken: Vec<i32> = host.monitors();
        let now = taken.into_iter().filter(|pid| waiting.contains(pid));
        assert_eq!(now.filter(|pid| used.insert(*pid)).count(), 1);
    }
    // What one writes no other sees.
    let ids: Vec<String> = list(&mut client).await.into_iter().map(|s| s.id).collect();
    word(&mut client, &ids[0], &["set", "mine"]).await;
    assert_eq!(get_word(&mut client, &ids[1]).await, "warm");

    // Other sizes have no snapshot.
    let mut other = request("base");
    other.resources = Some(soulbox_proto::host::v1::Resources {
        memory_mib: 256,
        ..Default::default()
    });
    let booted = client.create_sandbox(other).await.unwrap().into_inner();
    assert!(!booted.restored && stages(&booted.stages).contains(&"boot".to_owned()));
    assert!(host.soulbox(&["rm", "--all", "--force"]).status.success());

    // The next daemon has the snapshot still, and makes no other.
    daemon.terminate();
    assert!(host.shells().is_empty());
    let mut next = host.start();
    shells_are(&host, 2).await;
    // First it compares monitors, which takes a while without optimisation.
    next.wait_for_log(MADE);
    let mut client = next.sandboxes().await;
    assert!(create(&mut client, "base").await.unwrap().restored);
    assert!(!next.log().iter().any(|line| line.contains("making its")));
    assert!(host.soulbox(&["rm", "--all", "--force"]).status.success());
    assert_all_is_free(&next).await;
    next.terminate();
    assert_eq!(files_below(&host, "state/shells"), 0);
}

pub(super) async fn a_template_snapshot_of_no_use_is_made_again() {
    let host = host_with(WARM);
    let mut daemon = host.start();
    daemon.wait_for_log(MADE);
    let snapshots = host.path("state/snapshots");
    let only = || {
        let folders: Vec<_> = fs::read_dir(&snapshots).unwrap().flatten().collect();
        let [folder] = &folders[..] else {
            panic!("{folders:?}")
        };
        folder.path()
    };
    let first = only();
    fs::write(first.join("snapshot"), "FAKE0").unwrap();
    let mut client = daemon.sandboxes().await;
    let created = create(&mut client, "base").await.unwrap();
    assert!(!created.restored, "{created:?}");
    assert!(stages(&created.stages).contains(&"not_restored".to_owned()));
    assert!(
        daemon
            .wait_for_log("booting it instead")
            .contains("damaged")
    );
    eventually("it is not made again", async || {
        let log = daemon.log();
        log.iter().filter(|line| line.contains(MADE)).count() == 2
    })
    .await;
    assert!(create(&mut client, "base").await.unwrap().restored);
    assert_ne!(only(), first);
    // A shell that dies on the way costs no sandbox either.
    host.fault("restore:die");
    let created = create(&mut client, "base").await.unwrap();
    assert!(!created.restored);
    host.no_fault();
    assert!(host.soulbox(&["rm", "--all", "--force"]).status.success());
    eventually("it is not made again", async || {
        let log = daemon.log();
        log.iter().filter(|line| line.contains(MADE)).count() == 3
    })
    .await;

    // Another image is another template.
    let second = only();
    daemon.terminate();
    let manifest = host.path("templates/base/manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(
        &manifest,
        text.replace("\"sha256\":\"\"", "\"sha256\":\"ff\""),
    )
    .unwrap();
    let mut next = host.start();
    next.wait_for_log("its snapshot is not of what there is now");
    next.wait_for_log(MADE);
    assert_ne!(only(), second);
    next.terminate();
}

pub(super) async fn a_template_rebuilt_under_the_daemon_is_not_mixed_up() {
    let host = host_with(WARM);
    let mut daemon = host.start();
    daemon.wait_for_log(MADE);
    let mut client = daemon.sandboxes().await;
    let id = make(&mut client).await;
    let saved = save(&mut client, &id, "kept").await.unwrap();
    let manifest = host.path("templates/base/manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(
        &manifest,
        text.replace("\"sha256\":\"\"", "\"sha256\":\"ff\""),
    )
    .unwrap();
    // The old snapshot is of another disk, so this one is booted.
    assert!(!create(&mut client, "base").await.unwrap().restored);
    for refused in [
        create(&mut client, "kept").await.map(drop),
        roll_back(&mut client, &id, &saved.id).await.map(drop),
    ] {
        let status = refused.unwrap_err();
        assert_eq!(
            (status.code(), reason(&status).as_str()),
            (Code::FailedPrecondition, "SNAPSHOT_INCOMPATIBLE")
        );
    }
    assert_eq!(get(&mut client, &id).await.state(), SandboxState::Running);
    eventually("no new snapshot is made", async || {
        create(&mut client, "base")
            .await
            .is_ok_and(|created| created.restored)
            || !host.soulbox(&["rm", "--all", "--force"]).status.success()
    })
    .await;
    daemon.terminate();
}

pub(super) async fn shells_are_replaced_and_limited() {
    let host = host_with(&WARM.replace(
        "[templates]",
        "refill_per_second = 50\n[templates]\nsnapshot = false",
    ));
    let mut daemon = host.start();
    let first = shells_are(&host, 2).await;
    kill(first[0]);
    daemon.wait_for_log("a shell died");
    let second = shells_are(&host, 2).await;
    assert!(!second.contains(&first[0]), "{second:?}");

    // A fork takes all there are, makes the rest, and finds more wanted, but never
    // more than the maximum.
    let mut client = daemon.sandboxes().await;
    let id = make(&mut client).await;
    let forked = fork(&mut client, &id, 6).await.unwrap();
    let from: Vec<_> = forked
        .children
        .iter()
        .map(|child| {
            let names = stages(&child.stages);
            names.iter().any(|name| name == "shell")
        })
        .collect();
    assert!(from.contains(&false) && from.contains(&true), "{from:?}");
    shells_are(&host, 3).await;
    assert!(host.soulbox(&["rm", "--all", "--force"]).status.success());

    // They end with the daemon, and leave nothing.
    daemon.kill();
    shells_are(&host, 0).await;
    let mut next = host.start();
    shells_are(&host, 2).await;
    assert_eq!(files_below(&host, "state/shells"), 2);
    assert_all_is_free(&next).await;

    // Without any, sandboxes are made all the same.
    host.fault("prepare:refuse");
    for pid in host.shells() {
        kill(pid);
    }
    next.wait_for_log("no shell can be made");
    let mut client = next.sandboxes().await;
    let id = make(&mut client).await;
    pause(&mut client, &id).await.unwrap();
    let resumed = resume(&mut client, &id).await.unwrap();
    assert!(stages(&resumed.stages).contains(&"spawn".to_owned()));
    delete(&mut client, &id, true).await;
    next.terminate();
    host.assert_nothing_left();
    assert_eq!(files_below(&host, "state/shells"), 0);
}

pub(super) async fn a_template_snapshot_that_is_cut_off_leaves_nothing() {
    for fault in ["snapshot:hang", "swapped:hang", "suspend:hang"] {
        let host = host_with(WARM);
        host.fault(fault);
        let mut daemon = host.start();
        host.wait_for_fault().await;
        daemon.kill();
        host.no_fault();
        let mut next = host.start();
        next.wait_for_log(MADE);
        assert_eq!(files_below(&host, "state/snapshots"), 1);
        assert_eq!(files_below(&host, "state/sandboxes"), 0);
        assert!(host.monitors().is_empty());
        // One that is stopped in the middle takes it down itself.
        next.terminate();
    }
    let host = host_with(WARM);
    host.fault("snapshot:hang");
    let mut daemon = host.start();
    host.wait_for_fault().await;
    daemon.terminate();
    host.assert_nothing_left();
}
