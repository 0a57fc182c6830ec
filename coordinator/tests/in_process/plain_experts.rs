//! An expert-node in this process at its plainest: every call loads its experts from the store and computes
//! them, and a test can make it fail. Stands behind the seam where a real expert-node would.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::{Condvar, Mutex};
use sida_cluster::{
    Address, Cluster, Member, Role,
    experts::{CallError, CallReport, ExpertCall, LocalExperts, ResidencyReport},
};
use sida_coordinator::{Coordinator, CoordinatorConfig, PredictorSource};
use sida_model::{Checkpoint, ExpertScratch, ExpertStore};
use sida_proto::v1::ResidencyResponse;
use sida_routing::{ExpertKey, LayerId, Plan, PlanId};
use tempfile::TempDir;

/// What a call to a node does.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Behaviour {
    /// Computes.
    Works,
    /// Refuses every call.
    ShutsDown,
    /// Has a device that fails.
    DeviceFails,
    /// Cannot load one expert.
    Lacks(ExpertKey),
    /// Panics.
    Panics,
    /// Computes after a while.
    Slow(Duration),
    /// Answers with what is not a number.
    Nan,
    /// Computes when another call to the layer is there.
    AwaitsAnother,
}

/// The node.
pub(crate) struct PlainExperts {
    store: ExpertStore,
    behaviour: Mutex<Behaviour>,
    /// Calls to each layer while each awaits another.
    calls: Mutex<BTreeMap<LayerId, usize>>,
    another: Condvar,
    pub(crate) rows: AtomicU64,
    /// The most rows of one call to each layer.
    pub(crate) rows_most: Mutex<BTreeMap<LayerId, u64>>,
    /// Plans given and not yet released.
    pub(crate) plans: Mutex<Vec<Plan>>,
    pub(crate) plans_total: AtomicU64,
    /// Experts that a call asked for and no plan of that moment named.
    pub(crate) unplanned: AtomicU64,
    /// How many experts the node says it holds.
    pub(crate) resident: AtomicUsize,
    /// Whether the node says that plans gain it nothing.
    pub(crate) gains_nothing: AtomicBool,
    /// The placement that the node knows, and what it sends to those who know an older one.
    pub(crate) newer: Mutex<(u64, bytes::Bytes)>,
    /// What the node says of itself.
    pub(crate) described: Mutex<ResidencyResponse>,
}

impl PlainExperts {
    pub(crate) fn behave(&self, behaviour: Behaviour) {
        *self.behaviour.lock() = behaviour;
    }

    fn note_unplanned(&self, call: &ExpertCall<'_>) {
        let plans = self.plans.lock();
        let is_planned = |expert| {
            let key = ExpertKey { layer: call.layer, expert };
            plans.iter().any(|plan| plan.experts.contains(&key))
        };
        let unplanned = call.groups.iter().filter(|group| !is_planned(group.expert)).count();
        self.unplanned.fetch_add(unplanned as u64, Ordering::Relaxed);
    }

    fn await_another(&self, layer: LayerId) {
        let mut calls = self.calls.lock();
        *calls.entry(layer).or_default() += 1;
        self.another.notify_all();
        while calls[&layer] < 2 {
            if self.another.wait_for(&mut calls, Duration::from_secs(10)).timed_out() {
                *calls.entry(layer).or_default() -= 1;
                panic!("a call to layer {layer} stayed alone");
            }
        }
    }
}

impl LocalExperts for PlainExperts {
    fn plan(&self, plan: Plan) {
        self.plans_total.fetch_add(1, Ordering::Relaxed);
        self.plans.lock().push(plan);
    }

    fn release(&self, plan: PlanId) {
        self.plans.lock().retain(|kept| kept.id != plan);
    }

    fn compute(&self, call: ExpertCall<'_>, out: &mut [f32]) -> Result<CallReport, CallError> {
        let behaviour = *self.behaviour.lock();
        match behaviour {
            Behaviour::ShutsDown => return Err(CallError::ShuttingDown),
            Behaviour::DeviceFails => return Err(CallError::Device { reason: "it is lost".to_owned() }),
            Behaviour::Panics => panic!("as the test asked"),
            Behaviour::Slow(delay) => std::thread::sleep(delay),
            Behaviour::AwaitsAnother => self.await_another(call.layer),
            _ => {}
        }
        self.note_unplanned(&call);
        let shape = *self.store.shape();
        let (mut slot, mut scratch) = (vec![0; shape.bytes()], ExpertScratch::default());
        let mut from = 0;
        for group in call.groups {
            let key = ExpertKey { layer: call.layer, expert: group.expert };
            if behaviour == Behaviour::Lacks(key) {
                return Err(CallError::Load { key, reason: "the test took it away".to_owned() });
            }
            let failed = |error: sida_model::ModelError| CallError::Load { key, reason: error.to_string() };
            self.store.load(key, &mut slot).map_err(failed)?;
            let rows = from..from + group.rows as usize * shape.d_model;
            shape.forward(&slot, &call.activations[rows.clone()], &mut out[rows.clone()], &mut scratch);
            from = rows.end;
        }
        if behaviour == Behaviour::Nan {
            out.fill(f32::NAN);
        }
        let rows = call.groups.iter().map(|group| u64::from(group.rows)).sum();
        self.rows.fetch_add(rows, Ordering::Relaxed);
        let mut most = self.rows_most.lock();
        let most = most.entry(call.layer).or_default();
        *most = rows.max(*most);
        Ok(CallReport { hits: call.groups.len() as u32, ..CallReport::default() })
    }

