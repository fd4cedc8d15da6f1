//! Pause, resume, snapshot, rollback and fork.

use super::*;

pub(super) async fn a_paused_sandbox_loses_nothing_and_holds_little() {
    let host = host();
    let mut daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let id = make(&mut client).await;
    word(&mut client, &id, &["set", "kept"]).await;
    word(&mut client, &id, &["write", "one"]).await;
    let mut running = exec(&mut client, &id, &["sleep"]).await;
    started(&mut running).await;
    let paused = pause(&mut client, &id).await.unwrap();
    assert_eq!(
        stages(&paused.stages),
        [
            "suspend",
            "snapshot.memory",
            "snapshot",
            "sync",
            "record",
            "stop",
            "total"
        ]
    );
    assert_eq!(paused.sandbox.unwrap().state(), SandboxState::Paused);
    let status = finish(&mut running).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::Unavailable, "SANDBOX_PAUSED")
    );
    assert!(host.monitors().is_empty());
    // Only its disk is taken.
    let node = daemon.node().await.get_node(GetNodeRequest {}).await;
    let node = node.unwrap().into_inner().node.unwrap();
    let (capacity, left) = (node.capacity.unwrap(), node.allocatable.unwrap());
    assert_eq!(
        (capacity.vcpus, capacity.memory_mib),
        (left.vcpus, left.memory_mib)
    );
    assert_eq!(capacity.disk_mib - left.disk_mib, 1);
    // Nobody runs anything in it.
    let status = run(&mut client, &id, &["get"]).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::FailedPrecondition, "SANDBOX_PAUSED")
    );
    assert!(status.message().contains("soulbox resume"), "{status:?}");
    // Pausing again is no error; what a fork needs is that it runs.
    pause(&mut client, &id).await.unwrap();
    let refused = fork(&mut client, &id, 1).await.unwrap_err();
    assert_eq!(reason(&refused), "SANDBOX_PAUSED");

    daemon.kill();
    let mut next = host.start();
    assert!(
        next.wait_for_log("records and host agree")
            .contains("paused=1")
    );
    let mut client = next.sandboxes().await;
    assert_eq!(get(&mut client, &id).await.state(), SandboxState::Paused);
    let resumed = resume(&mut client, &id).await.unwrap();
    assert_eq!(
        stages(&resumed.stages),
        [
            "admission",
            "prepare",
            "spawn",
            "restore.memory",
            "restore.state",
            "restore.start",
            "restore",
            "contract",
            "first_exec",
            "total"
        ]
    );
    resume(&mut client, &id).await.unwrap();
    assert_eq!(get_word(&mut client, &id).await, "kept");
    assert_eq!(read_disk(&mut client, &id).await, "one\n");
    assert_eq!(get(&mut client, &id).await.snapshot_id, "");
    // It is still the same guest.
    let log = fs::read_to_string(vmm_log(&host, &id)).unwrap();
    assert_eq!(log.matches("hostname: sb-").count(), 1, "{log}");
    assert_eq!(log.matches("hostname: \n").count(), 1, "{log}");
    delete(&mut client, &id, false).await;
    host.assert_nothing_left();
    assert_all_is_free(&next).await;
}

pub(super) async fn many_pauses_keep_chains_short() {
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let id = make(&mut client).await;
    let mut written = String::new();
    for round in 0..50 {
        let line = format!("line-{round}");
        word(&mut client, &id, &["write", &line]).await;
        word(&mut client, &id, &["set", &line]).await;
        written.push_str(&format!("{line}\n"));
        if round % 7 == 3 {
            let request = PauseSandboxRequest {
                id: id.clone(),
                cold: true,
            };
            client.pause_sandbox(request).await.unwrap();
        } else {
            pause(&mut client, &id).await.unwrap();
        }
        assert!(files_below(&host, "state/snapshots") <= 16);
        resume(&mut client, &id).await.unwrap();
        assert_eq!(get_word(&mut client, &id).await, line);
        assert_eq!(read_disk(&mut client, &id).await, written);
        let folder = format!("state/sandboxes/{id}");
        assert_eq!(files_below(&host, &folder), 2);
    }
    pause(&mut client, &id).await.unwrap();
    // A paused one goes without being resumed.
    delete(&mut client, &id, false).await;
    host.assert_nothing_left();
    assert_all_is_free(&daemon).await;
}

