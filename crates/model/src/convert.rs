//! `pytorch_model.bin`, GGUF files, GPTQ, AWQ, compressed-tensors and FP8 to safetensors, once, with a manifest, and any to fewer
//! bits: the only code that reads pickle, GGUF or quantised checkpoints. Called by `sida convert`.
//!
//! In reading order: `pickle` (what a state dictionary says, without running it), `torch_file` (where a
//! tensor's bytes are), `tensor_names` (what a tensor is called, and which must be there), `torch_checkpoint` (all
//! files of one), `gguf` (a GGUF file), `quantized` (the others), `source` (any of these, or safetensors).

mod gguf;
mod pickle;
mod quantized;
mod source;
mod tensor_names;
mod torch_checkpoint;
mod torch_file;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use serde_json::Value;
use thiserror::Error;

pub use pickle::PickleError;

use self::source::Source;
use crate::{
    BlockFormats, ModelError, blocks, bounded_file,
    config::CONFIG,
    fresh_directory::FreshDirectory,
    manifest::Manifest,
    shards::{self, TensorSpec},
};

const SINGLE: &str = "pytorch_model.bin";
const INDEX: &str = "pytorch_model.bin.index.json";
/// What is copied beside the weights, where it exists.
const COPIED: [&str; 7] = [
    CONFIG,
    "generation_config.json",
    "chat_template.jinja",
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
    #[error("{}: {reason}", file.display())]
    Gguf { file: PathBuf, reason: String },
    #[error("{}: {key} is {found}, expected {expected}", file.display())]
    GgufKey { file: PathBuf, key: String, found: String, expected: String },
    #[error("{} has no config.json but GGUF files: name one of these, the first if a model was split, as {}", dir.display(), file.display())]
    GgufUnnamed { dir: PathBuf, file: PathBuf },
    #[error("tensor {tensor} holds {found}, expected {expected}")]
    Packed { tensor: String, found: String, expected: String },
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

/// Converts `from` (a directory with config.json, and pytorch_model.bin or its shards with their index, to blocks also
/// safetensors; or safetensors of packed integers or FP8; or a GGUF file, the first if it was split) into `out`, which must not exist or be empty: safetensors of at most 4 GB each, the config and tokenizer files, and a
/// manifest. Values keep their dtype and their blocks, but for those that become blocks; copies of the embedding are dropped as transformers
/// does when it ties them, and so are buffers that hold no weights. Prefixes of wrappers (`module.`) are taken off. Refused
/// is what could not be loaded again. On failure nothing is left at `out`. Reports (bytes written, bytes total).
pub fn convert(
    from: &Path,
    out: &Path,
    formats: BlockFormats,
    on_progress: &mut dyn FnMut(u64, u64),
) -> Result<Converted, ConvertError> {
    let source = Source::open(from, formats)?;
    let (stored, tied) = source.specs()?;
    let specs = stored.iter().map(|spec| formats.applied(spec)).collect::<Result<Vec<_>, _>>()?;
    let directory = FreshDirectory::create(out)?;
    source.write_beside(directory.path(), formats)?;
    let total: u64 = specs.iter().map(TensorSpec::bytes).sum();
    let mut done = 0;
    shards::write(directory.path(), &specs, shards::SHARD_BYTES_MAX, &mut |spec, file| {
        blocks::write(source.dtype(&spec.name), spec, file, |out| source.write(&spec.name, out))?;
        done += spec.bytes();
        on_progress(done, total);
        Ok(())
    })
    .map_err(of_source)?;
    write_manifest(directory.path(), &mut |_, _| ())?;
    directory.finish()?;
    let (others, dropped_prefixes) = source.left_out();
    Ok(Converted { tensors: specs.len(), bytes: total, tied, others, dropped_prefixes })
}

/// What a source refuses while it is written, which reached the writer as a failure to write: no file of ours is wrong then.
fn of_source(error: ModelError) -> ConvertError {
    let ModelError::Write { path, source } = error else { return error.into() };
    let unwritten = |source| ModelError::Write { path, source }.into();
    match source.downcast::<ConvertError>().map_err(io::Error::downcast::<ModelError>) {
        Ok(refused) => refused,
        Err(other) => other.map_or_else(unwritten, ConvertError::from),
    }
}

/// Writes a manifest into a directory that holds safetensors already. Reports (bytes hashed, bytes total).
pub fn write_manifest(dir: &Path, on_progress: &mut dyn FnMut(u64, u64)) -> Result<Manifest, ModelError> {
    let manifest = Manifest::of_directory(dir, on_progress)?;
    manifest.write()?;
    Ok(manifest)
}

/// Copies what is beside the weights; where some of these become blocks, config.json says so.
fn copied(dir: &Path, out: &Path, formats: BlockFormats) -> Result<(), ModelError> {
    for name in COPIED {
        let path = dir.join(name);
        if path.exists() {
            let content = bounded_file::read(&path, COPIED_BYTES_MAX)?;
            let path = out.join(name);
            fs::write(&path, content).map_err(|source| ModelError::Write { path, source })?;
        }
    }
    if formats.is_any() {
        let mut config: Value = bounded_file::read_json(&dir.join(CONFIG), COPIED_BYTES_MAX)?;
        formats.tell(&mut config);
        shards::write_json(out.join(CONFIG), &config)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
