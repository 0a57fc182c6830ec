//! `pytorch_model.bin` to safetensors, once, with a manifest: the only code that reads pickle. Called by
//! `sida convert`.
//!
//! In reading order: `pickle` (what a state dictionary says, without running it), `torch_file` (where a
//! tensor's bytes are), `tensor_names` (what a tensor is called, and which must be there).

mod pickle;
mod tensor_names;
mod torch_file;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use thiserror::Error;

pub use pickle::PickleError;

use self::{tensor_names::Renamed, torch_file::TorchFile};
use crate::{
    ModelConfig, ModelError, bounded_file,
    fresh_directory::FreshDirectory,
    manifest::{Manifest, is_plain_file_name},
    names::TensorNames,
    shards::{self, TensorSpec},
};

const SINGLE: &str = "pytorch_model.bin";
const INDEX: &str = "pytorch_model.bin.index.json";
/// A longer index is refused.
const INDEX_BYTES_MAX: u64 = 64 << 20;
/// What is copied beside the weights, where it exists.
const COPIED: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "spiece.model",
];
/// A longer file is not copied but refused: none of them holds weights.
const COPIED_BYTES_MAX: u64 = 64 << 20;

/// Why a checkpoint cannot be converted.
#[derive(Debug, Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum ConvertError {
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("{} holds neither {SINGLE} nor {INDEX}{hint}", dir.display())]
    NoPickle { dir: PathBuf, hint: &'static str },
    #[error("{}: {reason}", file.display())]
    Archive { file: PathBuf, reason: String },
    #[error("{}: {source}", file.display())]
    Pickle { file: PathBuf, source: PickleError },
    #[error("{}: shard name {shard:?} is not a plain file name", index.display())]
    ShardName { index: PathBuf, shard: String },
    #[error("{}: tensor {tensor} should be in {shard}, which does not hold it", index.display())]
    ShardTensor { index: PathBuf, tensor: String, shard: String },
    #[error("tensors {first} and {second} are both {plain} once what wrapped the model is taken off their names")]
    TwoOfOneName { plain: String, first: String, second: String },
}

impl ConvertError {
    /// Whether trying again will fail again; see [`ModelError::is_lasting`].
    pub fn is_lasting(&self) -> bool {
        match self {
            Self::Model(error) => error.is_lasting(),
            _ => true,
        }
    }
}

/// What a conversion wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Converted {
    /// Tensors written.
    pub tensors: usize,
    /// Bytes of them.
    pub bytes: u64,
    /// Tensors left out because another one holds the same weights.
    pub tied: Vec<String>,
    /// Tensors left out because they hold no weights, and what they hold.
    pub others: Vec<(String, &'static str)>,
    /// What was taken off the beginning of names, and off how many.
    pub dropped_prefixes: Vec<(String, usize)>,
}

/// Converts `source` (config.json, and pytorch_model.bin or its shards with their index) into `out`, which
/// must not exist or be empty: safetensors of at most 4 GB each, the config and tokenizer files, and a
/// manifest. Values keep their dtype; copies of the embedding are dropped as transformers does when it ties
/// them, and so are buffers that hold no weights. Prefixes of wrappers (`module.`) are taken off. Refused is what could
/// not be loaded again. On failure nothing is left at `out`. Reports (bytes written, bytes total).
pub fn convert(source: &Path, out: &Path, on_progress: &mut dyn FnMut(u64, u64)) -> Result<Converted, ConvertError> {
    let config = ModelConfig::open(source)?;
    let input = Input::open(source, config.names)?;
    let (specs, tied) = input.untied(&config);
    tensor_names::check(&config, &specs, &input.others, source)?;
    let directory = FreshDirectory::create(out)?;
    write(&input, source, directory.path(), &specs, on_progress)?;
    directory.finish()?;
    Ok(Converted {
        tensors: specs.len(),
        bytes: specs.iter().map(TensorSpec::bytes).sum(),
        tied,
        others: input.others.into_iter().collect(),
        dropped_prefixes: input.names.dropped.into_iter().collect(),
    })
}

/// Writes a manifest into a directory that holds safetensors already. Reports (bytes hashed, bytes total).
pub fn write_manifest(dir: &Path, on_progress: &mut dyn FnMut(u64, u64)) -> Result<Manifest, ModelError> {
    let manifest = Manifest::of_directory(dir, on_progress)?;
    manifest.write()?;
    Ok(manifest)
}

