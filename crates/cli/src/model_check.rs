//! What of a model could not be loaded, part by part: its tensors, its tokenizer, its chat template, its hash predictor. Told by
//! `doctor` and by `inspect`, which load nothing.

use std::{path::Path, sync::Arc};

use sida_model::{ChatTemplate, Checkpoint, ModelConfig, Tokenizer};

use crate::{
    arguments::predictor::{self, default_file},
    told::told,
};

/// The tokenizer's file in a model's directory.
const TOKENIZER: &str = "tokenizer.json";

/// Said of a model without a chat template.
pub(crate) const CHAT_MISSING: &str = "no chat template: texts are answered, conversations are not";

/// A part of a model, as it was found.
pub(crate) enum Part {
    /// It can be loaded; and what it is.
    Sound(String),
    /// The model has none.
    Missing,
    /// It cannot be loaded; and why.
    Unusable(String),
}

impl Part {
    fn of(found: anyhow::Result<String>) -> Self {
        found.map_or_else(|error| Self::Unusable(told(&error)), Self::Sound)
    }
}

/// The tensors, by their headers.
pub(crate) fn tensors(checkpoint: &Arc<Checkpoint>) -> Part {
    let all = || format!("{}, with all that config.json speaks of", checkpoint.names().count());
    Part::of(checkpoint.check_tensors().map(|()| all()).map_err(Into::into))
}

/// The tokenizer.
pub(crate) fn tokenizer(dir: &Path, config: &ModelConfig) -> Part {
    if is_missing(&dir.join(TOKENIZER)) {
        return Part::Missing;
    }
    let fits = |_| format!("{TOKENIZER} fits the vocabulary of {}", config.vocab_size);
    Part::of(Tokenizer::open(dir, config).map(fits).map_err(Into::into))
}

/// The template by which conversations are written.
pub(crate) fn chat(dir: &Path) -> Part {
    match ChatTemplate::open(dir) {
        Ok(Some(_)) => Part::Sound("conversations are written by the model's template".to_owned()),
        Ok(None) => Part::Missing,
        Err(error) => Part::Unusable(error.to_string()),
    }
}

/// The hash predictor beside the model.
pub(crate) fn predictor(checkpoint: &Arc<Checkpoint>) -> Part {
    let file = default_file(checkpoint);
    if is_missing(&file) {
        return Part::Missing;
    }
    let opened = predictor::open(&file, checkpoint);
    Part::of(opened.map(|predictor| format!("{}, top {}", predictor.net(), predictor.top_k())))
}

/// Whether there is no such file. One that cannot be looked for is there, and opening it says why it cannot be read.
fn is_missing(file: &Path) -> bool {
    matches!(file.try_exists(), Ok(false))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_template_that_cannot_be_parsed_is_found() {
        // Would break: a model is called healthy whose every conversation is refused.
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(chat(dir.path()), Part::Missing));
        let template = dir.path().join("chat_template.jinja");
        fs::write(&template, "{{ messages[0].content }}").unwrap();
        assert!(matches!(chat(dir.path()), Part::Sound(_)));
        fs::write(&template, "{% if %}").unwrap();
        let Part::Unusable(reason) = chat(dir.path()) else { panic!("it was taken") };
        assert!(reason.contains("chat_template.jinja") && reason.contains("syntax error"), "{reason}");
    }
}
