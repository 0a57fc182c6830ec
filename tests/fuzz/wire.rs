//! Messages between nodes: prost's decoding and the checks of `sida_proto::wire` behind it.

use prost::Message;
use sida_proto::{
    v1,
    wire::{Answer, Bounds, CallRows, PlacementRecord, Residency, Stack, Window, decode, placement::RECORD_BYTES_MAX},
};
use sida_routing::{
    Candidate, Digest, ExpertId, ExpertKey, Extent, Group, HashTable, Labels, LabelsExtent, LayerId, PlacedGroup,
    Placement, Plan, PlanId, hash_table::Shape,
};

use crate::fuzz;

const BOUNDS: Bounds = Bounds {
    moe_layers: 6,
    num_experts: 64,
    d_model: 4,
    vocab_size: 1000,
    rows_max: 100,
    tokens_max: 50,
    sequences_max: 8,
};

fn key(layer: u16, expert: u16) -> ExpertKey {
    ExpertKey { layer: LayerId(layer), expert: ExpertId(expert) }
}

fn table() -> HashTable {
    let shape = Shape { first_layer: LayerId(3), layers: 3, tokens: 4, top_k: 2 };
    let experts = (0..24).map(|entry| ExpertId(entry * 2)).collect();
    HashTable::new(Digest([1; 32]), Digest([2; 32]), shape, 64, experts, vec![0.25; 24])
        .and_then(|table| table.with_chances(vec![0.5; 24]))
        .expect("a valid table")
}

/// A hash table from a predictor-node could end a coordinator, or name experts that do not exist.
#[test]
fn hash_table() {
    fuzz!([v1::HashTable::from(&table()).encode_to_vec()], |bytes| {
        let Ok(table) = decode::hash_table(bytes, &BOUNDS) else { return false };
        let shape = table.shape();
        assert!(usize::from(shape.first_layer.0) + shape.layers <= BOUNDS.moe_layers);
        assert!(table.all_experts().iter().all(|expert| usize::from(expert.0) < BOUNDS.num_experts));
        assert_eq!(table.all_alphas().len(), shape.layers * shape.tokens * shape.top_k);
        true
    });
}

/// Rows from a coordinator could end an expert-node, or make it read past its buffers.
#[test]
fn activations() {
    let groups = [(3, 2), (9, 1), (63, 4)].map(|(expert, rows)| Group { expert: ExpertId(expert), rows });
    let call = v1::Activations { placement_epoch: 9, ..v1::Activations::new(7, LayerId(5), &groups, &[0.5; 28]) };
    let placed = [PlacedGroup { expert: ExpertId(3), first: 5, rows: 2 }];
    let in_window = v1::Activations::in_window(7, LayerId(5), &placed);
    fuzz!([call.encode_to_vec(), in_window.encode_to_vec()], |bytes| {
        let Ok(call) = decode::activations(bytes, &BOUNDS) else { return false };
        let rows: usize = call.groups.iter().map(|group| group.rows as usize).sum();
        assert!(rows <= BOUNDS.rows_max);
        match call.rows {
            CallRows::Sent(activations) => assert_eq!(activations.len(), rows * BOUNDS.d_model),
            CallRows::InWindow(firsts) => assert_eq!(firsts.len(), call.groups.len()),
        }
        assert!(call.groups.iter().all(|group| usize::from(group.expert.0) < BOUNDS.num_experts));
        true
    });
}

/// Results from an expert-node could end a coordinator, or be taken for those of another number of rows.
#[test]
fn results() {
    let report = v1::CallReport { hits: 1, demand_loads: 2, load_us: 3, compute_us: 4, ..Default::default() };
    let done = v1::Results::done(7, vec![1.5; 12], report);
    let (reason, message) = ("STALE_EPOCH".to_owned(), "old".to_owned());
    let refusal = v1::CallError { code: 9, reason, message, newer_placement: vec![8, 1].into() };
    let failed = v1::Results::failed(7, refusal);
    fuzz!([done.encode_to_vec(), failed.encode_to_vec()], |bytes| match decode::results(bytes, 3, BOUNDS.d_model) {
        Ok(Answer::Done { payload, .. }) => {
            assert_eq!(payload.len(), 3 * BOUNDS.d_model * 4);
            true
        }
        Ok(Answer::Failed(error)) => {
            assert!(error.newer_placement.len() <= RECORD_BYTES_MAX);
            true
        }
        Err(_) => false,
    });
}

/// A hint could end an expert-node.
#[test]
fn plan() {
    let plan = Plan { id: PlanId(3), experts: vec![key(0, 1), key(0, 63), key(5, 2)], begins: true };
    fuzz!([v1::Plan::from(&plan).encode_to_vec()], |bytes| {
        let Ok(plan) = decode::plan(bytes, &BOUNDS) else { return false };
        let exists = |key: &ExpertKey| {
            usize::from(key.layer.0) < BOUNDS.moe_layers && usize::from(key.expert.0) < BOUNDS.num_experts
        };
        assert!(plan.experts.iter().all(exists));
        true
    });
}

