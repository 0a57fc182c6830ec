//! The families of models: `architectures` of config.json picks one. A family knows how its config reads, and what
//! blocks that means; it computes nothing. Called by [`ModelConfig`]. A decoder-only family of one's own is a [`Family`] that
//! is named when a checkpoint is opened: [`crate::Checkpoint::open_with_families`].

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{ModelConfig, ModelError, ModelSpec};

mod causal;
mod json;
mod mixtral;
mod olmoe;
mod qwen2_moe;
mod qwen3_moe;
mod sparse_blocks;
mod switch;

pub use causal::{Causal, Described};
pub use json::Json;

/// A family of models.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    /// What `architectures` of its config.json says.
    pub architecture: &'static str,
    /// Reads such a config. Refuses by its name every field that would change what is computed and is not read.
    pub config: fn(&Json<'_>) -> Result<ModelConfig, ModelError>,
}

/// The families that are built in.
const BUILT_IN: [Family; 5] = [switch::FAMILY, qwen3_moe::FAMILY, qwen2_moe::FAMILY, olmoe::FAMILY, mixtral::FAMILY];

/// Reads the config of whichever family it is of, one of the caller's `own` or a built-in one; how it writes, only by the
/// tokens that start and end an answer. `path` is for messages.
pub(crate) fn config(json: &Map<String, Value>, path: &Path, own: &[Family]) -> Result<ModelConfig, ModelError> {
    #[derive(Deserialize)]
    struct Head {
        #[serde(default)]
        architectures: Vec<String>,
    }
    let invalid = |source| ModelError::Json { path: path.to_owned(), source };
    let head = Head::deserialize(json).map_err(invalid)?;
    let families = || own.iter().chain(&BUILT_IN);
    match families().find(|family| head.architectures == [family.architecture]) {
        Some(family) => (family.config)(&Json { object: json, path }),
        None => Err(ModelError::Architecture {
            path: path.to_owned(),
            found: format!("{:?}", head.architectures),
            expected: families().map(|family| family.architecture).collect::<Vec<_>>().join(", "),
        }),
    }
}

/// What a model of a family computes.
pub(crate) fn spec(config: &ModelConfig) -> ModelSpec {
    match &config.causal {
        Some(causal) => causal.spec(config),
        None => switch::spec(config),
    }
}
