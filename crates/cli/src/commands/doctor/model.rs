//! The findings of `doctor` about a model: everything that loading it checks, and no weights are read. What is only compared
//! when a tensor is used (SHA-256 of all weights) is `sida verify`'s.

use std::{path::Path, sync::Arc};

use sida_model::{
    Checkpoint, ModelConfig, ModelError,
    manifest::{self, Manifest},
};
use sida_telemetry::counted;

use super::{Finding, Verdict, finding};
use crate::{
    model_check::{self, CHAT_MISSING, Part},
    model_dir,
};

/// Said of what cannot be looked at as long as something else is wrong.
const NOT_YET: &str = "not looked at: what is wrong above comes first";

/// One finding for each thing that a model consists of.
pub(super) fn findings(named: Option<&Path>) -> Vec<Finding> {
    let dir = match model_dir::find(named) {
        Ok(dir) => dir,
        Err(error) => return vec![finding(Verdict::Bad, "model", error.to_string())],
    };
    let config = match ModelConfig::open_alone(&dir) {
        Ok(config) => config,
        Err(error) => return vec![finding(Verdict::Bad, "model", error.to_string())],
    };
    let layers = counted(config.moe_layer_count(), "MoE layer");
    let shown = model_dir::full_path(&dir);
    let text = format!("{}: {layers} of {} experts", shown.display(), config.num_experts);
    let (whole, manifest, opened) = (ModelConfig::open(&dir), Manifest::read(&dir), Checkpoint::open(&dir));
    let tensors = tensors(&opened, whole.is_err() || manifest.is_err());
    let loaded = opened.as_ref().ok().filter(|_| tensors.verdict == Verdict::Good);
    vec![
        finding(Verdict::Good, "model", text),
        generation(&whole),
        manifest_finding(&dir, &manifest, &opened),
        tensors,
        tokenizer(&dir, whole.as_ref().unwrap_or(&config)),
        chat(&dir),
        predictor(loaded),
    ]
}

/// What the model's files say of how it writes.
fn generation(config: &Result<ModelConfig, ModelError>) -> Finding {
    match config {
        Ok(config) if config.generation.ignored.is_empty() => {
            finding(Verdict::Good, "generation", "answers follow the model's generation config")
        }
        Ok(config) => {
            let fields = config.generation.ignored.join(", ");
            finding(Verdict::Note, "generation", format!("what is asked for and not served: {fields}"))
        }
        Err(error) => finding(Verdict::Bad, "generation", error.to_string()),
    }
}

fn manifest_finding(
    dir: &Path,
    manifest: &Result<Option<Manifest>, ModelError>,
    opened: &Result<Arc<Checkpoint>, ModelError>,
) -> Finding {
    let shown = dir.display();
    match (manifest, opened) {
        (Err(error), _) | (Ok(Some(_)), Err(error @ ModelError::Manifest { .. })) => {
            finding(Verdict::Bad, "manifest", error.to_string())
        }
        (Ok(Some(manifest)), _) => {
            let text = format!(
                "{} tensors are checked when they are used; `sida verify {shown}` checks them now",
                manifest.tensors()
            );
            finding(Verdict::Good, "manifest", text)
        }
        (Ok(None), _) => {
            let name = manifest::FILE_NAME;
            finding(
                Verdict::Note,
                "manifest",
                format!("no {name}; `sida verify {shown} --write-manifest` makes one of what is there now"),
            )
        }
    }
}

/// `is_told`: why the model cannot be opened stands in another finding.
fn tensors(opened: &Result<Arc<Checkpoint>, ModelError>, is_told: bool) -> Finding {
    match opened {
        Ok(checkpoint) => found("tensors", model_check::tensors(checkpoint), Verdict::Bad, "none"),
        Err(error) if is_told || matches!(error, ModelError::Manifest { .. }) => {
            finding(Verdict::Note, "tensors", NOT_YET)
        }
        Err(error) => finding(Verdict::Bad, "tensors", error.to_string()),
    }
}

fn tokenizer(dir: &Path, config: &ModelConfig) -> Finding {
    let missing = "the model has no tokenizer.json: texts cannot be read";
    found("tokenizer", model_check::tokenizer(dir, config), Verdict::Bad, missing)
}

fn chat(dir: &Path) -> Finding {
    found("chat", model_check::chat(dir), Verdict::Note, CHAT_MISSING)
}

/// Of a model whose tensors are sound: a predictor is one of those.
fn predictor(model: Option<&Arc<Checkpoint>>) -> Finding {
    let missing = "none: nothing is preloaded; `sida train-predictor` makes one";
    match model {
        Some(checkpoint) => found("predictor", model_check::predictor(checkpoint), Verdict::Note, missing),
        None => finding(Verdict::Note, "predictor", NOT_YET),
    }
}

/// The finding of a part; `missing` is said, with that verdict, where there is none.
fn found(what: &'static str, part: Part, missing_is: Verdict, missing: &str) -> Finding {
    match part {
        Part::Sound(text) => finding(Verdict::Good, what, text),
        Part::Missing => finding(missing_is, what, missing),
        Part::Unusable(error) => finding(Verdict::Bad, what, error),
    }
}
