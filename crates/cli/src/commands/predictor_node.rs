//! `sida predictor-node`: one predictor-node of a cluster.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;
use sida_cluster::Role;
use sida_predictor_node::{PredictorLimits, PredictorNodeConfig};
use sida_rpc::Readiness;

use crate::{
    arguments::{
        connection::ConnectionArguments,
        keys::ClusterKeyArguments,
        learn::LearnArguments,
        membership::MembershipArguments,
        model::ModelArguments,
        predictor::default_file,
        server::{self, METRICS_OF_NODES, ServerArguments},
    },
    runtime, shutdown,
};

/// Run one predictor-node: serves the hash predictor to coordinators
#[derive(Args)]
pub(crate) struct PredictorNodeArguments {
    #[command(flatten)]
    membership: MembershipArguments,
    #[command(flatten)]
    model: ModelArguments,
    /// The predictor's file [default: predictor.safetensors beside the model]
    #[arg(long, value_name = "FILE")]
    predictor: Option<PathBuf>,
    #[command(flatten)]
    learn: LearnArguments,
    #[command(flatten)]
    server: ServerArguments,
    #[command(flatten)]
    connection: ConnectionArguments,
    #[command(flatten)]
    cluster_key: ClusterKeyArguments,
}

impl PredictorNodeArguments {
    /// The node's name.
    pub(crate) fn name(&self) -> &str {
        self.membership.name()
    }
}

/// Serves until Ctrl-C or SIGTERM, then drains.
pub(crate) fn run(arguments: PredictorNodeArguments) -> anyhow::Result<ExitCode> {
    arguments.model.start_threads()?;
    runtime::run(async {
        let shutdown = shutdown::on_signal()?;
        let member = arguments.membership.member(Role::PredictorNode)?;
        let checkpoint = arguments.model.open()?;
        let model = checkpoint.config();
        // The port before the cluster, whose members are told of it.
        let listener = server::bind("the node's address", &member.address).await?;
        let gate = arguments.cluster_key.gate()?;
        let readiness = Readiness::default();
        let file = arguments.predictor.clone().unwrap_or_else(|| default_file(&checkpoint));
        let (predictor, learn) = arguments.learn.open(file, &checkpoint)?;
        let metrics = arguments.server.metrics(METRICS_OF_NODES).await?;
        let facts = (model, checkpoint.digest());
        let cluster = arguments.membership.cluster(&member, listener.local_addr()?, facts, 1.0)?;
        let threads = arguments.model.threads();
        let config = PredictorNodeConfig {
            limits: PredictorLimits { threads, ..PredictorLimits::default() },
            learn,
            server: arguments.server.server(&arguments.connection, gate, readiness.clone())?,
            ..PredictorNodeConfig::new(member.node, model, predictor)
        };
        metrics.serve(readiness);
        server::announce(&listener)?;
        sida_predictor_node::run(config, listener, cluster, shutdown).await?;
        Ok(ExitCode::SUCCESS)
    })
}
