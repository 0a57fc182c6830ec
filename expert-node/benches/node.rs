//! What an expert-node costs, piece by piece, on the model that ships with the repository: deciding, loading,
//! computing, and a call over loopback with its checksums and signs of life.
//! `cargo bench -p sida-expert-node [-- decide|load|calls|passes|lane]`; figures in docs/benchmarks.md.

use std::{
    hint::black_box,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use sida_cluster::{
    Cluster,
    experts::{ExpertCall, LocalExperts},
};
use sida_expert_node::{Engine, ExpertMemory, ExpertNodeConfig, MODEL_DIGEST_METADATA};
use sida_model::{Checkpoint, ExpertScratch, ExpertStore};
use sida_proto::{
    v1::{self, LaneRequest, experts_client::ExpertsClient, lane_request::Kind, lane_response},
    wire::rows,
};
use sida_routing::{
    ExpertId, ExpertKey, Group, LayerId, Plan, PlanId,
    residency::{Access, Residency, ResidencyConfig},
};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Request;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/switch-tiny-64");
const EXPERTS: u16 = 64;
const LAYERS: u16 = 6;

fn main() {
    // Names of parts to run; all of them by default. Cargo adds `--bench`.
    let parts: Vec<String> = std::env::args().skip(1).filter(|part| !part.starts_with("--")).collect();
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|wanted| wanted == part);
    let checkpoint = Checkpoint::open(Path::new(MODEL)).expect("models/switch-tiny-64");
    if wanted("decide") {
        decide();
    }
    if wanted("load") {
        load_and_compute(&checkpoint);
    }
    if wanted("calls") {
        calls(&checkpoint);
    }
    if wanted("passes") {
        passes(&checkpoint);
    }
    if wanted("lane") {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
        runtime.block_on(lane(&checkpoint));
    }
}

/// Prints the median and the 99th percentile of `samples` runs, per `units` of one run.
fn measure(what: &str, samples: usize, units: u32, mut run: impl FnMut() -> Duration) -> Duration {
    (0..samples / 10 + 1).for_each(|_| _ = run());
    let mut times: Vec<Duration> = (0..samples).map(|_| run()).collect();
    times.sort();
    let (median, slow) = (times[samples / 2] / units, times[samples * 99 / 100] / units);
    println!("{what:<72} {median:>10.2?}  p99 {slow:>10.2?}");
    median
}

fn timed(run: impl FnOnce()) -> Duration {
    let start = Instant::now();
    run();
    start.elapsed()
}

/// The residency machine alone.
fn decide() {
    let config = ResidencyConfig { slots: 96, layers: LAYERS.into(), num_experts: EXPERTS.into(), plans_max: 64 };
    for (what, slots) in [("96 slots, all missing", 96), ("384 slots, all resident", 384)] {
        let mut machine = Residency::new(ResidencyConfig { slots, ..config });
        let mut grants = Vec::with_capacity(64);
        let mut layer = 0;
        measure(&format!("decide: a call of 64 experts, {what}"), 5000, 1, || {
            layer = (layer + 1) % LAYERS;
            timed(|| {
                machine.advance(LayerId(layer));
                let mut call = machine.call(LayerId(layer), (0..EXPERTS).map(ExpertId)).expect("a sound call");
                machine.acquire(&mut call, usize::MAX, &mut grants);
                for grant in grants.drain(..) {
                    if let Access::Load { .. } = grant.access {
                        machine.loaded(grant.slot);
                    }
                    machine.unpin(grant.slot);
                }
            })
        });
    }
    let mut machine = Residency::new(config);
    let mut id = 0;
    measure("decide: a plan of 384 experts queued, another released", 2000, 1, || {
        id += 1;
        timed(|| {
            machine.plan(&whole_plan(id)).expect("a sound plan");
            machine.release(PlanId(id.saturating_sub(8)));
        })
    });
}

fn whole_plan(id: u64) -> Plan {
    let layers = (0..LAYERS).map(LayerId);
    let experts =
        layers.flat_map(|layer| (0..EXPERTS).map(move |e| ExpertKey { layer, expert: ExpertId(e) })).collect();
    Plan { id: PlanId(id), experts, begins: false }
}

