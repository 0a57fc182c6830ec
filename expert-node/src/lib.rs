//! An expert-node: keeps the experts that are wanted next in a fixed amount of memory, and computes rows with
//! them for coordinators. It is stateless between requests: it can serve any expert of its model from its store,
//! at the price of a load.
//!
//! Invariant: knows no other kind of node; what it decides about memory comes from
//! [`sida_routing::residency`], what it computes from [`sida_model::expert`].
//!
//! In reading order: [`config`]; [`source`] says where experts come from, `slots` is the memory they are loaded into,
//! and `cache` says who may touch which slot; `prefetch` loads experts ahead of use, and `follow_placement` those that
//! are placed here; `compute` and `device_compute` answer a call, `resident` lets
//! a pass on the same device use what is there, and [`engine`] holds all of that. From the network,
//! `service` opens a `lane`, whose calls wait in the `call_queue`; `epochs` refuses those of an old placement, and
//! `responses` go back. `measures` are the metrics, [`error`] says why a node does not start.

mod cache;
mod call_queue;
mod compute;
pub mod config;
mod device_compute;
pub mod engine;
mod epochs;
pub mod error;
mod follow_placement;
mod lane;
mod measures;
mod prefetch;
mod resident;
mod responses;
mod service;
mod slots;
pub mod smallest_memory;
pub mod source;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use sida_cluster::cluster::Cluster;
use sida_proto::v1::experts_server::ExpertsServer;
use sida_rpc::{MESSAGE_BYTES_MAX, Server};
use sida_telemetry::{
    gauge,
    names::{self, On},
};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, oneshot},
    task::{self, JoinSet},
    time,
};
use tokio_util::sync::CancellationToken;
use tonic::{codec::CompressionEncoding, service::Routes};

pub use config::{ExpertMemory, ExpertMemoryError, ExpertNodeConfig, ExpertNodeLimits};
pub use engine::Engine;
pub use error::ExpertNodeError;
pub use service::{EXPERTS_DIGEST_METADATA, MODEL_DIGEST_METADATA};

use crate::{call_queue::Job, epochs::Epochs, lane::Lanes, service::ExpertsService};

/// The service whose health is checked.
const SERVICE: &str = "sida.v1.Experts";

/// A node whose threads have answered nobody for so long has to be started again, as one whose device is lost; calls
/// end well before.
const STUCK_LIMIT: Duration = Duration::from_secs(300);

/// How long a node that ends waits for those that still use its experts.
const GIVE_BACK_LIMIT: Duration = Duration::from_secs(5);

/// How long others may take to see that this node goes, before it takes no more calls.
const LEAVE_PATIENCE: Duration = Duration::from_secs(2);

/// Opens the model and serves its experts on `listener` until `shutdown`; then health says NOT_SERVING, calls in
/// flight end, and it returns within the drain limit.
pub async fn run(
    config: ExpertNodeConfig,
    listener: TcpListener,
    cluster: Cluster,
    shutdown: CancellationToken,
) -> Result<(), ExpertNodeError> {
    if !cluster.members().iter().any(|member| member.node == config.node) {
        tracing::warn!(node = %config.node, "the cluster does not list this node, so nobody will call it");
    }
    let opening = config.clone();
    let engine = task::spawn_blocking(move || Engine::open(&opening))
        .await
        .map_err(|error| ExpertNodeError::Thread(error.into()))??;
    let engine = Arc::new(engine);
    names::declare(On::Placed);
    gauge!(names::PLACEMENT_EPOCH).set(cluster.placement().epoch() as f64);
    // Dropping the set aborts its tasks, so they end with the node.
    let mut following = JoinSet::new();
    if !cluster.is_fixed() || engine.has_device() {
        following.spawn(follow_placement::follow(engine.clone(), cluster.clone(), config.node.clone()));
    }
    let served = serve(engine.clone(), &config, listener, cluster, shutdown).await;
    following.shutdown().await;
    give_back(engine).await;
    served
}

