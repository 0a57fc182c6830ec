//! The coordinator: takes requests, batches them, predicts and preloads their experts, runs the backbone and
//! sends the rows of every MoE layer to the expert-nodes.
//!
//! One request in reading order. It comes in through [`config`]ured limits: `front_door` (gRPC) and `messages`
//! (the wire's side), or this process by [`coordinator`]; `accept` checks and tokenizes what was `asked` into a [`request`].
//! It waits in a `queue`; `prepare` takes a batch, has `predict` (here, or by `remote_predictor`) fill its hash
//! tables and `preload` hint them. The `engine` lets it `join`: `forward` runs `walker`s with a `batch` through the layers, [`routing_mode`] chooses
//! experts, `dispatch` takes the rows from where they are (`layer_rows`) in `calls` to the `nodes`, those `here` or over `lane`s
//! (`lane_connection`, `lane_call`, `lane_window`, `call_deadline`, `call_failure`), `share_out` saying whom to ask,
//! `outstanding` and `waiting` for how long, and `callers` who still wants an answer. A `sequence` goes on from step to
//! step: `sampler`, `detokenize`, `stop_text`, or `score`, or `encoding`; the answer leaves as [`output`] with its [`trace`],
//! or as a `fault`. Work for several at once has a `batch_span`. Beside that: [`start`], `probe` (health), `cluster_service`, `unheld`,
//! `statistics`, `costs`, `route_measures` and `measures`.
//!
//! Invariant: it does not know expert-nodes but by `sida_cluster::experts` and the wire, and takes no decision
//! that belongs to `sida_routing`.

mod accept;
mod asked;
mod batch;
mod batch_span;
mod call_deadline;
mod call_failure;
mod callers;
mod calls;
mod cluster_service;
pub mod config;
pub mod coordinator;
mod costs;
mod detokenize;
mod dispatch;
mod encoding;
mod engine;
mod fault;
mod forward;
mod front_door;
mod here;
mod join;
mod lane;
mod lane_call;
mod lane_connection;
mod lane_window;
mod layer_rows;
mod measures;
mod messages;
mod nodes;
pub mod output;
mod outstanding;
mod predict;
mod preload;
mod prepare;
mod probe;
mod queue;
mod remote_predictor;
pub mod request;
mod route_measures;
pub mod routing_mode;
mod sampler;
mod score;
mod sequence;
mod share_out;
pub mod start;
mod statistics;
mod stop_text;
pub mod trace;
mod unheld;
mod waiting;
mod walker;

use std::time::Duration;

use sida_cluster::Cluster;
use sida_proto::v1::{cluster_server::ClusterServer, inference_server::InferenceServer};
use sida_rpc::{MESSAGE_BYTES_MAX, Server};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

pub use accept::{EncodeParams, GenerateParams, ScoreParams};
pub use config::{CoordinatorConfig, MicroBatching, PredictorSource, RequestLimits};
pub use coordinator::{Coordinator, TokenStream};
pub use output::{Encoding, Finish, FinishReason, Scores, TargetScore, Token};
pub use request::{Pooling, RequestError};
pub use routing_mode::{Alpha, RoutingMode};
pub use sampler::Sampling;
pub use sida_routing::admission::Limits;
pub use start::CoordinatorError;
pub use trace::Trace;

/// Starts a coordinator and serves it on `listener` until `shutdown`; then finishes what is in flight.
pub async fn run(
    config: CoordinatorConfig,
    listener: TcpListener,
    cluster: Cluster,
    shutdown: CancellationToken,
) -> Result<(), CoordinatorError> {
    let coordinator = Coordinator::start(config, cluster).await?;
    serve(coordinator, listener, shutdown).await
}

/// How long others may take to see that this node goes, before it takes no more requests.
const LEAVE_PATIENCE: Duration = Duration::from_secs(2);

/// Serves a coordinator that runs already, so that this process can ask it, too. At `shutdown` health says NOT_SERVING
/// and the coordinator leaves its cluster; then it takes no more requests and finishes those in flight.
pub async fn serve(
    coordinator: Coordinator,
    listener: TcpListener,
    shutdown: CancellationToken,
) -> Result<(), CoordinatorError> {
    let inference = InferenceServer::new(front_door::FrontDoor::new(coordinator.clone())?)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let status = ClusterServer::new(cluster_service::ClusterService { coordinator: coordinator.clone() });
    let probe = |coordinator: &Coordinator| {
        let coordinator = coordinator.clone();
        move || {
            let coordinator = coordinator.clone();
            async move { coordinator.probe().await }
        }
    };
    Server::new(coordinator.config().server.clone())
        .routes(Routes::new(inference).add_service(status))
        .descriptors(sida_proto::DESCRIPTORS)
        .check("sida.v1.Inference", probe(&coordinator))
        .check("sida.v1.Cluster", || async { Ok(()) })
        .alive({
            let coordinator = coordinator.clone();
            move || coordinator.is_alive()
        })
        .leaving(shutdown.clone())
        .serve(listener, coordinator.cluster().left_after(shutdown, LEAVE_PATIENCE))
        .await?;
    coordinator.stop().await;
    Ok(())
}
