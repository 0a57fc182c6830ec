//! The configuration of a predictor-node: set by the command line and by tests.

use std::{fmt, path::PathBuf, sync::Arc};

use sida_model::ModelConfig;
use sida_predictor::{HashPredictor, PredictorShape, train};
use sida_routing::{Digest, NodeId};
use sida_rpc::ServerConfig;

use crate::{PredictorNodeError, learn::LearntDir};

/// Everything a predictor-node needs to know at its start.
#[derive(Clone)]
pub struct PredictorNodeConfig {
    /// The node's name in the cluster.
    pub node: NodeId,
    /// What the predictor knows of the model: bounds what may be asked.
    pub shape: PredictorShape,
    /// The predictor that the node serves.
    pub predictor: Arc<dyn HashPredictor>,
    /// Bounds on what others can ask of it.
    pub limits: PredictorLimits,
    /// How it learns from traffic, if it does.
    pub learn: Option<LearnConfig>,
    /// The network side.
    pub server: ServerConfig,
}

/// How a predictor-node learns from what the routers of its coordinators choose.
#[derive(Clone, Debug, PartialEq)]
pub struct LearnConfig {
    /// The file that the node's predictor was opened from.
    pub file: PathBuf,
    /// Where what was learnt goes: `predictor.safetensors`, and `predictor.previous.safetensors`, which served before it.
    pub dir: PathBuf,
    /// Tokens of labels that are kept; a training begins when a quarter of that is new.
    pub tokens_max: usize,
    /// The share of one processor that training takes: above 0, at most 1.
    pub cpu_share: f64,
}

impl LearnConfig {
    /// Refuses a predictor that cannot learn, of another model than this one, and a directory that cannot be written or in which
    /// another node learns: what a node would otherwise refuse only once it runs.
    pub fn check(&self, model: &ModelConfig, digest: Digest) -> Result<(), PredictorNodeError> {
        train::check_trainable(&self.file, &PredictorShape::of(model), digest)?;
        LearntDir::open(self.dir.clone()).map(drop)
    }
}

/// Bounds on what others can ask of a predictor-node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PredictorLimits {
    /// Tokens of one sequence.
    pub sequence_tokens_max: usize,
    /// Sequences of one call.
    pub sequences_max: usize,
    /// Tokens of all sequences of a call together: bounds the work and the size of the answer.
    pub call_tokens_max: usize,
    /// Bytes of one request. A decoded request takes up to 28 times its bytes (a sequence of 2 bytes on the
    /// wire is 56 in memory), so this is below what other services take.
    pub request_bytes_max: usize,
    /// Calls that compute at a time. At least 1.
    pub threads: usize,
    /// Calls that compute or wait; one more is refused with RESOURCE_EXHAUSTED.
    pub calls_max: usize,
}

impl Default for PredictorLimits {
    fn default() -> Self {
        Self {
            sequence_tokens_max: 4096,
            sequences_max: 256,
            call_tokens_max: 1 << 16,
            request_bytes_max: 16 << 20,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            calls_max: 256,
        }
    }
}

impl PredictorNodeConfig {
    /// The defaults for a node of this name that serves `predictor` for a model of this config.
    pub fn new(node: NodeId, model: &ModelConfig, predictor: Arc<dyn HashPredictor>) -> Self {
        Self {
            node,
            shape: PredictorShape::of(model),
            predictor,
            limits: PredictorLimits::default(),
            learn: None,
            server: ServerConfig::default(),
        }
    }
}

impl fmt::Debug for PredictorNodeConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PredictorNodeConfig")
            .field("node", &self.node)
            .field("predictor", &format_args!("{} {}", self.predictor.net(), self.predictor.digest()))
            .field("limits", &self.limits)
            .field("learn", &self.learn)
            .field("server", &self.server)
            .finish_non_exhaustive()
    }
}
