//! A node that serves the hash predictor, so that prediction scales out apart from the coordinators. It keeps
//! nothing between calls: the state of a decoding sequence travels with it, so that any predictor-node can
//! answer any call. One that learns also keeps what it was told of the traffic, which may be lost at any time. Started by
//! the command line and the tests through [`run`]; training a predictor is `sida_predictor`'s.
//!
//! In reading order: [`config`], [`error`], `serving` (the predictor), `service` (one call), `learn` (another predictor).

pub mod config;
pub mod error;
mod learn;
mod service;
mod serving;

use std::{sync::Arc, time::Duration};

use sida_cluster::{Cluster, Role};
use sida_proto::v1::predictor_server::{PredictorServer, SERVICE_NAME};
use sida_rpc::Server;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::{codec::CompressionEncoding, service::Routes};

pub use config::{LearnConfig, PredictorLimits, PredictorNodeConfig};
pub use error::PredictorNodeError;
use learn::Learner;
use service::PredictorService;
use serving::Serving;

/// How long others may take to see that this node goes, before it takes no more calls.
const LEAVE_PATIENCE: Duration = Duration::from_secs(2);

/// Serves `sida.v1.Predictor` on `listener` until `shutdown`; returns when the calls in flight are done.
pub async fn run(
    config: PredictorNodeConfig,
    listener: TcpListener,
    cluster: Cluster,
    shutdown: CancellationToken,
) -> Result<(), PredictorNodeError> {
    let PredictorNodeConfig { node, shape, predictor, limits, learn, server } = config;
    // A coordinator would never find a node that goes by another name than the cluster knows.
    if !cluster.members_of(Role::PredictorNode).iter().any(|member| member.node == node) {
        return Err(PredictorNodeError::NotAMember { node });
    }
    let (net, model) = (predictor.net().to_owned(), predictor.model_digest());
    let serving = Arc::new(Serving::new(predictor));
    let learner = learn.map(|learn| Learner::start(learn, serving.clone(), shape.clone())).transpose()?.map(Arc::new);
    tracing::info!(%node, net, %model, learns = learner.is_some(), "serving the hash predictor");
    let service = PredictorService::new(serving, learner, shape, limits);
    let checked = service.clone();
    let grpc = PredictorServer::new(service)
        .max_decoding_message_size(limits.request_bytes_max)
        .max_encoding_message_size(sida_rpc::MESSAGE_BYTES_MAX)
        .accept_compressed(CompressionEncoding::Gzip);
    Server::new(server)
        .routes(Routes::new(grpc))
        .descriptors(sida_proto::DESCRIPTORS)
        .check(SERVICE_NAME, move || checked.clone().check())
        .leaving(shutdown.clone())
        .serve(listener, cluster.left_after(shutdown, LEAVE_PATIENCE))
        .await?;
    Ok(())
}