pub(super) async fn a_resume_that_does_not_fit_stays_paused() {
    let host = host_with(&FAST.replace("vcpus = 8", "vcpus = 1"));
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let id = make(&mut client).await;
    pause(&mut client, &id).await.unwrap();
    let other = make(&mut client).await;
    let status = resume(&mut client, &id).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::ResourceExhausted, "RESOURCES_EXHAUSTED")
    );
    assert_eq!(get(&mut client, &id).await.state(), SandboxState::Paused);
    delete(&mut client, &other, true).await;
    resume(&mut client, &id).await.unwrap();
    delete(&mut client, &id, true).await;
    // The time to live of one that is paused ends too.
    let mut short = request("base");
    short.ttl = Some(prost_types::Duration {
        seconds: 2,
        nanos: 0,
    });
    let short = client.create_sandbox(short).await.unwrap().into_inner();
    pause(&mut client, &short.sandbox.unwrap().id)
        .await
        .unwrap();
    eventually("it lives on", async || {
        list(&mut client).await.is_empty() && files_below(&host, "state/snapshots") == 0
    })
    .await;
    host.assert_nothing_left();
    assert_all_is_free(&daemon).await;
}

pub(super) async fn a_snapshot_is_a_template_and_a_way_back() {
    let host = host();
    let mut daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let id = make(&mut client).await;
    word(&mut client, &id, &["set", "first"]).await;
    word(&mut client, &id, &["write", "one"]).await;
    let mut running = exec(&mut client, &id, &["cat"]).await;
    started(&mut running).await;
    let first = save(&mut client, &id, "first").await.unwrap();
    assert!(!first.cold && first.memory_bytes > 0 && first.disk_bytes > 0);
    assert_eq!(first.users, [id.as_str()]);
    // Programs run on.
    finish(&mut running).await.unwrap();
    word(&mut client, &id, &["set", "second"]).await;
    word(&mut client, &id, &["write", "two"]).await;
    let request = SnapshotSandboxRequest {
        id: id.clone(),
        cold: true,
        labels: [("kind".to_owned(), "cold".to_owned())].into(),
        ..SnapshotSandboxRequest::default()
    };
    let reply = client.snapshot_sandbox(request).await.unwrap().into_inner();
    assert_eq!(reply.paused_us, 2000);
    let second = reply.snapshot.unwrap();
    assert!(second.cold);

    // By name and by id; the second is unpacked first.
    for (template, word_then, disk_then) in [
        ("first", "first", "one\n"),
        (first.id.as_str(), "first", "one\n"),
        (second.id.as_str(), "second", "one\ntwo\n"),
    ] {
        let created = create(&mut client, template).await.unwrap();
        assert!(created.restored);
        let child = created.sandbox.unwrap();
        assert_eq!(child.template, "base");
        assert_eq!(get_word(&mut client, &child.id).await, word_then);
        assert_eq!(read_disk(&mut client, &child.id).await, disk_then);
        let log = fs::read_to_string(vmm_log(&host, &child.id)).unwrap();
        assert!(log.contains(&format!("hostname: {}", child.id)), "{log}");
        let refused = roll_back(&mut client, &child.id, &first.id).await;
        assert_eq!(reason(&refused.unwrap_err()), "SNAPSHOT_OF_ANOTHER");
        delete(&mut client, &child.id, true).await;
    }
    assert!(!list_snapshots(&mut client).await[1].cold);

    // Names are given once, sizes not changed, and what is not there is said.
    let taken = save(&mut client, &id, "first").await.unwrap_err();
    assert_eq!(
        (taken.code(), reason(&taken).as_str()),
        (Code::AlreadyExists, "SNAPSHOT_NAME_TAKEN")
    );
    for name in ["base", "../x", "sn-aaaaaaaaaaaaaaaaaaaa"] {
        let refused = save(&mut client, &id, name).await.unwrap_err();
        assert_eq!(fields(&refused), ["name"], "{name}");
    }
    let mut larger = super::request(&first.id);
    larger.resources = Some(soulbox_proto::host::v1::Resources {
        memory_mib: 4096,
        ..Default::default()
    });
    let refused = client.create_sandbox(larger).await.unwrap_err();
    assert_eq!(fields(&refused), ["resources.memory_mib"]);
    let unknown = create(&mut client, "sn-aaaaaaaaaaaaaaaaaaaa").await;
    assert_eq!(reason(&unknown.unwrap_err()), "SNAPSHOT_NOT_FOUND");

    // Back to the first, and on.
    word(&mut client, &id, &["write", "three"]).await;
    let back = roll_back(&mut client, &id, &first.id).await.unwrap();
    assert_eq!(back.sandbox.unwrap().snapshot_id, first.id);
    assert_eq!(get_word(&mut client, &id).await, "first");
    assert_eq!(read_disk(&mut client, &id).await, "one\n");
    word(&mut client, &id, &["write", "four"]).await;
    pause(&mut client, &id).await.unwrap();
    // Also from a pause, after another daemon's start, and forward again.
    daemon.kill();
    let next = host.start();
    let mut client = next.sandboxes().await;
    let of_paused = save(&mut client, &id, "of-paused").await.unwrap();
    roll_back(&mut client, &id, &second.id).await.unwrap();
    assert_eq!(read_disk(&mut client, &id).await, "one\ntwo\n");
    assert_eq!(get_word(&mut client, &id).await, "second");
    roll_back(&mut client, &id, &of_paused.id).await.unwrap();
    assert_eq!(read_disk(&mut client, &id).await, "one\nfour\n");
    assert_eq!(get_word(&mut client, &id).await, "first");
    let log = fs::read_to_string(vmm_log(&host, &id)).unwrap();
    assert!(log.contains("hostname: \n"), "{log}");

    // What is used stays, and says by whom.
    let listed = list_snapshots(&mut client).await;
    assert_eq!(
        listed
            .iter()
            .map(|found| found.name.as_str())
            .collect::<Vec<_>>(),
        ["first", "", "of-paused"]
    );
    let in_use = delete_snapshot(&mut client, &first.id).await.unwrap_err();
    assert_eq!(
        (in_use.code(), reason(&in_use).as_str()),
        (Code::FailedPrecondition, "SNAPSHOT_IN_USE")
    );
    assert!(in_use.message().contains(&id), "{in_use:?}");
    delete(&mut client, &id, true).await;
    let in_use = delete_snapshot(&mut client, &first.id).await.unwrap_err();
    assert!(in_use.message().contains(&second.id), "{in_use:?}");
    delete_snapshot(&mut client, &second.id).await.unwrap();
    delete_snapshot(&mut client, &second.id).await.unwrap();
    delete_snapshot(&mut client, &of_paused.id).await.unwrap();
    delete_snapshot(&mut client, &first.id).await.unwrap();
    assert!(list_snapshots(&mut client).await.is_empty());
    host.assert_nothing_left();
    assert_all_is_free(&next).await;
}

