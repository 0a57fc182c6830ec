//! How a coordinator starts: its configuration is checked, its weights are loaded, its expert-nodes are reached, and
//! its threads (`sida-prepare`, `sida-forward`, `sida-predict`, on a device `sida-text`) begin.

use std::{
    io,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use sida_cluster::Cluster;
use sida_model::{Backend, Checkpoint, CpuBackend, DeviceName, ModelConfig, ModelError, Stack, Tokenizer};
use sida_proto::wire::Bounds;
use sida_routing::{Digest, NodeId, RecordedRoutes, failover::CallFailure, gathering::Gathering};
use sida_rpc::{
    ServerError,
    stand_back::{self, stand_back},
};
use sida_telemetry::{counter, names};
use thiserror::Error;
use tokio::runtime::Handle;

use crate::{
    answer::answer_text::text_thread,
    config::{CoordinatorConfig, PredictorSource},
    coordinator::{Coordinator, Inner},
    dispatch::{
        dispatch::Dispatch,
        experts_without_holder,
        nodes::Nodes,
        probe::Probe,
        remote::{clock::Clock, lane::LaneConfig, lane_connection::Connector},
    },
    forward::forward::Forward,
    intake::{
        client_uses::ClientUses, grammars::Grammars, queue::Queue, replay::Replay, request_queue::RequestQueue,
        workload::Workload,
    },
    measures::{metrics::Metrics, statistics::Statistics},
    predict::{
        beside::beside,
        need::Need,
        predict::{Predict, Source},
        preload::Preload,
        remote_predictor::RemotePredictor,
    },
    schedule::{prefixes::Prefixes, prepare::Prepare, scheduler::Scheduler},
};

/// Bytes of rows in one message to an expert-node: well below the limit of a message, so that the first results come
/// back while the last rows still travel.
const CALL_BYTES_MAX: usize = 16 << 20;
/// Rows of one call, below what expert-nodes take.
const CALL_ROWS_MAX: usize = 8192;
/// How long a start waits for the expert-nodes to be reached.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);

/// Why a coordinator does not start, or does not go on.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum CoordinatorError {
    #[error("{0}")]
    Model(#[from] ModelError),
    #[error("the predictor is for model {found}, this is {expected}")]
    PredictorModel { expected: Digest, found: Digest },
    #[error(
        "the cluster is laid out for {found_layers} MoE layers of {found_experts} experts, the model has {expected_layers} of {expected_experts}"
    )]
    Extent { expected_layers: usize, expected_experts: usize, found_layers: usize, found_experts: usize },
    #[error("--enforce-capacity is for models whose experts have a capacity; those of {family} have none")]
    NoCapacity { family: &'static str },
    #[error("{reason}: recorded routes are replayed by decoder-only models that have all of their layers and experts")]
    RecordedRoutes { reason: String },
    #[error("the shortest request needs {needed} bytes for keys and values, more than the {limit} of --cache-memory")]
    NoCache { needed: u64, limit: u64 },
    #[error("the cluster has no expert-node")]
    NoExpertNode,
    #[error("cannot start a thread: {0}")]
    Thread(#[from] io::Error),
    #[error("loading the model panicked: {0}")]
    LoadPanicked(String),
    #[error(transparent)]
    Serve(#[from] ServerError),
}

impl CoordinatorError {
    /// Whether starting again would fail again: what is asked for does not fit the model or the cluster.
    pub fn is_lasting(&self) -> bool {
        match self {
            Self::PredictorModel { .. } | Self::Extent { .. } | Self::NoCapacity { .. } => true,
            Self::RecordedRoutes { .. } | Self::NoCache { .. } => true,
            Self::Model(_) | Self::NoExpertNode | Self::Thread(_) | Self::LoadPanicked(_) | Self::Serve(_) => false,
        }
    }
}

impl Coordinator {
    /// Loads the backbone, links to the expert-nodes of `cluster`, and starts. Must be called in a tokio
    /// runtime of several threads, which then carries the lanes.
    pub async fn start(config: CoordinatorConfig, cluster: Cluster) -> Result<Self, CoordinatorError> {
        check(&config, &cluster)?;
        match config.device {
            DeviceName::Cpu => {
                let loaded = load(&config, CpuBackend::load).await?;
                Self::start_on(loaded, config, cluster).await
            }
            #[cfg(feature = "cuda")]
            DeviceName::Cuda(ordinal) => {
                let (precision, rows_max) = (config.precision, config.limits.tokens_max);
                let open = move |checkpoint: &Checkpoint, _: &mut dyn FnMut(u64, u64)| {
                    sida_model::cuda::DeviceDense::load(ordinal, checkpoint, precision, rows_max)
                };
                let loaded = load(&config, open).await?;
                Self::start_on(loaded, config, cluster).await
            }
            #[cfg(not(feature = "cuda"))]
            device @ DeviceName::Cuda(_) => Err(ModelError::from(sida_model::DeviceError::not_built(device)).into()),
        }
    }

    /// Starts with what computes the dense part of the model.
    async fn start_on<B: Backend + 'static>(
        (backend, tokenizer): (B, Arc<Tokenizer>),
        config: CoordinatorConfig,
        cluster: Cluster,
    ) -> Result<Self, CoordinatorError> {
        let cache_size = backend.cache_size();
        let (needed, limit) = (cache_size.of_request(1, 1, 1), config.limits.cache_bytes_max);
        if needed > limit {
            return Err(CoordinatorError::NoCache { needed, limit });
        }
        let metrics = Arc::new(Metrics::new());
        let runtime = Handle::current();
        let model = backend.config().clone();
        let rows = backend.rows_window().filter(|_| config.share_rows).and_then(|window| {
            window.inspect_err(|error| tracing::info!(%error, "rows travel to all expert-nodes")).ok()
        });
        let lanes = LaneConfig {
            inflight_bytes_max: config.lane_inflight_bytes_max,
            d_model: model.d_model,
            clock: Clock::start(),
            connector: Arc::new(Connector::new(
                &config.client,
                config.checkpoint.digest(),
                config.checkpoint.experts_digest(),
                rows,
            )),
        };
        let nodes = Nodes::follow(&cluster, lanes, &runtime);
        runtime.spawn(experts_without_holder::watch(Arc::downgrade(&nodes)));
        for reason in CallFailure::LABELS {
            counter!(names::FAILOVERS_TOTAL, names::REASON => reason).increment(0);
        }
        let missing = nodes.connected(CONNECT_PATIENCE).await;
        if !missing.is_empty() {
            let missing: Vec<String> = missing.iter().map(NodeId::to_string).collect();
            tracing::warn!(missing = missing.join(", "), "starting without some expert-nodes");
        }
        let predict = Arc::new(Predict::new(
            source(&config, &cluster, &model, runtime.clone()),
            &model,
            config.checkpoint.digest(),
        ));
        let preload = Arc::new(Preload::new(nodes.clone(), cluster.clone(), config.plan_chance, model.top_k));
        let need = Arc::new(Need::new(nodes.clone(), config.evaluates, &predict));
        let statistics = Arc::new(Statistics::default());
        let dispatch = |patience| {
            let rows_max = (CALL_BYTES_MAX / (model.d_model * size_of::<f32>())).clamp(1, CALL_ROWS_MAX);
            Dispatch::new(nodes.clone(), model.d_model, rows_max, patience)
        };
        let workload = Arc::new(Workload::new(config.limits));
        let requests = Arc::new(RequestQueue::new(config.limits, workload.clone()));
        let prepared = Arc::new(Queue::new());
        metrics.cache_budget_bytes.set(config.limits.cache_bytes_max as f64);
        let (predict_beside, predict_thread) = beside(need.clone(), predict.clone(), preload.clone());
        let forward = Forward::new(
            backend,
            || dispatch(config.expert_call_timeout),
            config.enforce_capacity,
            config.micro_batching,
            statistics.clone(),
        );
        let (texts, text_thread) = match forward.is_on_device() {
            true => Some(text_thread(tokenizer.clone(), statistics.clone())).unzip(),
            false => (None, None),
        };
        let scheduler = Scheduler {
            limits: config.limits,
            workload,
            prepared: prepared.clone(),
            forward,
            predict: predict.clone(),
            preload: preload.clone(),
            predict_beside,
            tokenizer: tokenizer.clone(),
            statistics: statistics.clone(),
            metrics: metrics.clone(),
            texts,
            runtime: runtime.clone(),
            running: Vec::new(),
            prefixes: Prefixes::new(config.prefix_cache),
            gathering: Gathering::default(),
            idle_since: Instant::now(),
            evaluates: config.evaluates,
            values: Vec::new(),
        };
        let prepare = Prepare {
            limits: config.limits,
            need,
            predict: predict.clone(),
            preload,
            requests: requests.clone(),
            prepared,
            metrics: metrics.clone(),
        };
        let mut threads = vec![
            thread_that_computes("sida-prepare", move || prepare.run())?,
            thread_that_computes("sida-forward", move || scheduler.run())?,
            thread_that_computes("sida-predict", move || predict_thread.run())?,
        ];
        if let Some(text_thread) = text_thread {
            threads.push(thread::Builder::new().name("sida-text".into()).spawn(move || text_thread.run())?);
        }
        let probe = Arc::new(Probe::new(dispatch(config.server.health_period.min(config.expert_call_timeout)), &model));
        let threads = Mutex::new(threads);
        let inner = Inner {
            client_uses: ClientUses::new(config.server.gate.clone(), config.client_limits),
            grammars: Grammars::new(tokenizer.clone(), &model),
            replay: config.recorded_routes.clone().map(Replay::new),
            config,
            cluster,
            tokenizer,
            cache_size,
            nodes,
            predict,
            probe,
            requests,
            statistics,
            metrics,
            threads,
        };
        Ok(Self { inner: Arc::new(inner) })
    }
}

fn thread_that_computes(name: &str, run: impl FnOnce() + Send + 'static) -> std::io::Result<thread::JoinHandle<()>> {
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        stand_back(stand_back::COMPUTES);
        run();
    })
}

