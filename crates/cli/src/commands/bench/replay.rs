//! Recorded routes in the place of the router's choice: `--routes`. Whatever weights a model has, its experts are wanted then as a
//! real model wants them, one token after another, so that residency and speed can be measured. Only where the coordinator is in
//! this process: nobody else's routers are overruled.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use serde_json::{Value, json};
use sida_coordinator::CoordinatorConfig;
use sida_model::ModelConfig;
use sida_routing::{RecordedRoutes, recorded_routes::Phase};

use crate::{
    bad_configuration::BadConfiguration,
    routes_file::{self, Model},
};

/// Routes for the model that is measured.
#[derive(Clone, Debug)]
pub(crate) struct Replay {
    file: PathBuf,
    routes: Arc<RecordedRoutes>,
    /// Layers of the file.
    layers_recorded: usize,
    /// Experts that the model's routers choose for a token.
    top_k: usize,
}

impl Replay {
    /// Reads a file of routes for a model.
    pub(crate) fn read(file: &Path, config: &ModelConfig) -> Result<Self, BadConfiguration> {
        if config.has_encoder() {
            let family = config.family;
            return Err(BadConfiguration::new(format!(
                "--routes is for decoder-only models, those of family {family} have an encoder"
            )));
        }
        let (layers, num_experts, top_k) = (config.moe_layer_count(), config.num_experts, config.top_k);
        let read = routes_file::read(file, Some(Model { layers, num_experts, top_k }))?;
        Ok(Self { file: file.to_owned(), routes: Arc::new(read.routes), layers_recorded: read.layers, top_k })
    }

    /// Has a coordinator replay them.
    pub(crate) fn apply(&self, config: &mut CoordinatorConfig) {
        config.recorded_routes = Some(self.routes.clone());
    }

    /// As `--json` tells it.
    pub(crate) fn as_json(&self) -> Value {
        json!({
            "file": self.file.display().to_string(),
            "prompt_tokens": self.routes.tokens(Phase::Prompt),
            "generated_tokens": self.routes.tokens(Phase::Decoding),
            "layers": self.routes.layers(),
            "layers_recorded": self.layers_recorded,
            "experts_per_token": self.routes.top_k(),
            "experts_per_token_of_the_model": self.top_k,
        })
    }
}

/// What a person is told where routes were replayed, of [`Replay::as_json`]; nothing where none were.
pub(crate) fn told(parameters: &Value) -> Option<String> {
    let routes = &parameters["routes"];
    let count = |name: &str| routes[name].as_u64().unwrap_or(0);
    let (experts, of_model) = (count("experts_per_token"), count("experts_per_token_of_the_model"));
    let fewer = match experts < of_model {
        true => format!(", {experts} experts a token where its routers choose {of_model}"),
        false => String::new(),
    };
    let (layers, recorded) = (count("layers"), count("layers_recorded"));
    let cut = match layers < recorded {
        true => format!(", the first {layers} layers of {recorded}"),
        false => String::new(),
    };
    routes["file"].as_str().map(|file| {
        let (prompt, generated) = (count("prompt_tokens"), count("generated_tokens"));
        format!(
            "experts are not those that the routers chose but those recorded in {file}: {prompt} tokens of prompts and \
             {generated} generated ones, each sequence from a place of its own{fewer}{cut}"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_person_is_told_what_was_replayed() {
        // Would break: figures under recorded routes are taken for those of the model's own routers, or a lighter load for the
        // whole one.
        let told_of = |layers, top_k| {
            let routes = json!({"file": "a.csv", "prompt_tokens": 28, "generated_tokens": 128, "layers": layers,
                "layers_recorded": 48, "experts_per_token": top_k, "experts_per_token_of_the_model": 8});
            told(&json!({ "routes": routes })).unwrap()
        };
        let all = told_of(48, 8);
        assert!(all.contains("recorded in a.csv: 28 tokens of prompts and 128 generated ones"), "{all}");
        assert!(!all.contains("experts a token") && !all.contains("layers"), "{all}");
        let part = told_of(4, 6);
        assert!(part.contains("6 experts a token where its routers choose 8, the first 4 layers of 48"), "{part}");
        assert_eq!(told(&json!({})), None);
    }
}
