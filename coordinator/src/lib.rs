//! The coordinator: takes requests, batches them, predicts and preloads their experts, runs the backbone and
//! sends the rows of every MoE layer to the expert-nodes.
//!
//! Its folders are the way of a request, and each names only what is below it (`tests/import_direction.rs`):
//!
//! 1. `doors`: requests come in over gRPC, or from this process by [`coordinator`]; `start` builds all that stands below.
//! 2. `schedule`: who runs when.
//! 3. `forward`: a pass through the model.
//! 4. `predict`: hash tables, and the hints to expert-nodes.
//! 5. `dispatch`: the rows of an MoE layer, to the experts and back; `remote` in it, to other processes.
//! 6. `intake`: what is asked for becomes a checked request, and waits.
//! 7. `answer`: what an answer is made of.
//! 8. `measures` counts, and [`config`] is what a coordinator is told at its start.
//!
//! Invariant: it does not know expert-nodes but by `sida_cluster::experts` and the wire, and takes no decision
//! that belongs to `sida_routing`.

mod answer;
pub mod config;
pub mod coordinator;
mod dispatch;
mod doors;
mod forward;
mod intake;
mod measures;
mod predict;
mod schedule;
pub mod start;

use std::time::Duration;

use sida_cluster::Cluster;
use sida_proto::{
    inference::grpc_inference_service_server::GrpcInferenceServiceServer,
    v1::{cluster_server::ClusterServer, inference_server::InferenceServer},
};
use sida_rpc::{MESSAGE_BYTES_MAX, Server, ServerConfig, ServerError, http_server};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::{codec::CompressionEncoding, service::Routes};

pub use answer::{
    grammar::ToolCalls,
    hash_layers::HashLayers,
    output::{Encoding, Finish, FinishReason, Pooling, Scores, TargetScore, Token, TokenLogprob, TokenLogprobs},
    request_error::{RequestError, TextOf},
    routing_mode::{Alpha, RoutingMode},
    sampling::Sampling,
    token_stream::TokenStream,
    trace::{ExpertSets, HashCounts, Timings, Trace},
};
pub use config::{
    CoordinatorConfig, CorsOrigin, CorsOriginError, MicroBatching, PredictorSource, REQUEST_BYTES_MAX, RequestLimits,
};
pub use coordinator::Coordinator;
#[doc(hidden)]
pub use doors::readers;
pub use intake::{
    accept::{EncodeParams, GenerateParams, ScoreParams},
    prompt::{Prompt, PromptTokens, cut as cut_prompt},
};
pub use measures::door::Door;
pub use sida_routing::admission::Limits;
pub use start::CoordinatorError;

/// The ports of a coordinator's doors.
#[derive(Debug)]
pub struct Listeners {
    /// For gRPC.
    pub grpc: TcpListener,
    /// For HTTP as OpenAI's clients speak it; `None`: it is not served.
    pub http: Option<TcpListener>,
}

impl From<TcpListener> for Listeners {
    fn from(grpc: TcpListener) -> Self {
        Self { grpc, http: None }
    }
}

/// Starts a coordinator and serves it until `shutdown`; then finishes what is in flight.
pub async fn run(
    config: CoordinatorConfig,
    listeners: impl Into<Listeners>,
    cluster: Cluster,
    shutdown: CancellationToken,
) -> Result<(), CoordinatorError> {
    let coordinator = Coordinator::start(config, cluster).await?;
    serve(coordinator, listeners, shutdown).await
}

/// How long others may take to see that this node goes, before it takes no more requests.
const LEAVE_PATIENCE: Duration = Duration::from_secs(2);

/// Serves a coordinator that runs already, so that this process can ask it, too. At `shutdown` health says NOT_SERVING
/// and the coordinator leaves its cluster; then it takes no more requests and finishes those in flight.
pub async fn serve(
    coordinator: Coordinator,
    listeners: impl Into<Listeners>,
    shutdown: CancellationToken,
) -> Result<(), CoordinatorError> {
    let Listeners { grpc, http } = listeners.into();
    let inference = InferenceServer::new(doors::inference_service::InferenceService::new(coordinator.clone())?)
        .max_decoding_message_size(REQUEST_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
        .accept_compressed(CompressionEncoding::Gzip);
    let status = ClusterServer::new(doors::cluster_service::ClusterService { coordinator: coordinator.clone() })
        .accept_compressed(CompressionEncoding::Gzip);
    let open_inference = doors::open_inference::service::OpenInferenceService { coordinator: coordinator.clone() };
    let open_inference = GrpcInferenceServiceServer::new(open_inference)
        .max_decoding_message_size(REQUEST_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
        .accept_compressed(CompressionEncoding::Gzip);
    let probe = |coordinator: &Coordinator| {
        let coordinator = coordinator.clone();
        move || {
            let coordinator = coordinator.clone();
            async move { coordinator.probe().await }
        }
    };
    let left = coordinator.cluster().left_after(shutdown.clone(), LEAVE_PATIENCE);
    let server = Server::new(of_callers(&coordinator))
        .routes(Routes::new(inference).add_service(status).add_service(open_inference))
        .descriptors(sida_proto::DESCRIPTORS)
        .check("sida.v1.Inference", probe(&coordinator))
        .check("inference.GRPCInferenceService", probe(&coordinator))
        .check("sida.v1.Cluster", || async { Ok(()) })
        .alive({
            let coordinator = coordinator.clone();
            move || coordinator.is_alive()
        })
        .observed(doors::request_count::count)
        .leaving(shutdown)
        .serve(grpc, left.clone());
    // Both are served until both have drained: one that fails ends the other.
    tokio::try_join!(server, serve_http(&coordinator, http, left))?;
    coordinator.stop().await;
    Ok(())
}

/// A server's settings where callers come in: what they send is small, and there may be many of them.
fn of_callers(coordinator: &Coordinator) -> ServerConfig {
    ServerConfig {
        stream_window_bytes: 512 << 10,
        connection_window_bytes: 1 << 20,
        frame_bytes_max: 64 << 10,
        receiving_bytes_max: 256 << 20,
        large_bytes_per_second: Some(32 << 20),
        ..coordinator.config().server.clone()
    }
}

/// Serves OpenAI's clients on `listener`, if there is one.
async fn serve_http(
    coordinator: &Coordinator,
    listener: Option<TcpListener>,
    shutdown: CancellationToken,
) -> Result<(), ServerError> {
    let Some(listener) = listener else { return Ok(()) };
    doors::request_count::register_http();
    let late = CancellationToken::new();
    let routes = doors::openai::routes::routes(coordinator.clone(), late.clone());
    http_server::serve(&of_callers(coordinator), routes, listener, shutdown, late).await
}