/// One expert, without a node.
fn load_and_compute(checkpoint: &Arc<Checkpoint>) {
    let store = ExpertStore::open(checkpoint.clone()).expect("experts");
    let shape = *store.shape();
    let mut slot = vec![0; shape.bytes()];
    let mut next = 0;
    measure(&format!("load: one expert of {} KiB", shape.bytes() >> 10), 5000, 1, || {
        next = (next + 1) % (LAYERS * EXPERTS);
        let key = ExpertKey { layer: LayerId(next / EXPERTS), expert: ExpertId(next % EXPERTS) };
        timed(|| store.load(key, &mut slot).expect("a load"))
    });
    let source = slot.clone();
    measure("load: copying as many bytes from cache, to compare", 5000, 1, || {
        timed(|| black_box(&mut slot).copy_from_slice(black_box(&source)))
    });
    let mut scratch = ExpertScratch::default();
    for rows in [1, 8, 64] {
        let (x, mut out) = (vec![0.5; rows * shape.d_model], vec![0.0; rows * shape.d_model]);
        measure(&format!("compute: {rows} rows through one expert"), 5000, 1, || {
            timed(|| shape.forward(&slot, black_box(&x), &mut out, &mut scratch))
        });
    }
}

fn engine(checkpoint: &Arc<Checkpoint>, share: f64, threads: usize) -> Engine {
    let mut config = ExpertNodeConfig::new("bench".into(), MODEL.into());
    (config.expert_memory, config.threads) = (ExpertMemory::Share(share), threads);
    Engine::of_checkpoint(&config, checkpoint.clone()).expect("an engine")
}

fn groups(experts: u16, rows: u32) -> Vec<Group> {
    (0..experts).map(|expert| Group { expert: ExpertId(expert), rows }).collect()
}

/// Calls on an engine that has everything in memory.
fn calls(checkpoint: &Arc<Checkpoint>) {
    for threads in [1, 2] {
        let engine = engine(checkpoint, 1.0, threads);
        for (experts, rows) in [(1, 1), (8, 1), (32, 2), (64, 1), (64, 9)] {
            let groups = groups(experts, rows);
            let values = usize::from(experts) * rows as usize * engine.shape().d_model;
            let (x, mut out) = (vec![0.5; values], vec![0.0; values]);
            let call = ExpertCall { layer: LayerId(2), groups: &groups, activations: &x };
            measure(&format!("engine: {experts} experts x {rows} rows, resident, {threads} threads"), 1000, 1, || {
                timed(|| _ = engine.compute(call, &mut out).expect("a call"))
            });
        }
    }
}

/// Whole passes over all layers, every expert touched, with a plan per pass two passes ahead.
fn passes(checkpoint: &Arc<Checkpoint>) {
    let mut whole = Duration::ZERO;
    for (share, planned) in [(1.0, true), (0.5, true), (0.25, true), (0.25, false), (0.02, true)] {
        let engine = engine(checkpoint, share, 2);
        let groups = groups(EXPERTS, 9);
        let values = usize::from(EXPERTS) * 9 * engine.shape().d_model;
        let (x, mut out) = (vec![0.5; values], vec![0.0; values]);
        let mut id = 0;
        let what =
            format!("engine: pass of 6 layers x 64 experts x 9 rows, {}% resident, planned: {planned}", share * 100.0);
        let median = measure(&what, 100, 1, || {
            id += 1;
            timed(|| {
                if planned {
                    engine.plan(whole_plan(id));
                }
                for layer in (0..LAYERS).map(LayerId) {
                    let call = ExpertCall { layer, groups: &groups, activations: &x };
                    engine.compute(call, &mut out).expect("a call");
                }
                engine.release(PlanId(id.saturating_sub(1)));
            })
        });
        whole = if share == 1.0 { median } else { whole };
        let report = engine.residency();
        println!(
            "    {:.2} of the speed with all in memory; demand loads {}, prefetched {} in {id} passes",
            whole.as_secs_f64() / median.as_secs_f64(),
            report.demand_loads,
            report.prefetch_loads
        );
    }
}