fn write(
    input: &Input,
    source: &Path,
    out: &Path,
    specs: &[TensorSpec],
    on_progress: &mut dyn FnMut(u64, u64),
) -> Result<(), ConvertError> {
    for name in COPIED {
        let path = source.join(name);
        if path.exists() {
            let content = bounded_file::read(&path, COPIED_BYTES_MAX)?;
            let path = out.join(name);
            fs::write(&path, content).map_err(|source| ModelError::Write { path, source })?;
        }
    }
    let total: u64 = specs.iter().map(TensorSpec::bytes).sum();
    let mut done = 0;
    shards::write(out, specs, shards::SHARD_BYTES_MAX, &mut |spec, file| {
        let stored = &input.names.stored[&spec.name];
        input.files[input.holder[stored]].write(stored, file)?;
        done += spec.bytes();
        on_progress(done, total);
        Ok(())
    })?;
    write_manifest(out, &mut |_, _| ())?;
    Ok(())
}

/// The files of a checkpoint, open.
struct Input {
    files: Vec<TorchFile>,
    /// For each tensor by its stored name, which of `files` holds it.
    holder: BTreeMap<String, usize>,
    names: Renamed,
    /// Tensors that hold no weights, and what they hold.
    others: BTreeMap<String, &'static str>,
}

/// `pytorch_model.bin.index.json`.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Input {
    fn open(dir: &Path, tensor_names: TensorNames) -> Result<Self, ConvertError> {
        let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
        if single.exists() {
            let file = TorchFile::open(&single)?;
            let names: Vec<_> = file.specs().map(|spec| spec.name.as_str()).collect();
            let others = file.others().map(|(name, _)| name);
            let holder = names.into_iter().chain(others).map(|name| (name.to_owned(), 0)).collect();
            return Self::of(vec![file], holder, tensor_names);
        }
        if index.exists() {
            return Self::open_shards(dir, &index, tensor_names);
        }
        let is_safetensors = |name| dir.join(name).exists();
        let hint = if ["model.safetensors", "model.safetensors.index.json"].into_iter().any(is_safetensors) {
            ": it is safetensors already and needs no conversion"
        } else {
            ""
        };
        Err(ConvertError::NoPickle { dir: dir.to_owned(), hint })
    }

    fn open_shards(dir: &Path, path: &Path, tensor_names: TensorNames) -> Result<Self, ConvertError> {
        let index: Index = bounded_file::read_json(path, INDEX_BYTES_MAX)?;
        let names: BTreeSet<&String> = index.weight_map.values().collect();
        let mut files = Vec::new();
        for &shard in &names {
            if !is_plain_file_name(shard) {
                return Err(ConvertError::ShardName { index: path.to_owned(), shard: shard.clone() });
            }
            files.push(TorchFile::open(&dir.join(shard))?);
        }
        let mut holder = BTreeMap::new();
        for (tensor, shard) in &index.weight_map {
            let file = names.iter().position(|&name| name == shard).expect("every shard was opened");
            if !files[file].holds(tensor) {
                let (index, tensor, shard) = (path.to_owned(), tensor.clone(), shard.clone());
                return Err(ConvertError::ShardTensor { index, tensor, shard });
            }
            holder.insert(tensor.clone(), file);
        }
        Self::of(files, holder, tensor_names)
    }

    fn of(files: Vec<TorchFile>, holder: BTreeMap<String, usize>, names: TensorNames) -> Result<Self, ConvertError> {
        let names = tensor_names::renamed(holder.keys(), names)?;
        let kinds: BTreeMap<_, _> = files.iter().flat_map(TorchFile::others).collect();
        let others = names.stored.iter().filter_map(|(name, stored)| Some((name.clone(), *kinds.get(&**stored)?)));
        let others = others.collect();
        Ok(Self { files, holder, names, others })
    }

    /// What to write, by name, and the tied copies that are not written. A tensor that config.json ties to another one but
    /// whose values differ is none.
    fn untied(&self, config: &ModelConfig) -> (Vec<TensorSpec>, Vec<String>) {
        let mut names = if config.tie_word_embeddings { config.names.tied().to_vec() } else { Vec::new() };
        names.dedup();
        let held: Vec<String> = names.into_iter().filter(|name| self.names.stored.contains_key(name)).collect();
        let copies = held.iter().skip(1).filter(|copy| self.is_copy(copy, &held[0]));
        let mut tied: Vec<String> = copies.cloned().collect();
        tied.sort();
        let is_kept = |name: &String| !self.others.contains_key(name) && !tied.contains(name);
        let kept = self.names.stored.iter().filter(|(name, _)| is_kept(name));
        let spec = |(name, stored): (&String, &String)| TensorSpec {
            name: name.clone(),
            ..self.files[self.holder[stored]].spec(stored).clone()
        };
        let specs = kept.map(spec).collect();
        (specs, tied)
    }

    fn is_copy(&self, copy: &str, of: &str) -> bool {
        let [copy, of] = [copy, of].map(|name| &self.names.stored[name]);
        let (one, other) = (&self.files[self.holder[copy]], &self.files[self.holder[of]]);
        one.is_copy(copy, other, of)
    }
}

#[cfg(test)]
mod tests;
