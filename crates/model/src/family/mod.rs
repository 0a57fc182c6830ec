//! The families of models: `architectures` of config.json picks one. A family knows how its config reads, and what
//! blocks that means; it computes nothing. Called by [`ModelConfig`].

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

pub use causal::Causal;

/// Every architecture that is known.
const ARCHITECTURES: [&str; 5] = [
    switch::ARCHITECTURE,
    qwen3_moe::ARCHITECTURE,
    qwen2_moe::ARCHITECTURE,
    olmoe::ARCHITECTURE,
    mixtral::ARCHITECTURE,
];

/// Reads the config of whichever family it is of; how it writes, only by the tokens that start and end an answer. `path` is
/// for messages.
pub(crate) fn config(json: &Map<String, Value>, path: &Path) -> Result<ModelConfig, ModelError> {
    #[derive(Deserialize)]
    struct Head {
        #[serde(default)]
        architectures: Vec<String>,
    }
    let invalid = |source| ModelError::Json { path: path.to_owned(), source };
    let head = Head::deserialize(json).map_err(invalid)?;
    let fields = json::Json { object: json, path };
    match head.architectures.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [switch::ARCHITECTURE] => switch::config(json, path),
        [qwen3_moe::ARCHITECTURE] => qwen3_moe::config(&fields),
        [qwen2_moe::ARCHITECTURE] => qwen2_moe::config(&fields),
        [olmoe::ARCHITECTURE] => olmoe::config(&fields),
        [mixtral::ARCHITECTURE] => mixtral::config(&fields),
        _ => Err(ModelError::Architecture {
            path: path.to_owned(),
            found: format!("{:?}", head.architectures),
            expected: ARCHITECTURES.join(", "),
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
