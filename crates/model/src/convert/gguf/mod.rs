//! A model in a GGUF file, as llama.cpp runs it: what it says becomes a model directory, and its tensors keep their bytes.
//!
//! In reading order: `bytes` and `header` (what a file says, under limits), `metadata` (that, by key), `files` (a file, or all parts
//! of one), `config` (config.json), `tokens` and `tokenizer` (tokenizer.json), `tensors` (names and places).

mod bytes;
mod config;
mod files;
mod header;
mod metadata;
mod tensors;
mod tokenizer;
mod tokens;

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    path::Path,
};

use serde_json::{Map, Value};

use self::{files::Files, tensors::Planned, tokens::Tokens};
use super::{ConvertError, tensor_names};
use crate::{
    BlockFormats, ModelConfig, ModelError, StoredDType, Tokenizer,
    config::{CONFIG, QUANTIZATION, quantization},
    generation::GENERATION_CONFIG,
    shards::{self, TensorSpec},
};

/// A GGUF file, open.
#[derive(Debug)]
pub(super) struct Gguf {
    files: Files,
    /// config.json.
    json: Map<String, Value>,
    config: ModelConfig,
    tensors: BTreeMap<String, Planned>,
}

impl Gguf {
    /// Opens a file, or the first part of one that was split. Refuses what could not be loaded again.
    pub(super) fn open(path: &Path) -> Result<Self, ConvertError> {
        let files = Files::open(path)?;
        let meta = files.metadata();
        let family = config::family(&meta)?;
        let mut json = config::config(&files, family)?;
        Tokens::read(&meta)?.add_to(&mut json);
        if files.tensors().values().any(|tensor| tensor.dtype.is_blocks()) {
            json.insert(QUANTIZATION.to_owned(), quantization());
        }
        let config = ModelConfig::parse(Value::from(json.clone()).to_string().as_bytes(), path)?;
        let tensors = tensors::planned(&files, &config, family.turns_rows)?;
        let specs: Vec<TensorSpec> = tensors.values().map(|planned| planned.spec.clone()).collect();
        tensor_names::check(&config, &specs, &BTreeMap::new(), path)?;
        Ok(Self { files, json, config, tensors })
    }

    /// What is to be written, by name.
    pub(super) fn specs(&self) -> Vec<TensorSpec> {
        self.tensors.values().map(|planned| planned.spec.clone()).collect()
    }

    pub(super) fn dtype(&self, name: &str) -> StoredDType {
        self.tensors[name].spec.dtype
    }

    /// Writes the data of a tensor.
    pub(super) fn write(&self, name: &str, out: &mut dyn Write) -> io::Result<()> {
        self.tensors[name].write(&self.files, out)
    }

    /// Writes what is beside the weights, and has the tokenizer opened as it will be.
    pub(super) fn write_beside(&self, out: &Path, formats: BlockFormats) -> Result<(), ConvertError> {
        let meta = self.files.metadata();
        let tokens = Tokens::read(&meta)?;
        let mut config = Value::from(self.json.clone());
        formats.tell(&mut config);
        shards::write_json(out.join(CONFIG), &config)?;
        shards::write_json(out.join(GENERATION_CONFIG), &tokens.generation_config())?;
        shards::write_json(out.join("tokenizer_config.json"), &tokens.tokenizer_config())?;
        shards::write_json(out.join("tokenizer.json"), &tokenizer::tokenizer(&meta, &tokens)?)?;
        if let Some(template) = meta.text_if_any("tokenizer.chat_template")? {
            let path = out.join("chat_template.jinja");
            fs::write(&path, template).map_err(|source| ModelError::Write { path, source })?;
        }
        Tokenizer::open(out, &self.config)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
