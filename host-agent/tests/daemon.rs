//! The real soulboxd and soulbox, as far as they go without a guest.

#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::process::Command;

use soulbox_proto::guest::SANDBOX_METADATA;
use soulbox_proto::guest::v1::system_service_client::SystemServiceClient;
use soulbox_proto::guest::v1::{HealthRequest, ListProcessesRequest};
use soulbox_proto::host::v1::{
    CreateSandboxRequest, DeleteSandboxRequest, GetNodeRequest, GetSandboxRequest,
    ListSandboxesRequest, ListTemplatesRequest, Resources, WatchSandboxesRequest,
};
use support::{AARCH64, Host, X86_64, elf, fields, reason, to};
use tonic::{Code, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};

const SERVICES: [&str; 3] = [
    "",
    "soulbox.host.v1.SandboxService",
    "soulbox.host.v1.NodeService",
];

const NO_SANDBOX: &str = "sb-aaaaaaaaaaaaaaaaaaaa";

fn create(template: &str, vcpus: u32, memory_mib: u32) -> CreateSandboxRequest {
    CreateSandboxRequest {
        template: template.to_owned(),
        resources: Some(Resources {
            vcpus,
            memory_mib,
            disk_mib: 0,
        }),
        ..CreateSandboxRequest::default()
    }
}

