//! The node on a real socket: lanes with good, bad and too many calls, residency, health, and its end.

mod support;

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use sida_cluster::Cluster;
use sida_expert_node::{
    EXPERTS_DIGEST_METADATA, Engine, ExpertMemory, ExpertNodeConfig, ExpertNodeError, MODEL_DIGEST_METADATA,
};
use sida_proto::{
    v1::{
        self, LaneRequest, LaneResponse, experts_client::ExpertsClient, lane_request::Kind,
        lane_response::Kind as Answered,
    },
    wire::{Answer, decode, rows},
};
use sida_routing::{Digest, ExpertId, ExpertKey, Extent, Group, LayerId, Placement, Plan, PlanId};
use sida_rpc::{Channel, Reason};
use support::{D_MODEL, MadeUp, MadeUpCall};
use tokio::{
    net::TcpListener,
    sync::mpsc::{UnboundedSender, unbounded_channel},
    task::JoinHandle,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Status, Streaming};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

/// A node of made-up experts, and a channel to it.
struct Node {
    source: Arc<MadeUp>,
    channel: Channel,
    shutdown: CancellationToken,
    serving: JoinHandle<Result<(), ExpertNodeError>>,
}

impl Node {
    async fn start(change: impl FnOnce(&mut ExpertNodeConfig)) -> Self {
        Self::start_of(MadeUp::new(), change).await
    }

    /// A node none of whose experts can be loaded.
    async fn start_broken() -> Self {
        let source = MadeUp::new();
        for layer in (0..support::LAYERS as u16).map(LayerId) {
            let keys = (0..support::EXPERTS as u16).map(|expert| ExpertKey { layer, expert: ExpertId(expert) });
            source.failing.lock().unwrap().extend(keys);
        }
        Self::start_of(source, |_| {}).await
    }

    async fn start_of(source: Arc<MadeUp>, change: impl FnOnce(&mut ExpertNodeConfig)) -> Self {
        let cluster = Cluster::fixed(Vec::new(), support::LAYERS, support::EXPERTS, 1).unwrap();
        Self::start_in(source, cluster, change).await
    }

