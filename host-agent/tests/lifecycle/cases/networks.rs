//! Sandboxes with networks, on a host whose namespaces are the test's own.

use std::process::Command;

use soulbox_proto::host::v1::network_service_client::NetworkServiceClient;
use soulbox_proto::host::v1::{
    GetNetworkRequest, NetworkLimit, NetworkPolicy, NetworkRule, SetNetworkRequest,
};

use super::*;

const NETWORK: &str = "[network]\nslots_ready = 1\nslots_max = 4\n";

/// A daemon in new namespaces, with nothing but loopback.
fn start_apart(host: &Host) -> Daemon {
    let mut unshare = Command::new("unshare");
    let set_up = "mount -t tmpfs none /run; mkdir /run/netns; ip link set lo up; exec \"$@\"";
    let args = [
        "--net",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-ec",
        set_up,
        "sh",
    ];
    unshare.args(args);
    host.start_through(unshare)
}

/// Something in the namespaces of a process.
fn beside(pid: i32) -> Command {
    let mut nsenter = Command::new("nsenter");
    nsenter.args(["--target", &pid.to_string(), "--net", "--mount"]);
    nsenter
}

/// The rules of all slots.
fn rules(daemon: &Daemon) -> String {
    let script = "for slot in /run/netns/*; do \
                  nsenter --net=$slot nft --stateless list ruleset; done";
    let listed = beside(daemon.pid())
        .args(["sh", "-ec", script])
        .output()
        .unwrap();
    assert!(listed.status.success(), "{listed:?}");
    String::from_utf8(listed.stdout).unwrap()
}

fn denying(cidr: &str, bytes_per_second: u64) -> NetworkPolicy {
    NetworkPolicy {
        internet: true,
        deny: vec![NetworkRule {
            cidr: cidr.to_owned(),
            protocol: "any".to_owned(),
            ports: Vec::new(),
        }],
        send: Some(NetworkLimit {
            bytes_per_second,
            packets_per_second: 0,
        }),
        ..NetworkPolicy::default()
    }
}

pub(super) async fn a_policy_is_everywhere_or_nowhere() {
    let host = host_with(&format!("{FAST}{NETWORK}"));
    let mut daemon = start_apart(&host);
    let mut client = daemon.sandboxes().await;
    let created = create(&mut client, "base").await.unwrap();
    let id = created.sandbox.unwrap().id;
    let set = async |daemon: &Daemon, policy| {
        let request = SetNetworkRequest {
            sandbox_id: id.clone(),
            policy: Some(policy),
        };
        let mut client = NetworkServiceClient::new(daemon.channel().await);
        client.set_network(request).await
    };
    let get = async |daemon: &Daemon| {
        let request = GetNetworkRequest {
            sandbox_id: id.clone(),
        };
        let mut client = NetworkServiceClient::new(daemon.channel().await);
        let got = client.get_network(request).await.unwrap().into_inner();
        got.policy.unwrap()
    };
    let monitor_was_told = |limit: &str| {
        let log = fs::read_to_string(vmm_log(&host, &id)).unwrap();
        log.matches(&format!("sends at most {limit} ")).count()
    };

    let first = denying("203.0.113.0/24", 1_000_000);
    set(&daemon, first.clone()).await.unwrap();
    let enforced = rules(&daemon);
    assert!(enforced.contains("203.0.113.0/24"), "{enforced}");
    assert_eq!(monitor_was_told("1000000"), 1);

    // The monitor refuses when the firewall has it already.
    host.fault("set-net:refuse");
    let second = denying("198.51.100.0/24", 2_000_000);
    let refused = set(&daemon, second.clone()).await.unwrap_err();
    assert_eq!(reason(&refused), "NETWORK_FAILED", "{refused:?}");
    assert_eq!(rules(&daemon), enforced);
    assert_eq!(get(&daemon).await.deny, first.deny);
    host.no_fault();

    // A daemon that dies on the way: the next makes it so everywhere.
    host.fault("set-net:hang");
    let setting = {
        let mut client = NetworkServiceClient::new(daemon.channel().await);
        let request = SetNetworkRequest {
            sandbox_id: id.clone(),
            policy: Some(second.clone()),
        };
        tokio::spawn(async move { client.set_network(request).await })
    };
    eventually("the monitor is not asked", async || {
        host.path("here").exists()
    })
    .await;
    host.no_fault();
    daemon.kill();
    assert!(setting.await.unwrap().is_err());
    let next = host.start_through(beside(host.monitors()[0]));
    assert_eq!(get(&next).await.deny, second.deny);
    let enforced = rules(&next);
    assert!(
        enforced.contains("198.51.100.0/24") && !enforced.contains("203.0.113.0/24"),
        "{enforced}"
    );
    assert_eq!(monitor_was_told("2000000"), 1);
    assert!(host.soulbox(&["rm", "--all", "--force"]).status.success());
    host.assert_nothing_left();
}
