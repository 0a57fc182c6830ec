//! A coordinator as a handle: takes requests from this process (the command line, tests) and from
//! `front_door`, and gives back answers. Starting one loads the backbone and starts its two threads; dropping
//! the last clone answers what was accepted and ends them.

use std::{
    io,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use futures::Stream;
use parking_lot::Mutex;
use sida_cluster::Cluster;
use sida_model::{Checkpoint, Dense, DenseOptions, ModelConfig, ModelError, Stack, StackKind, Tokenizer};
use sida_proto::wire::Bounds;
use sida_routing::{Digest, NodeId};
use sida_rpc::ServerError;
use sida_telemetry::{Span, TraceContext, counter, names};
use thiserror::Error;
use tokio::{
    runtime::Handle,
    sync::{mpsc, oneshot},
};

use crate::{
    accept::{Acceptance, EncodeParams, GenerateParams, ScoreParams},
    asked::Asked,
    call_failure::CallFailure,
    config::{CoordinatorConfig, PredictorSource},
    dispatch::Dispatch,
    engine::{Engine, guarded},
    forward::Forward,
    lane::LaneConfig,
    lane_connection::Connector,
    measures::Measures,
    nodes::Nodes,
    output::{Encoding, Scores, Token},
    predict::{Predict, Source},
    preload::Preload,
    prepare::Prepare,
    probe::Probe,
    queue::{Announced, Queue, Refused},
    remote_predictor::RemotePredictor,
    request::{Request, RequestError, Work},
    statistics::Statistics,
    unheld,
};

/// Bytes of rows in one message to an expert-node: well below what a message may have, so that the first
/// results come back while the last rows still travel.
const CALL_BYTES_MAX: usize = 16 << 20;
/// Rows of one call, below what expert-nodes take.
const CALL_ROWS_MAX: usize = 8192;
/// How long a start waits for the expert-nodes to be reached.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);
/// No step takes so long: its expert calls end well before.
const STUCK_LIMIT: Duration = Duration::from_secs(600);
/// Requests that arrive together run together, unless the text of one takes longer to tokenize than this much does: a
/// fraction of a millisecond.
const AWAITED_TEXT_BYTES_MAX: usize = 2048;
/// How long a full queue asks callers to stay away.
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// Why a coordinator does not start, or does not go on.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum CoordinatorError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("{name} has no encoder; this version serves encoder-decoder models")]
    DecoderOnly { name: String },
    #[error("the predictor is for model {found}, this is {expected}")]
    PredictorModel { expected: Digest, found: Digest },
    #[error(
        "the cluster is laid out for {found_layers} MoE layers of {found_experts} experts, the model has {expected_layers} of {expected_experts}"
    )]
    Extent { expected_layers: usize, expected_experts: usize, found_layers: usize, found_experts: usize },
    #[error("the cluster has no expert-node")]
    NoExpertNode,
    #[error("cannot start a thread: {0}")]
    Thread(#[from] io::Error),
    #[error("loading the model panicked: {0}")]
    LoadPanicked(String),
    #[error(transparent)]
    Serve(#[from] ServerError),
}

/// A running coordinator. Cheap to clone; all clones are the same one.
#[derive(Clone)]
pub struct Coordinator {
    inner: Arc<Inner>,
}

struct Inner {
    config: CoordinatorConfig,
    cluster: Cluster,
    tokenizer: Arc<Tokenizer>,
    nodes: Arc<Nodes>,
    predict: Arc<Predict>,
    probe: Arc<Probe>,
    requests: Arc<Queue<Request>>,
    statistics: Arc<Statistics>,
    measures: Arc<Measures>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // The threads answer what is queued, then end by themselves.
        self.requests.close();
    }
}

