//! Daemons that stop, die and start again.

use super::*;

pub(super) async fn a_killed_daemon_is_followed_by_one_that_adopts() {
    let host = host();
    let mut daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let lives = make(&mut client).await;
    let dies = make(&mut client).await;
    let monitors = host.monitors();
    daemon.kill();
    let log = host.path("state/sandboxes").join(&dies).join("vmm.log");
    let victim = monitors
        .into_iter()
        .find(|pid| fs::read_link(format!("/proc/{pid}/fd/1")).is_ok_and(|path| path == log));
    let victim = rustix::process::Pid::from_raw(victim.unwrap()).unwrap();
    rustix::process::kill_process(victim, rustix::process::Signal::KILL).unwrap();

    let mut next = host.start();
    let summary = next.wait_for_log("records and host agree");
    assert!(
        summary.contains("adopted=1") && summary.contains("failed=1"),
        "{summary}"
    );
    let mut client = next.sandboxes().await;
    let mut events = exec(&mut client, &lives, &["exit", "5"]).await;
    assert_eq!(
        finish(&mut events).await.unwrap().1,
        exited::Status::Code(5)
    );
    assert_eq!(get(&mut client, &dies).await.state(), SandboxState::Failed);
    delete(&mut client, &lives, false).await;
    delete(&mut client, &dies, false).await;
    host.assert_nothing_left();
    assert_all_is_free(&next).await;
}

pub(super) async fn a_daemon_that_stops_keeps_or_stops_its_sandboxes() {
    let host = host();
    let mut daemon = host.start();
    let id = make(&mut daemon.sandboxes().await).await;
    daemon.terminate();
    assert_eq!(host.monitors().len(), 1);
    let mut next = host.start();
    assert!(next.wait_for_log("adopted").contains(&id));
    next.terminate();
    let config = fs::read_to_string(host.path("soulboxd.toml")).unwrap();
    let stops = format!("{config}\n[shutdown]\nsandboxes = \"stop\"\n");
    fs::write(host.path("soulboxd.toml"), stops).unwrap();
    let mut last = host.start();
    last.wait_for_log("adopted");
    last.terminate();
    host.assert_nothing_left();
}

pub(super) async fn a_sandbox_of_a_call_goes_with_it_when_the_daemon_went_first() {
    let host = host();
    let mut daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let id = make(&mut client).await;
    let kept = make(&mut client).await;
    let requests = tokio_stream::once(start(&["sleep"]));
    let call = client.processes().exec(last_to(&id, requests)).await;
    let mut events = call.unwrap().into_inner();
    started(&mut events).await;
    daemon.kill();
    let mut next = host.start();
    let summary = next.wait_for_log("records and host agree");
    assert!(
        summary.contains("adopted=1") && summary.contains("deleted=1"),
        "{summary}"
    );
    assert!(next.wait_for_log("was to go with a call").contains(&id));
    let mut client = next.sandboxes().await;
    delete(&mut client, &kept, false).await;
    assert!(list(&mut client).await.is_empty());
    host.assert_nothing_left();
    assert_all_is_free(&next).await;
}