pub(super) async fn a_fork_is_all_or_nothing() {
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let id = make(&mut client).await;
    word(&mut client, &id, &["set", "shared"]).await;
    word(&mut client, &id, &["write", "one"]).await;
    let mut running = exec(&mut client, &id, &["cat"]).await;
    started(&mut running).await;
    let forked = client
        .fork_sandbox(ForkSandboxRequest {
            id: id.clone(),
            count: 3,
            labels: [("of".to_owned(), "fork".to_owned())].into(),
            ..ForkSandboxRequest::default()
        })
        .await
        .unwrap()
        .into_inner();
    finish(&mut running).await.unwrap();
    assert_eq!(forked.parent_paused_us, 2000);
    let names = stages(&forked.stages);
    assert_eq!(
        (names[0].as_str(), names.last().unwrap().as_str()),
        ("admission", "total")
    );
    assert!(names.contains(&"children".to_owned()), "{names:?}");
    let children: Vec<Sandbox> = forked
        .children
        .into_iter()
        .map(|child| child.sandbox.unwrap())
        .collect();
    assert_eq!(children.len(), 3);
    for child in &children {
        assert_eq!(
            (child.parent_id.as_str(), child.labels["of"].as_str()),
            (id.as_str(), "fork")
        );
        assert_eq!(get_word(&mut client, &child.id).await, "shared");
        assert_eq!(read_disk(&mut client, &child.id).await, "one\n");
        word(&mut client, &child.id, &["write", &child.id]).await;
    }
    // Each is on its own, and needs no parent.
    word(&mut client, &id, &["write", "parent"]).await;
    assert_eq!(read_disk(&mut client, &id).await, "one\nparent\n");
    delete(&mut client, &id, true).await;
    for child in &children {
        let disk = read_disk(&mut client, &child.id).await;
        assert_eq!(disk, format!("one\n{}\n", child.id));
    }
    // A fork of a fork that takes its parent with it.
    let forked = client
        .fork_sandbox(ForkSandboxRequest {
            id: children[0].id.clone(),
            count: 1,
            delete_parent: true,
            ..ForkSandboxRequest::default()
        })
        .await;
    let grandchild = forked.unwrap().into_inner().children.remove(0);
    let grandchild = grandchild.sandbox.unwrap().id;
    assert!(
        list(&mut client)
            .await
            .iter()
            .all(|left| left.id != children[0].id)
    );
    assert_eq!(
        read_disk(&mut client, &grandchild).await,
        format!("one\n{}\n", children[0].id)
    );
    // More than there is room for: none.
    let before = list(&mut client).await.len();
    let refused = fork(&mut client, &grandchild, 6).await.unwrap_err();
    assert_eq!(reason(&refused), "RESOURCES_EXHAUSTED");
    let refused = fork(&mut client, &grandchild, 0).await.unwrap_err();
    assert_eq!(fields(&refused), ["count"]);
    // Children that do not start: none, and the parent runs on.
    for fault in ["restore:cpu", "restore:die", "configure:refuse"] {
        // The parent is configured, too, before its children are.
        if fault.starts_with("configure") {
            continue;
        }
        host.fault(fault);
        let refused = fork(&mut client, &grandchild, 4).await.unwrap_err();
        let expected = match fault {
            "restore:cpu" => "CPU_FEATURES_MISSING",
            _ => "MONITOR_DIED",
        };
        assert_eq!(reason(&refused), expected, "{refused:?}");
        host.no_fault();
        assert_eq!(list(&mut client).await.len(), before);
        word(&mut client, &grandchild, &["write", "on"]).await;
    }
    assert!(host.soulbox(&["rm", "--all", "--force"]).status.success());
    eventually("something is left", async || {
        files_below(&host, "state/snapshots") == 0
    })
    .await;
    host.assert_nothing_left();
    assert_all_is_free(&daemon).await;
}