    fn resident_count(&self) -> usize {
        self.resident.load(Ordering::Relaxed)
    }

    fn gains_by_plans(&self) -> bool {
        !self.gains_nothing.load(Ordering::Relaxed)
    }

    fn residency(&self) -> ResidencyReport {
        ResidencyReport::default()
    }
}

/// Where the small model of this repository lies.
pub(crate) fn model_dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/switch-tiny-64")
}

/// Where a small decoder-only model lies, with a tokenizer that goes by bytes. Its weights are random.
pub(crate) fn decoder_only_dir() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/data/parity/causal-text")
}

/// The small model with one of its files in another form, made of what it holds now.
pub(crate) fn model_with(file: &str, edit: impl FnOnce(Vec<u8>) -> Vec<u8>) -> (TempDir, Arc<Checkpoint>) {
    let dir = tempfile::tempdir().expect("a folder");
    for entry in fs::read_dir(model_dir()).expect("model") {
        let path = entry.expect("a file").path();
        symlink(&path, dir.path().join(path.file_name().expect("a name"))).expect("a link");
    }
    let path = dir.path().join(file);
    let content = fs::read(&path).unwrap_or_default();
    // The link goes, not what it points to.
    let _ = fs::remove_file(&path);
    fs::write(&path, edit(content)).expect("written");
    let checkpoint = Checkpoint::open(dir.path()).expect("model");
    (dir, checkpoint)
}

/// A coordinator with plain expert-nodes.
pub(crate) struct PlainCluster {
    pub(crate) coordinator: Coordinator,
    pub(crate) nodes: Vec<Arc<PlainExperts>>,
}

/// Plain experts of the small model.
pub(crate) fn experts() -> Arc<PlainExperts> {
    experts_of(&model_dir())
}

/// Plain experts of a model.
pub(crate) fn experts_of(model: &Path) -> Arc<PlainExperts> {
    let checkpoint = Checkpoint::open(model).expect("model");
    let described = ResidencyResponse {
        model_digest: checkpoint.digest().0.to_vec().into(),
        experts_digest: checkpoint.experts_digest().0.to_vec().into(),
        ..Default::default()
    };
    Arc::new(PlainExperts {
        described: Mutex::new(described),
        store: ExpertStore::open(checkpoint).expect("experts"),
        behaviour: Mutex::new(Behaviour::Works),
        calls: Mutex::default(),
        another: Condvar::new(),
        rows: AtomicU64::new(0),
        rows_most: Mutex::default(),
        plans: Mutex::new(Vec::new()),
        plans_total: AtomicU64::new(0),
        unplanned: AtomicU64::new(0),
        resident: AtomicUsize::new(0),
        gains_nothing: AtomicBool::new(false),
        newer: Mutex::default(),
    })
}

/// Starts a coordinator over so many nodes in this process; `configure` changes its config first.
pub(crate) async fn start(
    nodes: usize,
    predictor: PredictorSource,
    configure: impl FnOnce(&mut CoordinatorConfig),
) -> PlainCluster {
    start_model(&model_dir(), nodes, predictor, configure).await
}

/// The same of a model that is not the small one.
pub(crate) async fn start_model(
    model: &Path,
    nodes: usize,
    predictor: PredictorSource,
    configure: impl FnOnce(&mut CoordinatorConfig),
) -> PlainCluster {
    let nodes: Vec<Arc<PlainExperts>> = (0..nodes).map(|_| experts_of(model)).collect();
    let addresses = nodes.iter().map(|experts| Address::Local(experts.clone())).collect();
    PlainCluster { coordinator: start_model_over(model, addresses, Vec::new(), predictor, configure).await, nodes }
}

/// Starts a coordinator over expert-nodes at these addresses, and these other members.
pub(crate) async fn start_over(
    experts: Vec<Address>,
    others: Vec<Member>,
    predictor: PredictorSource,
    configure: impl FnOnce(&mut CoordinatorConfig),
) -> Coordinator {
    start_model_over(&model_dir(), experts, others, predictor, configure).await
}

/// [`start_over`] with the model in a directory.
pub(crate) async fn start_model_over(
    model: &Path,
    experts: Vec<Address>,
    others: Vec<Member>,
    predictor: PredictorSource,
    configure: impl FnOnce(&mut CoordinatorConfig),
) -> Coordinator {
    let checkpoint = Checkpoint::open(model).expect("model");
    let member = |(at, address): (usize, Address)| Member {
        node: format!("expert-node-{at}").into(),
        role: Role::ExpertNode,
        address,
        weight: 1.0,
    };
    let members = experts.into_iter().enumerate().map(member).chain(others).collect();
    let config = checkpoint.config();
    let (layers, num_experts) = (config.moe_layer_count(), config.num_experts);
    let cluster = Cluster::fixed_of(checkpoint.digest(), members, layers, num_experts, 2).expect("cluster");
    let mut config = CoordinatorConfig::new("coordinator".into(), checkpoint, predictor);
    configure(&mut config);
    Coordinator::start(config, cluster).await.expect("coordinator")
}