async fn refused(daemon: &support::Daemon, request: CreateSandboxRequest) -> Status {
    let mut client = daemon.sandboxes().await;
    client.create_sandbox(request).await.unwrap_err()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn the_configuration_is_checked_whole() {
    let good = Host::new("");
    let output = good.soulboxd().arg("--check-config").output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(!good.path("state").exists(), "checking opens nothing");

    let bad = Host::new("[defaults]\nvcpus = 0\n[timeouts]\nboot_ms = 0\n");
    let output = bad.soulboxd().arg("--check-config").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let told = text(&output.stderr);
    for expected in ["defaults.vcpus: is 0; give 1 to 32", "timeouts.boot_ms"] {
        assert!(told.contains(expected), "{told}");
    }

    let unknown = Host::new("[capacity]\nmemory_gib = 3\n");
    let output = unknown.soulboxd().output().unwrap();
    let told = text(&output.stderr);
    assert!(
        !output.status.success() && told.contains("memory_gib"),
        "{told}"
    );
}

#[test]
fn the_printed_defaults_are_a_valid_file() {
    let output = Command::new(env!("CARGO_BIN_EXE_soulboxd"))
        .arg("--print-default-config")
        .output()
        .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("soulboxd.toml");
    std::fs::write(&file, &output.stdout).unwrap();
    let checked = Command::new(env!("CARGO_BIN_EXE_soulboxd"))
        .args(["--check-config", "--config"])
        .arg(&file)
        .output()
        .unwrap();
    assert!(checked.status.success(), "{}", text(&checked.stderr));
    let missing = Command::new(env!("CARGO_BIN_EXE_soulboxd"))
        .args(["--check-config", "--config", "/none.toml"])
        .output()
        .unwrap();
    assert!(text(&missing.stderr).contains("--print-default-config"));
}

#[test]
fn a_second_daemon_is_refused_and_the_first_serves_on() {
    let host = Host::new("");
    let mut first = host.start();
    let output = host.soulboxd().output().unwrap();
    assert!(!output.status.success());
    let told = text(&output.stderr);
    assert!(told.contains("another soulboxd uses"), "{told}");
    assert!(host.soulbox(&["ls"]).status.success());
    first.terminate();
}

#[test]
fn sigterm_ends_it_cleanly_and_kill_leaves_what_the_next_one_mends() {
    let host = Host::new("");
    let mut daemon = host.start();
    assert!(host.socket().exists());
    daemon.terminate();
    assert!(!host.socket().exists());
    host.assert_nothing_left();

    let mut killed = host.start();
    killed.kill();
    assert!(host.socket().exists());
    let stray = host.path("state/sandboxes").join(NO_SANDBOX);
    std::fs::create_dir_all(&stray).unwrap();
    let mut next = host.start();
    next.wait_for_log("a folder without a sandbox");
    assert!(
        next.wait_for_log("records and host agree")
            .contains("stray_folders=1")
    );
    assert!(host.soulbox(&["ls"]).status.success());
    host.assert_nothing_left();
    next.terminate();
}

#[tokio::test]
async fn draining_is_told_and_ends_watchers() {
    let host = Host::new("");
    let mut daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let mut changes = client
        .watch_sandboxes(WatchSandboxesRequest::default())
        .await
        .unwrap()
        .into_inner();
    let mut health = HealthClient::new(daemon.channel().await);
    let mut healths = Vec::new();
    for service in SERVICES {
        let request = HealthCheckRequest {
            service: service.to_owned(),
        };
        let mut watched = health.watch(request).await.unwrap().into_inner();
        let now = watched.message().await.unwrap().unwrap();
        assert_eq!(now.status(), ServingStatus::Serving, "{service}");
        healths.push(watched);
    }
    daemon.signal(rustix::process::Signal::TERM);
    for mut watched in healths {
        let now = watched.message().await.unwrap().unwrap();
        assert_eq!(now.status(), ServingStatus::NotServing);
    }
    let ended = changes.message().await.unwrap_err();
    assert_eq!(
        (ended.code(), reason(&ended).as_str()),
        (Code::Unavailable, "DRAINING")
    );
    assert!(daemon.wait().success());
}

#[tokio::test]
async fn without_kvm_everything_else_works() {
    let missing = Path::new("/none/kvm");
    let host = Host::with_paths(&[("kvm", missing)], "");
    host.template("base", &elf(X86_64, 1 << 20));
    let daemon = host.start();
    let node = daemon
        .node()
        .await
        .get_node(GetNodeRequest {})
        .await
        .unwrap();
    let kvm = node.into_inner().node.unwrap().kvm.unwrap();
    assert!(!kvm.usable);
    assert!(kvm.problem.contains("/none/kvm is missing") && kvm.problem.contains("modprobe"));
    let status = refused(&daemon, create("base", 1, 128)).await;
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert_eq!(reason(&status), "KVM_UNAVAILABLE");

    let output = host.soulbox(&["run", "--", "true"]);
    assert_eq!(output.status.code(), Some(125));
    let told = text(&output.stderr);
    assert!(told.starts_with("soulbox: /none/kvm is missing"), "{told}");
    let listed = host.soulbox(&["--output", "json", "ls"]);
    assert_eq!(text(&listed.stdout).trim(), "[]");
    host.assert_nothing_left();
}

#[tokio::test]
async fn what_no_sandbox_can_have_is_refused_by_name() {
    let host =
        Host::new("[capacity]\nvcpus = 64\nmemory_mib = 2048\n[templates]\nsnapshot = false\n");
    host.template("base", &elf(X86_64, 1 << 20));
    let daemon = host.start();
    for (request, field) in [
        (create("base", 33, 128), "resources.vcpus"),
        (create("base", 1, 127), "resources.memory_mib"),
        (create("base", 1, 4096), "resources.memory_mib"),
    ] {
        let status = refused(&daemon, request).await;
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert_eq!(fields(&status), [field]);
    }
    let zero = host.soulbox(&["create", "--vcpus", "0"]);
    assert_eq!(zero.status.code(), Some(2));
    assert!(text(&zero.stderr).contains("--vcpus"));
    let node = daemon
        .node()
        .await
        .get_node(GetNodeRequest {})
        .await
        .unwrap();
    let node = node.into_inner().node.unwrap();
    assert_eq!(node.capacity, node.allocatable);
}

#[tokio::test]
async fn a_bad_template_is_refused_by_what_is_wrong_with_it() {
    let host = Host::new("[capacity]\nmemory_mib = 8192\n[templates]\nsnapshot = false\n");
    let kernel = elf(X86_64, 1 << 20);
    for name in ["missing", "truncated"] {
        host.template(name, &kernel);
    }
    host.template("arm", &elf(AARCH64, 1 << 20));
    host.template("large", &elf(X86_64, 1 << 30));
    host.template("text", b"#!/bin/sh\n");
    let file = |name: &str| host.path("templates").join(name);
    std::fs::remove_file(file("missing/vmlinux")).unwrap();
    std::fs::write(file("truncated/vmlinux"), &kernel[..50]).unwrap();
    let daemon = host.start();
    for (template, code, expected) in [
        ("none", Code::NotFound, "TEMPLATE_NOT_FOUND"),
        ("missing", Code::FailedPrecondition, "TEMPLATE_FILE_MISSING"),
        (
            "truncated",
            Code::FailedPrecondition,
            "TEMPLATE_FILE_TRUNCATED",
        ),
        ("arm", Code::FailedPrecondition, "KERNEL_WRONG_ARCHITECTURE"),
        ("large", Code::InvalidArgument, "KERNEL_TOO_LARGE"),
        ("text", Code::FailedPrecondition, "KERNEL_INVALID"),
    ] {
        let status = refused(&daemon, create(template, 1, 128)).await;
        assert_eq!(
            (status.code(), reason(&status).as_str()),
            (code, expected),
            "{status:?}"
        );
        if template == "none" {
            assert!(
                status
                    .message()
                    .ends_with("there are: arm, large, missing, text, truncated")
            );
        }
    }
    let mut client = daemon.sandboxes().await;
    let listed = client
        .list_templates(ListTemplatesRequest {})
        .await
        .unwrap();
    let problems: Vec<(String, bool)> = listed
        .into_inner()
        .templates
        .into_iter()
        .map(|template| (template.name, template.problem.is_empty()))
        .collect();
    let expected = [
        ("arm", false),
        ("large", true),
        ("missing", false),
        ("text", false),
        ("truncated", false),
    ];
    assert_eq!(
        problems,
        expected.map(|(name, usable)| (name.to_owned(), usable))
    );
    host.assert_nothing_left();
}

/// A monitor that ends at once is the nearest to a guest that dies early.
#[tokio::test]
async fn a_monitor_that_dies_at_once_leaves_nothing_and_frees_the_request_id() {
    let host = Host::with_paths(&[("monitor", Path::new("/bin/false"))], "");
    host.template("base", &elf(X86_64, 1 << 20));
    let daemon = host.start();
    let kvm = daemon
        .node()
        .await
        .get_node(GetNodeRequest {})
        .await
        .unwrap();
    if !kvm.into_inner().node.unwrap().kvm.unwrap().usable {
        // Nothing is started without KVM; that is another test.
        return;
    }
    let mut request = create("base", 1, 128);
    request.request_id = "first".to_owned();
    let (first, second) = tokio::join!(
        refused(&daemon, request.clone()),
        refused(&daemon, request.clone())
    );
    assert_eq!(first.message(), second.message());
    assert_eq!(
        (first.code(), reason(&first).as_str()),
        (Code::Unavailable, "MONITOR_DIED")
    );
    request.labels.insert("other".to_owned(), "body".to_owned());
    let other = refused(&daemon, request).await;
    assert_eq!(reason(&other), "MONITOR_DIED");
    let mut client = daemon.sandboxes().await;
    let listed = client.list_sandboxes(ListSandboxesRequest::default()).await;
    assert!(listed.unwrap().into_inner().sandboxes.is_empty());
    host.assert_nothing_left();
}

#[tokio::test]
async fn a_missing_monitor_says_what_to_install() {
    let host = Host::with_paths(&[("monitor", Path::new("/none/soulbox-vmm"))], "");
    host.template("base", &elf(X86_64, 1 << 20));
    let daemon = host.start();
    let status = refused(&daemon, create("base", 1, 128)).await;
    if reason(&status) != "KVM_UNAVAILABLE" {
        assert_eq!(reason(&status), "MONITOR_NOT_STARTED");
        assert!(status.message().contains("paths.monitor"), "{status:?}");
    }
    host.assert_nothing_left();
}

#[tokio::test]
async fn what_is_not_there_is_said_and_deleting_it_succeeds() {
    let host = Host::new("");
    let daemon = host.start();
    let mut client = daemon.sandboxes().await;
    let get = |id: &str| GetSandboxRequest { id: id.to_owned() };
    let status = client.get_sandbox(get(NO_SANDBOX)).await.unwrap_err();
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::NotFound, "SANDBOX_NOT_FOUND")
    );
    let status = client.get_sandbox(get("../etc")).await.unwrap_err();
    assert_eq!(
        (status.code(), fields(&status)),
        (Code::InvalidArgument, vec!["id".to_owned()])
    );
    let delete = DeleteSandboxRequest {
        id: NO_SANDBOX.to_owned(),
        force: false,
    };
    client.delete_sandbox(delete).await.unwrap();
    let mut processes = client.processes();
    let list = ListProcessesRequest {};
    let status = processes.list_processes(to(NO_SANDBOX, list)).await;
    assert_eq!(reason(&status.unwrap_err()), "SANDBOX_NOT_FOUND");
    let status = processes
        .exec(to(NO_SANDBOX, tokio_stream::pending()))
        .await;
    assert_eq!(reason(&status.unwrap_err()), "SANDBOX_NOT_FOUND");
    let status = processes.list_processes(to("../etc", list)).await;
    assert_eq!(fields(&status.unwrap_err()), [SANDBOX_METADATA]);
    let status = processes.list_processes(list).await;
    assert_eq!(fields(&status.unwrap_err()), [SANDBOX_METADATA]);
    // What sets a guest up is the daemon's alone.
    let mut system = SystemServiceClient::new(client.channel.clone());
    let status = system.health(to(NO_SANDBOX, HealthRequest {})).await;
    assert_eq!(status.unwrap_err().code(), Code::Unimplemented);
    let output = host.soulbox(&["exec", NO_SANDBOX, "--", "true"]);
    assert_eq!(output.status.code(), Some(125));
    assert!(host.soulbox(&["rm", NO_SANDBOX]).status.success());
}