pub(super) async fn a_snapshot_that_cannot_be_loaded_says_why() {
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let id = make(&mut client).await;
    let first = save(&mut client, &id, "first").await.unwrap();
    let second = save(&mut client, &id, "second").await.unwrap();
    let at = |snapshot: &Snapshot, file: &str| {
        host.path("state/snapshots").join(&snapshot.id).join(file)
    };
    let refused = async |client: &mut Client, expected: &str, says: &str| {
        let status = create(client, "second").await.unwrap_err();
        assert_eq!(
            (status.code(), reason(&status).as_str()),
            (Code::FailedPrecondition, expected)
        );
        assert!(status.message().contains(says), "{status:?}");
        assert_eq!(list(client).await.len(), 1);
    };
    let away = host.path("away");
    fs::rename(at(&first, "disk.0"), &away).unwrap();
    refused(&mut client, "SNAPSHOT_LAYER_MISSING", &first.id).await;
    fs::rename(&away, at(&first, "disk.0")).unwrap();
    fs::rename(at(&second, "memory"), &away).unwrap();
    refused(&mut client, "SNAPSHOT_LAYER_MISSING", "memory").await;
    fs::rename(&away, at(&second, "memory")).unwrap();
    host.fault("restore:cpu");
    refused(&mut client, "CPU_FEATURES_MISSING", "avx512f").await;
    host.no_fault();
    let state = fs::read_to_string(at(&second, "snapshot")).unwrap();
    fs::write(at(&second, "snapshot"), &state[..state.len() / 2]).unwrap();
    refused(&mut client, "SNAPSHOT_DAMAGED", "damaged").await;
    // A rollback to it is refused as late as that, and leaves a sandbox to resume.
    let status = roll_back(&mut client, &id, &second.id).await.unwrap_err();
    assert_eq!(reason(&status), "SNAPSHOT_DAMAGED");
    assert_eq!(get(&mut client, &id).await.state(), SandboxState::Paused);
    fs::write(at(&second, "snapshot"), &state).unwrap();
    resume(&mut client, &id).await.unwrap();
    // One that lacks a layer is refused before anything is lost.
    word(&mut client, &id, &["write", "on"]).await;
    fs::rename(at(&first, "memory"), &away).unwrap();
    let status = roll_back(&mut client, &id, &first.id).await.unwrap_err();
    assert_eq!(reason(&status), "SNAPSHOT_LAYER_MISSING");
    assert_eq!(read_disk(&mut client, &id).await, "on\n");
    fs::rename(&away, at(&first, "memory")).unwrap();
    delete(&mut client, &id, true).await;
    for snapshot in [second, first] {
        delete_snapshot(&mut client, &snapshot.id).await.unwrap();
    }
    host.assert_nothing_left();
    assert_all_is_free(&daemon).await;
}

