//! `soulbox net`: what a sandbox may reach.

use soulbox_proto::host::v1::{GetNetworkRequest, NetworkPolicy, SetNetworkRequest};

use super::args::{NetSetArgs, Output};
use super::connect::Host;
use super::error::CliError;
use super::output;
use crate::net::Policy;
use crate::service::convert::{policy_from_proto, policy_to_proto};

pub(super) async fn show(host: &Host, format: Output, id: String) -> Result<u8, CliError> {
    let request = GetNetworkRequest {
        sandbox_id: id.clone(),
    };
    let network = host.network().await?.get_network(request).await?;
    let network = network.into_inner();
    match format {
        Output::Table => output::network_details(&id, &network)?,
        Output::Json => output::json(&output::network(&network))?,
    }
    Ok(0)
}

pub(super) async fn set(host: &Host, format: Output, args: NetSetArgs) -> Result<u8, CliError> {
    let NetSetArgs {
        id,
        policy: base,
        additions,
    } = args;
    if base.is_none() && additions.is_empty() {
        return Err(CliError::NothingToSet);
    }
    let base = base.map(|base| base.policy()).transpose()?;
    let mut client = host.network().await?;
    let base = match base {
        Some(base) => base,
        None => {
            let request = GetNetworkRequest {
                sandbox_id: id.clone(),
            };
            let policy = client.get_network(request).await?.into_inner().policy;
            current(&id, policy)?
        }
    };
    let policy = additions.to(base);
    let request = SetNetworkRequest {
        sandbox_id: id,
        policy: Some(policy_to_proto(&policy)),
    };
    let set = client.set_network(request).await?.into_inner();
    let policy = set.policy.unwrap_or_default();
    match format {
        Output::Table => output::policy_details(&policy)?,
        Output::Json => output::json(&output::policy(&policy))?,
    }
    Ok(0)
}

/// What flags without a policy add to.
fn current(id: &str, policy: Option<NetworkPolicy>) -> Result<Policy, CliError> {
    let policy = policy.ok_or_else(|| CliError::NoNetwork { id: id.to_owned() })?;
    policy_from_proto(&policy, "").map_err(|violations| CliError::PolicyUnknown {
        id: id.to_owned(),
        field: violations
            .into_iter()
            .map(|violation| violation.field)
            .collect::<Vec<_>>()
            .join(", "),
    })
}
