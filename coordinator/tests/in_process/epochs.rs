//! Expert-nodes that know a newer placement than the coordinator.

use std::sync::Arc;

use futures::future::join_all;
use sida_cluster::Address;
use sida_coordinator::{Coordinator, EncodeParams, Encoding, PredictorSource};
use sida_model::Checkpoint;
use sida_proto::wire::PlacementRecord;
use sida_routing::Placement;

use crate::{
    plain_experts::{PlainExperts, experts, model_dir, start_over},
    plain_nodes::{PlainNode, any_port, serve_experts},
};

async fn encode(coordinator: &Coordinator) -> Encoding {
    let prompt = "sst2 sentence: a gorgeous , witty , seductive movie .".into();
    coordinator.encode(EncodeParams { prompt, ..Default::default() }).await.expect("an answer")
}

async fn cluster() -> (Vec<Arc<PlainExperts>>, Vec<PlainNode>, Coordinator) {
    let experts = [experts(), experts()].to_vec();
    let nodes = join_all(experts.iter().map(|experts| serve_experts(experts.clone(), any_port()))).await;
    let addresses = nodes.iter().map(|node| Address::Grpc(node.address.to_string())).collect();
    let coordinator = start_over(addresses, Vec::new(), PredictorSource::Off, |_| ()).await;
    (experts, nodes, coordinator)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_placement_is_taken_over_within_the_request() {
    // Would break: a coordinator that was cut off from the membership fails requests, or goes on with a placement that
    // is no longer true.
    let (experts, _nodes, coordinator) = cluster().await;
    let expected = encode(&coordinator).await.states;
    let old: Placement = (*coordinator.cluster().placement()).clone();
    let model = Checkpoint::open(&model_dir()).expect("model").digest();
    let newer = old.epoch() + 6;
    let record = PlacementRecord { model, placement: Arc::new(old.with_epoch(newer)) };
    let record = bytes::Bytes::from(record.encode().expect("a record"));
    experts.iter().for_each(|experts| *experts.newer.lock() = (newer, record.clone()));
    let encoding = encode(&coordinator).await;
    assert_eq!(encoding.states, expected);
    assert_eq!(encoding.trace.failovers, 0, "a node counts as failed that only knew more");
    assert_eq!(coordinator.cluster().placement().epoch(), newer);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_placement_that_cannot_be_taken_over_is_a_failure_of_its_node() {
    // Would break: a node that refuses everything with nonsense keeps a request going round for ever.
    let (experts, _nodes, coordinator) = cluster().await;
    let expected = encode(&coordinator).await.states;
    *experts[1].newer.lock() = (9, bytes::Bytes::from_static(b"\x08\x09 no placement"));
    let encoding = encode(&coordinator).await;
    assert_eq!(encoding.states, expected);
    assert!(encoding.trace.failovers > 0);
    assert_eq!(coordinator.cluster().placement().epoch(), 1);
}