/// A call there and back over loopback, against the same call made directly.
async fn lane(checkpoint: &Arc<Checkpoint>) {
    let engine = Arc::new(engine(checkpoint, 1.0, 2));
    let mut config = ExpertNodeConfig::new("bench".into(), MODEL.into());
    config.threads = 2;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let (served, model) = (engine.clone(), engine.model().to_string());
    let experts = checkpoint.config();
    let cluster = Cluster::fixed(Vec::new(), experts.moe_layer_count(), experts.num_experts, 1).expect("a cluster");
    let end = CancellationToken::new();
    tokio::spawn(async move { sida_expert_node::serve(served, &config, listener, cluster, end).await });
    let channel = sida_rpc::connect(&address, &Default::default()).await.expect("a connection");
    let (requests, outgoing) = unbounded_channel();
    let mut request = Request::new(UnboundedReceiverStream::new(outgoing));
    request.metadata_mut().insert(MODEL_DIGEST_METADATA, model.parse().expect("hex"));
    let mut answers = ExpertsClient::new(channel).lane(request).await.expect("a lane").into_inner();
    for (experts, rows) in [(1, 1), (32, 2), (64, 9)] {
        let groups = groups(experts, rows);
        let x = vec![0.5; usize::from(experts) * rows as usize * engine.shape().d_model];
        let mut out = x.clone();
        let call = ExpertCall { layer: LayerId(2), groups: &groups, activations: &x };
        let (mut there_and_back, mut direct) = (Vec::new(), Vec::new());
        for id in 0..2000 {
            let start = Instant::now();
            let activations = v1::Activations::new(id, LayerId(2), &groups, &x);
            requests.send(LaneRequest { kind: Some(Kind::Activations(activations)) }).expect("an open lane");
            let results = loop {
                let message = answers.message().await.expect("an answer").expect("an open lane");
                if let Some(lane_response::Kind::Results(results)) = message.kind {
                    break results;
                }
            };
            there_and_back.push(start.elapsed());
            assert!(results.error.is_none());
            direct.push(timed(|| _ = engine.compute(call, &mut out).expect("a call")));
        }
        there_and_back.sort();
        direct.sort();
        println!(
            "lane: {:>4} rows over loopback: median {:.1?} (p99 {:.1?}), directly {:.1?}, added {:.1?}",
            u32::from(experts) * rows,
            there_and_back[1000],
            there_and_back[1980],
            direct[1000],
            there_and_back[1000].saturating_sub(direct[1000])
        );
        checksums(&rows::to_payload(&x), there_and_back[1000]);
    }
    signs_of_life(&requests).await;
}

/// The sums of a call's rows and of its answer's, each made and checked.
fn checksums(payload: &[u8], there_and_back: Duration) {
    let mut sums: Vec<Duration> =
        (0..2000).map(|_| timed(|| _ = black_box(crc32fast::hash(black_box(payload))))).collect();
    sums.sort();
    let sum = sums[1000];
    println!(
        "    a checksum over {} bytes: {sum:.2?}, {:.3} ns a byte; the four of a call are {:.2}% of it",
        payload.len(),
        sum.as_nanos() as f64 / payload.len() as f64,
        400.0 * sum.as_secs_f64() / there_and_back.as_secs_f64()
    );
}

/// What a small message on a lane costs both sides together: one that, like a sign of life, asks for nothing. One at a
/// time, as they come, against as many wakes without one.
async fn signs_of_life(requests: &UnboundedSender<LaneRequest>) {
    const MESSAGES: u32 = 4000;
    let mut costs = Vec::new();
    for speaks in [false, true, false, true, false, true] {
        let start = cpu();
        for plan_id in 0..MESSAGES {
            tokio::time::sleep(Duration::from_millis(1)).await;
            if speaks {
                let release = Kind::Release(v1::Release { plan_id: plan_id.into() });
                requests.send(LaneRequest { kind: Some(release) }).expect("an open lane");
            }
        }
        costs.push((cpu() - start) / MESSAGES);
    }
    for pair in costs.chunks(2) {
        let cost = pair[1].saturating_sub(pair[0]);
        let percent = 100.0 * 40.0 * cost.as_secs_f64();
        println!("a small message: {cost:.1?} of CPU on both sides; 40 a second on a lane are {percent:.3}% of a core");
    }
}

/// How long the threads of this process have run.
fn cpu() -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").expect("Linux");
    let ran = |task: std::io::Result<std::fs::DirEntry>| {
        let stat = std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?;
        stat.split(' ').next()?.parse::<u64>().ok()
    };
    Duration::from_nanos(tasks.filter_map(ran).sum())
}
