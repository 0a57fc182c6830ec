//! Serves `sida.v1.Cluster`: the cluster as this coordinator sees it, for `sida status`.

use std::{error::Error, sync::atomic::Ordering, time::Duration};

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
use sida_rpc::{Channel, ClientConfig, ClientError};
use tonic::{Code, Request, Response, Status};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::coordinator::Coordinator;

/// How long a node may take to say what it holds.
const PATIENCE: Duration = Duration::from_secs(1);
/// What a coordinator is that is there, and cannot answer requests.
const NOT_READY: &str = "not ready";

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
        let answered = match (member.role, &member.address) {
            (Role::Coordinator, _) if member.node == self.config().node => match self.can_answer() {
                true => Ok(()),
                false => Err(NOT_READY.to_owned()),
            },
            (Role::Coordinator, Address::Grpc(address)) => within_patience(serves(address, client)).await,
            (Role::Coordinator | Role::PredictorNode, Address::Local(_)) => Err(String::new()),
            (Role::ExpertNode, Address::Local(experts)) => {
                residency = Some(self.local_residency(member, experts.residency()));
                Ok(())
            }
            (Role::ExpertNode, Address::Grpc(address)) => {
                within_patience(remote_residency(address, client)).await.map(|held| {
                    model = Some((held.model_digest.clone(), held.experts_digest.clone()));
                    residency = Some(held);
                })
            }
            (Role::PredictorNode, Address::Grpc(address)) => {
                let described = within_patience(describes_predictor(address, client)).await;
                described.map(|described| model = Some((described.model_digest, Bytes::new())))
            }
        };
        let differs = model.and_then(|(model, experts)| self.differs(&model, &experts)).unwrap_or_default();
        let (healthy, problem) = match answered {
            Ok(()) => (differs.is_empty(), differs.to_owned()),
            Err(problem) => (false, problem),
        };
        let placement = self.cluster().placement();
        v1::NodeStatus {
            node: member.node.to_string(),
            role: member.role.to_string(),
            address: member.address.to_string(),
            healthy,
            experts_placed: placement.experts_of(&member.node).count() as u64,
            experts_held: placement.held_by(&member.node).count() as u64,
            ready_epoch: 0,
            weight: member.weight,
            residency,
            problem,
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

/// What a node answered, or why it did not, in a few words; in none where nobody is there to answer.
type Answered<T> = Result<T, String>;

async fn within_patience<T>(answer: impl Future<Output = Answered<T>>) -> Answered<T> {
    tokio::time::timeout(PATIENCE, answer).await.unwrap_or_else(|_| Err(String::new()))
}

async fn connect(address: &str, client: &ClientConfig) -> Answered<Channel> {
    let told = |error: ClientError| if error.is_of_tls() { "TLS fails".to_owned() } else { String::new() };
    sida_rpc::connect(address, client).await.map_err(told)
}

/// Why a node that took the connection gave no answer.
fn unanswered(status: Status) -> String {
    match status.code() {
        Code::Unauthenticated => "refuses the key",
        // It was the connection that ended: of a port that speaks TLS to a client that does not.
        _ if status.source().is_some() => "ends the connection",
        _ => "answers with an error",
    }
    .to_owned()
}

async fn serves(address: &str, client: &ClientConfig) -> Answered<()> {
    let request = HealthCheckRequest { service: String::new() };
    let health = HealthClient::new(connect(address, client).await?).check(request).await.map_err(unanswered)?;
    let serves = health.into_inner().status() == ServingStatus::Serving;
    serves.then_some(()).ok_or_else(|| NOT_READY.to_owned())
}

async fn remote_residency(address: &str, client: &ClientConfig) -> Answered<v1::ResidencyResponse> {
    let mut experts = ExpertsClient::new(connect(address, client).await?);
    Ok(experts.residency(v1::ResidencyRequest {}).await.map_err(unanswered)?.into_inner())
}

async fn describes_predictor(address: &str, client: &ClientConfig) -> Answered<v1::DescribePredictorResponse> {
    let mut predictor = PredictorClient::new(connect(address, client).await?);
    Ok(predictor.describe(v1::DescribePredictorRequest {}).await.map_err(unanswered)?.into_inner())
}
