//! Calls to guests' services, and what becomes of them.

use soulbox_proto::guest::v1::code_service_client::CodeServiceClient;
use soulbox_proto::guest::v1::filesystem_service_client::FilesystemServiceClient;
use soulbox_proto::guest::v1::metrics_service_client::MetricsServiceClient;
use soulbox_proto::guest::v1::{GetMetricsRequest, RunCodeRequest, StatRequest, WatchRequest};

use super::*;
use crate::raw::hostile;

/// A call of each kind that would never end by itself.
async fn endless(client: &mut Client, id: &str) -> Vec<tokio::task::JoinHandle<Status>> {
    let mut events = exec(client, id, &["sleep"]).await;
    started(&mut events).await;
    let run = RunCodeRequest {
        code: "wait".to_owned(),
        ..RunCodeRequest::default()
    };
    let mut code = CodeServiceClient::new(client.channel.clone());
    let mut ran = code.run_code(to(id, run)).await.unwrap().into_inner();
    ran.message().await.unwrap().unwrap();
    let mut files = FilesystemServiceClient::new(client.channel.clone());
    let watch = files.watch(to(id, WatchRequest::default())).await;
    let mut watch = watch.unwrap().into_inner();
    watch.message().await.unwrap().unwrap();
    vec![
        tokio::spawn(async move { finish(&mut events).await.unwrap_err() }),
        tokio::spawn(async move { ran.message().await.unwrap_err() }),
        tokio::spawn(async move {
            watch.message().await.unwrap().unwrap();
            watch.message().await.unwrap_err()
        }),
    ]
}

pub(super) async fn every_end_of_a_sandbox_ends_its_calls() {
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let id = make(&mut client).await;
    let saved = save(&mut client, &id, "").await.unwrap().id;
    for expected in [
        "SANDBOX_PAUSED",
        "SANDBOX_ROLLED_BACK",
        "SANDBOX_DELETED",
        "SANDBOX_DIED",
    ] {
        let other = make(&mut client).await;
        let id = if expected == "SANDBOX_DIED" {
            &other
        } else {
            &id
        };
        let calls = endless(&mut client, id).await;
        match expected {
            "SANDBOX_PAUSED" => drop(pause(&mut client, id).await.unwrap()),
            "SANDBOX_ROLLED_BACK" => drop(roll_back(&mut client, id, &saved).await.unwrap()),
            "SANDBOX_DELETED" => {
                // It is somebody's template else.
                delete(&mut client, id, true).await;
            }
            _ => host.monitors().into_iter().for_each(kill),
        }
        for call in calls {
            let status = call.await.unwrap();
            assert_eq!(
                (status.code(), reason(&status).as_str()),
                (Code::Unavailable, expected),
                "{status:?}"
            );
        }
        if expected == "SANDBOX_PAUSED" {
            resume(&mut client, id).await.unwrap();
        }
        if expected == "SANDBOX_PAUSED" || expected == "SANDBOX_ROLLED_BACK" {
            // In another machine, on other connections.
            let (_, status) = run(&mut client, id, &["exit", "3"]).await.unwrap();
            assert_eq!(status, exited::Status::Code(3));
        }
        delete(&mut client, &other, true).await;
    }
}

fn dialled(host: &Host, id: &str) -> usize {
    let log = fs::read_to_string(vmm_log(host, id)).unwrap();
    log.lines().filter(|line| *line == "dialled").count()
}

pub(super) async fn connections_are_used_again_and_few_are_kept() {
    const KEPT: usize = 4;
    const AT_ONCE: usize = 10;
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let id = make(&mut client).await;
    assert_eq!(dialled(&host, &id), 1, "the daemon's own calls share one");
    let mut metrics = MetricsServiceClient::new(client.channel.clone());
    for _ in 0..10 {
        run(&mut client, &id, &["exit", "0"]).await.unwrap();
        let ask = GetMetricsRequest::default();
        metrics.get_metrics(to(&id, ask)).await.unwrap();
    }
    assert_eq!(dialled(&host, &id), 2);
    let at_once = async |client: &mut Client| {
        let mut running = Vec::new();
        for _ in 0..AT_ONCE {
            let input = ExecRequest {
                message: Some(exec_request::Message::Input(ProcessInput {
                    input: Some(process_input::Input::Stdin("over".into())),
                })),
            };
            let (send, requests) = tokio::sync::mpsc::channel(2);
            send.send(start(&["cat"])).await.unwrap();
            let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
            let call = client.processes().exec(to(&id, requests)).await;
            let mut events = call.unwrap().into_inner();
            started(&mut events).await;
            send.send(input).await.unwrap();
            running.push((send, events));
        }
        for (send, mut events) in running {
            drop(send);
            let (bytes, _) = finish(&mut events).await.unwrap();
            assert_eq!(bytes, "over".len());
            while events.message().await.unwrap().is_some() {}
        }
    };
    at_once(&mut client).await;
    assert_eq!(dialled(&host, &id), 2 + AT_ONCE - 1);
    at_once(&mut client).await;
    assert_eq!(dialled(&host, &id), 2 + AT_ONCE - 1 + AT_ONCE - KEPT);
    // One whose caller went away is not used again.
    let before = dialled(&host, &id);
    for _ in 0..KEPT + 1 {
        let mut events = exec(&mut client, &id, &["sleep"]).await;
        started(&mut events).await;
    }
    let log = vmm_log(&host, &id);
    eventually("programs go on", async || {
        let log = fs::read_to_string(&log).unwrap();
        log.lines().filter(|line| *line == "ended: sleep").count() == KEPT + 1
    })
    .await;
    assert_eq!(dialled(&host, &id), before + 1);
    delete(&mut client, &id, false).await;
    host.assert_nothing_left();
}