#[tokio::test]
async fn the_command_line_asks_for_networks() {
    let host = Host::new("");
    let _daemon = host.start();
    let refused: [(&[&str], &str); 7] = [
        (
            &["create", "--net", "off", "--dns", "127.0.0.53"],
            "network_policy.dns_servers[0] 127.0.0.53",
        ),
        (&["net", "show", NO_SANDBOX], NO_SANDBOX),
        (&["net", "set", NO_SANDBOX, "off"], NO_SANDBOX),
        (&["net", "set", NO_SANDBOX, "--dns", "9.9.9.9"], NO_SANDBOX),
        (&["port", NO_SANDBOX, "80"], NO_SANDBOX),
        (&["port", "--rm", "nonsense"], "host_address"),
        (&["connect", NO_SANDBOX, "80"], NO_SANDBOX),
    ];
    for (args, said) in refused {
        let output = host.soulbox(args);
        let errors = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {errors}");
        assert!(errors.contains(said), "{args:?}: {errors}");
    }
    let forwards = host.soulbox(&["port", "--output", "json"]);
    assert_eq!(text(&forwards.stdout), "[]\n");
    let gone = host.soulbox(&["port", "--rm", "127.0.0.1:1", "--rm", "[::1]:1"]);
    assert_eq!(text(&gone.stdout), "127.0.0.1:1\n[::1]:1\n");
    assert!(gone.status.success());
}