/// A request could end a predictor-node, or look up tokens that the model does not have.
#[test]
fn predict_request() {
    let sequences: [&[u32]; 2] = [&[1, 2, 3], &[999]];
    let request = v1::PredictRequest::new(Digest([9; 32]), Stack::Encoder, &sequences, &[]);
    let states = [bytes::Bytes::from_static(b"state"), bytes::Bytes::new()];
    let step = v1::PredictRequest::new(Digest([9; 32]), Stack::Decoder, &sequences, &states);
    fuzz!([request.encode_to_vec(), step.encode_to_vec()], |bytes| { decode::predict_request(bytes, &BOUNDS).is_ok() });
}

/// Labels could end a predictor-node, or teach it experts that the model does not have.
#[test]
fn learn_request() {
    let extent = LabelsExtent { layers: 2, num_experts: 64, kept: 1 };
    let experts = [3, 63].map(ExpertId).to_vec();
    let labels = Labels::new(vec![999], extent, experts, vec![0.5, 1.0]).expect("labels");
    let request = v1::LearnRequest::new(Digest([9; 32]), Stack::Encoder, &[labels.clone(), labels]);
    fuzz!([request.encode_to_vec()], |bytes| {
        let Ok(taken) = decode::learn_request(bytes, &BOUNDS, 2) else { return false };
        let experts = taken.sequences.iter().flat_map(|labels| labels.experts());
        assert!(experts.into_iter().all(|expert| usize::from(expert.0) < BOUNDS.num_experts));
        true
    });
}

/// A report of an expert-node could end whoever asked for it.
#[test]
fn residency() {
    let held = Residency {
        node: "expert-node-0".into(),
        model: Digest([1; 32]),
        experts: Some(Digest([2; 32])),
        resident_bytes: 1,
        budget_bytes: 2,
        slots: 3,
        demand_loads: 4,
        prefetch_loads: 5,
        evictions: 6,
        rows: 7,
        resident: vec![key(0, 0), key(5, 63)],
    };
    fuzz!([v1::ResidencyResponse::from(&held).encode_to_vec()], |bytes| decode::residency(bytes, &BOUNDS).is_ok());
}

/// A record in etcd, or a hint from an expert-node, could end a node or send rows to nodes that do not exist.
#[test]
fn placement() {
    let candidate = |name: &str| Candidate { node: name.into(), weight: 1.0 };
    let candidates = [candidate("expert-node-0"), candidate("expert-node-1"), candidate("expert-node-2")];
    let extent = Extent { moe_layers: 2, num_experts: 8, replicas: 2 };
    let record = |candidates: &[Candidate]| {
        let placement = Placement::compute(7, extent, candidates).expect("a placement");
        PlacementRecord { model: Digest([1; 32]), placement: placement.into() }.encode().expect("a short record")
    };
    fuzz!([record(&candidates), record(&candidates[..1]), record(&[])], |bytes| {
        let Ok(PlacementRecord { placement, .. }) = decode::placement(bytes) else { return false };
        let nodes = placement.nodes().len();
        for key in placement.keys() {
            assert!(placement.holder_indices(key).iter().all(|&node| usize::from(node) < nodes));
        }
        true
    });
}

/// A frame of a lane could end a node before any check of ours is reached.
#[test]
fn lane_frames() {
    let groups = [Group { expert: ExpertId(3), rows: 2 }];
    let plan = Plan { id: PlanId(3), experts: vec![key(0, 1)], begins: false };
    let window = Window { machine: "boot".into(), handle: [7; 64], rows: 100, dtype: v1::DType::DtypeBf16 };
    let kinds = [
        v1::lane_request::Kind::Plan((&plan).into()),
        v1::lane_request::Kind::Activations(v1::Activations::new(7, LayerId(5), &groups, &[0.5; 8])),
        v1::lane_request::Kind::Release(v1::Release { plan_id: 3 }),
        v1::lane_request::Kind::Window((&window).into()),
    ];
    let seeds = kinds.map(|kind| v1::LaneRequest { kind: Some(kind) }.encode_to_vec());
    fuzz!(seeds, |bytes| {
        let Ok(frame) = v1::LaneRequest::decode(bytes) else { return false };
        match frame.kind {
            Some(v1::lane_request::Kind::Plan(plan)) => plan.check(&BOUNDS).is_ok(),
            Some(v1::lane_request::Kind::Activations(call)) => call.check(&BOUNDS).is_ok(),
            Some(v1::lane_request::Kind::Release(_)) => true,
            Some(v1::lane_request::Kind::Window(window)) => window.check(100).is_ok(),
            None => false,
        }
    });
}

/// A frame of a lane could end a coordinator before any check of ours is reached.
#[test]
fn lane_answers() {
    let report = v1::CallReport { hits: 1, demand_loads: 2, load_us: 3, compute_us: 4, ..Default::default() };
    let kinds = [
        v1::lane_response::Kind::Results(v1::Results::done(7, vec![1.5; 12], report)),
        v1::lane_response::Kind::Alive(v1::Alive {}),
        v1::lane_response::Kind::Window(v1::Window::refused("another machine".to_owned())),
    ];
    let seeds = kinds.map(|kind| v1::LaneResponse { kind: Some(kind) }.encode_to_vec());
    fuzz!(seeds, |bytes| {
        let Ok(frame) = v1::LaneResponse::decode(bytes) else { return false };
        match frame.kind {
            Some(v1::lane_response::Kind::Results(results)) => results.check(3, BOUNDS.d_model).is_ok(),
            Some(v1::lane_response::Kind::Alive(_)) => true,
            Some(v1::lane_response::Kind::Window(window)) => window.check(100).is_ok(),
            None => false,
        }
    });
}
