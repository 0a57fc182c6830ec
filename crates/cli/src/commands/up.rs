//! `sida up`: the embedded cluster as a server.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::ExitCode,
};

use clap::Args;
use sida_coordinator::Listeners;
use sida_rpc::Readiness;

use crate::{
    arguments::{
        connection::ConnectionArguments,
        embedded::EmbeddedArguments,
        keys::ApiKeysArguments,
        limits::LimitArguments,
        model::ModelArguments,
        predictor::PredictorArguments,
        server::{self, HttpArguments, ServerArguments},
    },
    embedded::EmbeddedCluster,
    runtime, shutdown,
};

/// Where metrics are served unless the flag says otherwise: for this machine only, as is the service.
const METRICS_DEFAULT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9090);

/// The same of OpenAI's clients.
const HTTP_DEFAULT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8000);

/// Serve a whole cluster from this process: coordinator, predictor and expert-nodes
#[derive(Args)]
pub(crate) struct UpArguments {
    /// Where requests are taken (gRPC); port 0 takes any that is free
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:50051")]
    listen: String,
    #[command(flatten)]
    http: HttpArguments,
    #[command(flatten)]
    model: ModelArguments,
    #[command(flatten)]
    predictor: PredictorArguments,
    #[command(flatten)]
    embedded: EmbeddedArguments,
    #[command(flatten)]
    limits: LimitArguments,
    #[command(flatten)]
    server: ServerArguments,
    #[command(flatten)]
    connection: ConnectionArguments,
    #[command(flatten)]
    api_keys: ApiKeysArguments,
}

/// Serves until Ctrl-C or SIGTERM, then drains.
pub(crate) fn run(arguments: UpArguments) -> anyhow::Result<ExitCode> {
    arguments.model.start_threads()?;
    runtime::run(async {
        let shutdown = shutdown::on_signal()?;
        // The ports first: a taken one is told before the model is loaded.
        let grpc = server::bind("--listen", &arguments.listen).await?;
        let listeners = Listeners { grpc, http: arguments.http.bind(Some(HTTP_DEFAULT)).await? };
        let gate = arguments.api_keys.gate()?;
        let readiness = Readiness::default();
        let metrics = arguments.server.metrics(METRICS_DEFAULT).await?;
        let server = arguments.server.server(&arguments.connection, gate, readiness.clone())?;
        let address = Some(listeners.grpc.local_addr()?);
        let cluster =
            EmbeddedCluster::start(&arguments.model, &arguments.predictor, &arguments.embedded, address, |config| {
                arguments.limits.apply(config);
                arguments.http.apply(config);
                config.server = server;
                metrics.serve(readiness);
            })
            .await?;
        cluster.load_ahead();
        server::announce_doors(&listeners)?;
        sida_coordinator::serve(cluster.coordinator().clone(), listeners, shutdown).await?;
        cluster.stop().await;
        Ok(ExitCode::SUCCESS)
    })
}
