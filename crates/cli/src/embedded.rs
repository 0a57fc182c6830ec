//! A whole cluster in this process: a coordinator with its predictor, and expert-nodes that it calls directly.
//! Started by `ask`, `up`, `bench` and `eval`.

use std::{net::SocketAddr, path::Path, sync::Arc};

use sida_cluster::{Address, Cluster, Member, Role, experts::LocalExperts};
use sida_coordinator::{Coordinator, CoordinatorConfig};
use sida_expert_node::{Engine, ExpertMemory, ExpertNodeConfig, ExpertNodeError, smallest_memory::smallest};
use sida_model::{Checkpoint, DeviceName};
use sida_routing::{Candidate, ExpertKey, Extent, NodeId, Placement};
use tokio::task::JoinHandle;

use crate::{
    arguments::{embedded::EmbeddedArguments, model::ModelArguments, predictor::PredictorArguments},
    bad_configuration::BadConfiguration,
    commands::{coordinator, expert_node},
    coordinator_client::CoordinatorClient,
    loading_bar,
};

/// More than this in one process is a mistake.
const EXPERT_NODES_MAX: usize = 64;
/// The name of the coordinator.
const COORDINATOR: &str = "coordinator-0";

/// The running cluster.
pub(crate) struct EmbeddedCluster {
    coordinator: Coordinator,
    engines: Vec<Arc<Engine>>,
}

impl EmbeddedCluster {
    /// Starts the cluster that the flags describe, with a bar while the model loads. `address` is where its
    /// coordinator will serve, if it will; `adapt` may change the coordinator's settings, before anything is loaded and once
    /// nothing that the flags say can be refused any more.
    pub(crate) async fn start(
        model: &ModelArguments,
        predictor: &PredictorArguments,
        embedded: &EmbeddedArguments,
        address: Option<SocketAddr>,
        adapt: impl FnOnce(&mut CoordinatorConfig),
    ) -> anyhow::Result<Self> {
        let checkpoint = model.open()?;
        let engines = engines(&checkpoint, embedded, model.threads())?;
        let coordinator = address.map(|address| Member {
            node: COORDINATOR.into(),
            role: Role::Coordinator,
            address: Address::Grpc(address.to_string()),
            weight: 1.0,
        });
        let members = coordinator.into_iter().chain(engines.iter().map(local_member)).collect();
        let config = checkpoint.config();
        let cluster = Cluster::fixed(members, config.moe_layer_count(), config.num_experts, 1)?;
        let predictor = predictor.source(&checkpoint, &cluster)?;
        let mut config = CoordinatorConfig::new(COORDINATOR.into(), checkpoint, predictor);
        (config.device, config.precision) = embedded.device.chosen()?;
        embedded.cache.apply(&mut config)?;
        config.micro_batching = embedded.micro_batches.wanted();
        config.on_load = Some(loading_bar::of_model(&config.checkpoint));
        adapt(&mut config);
        if embedded.device.device != DeviceName::Cpu {
            // On a GPU a load takes longer than a pass goes through a layer, so the first requests would wait for nearly every
            // expert.
            for engine in &engines {
                load(engine, placed_on(engine, &cluster)).await?;
            }
        }
        let coordinator = Coordinator::start(config, cluster).await.map_err(coordinator::refused)?;
        Ok(Self { coordinator, engines })
    }

    /// The coordinator.
    pub(crate) fn coordinator(&self) -> &Coordinator {
        &self.coordinator
    }

    /// The way in.
    pub(crate) fn client(&self) -> CoordinatorClient {
        CoordinatorClient::InProcess(self.coordinator.clone())
    }

    /// Has every expert-node that has room for all that is placed on it load that, while requests are answered: seldom used
    /// experts are there when they are, and nothing has to be predicted for long. Ends with the cluster.
    pub(crate) fn load_ahead(&self) {
        for engine in &self.engines {
            let placed = placed_on(engine, self.coordinator.cluster());
            if engine.residency().slots >= placed.len() as u64 {
                drop(load(engine, placed));
            }
        }
    }

    /// Answers what was accepted, then ends every thread.
    pub(crate) async fn stop(self) {
        self.coordinator.stop().await;
        for engine in &self.engines {
            engine.close();
        }
    }
}

