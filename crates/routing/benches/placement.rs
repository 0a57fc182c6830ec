//! What the placement of a large cluster costs its writer: 64 nodes, 24 layers of 256 experts, 2 replicas.
//! `cargo bench -p sida-routing`; figures in docs/benchmarks.md.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use sida_routing::{
    Candidate, Demand, ExpertId, ExpertKey, Extent, LayerId, Placement, Policy,
    placement::{step, target},
};

const EXTENT: Extent = Extent { moe_layers: 24, num_experts: 256, replicas: 2 };
const POLICY: Policy = Policy { replicas: 2, hot_replicas_max: 4, moves_max: 256 };
const NODES: usize = 64;
const SAMPLES: usize = 300;

fn main() {
    let nodes = candidates(|_| 1.0);
    let weighted = candidates(|i| 1.0 + (i % 4) as f64);
    let demand = skewed();
    let now = target(EXTENT, &nodes, &demand, &POLICY).expect("a placement").with_epoch(1);
    let without_one = &nodes[1..];
    measure("Placement::compute, 64 nodes x 6,144 experts", || {
        black_box(Placement::compute(1, EXTENT, &nodes)).expect("a placement");
    });
    measure("target, hot experts", || {
        black_box(target(EXTENT, &nodes, &demand, &POLICY)).expect("a placement");
    });
    measure("target, four weights", || {
        black_box(target(EXTENT, &weighted, &demand, &POLICY)).expect("a placement");
    });
    measure("target + step, nothing to do", || {
        let target = target(EXTENT, &nodes, &demand, &POLICY).expect("a placement");
        assert!(black_box(step(&now, &target, &|_| 1, &POLICY)).is_none());
    });
    measure("target + step, a node died", || {
        let target = target(EXTENT, without_one, &demand, &POLICY).expect("a placement");
        assert!(black_box(step(&now, &target, &|_| 1, &POLICY)).is_some());
    });
    measure("target + step, all weights changed", || {
        let target = target(EXTENT, &weighted, &demand, &POLICY).expect("a placement");
        assert!(black_box(step(&now, &target, &|_| 1, &POLICY)).is_some());
    });
    measure("Demand::settle", || {
        let mut demand = demand.clone();
        demand.decay(0.5);
        demand.settle();
        black_box(demand);
    });
}

fn candidates(weight: impl Fn(usize) -> f64) -> Vec<Candidate> {
    (0..NODES).map(|i| Candidate { node: format!("expert-node-{i}").into(), weight: weight(i) }).collect()
}

/// A Zipf distribution over the experts of each layer.
fn skewed() -> Demand {
    let mut demand = Demand::new(EXTENT.moe_layers, EXTENT.num_experts);
    for layer in 0..EXTENT.moe_layers as u16 {
        for expert in 0..EXTENT.num_experts as u16 {
            let rank = u64::from((expert + layer * 7) % 256) + 1;
            demand.note(ExpertKey { layer: LayerId(layer), expert: ExpertId(expert) }, 1_000_000 / rank);
        }
    }
    (0..8).for_each(|_| demand.settle());
    demand
}

/// Prints the median and the 99th percentile.
fn measure(what: &str, mut run: impl FnMut()) {
    (0..SAMPLES / 10).for_each(|_| run());
    let mut times: Vec<Duration> = (0..SAMPLES)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed()
        })
        .collect();
    times.sort();
    println!("{what:<50} {:>10.2?}  p99 {:>10.2?}", times[SAMPLES / 2], times[SAMPLES * 99 / 100]);
}