impl Coordinator {
    /// Loads the backbone, links to the expert-nodes of `cluster`, and starts. Must be called in a tokio
    /// runtime of several threads, which then carries the lanes.
    pub async fn start(config: CoordinatorConfig, cluster: Cluster) -> Result<Self, CoordinatorError> {
        check(&config, &cluster)?;
        let measures = Arc::new(Measures::new());
        let runtime = Handle::current();
        let (dense, tokenizer) = load(&config).await?;
        let model = dense.config().clone();
        let rows = dense.rows_window().filter(|_| config.share_rows).and_then(|window| {
            window.inspect_err(|error| tracing::info!(%error, "rows travel to all expert-nodes")).ok()
        });
        let lanes = LaneConfig {
            inflight_bytes_max: config.lane_inflight_bytes_max,
            d_model: model.d_model,
            connector: Arc::new(Connector::new(&config.client, config.checkpoint.digest(), rows)),
        };
        let nodes = Nodes::follow(&cluster, lanes, &runtime);
        runtime.spawn(unheld::watch(Arc::downgrade(&nodes)));
        for reason in CallFailure::LABELS {
            counter!(names::FAILOVERS_TOTAL, names::REASON => reason).increment(0);
        }
        let missing = nodes.connected(CONNECT_PATIENCE).await;
        if !missing.is_empty() {
            let missing: Vec<String> = missing.iter().map(NodeId::to_string).collect();
            tracing::warn!(missing = missing.join(", "), "starting without some expert-nodes");
        }
        let predict =
            Arc::new(Predict::new(source(&config, &cluster, &model, runtime), &model, config.checkpoint.digest()));
        let preload = Arc::new(Preload::new(nodes.clone(), cluster.clone(), config.preload_depth));
        let statistics = Arc::new(Statistics::default());
        let dispatch = |patience| {
            let rows_max = (CALL_BYTES_MAX / (model.d_model * size_of::<f32>())).clamp(1, CALL_ROWS_MAX);
            Dispatch::new(nodes.clone(), model.d_model, rows_max, patience)
        };
        let (requests, prepared) = (Arc::new(Queue::new()), Arc::new(Queue::new()));
        let engine = Engine {
            limits: config.limits,
            prepared: prepared.clone(),
            forward: Forward::new(
                dense,
                dispatch(config.expert_call_timeout),
                config.enforce_capacity,
                config.halving,
                statistics.clone(),
            ),
            predict: predict.clone(),
            preload: preload.clone(),
            tokenizer: tokenizer.clone(),
            statistics: statistics.clone(),
            measures: measures.clone(),
            running: Vec::new(),
            values: Vec::new(),
        };
        let prepare = Prepare {
            limits: config.limits,
            predict: predict.clone(),
            preload,
            requests: requests.clone(),
            prepared,
            measures: measures.clone(),
        };
        let threads = vec![
            thread::Builder::new().name("sida-prepare".into()).spawn(move || prepare.run())?,
            thread::Builder::new().name("sida-forward".into()).spawn(move || engine.run())?,
        ];
        let probe = Arc::new(Probe::new(dispatch(config.server.health_period.min(config.expert_call_timeout)), &model));
        let threads = Mutex::new(threads);
        let inner =
            Inner { config, cluster, tokenizer, nodes, predict, probe, requests, statistics, measures, threads };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The encoder's states of a text.
    pub async fn encode(&self, params: EncodeParams) -> Result<Encoding, RequestError> {
        let asked = self.asked("embeddings", params.trace);
        let EncodeParams { text, routing, pooling, deadline, .. } = params;
        let (reply, answer) = oneshot::channel();
        let queue = move |this: &Self, prompt| this.submit(prompt, routing, deadline, Work::Encode { pooling, reply });
        let bytes = text.len();
        self.read(asked, text, bytes, queue).await?;
        answer.await.unwrap_or(Err(RequestError::Panicked))
    }

    /// The likelihood of each target given a text.
    pub async fn score(&self, params: ScoreParams) -> Result<Scores, RequestError> {
        let asked = self.asked("score", params.trace);
        let ScoreParams { text, targets, routing, deadline, .. } = params;
        let bytes = text.len() + targets.iter().map(String::len).sum::<usize>();
        let (reply, answer) = oneshot::channel();
        let queue = move |this: &Self, prompt: Prompt| {
            let targets = this.acceptance().targets(prompt.tokens.len(), &targets)?;
            this.submit(prompt, routing, deadline, Work::Score { targets, reply: Some(reply) })
        };
        self.read(asked, text, bytes, queue).await?;
        answer.await.unwrap_or(Err(RequestError::Panicked))
    }

    /// Generates text.
    pub async fn generate(&self, mut params: GenerateParams) -> Result<TokenStream, RequestError> {
        let asked = self.asked("text_completion", params.trace);
        let text = std::mem::take(&mut params.text);
        let (reply, answer) = mpsc::unbounded_channel();
        let queue = move |this: &Self, mut prompt: Prompt| {
            let options = this.acceptance().options(&mut params)?;
            prompt.asked.describe(&options);
            this.submit(prompt, params.routing, params.deadline, Work::Generate { options, reply })
        };
        let bytes = text.len();
        self.read(asked, text, bytes, queue).await?;
        Ok(TokenStream { tokens: Some(answer) })
    }

    /// Whether its threads run, its device is not lost, and the thread that computes has not been in one step for longer than
    /// any takes.
    pub fn is_alive(&self) -> bool {
        let run = self.inner.threads.lock().iter().all(|thread| !thread.is_finished());
        run && !self.is_device_lost() && self.inner.statistics.stuck_for() < STUCK_LIMIT
    }

    fn is_device_lost(&self) -> bool {
        self.inner.statistics.is_device_lost.load(Ordering::Relaxed)
    }

    /// Whether an expert call succeeds: what health stands on.
    pub async fn probe(&self) -> Result<(), String> {
        if self.is_device_lost() {
            return Err("the device is lost".to_owned());
        }
        let probe = self.inner.probe.clone();
        let outcome = tokio::task::spawn_blocking(move || probe.run()).await;
        outcome.unwrap_or_else(|error| Err(format!("the probe ended: {error}")))
    }

    /// Takes no more requests, answers those that were taken, and ends threads and lanes.
    pub async fn stop(&self) {
        self.inner.requests.close();
        let threads = std::mem::take(&mut *self.inner.threads.lock());
        let join = move || threads.into_iter().filter_map(|thread| thread.join().err()).count();
        // A thread of ours catches the panics of its work, so one that ended by a panic is a bug to be told.
        match tokio::task::spawn_blocking(join).await {
            Ok(0) => {}
            Ok(panicked) => tracing::error!(panicked, "threads of the coordinator had panicked"),
            Err(error) => tracing::error!(%error, "cannot wait for the coordinator's threads"),
        }
        self.inner.nodes.close();
    }

    /// What it was started with.
    pub fn config(&self) -> &CoordinatorConfig {
        &self.inner.config
    }

    /// The model it serves.
    pub fn checkpoint(&self) -> &Arc<Checkpoint> {
        &self.inner.config.checkpoint
    }

    /// The cluster it is part of.
    pub fn cluster(&self) -> &Cluster {
        &self.inner.cluster
    }

    /// The digest of its predictor, where that is in this process.
    pub fn predictor_digest(&self) -> Option<Digest> {
        self.inner.predict.digest()
    }

    pub(crate) fn statistics(&self) -> &Statistics {
        &self.inner.statistics
    }

    pub(crate) fn queued(&self) -> usize {
        self.inner.requests.len()
    }

    fn acceptance(&self) -> Acceptance<'_> {
        let Inner { config, tokenizer, .. } = &*self.inner;
        Acceptance { limits: &config.request_limits, batch: &config.limits, tokenizer }
    }