/// The experts that are placed on a node.
fn placed_on(engine: &Engine, cluster: &Cluster) -> Vec<ExpertKey> {
    cluster.placement().held_by(engine.node()).collect()
}

/// Has a node load these experts, in a thread that ends when the node does.
fn load(engine: &Arc<Engine>, experts: Vec<ExpertKey>) -> JoinHandle<usize> {
    let engine = engine.clone();
    tokio::task::spawn_blocking(move || engine.load_ahead(&experts))
}

fn local_member(engine: &Arc<Engine>) -> Member {
    let experts: Arc<dyn LocalExperts> = engine.clone();
    Member { node: engine.node().clone(), role: Role::ExpertNode, address: Address::Local(experts), weight: 1.0 }
}

/// The expert-nodes. They and the coordinator compute on the same threads.
fn engines(
    checkpoint: &Arc<Checkpoint>,
    embedded: &EmbeddedArguments,
    threads: usize,
) -> anyhow::Result<Vec<Arc<Engine>>> {
    if !(1..=EXPERT_NODES_MAX).contains(&embedded.nodes()) {
        let found = embedded.nodes();
        let message = format!("--expert-nodes is {found}, expected 1 to {EXPERT_NODES_MAX}");
        return Err(BadConfiguration::new(message).into());
    }
    let shares = shares(checkpoint, embedded.nodes())?;
    let (device, precision) = embedded.device.chosen()?;
    let parts: Vec<f64> = shares.iter().map(|(_, share)| *share).collect();
    let engine = |(node, share): (NodeId, f64)| {
        let dir: &Path = checkpoint.dir();
        let config = ExpertNodeConfig {
            expert_memory: embedded.expert_memory.part(share),
            device,
            precision,
            host_memory: embedded.host_memory.part(share),
            packs: !embedded.no_packing,
            threads,
            ..ExpertNodeConfig::new(node, dir.to_owned())
        };
        let opened = Engine::of_checkpoint(&config, checkpoint.clone());
        Ok(Arc::new(opened.map_err(|error| refused(error, embedded.expert_memory, &parts))?))
    };
    shares.into_iter().map(engine).collect()
}

/// The nodes and the share of all experts that is placed on each: their part of the memory, so that "100%"
/// keeps every expert resident although placement is not perfectly even.
pub(crate) fn shares(checkpoint: &Checkpoint, expert_nodes: usize) -> anyhow::Result<Vec<(NodeId, f64)>> {
    let names = (0..expert_nodes).map(|index| NodeId::from(format!("expert-node-{index}")));
    let candidates: Vec<_> = names.map(|node| Candidate { node, weight: 1.0 }).collect();
    let config = checkpoint.config();
    let extent = Extent { moe_layers: config.moe_layer_count(), num_experts: config.num_experts, replicas: 1 };
    let placement = Placement::compute(1, extent, &candidates)?;
    let experts = (extent.moe_layers * extent.num_experts).max(1);
    let share = |node: &NodeId| placement.experts_of(node).count() as f64 / experts as f64;
    Ok(candidates.into_iter().map(|candidate| (candidate.node.clone(), share(&candidate.node))).collect())
}

/// A node's refusal of its part of the memory, told of the memory that was given for all of them.
fn refused(error: ExpertNodeError, memory: ExpertMemory, parts: &[f64]) -> anyhow::Error {
    let (needed_bytes, experts_bytes) = match error {
        ExpertNodeError::BudgetTooSmall { needed_bytes, experts_bytes, .. } if parts.len() > 1 => {
            (needed_bytes, experts_bytes)
        }
        error => return expert_node::refused(error),
    };
    let nodes = parts.len();
    let enough = match smallest(needed_bytes, experts_bytes, parts) {
        Some(smallest) => format!("give {smallest} or more, or fewer --expert-nodes"),
        None => "the model has too few experts for so many: give fewer --expert-nodes".to_owned(),
    };
    let message = format!(
        "--expert-memory {memory} is too small for {nodes} expert-nodes, each of which must hold at least two experts: {enough}"
    );
    BadConfiguration::new(message).into()
}