    async fn start_in(source: Arc<MadeUp>, cluster: Cluster, change: impl FnOnce(&mut ExpertNodeConfig)) -> Self {
        let mut config = ExpertNodeConfig::new("e0".into(), "made-up".into());
        config.expert_memory = ExpertMemory::Share(0.5);
        config.threads = 2;
        config.server.health_period = Duration::from_millis(20);
        change(&mut config);
        let engine = Arc::new(Engine::new(&config, source.clone()).unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let shutdown = CancellationToken::new();
        let ending = shutdown.clone();
        let serving =
            tokio::spawn(async move { sida_expert_node::serve(engine, &config, listener, cluster, ending).await });
        let channel = sida_rpc::connect(&address, &Default::default()).await.unwrap();
        Self { source, channel, shutdown, serving }
    }

    async fn lane(&self) -> Lane {
        let (requests, outgoing) = unbounded_channel();
        let answers = self.open(outgoing, Digest([7; 32]).to_string()).await.unwrap();
        Lane { requests, answers }
    }

    async fn open(
        &self,
        outgoing: tokio::sync::mpsc::UnboundedReceiver<LaneRequest>,
        model: String,
    ) -> Result<Streaming<LaneResponse>, Status> {
        self.open_with(outgoing, &[(MODEL_DIGEST_METADATA, model)]).await
    }

    async fn open_with(
        &self,
        outgoing: tokio::sync::mpsc::UnboundedReceiver<LaneRequest>,
        metadata: &[(&'static str, String)],
    ) -> Result<Streaming<LaneResponse>, Status> {
        let mut request = Request::new(UnboundedReceiverStream::new(outgoing));
        for (name, value) in metadata {
            request.metadata_mut().insert(*name, value.parse().unwrap());
        }
        Ok(ExpertsClient::new(self.channel.clone()).lane(request).await?.into_inner())
    }

    async fn residency(&self) -> v1::ResidencyResponse {
        ExpertsClient::new(self.channel.clone()).residency(v1::ResidencyRequest {}).await.unwrap().into_inner()
    }

    async fn health(&self) -> ServingStatus {
        let request = HealthCheckRequest { service: "sida.v1.Experts".into() };
        HealthClient::new(self.channel.clone()).check(request).await.unwrap().into_inner().status()
    }

    async fn health_becomes(&self, status: ServingStatus) {
        for _ in 0..500 {
            if self.health().await == status {
                return;
            }
            sleep(Duration::from_millis(10)).await;
        }
        panic!("health did not become {status:?}");
    }

    async fn stop(self) {
        self.shutdown.cancel();
        timeout(Duration::from_secs(10), self.serving).await.expect("the node ends").unwrap().unwrap();
    }
}

struct Lane {
    requests: UnboundedSender<LaneRequest>,
    answers: Streaming<LaneResponse>,
}

impl Lane {
    fn send(&self, kind: Kind) {
        self.requests.send(LaneRequest { kind: Some(kind) }).unwrap();
    }

    fn call(&self, call_id: u64, call: &MadeUpCall) {
        let activations = v1::Activations::new(call_id, call.layer, &call.groups, &call.activations);
        self.send(Kind::Activations(activations));
    }

    async fn answer(&mut self) -> v1::Results {
        loop {
            let message = timeout(Duration::from_secs(10), self.answers.message()).await.expect("an answer in time");
            match message.unwrap().expect("the lane is open").kind.unwrap() {
                Answered::Results(results) => return results,
                Answered::Alive(_) => {}
                Answered::Window(window) => panic!("nobody offered one: {window:?}"),
            }
        }
    }
}

fn payload_of(results: v1::Results, call: &MadeUpCall) -> Vec<f32> {
    match results.check(call.activations.len() / D_MODEL, D_MODEL).unwrap() {
        Answer::Done { payload, .. } => rows::from_payload(&payload),
        Answer::Failed(error) => panic!("{error:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_of_many_lanes_get_their_own_rows() {
    // Broken: a call gets another's rows, or none.
    let node = Node::start(|config| config.expert_memory = ExpertMemory::Share(0.1)).await;
    let mut tasks = Vec::new();
    for lane_number in 0..4u64 {
        let (mut lane, source) = (node.lane().await, node.source.clone());
        tasks.push(tokio::spawn(async move {
            let mut seed = lane_number;
            let calls: BTreeMap<u64, MadeUpCall> = (0..100).map(|id| (id, MadeUpCall::new(&mut seed))).collect();
            calls.iter().for_each(|(&id, call)| lane.call(id, call));
            for _ in 0..calls.len() {
                let results = lane.answer().await;
                let call = &calls[&results.call_id];
                assert_eq!(payload_of(results, call), source.expected(call.as_call()));
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    let residency = node.residency().await;
    assert!(residency.resident_bytes <= residency.budget_bytes && residency.rows > 400, "{residency:?}");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_call_fails_alone() {
    // Broken: one bad message ends the node, its lane or the calls beside it.
    let node = Node::start(|_| {}).await;
    let mut lane = node.lane().await;
    let good = MadeUpCall::new(&mut 1);
    let whole = v1::Activations::new(0, good.layer, &good.groups, &good.activations);
    let bad = [
        v1::Activations { layer: 99, ..whole.clone() },
        v1::Activations { experts: vec![99; whole.experts.len()], ..whole.clone() },
        v1::Activations { rows: vec![u32::MAX; whole.rows.len()], ..whole.clone() },
        v1::Activations { rows: vec![], ..whole.clone() },
        v1::Activations { payload: whole.payload.slice(1..), ..whole.clone() },
        v1::Activations { dtype: 77, ..whole.clone() },
        v1::Activations {
            experts: vec![3, 3],
            rows: vec![1, 1],
            payload: vec![0; 2 * D_MODEL * 4].into(),
            ..whole.clone()
        },
    ];
    for (id, activations) in bad.into_iter().enumerate() {
        lane.send(Kind::Activations(v1::Activations { call_id: id as u64, ..activations }));
        let results = lane.answer().await;
        assert_eq!(results.call_id, id as u64);
        let error = results.error.expect("an error");
        assert_eq!((error.code, &*error.reason), (Code::InvalidArgument as i32, Reason::MalformedMessage.name()));
    }
    // Hints that are wrong are dropped; a request of a kind of a later version is skipped.
    lane.send(Kind::Plan(v1::Plan {
        plan_id: 1,
        layers: vec![0, 99],
        experts: vec![0, 0],
        placement_epoch: 0,
        begins: false,
    }));
    lane.send(Kind::Release(v1::Release { plan_id: 77 }));
    lane.requests.send(LaneRequest { kind: None }).unwrap();
    lane.call(9, &good);
    assert_eq!(payload_of(lane.answer().await, &good), node.source.expected(good.as_call()));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_for_another_model_is_refused() {
    // Broken: rows of one model go through the experts of another.
    let node = Node::start(|_| {}).await;
    for model in [Digest([8; 32]).to_string(), String::new(), "7".into()] {
        let (_requests, outgoing) = unbounded_channel();
        let status = node.open(outgoing, model).await.unwrap_err();
        assert_eq!((status.code(), Reason::of(&status)), (Code::FailedPrecondition, Some(Reason::ModelMismatch)));
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_for_other_experts_is_refused() {
    // Broken: a node with experts of another training answers a part of the rows, and nobody notices.
    let node = Node::start(|_| {}).await;
    let open = async |experts: Digest| {
        let (_requests, outgoing) = unbounded_channel();
        let metadata =
            [(MODEL_DIGEST_METADATA, Digest([7; 32]).to_string()), (EXPERTS_DIGEST_METADATA, experts.to_string())];
        node.open_with(outgoing, &metadata).await
    };
    let status = open(Digest([8; 32])).await.unwrap_err();
    assert_eq!((status.code(), Reason::of(&status)), (Code::FailedPrecondition, Some(Reason::ModelMismatch)));
    assert!(status.message().contains("other experts"), "{status}");
    open(Digest([9; 32])).await.expect("the same experts");
    assert_eq!(*node.residency().await.experts_digest, [9; 32], "as `sida status` compares it");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_beyond_its_limits_is_slowed_not_failed() {
    // Broken: a coordinator that sends faster than the node computes fills the node's memory, or loses calls.
    let node = Node::start(|config| {
        (config.limits.lane_bytes_max, config.limits.lane_calls_max, config.limits.calls_max) = (1024, 2, 3);
    })
    .await;
    let (mut lane, mut seed) = (node.lane().await, 3);
    let calls: Vec<MadeUpCall> = (0..200).map(|_| MadeUpCall::new(&mut seed)).collect();
    calls.iter().enumerate().for_each(|(id, call)| lane.call(id as u64, call));
    for _ in 0..calls.len() {
        let results = lane.answer().await;
        let call = &calls[results.call_id as usize];
        assert_eq!(payload_of(results, call), node.source.expected(call.as_call()));
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn plans_of_a_lane_prefetch_and_end_with_it() {
    // Broken: hints do nothing, or those of a coordinator that died decide for ever what stays in memory.
    let node = Node::start(|_| {}).await;
    let lane = node.lane().await;
    let experts: Vec<ExpertKey> = (0..5).map(|e| ExpertKey { layer: LayerId(1), expert: ExpertId(e) }).collect();
    lane.send(Kind::Plan(v1::Plan::from(&Plan { id: PlanId(1), experts, begins: false })));
    let residency = async {
        loop {
            let residency = node.residency().await;
            if residency.prefetch_loads == 5 {
                return residency;
            }
            sleep(Duration::from_millis(5)).await;
        }
    };
    let residency = timeout(Duration::from_secs(10), residency).await.expect("the plan is followed");
    let layer = residency.layers.iter().find(|layer| layer.layer == 1).unwrap();
    assert_eq!(layer.experts, [0, 1, 2, 3, 4]);
    drop(lane);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_is_that_of_a_real_call() {
    // Broken: a node whose experts cannot be loaded gets calls, or one that works gets none.
    let node = Node::start(|_| {}).await;
    node.health_becomes(ServingStatus::Serving).await;
    let resident = node.residency().await.layers;
    sleep(Duration::from_millis(100)).await;
    assert_eq!(node.residency().await.layers, resident, "health checks change what is resident");
    node.stop().await;

    let broken = Node::start_broken().await;
    sleep(Duration::from_millis(200)).await;
    assert_eq!(broken.health().await, ServingStatus::NotServing);
    broken.source.failing.lock().unwrap().clear();
    broken.health_becomes(ServingStatus::Serving).await;
    broken.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_in_flight_end_before_the_node_does() {
    // Broken: a rolling update fails the requests that were under way.
    let node = Node::start(|config| config.expert_memory = ExpertMemory::Share(0.1)).await;
    node.source.slow.store(true, Ordering::Relaxed);
    let mut lane = node.lane().await;
    let group = |expert| Group { expert: ExpertId(expert), rows: 1 };
    let call =
        MadeUpCall { layer: LayerId(0), groups: (0..12).map(group).collect(), activations: vec![0.25; 12 * D_MODEL] };
    (0..20).for_each(|id| lane.call(id, &call));
    let first = lane.answer().await;
    assert_eq!(payload_of(first, &call), node.source.expected(call.as_call()));
    node.shutdown.cancel();
    // The others are answered, or the lane ends without an answer and they go elsewhere; none gets a wrong one.
    let mut answered = 1;
    while let Ok(Some(response)) = lane.answers.message().await {
        let Some(Answered::Results(results)) = response.kind else { continue };
        assert_eq!(payload_of(results, &call), node.source.expected(call.as_call()));
        answered += 1;
    }
    assert!(answered > 1, "what was under way was dropped");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_of_an_older_placement_is_refused() {
    // Broken: a coordinator that was paused past its lease goes on by a placement that is no longer true.
    let extent = Extent { moe_layers: support::LAYERS, num_experts: support::EXPERTS, replicas: 1 };
    let model = Digest([7; 32]);
    let cluster = Cluster::fixed_of(model, Vec::new(), support::LAYERS, support::EXPERTS, 1).unwrap();
    assert!(cluster.adopt(model, Placement::compute(5, extent, &[]).unwrap()));
    let node = Node::start_in(MadeUp::new(), cluster, |_| {}).await;
    let mut lane = node.lane().await;
    let call = MadeUpCall::new(&mut 1);
    for (epoch, taken) in [(0, true), (4, false), (5, true), (6, true)] {
        let activations = v1::Activations::new(epoch, call.layer, &call.groups, &call.activations);
        lane.send(Kind::Activations(v1::Activations { placement_epoch: epoch, ..activations }));
        let results = lane.answer().await;
        if taken {
            assert_eq!(payload_of(results, &call), node.source.expected(call.as_call()));
        } else {
            let refusal = results.error.expect("a refusal");
            assert_eq!(refusal.reason, Reason::StaleEpoch.name());
            let newer = decode::placement(&refusal.newer_placement).unwrap();
            assert_eq!((newer.model, newer.placement.epoch()), (model, 5));
        }
    }
    // A hint of an older one is not followed.
    let experts = vec![ExpertKey { layer: LayerId(1), expert: ExpertId(3) }];
    let plan = v1::Plan::from(&Plan { id: PlanId(1), experts, begins: false });
    lane.send(Kind::Plan(v1::Plan { placement_epoch: 4, ..plan }));
    lane.call(9, &call);
    lane.answer().await;
    assert_eq!(node.residency().await.prefetch_loads, 0);
    node.stop().await;
}
