//! `sida expert-node`: one expert-node of a cluster.

use std::{process::ExitCode, sync::Arc};

use clap::Args;
use sida_cluster::Role;
use sida_expert_node::{ExpertMemory, ExpertNodeConfig, ExpertNodeError};
use sida_model::{Checkpoint, ExpertStore};
use sida_rpc::Readiness;

use crate::{
    arguments::{
        connection::ConnectionArguments,
        device::{self, DeviceArguments},
        keys::ClusterKeyArguments,
        membership::MembershipArguments,
        model::ModelArguments,
        server::{self, METRICS_OF_NODES, ServerArguments},
    },
    bad_configuration::BadConfiguration,
    runtime, shutdown,
};

/// Run one expert-node: holds experts in a memory budget and computes with them
#[derive(Args)]
pub(crate) struct ExpertNodeArguments {
    #[command(flatten)]
    membership: MembershipArguments,
    #[command(flatten)]
    model: ModelArguments,
    /// Memory for experts: 2GiB (by 1024), 300MB (by 1000), or a share of all the model's experts as 25%
    #[arg(long, value_name = "SIZE", default_value = "100%")]
    expert_memory: ExpertMemory,
    /// With a GPU: page-locked memory of the host for experts; the others come from disk when they are wanted
    #[arg(long, value_name = "SIZE", default_value = "100%")]
    host_memory: ExpertMemory,
    /// With a GPU whose memory for experts does not hold all: keep those in bf16 as they are instead of packed into three
    /// quarters of their bytes
    #[arg(long)]
    no_packing: bool,
    #[command(flatten)]
    device: DeviceArguments,
    /// Share of the experts that this node takes, relative to the others [default: its memory for experts in MiB]
    #[arg(long, value_name = "WEIGHT", value_parser = positive)]
    node_weight: Option<f64>,
    #[command(flatten)]
    server: ServerArguments,
    #[command(flatten)]
    connection: ConnectionArguments,
    #[command(flatten)]
    cluster_key: ClusterKeyArguments,
}

impl ExpertNodeArguments {
    /// The node's name.
    pub(crate) fn name(&self) -> &str {
        self.membership.name()
    }
}

/// Serves until Ctrl-C or SIGTERM, then drains.
pub(crate) fn run(arguments: ExpertNodeArguments) -> anyhow::Result<ExitCode> {
    arguments.model.start_threads()?;
    runtime::run(async {
        let shutdown = shutdown::on_signal()?;
        let model_dir = arguments.model.dir()?;
        let member = arguments.membership.member(Role::ExpertNode)?;
        let checkpoint = arguments.model.open()?;
        // The port before the cluster, whose members are told of it.
        let listener = server::bind("the node's address", &member.address).await?;
        let gate = arguments.cluster_key.gate()?;
        let readiness = Readiness::default();
        let metrics = arguments.server.metrics(METRICS_OF_NODES).await?;
        let model = (checkpoint.config(), checkpoint.digest());
        let weight = arguments.node_weight.map_or_else(|| weight(arguments.expert_memory, &checkpoint), Ok)?;
        let cluster = arguments.membership.cluster(&member, listener.local_addr()?, model, weight)?;
        let (device, precision) = arguments.device.chosen()?;
        let config = ExpertNodeConfig {
            expert_memory: arguments.expert_memory,
            host_memory: arguments.host_memory,
            packs: !arguments.no_packing,
            device,
            precision,
            threads: arguments.model.threads(),
            server: arguments.server.server(&arguments.connection, gate, readiness.clone())?,
            ..ExpertNodeConfig::new(member.node, model_dir)
        };
        metrics.serve(readiness);
        server::announce(&listener)?;
        sida_expert_node::run(config, listener, cluster, shutdown).await.map_err(refused)?;
        Ok(ExitCode::SUCCESS)
    })
}

/// A node is given experts as it has room for them.
fn weight(memory: ExpertMemory, checkpoint: &Arc<Checkpoint>) -> anyhow::Result<f64> {
    let config = checkpoint.config();
    let experts = (config.moe_layer_count() * config.num_experts) as u64;
    let experts_bytes = experts * ExpertStore::open(checkpoint.clone())?.shape().bytes() as u64;
    Ok(memory.bytes(experts_bytes).max(1) as f64 / f64::from(1 << 20))
}

fn positive(text: &str) -> Result<f64, String> {
    let weight = text.parse().ok().filter(|weight: &f64| weight.is_finite() && *weight > 0.0);
    weight.ok_or_else(|| format!("{text:?} is not a positive number"))
}

/// A budget that no model fits is the caller's mistake.
pub(crate) fn refused(error: ExpertNodeError) -> anyhow::Error {
    match error {
        ExpertNodeError::BudgetTooSmall { .. } => BadConfiguration::because("--expert-memory", error).into(),
        ExpertNodeError::Model(error) => device::model_refused(error),
        error => error.into(),
    }
}