pub(super) async fn a_hung_monitor_holds_up_no_start() {
    let host = host();
    let mut daemon = host.start();
    let mut client = daemon.sandboxes().await;
    for _ in 0..3 {
        make(&mut client).await;
    }
    daemon.kill();
    for monitor in &host.monitors()[..2] {
        let pid = rustix::process::Pid::from_raw(*monitor).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    }
    // One that is asked to stop before it is ready does.
    let mut asked = host
        .soulboxd()
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(asked.stderr.take().unwrap())
        .lines()
        .map(Result::unwrap);
    assert!(log.any(|line| line.contains("adopted")));
    let pid = rustix::process::Pid::from_raw(asked.id().try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let rest: Vec<String> = log.collect();
    assert!(asked.wait().unwrap().success(), "{rest:#?}");
    assert!(
        rest.iter()
            .any(|line| line.contains("stopped before it was ready")),
        "{rest:#?}"
    );

    let mut next = host.start();
    let summary = next.wait_for_log("records and host agree");
    assert!(
        summary.contains("adopted=1") && summary.contains("failed=2"),
        "{summary}"
    );
    let reasons: Vec<_> = list(&mut next.sandboxes().await)
        .await
        .into_iter()
        .filter_map(|sandbox| sandbox.failure)
        .map(|failure| failure.reason)
        .collect();
    assert_eq!(reasons, ["MONITOR_LOST", "MONITOR_LOST"]);
    assert!(host.soulbox(&["rm", "--all"]).status.success());
    host.assert_nothing_left();
    assert_all_is_free(&next).await;
}

pub(super) async fn a_retry_after_a_passing_failure_is_a_new_try() {
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let with_id = |template: &str, request_id: &str| CreateSandboxRequest {
        request_id: request_id.to_owned(),
        ..request(template)
    };
    let died = client.create_sandbox(with_id("die", "one")).await;
    assert_eq!(reason(&died.unwrap_err()), "MONITOR_DIED");
    client.create_sandbox(with_id("base", "one")).await.unwrap();
    // One that every try would have is remembered.
    let refused = client.create_sandbox(with_id("refuse", "two")).await;
    assert_eq!(reason(&refused.unwrap_err()), "KERNEL_INVALID");
    let other = client.create_sandbox(with_id("base", "two")).await;
    assert_eq!(reason(&other.unwrap_err()), "REQUEST_ID_REUSED");
    assert!(host.soulbox(&["rm", "--all"]).status.success());
    host.assert_nothing_left();
}

pub(super) async fn a_cut_off_start_is_undone() {
    let host = host();
    let mut daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let mut starting = request("mute");
    starting.request_id = "cut off".to_owned();
    let call = tokio::spawn(async move { client.create_sandbox(starting).await });
    eventually("nothing starts", async || !host.monitors().is_empty()).await;
    daemon.kill();
    assert!(call.await.unwrap().is_err());
    let mut next = host.start();
    let summary = next.wait_for_log("records and host agree");
    assert!(summary.contains("undone=1"), "{summary}");
    host.assert_nothing_left();
    // Its id is free again.
    let mut client = next.sandboxes().await;
    let mut again = request("base");
    again.request_id = "cut off".to_owned();
    client.create_sandbox(again).await.unwrap();
    assert!(host.soulbox(&["rm", "--all", "--force"]).status.success());
    host.assert_nothing_left();
}

pub(super) async fn watchers_see_every_step() {
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let first = make(&mut client).await;
    let changes = client
        .watch_sandboxes(WatchSandboxesRequest::default())
        .await;
    let mut changes = changes.unwrap().into_inner();
    let mut second_client = client.clone();
    let mut seen = Vec::new();
    let next = async |changes: &mut Streaming<_>, seen: &mut Vec<(Kind, SandboxState)>| {
        let change: soulbox_proto::host::v1::WatchSandboxesResponse =
            changes.message().await.unwrap().unwrap();
        let sandbox = change.sandbox.as_ref().unwrap();
        seen.push((change.kind(), sandbox.state()));
        (change.kind(), sandbox.id.clone())
    };
    assert_eq!(
        next(&mut changes, &mut seen).await,
        (Kind::Current, first.clone())
    );
    let id = make(&mut second_client).await;
    delete(&mut second_client, &id, false).await;
    while next(&mut changes, &mut seen).await.0 != Kind::Deleted {}
    seen.dedup();
    use SandboxState::{Pending, Running, Starting, Stopped, Stopping};
    let steps = [Pending, Starting, Running, Stopping, Stopped];
    let mut expected = vec![(Kind::Current, Running)];
    expected.extend(steps.map(|state| (Kind::Changed, state)));
    expected.push((Kind::Deleted, Stopped));
    assert_eq!(seen, expected);
    delete(&mut second_client, &first, true).await;
    host.assert_nothing_left();
}
