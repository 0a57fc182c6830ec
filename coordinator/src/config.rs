//! The configuration of a coordinator: set by the command line, by the embedded cluster and by tests.

mod cors_origin;

use std::{fmt, sync::Arc, time::Duration};

use sida_model::{Checkpoint, DeviceName, Precision};
use sida_predictor::HashPredictor;
use sida_routing::{NodeId, RecordedRoutes, admission::Limits, client_limits::ClientLimits};
use sida_rpc::{ClientConfig, ServerConfig};

pub use cors_origin::{CorsOrigin, CorsOriginError};

/// The longest request of a caller, by any door. A prompt has kilobytes; a request may have many of them.
pub const REQUEST_BYTES_MAX: usize = 8 << 20;

/// Everything a coordinator needs to know at its start.
#[derive(Clone)]
pub struct CoordinatorConfig {
    /// The coordinator's name in the cluster.
    pub node: NodeId,
    /// The model, opened.
    pub checkpoint: Arc<Checkpoint>,
    /// What computes the dense layers.
    pub device: DeviceName,
    /// What a GPU computes in; `None`: as the model is stored.
    pub precision: Option<Precision>,
    /// Where hash tables come from.
    pub predictor: PredictorSource,
    /// Bounds of a batch and of the queue.
    pub limits: Limits,
    /// Bounds of one request.
    pub request_limits: RequestLimits,
    /// What each client may use whose key says nothing else.
    pub client_limits: ClientLimits,
    /// Whether prompts of a model without an encoder begin with the keys and values of others that began as they do, of the
    /// same client, where memory for sequences is left to keep these.
    pub prefix_cache: bool,
    /// How likely a batch must use an expert for the expert to be hinted to expert-nodes, from 0 (all that are predicted) to 1. An
    /// infinite one gives no hints. Of requests in `guided` mode all that are predicted are hinted, whatever this is.
    pub plan_chance: f64,
    /// Drops tokens beyond the model's `expert_capacity`, per sequence, as transformers 4.x and 5.2x do.
    pub enforce_capacity: bool,
    /// How long an expert is waited for where no node computes it: the last one that could, or one to come back. A
    /// request whose deadline is earlier waits until then.
    pub expert_call_timeout: Duration,
    /// Bytes of rows that may be under way to one expert-node.
    pub lane_inflight_bytes_max: usize,
    /// Whether expert-nodes on this machine may read rows in the memory of the coordinator's GPU. To all others, and if
    /// this is off, rows are sent.
    pub share_rows: bool,
    /// Whether batches go through the model as micro-batches: in turns where rows leave this process, so that one is
    /// computed here while another is at the experts; side by side, one per thread, where they do not.
    pub micro_batching: MicroBatching,
    /// How long predictor-nodes may take for a batch.
    pub predict_timeout: Duration,
    /// How connections to other nodes are made.
    pub client: ClientConfig,
    /// How this node serves.
    pub server: ServerConfig,
    /// Web pages that may ask by HTTP from a browser; none: no page may.
    pub http_cors_origins: Vec<CorsOrigin>,
    /// Evaluates the predictor: every request is predicted, also where plans gain nothing, and traces tell layer by layer
    /// what hash tables named. That takes time between passes.
    pub evaluates: bool,
    /// To measure under the locality of real texts: routes in the place of those that the routers choose, for every request.
    /// Each replays them from another place. Answers mean nothing then.
    pub recorded_routes: Option<Arc<RecordedRoutes>>,
    /// Called while the backbone loads, with the bytes done and the bytes in all.
    pub on_load: Option<OnLoad>,
}

/// Whether batches are cut into micro-batches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MicroBatching {
    /// Where that was measured to be faster, for batches of that size.
    #[default]
    AsMeasured,
    /// No batch.
    Never,
    /// Every batch of several sequences.
    Always,
}

/// Called with how far a load is: bytes done, bytes in all.
pub type OnLoad = Arc<dyn Fn(u64, u64) + Send + Sync>;

/// Where hash tables come from.
#[derive(Clone)]
pub enum PredictorSource {
    /// A predictor in this process.
    Local(Arc<dyn HashPredictor>),
    /// The predictor-nodes of the cluster.
    Nodes,
    /// The predictor-nodes for prompts, and a predictor in this process for the steps of the decoder, whose net reads the
    /// encoder's output.
    NodesForPrompts(Arc<dyn HashPredictor>),
    /// Nowhere: every request runs `exact`, without hints.
    Off,
}

/// Bounds of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestLimits {
    /// Bytes of a text, looked at before it is tokenized.
    pub text_bytes_max: usize,
    /// Tokens of a prompt, and of a target.
    pub prompt_tokens_max: usize,
    /// Tokens generated where the request does not say.
    pub tokens_default: usize,
    /// Tokens generated at most.
    pub tokens_max: usize,
    /// Targets of a scored request.
    pub targets_max: usize,
    /// Choices of a request: answers to one prompt. No more than sequences of a batch, either.
    pub choices_max: usize,
    /// Texts that one call may have encoded.
    pub texts_max: usize,
    /// Stop texts of a request.
    pub stops_max: usize,
    /// Bytes of a stop text.
    pub stop_bytes_max: usize,
    /// How long a request may take that brings no deadline; `None`: as long as it takes.
    pub timeout: Option<Duration>,
}

impl Default for RequestLimits {
    fn default() -> Self {
        Self {
            text_bytes_max: 64 << 10,
            prompt_tokens_max: 512,
            tokens_default: 64,
            tokens_max: 1024,
            targets_max: 64,
            choices_max: 128,
            texts_max: 256,
            stops_max: 16,
            stop_bytes_max: 256,
            timeout: None,
        }
    }
}

impl CoordinatorConfig {
    /// A coordinator of this name that serves this model, with the default limits.
    pub fn new(node: NodeId, checkpoint: Arc<Checkpoint>, predictor: PredictorSource) -> Self {
        Self {
            node,
            checkpoint,
            device: DeviceName::Cpu,
            precision: None,
            predictor,
            limits: Limits {
                tokens_max: 8192,
                prefill_tokens_max: 512,
                sequences_max: 256,
                cache_bytes_max: 2 << 30,
                queue_max: 1024,
                queue_tokens_max: 2 << 20,
                client_queue_share: 0.5,
            },
            request_limits: RequestLimits::default(),
            client_limits: ClientLimits::default(),
            prefix_cache: true,
            plan_chance: 0.2,
            enforce_capacity: false,
            expert_call_timeout: Duration::from_secs(30),
            lane_inflight_bytes_max: 64 << 20,
            share_rows: true,
            micro_batching: MicroBatching::AsMeasured,
            predict_timeout: Duration::from_millis(200),
            client: ClientConfig::default(),
            server: ServerConfig::default(),
            http_cors_origins: Vec::new(),
            evaluates: false,
            recorded_routes: None,
            on_load: None,
        }
    }
}

impl PredictorSource {
    /// The predictor in this process, if there is one.
    pub(crate) fn local(&self) -> Option<&Arc<dyn HashPredictor>> {
        match self {
            Self::Local(predictor) | Self::NodesForPrompts(predictor) => Some(predictor),
            Self::Nodes | Self::Off => None,
        }
    }
}

impl fmt::Debug for PredictorSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Local(predictor) => write!(f, "Local({} {})", predictor.net(), predictor.digest()),
            Self::Nodes => f.write_str("Nodes"),
            Self::NodesForPrompts(predictor) => {
                write!(f, "NodesForPrompts({} {})", predictor.net(), predictor.digest())
            }
            Self::Off => f.write_str("Off"),
        }
    }
}
