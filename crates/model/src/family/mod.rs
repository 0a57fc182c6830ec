//! The families of models: `architectures` of config.json picks one. A family knows how its config reads, and what
//! blocks that means; it computes nothing. Called by [`ModelConfig`].

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{ModelConfig, ModelError, ModelSpec};

mod switch;

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
    match head.architectures.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [switch::ARCHITECTURE] => switch::config(json, path),
        _ => Err(ModelError::Architecture {
            path: path.to_owned(),
            found: format!("{:?}", head.architectures),
            expected: switch::ARCHITECTURE,
        }),
    }
}

/// What a model of a family computes. There is one family.
pub(crate) fn spec(config: &ModelConfig) -> ModelSpec {
    switch::spec(config)
}