pub(super) async fn what_a_hostile_agent_says_does_no_harm() {
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let id = make(&mut client).await;
    let mut metrics = MetricsServiceClient::new(client.channel.clone());
    for processes in hostile::ALL {
        let status = metrics
            .get_metrics(to(&id, GetMetricsRequest { processes }))
            .await
            .unwrap_err();
        assert_eq!(
            (status.code(), reason(&status).as_str()),
            (Code::Internal, "AGENT_FAILED"),
            "{processes}: {status:?}"
        );
        let size = status.message().len() + status.details().len();
        assert!(size < 4096, "{processes}: {status:?}");
        assert!(!status.message().contains('\x1b'), "{status:?}");
        assert!(status.metadata().get("soulbox-forged").is_none());
        let reply = metrics
            .get_metrics(to(&id, GetMetricsRequest::default()))
            .await;
        let reply = reply.unwrap();
        assert!(reply.metadata().get("soulbox-forged").is_none());
        assert_eq!(reply.get_ref().cpus, 2);
    }
    // What a guest's services refuse is told, with their reason alone.
    let mut files = FilesystemServiceClient::new(client.channel.clone());
    let mut stat = to(&id, StatRequest::default());
    let secret = "Bearer secret".parse().unwrap();
    stat.metadata_mut().insert("authorization", secret);
    let status = files.stat(stat).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str(), status.message()),
        (Code::NotFound, "FILE_NOT_FOUND", "there is no such file")
    );
    let details = status.get_error_details();
    assert!(details.error_info().unwrap().metadata.is_empty());
    delete(&mut client, &id, false).await;
    host.assert_nothing_left();
}

pub(super) async fn a_sandbox_goes_with_its_call_however_that_ends() {
    let host = host();
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let gone = async |client: &mut Client| list(client).await.is_empty();
    for program in ["exit", "missing", "poweroff"] {
        let id = make(&mut client).await;
        let requests = tokio_stream::once(start(&[program, "0"]));
        let ended = match client.processes().exec(last_to(&id, requests)).await {
            Ok(events) => {
                let mut events = events.into_inner();
                loop {
                    match events.message().await {
                        Ok(Some(_)) => {}
                        Ok(None) => break Ok(()),
                        Err(status) => break Err(status),
                    }
                }
            }
            Err(status) => Err(status),
        };
        assert_eq!(ended.is_ok(), program == "exit", "{program}: {ended:?}");
        // It is gone when the call is over.
        assert!(gone(&mut client).await, "{program}");
    }
    let mut metrics = MetricsServiceClient::new(client.channel.clone());
    let id = make(&mut client).await;
    let ask = GetMetricsRequest::default();
    metrics.get_metrics(last_to(&id, ask)).await.unwrap();
    assert!(gone(&mut client).await);
    let id = make(&mut client).await;
    pause(&mut client, &id).await.unwrap();
    let refused = metrics.get_metrics(last_to(&id, ask)).await.unwrap_err();
    assert_eq!(reason(&refused), "SANDBOX_PAUSED");
    assert!(gone(&mut client).await);
    // The caller goes first.
    let id = make(&mut client).await;
    let requests = tokio_stream::once(start(&["sleep"]));
    let call = client.processes().exec(last_to(&id, requests)).await;
    drop(call.unwrap());
    eventually("it stays", async || gone(&mut client).await).await;
    host.assert_nothing_left();
    assert_all_is_free(&daemon).await;
}

pub(super) async fn a_daemon_that_stops_tells_its_calls() {
    let host = host();
    let mut daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let id = make(&mut client).await;
    let calls = endless(&mut client, &id).await;
    daemon.terminate();
    for call in calls {
        let status = call.await.unwrap();
        assert_eq!(
            (status.code(), reason(&status).as_str()),
            (Code::Unavailable, "DRAINING"),
            "{status:?}"
        );
    }
    // The sandbox itself goes on.
    let next = host.start();
    let mut client = next.sandboxes().await;
    run(&mut client, &id, &["exit", "0"]).await.unwrap();
    delete(&mut client, &id, false).await;
    host.assert_nothing_left();
}