/// Waits until nobody else holds the engine, and drops it, so that its device is given back before the process ends,
/// and the driver in it: threads that compute and lanes let go of it when they notice that the node has. A device that
/// hangs keeps nobody for ever.
async fn give_back(engine: Arc<Engine>) {
    let node = engine.node().clone();
    let given_back = async {
        while Arc::strong_count(&engine) > 1 {
            time::sleep(Duration::from_millis(1)).await;
        }
        task::spawn_blocking(move || drop(engine)).await
    };
    match time::timeout(GIVE_BACK_LIMIT, given_back).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!(%node, %error, "giving the experts' memory back panicked"),
        Err(_) => tracing::warn!(%node, "the node ends while its experts are still used"),
    }
}

/// Serves an engine that is open already: one that a coordinator of this process also calls directly. `cluster`
/// says which placement is the newest. At `shutdown` health says NOT_SERVING and the node leaves its cluster; then
/// lanes are no longer read.
pub async fn serve(
    engine: Arc<Engine>,
    config: &ExpertNodeConfig,
    listener: TcpListener,
    cluster: Cluster,
    shutdown: CancellationToken,
) -> Result<(), ExpertNodeError> {
    let leaving = shutdown;
    let shutdown = cluster.left_after(leaving.clone(), LEAVE_PATIENCE);
    let bounds = engine.bounds(&config.limits);
    let jobs = call_queue::start(&engine, bounds, config.threads.max(1))?;
    let lanes = Arc::new(Lanes {
        engine: engine.clone(),
        bounds,
        jobs: jobs.clone(),
        limits: config.limits,
        epochs: Epochs::new(cluster, engine.model()),
        calls: Arc::new(Semaphore::new(config.limits.calls_max)),
        shutdown: shutdown.clone(),
    });
    let answered = Arc::new(Mutex::new(Instant::now()));
    let watched = engine.clone();
    let service = ExpertsServer::new(ExpertsService { lanes })
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
        .accept_compressed(CompressionEncoding::Gzip);
    if let Ok(address) = listener.local_addr() {
        tracing::info!(node = %config.node, %address, model = %engine.model(), "serving experts");
    }
    let served = Server::new(config.server.clone())
        .routes(Routes::new(service))
        .descriptors(sida_proto::DESCRIPTORS)
        .check(SERVICE, {
            let answered = answered.clone();
            move || probe(jobs.clone(), answered.clone())
        })
        .alive(move || answered.lock().elapsed() < STUCK_LIMIT && !watched.is_lost())
        .leaving(leaving)
        .serve(listener, shutdown)
        .await;
    // Joins the prefetch thread, which may be in the middle of a load.
    task::spawn_blocking(move || engine.close()).await.map_err(|error| ExpertNodeError::Thread(error.into()))?;
    Ok(served?)
}

/// A real expert call, on the way that calls of lanes take. Notes when it was `answered` at all: that the threads run.
async fn probe(jobs: crossbeam_channel::Sender<Job>, answered: Arc<Mutex<Instant>>) -> Result<(), String> {
    let (answer, found) = oneshot::channel();
    // An error of `send` says that the health check gave up waiting.
    let answer = Box::new(move |result| drop(answer.send(result)));
    jobs.send(Job::Probe { answer }).map_err(|_| "the compute threads are gone".to_owned())?;
    let found = found.await.map_err(|_| "the call got no answer".to_owned())?;
    *answered.lock() = Instant::now();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The process would end under a thread that still uses the device.
    #[tokio::test]
    async fn the_engine_is_gone_before_the_node_ends() {
        let models = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/switch-tiny-64");
        let config = ExpertNodeConfig::new("e0".into(), models);
        let engine = Arc::new(Engine::open(&config).unwrap());
        let (last, used) = (Arc::downgrade(&engine), engine.clone());
        let user = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            drop(used);
        });
        give_back(engine).await;
        assert!(last.upgrade().is_none());
        user.join().unwrap();
    }
}