/// Says why this model may not answer as its files, or its user, expect.
fn warn_of_other_answers(checkpoint: &Checkpoint) -> Result<(), ModelError> {
    let ignored = &checkpoint.config().generation.ignored;
    if !ignored.is_empty() {
        let model = checkpoint.name();
        tracing::warn!(model, fields = ignored.join(", "), "the generation config asks for what is not served");
    }
    for tensor in sida_model::names::embeddings(checkpoint)?.differing {
        tracing::warn!(%tensor, "config.json ties this tensor to another one, but it differs: it is used in its place");
    }
    Ok(())
}

/// Refuses a predictor of another model, a cluster laid out for another model, and a model that is not served yet.
fn check(config: &CoordinatorConfig, cluster: &Cluster) -> Result<(), CoordinatorError> {
    let model = config.checkpoint.config();
    if let Some(predictor) = config.predictor.local()
        && predictor.model_digest() != config.checkpoint.digest()
    {
        let (expected, found) = (config.checkpoint.digest(), predictor.model_digest());
        return Err(CoordinatorError::PredictorModel { expected, found });
    }
    if config.enforce_capacity && !model.has_encoder() {
        return Err(CoordinatorError::NoCapacity { family: model.family });
    }
    if let Some(routes) = &config.recorded_routes {
        check_routes(routes, model)?;
    }
    let tokens_max = config.request_limits.prompt_tokens_max;
    if let Some(positions) = model.positions_max.filter(|&positions| positions < tokens_max) {
        tracing::warn!(
            prompt_tokens_max = tokens_max,
            positions,
            "a prompt and its answer together have as many tokens as the model has positions at most"
        );
    }
    if let Some(predictor) = config.predictor.local()
        && predictor.top_k() < model.top_k
    {
        let (predicted, needed) = (predictor.top_k(), model.top_k);
        tracing::warn!(
            predicted,
            needed,
            "the predictor names fewer experts than routers choose: `guided` and `hash` will be `exact`"
        );
    }
    let placement = cluster.placement();
    let extent = placement.extent();
    let (expected_layers, expected_experts) = (model.moe_layer_count(), model.num_experts);
    if (extent.moe_layers, extent.num_experts) != (expected_layers, expected_experts) {
        let (found_layers, found_experts) = (extent.moe_layers, extent.num_experts);
        return Err(CoordinatorError::Extent { expected_layers, expected_experts, found_layers, found_experts });
    }
    // Where nodes can join, the first may come later: until then this coordinator is not ready.
    if placement.nodes().is_empty() && cluster.is_fixed() { Err(CoordinatorError::NoExpertNode) } else { Ok(()) }
}

