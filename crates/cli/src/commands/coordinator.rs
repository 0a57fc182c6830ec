//! `sida coordinator`: one coordinator of a cluster.

use std::process::ExitCode;

use clap::Args;
use sida_cluster::Role;
use sida_coordinator::{Coordinator, CoordinatorConfig, CoordinatorError, Listeners};
use sida_rpc::Readiness;

use crate::{
    arguments::{
        cache::CacheArguments,
        connection::ConnectionArguments,
        device::{self, DeviceArguments},
        keys::{ApiKeysArguments, ClusterKeyArguments},
        limits::LimitArguments,
        membership::MembershipArguments,
        micro_batches::MicroBatchArguments,
        model::ModelArguments,
        predictor::PredictorArguments,
        server::{self, HttpArguments, METRICS_OF_NODES, ServerArguments},
    },
    bad_configuration::BadConfiguration,
    loading_bar, runtime, shutdown,
};

/// Run one coordinator: takes requests, predicts, runs the dense layers and asks the expert-nodes
#[derive(Args)]
pub(crate) struct CoordinatorArguments {
    #[command(flatten)]
    membership: MembershipArguments,
    #[command(flatten)]
    http: HttpArguments,
    #[command(flatten)]
    model: ModelArguments,
    #[command(flatten)]
    device: DeviceArguments,
    #[command(flatten)]
    cache: CacheArguments,
    /// With a GPU: send rows to expert-nodes on this machine, too, although they could read them in its memory
    #[arg(long)]
    send_rows: bool,
    #[command(flatten)]
    predictor: PredictorArguments,
    #[command(flatten)]
    limits: LimitArguments,
    #[command(flatten)]
    micro_batches: MicroBatchArguments,
    #[command(flatten)]
    server: ServerArguments,
    #[command(flatten)]
    connection: ConnectionArguments,
    #[command(flatten)]
    api_keys: ApiKeysArguments,
    #[command(flatten)]
    cluster_key: ClusterKeyArguments,
}

impl CoordinatorArguments {
    /// The node's name.
    pub(crate) fn name(&self) -> &str {
        self.membership.name()
    }
}

/// Serves until Ctrl-C or SIGTERM, then drains.
pub(crate) fn run(arguments: CoordinatorArguments) -> anyhow::Result<ExitCode> {
    arguments.model.start_threads()?;
    runtime::run(async {
        let shutdown = shutdown::on_signal()?;
        let member = arguments.membership.member(Role::Coordinator)?;
        let checkpoint = arguments.model.open()?;
        // The port before the cluster, whose members are told of it.
        let grpc = server::bind("the node's address", &member.address).await?;
        // Nowhere by default: a node that others can reach opens no port that its operator did not name.
        let listeners = Listeners { grpc, http: arguments.http.bind(None).await? };
        let gate = arguments.api_keys.gate()?;
        let readiness = Readiness::default();
        let metrics = arguments.server.metrics(METRICS_OF_NODES).await?;
        let model = (checkpoint.config(), checkpoint.digest());
        let cluster = arguments.membership.cluster(&member, listeners.grpc.local_addr()?, model, 1.0)?;
        let predictor = arguments.predictor.source(&checkpoint, &cluster)?;
        let mut config = CoordinatorConfig::new(member.node, checkpoint, predictor);
        arguments.limits.apply(&mut config);
        arguments.http.apply(&mut config);
        (config.device, config.precision) = arguments.device.chosen()?;
        arguments.cache.apply(&mut config)?;
        config.share_rows = !arguments.send_rows;
        config.micro_batching = arguments.micro_batches.wanted();
        config.client = arguments.connection.client();
        arguments.cluster_key.apply(&mut config.client)?;
        config.server = arguments.server.server(&arguments.connection, gate, readiness.clone())?;
        metrics.serve(readiness);
        config.on_load = Some(loading_bar::of_model(&config.checkpoint));
        let coordinator = Coordinator::start(config, cluster).await.map_err(refused)?;
        server::announce_doors(&listeners)?;
        sida_coordinator::serve(coordinator, listeners, shutdown).await?;
        Ok(ExitCode::SUCCESS)
    })
}

/// A device that is not there or does not hold the model, and a cluster that cannot serve it, are the caller's mistake.
pub(crate) fn refused(error: CoordinatorError) -> anyhow::Error {
    match error {
        CoordinatorError::Model(error) => device::model_refused(error),
        error @ (CoordinatorError::PredictorModel { .. }
        | CoordinatorError::Extent { .. }
        | CoordinatorError::NoCapacity { .. }
        | CoordinatorError::NoExpertNode) => BadConfiguration::new(error.to_string()).into(),
        error => error.into(),
    }
}