pub(super) async fn a_snapshot_that_fails_leaves_the_sandbox_running() {
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let id = make(&mut client).await;
    word(&mut client, &id, &["write", "one"]).await;
    for (fault, code, expected) in [
        ("snapshot:full", Code::ResourceExhausted, "DISK_FULL"),
        ("snapshot:other", Code::Internal, "SNAPSHOT_REFUSED"),
        ("suspend:refuse", Code::Internal, "AGENT_FAILED"),
    ] {
        host.fault(fault);
        for status in [
            save(&mut client, &id, "named").await.unwrap_err(),
            pause(&mut client, &id).await.unwrap_err(),
            fork(&mut client, &id, 2).await.unwrap_err(),
        ] {
            assert_eq!((status.code(), reason(&status).as_str()), (code, expected));
            assert!(
                status.message().contains("the sandbox runs on"),
                "{status:?}"
            );
        }
        host.no_fault();
        assert_eq!(get(&mut client, &id).await.state(), SandboxState::Running);
        assert_eq!(files_below(&host, "state/snapshots"), 0);
        assert_eq!(files_below(&host, &format!("state/sandboxes/{id}")), 2);
        word(&mut client, &id, &["write", "on"]).await;
    }
    assert_eq!(read_disk(&mut client, &id).await, "one\non\non\non\n");
    // A guest that does not run on is of no use, nor is one whose monitor died.
    for fault in ["configure:refuse", "snapshot:die", "swapped:die"] {
        let id = make(&mut client).await;
        host.fault(fault);
        let status = save(&mut client, &id, "").await.unwrap_err();
        host.no_fault();
        eventually("it is not failed", async || {
            get(&mut client, &id).await.state() == SandboxState::Failed
        })
        .await;
        let failure = get(&mut client, &id).await.failure.unwrap();
        let expected = match fault {
            "configure:refuse" => ("AGENT_FAILED", "AGENT_FAILED"),
            _ => ("SANDBOX_DIED", "MONITOR_DIED"),
        };
        assert_eq!(
            (reason(&status).as_str(), failure.reason.as_str()),
            expected
        );
        delete(&mut client, &id, false).await;
    }
    delete(&mut client, &id, false).await;
    host.assert_nothing_left();
    assert_all_is_free(&daemon).await;
}

pub(super) async fn a_monitor_that_makes_no_snapshot_in_time_is_given_up() {
    let host = host_with(&FAST.replace("drain_ms", "snapshot_ms = 500\ndrain_ms"));
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let id = make(&mut client).await;
    host.fault("snapshot:hang");
    let status = pause(&mut client, &id).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::DeadlineExceeded, "SNAPSHOT_TIMEOUT")
    );
    eventually("it is not failed", async || {
        get(&mut client, &id).await.state() == SandboxState::Failed
    })
    .await;
    let failure = get(&mut client, &id).await.failure.unwrap();
    assert_eq!(failure.reason, "MONITOR_LOST");
    delete(&mut client, &id, false).await;
    host.assert_nothing_left();
    assert_all_is_free(&daemon).await;
}

