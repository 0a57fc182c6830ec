//! `sida expert-node`: one expert-node of a cluster.

use std::process::ExitCode;

use clap::Args;
use sida_cluster::Role;
use sida_expert_node::{ExpertMemory, ExpertNodeConfig, ExpertNodeError};
use sida_model::ModelConfig;
use sida_rpc::Readiness;

use crate::{
    arguments::{
        connection::ConnectionArguments,
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
    /// Memory for experts: 2GiB, 300MB, or a share of all the model's experts as 25%
    #[arg(long, value_name = "SIZE", default_value = "100%")]
    expert_memory: ExpertMemory,
    #[command(flatten)]
    server: ServerArguments,
    #[command(flatten)]
    connection: ConnectionArguments,
}

/// Serves until Ctrl-C or SIGTERM, then drains.
pub(crate) fn run(arguments: ExpertNodeArguments) -> anyhow::Result<ExitCode> {
    arguments.model.start_threads()?;
    runtime::run(async {
        let shutdown = shutdown::on_signal()?;
        let model_dir = arguments.model.dir()?;
        let member = arguments.membership.member(Role::ExpertNode)?;
        let cluster = arguments.membership.cluster(&ModelConfig::open(&model_dir)?)?;
        let readiness = Readiness::default();
        let config = ExpertNodeConfig {
            expert_memory: arguments.expert_memory,
            threads: arguments.model.threads(),
            server: arguments.server.server(&arguments.connection, readiness.clone()),
            ..ExpertNodeConfig::new(member.node, model_dir)
        };
        arguments.server.serve_metrics(METRICS_OF_NODES, readiness, shutdown.clone()).await?;
        let listener = server::bind(&member.address).await?;
        server::announce(&listener)?;
        sida_expert_node::run(config, listener, cluster, shutdown).await.map_err(refused)?;
        Ok(ExitCode::SUCCESS)
    })
}

/// A budget that no model fits is the caller's mistake.
pub(crate) fn refused(error: ExpertNodeError) -> anyhow::Error {
    match error {
        ExpertNodeError::BudgetTooSmall { .. } => BadConfiguration::because("--expert-memory", error).into(),
        error => error.into(),
    }
}