/// Refuses recorded routes that this model cannot take.
fn check_routes(routes: &RecordedRoutes, model: &ModelConfig) -> Result<(), CoordinatorError> {
    let (layers, experts) = (model.moe_layer_count(), model.num_experts);
    let reason = if model.has_encoder() {
        format!("a model of family {} has an encoder", model.family)
    } else if routes.layers() != layers {
        format!("{} layers were recorded, the model has {layers} MoE layers", routes.layers())
    } else if routes.num_experts() > experts {
        format!("expert {} was recorded, the model has {experts} experts", routes.num_experts() - 1)
    } else {
        return Ok(());
    };
    Err(CoordinatorError::RecordedRoutes { reason })
}

/// Loads the dense part of the model and its tokenizer, off the runtime's own threads. `open` gets a function that is
/// called with bytes done and bytes in all, as far as they are known.
async fn load<B: Backend + 'static>(
    config: &CoordinatorConfig,
    open: impl FnOnce(&Checkpoint, &mut dyn FnMut(u64, u64)) -> Result<B, ModelError> + Send + 'static,
) -> Result<(B, Arc<Tokenizer>), CoordinatorError> {
    let (checkpoint, on_load) = (config.checkpoint.clone(), config.on_load.clone());
    let loading = tokio::task::spawn_blocking(move || {
        let mut progress = |done, total| {
            if let Some(on_load) = &on_load {
                on_load(done, total);
            }
        };
        warn_of_other_answers(&checkpoint)?;
        let backend = open(&checkpoint, &mut progress)?;
        let tokenizer = Tokenizer::open(checkpoint.dir(), checkpoint.config())?;
        Ok::<_, ModelError>((backend, Arc::new(tokenizer)))
    });
    Ok(loading.await.map_err(|error| CoordinatorError::LoadPanicked(error.to_string()))??)
}

/// The configured source of hash tables.
fn source(config: &CoordinatorConfig, cluster: &Cluster, model: &ModelConfig, runtime: Handle) -> Source {
    match &config.predictor {
        PredictorSource::Local(predictor) => Source::Local(predictor.clone()),
        PredictorSource::Off => Source::Off,
        PredictorSource::Nodes | PredictorSource::NodesForPrompts(_) => {
            let bounds = Bounds {
                moe_layers: model.moe_layers(Stack::Decoder).end.into(),
                num_experts: model.num_experts,
                d_model: model.d_model,
                vocab_size: model.vocab_size,
                rows_max: config.limits.tokens_max,
                tokens_max: config.limits.tokens_max,
                sequences_max: config.limits.sequences_max,
            };
            let client = config.client.clone();
            let nodes = RemotePredictor::new(
                cluster.clone(),
                client,
                runtime,
                config.checkpoint.digest(),
                bounds,
                config.predict_timeout,
            );
            Source::Remote(Arc::new(nodes), config.predictor.local().cloned())
        }
    }
}