pub(super) async fn deleting_works_in_the_middle_of_everything() {
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    for fault in [
        "suspend:hang",
        "snapshot:hang",
        "swapped:hang",
        "restore:hang",
    ] {
        for operation in ["pause", "snapshot", "fork", "rollback", "resume"] {
            let id = make(&mut client).await;
            let saved = match (fault, operation) {
                ("restore:hang", "rollback") => Some(save(&mut client, &id, "").await.unwrap()),
                ("restore:hang", "resume") => {
                    pause(&mut client, &id).await.unwrap();
                    None
                }
                ("restore:hang", "fork") | (_, "pause" | "snapshot" | "fork")
                    if !(fault == "restore:hang" && operation != "fork") =>
                {
                    None
                }
                _ => {
                    delete(&mut client, &id, true).await;
                    continue;
                }
            };
            host.fault(fault);
            let (mut caller, target) = (client.clone(), id.clone());
            let to = saved.as_ref().map(|saved| saved.id.clone());
            let call = tokio::spawn(async move {
                match operation {
                    "pause" => pause(&mut caller, &target).await.map(drop),
                    "snapshot" => save(&mut caller, &target, "").await.map(drop),
                    "fork" => fork(&mut caller, &target, 2).await.map(drop),
                    "rollback" => roll_back(&mut caller, &target, &to.unwrap())
                        .await
                        .map(drop),
                    _ => resume(&mut caller, &target).await.map(drop),
                }
            });
            host.wait_for_fault().await;
            // Meanwhile it says what it is busy with, or takes one after the other.
            if operation == "pause" || operation == "resume" {
                let busy = pause(&mut client, &id).await.unwrap_err();
                assert_eq!(reason(&busy), "SANDBOX_BUSY");
            }
            for sandbox in list(&mut client).await {
                delete(&mut client, &sandbox.id, false).await;
            }
            assert!(call.await.unwrap().is_err(), "{operation} with {fault}");
            host.no_fault();
            if let Some(saved) = saved {
                delete_snapshot(&mut client, &saved.id).await.unwrap();
            }
            eventually("something is left", async || {
                files_below(&host, "state/snapshots") == 0 && host.monitors().is_empty()
            })
            .await;
            host.assert_nothing_left();
            assert_all_is_free(&daemon).await;
        }
    }
}

pub(super) async fn the_command_line_saves_and_brings_back() {
    let host = host();
    let daemon = host.start();
    let soulbox = |args: &[&str]| {
        let output = host.soulbox(args);
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{args:?}: {told}");
        let said = String::from_utf8(output.stdout).unwrap();
        (said.trim().to_owned(), told)
    };
    let (id, _) = soulbox(&["create"]);
    soulbox(&["exec", &id, "set", "kept"]);
    let (snapshot, told) = soulbox(&["snapshot", "create", &id, "--name", "warm", "--timings"]);
    assert!(told.contains("snapshot.memory"), "{told}");
    let (listed, _) = soulbox(&["snapshot", "ls", "--output", "json"]);
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed[0]["id"], snapshot.as_str());
    assert_eq!(listed[0]["users"][0], id.as_str());
    soulbox(&["exec", &id, "set", "other"]);
    let (paused, told) = soulbox(&["pause", &id, "--cold", "--timings"]);
    assert!(paused == id && told.contains("sync"), "{told}");
    assert!(soulbox(&["ls"]).0.contains("paused"));
    let refused = host.soulbox(&["exec", &id, "get"]);
    assert_eq!(refused.status.code(), Some(125));
    soulbox(&["resume", &id]);
    assert_eq!(soulbox(&["exec", &id, "get"]).0, "other");
    soulbox(&["rollback", &id, &snapshot]);
    assert_eq!(soulbox(&["exec", &id, "get"]).0, "kept");
    assert_eq!(soulbox(&["run", "--template", "warm", "get"]).0, "kept");
    let (forked, _) = soulbox(&["fork", &id, "-n", "2", "--output", "json"]);
    let forked: serde_json::Value = serde_json::from_str(&forked).unwrap();
    assert_eq!(forked["children"].as_array().unwrap().len(), 2);
    assert_eq!(forked["children"][0]["parent_id"], id.as_str());
    assert!(soulbox(&["get", &id]).0.contains(&snapshot));
    assert!(soulbox(&["snapshot", "ls"]).0.contains("warm"));
    assert!(soulbox(&["template", "ls"]).0.contains(&snapshot));
    let refused = host.soulbox(&["snapshot", "rm", &snapshot]);
    assert_eq!(refused.status.code(), Some(1));
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(told.contains("1 of 1 snapshots were not deleted"), "{told}");
    soulbox(&["rm", "--all", "--force"]);
    soulbox(&["snapshot", "rm", &snapshot]);
    host.assert_nothing_left();
    assert_all_is_free(&daemon).await;
}