#[tokio::test]
async fn reflection_and_health_answer() {
    let host = Host::new("");
    let daemon = host.start();
    let mut health = HealthClient::new(daemon.channel().await);
    for service in SERVICES {
        let request = HealthCheckRequest {
            service: service.to_owned(),
        };
        let answer = health.check(request).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving, "{service}");
    }
    let mut reflection = ServerReflectionClient::new(daemon.channel().await);
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = reflection
        .server_reflection_info(tokio_stream::once(request))
        .await
        .unwrap()
        .into_inner();
    let answer: ServerReflectionResponse = answers.message().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(services)) = answer.message_response else {
        panic!("{answer:?}");
    };
    let names: Vec<String> = services
        .service
        .into_iter()
        .map(|service| service.name)
        .collect();
    for expected in [
        "soulbox.host.v1.SandboxService",
        "soulbox.host.v1.NodeService",
        "soulbox.host.v1.NetworkService",
        "soulbox.guest.v1.ProcessService",
        "soulbox.guest.v1.FilesystemService",
        "soulbox.guest.v1.CodeService",
        "soulbox.guest.v1.MetricsService",
        "grpc.health.v1.Health",
    ] {
        assert!(names.iter().any(|name| name == expected), "{names:?}");
    }
    for other in ["SystemService", "PortService"] {
        let other = format!("soulbox.guest.v1.{other}");
        assert!(!names.contains(&other), "{names:?}");
    }
}

#[test]
fn the_command_line_says_how_to_reach_a_daemon() {
    let host = Host::new("");
    let output = host.soulbox(&["ls"]);
    assert_eq!(output.status.code(), Some(1));
    let told = text(&output.stderr);
    assert!(
        told.contains("systemctl start soulboxd") && told.contains("--host"),
        "{told}"
    );
    let output = host.soulbox(&["--host", "ftp://x", "run", "true"]);
    assert_eq!(output.status.code(), Some(125));
    assert_eq!(host.soulbox(&["run"]).status.code(), Some(125));
    let completions = host.soulbox(&["completions", "bash"]);
    assert!(completions.status.success() && text(&completions.stdout).contains("template"));
}

#[test]
fn the_socket_is_for_the_owner_and_the_group() {
    use std::os::unix::fs::MetadataExt as _;

    let host = Host::new("");
    let _daemon = host.start();
    let mode = std::fs::metadata(host.socket()).unwrap().mode();
    assert_eq!(mode & 0o777, 0o660);
}
