//! `soulbox.host.v1.NodeService`.

use std::sync::Arc;

use soulbox_proto::host::v1::node_service_server::NodeService;
use soulbox_proto::host::v1::{self as proto};
use tonic::{Request, Response, Status};

use super::convert;
use crate::sandbox::Pool;
use crate::time::UnixMillis;

#[derive(Debug, Clone)]
pub struct NodeApi {
    pool: Arc<Pool>,
    started_at: UnixMillis,
}

// === impl NodeApi ===

impl NodeApi {
    pub fn new(pool: Arc<Pool>) -> Self {
        Self {
            pool,
            started_at: UnixMillis::now(),
        }
    }

    fn kvm(&self) -> proto::KvmFacts {
        let hardware_virtualization = self.pool.facts().hardware_virtualization;
        match self.pool.kvm().get() {
            Ok(kvm) => proto::KvmFacts {
                usable: true,
                problem: String::new(),
                api_version: kvm.api_version,
                hardware_virtualization,
                max_vcpus: kvm.max_vcpus,
            },
            Err(error) => proto::KvmFacts {
                problem: error.to_string(),
                hardware_virtualization,
                ..proto::KvmFacts::default()
            },
        }
    }
}

#[tonic::async_trait]
impl NodeService for NodeApi {
    async fn get_node(
        &self,
        _request: Request<proto::GetNodeRequest>,
    ) -> Result<Response<proto::GetNodeResponse>, Status> {
        let (admission, facts) = (self.pool.admission(), self.pool.facts());
        let node = proto::Node {
            hostname: facts.hostname.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            start_time: Some(self.started_at.into()),
            capacity: Some(convert::amounts(admission.capacity())),
            allocatable: Some(convert::amounts(admission.allocatable())),
            sandboxes: u32::try_from(self.pool.len()).unwrap_or(u32::MAX),
            kvm: Some(self.kvm()),
            kernel_release: facts.kernel_release.clone(),
            cpu_model: facts.cpu_model.clone(),
            draining: self.pool.is_draining(),
        };
        Ok(Response::new(proto::GetNodeResponse { node: Some(node) }))
    }
}
