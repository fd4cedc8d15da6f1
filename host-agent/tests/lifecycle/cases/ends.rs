//! How sandboxes come to be refused, undone or ended.

use super::*;

pub(super) async fn a_killed_monitor_ends_calls_within_a_second() {
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let id = make(&mut client).await;
    let mut events = exec(&mut client, &id, &["sleep"]).await;
    started(&mut events).await;
    let [monitor] = host.monitors()[..] else {
        panic!("no monitor")
    };
    let pid = rustix::process::Pid::from_raw(monitor).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let killed = Instant::now();
    let status = finish(&mut events).await.unwrap_err();
    // The contract with callers, not a measurement.
    assert!(
        killed.elapsed() < Duration::from_secs(1),
        "{:?}",
        killed.elapsed()
    );
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::Unavailable, "SANDBOX_DIED")
    );
    let sandbox = get(&mut client, &id).await;
    assert_eq!(sandbox.state(), SandboxState::Failed);
    assert_eq!(sandbox.failure.unwrap().reason, "MONITOR_DIED");
    eventually("resources stay taken", async || host.monitors().is_empty()).await;
    let refused = run(&mut client, &id, &["exit", "0"]).await.unwrap_err();
    assert_eq!(reason(&refused), "SANDBOX_FAILED");
    delete(&mut client, &id, false).await;
    host.assert_nothing_left();
    assert_all_is_free(&daemon).await;
}

pub(super) async fn a_guest_that_ends_itself_is_failed() {
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    for (program, expected) in [("panic", "GUEST_PANIC"), ("poweroff", "GUEST_POWERED_OFF")] {
        let id = make(&mut client).await;
        let status = run(&mut client, &id, &[program]).await.unwrap_err();
        assert_eq!(
            (status.code(), reason(&status).as_str()),
            (Code::Unavailable, "SANDBOX_DIED")
        );
        let details = status.get_error_details();
        let metadata = &details.error_info().unwrap().metadata;
        assert_eq!(metadata["failure_reason"], expected);
        if program == "panic" {
            assert!(metadata["console_tail"].contains("Kernel panic"));
        }
        assert_eq!(
            get(&mut client, &id).await.failure.unwrap().reason,
            expected
        );
        delete(&mut client, &id, false).await;
    }
    host.assert_nothing_left();
    assert_all_is_free(&daemon).await;
}

pub(super) async fn a_boot_that_fails_says_why_and_leaves_nothing() {
    let host = host_with(&FAST.replace("boot_ms = 20000", "boot_ms = 1500"));
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    for (template, code, expected, says) in [
        (
            "refuse",
            Code::FailedPrecondition,
            "KERNEL_INVALID",
            "of no use",
        ),
        (
            "emulation",
            Code::FailedPrecondition,
            "EMULATION_FAILED",
            "images/bench/run",
        ),
        ("die", Code::Unavailable, "MONITOR_DIED", "monitor ended"),
        ("mute", Code::DeadlineExceeded, "BOOT_TIMEOUT", "1500 ms"),
    ] {
        let status = create(&mut client, template).await.unwrap_err();
        assert_eq!(
            (status.code(), reason(&status).as_str()),
            (code, expected),
            "{status:?}"
        );
        assert!(status.message().contains(says), "{status:?}");
        if template == "mute" {
            let details = status.get_error_details();
            let metadata = &details.error_info().unwrap().metadata;
            assert!(metadata["console_tail"].contains("Linux version"));
        }
        host.assert_nothing_left();
    }
    assert_all_is_free(&daemon).await;
    assert!(list(&mut client).await.is_empty());
}