    /// Tokenizes a prompt and hands it to `queue`. Not by the task that asks, so that of several requests that one task
    /// sends all are announced before the first is read. While nothing is computed, by the threads that compute, which are
    /// awake then when the batch comes; never if `bytes` of text to tokenize would hold up others.
    async fn read(
        &self,
        asked: Asked,
        text: String,
        bytes: usize,
        queue: impl FnOnce(&Self, Prompt) -> Result<(), RequestError> + Send + 'static,
    ) -> Result<(), RequestError> {
        let is_short = bytes <= AWAITED_TEXT_BYTES_MAX;
        let announced = is_short.then(|| self.inner.requests.announce());
        let (reply, queued) = oneshot::channel();
        let this = self.clone();
        let read = move || {
            let queued = guarded(|| {
                let span = Span::below(asked.span.context(), "tokenize");
                let tokens = this.acceptance().prompt(&text)?;
                drop(span);
                queue(&this, Prompt { asked, tokens, announced })
            });
            // Who asked may have gone, which is no error.
            drop(reply.send(queued));
        };
        let is_idle = self.inner.statistics.inflight.load(Ordering::Relaxed) == 0;
        match is_short {
            // The only thread would be found waiting for a node if a batch began meanwhile.
            true if is_idle && rayon::current_num_threads() > 1 => rayon::spawn(read),
            true => drop(tokio::spawn(async { read() })),
            false => drop(tokio::task::spawn_blocking(read)),
        }
        queued.await.unwrap_or(Err(RequestError::Panicked))
    }

    /// A request begins.
    fn asked(&self, operation: &'static str, caller: Option<TraceContext>) -> Asked {
        Asked::begin(operation, self.checkpoint().name(), caller)
    }

