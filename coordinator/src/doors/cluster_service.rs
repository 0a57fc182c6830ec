//! Serves `sida.v1.Cluster`: the cluster as this coordinator sees it, for `sida status`.

use std::{sync::atomic::Ordering, time::Duration};

use bytes::Bytes;
use futures::future::join_all;
use sida_cluster::{
    experts::ResidencyReport,
    member::{Address, Member, Role},
    membership::Source,
};
use sida_proto::{
    v1::{self, cluster_server::Cluster, experts_client::ExpertsClient, predictor_client::PredictorClient},
    wire::Residency,
};
use sida_rpc::ClientConfig;
use tonic::{Request, Response, Status};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::coordinator::Coordinator;

/// How long a node may take to say what it holds.
const PATIENCE: Duration = Duration::from_secs(1);

/// The service.
pub(crate) struct ClusterService {
    pub(crate) coordinator: Coordinator,
}

#[tonic::async_trait]
impl Cluster for ClusterService {
    async fn status(&self, _request: Request<v1::StatusRequest>) -> Result<Response<v1::StatusResponse>, Status> {
        Ok(Response::new(self.coordinator.status().await))
    }
}

impl Coordinator {
    /// The cluster as this coordinator sees it. Asks every node what it holds, all at once.
    pub async fn status(&self) -> v1::StatusResponse {
        let members = self.cluster().members();
        let mut nodes = join_all(members.iter().map(|member| self.node_status(member))).await;
        let membership = self.cluster().membership();
        for node in &mut nodes {
            node.ready_epoch = membership.ready.get(&node.node.as_str().into()).copied().unwrap_or(0);
        }
        let statistics = self.statistics();
        v1::StatusResponse {
            coordinator: self.config().node.to_string(),
            model: self.checkpoint().name().to_owned(),
            placement_epoch: self.cluster().placement().epoch(),
            nodes,
            requests_total: statistics.requests.load(Ordering::Relaxed),
            requests_queued: self.queued() as u64,
            requests_inflight: statistics.inflight.load(Ordering::Relaxed) as u64,
            hash_hits: statistics.hash_hits.load(Ordering::Relaxed),
            hash_misses: statistics.hash_misses.load(Ordering::Relaxed),
            failovers: statistics.failovers.load(Ordering::Relaxed),
            membership: if membership.is_fixed() { "fixed" } else { "etcd" }.to_owned(),
            etcd_connected: membership.source == Source::Etcd { connected: true },
            leader: membership.leader.map_or_else(String::new, String::from),
        }
    }

    async fn node_status(&self, member: &Member) -> v1::NodeStatus {
        let client = &self.config().client;
        let (mut residency, mut model) = (None, None);
        let healthy = match (member.role, &member.address) {
            (Role::Coordinator, _) if member.node == self.config().node => true,
            (Role::Coordinator, Address::Grpc(address)) => within_patience(serves(address, client)).await == Some(true),
            (Role::Coordinator, Address::Local(_)) => false,
            (Role::ExpertNode, Address::Local(experts)) => {
                residency = Some(self.local_residency(member, experts.residency()));
                true
            }
            (Role::ExpertNode, Address::Grpc(address)) => {
                residency = within_patience(remote_residency(address, client)).await;
                model = residency.as_ref().map(|held| (held.model_digest.clone(), held.experts_digest.clone()));
                residency.is_some()
            }
            (Role::PredictorNode, Address::Grpc(address)) => {
                let described = within_patience(describes_predictor(address, client)).await;
                model = described.map(|described| (described.model_digest, Bytes::new()));
                model.is_some()
            }
            (Role::PredictorNode, Address::Local(_)) => false,
        };
        let problem = model.and_then(|(model, experts)| self.differs(&model, &experts)).unwrap_or_default();
        let placement = self.cluster().placement();
        v1::NodeStatus {
            node: member.node.to_string(),
            role: member.role.to_string(),
            address: member.address.to_string(),
            healthy: healthy && problem.is_empty(),
            experts_placed: placement.experts_of(&member.node).count() as u64,
            experts_held: placement.held_by(&member.node).count() as u64,
            ready_epoch: 0,
            weight: member.weight,
            residency,
            problem: problem.to_owned(),
        }
    }

    /// In what a node of this model and these experts, as far as it says, is of no use here.
    fn differs(&self, model: &[u8], experts: &[u8]) -> Option<&'static str> {
        let checkpoint = self.checkpoint();
        let has_other_experts = || !experts.is_empty() && experts != checkpoint.experts_digest().0;
        match model == checkpoint.digest().0 {
            false => Some("serves another model"),
            true => has_other_experts().then_some("has other experts"),
        }
    }

    fn local_residency(&self, member: &Member, report: ResidencyReport) -> v1::ResidencyResponse {
        v1::ResidencyResponse::from(&Residency {
            node: member.node.clone(),
            model: self.checkpoint().digest(),
            experts: None,
            resident_bytes: report.resident_bytes,
            budget_bytes: report.budget_bytes,
            slots: report.slots,
            demand_loads: report.demand_loads,
            prefetch_loads: report.prefetch_loads,
            evictions: report.evictions,
            rows: report.rows,
            resident: report.resident,
        })
    }
}

async fn within_patience<T>(answer: impl Future<Output = Option<T>>) -> Option<T> {
    tokio::time::timeout(PATIENCE, answer).await.ok().flatten()
}

async fn serves(address: &str, client: &ClientConfig) -> Option<bool> {
    let channel = sida_rpc::connect(address, client).await.ok()?;
    let request = HealthCheckRequest { service: String::new() };
    let health = HealthClient::new(channel).check(request).await.ok()?.into_inner();
    Some(health.status() == ServingStatus::Serving)
}

async fn remote_residency(address: &str, client: &ClientConfig) -> Option<v1::ResidencyResponse> {
    let channel = sida_rpc::connect(address, client).await.ok()?;
    Some(ExpertsClient::new(channel).residency(v1::ResidencyRequest {}).await.ok()?.into_inner())
}

async fn describes_predictor(address: &str, client: &ClientConfig) -> Option<v1::DescribePredictorResponse> {
    let channel = sida_rpc::connect(address, client).await.ok()?;
    Some(PredictorClient::new(channel).describe(v1::DescribePredictorRequest {}).await.ok()?.into_inner())
}