pub(super) async fn deleting_works_while_starting_and_many_times() {
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let mut creating = client.clone();
    let creating = tokio::spawn(async move { create(&mut creating, "mute").await });
    eventually("nothing starts", async || !host.monitors().is_empty()).await;
    let id = list(&mut client).await[0].id.clone();
    let deletes: Vec<_> = (0..8)
        .map(|_| {
            let (mut client, id) = (client.clone(), id.clone());
            tokio::spawn(async move { delete(&mut client, &id, false).await })
        })
        .collect();
    for delete in deletes {
        delete.await.unwrap();
    }
    let status = creating.await.unwrap().unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::Aborted, "SANDBOX_DELETED")
    );
    host.assert_nothing_left();
    // A caller that goes away while its sandbox starts leaves none.
    let mut leaving = client.clone();
    let leaving = tokio::spawn(async move { create(&mut leaving, "mute").await });
    eventually("nothing starts", async || !host.monitors().is_empty()).await;
    leaving.abort();
    eventually("it stays", async || list(&mut client).await.is_empty()).await;
    host.assert_nothing_left();
    assert_all_is_free(&daemon).await;
}

pub(super) async fn a_stubborn_guest_is_killed() {
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let id = create(&mut client, "stubborn")
        .await
        .unwrap()
        .sandbox
        .unwrap()
        .id;
    delete(&mut client, &id, false).await;
    host.assert_nothing_left();
    // A forced delete overtakes one that waits for the guest.
    let id = create(&mut client, "stubborn")
        .await
        .unwrap()
        .sandbox
        .unwrap()
        .id;
    let (mut patient, patient_id) = (client.clone(), id.clone());
    let patient = tokio::spawn(async move { delete(&mut patient, &patient_id, false).await });
    eventually("no stop", async || {
        get(&mut client, &id).await.state() == SandboxState::Stopping
    })
    .await;
    delete(&mut client, &id, true).await;
    patient.await.unwrap();
    host.assert_nothing_left();
    assert_all_is_free(&daemon).await;
}

pub(super) async fn a_repeated_request_makes_one_sandbox() {
    let host = host();
    let mut daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let mut repeated = request("base");
    repeated.request_id = "one".to_owned();
    let calls: Vec<_> = (0..6)
        .map(|_| {
            let (mut client, request) = (client.clone(), repeated.clone());
            tokio::spawn(async move { client.create_sandbox(request).await.unwrap().into_inner() })
        })
        .collect();
    let mut replies = Vec::new();
    for call in calls {
        replies.push(call.await.unwrap());
    }
    assert!(replies.iter().all(|reply| *reply == replies[0]));
    assert_eq!(list(&mut client).await.len(), 1);
    // Also by the next daemon.
    daemon.kill();
    let next = host.start();
    let mut client = next.sandboxes().await;
    let again = client
        .create_sandbox(repeated.clone())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(again, replies[0]);
    repeated.template = "stubborn".to_owned();
    let other = client.create_sandbox(repeated).await.unwrap_err();
    assert_eq!(other.code(), Code::AlreadyExists);
    assert!(host.soulbox(&["rm", "--all"]).status.success());
    host.assert_nothing_left();
}

pub(super) async fn creates_never_oversell() {
    let host = host_with(&FAST.replace("vcpus = 8", "vcpus = 3"));
    let daemon = host.start();
    let client = daemon.sandboxes().await;
    let creates: Vec<_> = (0..8)
        .map(|_| {
            let mut client = client.clone();
            tokio::spawn(async move { create(&mut client, "base").await })
        })
        .collect();
    let mut made = 0;
    for create in creates {
        match create.await.unwrap() {
            Ok(_) => made += 1,
            Err(status) => {
                assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
                assert!(
                    status.message().contains("vcpus (1 wanted, 0 left)"),
                    "{status:?}"
                );
                assert!(status.get_error_details().retry_info().is_some());
            }
        }
    }
    assert_eq!(made, 3);
    assert!(host.soulbox(&["rm", "--all"]).status.success());
    assert_all_is_free(&daemon).await;
    host.assert_nothing_left();
}

pub(super) async fn a_time_to_live_ends() {
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let mut short = request("base");
    short.ttl = Some(prost_types::Duration {
        seconds: 2,
        nanos: 0,
    });
    let created = client.create_sandbox(short).await.unwrap().into_inner();
    assert!(created.sandbox.unwrap().expire_time.is_some());
    eventually("it lives on", async || list(&mut client).await.is_empty()).await;
    host.assert_nothing_left();
    assert_all_is_free(&daemon).await;
}