    fn submit(
        &self,
        prompt: Prompt,
        mode: crate::routing_mode::RoutingMode,
        deadline: Option<Instant>,
        work: Work,
    ) -> Result<(), RequestError> {
        let inner = &self.inner;
        if inner.nodes.roster().links.is_empty() {
            return Err(RequestError::NoExpertNode);
        }
        // Until the request is queued, or refused.
        let Prompt { asked, tokens, announced: _announced } = prompt;
        let prompt_tokens = tokens.len() as u64;
        let request = Request { tokens, mode, work, accepted: asked.at, deadline, span: asked.span };
        let limits = inner.config.limits;
        inner.requests.try_push(request, |queued| limits.may_wait(queued)).map_err(|refused| match refused {
            Refused::Full(_) => RequestError::QueueFull { limit: limits.queue_max, retry_after: RETRY_AFTER },
            Refused::Closed(_) => RequestError::ShuttingDown,
        })?;
        inner.statistics.requests.fetch_add(1, Ordering::Relaxed);
        inner.measures.prompt_tokens.increment(prompt_tokens);
        inner.measures.requests_queued.set(inner.requests.len() as f64);
        Ok(())
    }
}

/// A prompt that was read.
struct Prompt {
    asked: Asked,
    tokens: Vec<u32>,
    /// That its request is about to be queued, unless its text was too long for others to wait for.
    announced: Option<Announced<Request>>,
}

/// The tokens of a generation. The last item carries `finish` or is an error. Dropping it cancels the request.
pub struct TokenStream {
    /// `None` once the last item was given.
    tokens: Option<mpsc::UnboundedReceiver<Result<Token, RequestError>>>,
}

impl Stream for TokenStream {
    type Item = Result<Token, RequestError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(tokens) = &mut self.tokens else { return Poll::Ready(None) };
        let Poll::Ready(item) = tokens.poll_recv(cx) else { return Poll::Pending };
        // The engine ends every answer with `finish` or an error, unless a panic took it.
        let item = item.unwrap_or(Err(RequestError::Panicked));
        if item.as_ref().map_or(true, |token| token.finish.is_some()) {
            self.tokens = None;
        }
        Poll::Ready(Some(item))
    }
}

/// Refuses what could not work.
fn check(config: &CoordinatorConfig, cluster: &Cluster) -> Result<(), CoordinatorError> {
    let model = config.checkpoint.config();
    if model.stack == StackKind::DecoderOnly {
        return Err(CoordinatorError::DecoderOnly { name: config.checkpoint.name().to_owned() });
    }
    if let PredictorSource::Local(predictor) = &config.predictor
        && predictor.model_digest() != config.checkpoint.digest()
    {
        let (expected, found) = (config.checkpoint.digest(), predictor.model_digest());
        return Err(CoordinatorError::PredictorModel { expected, found });
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

/// Loads what the coordinator computes with, off the runtime's own threads.
async fn load(config: &CoordinatorConfig) -> Result<(Dense, Arc<Tokenizer>), CoordinatorError> {
    let (checkpoint, on_load) = (config.checkpoint.clone(), config.on_load.clone());
    let options =
        DenseOptions { device: config.device, precision: config.precision, rows_max: config.limits.tokens_max };
    let loading = tokio::task::spawn_blocking(move || {
        let mut progress = |done, total| {
            if let Some(on_load) = &on_load {
                on_load(done, total);
            }
        };
        let dense = Dense::load(&checkpoint, options, &mut progress)?;
        let tokenizer = Tokenizer::open(checkpoint.dir(), checkpoint.config())?;
        Ok::<_, ModelError>((dense, Arc::new(tokenizer)))
    });
    Ok(loading.await.map_err(|error| CoordinatorError::LoadPanicked(error.to_string()))??)
}

/// The configured source of hash tables.
fn source(config: &CoordinatorConfig, cluster: &Cluster, model: &ModelConfig, runtime: Handle) -> Source {
    match &config.predictor {
        PredictorSource::Local(predictor) => Source::Local(predictor.clone()),
        PredictorSource::Off => Source::Off,
        PredictorSource::Nodes => {
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
            Source::Remote(Box::new(RemotePredictor::new(
                cluster.clone(),
                client,
                runtime,
                config.checkpoint.digest(),
                bounds,
                config.predict_timeout,
            )))
        }
    }
}
